"""Attacks on a data lake: damage, swapped and foreign files, bombs, odd paths, interrupts and failing disks, a great many times each.

What is read afterwards is right, or an error of this package says what is wrong; what was damaged is named by `verify`; and nothing
is opened or removed that the pool did not make."""
import errno
import gzip
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
deltalake = pytest.importorskip("deltalake")

from data_io_nbdev.data.core import Episode, PoolQuery
from data_io_nbdev.errors import CorruptData, DataIOError, PoolUnavailable
from data_io_nbdev.storage.pool import dask, delta, parquet
from data_io_nbdev.storage.pool.dask import DaskPool
from data_io_nbdev.storage.pool.pool import part_of
from data_io_nbdev.testing import by_start, drive, facts_of
from test_lake_faults import bytes_of, entry, flipped, litter, others_see
from test_lake_format import SAMPLE

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a local disk with hard links and links")
INTERVAL = 24  # so many entries have a copy that is read


@pytest.fixture(autouse=True)
def interval(monkeypatch): monkeypatch.setattr(delta, "_INTERVAL", INTERVAL)


@pytest.fixture
def path(tmp_path): return tmp_path / "lake"


def log(path, number): return [json.loads(line) for line in entry(path, number).read_text().splitlines()]


def grow(path, seed=0):
    "A lake with an entry of every kind, other engines' too, two copies of its log and a checkpoint"
    pool = DaskPool(path)
    pool.extend([drive(hour=h, seed=seed) for h in range(3)])
    pool.store(drive(40, hour=4, seed=seed)[:9])
    pool.store(drive(40, hour=4, seed=seed))
    pool.delete(drive(hour=1).id)
    pool.store(drive(hour=2, seed=seed + 1), overwrite=True)
    pool.compact()
    for h in range(7, 9): pool.store(drive(hour=h, seed=seed))
    deltalake.DeltaTable(str(path)).optimize.compact()
    pool.delete(drive(hour=7).id)  # puts the pool's own files back first
    pool.store(drive(hour=12, seed=seed)); pool.store(drive(hour=13, seed=seed))
    deltalake.DeltaTable(str(path)).delete(f"episode = '{drive(hour=13).id}'")
    for h in range(20, 58): pool.store(drive(2 + h % 3, hour=h, seed=seed))
    assert pool.version > 2 * INTERVAL and len(list(path.glob("_history/*.gz"))) == 2
    return pool


