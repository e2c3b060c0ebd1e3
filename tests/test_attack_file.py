"""Attacks on the file of a `MemoryPool`: bad bytes, bombs, signals, threads, system calls that fail, links and modes.

Afterwards the file is the old one or the new one, the pool saves again without complaint, and what was read is what was written."""
import errno
import io
import itertools
import json
import os
import random
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile

import numpy as np
import pytest
from numpy.lib.recfunctions import repack_fields

from data_io_nbdev import MemoryBuffer, MemoryPool, PoolQuery
from data_io_nbdev.data.core import Episode
from data_io_nbdev.errors import CorruptData, DataIOError, PoolUnavailable
from data_io_nbdev.storage.pool import memory
from data_io_nbdev.storage.pool.memory import FORMAT
from data_io_nbdev.testing import drive, facts_of, schemas
from test_memory_file import everything, fill, others, sample

posix = pytest.mark.skipif(os.name != "posix", reason="modes, links and signals as POSIX has them")


@pytest.fixture
def path(tmp_path): return tmp_path / "pool.npz"


def members(data):
    "Name to bytes"
    with zipfile.ZipFile(io.BytesIO(data)) as file: return {name: file.read(name) for name in file.namelist()}


def zipped(parts, compression=zipfile.ZIP_STORED):
    "A zip of `(name, bytes)`, also where a name comes twice"
    out = io.BytesIO()
    with pytest.warns(UserWarning, match="Duplicate") if len(dict(parts)) < len(parts) else open(os.devnull), zipfile.ZipFile(out, "w", compression) as file:
        for name, content in parts: file.writestr(name, content)
    return out.getvalue()


def sealed(log):
    "A log as it is written, checksum and all, whatever it says"
    text = log if isinstance(log, str) else json.dumps(log)
    return (memory._seal(text) if '"format": 1,' not in text[:20] else text).encode()


def use(pool):
    "Ask a pool everything that can be asked; whatever is raised must be typed"
    for episode in pool: repr(episode), episode.to_frame(), episode.step, episode.id in pool
    pool.count(PoolQuery(time=("2026-01-01T01:00:03Z", "2026-01-01T03:00Z"), driver=["anna", "bo"])), list(pool.find(PoolQuery(length=(3, None))))
    for version in range(pool._oldest(), min(pool.version, 20) + 1): list(pool.snapshot(version).catalogue().itertuples())
    return everything(pool) if not pool._oldest() else None


def read(path, data, right):
    "What became of damaged bytes: refused, named by `verify`, or equal to what was written"
    path.write_bytes(data)
    try: pool = MemoryPool(path, "r")
    except CorruptData: return "refused"
    if pool.verify(): return "verify"
    assert use(pool) == right, "damaged data was read as if it were sound"
    return "equal"


@pytest.fixture(params=[1, 3, 4])
def saved(request): return sample(request.param).read_bytes(), everything(MemoryPool(sample(request.param), "r"))


class TestBytes:
    "Damage is noticed, wherever it is"

    def test_bits(self, attack, path, saved, request):
        "One bit turns over"
        data, right = saved
        def once(rng):
            at = int(rng.integers(len(data)))
            read(path, data[:at] + bytes([data[at] ^ (1 << int(rng.integers(8)))]) + data[at + 1:], right)
        attack(f"file: a bit turns over, {request.node.callspec.id}", 130, once)

    def test_places(self, attack, path, saved, request):
        "Members are exchanged, repeated, left out, renamed, cut, or come from another file; a sealed log notices all of it at once"
        data, right = saved
        mine, format = members(data), json.loads(members(data)["log.json"])["format"]
        other = MemoryPool(); fill(other); other.store(drive(6, hour=1, driver="bo")); other.save(path.with_name("other.npz"))
        theirs = members(path.with_name("other.npz").read_bytes() if format == FORMAT else sample({1: 3, 3: 2}[format]).read_bytes())
        def once(rng):
            a, b = rng.choice(sorted(mine), 2, replace=False)
            change = rng.choice(["exchanged", "repeated", "twice", "missing", "renamed", "cut", "another's", "a new one"])
            new, more = dict(mine), []
            if change == "exchanged": new[a], new[b] = new[b], new[a]
            elif change == "repeated": new[a] = new[b]
            elif change == "twice": more = [(a, mine[rng.choice([a, b])])]
            elif change == "missing": del new[a]
            elif change == "renamed": new[f"x{a}"] = new.pop(a)
            elif change == "cut": new[a] = new[a][:int(rng.integers(len(new[a])))]
            elif change == "another's": new[a] = theirs[a]
            else: more = [("info.npy", mine[a])]
            if new == mine and not more: return
            outcome = read(path, zipped([*new.items(), *more]), right)
            assert outcome == "refused" or format == 1 and a != "log.json", f"{a} was {change}, and opened"
        attack(f"file: members in other places, {request.node.callspec.id}", 80, once)

    @pytest.mark.parametrize("role, dtype", [("state", ">f4"), ("state", "<i4"), ("state", "<u4"), ("times", ">i8"), ("times", "<u8"), ("times", "<M8[us]"),
                                             ("terminated", "|u1"), ("reward", "<i4"), ("action", ">f4")])
    @pytest.mark.parametrize("seal", [False, True])
    def test_labels(self, path, saved, role, dtype, seal):
        "An array that says it is of another dtype is refused, also where whoever says so made the checksums right"
        data, right = saved
        new = members(data)
        array = np.lib.format.read_array(io.BytesIO(new[f"{role}.npy"]))
        out = io.BytesIO(); out.write(memory._npy_header(np.dtype(dtype), array.shape)); out.write(array.tobytes())
        new[f"{role}.npy"] = out.getvalue()
        if seal: new["log.json"] = reseal(new)
        assert read(path, zipped([*new.items()]), right) == "refused"

    @pytest.mark.parametrize("order", ["fortran", "shape", "version", "longer", "negative"])
    def test_heads(self, path, saved, order):
        "So is one in another order or shape"
        data, right = saved
        new, array = members(data), np.lib.format.read_array(io.BytesIO(members(data)["state.npy"]))
        out = io.BytesIO()
        if order == "fortran": np.lib.format.write_array(out, np.asfortranarray(array))
        elif order == "shape": np.lib.format.write_array(out, array.reshape(array.shape[::-1]))
        elif order == "version": np.lib.format.write_array(out, array, version=(1, 0))
        elif order == "longer": np.lib.format.write_array(out, np.concatenate([array, array]))
        else: out.write(memory._npy_header(array.dtype, (-1, 3)) + array.tobytes())
        new["state.npy"] = out.getvalue()
        new["log.json"] = reseal(new)
        assert read(path, zipped([*new.items()]), right) == "refused"

    def test_log(self, attack, path, saved, request):
        "Each entry of the log is missing or something else; a pool that opens nevertheless can be asked everything"
        data, right = saved
        whole, rest = json.loads(members(data)["log.json"]), {k: v for k, v in members(data).items() if k != "log.json"}
        whole.pop("sha256", None)
        places = sorted((way for way in paths_in(whole) if way[0] != "schema" or len(way) < 3 and way[-1] in ("schema", "fields", "identity", "format")), key=str)
        def once(rng):
            log, place = json.loads(json.dumps(whole)), places[int(rng.integers(len(places)))]
            value = JUNK[int(rng.integers(len(JUNK)))]
            target, last = get(log, place[:-1]), place[-1]
            if value is None: del target[last]
            else: target[last] = value(target[last]) if callable(value) else "JUNK"
            text = json.dumps(log).replace('"JUNK"', str(value), 1)
            content = zipped([*rest.items(), ("log.json", sealed(text))])
            path.write_bytes(content)
            try: pool = MemoryPool(path, "r")
            except CorruptData: return
            use(pool), pool.verify()
            pool.save(path.with_name("again.npz"), overwrite=True)
            assert MemoryPool(path.with_name("again.npz"), "r").version == pool.version
        attack(f"file: entries of the log, {request.node.callspec.id}", 120, once)

    def test_parts(self, attack, path):
        "Each value of each part is something else, under right checksums; a pool that opens nevertheless can be asked everything, and saved"
        new, refused, opened = members(sample(FORMAT).read_bytes()), set(), 0
        rows = parts_in(new)
        def once(rng):
            nonlocal opened
            forged = rows.copy()
            for _ in range(int(rng.integers(1, 3))):
                name, i = str(rng.choice(rows.dtype.names)), int(rng.integers(len(rows)))
                forge(forged, name, i, rng)
            if forged.tobytes() == rows.tobytes(): return
            with_parts(path, new, forged)
            try: pool = MemoryPool(path, "r")
            except CorruptData: return refused.add(name)
            opened += 1
            for part in pool._index.every_part(): assert part.length > 0 and isinstance(part.ended, bool)
            use(pool), pool.verify()
            pool.save(path.with_name("again.npz"), overwrite=True)
            assert MemoryPool(path.with_name("again.npz"), "r").version == pool.version
        attack("file: what parts say", 150, once)
        assert opened and refused >= {"who", "zone", "offset", "length", "begin", "end", "nbytes", "born", "version"}, (opened, refused)

    @pytest.mark.parametrize("name, value", [
        ("length", 0), ("length", -1), ("length", 2**63 - 1), ("length", 2**62), ("offset", 1), ("offset", -1), ("offset", 2**63 - 1), ("nbytes", 0), ("nbytes", 2**63 - 1),
        ("nbytes", -2**63), ("start", -2**63), ("start", 2**63 - 1), ("begin", -2**63), ("begin", 0), ("end", 2**63 - 1), ("end", -2**63), ("number", 5), ("number", -2**63), ("born", -1),
        ("born", 1), ("born", 99), ("version", 0), ("version", -1), ("version", 2), ("version", 99), ("who", -1), ("who", 99), ("who", -2**31), ("zone", -1), ("zone", 99)])
    def test_a_value(self, path, name, value):
        "What the first part cannot say is refused, and not found out later"
        new = members(sample(FORMAT).read_bytes())
        rows = parts_in(new)
        assert not rows["numbered"][0] and (rows["offset"][0], rows["born"][0], rows["version"][0]) == (0, 0, 1)
        rows[name][0] = value
        with_parts(path, new, rows)
        with pytest.raises(CorruptData): MemoryPool(path, "r")

    @pytest.mark.parametrize("name", ["numbered", "ended", "linked"])
    @pytest.mark.parametrize("value", [2, 255])
    def test_flags(self, path, name, value):
        "So is a flag that is neither set nor clear"
        new = members(sample(FORMAT).read_bytes())
        rows = parts_in(new)
        rows[name].view("u1")[0] = value
        with_parts(path, new, rows)
        with pytest.raises(CorruptData, match="flags"): MemoryPool(path, "r")

    @pytest.mark.parametrize("change", [
        lambda rows: rows[::-1], lambda rows: rows[:-1], lambda rows: np.concatenate([rows, rows[-1:]]), lambda rows: np.concatenate([rows, rows]), lambda rows: rows[:0],
        lambda rows: rows[[1, 0, *range(2, len(rows))]], lambda rows: rows.astype([(name, kind.newbyteorder(">")) for name, (kind, _) in rows.dtype.fields.items()]),
        lambda rows: repack_fields(rows[[*reversed(rows.dtype.names)]]), lambda rows: repack_fields(rows[[*rows.dtype.names[:-1]]]), lambda rows: rows.reshape(1, -1)],
        ids=["backwards", "one less", "the last twice", "twice", "none", "exchanged", "big-endian", "fields backwards", "a field less", "another shape"])
    @pytest.mark.parametrize("counted", [False, True])
    def test_tables(self, path, change, counted):
        "Rows in another order or number, and other columns"
        new = members(sample(FORMAT).read_bytes())
        with_parts(path, new, change(parts_in(new)), counted)
        with pytest.raises(CorruptData): MemoryPool(path, "r")

    def test_lengths_that_overflow(self, path):
        "Lengths of which the sum is no longer a number of 64 bits"
        new = members(sample(FORMAT).read_bytes())
        rows = parts_in(new)
        width = rows["nbytes"][0] // rows["length"][0]
        most = (2**63 - 1) // width
        for length in (most, most // 2, 2**62):
            rows["length"][-width:], rows["nbytes"][-width:] = length, (np.full(1, length) * width)[0]
            with_parts(path, new, rows)
            with pytest.raises(CorruptData): MemoryPool(path, "r")
        rows["length"], rows["nbytes"] = most, most * width
        rows = np.concatenate([rows[:1]] * (2 * width + 2))  # the sum is about what it was
        rows["id"] = np.arange(2 * len(rows), dtype=">u8").view("V16")  # of episodes of their own
        rows["version"] = 1
        with_parts(path, new, rows, counted=True, hide=False)
        with pytest.raises(CorruptData, match="more steps than can be counted"): MemoryPool(path, "r")

    @pytest.mark.parametrize("text", [
        "", "null", "7", "[]", "{}", '{"format": 1}', '{"format": 1, "commits": []}', '{"format": 1' + ', "a": {' * 10_000, '{"format": 1, "a": ' + "[" * 100_000,
        '{"format": 1, "token": "a", "last": 0, "horizon": 0, "schema": null}', '{"format": 1, "last": 0, "horizon": 0, "schema": null, "commits": []}',
        '{"format": 1, "token": "a", "last": 1, "horizon": 0, "schema": null, "commits": []}', '{"format": 1e400, "token": "a"}', '{"format": 0}', '{"format": -1}',
        '{"format": 1, "token": "a", "last": 0, "horizon": 1, "schema": null, "commits": []}', '{"format": 1, "token": "a", "last": 0, "horizon": 0, "commits": []}',
        '{"format": 1, "token": "a", "last": 0, "schema": null, "commits": []}', '{"format": 1, "token": "a", "last": NaN, "horizon": 0, "schema": null, "commits": []}',
        '{"format": 1, "token": "a", "last": 1e400, "horizon": 0, "schema": null, "commits": []}', '{"format": 1, "x": ' + "9" * 100_000 + "}", '{"format": 99999999999}'],
        ids=range(22))
    def test_logs(self, path, text):
        "A log that is hardly one"
        path.write_bytes(zipped([("log.json", text)]))
        with pytest.raises(CorruptData): MemoryPool(path, "r")


JUNK = (None, "null", "true", "0", "1", "-1", "7.5", "NaN", "1e400", "-Infinity", '""', '"x"', '"\\ud800"', '"2026-01-01"', "[]", "{}", "[[]]", '{"a": 1}',
        "9" * 30, "9223372036854775807", "-9223372036854775808", "[" * 500 + "]" * 500, lambda x: x + 1 if isinstance(x, int) else x, lambda x: x - 1 if isinstance(x, int) else x,
        lambda x: x * 2 if isinstance(x, (list, str, int)) else x, lambda x: x[:-1] if isinstance(x, (str, list)) else x, lambda x: x[::-1] if isinstance(x, list) else x,
        lambda x: [x], str, lambda x: {"x": x})  # texts of JSON, and changes to what was there


def paths_in(value, path=()):
    "The way to everything inside nested lists and objects; of a list the first, the second and the last"
    items = value.items() if isinstance(value, dict) else {i: value[i] for i in {0, 1, len(value) - 1} if 0 <= i < len(value)}.items() if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from paths_in(inner, (*path, key))


def get(value, path):
    for key in path: value = value[key]
    return value


EDGES = (0, 1, -1, 2, 5, 99, 2**31 - 1, -2**31, 2**62, 2**63 - 1, -2**63, -2**63 + 1)


def parts_in(new): return np.lib.format.read_array(io.BytesIO(new["parts.npy"])).copy()


def forge(rows, name, i, rng):
    "One value of a part: another part's, one more or less, any bytes, or one at the edge of what there is"
    field, how = rows[name], rng.integers(4)
    if how == 0: field[i] = field[int(rng.integers(len(rows)))]
    elif how == 1 and field.dtype.kind in "if": field[i] += rng.choice([-1, 1])
    elif how == 2 and field.dtype.kind in "if": field[i] = np.array(EDGES[int(rng.integers(len(EDGES)))]).astype(field.dtype)
    else: field[i] = np.frombuffer(rng.bytes(field[i].nbytes), field.dtype).reshape(field[i].shape)


def with_parts(path, new, rows, counted=False, hide=True):
    "A file with other parts, and right checksums; the log counts them, and hides none, where it is told to"
    out = io.BytesIO()
    out.write(memory._npy_header(rows.dtype, rows.shape) + rows.tobytes())
    new, log = {**new, "parts.npy": out.getvalue()}, json.loads(new["log.json"])
    if counted: log["parts"] = rows.size
    if not hide: log["commits"] = [{**commit, "hide": []} for commit in log["commits"]]
    new["log.json"] = reseal({**new, "log.json": json.dumps(log)})
    path.write_bytes(zipped([*new.items()]))


def reseal(new):
    "The log of changed members, with the right checksums"
    log = json.loads(new["log.json"])
    if log["format"] == 1: return new["log.json"]
    del log["sha256"]
    log["members"] = {name: zipfile.crc32(content) for name, content in new.items() if name != "log.json"}
    return sealed(log)


class TestHonest:
    "What was written honestly is never taken for damage"

    def test_histories(self, attack, path):
        "Pools with any history, of parts, overwritten, deleted and stored again"
        def once(rng):
            pool, hours = MemoryPool(), {}
            for _ in range(int(rng.integers(1, 12))):
                hour, what = int(rng.integers(4)), rng.choice(["store", "store", "part", "overwrite", "delete", "many"])
                try:
                    if what == "delete": pool.delete(drive(hour=hour).id)
                    elif what == "many": pool.extend([drive(int(rng.integers(1, 9)), hour=h) for h in rng.choice(9, 3, replace=False)])
                    elif what == "overwrite": pool.store(drive(int(rng.integers(1, 9)), hour=hour, seed=int(rng.integers(3)), step=int(rng.choice([0, 9]))), overwrite=True)
                    else: pool.store(drive(n := int(rng.integers(2, 9)), hour=hour)[:n if what == "store" else n // 2])
                except DataIOError: pass
            pool.save(path, overwrite=True)
            again = MemoryPool(path)
            assert everything(again) == everything(pool) and again.verify() == []
            again.save(path.with_name("once more.npz"), overwrite=True)
            assert everything(MemoryPool(path.with_name("once more.npz"))) == everything(pool)
        attack("file: honest histories", 60, once)

    def test_rings(self, attack, path):
        "Rings that forgot what left them"
        def once(rng):
            buffer = MemoryBuffer(batch_size=4, capacity=int(rng.integers(3, 30)))
            for _ in range(int(rng.integers(1, 25))):
                hour, n, what = int(rng.integers(5)), int(rng.integers(1, 10)), rng.choice(["store", "overwrite", "delete", "load"], p=[.7, .1, .1, .1])
                try:
                    if what == "store": buffer.store(drive(n, hour=hour))
                    elif what == "overwrite": buffer.pool.store(drive(n, hour=hour, seed=int(rng.integers(3))), overwrite=True); buffer.refresh()
                    elif what == "delete": buffer.pool.delete(drive(hour=hour).id); buffer.refresh()
                    else: buffer.load()
                except DataIOError: pass
            buffer.save(path, overwrite=True)
            again = MemoryPool(path)
            assert (facts_of(again), again.version, again.verify()) == (facts_of(buffer.pool), buffer.pool.version, [])
        attack("file: honest rings", 60, once)


OPEN = """
import sys
import pandas, zipfile
from data_io_nbdev import MemoryPool
from data_io_nbdev.errors import CorruptData
from data_io_nbdev.storage.pool.memory import _token
from pathlib import Path
MemoryPool(sys.argv[2], "r").verify()
# not ru_maxrss, which counts what the parent had when it started this process
most = lambda: 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
_token(Path(sys.argv[1]))
open("/proc/self/clear_refs", "w").write("5")  # what it took before does not count
before = most()
try: print(len(list(MemoryPool(sys.argv[1], "r"))))
except CorruptData as e: pass
print(most() - before)
"""


class TestBombs:
    "Opening takes a small multiple of the file's size, whatever is in it"

    @pytest.mark.parametrize("bomb", ["packed", "packed log", "declared", "declared by the log", "overlapping", "brackets", "nested", "objects", "directory",
                                      "parts declared", "parts", "zones"])
    def test_memory(self, path, bomb):
        "Measured by the process that opens it"
        log = json.loads(members(sample(1).read_bytes())["log.json"])
        rest = {name: content for name, content in members(sample(1).read_bytes()).items() if name != "log.json"}
        steps = sum(p["length"] for c in log["commits"] for p in c["put"])
        head = '{"format": 1, "token": "a", "last": 1, "horizon": 0, "schema": null, "commits": ['
        if bomb in ("packed", "declared", "declared by the log"):  # a hundred million steps
            more = 100_000_000
            log["commits"][-1]["put"][-1]["length"] += more
            for name, content in rest.items():
                array = np.lib.format.read_array(io.BytesIO(content))
                rest[name] = memory._npy_header(array.dtype, (steps + more, *array.shape[1:])) + array.tobytes()
        if bomb == "packed":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
                for name, content in {**rest, "log.json": sealed(log)}.items():
                    with file.open(name, "w", force_zip64=True) as out:
                        out.write(content)
                        if name == "terminated.npy": out.write(bytes(100_000_000))
                        if name == "times.npy":
                            for _ in range(50): out.write(bytes(16_000_000))
        elif bomb == "packed log": path.write_bytes(zipped([("log.json", head + " " * 400_000_000)], zipfile.ZIP_DEFLATED))
        elif bomb == "declared": path.write_bytes(zipped([*rest.items(), ("log.json", sealed(log))]))
        elif bomb == "declared by the log":
            data = bytearray(zipped([*rest.items(), ("log.json", sealed(log))]))
            for size, name in ((len(rest["times.npy"]), b"times.npy"),):  # the directory of the zip says so, too
                at = data.rindex(name) - 46
                data[at + 20:at + 28] = (int(size + 8 * 100_000_000).to_bytes(4, "little")) * 2
            path.write_bytes(bytes(data))
        elif bomb == "overlapping":  # a thousand names for the same megabyte
            one = zipped([("log.json", head + " " * 1_000_000 + "]}")])
            at = one.index(b"PK\x01\x02")
            entry, end = one[at:-22], one[-22:]
            path.write_bytes(one[:at] + entry * 1000 + end[:8] + (1000).to_bytes(2, "little") * 2 + (len(entry) * 1000).to_bytes(4, "little") + end[16:])
        elif bomb == "brackets": path.write_bytes(zipped([("log.json", head + "[]," * 1_000_000 + "[]]}")]))
        elif bomb == "nested": path.write_bytes(zipped([("log.json", head + ("[" * 900 + "]" * 900 + ",") * 1000 + "[]]}")]))
        elif bomb == "objects": path.write_bytes(zipped([("log.json", head + '{"a":0},' * 500_000 + "{}]}")]))
        elif bomb == "directory": path.write_bytes(zipped([("log.json", head + "]}"), *((f"{n}", b"") for n in range(40_000))]))
        else:
            new = members(sample(FORMAT).read_bytes())
            rows = parts_in(new)
            log = json.loads(new["log.json"])
            if bomb == "parts declared":  # a hundred million
                new["parts.npy"] = memory._npy_header(rows.dtype, (100_000_000,)) + rows.tobytes()
                log["parts"] = 100_000_000
                path.write_bytes(zipped([*{**new, "log.json": reseal({**new, "log.json": json.dumps(log)})}.items()]))
            elif bomb == "parts":
                log["last"], log["commits"] = 1, log["commits"][:1]
                rows = np.repeat(rows[:1], 100_000)
                rows["id"] = np.arange(2 * len(rows), dtype=">u8").view("V16")  # nothing is wrong with them but that there are no steps
                with_parts(path, {**new, "log.json": json.dumps(log)}, rows, counted=True)
            else:
                log["zones"] = [f"Mars/{n}" for n in range(300_000)]
                path.write_bytes(zipped([*{**new, "log.json": reseal({**new, "log.json": json.dumps(log)})}.items()]))
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", OPEN, str(path), str(sample(2))], capture_output=True, text=True)
        assert not done.stderr and len(done.stdout.split()) == 1, done.stderr  # refused, by its type
        took, size = int(done.stdout), path.stat().st_size
        assert took < 10 * 2**20 + 50 * size, f"{took >> 20} MB for a file of {size / 2**20:.1f} MB"


def interrupt(delay, call):
    "Call, with a real signal after so many seconds whose handler raises KeyboardInterrupt; says whether it came"
    def ring(*_): raise KeyboardInterrupt
    before = signal.signal(signal.SIGALRM, ring)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, delay)
            call()
        finally: signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt: return True
    finally: signal.signal(signal.SIGALRM, before)
    return False


def is_free(lock):
    "Whether another thread can have a lock"
    got = []
    def take():
        if lock.acquire(blocking=False): got.append(True); lock.release()
    thread = threading.Thread(target=take)
    thread.start(); thread.join()
    return bool(got)


def seconds(call):
    "How long the fastest of three calls takes"
    def one(): began = time.perf_counter(); call(); return time.perf_counter() - began
    return min(one() for _ in range(3))


@posix
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a signal may come within zipfile's `__del__`, and is lost there
class TestInterrupts:
    "Ctrl-C at any moment: the file is whole, the pool saves again, no lock stays held"

    def sound(self, path, versions, pool, *locks):
        "What must hold after an interrupt"
        assert all(map(is_free, (pool._saving, pool._lock, *locks)))
        assert others(path) == [], "a temporary file was left"
        found = MemoryPool(path, "r")
        assert found.verify() == [] and facts_of(found) in versions, "the file is neither the old one nor the new one"
        pool.save()
        assert facts_of(MemoryPool(path, "r")) == versions[-1]

    def test_save(self, attack, path):
        "While it saves"
        old, new = [drive(60, hour=h) for h in range(4)], [drive(60, hour=h) for h in range(5)]
        def begin():
            path.unlink(missing_ok=True)
            pool = MemoryPool(path)
            pool.extend(old); pool.save(); pool.store(new[-1])
            return pool
        usual, versions, came = seconds(begin().save), [facts_of(old), facts_of(new)], []
        def once(rng):
            pool = begin()
            came.append(interrupt(rng.uniform(0, usual * 1.1) + 1e-6, pool.save))
            self.sound(path, versions, pool)
        attack("file: interrupts in save", 160, once)
        assert sum(came) > len(came) / 5, "hardly a signal came in time"

    def test_close(self, attack, path):
        "While it closes: it is closed and saved, or open as before"
        usual, came = 0.0, []
        def once(rng):
            nonlocal usual
            path.unlink(missing_ok=True)
            pool = MemoryPool(path)
            pool.store(drive(60)); pool.save(); pool.store(drive(60, hour=1))
            usual = usual or seconds(lambda: pool.save())
            came.append(interrupt(rng.uniform(0, usual * 1.1) + 1e-6, pool.close))
            if pool.closed: assert len(MemoryPool(path, "r")) == 2
            pool.load()
            self.sound(path, [facts_of([drive(60)]), facts_of([drive(60), drive(60, hour=1)])], pool)
            pool.close()
        attack("file: interrupts in close", 60, once)
        assert sum(came) > len(came) / 5, "hardly a signal came in time"

    def test_extend_and_save(self, attack, path):
        "While it stores and saves, over and over: what a save has acknowledged is in the file, in order"
        drives = [drive(20, hour=h) for h in range(40)]
        right = facts_of(drives)
        def once(rng):
            path.unlink(missing_ok=True)
            pool, acknowledged = MemoryPool(path), 0
            def work():
                nonlocal acknowledged
                for n, d in enumerate(drives): pool.extend([d]); pool.save(); acknowledged = n + 1
            interrupt(rng.uniform(0, 0.08) + 1e-6, work)
            assert is_free(pool._saving) and is_free(pool._lock) and others(path) == []
            if acknowledged or path.exists():
                found = MemoryPool(path, "r")
                assert found.verify() == [] and acknowledged <= len(found) <= acknowledged + 1
                assert facts_of(found) == right[:len(found)]
            pool.save()
        attack("file: interrupts in extend and save", 100, once)

    def test_ring(self, attack, path):
        "While a ring's own pool is saved: the ring's lock is free afterwards"
        buffer = MemoryBuffer(batch_size=4, capacity=200)
        for h in range(6): buffer.store(drive(40, hour=h))
        buffer.sample()
        usual, right = seconds(lambda: buffer.save(path)), facts_of(buffer.pool)
        def once(rng):
            interrupt(rng.uniform(0, usual * 1.1) + 1e-6, lambda: buffer.save(path))
            assert all(map(is_free, (buffer._lock, buffer.pool._saving, buffer.pool._lock))) and others(path) == []
            assert facts_of(MemoryPool(path, "r")) == right
            buffer.save(path)
        attack("file: interrupts in a ring's save", 60, once)

    def test_open(self, attack, path):
        "While it opens: the next opening finds everything"
        fill(MemoryPool(path)).close()
        usual, right, before = seconds(lambda: MemoryPool(path)), everything(MemoryPool(path)), path.read_bytes()
        def once(rng):
            interrupt(rng.uniform(0, usual) + 1e-6, lambda: MemoryPool(path))
            assert path.read_bytes() == before and others(path) == []
        attack("file: interrupts in opening", 100, once)
        assert everything(MemoryPool(path)) == right

    def test_every_call(self, attack, path):
        "After the calls of a save one after the other, in the standard library's modules too: that is where Python looks for signals"
        def calls(stop):
            path.unlink(missing_ok=True)
            pool, n = MemoryPool(path), 0
            pool.store(drive(3)); pool.save(); pool.store(drive(3, hour=1))
            def profile(frame, event, arg):
                nonlocal n
                if event not in ("call", "c_return"): return
                n += 1
                if n == stop: raise KeyboardInterrupt
            sys.setprofile(profile)
            try: pool.save()
            except KeyboardInterrupt: pass
            finally: sys.setprofile(None)
            self.sound(path, [facts_of([drive(3)]), facts_of([drive(3), drive(3, hour=1)])], pool)
            return n
        most = calls(0)
        assert most > 1000
        attack("file: interrupts after any call in save", 120, lambda rng: calls(int(rng.integers(1, most))))


class TestThreads:
    "Threads that save at once take turns"

    def test_save_and_store(self, attack, path):
        "Two to four threads store and save; nobody is told of somebody else, and the file ends with everything"
        def once(rng):
            path.unlink(missing_ok=True)
            pool, wrong, n = MemoryPool(path), [], int(rng.integers(2, 5))
            barrier = threading.Barrier(n)
            def work(k):
                barrier.wait()
                try:
                    for hour in range(4): pool.store(drive(5, hour=10 * k + hour)); pool.save()
                except Exception as e: wrong.append(e)
            threads = [threading.Thread(target=work, args=(k,)) for k in range(n)]
            for t in threads: t.start()
            for t in threads: t.join()
            assert not wrong, wrong
            assert facts_of(MemoryPool(path, "r")) == facts_of(pool) and len(pool) == 4 * n and others(path) == []
            pool.close()
        attack("file: threads that save at once", 60, once)

    def test_ring(self, attack, path):
        "One thread saves what another's ring overwrites: each file is a pool of some moment"
        def once(rng):
            buffer, wrong = MemoryBuffer(batch_size=4, capacity=30), []
            buffer.store(drive(5)); buffer.sample()
            def work():
                try:
                    for hour in range(1, 30): buffer.store(drive(5, hour=hour))
                except Exception as e: wrong.append(e)
            thread = threading.Thread(target=work)
            thread.start()
            for k in range(5):
                buffer.save(path, overwrite=True)
                found = MemoryPool(path, "r")
                assert found.verify() == [] and facts_of(found) == facts_of(drive(5, hour=e.episodestart.hour + 24 * (e.episodestart.day - 1)) for e in found)
            thread.join()
            assert not wrong, wrong
        attack("file: saving a ring that turns", 15, once)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
    @pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
    def test_fork(self, path, monkeypatch):
        "A child that was forked while a thread saved can save, too"
        pool, forked, inside = fill(MemoryPool(path)), threading.Event(), threading.Event()
        real = os.fsync
        def slow(handle): inside.set(); forked.wait(30); real(handle)
        monkeypatch.setattr(os, "fsync", slow)
        thread = threading.Thread(target=pool.save)
        thread.start(); inside.wait(30)
        child = os.fork()
        if child == 0:
            os.fsync = real
            try: pool.save(path.with_name("child.npz")); os._exit(0)
            finally: os._exit(1)
        for _ in range(1500):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid: break
            threading.Event().wait(0.02)
        else: os.kill(child, 9); os.waitpid(child, 0)
        forked.set(); thread.join()
        assert pid and os.waitstatus_to_exitcode(status) == 0
        assert everything(MemoryPool(path, "r")) == everything(MemoryPool(path.with_name("child.npz"), "r")) == everything(pool)


class Faults:
    "Makes the call whose number it is given fail once: of the functions of `os` that a save calls, of opening, and of writing"
    NAMES = ("open", "fsync", "replace", "stat", "fstat", "fchmod", "fchown", "close", "lstat", "unlink")

    def __init__(self, patch, number=0, error=errno.EIO):
        self.calls, self.number, self.error = [], number, error
        for name in self.NAMES: patch.setattr(os, name, self.wrap(name, getattr(os, name)))
        patch.setattr(memory, "open", self.wrap("open a file", self.open), raising=False)

    def step(self, name):
        self.calls.append(name)
        if len(self.calls) == self.number: raise OSError(self.error, os.strerror(self.error))

    def wrap(self, name, call):
        def called(*args, **kwargs): self.step(name); return call(*args, **kwargs)
        return called

    def open(self, path, mode="r", opener=None):
        faults = self
        class Raw(io.FileIO):
            def write(self, data): faults.step("write"); return super().write(data)
            def readinto(self, room): faults.step("read"); return super().readinto(room)
        raw = Raw(path, mode.replace("b", ""), opener=opener)
        return io.BufferedWriter(raw, 256) if "x" in mode else io.BufferedReader(raw)


@posix
class TestFaults:
    "Each system call of a save fails once: the error is typed and true, and the next save works"

    @pytest.mark.parametrize("error", ["EIO", "ENOSPC", "EACCES"])
    @pytest.mark.parametrize("existed", [True, False])
    def test_each_call(self, path, monkeypatch, error, existed, record_property):
        "One after the other"
        trials, began, names = 0, time.monotonic(), set()
        while True:
            path.unlink(missing_ok=True)
            pool = MemoryPool(path)
            if existed: pool.store(drive()); pool.save(); path.chmod(0o600)
            pool.store(drive(hour=1))
            before = path.read_bytes() if existed else None
            with monkeypatch.context() as patch:
                faults, said = Faults(patch, trials + 1, getattr(errno, error)), None
                try: pool.save()
                except PoolUnavailable as e: said = str(e)
            if len(faults.calls) <= trials: break
            trials, now = trials + 1, path.read_bytes() if path.exists() else None
            names.add(name := faults.calls[trials - 1])
            if said is None: assert name in ("unlink", "close", "lstat") or facts_of(MemoryPool(path, "r")) == facts_of(pool), f"{name}: nothing was said"
            elif "as it was;" in said: assert now == before, f"{name}: {said}"
            elif "new content" in said: assert facts_of(MemoryPool(path, "r")) == facts_of(pool), f"{name}: {said}"
            else: assert "cannot be read" in said and name in ("read", "open a file"), f"{name}: {said}"
            assert others(path) == [] or name == "unlink", f"{name}: a temporary file was left"
            for p in path.parent.iterdir(): p.unlink() if p != path else None
            pool.save()
            assert facts_of(MemoryPool(path, "r")) == facts_of(pool)
            if existed: assert stat.S_IMODE(path.stat().st_mode) == 0o600
        record_property("attack", (f"file: {error} at each call of a save, {'a file' if existed else 'none'} there", trials, 0, round(time.monotonic() - began, 1)))
        assert trials > 15 and names >= {"open", "fsync", "replace", "write", "open a file"}

    def test_after_the_name(self, path, monkeypatch):
        "Where the folder cannot be synced the new file is there: the message says so, and the pool knows its own"
        pool = fill(MemoryPool(path)); pool.save(); pool.store(drive(hour=9))
        real, calls = os.fsync, []
        def second(handle):
            calls.append(handle)
            if len(calls) == 2: raise OSError(errno.EIO, "Input/output error")
            real(handle)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", second)
            with pytest.raises(PoolUnavailable, match="new content.*save again"): pool.save()
        assert everything(MemoryPool(path, "r")) == everything(pool)
        pool.store(drive(hour=10)); pool.close()
        assert len(MemoryPool(path, "r")) == 5

    @pytest.mark.parametrize("make, words", [(lambda p: p.mkdir(), "folder"), (lambda p: os.mkfifo(p), "device"), (lambda p: p.symlink_to(p), "symbolic links"),
                                             (lambda p: p.symlink_to("/dev/null"), "device"), (lambda p: p.symlink_to(p.parent / "no" / "where"), "its folder exists")])
    @pytest.mark.parametrize("overwrite", [False, True])
    def test_no_file(self, path, make, words, overwrite):
        "What is no file is not replaced by one, and the message says what it is"
        make(path)
        before = os.lstat(path)
        with pytest.raises(PoolUnavailable, match=words): fill(MemoryPool()).save(path, overwrite)
        if os.path.exists(path) or path.is_symlink() and words == "symbolic links":
            with pytest.raises(PoolUnavailable, match=words): MemoryPool(path)
        assert (os.lstat(path).st_ino, os.lstat(path).st_mode) == (before.st_ino, before.st_mode) and others(path) == []
        assert stat.S_ISCHR(os.stat("/dev/null").st_mode)

    def test_a_missing_folder(self, path):
        "Made later, it takes the save"
        pool = fill(MemoryPool(path.parent / "later" / "pool.npz"))
        with pytest.raises(PoolUnavailable, match="its folder exists"): pool.save()
        pool.path.parent.mkdir(); pool.save()
        assert everything(MemoryPool(pool.path)) == everything(pool)

    def test_an_unreadable_file(self, path, monkeypatch):
        "What cannot be read is not damaged for that"
        fill(MemoryPool(path)).close()
        def fail(*_): raise OSError(errno.EIO, "Input/output error")
        with monkeypatch.context() as patch:
            patch.setattr(memory, "open", fail, raising=False)
            with pytest.raises(PoolUnavailable, match="cannot be read now"): MemoryPool(path)


def mode_of(path): return stat.S_IMODE(os.stat(path).st_mode)


@posix
class TestBeside:
    "A file stays what the user made of it, and so does whatever lies beside it"

    @pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o660, 0o400, 0o755])
    def test_mode(self, path, mode):
        "Its mode is kept"
        pool = fill(MemoryPool(path)); pool.save(); path.chmod(mode)
        pool.store(drive(hour=9)); pool.save()
        assert mode_of(path) == mode
        fill(MemoryPool()).snapshot(2).save(path, overwrite=True)
        assert mode_of(path) == mode

    def test_never_wider(self, path, monkeypatch):
        "Not even while it is written can others read what the file keeps to itself"
        pool, modes, real = fill(MemoryPool(path)), [], os.fsync
        pool.save(); path.chmod(0o600)
        def look(handle): modes.extend(mode_of(p) for p in path.parent.iterdir()); real(handle)
        monkeypatch.setattr(os, "fsync", look)
        pool.save()
        assert set(modes) == {0o600} and len(modes) == 3

    @pytest.mark.parametrize("umask", [0o022, 0o077, 0o007])
    def test_umask(self, path, umask):
        "A new file has the mode that a new file has"
        before = os.umask(umask)
        try: fill(MemoryPool(path)).save()
        finally: os.umask(before)
        assert mode_of(path) == 0o666 & ~umask

    @pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
    def test_owner(self, path):
        "Its owner and group are kept, too"
        pool = fill(MemoryPool(path)); pool.save()
        os.chown(path, 12345, 23456); path.chmod(0o640)
        pool.save()
        found = os.stat(path)
        assert (found.st_uid, found.st_gid, mode_of(path)) == (12345, 23456, 0o640)

    def test_owner_refused(self, path, monkeypatch):
        "Where that is not permitted the file is saved as one's own"
        pool, real = fill(MemoryPool(path)), os.fstat
        pool.save()
        def refuse(*_): raise PermissionError(errno.EPERM, "Operation not permitted")
        def another(handle):
            found = list(real(handle)); found[4] += 1; found[5] += 1
            return os.stat_result(found)
        with monkeypatch.context() as patch: patch.setattr(os, "fchown", refuse); patch.setattr(os, "fstat", another); pool.save()
        assert everything(MemoryPool(path, "r")) == everything(pool)

    @pytest.mark.parametrize("kind", ["relative", "absolute", "chain", "dangling"])
    def test_symlinks(self, path, kind):
        "A link stays a link, and what it leads to is replaced"
        real = path.parent / "elsewhere" / "real.npz"
        real.parent.mkdir()
        path.symlink_to({"relative": "elsewhere/real.npz", "chain": "middle.npz"}.get(kind, real))
        if kind == "chain": path.with_name("middle.npz").symlink_to("elsewhere/real.npz")
        if kind != "dangling": fill(MemoryPool(real)).close(); real.chmod(0o600)
        pool = MemoryPool(path)
        pool.store(drive(hour=11)); pool.save()
        pool.store(drive(hour=12)); pool.save(real)   # the same file by its other name
        pool.close()
        assert path.is_symlink() and not real.is_symlink() and len(MemoryPool(path)) == len(MemoryPool(real)) == (2 if kind == "dangling" else 5)
        assert others(real) == [] and mode_of(real) == (0o600 if kind != "dangling" else mode_of(real))
        if kind == "chain": assert path.with_name("middle.npz").is_symlink()

    def test_a_link_that_moved(self, path):
        "A link that leads to somebody else's file by now is somebody else's"
        for name in ("one", "two"): fill(MemoryPool(path.with_name(name))).close()
        path.symlink_to("one")
        pool = MemoryPool(path)
        path.unlink(); path.symlink_to("two")
        pool.store(drive(hour=9))
        before = path.read_bytes()
        with pytest.raises(PoolUnavailable, match="somebody else"): pool.save()
        assert path.read_bytes() == before

    def test_hard_link(self, path):
        "Another name of the old file keeps the old content, whole"
        pool = fill(MemoryPool(path)); pool.save()
        os.link(path, path.with_name("kept.npz"))
        right = everything(pool)
        pool.store(drive(hour=9)); pool.save()
        assert everything(MemoryPool(path.with_name("kept.npz"), "r")) == right and everything(MemoryPool(path, "r")) == everything(pool)

    def test_files_of_the_user(self, attack, path):
        "Whatever it is called: it is there after saves, failing saves and repairs, however old it is"
        def once(rng):
            folder = path.parent / secrets.token_hex(4)
            folder.mkdir()
            hexes = lambda n: "".join(rng.choice(list("0123456789abcdef"), n))
            names = {f".pool.npz.{hexes(16)}", f".pool.npz.{hexes(15)}", f"pool.npz.{hexes(16)}", ".pool.npz", "pool.npz~", "log.json", f".other.npz.{hexes(16)}", "photos"}
            for name in names:
                (folder / name).write_bytes(rng.bytes(int(rng.integers(100))))
                os.utime(folder / name, (0, 0))
            ours = zipped([("times.npy", b"half")])[:60]
            (folder / f".other.npz.{hexes(16)}").write_bytes(ours)   # of another pool's save
            (folder / f".pool.npz.{hexes(16)}").write_bytes(ours)    # of one that is at work just now
            (folder / f".pool.npz.{hexes(16)}").mkdir()
            before = {p.name: p.read_bytes() if p.is_file() else "" for p in folder.iterdir()}
            pool = fill(MemoryPool(folder / "pool.npz"))
            pool.save(); pool.store(drive(hour=9)); pool.close(); pool.load()
            assert pool.repair() == pool.repair(dry_run=False) == []
            after = {p.name: p.read_bytes() if p.is_file() else "" for p in folder.iterdir()}
            assert after.pop("pool.npz") and after == before
            shutil.rmtree(folder)
        attack("file: the user's own files beside it", 25, once)

    def test_killed_saves(self, path):
        "What a killed save left is never opened, and `repair` names it and drops it a day later, by a reader never"
        pool = fill(MemoryPool(path)); pool.save()
        child = os.fork()
        if child == 0:
            os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            pool.save()
            os._exit(0)
        os.waitpid(child, 0)
        [left] = others(path)
        pool.store(drive(hour=9)); pool.save()
        assert others(path) == [left] and pool.repair() == []
        os.utime(path.with_name(left), (time.time() - 90_000,) * 2)
        [line] = pool.repair()
        assert left in line and others(path) == [left] and MemoryPool(path, "r").repair() == [line]
        with pytest.raises(DataIOError): MemoryPool(path, "r").repair(dry_run=False)
        assert pool.repair(dry_run=False) == [line] and others(path) == [] and pool.repair() == []
        assert everything(MemoryPool(path, "r")) == everything(pool)

    def test_a_clock_before_zip(self, path, monkeypatch):
        "A machine whose clock stands at 1970 can save"
        real = time.localtime
        monkeypatch.setattr(time, "localtime", lambda *_: real(0))
        pool = fill(MemoryPool(path)); pool.save()
        assert everything(MemoryPool(path, "r")) == everything(pool)