def everything(path):
    "Some versions of it, the newest among them"
    pool = DaskPool(path, "r")
    return [facts_of(pool.snapshot(v)) for v in (3, 6, 11, 13, pool.version)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Two lakes that went the same way, and what they hold"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(delta, "_INTERVAL", INTERVAL)
        paths = [tmp_path_factory.mktemp("made") / name for name in ("one", "two")]
        for seed, path in enumerate(paths): grow(path, 5 * seed)
        return [(path, everything(path)) for path in paths]


@pytest.fixture
def lake(made, path):
    shutil.copytree(made[0][0], path)
    return path, made[0][1]


def right_or_named(path, right):
    "Whether a lake reads as it did; else an error of this package says why not"
    try: found = everything(path)
    except DataIOError: return False
    assert found == right, "it was read wrongly"
    return True


def complaint(path):
    "Whether `verify` says that something is wrong"
    try: return bool(DaskPool(path, "r").verify())
    except DataIOError: return True


def kinds(path):
    "Every file that is read, by its kind"
    return {"entry": sorted(path.glob("_delta_log/*.json")), "copy of the log": sorted(path.glob("_history/*.gz")),
            "Parquet": [path / name for name in named(path)], "checkpoint": sorted(path.glob("_delta_log/*.checkpoint.parquet"))}


def named(path):
    "Our files that some version reads"
    pool = DaskPool(path)
    return sorted({p.where[0].path for p in pool._catch_up(pool.version).every_part()})


# --- damage ---

def harmless(kind, old, new):
    "Whether nobody takes anything else from a file than before"
    if kind == "copy of the log":
        try: return gzip.decompress(old) == gzip.decompress(new)
        except Exception: return False
    if kind != "entry": return False
    def told(data):
        lines = [json.loads(line) for line in data.splitlines()]
        birth = "metaData" in lines[-1]
        for line in lines:  # who made a table when, and the name that only others give it
            if birth and "commitInfo" in line: line["commitInfo"] = line["commitInfo"]["data_io_nbdev"]
            if birth and "metaData" in line: line["metaData"] = {k: v for k, v in line["metaData"].items() if k not in ("id", "createdTime")}
        return lines if birth or "data_io_nbdev" in lines[0]["commitInfo"] else None  # other engines have no checksums
    try:
        before = told(old)
        return before is None or told(new) == before
    except Exception: return False


@pytest.mark.parametrize("kind,trials", [("entry", 20), ("copy of the log", 8), ("Parquet", 15), ("checkpoint", 8)])
def test_one_bit(lake, attack, kind, trials):
    "One bit of any file that is read"
    path, right = lake
    files = kinds(path)[kind]
    if kind == "entry": files = [f for f in files if "delta-rs" not in f.read_text()]  # these are nobody's to check
    def once(rng):
        victim = files[rng.integers(len(files))]
        data = victim.read_bytes()
        bad = flipped(data, int(rng.integers(8 * len(data))))
        with bytes_of(victim, bad):
            fine = right_or_named(path, right)
            assert kind not in ("copy of the log", "checkpoint") or fine, "a copy is not needed"
            assert kind == "checkpoint" or complaint(path) or harmless(kind, data, bad), f"{victim.name}: nobody noticed"
    attack(f"lake: one bit, {kind}", trials, once)


@pytest.mark.parametrize("kind,trials", [("entry", 15), ("copy of the log", 3), ("Parquet", 10)])
@pytest.mark.parametrize("how", ["swapped", "copied"])
def test_another_place(lake, attack, kind, how, trials):
    "Two files of a kind change places, or one is copied over another: each is sound, and none is where it belongs"
    path, right = lake
    files = kinds(path)[kind]
    def once(rng):
        a, b = (files[i] for i in rng.choice(len(files), 2, replace=False))
        first, second = a.read_bytes(), b.read_bytes()
        with bytes_of(a, second if how == "swapped" else first), bytes_of(b, first):
            fine = right_or_named(path, right)
            assert kind != "copy of the log" or fine, "a copy is not needed"
            assert complaint(path), f"{a.name}, {b.name}: nobody noticed"
    attack(f"lake: {how}, {kind}", trials, once)


def test_another_entry_says_which(lake, attack):
    "The error names the commit that is not the one that it says it is"
    path, _ = lake
    ours = [n for n in range(1, 50) if "data_io_nbdev" in log(path, n)[0]["commitInfo"]]
    shutil.rmtree(path / "_history")
    def once(rng):
        a, b = rng.choice(ours, 2, replace=False)
        with bytes_of(entry(path, b), entry(path, a).read_bytes()):
            with pytest.raises(CorruptData, match=rf"commit {b} of the log is damaged: it is commit {a}$"): list(DaskPool(path))
            assert DaskPool(path).snapshot(b - 1).version == b - 1 and len(DaskPool(path).snapshot(b - 1)) >= 0
    attack("lake: an entry is named", 20, once)


def test_another_lake(lake, made, attack):
    "A file of another lake, of the same place and number"
    path, right = lake
    other = made[1][0]
    files = [f.relative_to(path) for kind in ("entry", "copy of the log") for f in kinds(path)[kind]]
    def once(rng):
        name = files[rng.integers(len(files))]
        foreign = name.suffix == ".json" and "delta-rs" in (path / name).read_text()  # no checksum, but it names files
        with bytes_of(path / name, (other / name).read_bytes()):
            fine = right_or_named(path, right)
            assert name.suffix == ".json" or fine
            assert complaint(path) or foreign, f"{name}: nobody noticed"
    attack("lake: another lake's", 15, once)


@pytest.mark.parametrize("sealed", [False, True])
def test_lines_of_a_copy(lake, attack, sealed):
    "Lines of a copy of the log that changed places, one copied over another, left out or twice there; with the checksum made anew or not"
    path, right = lake
    segments = kinds(path)["copy of the log"]
    def once(rng):
        victim = segments[rng.integers(2)]
        crc, _, text = gzip.decompress(victim.read_bytes()).partition(b" ")
        head, *lines = text.split(b"\n")
        ours = [i for i, line in enumerate(lines) if b"data_io_nbdev" in line[:40]]
        i, j = rng.choice(ours, 2, replace=False)
        what = rng.integers(4)
        if what == 0: lines[i], lines[j] = lines[j], lines[i]
        if what == 1: lines[i] = lines[j]
        if what == 2: lines[i:i + 1] = []
        if what == 3: lines.insert(i, lines[j])
        text = b"\n".join([head, *lines])
        if sealed: crc = b"%08x" % zlib.crc32(text)
        with bytes_of(victim, gzip.compress(crc + b" " + text)):
            assert right_or_named(path, right), "the entries are sound"
            if not sealed: assert complaint(path)
        with bytes_of(victim, gzip.compress(b"\n".join(lines))): assert right_or_named(path, right)  # as an earlier version wrote it
    attack(f"lake: lines of a copy{', sealed' * sealed}", 8, once)


def test_a_mixed_log(path, attack):
    "A lake of an earlier version that goes on in today's: what it wrote then stays readable, and is not taken for anything newer"
    shutil.copytree(SAMPLE, path)
    pool = DaskPool(path)
    old, first = facts_of(pool), pool.version + 1
    assert pool._lake.table.format == 1
    ids = [pool.store(drive(hour=h)) for h in range(40, 45)]
    pool.delete(ids[0]); pool.compact()
    right, last = facts_of(pool), pool.version
    assert pool.verify() == [] and facts_of(DaskPool(path).snapshot(first - 1)) == old
    def once(rng):
        a, b = int(rng.integers(1, last + 1)), int(rng.integers(first, last))  # the newest could as well not be there
        if a == b: return
        with bytes_of(entry(path, b), entry(path, a).read_bytes()):
            with pytest.raises(CorruptData, match="commit"): list(DaskPool(path))
    attack("lake: old entries over new ones", 40, once)
    assert facts_of(DaskPool(path)) == right


@pytest.mark.parametrize("scheme", ["", "remote"])
def test_what_other_readers_are_told(path, attack, scheme):
    "An action that says something else than the pool's own text, in a folder or through `deltalake`'s own commits: `verify` says so"
    pool = DaskPool(path)
    path.mkdir()
    if scheme: pool._lake = delta.RemoteLake(path.as_uri())
    pool.extend([drive(hour=h) for h in range(3)]); pool.store(drive(hour=3)); pool.delete(drive(hour=1).id)
    assert DaskPool(path).verify() == []
    def once(rng):
        number = int(rng.integers(1, 4))
        lines = log(path, number)
        action = [a[k] for a in lines for k in ("add", "remove") if k in a]
        action, what = action[rng.integers(len(action))], rng.integers(4)
        if what == 0: action["path"] = action["path"].replace("-0.", "-1.")
        elif what == 1: action["dataChange"] = not action["dataChange"]
        elif what == 2 and "stats" in action: action["stats"] = re.sub('("numRecords": *)', r"\g<1>1", action["stats"])
        else: lines.remove(next(a for a in lines if action in a.values()))
        with bytes_of(entry(path, number), "\n".join(map(json.dumps, lines)).encode()):
            assert any(line.startswith(f"commit {number}:") for line in DaskPool(path).verify())
    attack(f"lake: other readers are told otherwise{', ' * bool(scheme)}{scheme}", 25, once)


# --- what is not ours ---

def look_alikes(path, rng, others):
    "Things of a user's, many of which are called almost like ours, all of them old"
    hexes = lambda n: "".join(rng.choice(list("0123456789abcdef"), n))
    mine = path / f"{hexes(32)}-0.parquet"
    names = ["photos/1.jpg", "notes.parquet", "backup/data.parquet", f"{hexes(31)}-0.parquet", f"{hexes(31).upper()}G-0.parquet",
             f"{hexes(32)}-0.parquet.bak", f"{hexes(32)}.parquet", f"{hexes(32)}-x.parquet", f"{hexes(32)}-\u0661.parquet",
             f"x{hexes(32)}-0.parquet", f".{hexes(32)}-0.parquet.{hexes(15)}", f".mine.parquet.{hexes(16)}", f"_shadow-{hexes(16)}/mine.txt",
             f"_shadow-{hexes(15)}/_delta_log/{1:020d}.json", "_shadow-mine/x", f"_shadow-{hexes(16)}/_delta_log/mine.txt",
             f"_delta_log/.{hexes(8)}.tmp", "_delta_log/.mine.tmp", "_delta_log/notes.checkpoint.parquet", "_delta_log/._last_checkpoint.mine",
             "_history/.mine", "_history/.mine.json.gz", f"_history/.1.json.gz.{hexes(16)}", ".hidden", f".{hexes(16)}.tmp"]
    chosen = [names[i] for i in rng.choice(len(names), 12, replace=False)]
    for name in chosen:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(rng.bytes(20))
    pq.write_table(pa.table({"a": [1]}), mine)  # `pyarrow` itself calls files so
    shutil.copy(others[rng.integers(len(others))], path / f"{hexes(32)}-0.parquet")  # ours, under another name
    stranger = others[rng.integers(len(others))]
    shutil.copy(stranger, path / stranger.name)  # of another lake, under its own
    outside = path.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "a.parquet").write_bytes(others[0].read_bytes())
    (outside / f".{7:020d}.json.gz.{hexes(16)}").write_bytes(b"x")
    (path / f"{hexes(32)}-0.parquet").symlink_to(outside / "a.parquet")
    (path / f"_shadow-{hexes(16)}").symlink_to(outside)
    if rng.random() < 0.5 and not (path / "_history").exists(): (path / "_history").symlink_to(outside)
    (folder := path / f"{hexes(32)}-1.parquet").mkdir()
    (folder / "x").write_bytes(b"x")
    past = time.time() - 10**7
    for p in [*path.rglob("*"), *outside.rglob("*")]: os.utime(p, (past, past), follow_symlinks=False)


def foreign(path, ours):
    "Every file, folder and link that is none of the pool's"
    everything = [p for root in (path, path.parent / "outside") for p in root.rglob("*")]
    return {str(p): (p.is_symlink() and os.readlink(p), p.is_file() and p.read_bytes()) for p in everything
            if str(p) not in ours and (p.is_symlink() or p.is_file() or p.name.endswith(".parquet"))}


def test_a_folder_of_the_users_own(tmp_path, made, attack):
    "Things of a user's beside everything that removes: they stay, to the last byte; and what a dead writer left goes"
    others = [made[0][0] / name for name in named(made[0][0])]
    def once(rng):
        path = tmp_path / "folder" / "lake"
        shutil.rmtree(path.parent, ignore_errors=True)
        pool = DaskPool(path, grace="1h")
        for h in range(4): pool.extend([drive(hour=h), drive(hour=h, vehicle="B")])
        died, = dask.write_files(pool._lake, rng.bytes(16).hex(), [(p, pool._read_one(p)) for p in [*pool._index.every_part()][:1]])
        left = [path / died.where[0].path, path / f".{'ab' * 16}-0.parquet.{'cd' * 8}",
                path / f"_shadow-{'ab' * 8}" / "_delta_log" / f"{0:020d}.json", path / "_delta_log" / f".{'ab' * 8}.tmp"]
        for p in left[1:]:
            p.parent.mkdir(parents=True, exist_ok=True)
            p.write_bytes(b"x")
        ours = {str(p) for p in path.rglob("*")}
        look_alikes(path, rng, others)
        before = foreign(path, ours)
        assert len(before) > 15
        acts = [lambda: pool.repair(dry_run=False), lambda: pool.compact(), lambda: pool.vacuum("0s", dry_run=False),
                lambda: pool.delete(drive(hour=1).id), lambda: pool.store(drive(9, hour=2, seed=1), overwrite=True), lambda: DaskPool(path).repair(dry_run=False)]
        for i in (*rng.permutation(len(acts)), 0): acts[i]()
        now = foreign(path, set())
        assert {name: now.get(name) for name in before} == before
        assert [p for p in left if p.exists()] == [] and pool.verify() == [] and others_see(path) == {e.id: len(e) for e in pool}
    attack("lake: a user's own folder", 12, once)


# --- paths ---

ODD = ["../{}", "../../{}", "/{}", "{folder}/{}", "file://{folder}/{}", "s3://bucket/{}", "a/../../{}", "%2e%2e/{}", "%2E%2E%2F{}",
       "%252e%252e/{}", "..\\{}", "C:\\{}", "C:{}", "", ".", "..", "a/", "//{}", "./{}", "_delta_log/" + "0" * 20 + ".json", "_history/{}",
       "x\0/../{}", "../{}\0.parquet", "%00{}", "%2f{}", "\ud800{}", "x" * 5000]


def forged(path, n, **changes):
    "An entry that says something else, with a checksum that fits"
    lines = log(path, n)
    info = lines[-1]["commitInfo"] if "commitInfo" in lines[-1] else next(a["commitInfo"] for a in lines if "commitInfo" in a)
    said = json.loads(info["data_io_nbdev"].partition(" ")[2])
    for key, change in changes.items(): said[key] = change(said.get(key, []))
    text = json.dumps(said)
    info["data_io_nbdev"] = f"{zlib.crc32(text.encode()):08x} {text}"
    return "\n".join(map(json.dumps, lines)).encode()


def test_odd_paths(tmp_path, attack, monkeypatch):
    "An entry, ours or another engine's, that names a file which is not in the folder: it is damage, and that file is neither opened nor removed"
    outside, path = tmp_path / "treasure.parquet", tmp_path / "deep" / "lake"
    pool = DaskPool(path)
    for h in range(3): pool.store(drive(hour=h))
    pool.delete(drive(hour=2).id)
    shutil.copy(path / log(path, 1)[1]["add"]["path"], outside)
    (path.parent / outside.name).write_bytes(outside.read_bytes())
    touched = []
    for name in ("source", "read", "remove"):
        real = getattr(delta.LocalLake, name)
        def watched(self, what, real=real):
            what = list(what) if not isinstance(what, str) else what
            touched.extend([what] if isinstance(what, str) else what)
            return real(self, what)
        monkeypatch.setattr(delta.LocalLake, name, watched)
    def once(rng):
        odd = ODD[rng.integers(len(ODD))].format(outside.name, folder=tmp_path)
        place = lambda files: [[odd, *files[0][1:]], *files[1:]] if files else [[odd, 9, 0, 0, 0]]
        number, what = int(rng.integers(1, 5)), rng.integers(4)
        if what < 2: data = forged(path, number, **{("files", "gone")[what] if number != 4 or what else "gone": place})
        else:
            number = 5
            action = dict(path=odd, size=9, dataChange=False, stats="{}")
            lines = [{"commitInfo": {"operation": "OPTIMIZE"}}, {"remove": {**action, "dataChange": True}}]
            if what == 3: lines = [lines[0], {"add": action}, {"remove": {**action, "path": log(path, 1)[1]["add"]["path"]}}]
            data = "\n".join(map(json.dumps, lines)).encode()
        before = entry(path, number).read_bytes() if number < 5 else None
        entry(path, number).write_bytes(data)
        try:
            touched.clear()
            for act in (list, lambda p: p.verify(), lambda p: p.repair(dry_run=False), lambda p: p.vacuum("0s", dry_run=False),
                        lambda p: p.compact(), lambda p: p.delete(drive().id)):
                with pytest.raises(CorruptData, match=f"commit {number} "): act(DaskPool(path, grace="0s"))
            strange = [name for name in touched if (name == odd and odd[:10] != "_delta_log") or "treasure" in name]
            assert strange == [] and outside.exists() and (path.parent / outside.name).exists()
        finally: entry(path, number).unlink() if before is None else entry(path, number).write_bytes(before)
    attack("lake: odd paths", 40, once)
    assert DaskPool(path).verify() == []


def test_forged_facts(path, attack):
    "Text whose checksum fits and that makes no sense: wrong types, missing keys, numbers that fit nowhere"
    pool = DaskPool(path)
    pool.extend([drive(hour=h) for h in range(3)]); pool.store(drive(hour=3)); pool.delete(drive(hour=1).id)
    values = [None, -1, 2**63, 10**400, 1.5, float("inf"), "x", [], {}, [[]], True, [None], "\ud800", {"a": []}]
    def once(rng):
        number, said = int(rng.integers(1, 4)), None
        said = json.loads(next(a["commitInfo"] for a in log(path, number) if "commitInfo" in a)["data_io_nbdev"].partition(" ")[2])
        key = list(said)[rng.integers(len(said))]
        value = values[rng.integers(len(values))]
        def change(old):
            if not isinstance(old, list) or not old or rng.random() < 0.3: return value
            i = rng.integers(len(old))
            if isinstance(old[i], list): old[i][rng.integers(len(old[i]))] = value
            else: old[i] = value
            return old
        with bytes_of(entry(path, number), forged(path, number, **{key: change})):
            for act in (list, lambda p: p.verify(), lambda p: p.catalogue(), lambda p: p.vacuum("0s"), lambda p: p.repair(),
                        lambda p: p.schema, lambda p: p.delete(drive().id)):
                try: act(DaskPool(path))
                except DataIOError: pass
            for n in range(4, 9): entry(path, n).unlink(missing_ok=True)
    attack("lake: forged facts", 60, once)


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("where", ["entry", "entry 0", "facts", "schema", "schemaString", "copy", "stats", "foreign"])
def test_deep(lake, where):
    "JSON that is nested a hundred thousand deep"
    path, right = lake
    number, data = 3, None
    if where == "entry": data = DEEP.encode()
    if where == "entry 0": number, data = 0, b'{"metaData": ' + DEEP.encode() + b"}"
    if where == "facts":
        text = '{"format": 2, "put": ' + DEEP + "}"
        data = json.dumps({"commitInfo": {"data_io_nbdev": f"{zlib.crc32(text.encode()):08x} {text}"}}).encode()
    if where == "schema": number, data = 1, forged(path, 1, schema=lambda _: DEEP)
    if where == "schemaString":
        lines = log(path, 0)
        lines[2]["metaData"]["schemaString"] = DEEP
        number, data = 0, "\n".join(map(json.dumps, lines)).encode()
    if where == "stats":
        lines = log(path, number)
        next(a["add"] for a in lines if "add" in a)["stats"] = DEEP
        data = "\n".join(map(json.dumps, lines)).encode()
    if where == "foreign": data = b'{"commitInfo": {"timestamp": ' + DEEP.encode() + b"}}"
    victim = path / "_history" / f"{INTERVAL:020d}.json.gz" if where == "copy" else entry(path, number)
    if where == "copy":
        crc, _, text = gzip.decompress(victim.read_bytes()).partition(b" ")
        lines = text.split(b"\n")
        text = b"\n".join([*lines[:2], DEEP.encode(), *lines[3:]])
        data = gzip.compress(b"%08x %s" % (zlib.crc32(text), text))
    else: shutil.rmtree(path / "_history")
    with bytes_of(victim, data):
        fine = right_or_named(path, right)
        assert fine == (where in ("copy", "stats"))
        assert complaint(path) or where == "copy"
        for act in (lambda p: p.repair(), lambda p: p.vacuum("0s"), lambda p: p.count(PoolQuery(vehicle="A"))):
            try: act(DaskPool(path))
            except DataIOError: pass


# --- bombs ---

def memory_of(act, path):
    "Peak memory in MB that an act on a lake takes beyond what it takes on a sound one, in processes of their own"
    code = f"""
import sys
from data_io_nbdev.errors import DataIOError
from data_io_nbdev.storage.pool import delta
from data_io_nbdev.storage.pool.dask import DaskPool
delta._INTERVAL = {INTERVAL}
try: said = repr({act})
except DataIOError as e: said = type(e).__name__
print(said[:200])
# not ru_maxrss, which counts what the parent had when it started this process
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(path)], capture_output=True, text=True, timeout=100,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (6 << 30,) * 2))
    assert done.returncode == 0, done.stderr[-3000:]
    said, mb = done.stdout.splitlines()
    return said, int(mb)


def big_page(path):
    "A file of ours in which one page, to the last of its own checksums, unpacks to far more than the log says"
    x = np.random.default_rng(0).normal(size=(20_001, 4)).astype("float32")
    e = Episode.from_arrays(state={"x": x[:-1]}, nstate={"x": x[1:]}, action={"a": x[1:, 0]}, reward={"r": x[1:, 1]}, who={"vehicle": "A"},
                            timestamp=pd.date_range("2026-01-01", periods=20_000, freq="1s", tz="UTC"))
    DaskPool(path).store(e)
    victim = path / log(path, 1)[1]["add"]["path"]
    data, meta = bytearray(victim.read_bytes()), pq.read_metadata(victim)
    chunk = max((meta.row_group(0).column(i) for i in range(meta.num_columns)), key=lambda c: c.total_compressed_size)
    packed = pa.compress(bytes(1 << 30), "zstd", asbytes=True)
    crc = zlib.crc32(packed)
    def number(n, out=b""):  # as Thrift's compact protocol writes it
        n = n << 1 if n >= 0 else ~(n << 1)
        while n > 127: n, out = n >> 7, out + bytes([n & 127 | 128])
        return out + bytes([n])
    fields = [number(n) for n in (0, 1 << 30, len(packed), crc - (crc >> 31 << 32))]  # a data page, its sizes, its checksum
    inner = b"".join(b"\x15" + number(n) for n in (1 << 28, 9, 3, 3))  # so many values, BYTE_STREAM_SPLIT
    page = b"".join(b"\x15" + field for field in fields) + b"\x1c" + inner + b"\0\0" + packed
    assert len(page) < chunk.total_compressed_size
    data[chunk.data_page_offset:chunk.data_page_offset + len(page)] = page
    victim.write_bytes(data)


@pytest.mark.parametrize("what", ["copy of the log", "copy of the log, few lines", "page", "checkpoint"])
def test_bombs(path, lake, attack, what):
    "Files that unpack to gigabytes: they are refused before they do"
    def once(rng):
        shutil.rmtree(path, ignore_errors=True)
        if what == "page": big_page(path)
        else: shutil.copytree(lake_of, path)
        act = "list(DaskPool(sys.argv[1]))"
        _, usual = memory_of(act, path) if what != "page" else ("", 0)
        if what.startswith("copy"):
            line = b"[" + b" " * (1 << 20) + b"]\n" if "few" not in what else b" " * (1 << 26)
            packer, pieces = zlib.compressobj(1, wbits=31), []
            for _ in range((1 << 30) // len(line)): pieces.append(packer.compress(line))
            (path / "_history" / f"{INTERVAL:020d}.json.gz").write_bytes(b"".join(pieces) + packer.flush())
        if what == "checkpoint":
            act = "DaskPool(sys.argv[1]).repair()"
            _, usual = memory_of(act, path)
            victim = max(path.glob("_delta_log/*.checkpoint.parquet"))
            pq.write_table(pa.table({"x": np.zeros(1 << 28)}), victim, compression="zstd", use_dictionary=False)
        if what == "page": usual = 250
        said, mb = memory_of(act, path)
        assert mb < usual + 150, f"{mb} MB, and {usual} usually"
        assert (said == "CorruptData") == (what == "page")
    lake_of = path.parent / "template"
    shutil.copytree(lake[0], lake_of)
    attack(f"lake: bomb, {what}", 1, once)


def test_more_than_the_log_says(monkeypatch):
    "Row groups that say of themselves that they unpack to more than the parts in them are, or have more rows, are not read"
    monkeypatch.setattr(parquet, "_GROUP", 1 << 14)
    e = drive(199)
    part = replace(part_of(e), version=1)
    with monkeypatch.context() as m:
        for name in ("_GROUP", "_SHARED"): m.setattr(parquet, name, 1 << 40)
        file, content = parquet.parquet_bytes("a.parquet", [(replace(part, id=str(n)), e) for n in range(40)])
    footer = bytes(content[-file.footer:])
    def read(*parts):
        opened = parquet.open_parquet(pa.BufferReader(content), footer)
        return parquet.read_steps(opened, e.schema, [p.at(("a.parquet", i * p.length)) for i, p in enumerate(parts)])
    assert facts_of(read(*[part] * 40)) == facts_of([e] * 40)
    for wrong in (part, replace(part, length=10, nbytes=part.nbytes // 20)):
        with pytest.raises(ValueError, match="and the log says"): read(wrong)


# --- deleting touches only what it must ---

def many(n, first=0): return [drive(2, hour=(first + i) // 7, vehicle=f"V{(first + i) % 7}") for i in range(n)]


def parts_of(path):
    pool = DaskPool(path)
    return {file.path: parts for file, parts in pool._catch_up(pool.version).placed(pool.version)}


class TestDeletes:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch): monkeypatch.setattr(dask, "_PARTS", 32, raising=False)

    def test_only_its_files(self, path, attack):
        "Deleting some of a compacted lake rewrites the files that they are in, each time, and leaves files that are bounded"
        pool, every = DaskPool(path), many(600 * round(max(1, float(os.environ.get("SOAK", 1)))))
        for a in range(0, len(every), 20): pool.extend(every[a:a + 20])
        pool.compact()
        left = {e.id for e in every}
        def once(rng):
            before = parts_of(path)
            ids = sorted(rng.choice(sorted(left), min(len(left), int(rng.integers(1, 4))), replace=False).tolist())
            holding = {name for name, ps in before.items() if {p.id for p in ps} & set(ids)}
            pool.delete(ids)
            left.difference_update(ids)
            now, said = parts_of(path), list(pool._lake.entries(pool.version - 1, pool.version))[0]
            assert {f.path for f in said.gone} == holding == set(before) - set(now), "it touched other files"
            written = sum(len(ps) for name, ps in now.items() if name not in before)
            assert written == sum(len(before[name]) for name in holding) - len(ids) <= 32 * len(holding)
            assert max(map(len, now.values()), default=0) <= 32
        attack("lake: deletes rewrite their files", 40, once)
        assert facts_of(pool) == facts_of(by_start([e for e in every if e.id in left])) and pool.verify() == []
        assert others_see(path) == {e.id: len(e) for e in pool}

    def test_a_large_file_of_before(self, path, monkeypatch):
        "A file as an earlier version made it, without bounds: deleting from it leaves bounded ones, and so does `compact`"
        with monkeypatch.context() as m:
            m.setattr(dask, "_PARTS", 10**9, raising=False)
            pool = DaskPool(path)
            pool.extend(many(700))
            assert len(parts_of(path)) == 1
        shutil.copytree(path, path.parent / "again")
        pool.delete(many(1)[0].id)
        assert len(parts_of(path)) <= 23 and max(map(len, parts_of(path).values())) <= 32
        assert facts_of(DaskPool(path)) == facts_of(by_start(many(699, 1)))
        again = DaskPool(path.parent / "again")
        assert again.compact() == 1 and len(parts_of(again.url)) <= 23 and again.compact() == 0
        assert facts_of(again) == facts_of(by_start(many(700)))

    def test_compaction(self, tmp_path, attack):
        "Files that are bounded, full but for a few, in order of subject and time from one to the next; doing it again does nothing"
        def once(rng):
            path = tmp_path / f"{rng.integers(10**12)}"
            pool, n = DaskPool(path), int(rng.integers(60, 200))
            every = many(n)
            cuts = sorted({0, n, *rng.integers(0, n, int(rng.integers(5, 25))).tolist()})
            for a, b in zip(cuts, cuts[1:]): pool.extend([every[i] for i in rng.permutation(range(a, b))])
            before = parts_of(path)
            done = pool.compact()
            files = sorted(parts_of(path).values(), key=lambda ps: dask._key(ps[0]))
            for ps in files: assert ps == sorted(ps, key=dask._key) or ps[0].where[0].path in before
            assert max(map(len, files)) <= max(32, max(map(len, before.values())))
            fresh = [ps for ps in files if ps[0].where[0].path not in before]
            if len(fresh) == len(files):
                ends = [(dask._key(ps[0]), dask._key(ps[-1])) for ps in files]
                assert all(a[1] < b[0] for a, b in zip(ends, ends[1:])), "files overlap"
            assert pool.compact() == 0 and (done or len(before) == len(files))
            assert facts_of(DaskPool(path)) == facts_of(by_start(every)) and pool.verify() == [] and litter(path) == []
            shutil.rmtree(path)
        attack("lake: compaction", 8, once)

    def test_no_fresh_checksum(self, path, attack):
        "Rows of a damaged file that have to move do so if they are sound, and no bit of damage gets a checksum that fits"
        pool, every = DaskPool(path), many(40)
        pool.extend(every)
        pool.compact()
        right, names = {e.id: facts_of([e]) for e in every}, sorted(parts_of(path))
        kept = path.parent / "kept"
        shutil.copytree(path, kept)
        def once(rng):
            shutil.rmtree(path)
            shutil.copytree(kept, path)
            victim = path / names[rng.integers(len(names))]
            data = victim.read_bytes()
            victim.write_bytes(flipped(data, int(rng.integers(8 * len(data)))))
            here = DaskPool(path)
            ids = [p.id for p in parts_of(path)[victim.name]]
            for act in (lambda: here.delete(ids[rng.integers(len(ids))]), lambda: here.compact(),
                        lambda: here.store(drive(3, hour=0, vehicle="V0", seed=7), overwrite=True)):
                try: act()
                except DataIOError as e: assert not isinstance(e, PoolUnavailable), e
            lines = DaskPool(path).verify()
            for id in set(right) & {p.id for p in DaskPool(path)._catch_up(here.version).every_part()} - {drive(3, hour=0, vehicle="V0").id}:
                try: assert facts_of([DaskPool(path)[id]]) == right[id], "damage was written again"
                except CorruptData: assert any(id in line for line in lines)
                except KeyError: pass  # it is deleted
        attack("lake: damage is not made sound", 25, once)


# --- interrupts ---

OURS = {module.__file__ for module in (delta, dask, parquet)}


@contextmanager
def interrupted(at):
    "Ctrl-C before a bytecode of the lake's modules, counted from 1; gives how many ran"
    count = [0]
    def trace(frame, event, arg):
        if frame.f_code.co_filename not in OURS: return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            count[0] += 1
            if count[0] == at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace
    sys.settrace(trace)
    try: yield count
    finally: sys.settrace(None)


ACTS = {"count": len, "store": lambda p: p.store(drive(hour=70)), "delete": lambda p: p.delete(drive(hour=0).id),
        "compact": lambda p: p.compact(), "overwrite": lambda p: p.store(drive(9, hour=8, seed=9), overwrite=True), "vacuum": lambda p: p.vacuum("0s", dry_run=False),
        "repair": lambda p: p.repair(dry_run=False), "verify": lambda p: p.verify(), "find": list}


@pytest.mark.parametrize("what,trials", [("count", 25), ("store", 12), ("delete", 12), ("compact", 12), ("overwrite", 12), ("vacuum", 8),
                                         ("repair", 8), ("find", 8)])
def test_interrupts(path, made, attack, what, trials, monkeypatch):
    "Ctrl-C between any two bytecodes: the handle goes on as before, or as after, and sees what a new one sees"
    template, act = path.parent / "template", ACTS[what]
    pool = DaskPool(template)
    pool.extend([drive(hour=h) for h in range(3)]); pool.store(drive(hour=7)); pool.store(drive(hour=8))
    deltalake.DeltaTable(str(template)).optimize.compact()
    deltalake.DeltaTable(str(template)).delete() if what == "count" else None
    old = facts_of(DaskPool(template))
    shutil.copytree(template, path)
    counted = DaskPool(path)
    with interrupted(-1) as ran: act(counted)
    new, total, hits = facts_of(DaskPool(path)), ran[0], []
    def once(rng):
        shutil.rmtree(path)
        shutil.copytree(template, path)
        pool = DaskPool(path)
        try:
            with interrupted(int(rng.integers(1, total))): act(pool)
        except KeyboardInterrupt: hits.append(1)
        now = facts_of(pool)
        assert now in (old, new) and now == facts_of(DaskPool(path)) and pool.verify() == []
        assert what in ("count", "find", "verify") or others_see(path) == {e.id: len(e) for e in pool}
        try: act(pool)
        except DataIOError as e: assert what == "delete" and now == new
        assert facts_of(pool) == facts_of(DaskPool(path)) == new and pool.verify() == []
        DaskPool(path, grace="0s").repair(dry_run=False)
        assert facts_of(pool) == new and litter(path) in ([], *([[n] for n in litter(path)])) and pool.verify() == []
    attack(f"lake: Ctrl-C in {what}", trials, once)
    assert len(hits) > trials / 2, "hardly anything was interrupted"


# --- disks that fail ---

@contextmanager
def failing(at, error, names=("stat", "scandir", "listdir", "open", "fsync", "link", "replace", "unlink", "mkdir", "rmdir")):
    "A call of the file system fails, counted from 1; gives how many there were"
    count = [0]
    def patched(real):
        def call(*args, **kwargs):
            if args and "site-packages" in str(args[0]): return real(*args, **kwargs)
            count[0] += 1
            if count[0] == at: raise OSError(error, os.strerror(error), str(args[0]) if args else None)
            return real(*args, **kwargs)
        return call
    import builtins, io
    with pytest.MonkeyPatch.context() as m:
        for name in names: m.setattr(os, name, patched(getattr(os, name)))
        m.setattr(io, "open", patched(io.open)); m.setattr(builtins, "open", patched(builtins.open))
        m.setattr(pa, "OSFile", patched(pa.OSFile))
        yield count


class Source:
    "A file of which a read fails"
    def __init__(self, real, error): self.real, self.error = real, error
    def __enter__(self): return self
    def __exit__(self, *_): self.real.close()
    def __getattr__(self, name): return getattr(self.real, name)
    def _fail(self, *_): raise OSError(self.error, os.strerror(self.error))
    read = read_buffer = _fail


@pytest.mark.parametrize("what", [*ACTS, "open", "schema", "catalogue", "snapshot"])
@pytest.mark.filterwarnings("ignore:no checkpoint")
def test_failing_calls(path, made, attack, what):
    "Any call of the file system fails: an error of this package says so, or nobody needed it, and afterwards all is as before or as after"
    more = {"open": lambda p: None, "schema": lambda p: p.schema, "catalogue": lambda p: p.catalogue(), "snapshot": lambda p: p.snapshot(2)}
    act = {**ACTS, **more}[what]
    template = path.parent / "template"
    pool = DaskPool(template)
    pool.extend([drive(hour=h) for h in range(3)]); pool.store(drive(hour=7)); pool.store(drive(hour=8))
    old = facts_of(pool)
    shutil.copytree(template, path)
    with failing(-1, 0) as ran: act(DaskPool(path))
    new, total = facts_of(DaskPool(path)), ran[0]
    def once(rng):
        shutil.rmtree(path)
        shutil.copytree(template, path)
        error = (errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EACCES, errno.ESTALE)[rng.integers(5)]
        try:
            with failing(int(rng.integers(1, total + 1)), error): act(DaskPool(path))
        except DataIOError: pass
        assert facts_of(DaskPool(path)) in (old, new) and DaskPool(path).verify() == []
        if what in ("find", "verify", "compact", "delete"):  # the disk gives the file, and then not its bytes
            pool, when, calls = DaskPool(path), int(rng.integers(1, 7)), []
            def source(name, real=pool._lake.source):
                calls.append(name)
                return Source(real(name), error) if len(calls) == when else real(name)
            pool._lake.source = source
            with suppress(DataIOError): act(pool)
            assert facts_of(DaskPool(path)) in (old, new)
    attack(f"lake: a failing call in {what}", 12, once)


@pytest.mark.parametrize("error,raised", [(errno.EIO, False), (errno.EMFILE, True), (errno.ENOMEM, True)])
def test_verify_says_which(path, monkeypatch, error, raised):
    "A file that the disk does not give is named, whichever way it is asked for; a process that has no room left is none of its faults"
    pool = DaskPool(path)
    for h in range(3): pool.store(drive(hour=h))
    victim, real = log(path, 2)[1]["add"]["path"], delta.LocalLake.source
    for after in (0, 1):
        calls = [0]
        def source(self, name):
            calls[0] += name == victim
            return Source(real(self, name), error) if name == victim and calls[0] > after else real(self, name)
        with monkeypatch.context() as m:
            m.setattr(delta.LocalLake, "source", source)
            if raised:
                with pytest.raises(PoolUnavailable): DaskPool(path).verify()
            else: assert [drive(hour=1).id in line and victim in line for line in DaskPool(path).verify()] == [True]
    assert DaskPool(path).verify() == []
    with monkeypatch.context() as m:
        def read(self, name, real=delta.LocalLake.read):
            if name.endswith("2.json"): raise OSError(error, os.strerror(error))
            return real(self, name)
        m.setattr(delta.LocalLake, "read", read)
        with pytest.raises(PoolUnavailable): DaskPool(path).verify()


def test_only_the_caller_reads(path, lake, monkeypatch):
    "No thread of Arrow's calls Python: in Python 3.11 a fork meanwhile can hang its child before it has begun"
    import threading
    pool, callers = DaskPool(lake[0]), set()
    for name in ("read", "read_buffer", "seek"):
        def told(self, *args, real=getattr(parquet._Checked, name)):
            callers.add(threading.get_ident())
            return real(self, *args)
        monkeypatch.setattr(parquet._Checked, name, told)
    assert len(list(pool.find())) == len(pool) and callers == {threading.get_ident()}


def test_a_fork_while_it_is_read(path, lake, attack):
    "A child that is forked while threads read and write has a pool that works"
    import threading
    pool, stop = DaskPool(lake[0]), threading.Event()
    def busy():
        while not stop.is_set(): list(pool.find(drive(hour=0).id))
    threads = [threading.Thread(target=busy, daemon=True) for _ in range(2)]
    for t in threads: t.start()
    right = len(pool)
    def once(rng):
        time.sleep(rng.random() * 0.01)
        if (child := os.fork()) == 0:
            try: ok = len(pool) == right and len(list(pool.find(drive(hour=0).id))) == 1
            except BaseException: ok = False
            os._exit(0 if ok else 1)
        for _ in range(1000):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid: break
            time.sleep(0.01)
        else:
            os.kill(child, 9); os.waitpid(child, 0)
            raise AssertionError("the child hangs")
        assert status == 0
    try: attack("lake: forks", 20, once)
    finally:
        stop.set()
        for t in threads: t.join()
