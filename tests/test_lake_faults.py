"""A data lake that is killed, torn, filled up, damaged, raced for, and written to by others: what it acknowledged stays, bit for bit.

Everything here is a `DaskPool` in a local folder. The longest test is the soak; LAKE_SOAK_SECONDS says how long (20 by default)."""
import gzip
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from loud import absent

pa = pytest.importorskip("pyarrow")
deltalake = pytest.importorskip("deltalake")

from data_io_nbdev.data.core import Episode, PoolQuery
from data_io_nbdev.errors import CorruptData, DataIOError, EpisodeNotFound, PoolNotFound, PoolUnavailable, SchemaError, SnapshotNotFound
from data_io_nbdev.storage.pool import dask, delta
from data_io_nbdev.storage.pool.dask import DaskPool
from data_io_nbdev.storage.pool.memory import MemoryPool
from data_io_nbdev.storage.pool.pool import open_pool
from data_io_nbdev.testing import at_once, drive, facts, facts_of

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a local disk with hard links, kill -9 and tmpfs")
SOAK = float(os.environ.get("LAKE_SOAK_SECONDS", 20))


@pytest.fixture
def path(tmp_path): return tmp_path / "lake"


def entry(path, number): return path / "_delta_log" / f"{number:020d}.json"
def actions(path, number): return [json.loads(line) for line in entry(path, number).read_text().splitlines()]
def added(path, number): return [path / a["add"]["path"] for a in actions(path, number) if "add" in a]
def lengths(pool): return {e.id: len(e) for e in pool}
def swept(path): return DaskPool(path, grace="0s").repair(dry_run=False)


def others_see(path):
    "How many steps of which episodes the table has for every other tool"
    ids = deltalake.DeltaTable(str(path)).to_pyarrow_table(columns=["episode"])["episode"].value_counts().to_pylist()
    return {row["values"]: row["counts"] for row in ids}


def everything(pool):
    "Every version that can be read"
    return {v: facts_of(pool.snapshot(v)) for v in range(pool._oldest(), pool.version + 1)}


def files(path):
    "Every file there, its bytes and when they were written"
    return {str(p.relative_to(path)): (p.read_bytes(), p.stat().st_mtime_ns) for p in path.rglob("*") if p.is_file()}


def litter(path):
    "What is in the folder and no entry names"
    there = itertools.takewhile(lambda n: entry(path, n).exists(), itertools.count())
    named = {p.name for n in there for p in added(path, n)}
    fine = re.compile(r"_delta_log/(\d{20}\.json|\d{20}\.checkpoint\.parquet|_last_checkpoint)|_history/(\d{20}\.json\.gz|\d{20}-\d{20}\.arrow)")
    found = [p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()]
    return [n for n in found if n not in named and not fine.fullmatch(n) and n[:7] != "_shadow"] + [p.name for p in path.glob("_shadow*")]


@contextmanager
def bytes_of(file, data):
    "A file with other content, `None` for none at all, for as long as it lasts"
    before = file.read_bytes()
    try:
        file.unlink() if data is None else file.write_bytes(data)
        yield
    finally: file.write_bytes(before)


def flipped(data, bit): return data[:bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1:]


def child(what, *args, before=()):
    "A function of this file in an interpreter of its own"
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_lake_faults as t; t.{what}(*sys.argv[1:])"
    return subprocess.Popen([*before, sys.executable, "-W", "ignore", "-c", code, *map(str, args)],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


# --- kill -9 ---

def act(pool, n):
    "The n-th thing that a writer does"
    hour, kind = n - n % 8, n % 8
    if kind == 0: pool.store(drive(hour=hour))
    if kind == 1: pool.extend([drive(hour=hour, vehicle=v) for v in ("pair 1", "pair 2", "pair 3")])
    if kind == 2: pool.store(drive(40, hour=hour, vehicle="long")[:17])
    if kind == 3: pool.store(drive(40, hour=hour, vehicle="long", end="terminated"))
    if kind == 4: pool.store(drive(9, hour=hour, vehicle="pair 2", seed=1), overwrite=True)
    if kind == 5: pool.delete(drive(hour=hour, vehicle="pair 3").id)
    if kind == 6: getattr(pool, "compact", list)()
    if kind == 7: pool.extend([drive(hour=hour, vehicle="pair 3", seed=2), drive(4, hour=hour + 0.5)])


STATES, MODEL = [], MemoryPool()

def state(n):
    "What is there after the first n of these"
    while len(STATES) <= n:
        if STATES: act(MODEL, len(STATES) - 1)
        STATES.append(facts_of(MODEL))
    return STATES[n]


def serve_kills(interval):
    "Fork a writer for every line, kill it after so many seconds, and say so"
    delta._INTERVAL = int(interval)
    for line in sys.stdin:
        path, n, delay = json.loads(line)
        ready, go = os.pipe()
        if (pid := os.fork()) == 0:
            acks = os.open(f"{path}.acks", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.write(go, b".")
            try:
                pool = DaskPool(path)
                for i in itertools.count(n):
                    act(pool, i)
                    os.write(acks, f"{i + 1}\n".encode())
            except BaseException: os.write(acks, f"FAILED {traceback.format_exc()}".encode())
            os._exit(1)
        os.read(ready, 1)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for fd in (ready, go): os.close(fd)
        print("killed", flush=True)


def test_kill(tmp_path, monkeypatch):
    "`kill -9` at any moment, the first commit included: what was acknowledged is there, the next commit as a whole or not at all"
    monkeypatch.setattr(delta, "_INTERVAL", 8)
    seed = random.SystemRandom().randrange(10**6)
    rng, helper, hits = random.Random(seed), child("serve_kills", 8), []
    began, pool = time.monotonic(), DaskPool(tmp_path / "pace")
    for n in range(4): act(pool, n)
    pace = (time.monotonic() - began) / 4  # of this machine, as it is now
    try:
        for round, kill in itertools.product(range(10), range(5)):
            path = tmp_path / f"lake{round}"
            if not kill: n = 0
            delay = pace * 10 ** rng.uniform(-1, 0 if round % 2 and not kill else 1.2)
            where = f"seed {seed}, lake {round}, kill {kill} after {delay:.4f} s"
            print(json.dumps([str(path), n, delay]), file=helper.stdin, flush=True)
            assert helper.stdout.readline() == "killed\n", where
            said = Path(f"{path}.acks").read_text()
            assert "FAILED" not in said, f"{where}: {said}"
            done = max([n, *map(int, said.split())])
            hits.append(done - n)
            n = look_after_kill(path, done, where)
        for round in range(10): sweep_after_kill(tmp_path / f"lake{round}", where)
    finally:
        helper.stdin.close(); helper.wait(30); helper.stdout.close()
    assert 0 in hits[::5] and max(hits) > 3, f"seed {seed}: the moments were not spread, {hits}"


def look_after_kill(path, done, where):
    "Check a lake whose writer was killed after `done` acknowledged steps; gives how far it is, after one more"
    pool = DaskPool(path)
    found = facts_of(pool)
    assert found in (state(done), state(done + 1)), f"{where}: neither {done} nor {done + 1} steps"
    n = done + (found != state(done))
    assert pool.verify() == [], where
    if entry(path, 0).exists(): assert deltalake.DeltaTable(str(path)).count() == sum(e["steps"] for e in found), where
    else: assert n == 0, where
    act(pool, n)
    assert facts_of(DaskPool(path, "r")) == state(n + 1), f"{where}: step {n} after it"
    return n + 1


def sweep_after_kill(path, where):
    "`repair` removes what was left over, and nothing else"
    right, seen = everything(DaskPool(path)), others_see(path)
    assert DaskPool(path).repair() == [], f"{where}: young files are nobody's business"
    left = litter(path)
    assert len(swept(path)) == len(left) and litter(path) == [], f"{where}: {left}, {litter(path)}"
    assert everything(DaskPool(path)) == right and DaskPool(path).verify() == [] and others_see(path) == seen, where
    assert swept(path) == [], where


# --- the order in which things reach the disk ---

class Call(NamedTuple):
    "A system call that succeeded, between two lines of a trace"
    name: str
    paths: tuple
    start: int
    end: int


def trace_writer(path):
    "Do a little of everything, and say so after each"
    os.write(1, b"ACK begin\n")
    pool = DaskPool(path)
    for h in range(3):
        pool.store(drive(hour=h)); os.write(1, b"ACK store\n")
    ids = pool.extend([drive(hour=h) for h in (5, 6)]); os.write(1, b"ACK store\n")
    pool.delete(ids[0]); os.write(1, b"ACK delete\n")
    pool.store(drive(hour=0, seed=1), overwrite=True); os.write(1, b"ACK store\n")
    pool.compact(); os.write(1, b"ACK compact\n")
    pool.vacuum("0s", dry_run=False); os.write(1, b"ACK vacuum\n")


def parse_trace(text):
    "The calls of a trace, in the order in which they ended"
    calls, pending = [], {}
    for i, line in enumerate(text.splitlines()):
        pid, _, rest = line.partition(" ")
        rest, start = rest.strip(), i
        if rest.endswith("<unfinished ...>"):
            pending[pid] = (rest.removesuffix("<unfinished ...>"), i)
            continue
        if m := re.match(r"<\.\.\. \w+ resumed>", rest):
            head, start = pending.pop(pid)
            rest = head + rest[m.end():]
        if not (m := re.match(r"(\w+)\((.*)\)\s+= (-?\d+)", rest)) or int(m[3]) < 0: continue
        name, args = m[1], m[2]
        if name in ("open", "creat", "openat", "close"): continue
        if name in ("write", "pwrite64", "writev", "ftruncate", "fsync", "fdatasync"):
            on = re.match(r"\d+<([^>]*)>", args)
            ack = name == "write" and re.search(r'"ACK (\w+)\\n"', args)
            calls.append(Call("ack", (ack[1],), start, i) if ack else
                         Call("sync" if "sync" in name else "write", (on[1] if on else "",), start, i))
        else: calls.append(Call(re.sub(r"at2?$", "", name), tuple(re.findall(r'"((?:[^"\\]|\\.)*)"', args)), start, i))
    return calls


def complaints(calls):
    "What was seen, or acknowledged, before it was on the disk"
    wrong = []
    acks = [c for c in calls if c.name == "ack"]
    for last, ack in zip(acks, acks[1:]):
        window = [c for c in calls if last.end < c.start and c.end < ack.start]
        of = lambda name, test: [c for c in window if c.name == name and test(c.paths[-1])]
        synced = lambda path, after, before: any(c.start > after.end and c.end < before.start for c in of("sync", lambda p: p == path))
        def content(temporary, before):
            writes = of("write", lambda p: p == temporary)
            if not writes: wrong.append(f"{ack.paths}: nothing was written to {temporary}")
            elif not synced(temporary, writes[-1], before): wrong.append(f"{ack.paths}: {temporary} was not synced")
        links = of("link", lambda p: re.search(r"_delta_log/\d{20}\.json$", p))
        if not links: wrong.append(f"{ack.paths}: no commit")
        for link in links:
            content(link.paths[0], link)
            if not synced(os.path.dirname(link.paths[-1]), link, ack): wrong.append(f"{ack.paths}: {link.paths[-1]} was not synced")
            for gone in of("unlink", lambda p: re.search(r"/[^/.]+\.parquet$", p)):
                if not synced(os.path.dirname(link.paths[-1]), link, gone): wrong.append(f"{ack.paths}: {gone.paths} went before its commit")
        renamed = of("rename", lambda p: p.endswith(".parquet"))
        if ack.paths[0] in ("store", "compact") and not renamed: wrong.append(f"{ack.paths}: no data")
        for move in renamed:
            content(move.paths[0], move)
            if not synced(os.path.dirname(move.paths[-1]), move, links[-1]): wrong.append(f"{ack.paths}: the name {move.paths[-1]} was not synced")
        for made in of("mkdir", bool):
            if not synced(os.path.dirname(made.paths[-1]), made, links[-1]): wrong.append(f"{ack.paths}: folder {made.paths[-1]} was not synced")
    return wrong


def test_order_on_disk(tmp_path):
    "Steps, then their names, then the entry, then its name are on the disk before the caller hears of it; so are new folders"
    strace, out = shutil.which("strace"), tmp_path / "trace.txt"
    if not strace: absent("strace is not installed")
    watch = "trace=openat,open,creat,rename,renameat,renameat2,link,linkat,fsync,fdatasync,write,pwrite64,writev,ftruncate,mkdir,mkdirat,unlink,unlinkat,close"
    writer = child("trace_writer", tmp_path / "new" / "folders" / "lake", before=(strace, "-f", "-y", "-s", "32", "-e", watch, "-o", str(out)))
    said, _ = writer.communicate(timeout=100)
    if writer.returncode and not said: absent("strace is not permitted to trace")
    assert writer.returncode == 0 and said.count("ACK") == 9
    calls = parse_trace(out.read_text())
    assert complaints(calls) == []
    folders = [c for c in calls if c.name == "mkdir" and str(tmp_path) in c.paths[-1]]
    assert [os.path.basename(c.paths[-1]) for c in folders] == ["new", "folders", "lake", "_delta_log"]
    assert sum(c.name == "unlink" and c.paths[-1].endswith("-0.parquet") for c in calls) >= 6, "vacuum removed nothing"
    check_the_checker(calls)


def check_the_checker(calls):
    "Every sync counts: without any single one of them there is a complaint; and none may come too late"
    acks, needed = [c for c in calls if c.name == "ack"], 0
    for last, ack in zip(acks, acks[1:]):
        window = [c for c in calls if last.end < c.start and c.end < ack.start]
        link = [c for c in window if c.name == "link"][-1]
        syncs = [c for c in window if c.name == "sync"]
        for c in syncs:
            log = c.paths[0].endswith("_delta_log")
            if log != (c.start > link.end): continue  # looking for news makes them durable too
            removal = [x for x in window if x.name == "unlink" and x.start > link.end and not x.paths[-1].endswith(".tmp")]
            since, until = (link.end, (removal + [ack])[0].start) if log else (c.end, link.start)
            if any(x is not c and x.paths == c.paths and since < x.start < until for x in syncs): continue  # another one is enough
            needed += 1
            assert complaints([x for x in calls if x is not c]), f"nobody would miss {c}"
            late = c._replace(start=ack.start + 0.5, end=ack.start + 0.5)
            assert complaints([late if x is c else x for x in calls]), f"nobody would mind that {c} came too late"
    assert needed >= 30


# --- damaged data ---

WHO = [dict(hour=h, driver=d) for h, d in enumerate(("anna", "bo", "Ünï", "", "eve"))]
DRIVES = [drive(steps, **who, linked=steps % 2 == 0) for steps, who in zip((6, 33, 1, 20, 97), WHO)]


@pytest.fixture(params=["separate", "shared"])
def lake(path, request):
    "A lake of five episodes, the file to be damaged, and whose steps are in it"
    pool = DaskPool(path)
    for e in DRIVES: pool.store(e)
    pool.store(drive(9, hour=8))
    victim, ids = added(path, 5)[0], {DRIVES[4].id}
    if request.param == "shared":
        pool.delete(drive(hour=8).id)
        assert pool.compact() == 5
        pool.store(drive(9, hour=9))
        victim, ids = added(path, 8)[0], {e.id for e in DRIVES}
    return path, victim, ids, {e.id: facts(e) for e in pool}


def survey(path, victim, ids, right):
    "Ids that cannot be read while a file is damaged; `verify` names these, errors name the file, all else is as it was"
    pool, bad = DaskPool(path, "r"), set()
    for id, expected in right.items():
        try: assert facts(pool[id]) == expected, f"{id} was read wrongly"
        except CorruptData as e:
            assert id in ids and victim.name in str(e), str(e)
            bad.add(id)
    lines = pool.verify()
    named = {id for id in right if any(line.startswith(f"episode {id}") and victim.name in line for line in lines)}
    assert bad <= named <= ids and named and len(lines) == len(named), lines
    assert len(pool) == len(right)
    return bad


class TestDamagedData:
    "Damage is noticed, costs what it hit, and is never read as if it were sound"

    def test_missing(self, lake):
        "A file that is gone"
        path, victim, ids, right = lake
        with bytes_of(victim, None):
            assert survey(*lake) == ids
            with pytest.raises(CorruptData, match=re.escape(victim.name)): list(DaskPool(path))
            assert sorted(e.id for e in DaskPool(path).find(set(right) - ids)) == sorted(set(right) - ids)
        assert DaskPool(path).verify() == [] and lengths(DaskPool(path)) == {id: f["steps"] for id, f in right.items()}

    def test_cut_short(self, lake):
        "Or cut, or longer"
        data = lake[1].read_bytes()
        for length in sorted({0, 1, 4, len(data) - 1, len(data) - 8, *random.Random(0).sample(range(len(data)), 25)}):
            with bytes_of(lake[1], data[:length]): assert survey(*lake) == lake[2], f"cut after {length} bytes"
        for more in (b"\0", b"PAR1", data):
            with bytes_of(lake[1], data + more): assert survey(*lake) == lake[2]

    @pytest.mark.parametrize("where", ["pages", "footer"])
    def test_one_bit(self, lake, where):
        "One bit, in the pages or their headers: this episode or none; in the footer: all that are in the file"
        data = lake[1].read_bytes()
        footer = 8 * (len(data) - int.from_bytes(data[-8:-4], "little") - 8)
        bits, hit = random.Random(1).sample(range(0, footer) if where == "pages" else range(footer, 8 * len(data)), 60), 0
        for bit in bits:
            with bytes_of(lake[1], flipped(data, bit)): bad = survey(*lake)
            assert where == "pages" or bad == lake[2], f"bit {bit}"
            hit += bool(bad)
        assert hit > 30, "who reads hardly notices"

    def test_another_file_of_ours(self, lake):
        "Two sound files that changed places, and a page of zeros"
        path, victim, ids, right = lake
        other, data = added(path, 6 if len(ids) == 1 else 9)[0], victim.read_bytes()
        with bytes_of(victim, other.read_bytes()): assert survey(*lake) == ids
        for at in range(0, len(data), max(512, len(data) // 20)):
            with bytes_of(victim, data[:at] + bytes(len(data[at:at + 512])) + data[at + 512:]): survey(*lake)

    def test_what_can_still_be_done(self, lake):
        "Storing, deleting the damaged episodes, and overwriting them; old versions with other files are sound"
        path, victim, ids, right = lake
        data = victim.read_bytes()
        with bytes_of(victim, data[:-1]):
            pool = DaskPool(path)
            if len(ids) > 1:  # the others in the file cannot move, so nothing is lost, and that is said
                with pytest.raises(CorruptData): pool.delete(DRIVES[0].id)
                assert len(pool) == 6
            with pytest.raises(CorruptData): pool.compact()
            assert litter(path) == []
            assert pool.store(drive(hour=20)) in pool and sorted(pool.delete(sorted(ids))) == sorted(ids)
            pool.extend(DRIVES)
            assert {e.id: facts(e) for e in pool} == {**right, drive(hour=20).id: facts(drive(hour=20))}
            assert others_see(path) == lengths(pool)


# --- a damaged log ---

def history(path):
    "A lake with an entry of every kind; gives its pool"
    pool = DaskPool(path)
    pool.extend([drive(hour=h) for h in range(3)])  # 1
    pool.store(drive(40, hour=4)[:9])
    pool.store(drive(40, hour=4))
    pool.delete(drive(hour=1).id)  # 4: the two others move
    pool.store(drive(hour=2, seed=1), overwrite=True)
    pool.compact()  # 6
    pool.store(drive(hour=7))
    pool.vacuum("0s", dry_run=False)  # 8
    pool.store(drive(hour=8))
    return pool


def same_or_named(path, number, right, what):
    "Whether a pool with a damaged entry reads as before; else the error says which entry it is"
    try: assert everything(DaskPool(path, "r")) == right, f"{what}: read wrongly"
    except CorruptData as e:
        assert re.search(rf"commit {number}\b|{number:020d}", str(e)), f"{what}: {e}"
        return False
    return True


class TestDamagedLog:
    "An entry is sound, or named"

    def test_cut(self, path):
        "Cut anywhere, or empty, or zeros, as a file system leaves it that does not keep its promises"
        right = everything(history(path))
        for number in range(1, 10):
            data = entry(path, number).read_bytes()
            first = data.index(b"\n") if b"\n" in data else len(data)
            cuts = {0, 1, first - 1, first // 2, *random.Random(number).sample(range(first), 10)}
            for length in cuts:
                with bytes_of(entry(path, number), data[:length]): assert not same_or_named(path, number, right, f"entry {number} cut at {length}")
            for bad in (bytes(len(data)), data[:first // 2] + bytes(len(data) - first // 2), b"\n\n", b"\xff\xfe"):
                with bytes_of(entry(path, number), bad): assert not same_or_named(path, number, right, f"entry {number} is {bad[:9]}…")
            for later in random.Random(number).sample(range(first, len(data) + 1), min(5, len(data) + 1 - first)):
                with bytes_of(entry(path, number), data[:later]): same_or_named(path, number, right, f"entry {number} cut at {later}")

    def test_flipped(self, path):
        "One bit of an entry, anywhere"
        right = everything(history(path))
        for number in range(1, 10):
            data = entry(path, number).read_bytes()
            keys = {8 * i for m in re.finditer(b"commitInfo|data_io_nbdev|token|engineInfo", data) for i in range(m.start(), m.end())}
            bits = random.Random(number).sample([b for b in range(8 * len(data)) if b - b % 8 not in keys], 25)
            for bit in bits:
                with bytes_of(entry(path, number), flipped(data, bit)): same_or_named(path, number, right, f"entry {number}, bit {bit}")

    @pytest.mark.parametrize("key", ["commitInfo", "data_io_nbdev"])
    def test_flipped_key(self, path, key):
        "Also one of the word that says that the entry is ours: it is not taken for somebody else's"
        right, wrong = everything(history(path)), []
        for number in range(1, 10):
            data = entry(path, number).read_bytes()
            at = data.index(f'"{key}":'.encode()) + 1
            with bytes_of(entry(path, number), flipped(data, 8 * at + 1)):
                try: same_or_named(path, number, right, f"entry {number}")
                except (DataIOError, AssertionError) as e: wrong.append(f"entry {number}: {type(e).__name__} {str(e)[:80]}")
        assert wrong == []

    @pytest.mark.parametrize("text", ["1", "[]", "null", '{"add": 1}', '{"commitInfo": null}', '{"commitInfo": {"data_io_nbdev": 7}}',
                                      '{"commitInfo": {"data_io_nbdev": "zz"}}', '{"remove": {"dataChange": true}}'])
    @pytest.mark.parametrize("number", [1, 2])
    def test_nonsense(self, path, text, number):
        "JSON that is no entry"
        pool = DaskPool(path)
        pool.store(drive()); pool.store(drive(hour=1))
        entry(path, number).write_text(text)
        with pytest.raises(CorruptData, match=rf"commit {number}\b|{number:020d}"): list(DaskPool(path))

    @pytest.mark.parametrize("text", ["", "1", "null", "\0" * 99, '{"metaData": null}', '{"metaData": 1}',
                                      '{"metaData": {"configuration": {"data_io_nbdev.format": "x"}}}'])
    def test_nonsense_in_entry_0(self, path, text):
        "Entry 0 as well, when the pool is opened"
        DaskPool(path).store(drive())
        entry(path, 0).write_text(text)
        with pytest.raises(CorruptData, match="0{20}|commit 0"): DaskPool(path)

    def test_what_was_before(self, path):
        "Versions before the damage can be read, nothing is stored behind it, and once it is mended all is there"
        pool = DaskPool(path)
        for h in range(4): pool.store(drive(hour=h))
        right, data = everything(pool), entry(path, 3).read_bytes()
        with bytes_of(entry(path, 3), data[:-300]):
            again = DaskPool(path)
            assert facts_of(again.snapshot(2)) == right[2]
            for call in (again.verify, again.compact, lambda: again.store(drive(hour=9)), lambda: again.delete(drive().id), lambda: len(again)):
                with pytest.raises(CorruptData, match=r"commit 3\b|0{19}3"): call()
            assert again.version == 4
        assert litter(path) == [] and everything(DaskPool(path)) == everything(again) == right

    def test_a_missing_entry(self, path):
        "A gap in the log is damage, not an earlier end"
        pool = DaskPool(path)
        for h in range(4): pool.store(drive(hour=h))
        with bytes_of(entry(path, 2), None):
            with pytest.raises(CorruptData, match="0{19}2"): list(DaskPool(path))


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    "24 commits with a checkpoint every ten, and what they say"
    path = tmp_path_factory.mktemp("lake") / "template"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(delta, "_INTERVAL", 10)
        pool = DaskPool(path)
        for h in range(20): pool.store(drive(2 + h, hour=h))
        pool.delete(drive(2, hour=0).id)
        for h in range(20, 23): pool.store(drive(hour=h))
        assert len(list(path.glob("_delta_log/*.checkpoint.parquet"))) == len(list(path.glob("_history/*.json.gz"))) == 2
        return path, facts_of(pool), others_see(path)


class TestSegmentsAndCheckpoints:
    "Copies of the log: without them a pool is slower, and never wrong"

    @pytest.fixture
    def lake(self, template, path, monkeypatch):
        "A copy of it"
        monkeypatch.setattr(delta, "_INTERVAL", 10)
        shutil.copytree(template[0], path)
        return path, *template[1:]

    @pytest.fixture
    def long_lake(self, path, monkeypatch):
        "50 commits with a segment of every 24, which is enough to be read; and what they say"
        monkeypatch.setattr(delta, "_INTERVAL", 24)
        pool = DaskPool(path)
        pool.extend([drive(hour=h) for h in range(3)])
        for h in range(47): pool.store(drive(100, hour=5)[:h + 1])
        pool.delete(drive(hour=1).id); pool.store(drive(hour=9))
        assert len(list(path.glob("_history/*.json.gz"))) == 2
        return path, pool.catalogue()

    def test_segments(self, long_lake):
        "Missing, empty, cut, flipped, or of nonsense"
        path, right = long_lake
        for segment in path.glob("_history/*.json.gz"):
            data, rng = segment.read_bytes(), random.Random(0)
            short = gzip.compress(b"\n".join(gzip.decompress(data).splitlines()[1:]))
            nonsense = [gzip.compress(text * 24) for text in (b"nonsense\n", b"\n", b"{\n")]
            for bad in (None, b"", data[:-1], data[:9], b"nonsense", bytes(len(data)), short, data + b"\0", *nonsense,
                        *(data[:rng.randrange(len(data))] for _ in range(10)), *(flipped(data, rng.randrange(8 * len(data))) for _ in range(40))):
                with bytes_of(segment, bad): pd.testing.assert_frame_equal(DaskPool(path, "r").catalogue(), right)
        shutil.rmtree(path / "_history")
        (path / "_history").write_text("a file where a folder should be")
        pool = DaskPool(path)
        with pytest.warns(UserWarning, match="no checkpoint at commit 72"):
            for h in range(30, 52): pool.store(drive(hour=h))
        assert len(DaskPool(path)) == len(right) + 22 and pool.version == 72

    def test_segments_stand_in(self, long_lake):
        "What a segment has need not be read from its entries; `verify` says that these are damaged"
        path, right = long_lake
        for number in range(1, 49): entry(path, number).write_bytes(b"damaged")
        pool = DaskPool(path, "r")
        pd.testing.assert_frame_equal(pool.catalogue(), right)
        assert [line.partition(":")[0] for line in pool.verify()] == [f"commit {n}" for n in range(1, 49)]

    def test_columns(self, long_lake):
        "The log in columns, missing or damaged: the entries are read, `verify` says so, and `repair` makes it anew"
        path, right = long_lake
        files = sorted(path.glob("_history/*.arrow"))
        assert len(files) == 2
        for file in files:
            data, rng = file.read_bytes(), random.Random(0)
            for bad in (b"", data[:-1], data[:9], bytes(len(data)), data + b"\0", *(flipped(data, rng.randrange(8 * len(data))) for _ in range(20))):
                file.write_bytes(bad)
                pd.testing.assert_frame_equal(DaskPool(path, "r").catalogue(), right)
            said = [f"_history/{file.name}: a damaged copy of the log, or one of an earlier format"]
            assert DaskPool(path).verify() == DaskPool(path, "r").repair() == said and file.read_bytes() == bad
            assert DaskPool(path).repair(dry_run=False) == said and file.read_bytes() == data
            assert DaskPool(path).repair() == DaskPool(path).verify() == []
            with bytes_of(file, None): pd.testing.assert_frame_equal(DaskPool(path, "r").catalogue(), right)

    def mended(self, lake, spoil):
        "Spoil the checkpoints: the pool does not notice, and after `repair` nobody does"
        path, right, seen = lake
        spoil(path)
        assert facts_of(DaskPool(path)) == right and DaskPool(path).verify() == []
        before = files(path)
        DaskPool(path, "r").repair()
        assert files(path) == before, "a dry run changed something"
        DaskPool(path).repair(dry_run=False)
        assert others_see(path) == seen and deltalake.DeltaTable(str(path)).count() == sum(seen.values())
        assert DaskPool(path).repair() == [] and litter(path) == []
        pool = DaskPool(path)
        for h in range(30, 38): pool.store(drive(hour=h))
        assert others_see(path) == lengths(pool)

    @pytest.mark.parametrize("bad", ["empty", "cut", "zeros", "missing", "all missing", "both cut"])
    def test_checkpoints(self, lake, bad):
        "A checkpoint that is damaged or gone"
        def spoil(path):
            old, new = sorted(path.glob("_delta_log/*.checkpoint.parquet"))
            data = new.read_bytes()
            if bad in ("missing", "all missing"): new.unlink()
            else: new.write_bytes({"empty": b"", "zeros": bytes(len(data))}.get(bad, data[:-20]))
            if bad == "all missing": old.unlink()
            if bad == "both cut": old.write_bytes(old.read_bytes()[:-20])
        self.mended(lake, spoil)

    @pytest.mark.parametrize("text", [b"", b"nonsense", b"{}", b'{"version":20', bytes(60), b'{"version":99,"size":1}', b'{"version":10,"size":1}', None])
    def test_last_checkpoint(self, lake, text):
        "The note that says which is the last"
        def spoil(path):
            note = path / "_delta_log" / "_last_checkpoint"
            note.unlink() if text is None else note.write_bytes(text)
        self.mended(lake, spoil)

    def test_flipped_checkpoints(self, lake):
        "One bit of a checkpoint, which other readers trust: after `repair` they see what is there"
        path, right, seen = lake
        rng, wrong, kept = random.Random(3), [], files(path)
        for _ in range(25):
            victim = sorted(path.glob("_delta_log/*.checkpoint.parquet"))[-1]
            bit = rng.randrange(8 * victim.stat().st_size)
            victim.write_bytes(flipped(victim.read_bytes(), bit))
            try:
                DaskPool(path).repair(dry_run=False)
                if others_see(path) != seen or deltalake.DeltaTable(str(path)).count() != sum(seen.values()): wrong.append(f"bit {bit}: other rows")
            except BaseException as e:
                if isinstance(e, KeyboardInterrupt): raise
                wrong.append(f"bit {bit}: {type(e).__name__} {str(e)[:60]}")
            for name, (data, _) in kept.items():
                if "checkpoint" in name: (path / name).write_bytes(data)
        assert facts_of(DaskPool(path, "r")) == right
        assert wrong == [], f"{len(wrong)} of 25"

    def test_a_damaged_one_has_no_children(self, lake):
        "The next checkpoint is made of the entries where the last one cannot be read"
        path, _, _ = lake
        last = sorted(path.glob("_delta_log/*.checkpoint.parquet"))[-1]
        last.write_bytes(last.read_bytes()[:-20])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pool = DaskPool(path)
            for h in range(30, 36): pool.store(drive(hour=h))
        assert (path / "_delta_log" / f"{30:020d}.checkpoint.parquet").exists() and litter(path) == []
        assert others_see(path) == lengths(DaskPool(path))


# --- what is not ours ---

FRAME = pa.table({"price": [1.5, 2.5], "name": ["a", "b"]})


class TestStrangers:
    "A folder with something else in it stays as it is"

    @pytest.mark.parametrize("mode", ["a", "r"])
    def test_another_table(self, path, mode):
        "A Delta table of somebody's: the error says what it lacks and what it has"
        deltalake.write_deltalake(str(path), FRAME); deltalake.write_deltalake(str(path), FRAME, mode="append")
        before = files(path)
        with pytest.raises(SchemaError, match="data_io_nbdev.format.*price, name"): DaskPool(path, mode)
        with pytest.raises(SchemaError): open_pool(path, mode)
        assert files(path) == before and deltalake.DeltaTable(str(path)).count() == 4

    @pytest.mark.parametrize("mode", ["a", "r"])
    def test_another_folder(self, path, mode):
        "A folder with other files, hidden ones too, and a file"
        path.mkdir()
        (path / ".notes").write_text("do not lose this")
        note = path / ".notes"
        for there in (path, note):
            with pytest.raises(SchemaError, match="_delta_log"): DaskPool(there, mode)
        with pytest.raises(DataIOError): DaskPool(note / "below", mode).store(drive())
        assert note.read_text() == "do not lose this" and [p.name for p in path.iterdir()] == [".notes"]

    def test_nothing(self, path):
        "An empty folder and none at all are no pool to a reader, who makes none; a writer makes none before it stores"
        for there in (path, path / "deeper"):
            with pytest.raises(PoolNotFound): DaskPool(there, "r")
            assert len(DaskPool(there)) == 0 and DaskPool(there).verify() == DaskPool(there).repair(dry_run=False) == []
        assert not path.exists()
        path.mkdir()
        with pytest.raises(PoolNotFound): DaskPool(path, "r")
        assert DaskPool(path).compact() == 0 and DaskPool(path).vacuum("0s", dry_run=False) == [] and list(path.iterdir()) == []

    def test_a_table_that_came_later(self, path):
        "Somebody makes a table of their own where an empty pool is open"
        pool = DaskPool(path)
        deltalake.write_deltalake(str(path), FRAME)
        before = files(path)
        with pytest.raises(SchemaError, match="data_io_nbdev.format"): pool.store(drive())
        assert {name: data for name, data in files(path).items() if name in before} == before and len(files(path)) == len(before)
        assert deltalake.DeltaTable(str(path)).to_pyarrow_table().equals(FRAME)

    def test_a_newer_format(self, path):
        "Of the table, and of one commit: it is said that a newer version is needed"
        pool = DaskPool(path)
        pool.store(drive()); pool.store(drive(hour=1))
        text = entry(path, 0).read_text()
        assert text.count('"data_io_nbdev.format":"2"') == 1
        with bytes_of(entry(path, 0), text.replace('"data_io_nbdev.format":"2"', '"data_io_nbdev.format":"3"').encode()):
            for mode in "ar":
                with pytest.raises(CorruptData, match="newer"): DaskPool(path, mode)
        lines = actions(path, 2)
        body = lines[0]["commitInfo"]["data_io_nbdev"].partition(" ")[2].replace('"format":2', '"format":4').replace('"files"', '"shelves"')
        lines[0]["commitInfo"]["data_io_nbdev"] = f"{zlib.crc32(body.encode()):08x} {body}"
        with bytes_of(entry(path, 2), "\n".join(map(json.dumps, lines)).encode()):
            with pytest.raises(CorruptData, match="commit 2 has format 4, which needs a newer"): list(DaskPool(path))
            with pytest.raises(CorruptData, match="newer"): DaskPool(path).store(drive(hour=5))
            assert facts_of(DaskPool(path).snapshot(1)) == facts_of([drive()])
        assert len(DaskPool(path)) == 2


class TestOtherEngines:
    "What others do to our table is understood, or refused by name"

    @pytest.fixture
    def lake(self, path):
        pool = DaskPool(path)
        for h in range(3): pool.store(drive(hour=h))
        pool.extend([drive(hour=h) for h in (5, 6)])
        return path, pool, deltalake.DeltaTable(str(path))

    def test_appended_rows(self, lake):
        "Rows without digests are no episodes; who brought them when is said, and what was before can be read"
        path, pool, table = lake
        deltalake.write_deltalake(table, table.to_pyarrow_table().slice(0, 3), mode="append")
        for p in (pool, DaskPool(path, "r")):
            with pytest.raises(SchemaError, match=r"commit 5, WRITE by delta-rs.*snapshot\(4\)"): list(p)
            assert facts_of(p.snapshot(4)) == facts_of(drive(hour=h) for h in (0, 1, 2, 5, 6)) and p.version == 5
        with pytest.raises(SchemaError): pool.store(drive(hour=9))
        with pytest.raises(SchemaError): pool.delete(drive().id)
        assert litter(path) == [name for name in litter(path) if name.startswith("part-")] and not entry(path, 6).exists()

    def test_a_deleted_episode(self, lake):
        "An episode with a file of its own is hidden, for a handle that was open too; it may come back"
        path, pool, table = lake
        table.delete(f"episode = '{drive(hour=1).id}'")
        for p in (pool, DaskPool(path, "r")):
            assert facts_of(p) == facts_of(drive(hour=h) for h in (0, 2, 5, 6)) and p.verify() == []
            assert facts_of(p.snapshot(4)) == facts_of(drive(hour=h) for h in (0, 1, 2, 5, 6))
        assert others_see(path) == lengths(pool)
        pool.store(drive(3, hour=1, seed=1))
        assert facts(DaskPool(path)[drive(hour=1).id]) == facts(drive(3, hour=1, seed=1)) and others_see(path) == lengths(pool)

    def test_a_part_of_a_file(self, lake):
        "Deleting one of two episodes in a file rewrites the other's rows, which is refused"
        path, pool, table = lake
        table.delete(f"episode = '{drive(hour=5).id}'")
        with pytest.raises(SchemaError, match="commit 5, DELETE by delta-rs"): len(pool)
        assert len(pool.snapshot(4)) == len(DaskPool(path).snapshot(4)) == 5

    def test_optimize(self, lake):
        "Files laid out anew change nothing, and what is stored afterwards is there for everybody"
        path, pool, table = lake
        before = everything(pool)
        assert table.optimize.compact()["numFilesAdded"] == 1
        for p in (pool, DaskPool(path)):
            assert p.version == 5 and everything(p) == {**before, 5: before[4]} and p.verify() == []
        assert others_see(path) == lengths(pool)
        pool.store(drive(hour=9))
        assert len(DaskPool(path)) == 6 and others_see(path) == lengths(pool)

    @pytest.mark.parametrize("what", ["delete", "delete shared", "overwrite", "compact"])
    def test_after_optimize(self, lake, what):
        "Whatever a pool does then, others see the same episodes as the pool does, each once"
        path, pool, table = lake
        table.optimize.compact()
        if what == "delete": pool.delete(drive(hour=1).id)
        if what == "delete shared": pool.delete(drive(hour=5).id)
        if what == "overwrite": pool.store(drive(9, hour=2, seed=1), overwrite=True)
        if what == "compact": pool.compact()
        assert len(pool) == 5 - what.startswith("delete") and pool.verify() == []
        assert others_see(path) == lengths(pool)

    def test_deleted_after_optimize(self, lake):
        "What others deleted is hidden, wherever its rows were by then"
        path, pool, table = lake
        table.optimize.compact()
        deltalake.DeltaTable(str(path)).delete()
        assert others_see(path) == {} and list(pool) == list(DaskPool(path)) == []

    def test_repair_after_optimize(self, lake):
        "The files that others made are named by a commit"
        path, pool, table = lake
        table.optimize.compact()
        swept(path)
        assert others_see(path) == lengths(pool)

    def test_checkpoints_of_others(self, lake):
        "Their checkpoints, clean-up and vacuum take nothing"
        path, pool, table = lake
        pool.delete(drive().id)
        before = everything(pool)
        table = deltalake.DeltaTable(str(path))
        table.create_checkpoint(); table.cleanup_metadata(); table.vacuum(dry_run=False)
        assert everything(DaskPool(path)) == before and DaskPool(path).verify() == []
        assert others_see(path) == lengths(pool)


# --- a full disk ---

@pytest.fixture
def small_disk(tmp_path):
    "A file system of two megabytes"
    place = tmp_path / "disk"
    place.mkdir()
    for sudo in ([], ["sudo", "-n"]):
        try: done = subprocess.run([*sudo, "mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True).returncode == 0
        except FileNotFoundError: done = False
        if done: break
    else: absent("a small tmpfs cannot be mounted (mount -t tmpfs needs root)")
    try: yield place, sudo
    finally: subprocess.run([*sudo, "umount", "-l", str(place)], check=True)


def fill(place, pages):
    "Leave so many pages free"
    filler = place / "filler"
    filler.touch()
    free = os.statvfs(place).f_bfree - pages
    with open(filler, "ab") as f: f.write(bytes(4096 * max(0, free)))
    if free < 0: os.truncate(filler, filler.stat().st_size + 4096 * free)
    assert os.statvfs(place).f_bfree == pages


class TestFullDisk:
    "A disk without room refuses, and loses nothing"

    def test_until_it_is_full(self, small_disk):
        "Storing until nothing fits: all that was acknowledged is there, and with some room it goes on"
        place, _ = small_disk
        path, hours = place / "lake", itertools.count()
        (place / "filler").write_bytes(bytes(1 << 20))
        pool, ids = DaskPool(path), []
        with pytest.raises(PoolUnavailable):
            while True: ids.append(pool.store(drive(100, hour=next(hours))))
        assert len(ids) > 20 and pool.version == len(ids)
        for again in (pool, DaskPool(path)):
            assert facts_of(again) == facts_of(drive(100, hour=h) for h in range(len(ids))) and again.verify() == []
        assert litter(path) == [] and others_see(path) == lengths(pool)
        (place / "filler").unlink()
        assert facts(pool[pool.store(drive(100, hour=1000))]) == facts(drive(100, hour=1000))
        assert pool.compact() == len(ids) + 1 and pool.verify() == [] and others_see(path) == lengths(pool)

    @pytest.mark.parametrize("what", ["first", "store", "delete", "overwrite", "compact", "vacuum"])
    def test_every_page(self, small_disk, what):
        "Whichever page does not fit any more: the version stays, no file stays, and it works once there is room"
        place, _ = small_disk
        path = place / "lake"
        if what != "first":
            pool = DaskPool(path)
            for items in [[drive(90, hour=h)] for h in range(3)] if what == "compact" else [[drive(90, hour=h) for h in range(3)]]: pool.extend(items)
            for h in range(3, 6): pool.store(drive(hour=h))
        acts = dict(delete=lambda p: p.delete(drive(90, hour=1).id), overwrite=lambda p: p.store(drive(80, hour=1, seed=1), overwrite=True),
                    compact=lambda p: p.compact(9_000), vacuum=lambda p: p.vacuum("0s", dry_run=False))
        act = acts.get(what, lambda p: p.store(drive(90, hour=9)))
        failed, left = 0, []
        for pages in range(40):
            fill(place, pages)
            before = everything(DaskPool(path)), set(files(path)) if path.exists() else set()
            pool = DaskPool(path)
            try: act(pool)
            except PoolUnavailable:
                failed += 1
                assert everything(DaskPool(path)) == everything(pool) == before[0] and DaskPool(path).verify() == []
                new = {name for name in files(path) if not name.endswith("0.json")} - before[1] if path.exists() else set()
                if new: left.append(f"{pages} pages: {sorted(new)}")
                if new and what != "first": swept(path)
                continue
            break
        assert failed and pool.version == len(before[0]) and pool.verify() == [] and others_see(path) == lengths(pool)
        assert left == []

    def test_a_disk_that_is_read_only(self, small_disk):
        "Is read, and refuses what would be written"
        place, sudo = small_disk
        path = place / "lake"
        pool = DaskPool(path)
        pool.store(drive())
        subprocess.run([*sudo, "mount", "-o", "remount,ro", str(place)], check=True)
        for mode in "ar": assert facts_of(DaskPool(path, mode)) == facts_of([drive()]) and DaskPool(path, mode).verify() == []
        with pytest.raises(PoolUnavailable): pool.store(drive(hour=1))
        with pytest.raises(PoolUnavailable): DaskPool(path).delete(drive().id)
        with pytest.raises(PoolUnavailable): DaskPool(place / "other").store(drive())
        subprocess.run([*sudo, "mount", "-o", "remount,rw", str(place)], check=True)
        pool.store(drive(hour=1))
        assert len(DaskPool(path)) == 2 and litter(path) == []


# --- a step that fails, or is interrupted ---

def build(path):
    pool = DaskPool(path)
    pool.extend([drive(hour=h) for h in range(3)])
    for h in range(3, 6): pool.store(drive(hour=h))
    return pool


STEPS = dict(store=lambda p: p.store(drive(hour=9)), delete=lambda p: p.delete(drive(hour=1).id), compact=lambda p: p.compact(),
             overwrite=lambda p: p.store(drive(9, hour=1, seed=1), overwrite=True), vacuum=lambda p: p.vacuum("0s", dry_run=False))


@pytest.mark.parametrize("how", ["fails", "is interrupted"])
@pytest.mark.parametrize("what", [*STEPS, "first"])
@pytest.mark.filterwarnings("ignore:no checkpoint")
def test_every_step(tmp_path, monkeypatch, what, how):
    "Whichever step on the disk fails, or is the last before Ctrl-C: it happened or it did not, all is sound, and it can be repeated"
    monkeypatch.setattr(delta, "_INTERVAL", 5)  # what is tried is followed by a checkpoint
    act = STEPS.get(what, STEPS["store"])
    template, wrong = tmp_path / "template", []
    if what != "first": build(template)
    right = MemoryPool()
    if what != "first": right.extend([drive(hour=h) for h in range(6)])
    if what not in ("compact", "vacuum"): act(right)
    old, new = facts_of(DaskPool(template)), facts_of(right)
    for k in range(200):
        path, calls = tmp_path / f"lake{k}", 0
        if what != "first": shutil.copytree(template, path)
        pool = DaskPool(path)
        assert pool.version == (4 if what != "first" else 0)
        def patched(name, real):
            def call(*args, **kwargs):
                nonlocal calls
                if "_shadow" in str(args[0]) or ".json" in str(args[0]): return real(*args, **kwargs)  # there are many, all alike
                calls += 1
                if calls != k + 1: return real(*args, **kwargs)
                if how == "fails": raise OSError(5, "Input/output error")
                real(*args, **kwargs)
                raise KeyboardInterrupt
            return call
        with monkeypatch.context() as m:
            for name in ("fsync", "replace", "link", "unlink", "mkdir"): m.setattr(os, name, patched(name, getattr(os, name)))
            try: act(pool)
            except (PoolUnavailable, KeyboardInterrupt, OSError) as e: error = type(e).__name__
            else: error = "nothing"
        if calls <= k: break
        again, where = DaskPool(path), f"step {k}, raised {error}"
        try: found = facts_of(again)
        except CorruptData as e: found = str(e)
        if error == "OSError": wrong.append(f"{where}: no error of this package")
        if bad := again.verify(): wrong.append(f"{where}: {len(bad)} episodes lost: {found}")
        elif found not in (old, new): wrong.append(f"{where}: something else is there")
        elif facts_of(pool) != found: wrong.append(f"{where}: the handle sees something else")
        elif entry(path, 0).exists() and others_see(path) != {e["id"]: e["steps"] for e in found}: wrong.append(f"{where}: others see something else")
        else:
            if k % 4: continue  # so that it takes less time
            try: act(again)
            except EpisodeNotFound: assert what == "delete" and found == new
            swept(path)
            assert facts_of(DaskPool(path)) == new and others_see(path) == {e["id"]: e["steps"] for e in new} and litter(path) == []
    assert k >= 4, "hardly a step was tried"
    assert wrong == []


@pytest.mark.parametrize("what", STEPS)
def test_a_link_whose_answer_got_lost(path, monkeypatch, what):
    "NFS repeats a request whose answer got lost: the link is there, and says that it was there before. It is ours"
    pool, link, told = build(path), os.link, []
    def twice(old, new):
        link(old, new)
        if not told and str(new).endswith(".json") and "_shadow" not in str(new):
            told.append(new)
            raise FileExistsError(17, "File exists", new)
    with monkeypatch.context() as m:
        m.setattr(os, "link", twice)
        STEPS[what](pool)
    assert told and pool.version == 5 and pool.verify() == [] and facts_of(DaskPool(path)) == facts_of(pool) and others_see(path) == lengths(pool)
    assert litter(path) == []


# --- a soak ---

FIRST = drive(hour=1).start


def soak_steps(writer, n): return 1 + (7 * n + writer) % 40


@lru_cache(None)
def soak_drives(writer, n):
    "The two episodes that are stored together"
    return [drive(soak_steps(writer, n), hour=n + 1, vehicle=f"w{writer}", driver=driver, linked=n % 3 > 0) for driver in ("anna", "twin")]


def generated(e):
    "What an episode of the soak should be"
    n, writer = (e.start - FIRST) // 3_600_000_000, int(e.who["vehicle"][1:])
    return facts(soak_drives(writer, n)[e.who["driver"] == "twin"][:len(e)])


def soak_writer(path, out, until, writer):
    pool, done = DaskPool(path), []
    for n in itertools.count():
        if time.time() > until: break
        pair = soak_drives(writer, n)
        if n % 5 == 0 and len(pair[0]) > 2: pool.extend([e[:len(e) // 2] for e in pair])
        done += pool.extend(pair)
        time.sleep(0.1)
    return done


def whole_pairs(pool):
    "Ids of the pairs of which every step is there; asserts that no pair is there in half"
    table, pairs = pool.catalogue(), {}
    if table.empty: return {}
    hours = (table.episodestart.dt.tz_convert(None).to_numpy().astype("M8[h]") - np.datetime64("2026-01-01T01", "h")).astype(int).tolist()
    for id, vehicle, n, steps in zip(table.index, table.vehicle, hours, table.seq_len): pairs.setdefault((int(vehicle[1:]), n), []).append((id, steps))
    for key, found in pairs.items(): assert len(found) == 2 and found[0][1] == found[1][1], f"half a commit: {key} {found} in {pool!r}"
    return {key: [id for id, _ in found] for key, found in pairs.items() if found[0][1] == soak_steps(*key)}


def soak_deleter(path, out, until, seed):
    pool, rng, done = DaskPool(path), random.Random(seed), []
    while time.time() < until:
        pairs = list(whole_pairs(pool.snapshot()).values())
        if len(pairs) > 20:
            ids = [id for pair in rng.sample(pairs, rng.randint(1, 3)) for id in pair]
            assert sorted(pool.delete(ids)) == sorted(ids)
            done += ids
        time.sleep(0.1)
    return done


def soak_compactor(path, out, until, seed):
    pool, rng, done = DaskPool(path), random.Random(seed), 0
    while time.time() < until:
        done += pool.compact(rng.choice([20_000, 60_000, 200_000]))
        if rng.random() < 0.2: assert pool.repair(dry_run=False) == []
        time.sleep(0.15)
    return done


def soak_reader(path, out, until, seed):
    rng, kept, looks = random.Random(seed), [], 0
    while not entry(Path(path), 0).exists(): time.sleep(0.01)
    pool = DaskPool(path, "r")
    while time.time() < until:
        if looks % 10 == 9: pool = DaskPool(path, "r")
        now = pool.snapshot()
        whole_pairs(now)
        ids = list(now.catalogue().index)
        chosen = rng.sample(ids, min(len(ids), 20 if looks % 8 else 400))
        for e in now.find(chosen): assert facts(e) == generated(e), f"{e} is torn in {now!r}"
        if looks % 4 == 3: kept.append((now.version, now.catalogue().index.tolist(), [e.digest for e in now.sample(min(30, len(ids)), seed=1)] if ids else []))
        looks += 1
        time.sleep(0.02)
    return kept, looks


def run_soak(path, out, seconds):
    "Fork them all; each leaves what it has to say in a file"
    delta._INTERVAL = 50
    until = time.time() + float(seconds)
    jobs = [(soak_writer, w) for w in range(4)] + [(soak_deleter, 5), (soak_compactor, 6), (soak_reader, 7), (soak_reader, 8)]
    pids = []
    for i, (job, arg) in enumerate(jobs):
        if (pid := os.fork()) == 0:
            try: said = (job.__name__, job(path, out, until, arg))
            except BaseException: said = ("failed", f"{job.__name__}: {traceback.format_exc()}")
            Path(out, f"{i}.pickle").write_bytes(pickle.dumps(said))
            os._exit(0)
        pids.append(pid)
    for pid in pids: assert os.waitpid(pid, 0)[1] == 0


def test_soak(path, tmp_path, monkeypatch):
    "Four writers, a deleter, a compactor and two readers: nothing is lost, doubled or torn, and nobody saw half a commit"
    monkeypatch.setattr(delta, "_INTERVAL", 50)
    out = tmp_path / "out"
    out.mkdir()
    helper = child("run_soak", path, out, SOAK)
    try: helper.communicate(timeout=SOAK + 120)
    finally: helper.kill()
    assert helper.returncode == 0
    said = [pickle.loads(p.read_bytes()) for p in out.iterdir()]
    assert [text for name, text in said if name == "failed"] == []
    of = lambda job: [result for name, result in said if name == job.__name__]
    stored, (deleted,), pool = [id for ids in of(soak_writer) for id in ids], of(soak_deleter), DaskPool(path)
    assert len(stored) == len(set(stored)) and len(deleted) == len(set(deleted)) > 0 and of(soak_compactor)[0] > 0
    there = list(pool)
    assert sorted(e.id for e in there) == sorted(set(stored) - set(deleted))
    assert [facts(e) for e in there] == [generated(e) for e in there] and len(whole_pairs(pool)) == len(there) / 2
    assert pool.verify() == [] and litter(path) == []
    table = deltalake.DeltaTable(str(path))
    assert table.version() == pool.version and table.count() == sum(map(len, there)) and others_see(path) == lengths(pool)
    kept = [snapshot for result, looks in of(soak_reader) for snapshot in result if looks > 3]
    for version, ids, digests in kept:
        old = pool.snapshot(version)
        assert old.catalogue().index.tolist() == ids and [e.digest for e in old.sample(min(30, len(ids)), seed=1) if ids] == digests
    assert len(kept) >= 2 and pool.version > 3 * SOAK


# --- order in the house ---

class TestCompaction:
    "Large files of small ones, which nobody notices"

    def test_every_version(self, path):
        "Each version answers as before, through old handles, old snapshots and iterators that are under way"
        pool = history(path)
        for h in range(10, 16): pool.store(drive(20, hour=h, vehicle="AB"[h % 2]))
        pool.delete(PoolQuery(start=("2026-01-01T12:00Z", "2026-01-01T13:00Z")))
        before, other, snapshot = everything(pool), DaskPool(path), pool.snapshot(9)
        running = iter(other); first = next(running)
        assert pool.compact() > 3
        after = everything(DaskPool(path))
        assert {v: after[v] for v in before} == before and after[pool.version] == before[pool.version - 1]
        assert {v: f for v, f in everything(other).items() if v in before} == before and facts_of(snapshot) == before[9]
        assert facts_of([first, *running]) == before[pool.version - 1] and pool.verify() == []
        assert others_see(path) == lengths(pool) and len(deltalake.DeltaTable(str(path)).file_uris()) == 1

    @pytest.mark.parametrize("rival", ["delete", "overwrite", "compact", "store"])
    def test_races(self, path, rival):
        "Somebody touches one of its files, or none, at the last moment"
        pool, other = DaskPool(path), DaskPool(path)
        for h in range(6): pool.store(drive(hour=h))
        rivals = dict(delete=lambda: other.delete(drive(hour=2).id), overwrite=lambda: other.store(drive(9, hour=2, seed=1), overwrite=True),
                      compact=other.compact, store=lambda: other.store(drive(hour=8)))
        put, waiting = pool._lake.put, [rivals[rival]]
        def late(*args):
            if waiting: waiting.pop()()
            return put(*args)
        pool._lake.put = late
        before = everything(other)
        pool.compact()
        assert waiting == [] and {v: f for v, f in everything(DaskPool(path)).items() if v in before} == before
        right = [drive(9, hour=2, seed=1) if h == 2 and rival == "overwrite" else drive(hour=h) for h in range(6) if h != 2 or rival != "delete"]
        assert facts_of(DaskPool(path)) == facts_of(pool) == facts_of(right + [drive(hour=8)] * (rival == "store"))
        assert pool.verify() == [] and others_see(path) == lengths(pool) and litter(path) == []

    @pytest.mark.parametrize("size", [1, 2_000, 20_000, 10**12])
    def test_it_ends(self, path, monkeypatch, size):
        "Whatever size is asked for, and however large files get at most: every file is written again a few times at most"
        monkeypatch.setattr(dask, "_FILE", 5_000)
        pool = DaskPool(path)
        for h in range(12): pool.store(drive(40, hour=h))
        put, puts = pool._lake.put, []
        def counted(*args):
            puts.append(args)
            if len(puts) > 30: raise TimeoutError(f"compact(size={size}) does not end")
            return put(*args)
        pool._lake.put = counted
        pool.compact(size)
        assert facts_of(pool) == facts_of(drive(40, hour=h) for h in range(12)) and others_see(path) == lengths(pool)

    def test_beside_a_parted_episode(self, path):
        "Parts of one episode come together, and it goes on"
        pool, whole = DaskPool(path), drive(30)
        for n in (5, 11, 12, 25): pool.store(whole[:n]); pool.store(drive(hour=n))
        assert pool.compact() == 8
        DaskPool(path).store(whole)
        assert facts(pool[whole.id]) == facts(whole) and facts(pool.snapshot(3)[whole.id]) == facts(whole[:11])
        assert pool.compact() == 2 and facts(DaskPool(path)[whole.id]) == facts(whole) and others_see(path) == lengths(pool)


class TestSharedFiles:
    "Episodes that share a file live and die one by one"

    @pytest.mark.parametrize("what", ["delete", "overwrite"])
    def test_others_see_the_right_rows(self, path, what):
        "DuckDB and Polars, over the files that the table names, see what is there and nothing else"
        duckdb, polars = pytest.importorskip("duckdb"), pytest.importorskip("polars")
        pool = DaskPool(path)
        pool.extend([drive(5 + h, hour=h) for h in range(5)])
        gone = drive(7, hour=2)
        if what == "delete": pool.delete(gone.id)
        else: pool.store(drive(3, hour=2, seed=9), overwrite=True)
        uris = deltalake.DeltaTable(str(path)).file_uris()
        columns = "episode, count(*), min(epoch_us(timestamp)), sum(CAST(reward_work AS DOUBLE))"
        rows = sorted(duckdb.sql(f"select {columns} from read_parquet({uris}) group by episode").fetchall())
        right = sorted((e.id, len(e), int(e.times[0]), float(e.reward.sum(dtype="float64"))) for e in pool)
        assert [row[:3] for row in rows] == [row[:3] for row in right]
        np.testing.assert_allclose([row[3] for row in rows], [row[3] for row in right])
        for frame in (polars.read_parquet(uris), polars.scan_delta(str(path)).collect()):
            assert {row["episode"]: row["len"] for row in frame.group_by("episode").len().to_dicts()} == lengths(pool)
        assert facts(pool.snapshot(1)[gone.id]) == facts(gone) and pool.verify() == []

    def test_overwrite_some(self, path):
        "One commit that overwrites some of a file, adds to another of its episodes, and brings a new one"
        pool, long = DaskPool(path), drive(20, hour=4)
        pool.extend([*(drive(hour=h) for h in range(4)), long[:7]])
        pool.extend([drive(8, hour=1, seed=1), long, drive(hour=9), drive(2, hour=3, seed=1)], overwrite=True)
        right = [drive(hour=0), drive(8, hour=1, seed=1), drive(hour=2), drive(2, hour=3, seed=1), long, drive(hour=9)]
        for p in (pool, DaskPool(path)): assert facts_of(p) == facts_of(right) and p.verify() == []
        assert facts_of(pool.snapshot(1)) == facts_of([*(drive(hour=h) for h in range(4)), long[:7]]) and others_see(path) == lengths(pool)

    def test_one_by_one(self, path):
        "Deleting each in turn, some twice over in the same place, and all that is left"
        pool, left = DaskPool(path), [drive(3 + h, hour=h) for h in range(8)]
        pool.extend(left)
        for n in (3, 0, 4):
            gone = left.pop(n)
            pool.delete(gone.id)
            assert facts_of(DaskPool(path)) == facts_of(left) and others_see(path) == {e.id: len(e) for e in left}
            pool.store(replace(gone))
            pool.delete(gone.id)
        with pytest.raises(EpisodeNotFound): pool.delete(gone.id)
        pool.delete(everything=True)
        assert others_see(path) == {} == lengths(pool) and len(pool.snapshot(1)) == 8 and pool.verify() == []

    def test_a_lost_race(self, path):
        "Two delete from one file at once: both are gone, and no file is left over"
        pool, other = DaskPool(path), DaskPool(path)
        pool.extend([drive(hour=h) for h in range(5)])
        put, waiting = pool._put, [lambda: other.delete(drive(hour=3).id), lambda: other.store(drive(hour=2, seed=1), overwrite=True)]
        def late(commit):
            if waiting: waiting.pop()()
            return put(commit)
        pool._put = late
        pool.delete(drive(hour=1).id)
        assert facts_of(DaskPool(path)) == facts_of([drive(hour=0), drive(hour=2, seed=1), drive(hour=4)]) and pool.version == 4
        assert litter(path) == [] and others_see(path) == lengths(pool) and pool.verify() == []


class TestVacuum:
    "What was given up is gone, what was not stays"

    @pytest.fixture
    def lake(self, path):
        "Eight versions, of which the first four are a year old"
        pool = DaskPool(path)
        pool.extend([drive(hour=h) for h in range(3)])  # 1
        pool.store(drive(hour=3))
        pool.delete(drive(hour=1).id)  # 3
        pool.store(drive(hour=0, seed=1), overwrite=True)  # 4
        for number in range(1, 5): aged(path, number, 366)
        pool.delete(drive(hour=2).id); pool.store(drive(hour=5)); pool.compact(); pool.store(drive(hour=6))
        return path, DaskPool(path)

    def test_dry_run(self, lake):
        "Changes nothing, whoever asks"
        path, pool = lake
        before, versions = files(path), everything(pool)
        for p in (pool, DaskPool(path, "r")): assert len(p.vacuum("0s")) > len(p.vacuum("365D")) > 0 == len(p.vacuum("400D"))
        assert files(path) == before and everything(pool) == versions

    def test_older_versions_only(self, lake):
        "Handles, snapshots and iterators from before are told; every version that is left reads as before, opened before or after"
        path, pool = lake
        versions = everything(pool)
        stale, old = DaskPool(path), [pool.snapshot(v) for v in range(9)]
        stale.version; fixed = [stale.snapshot(v) for v in range(9)]
        running = [iter(pool.snapshot(v)) for v in range(9)]
        said, dry = pool.vacuum("365D", dry_run=False), files(path)
        assert len(said) >= 2 and not any(line.split(",")[0] in dry for line in said)
        for v in range(9):
            for p in (pool, DaskPool(path), stale):
                if v < 4:
                    with pytest.raises(SnapshotNotFound): facts_of(p.snapshot(v))
                else: assert facts_of(p.snapshot(v)) == versions[v]
            for p in (old[v], fixed[v], running[v]):
                try: assert facts_of(p) == versions[v] and (v >= 4 or v == 0 or p is running[v])
                except SnapshotNotFound: assert v < 4
        assert pool.verify() == [] and everything(DaskPool(path)) == {**{v: f for v, f in versions.items() if v >= 4}, 9: versions[8]}
        assert others_see(path) == lengths(pool) and swept(path) == [] and len(pool.vacuum("365D")) == 0

    def test_everything_old(self, lake):
        "Down to the newest; then it goes on from there, and the files are exactly those of the table"
        path, pool = lake
        late, right = DaskPool(path), facts_of(pool)
        assert len(late) == 4
        pool.compact(); pool.vacuum("0s", dry_run=False)
        assert facts_of(late) == facts_of(DaskPool(path)) == right and late.verify() == []  # its index was older than both
        assert {p.name for p in path.glob("*.parquet")} == {Path(uri).name for uri in deltalake.DeltaTable(str(path)).file_uris()}
        late.store(drive(hour=9)); late.delete(drive(hour=3).id); late.store(drive(hour=3, seed=3))
        assert facts_of(DaskPool(path)) == facts_of(pool) and others_see(path) == lengths(pool) and pool.verify() == []

    def test_a_crash_in_between(self, lake, monkeypatch):
        "The versions were given up and no file removed: the next one removes them"
        path, pool = lake
        with monkeypatch.context() as m:
            m.setattr(pool._lake, "remove", lambda paths: (_ for _ in ()).throw(OSError(5, "gone")))
            with pytest.raises(PoolUnavailable): pool.vacuum("0s", dry_run=False)
        right = facts_of(pool)
        assert pool.verify() == [] and len(pool.vacuum("0s", dry_run=False)) >= 4
        assert {p.name for p in path.glob("*.parquet")} == {Path(uri).name for uri in deltalake.DeltaTable(str(path)).file_uris()}
        assert facts_of(DaskPool(path)) == right

    def test_beside_readers_and_writers(self, path):
        "Through one handle: who asks for the newest version is never told that it was given up"
        pool, stop, errors = DaskPool(path), threading.Event(), []
        pool.extend([drive(hour=h) for h in range(4)])
        def repeat(what):
            for n in itertools.count():
                if stop.is_set(): return
                try: what(n)
                except Exception as e: errors.append(f"{type(e).__name__}: {e}"); return
        jobs = [lambda n: pool.vacuum("0s", dry_run=False), lambda n: len(pool), lambda n: pool.store(drive(2, hour=10 + n)),
                lambda n: pool.store(drive(2, hour=0, seed=n), overwrite=True)]
        timer = threading.Timer(1.5, stop.set)
        timer.start()
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try: at_once(*(lambda job=job: repeat(job) for job in jobs))
        finally: stop.set(); sys.setswitchinterval(interval)
        assert errors == [] and pool.verify() == [] and others_see(path) == lengths(pool)

    def test_entries_without_a_time(self, path):
        "An engine that does not say when it wrote does not make what was there look old"
        pool = DaskPool(path)
        pool.store(drive()); pool.store(drive(hour=1)); pool.delete(drive().id)
        aged(path, 1, 366); aged(path, 2, 366)
        entry(path, 4).write_text(json.dumps({"commitInfo": {"operation": "OPTIMIZE"}}))
        assert DaskPool(path).vacuum("365D") == []
        aged(path, 3, 366)  # version 3 is the newest, or was until a moment ago
        DaskPool(path).vacuum("365D", dry_run=False)
        assert facts_of(DaskPool(path).snapshot(3)) == facts_of([drive(hour=1)])


def aged(path, number, days):
    "Let an entry be so many days older"
    lines = actions(path, number)
    info = lines[0]["commitInfo"]
    body = json.loads(info["data_io_nbdev"].partition(" ")[2])
    body["time"] -= days * 86_400_000
    text = json.dumps(body, separators=(",", ":"))
    lines[0]["commitInfo"] = {**info, "timestamp": body["time"], "data_io_nbdev": f"{zlib.crc32(text.encode()):08x} {text}"}
    for line in lines[1:]: next(iter(line.values())).update({k: body["time"] for k in ("modificationTime", "deletionTimestamp") if k in str(line)})
    entry(path, number).write_text("\n".join(json.dumps(line) for line in lines))


class TestGrace:
    "Who takes too long gives up before anybody clears up behind them"

    @pytest.mark.parametrize("what", ["store", "delete", "compact"])
    def test_too_late(self, path, what, monkeypatch):
        "Steps that waited longer than half of it are not committed"
        build(path)
        pool, write = DaskPool(path, grace="1h"), dask.write_files
        def slow(lake, token, parts, *size):
            placed = write(lake, token, parts, *size)
            for part in placed: os.utime(path / part.where[0].path, (time.time() - 1900,) * 2)
            return placed
        before = everything(pool)
        with monkeypatch.context() as m:
            m.setattr(dask, "write_files", slow)
            with pytest.raises(PoolUnavailable, match="grace=3600"): STEPS[what](pool)
        assert everything(DaskPool(path)) == before and pool.verify() == []
        STEPS[what](pool)
        assert pool.version == 5 and pool.verify() == [] and others_see(path) == lengths(pool)

    def test_gone_while_waiting(self, path, monkeypatch):
        "Or whose files somebody cleared away, with a shorter grace"
        pool = build(path)
        put = pool._lake.put
        monkeypatch.setattr(pool, "_put", lambda commit, real=pool._put: (swept(path), real(commit))[1])
        with pytest.raises(PoolUnavailable): pool.store(drive(hour=9))
        monkeypatch.undo()
        assert pool.version == 4 and pool.store(drive(hour=9)) in pool and pool.verify() == []

    def test_young_files_stay(self, path):
        "`repair` takes what is older, of every kind that a dead writer leaves, and nothing else"
        pool = build(path)
        pool.delete(drive().id)
        hex = "00ff" * 4
        died = dask.write_files(pool._lake, 2 * hex, [([*pool._index.every_part()][1], drive(hour=1))])[0].where[0].path
        left = [died, f".{2 * hex}-0.parquet.{hex}", f"_delta_log/.{hex}.tmp", f"_delta_log/._last_checkpoint.{hex}",
                f"_history/.{500:020d}.json.gz.{hex}", f"_shadow-{hex}/_delta_log/{7:020d}.json"]
        fine = ["README.md", "notes/a.parquet", "_delta_log/mine.txt", "_other/x", "0-0.parquet", f"{2 * hex}-1.parquet", ".0-0.parquet.00ff"]
        for name in left[1:] + fine:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text("x")
        before, right = files(path), everything(pool)
        assert pool.repair(dry_run=False) == DaskPool(path, grace="1h").repair() == [] and files(path) == before
        past = time.time() - 4000
        for name in left + fine: os.utime(path / name, (past, past))
        os.utime(path / f"_shadow-{hex}", (past, past))
        said = DaskPool(path, grace="1h").repair()
        assert len(said) == len(left) and set(files(path)) == set(before)
        assert DaskPool(path, grace="1h").repair(dry_run=False) and set(before) - set(files(path)) == set(left)
        assert not (path / f"_shadow-{hex}").exists() and everything(pool) == right and pool.repair(dry_run=False) == []


# --- odd cases ---

class TestOddCases:
    def test_threads(self, path):
        "Many threads store, extend and delete through one handle and through their own"
        pool, start = DaskPool(path), time.monotonic()
        def work(i):
            p = pool if i % 2 else DaskPool(path)
            for n in range(6): p.extend([drive(3, hour=n, vehicle=f"{i}"), drive(4, hour=n, vehicle=f"{i}", driver="twin")])
            p.delete(drive(hour=3, vehicle=f"{i}").id)
            p.store(drive(9, hour=4, vehicle=f"{i}", seed=1), overwrite=True)
        at_once(*(lambda i=i: work(i) for i in range(6)), *(lambda: [facts_of(pool) for _ in range(4)] for _ in range(2)))
        assert pool.version == 6 * 8 and len(pool) == 6 * 11 and pool.verify() == [] and litter(path) == []
        for e in pool:
            new = e.start == drive(hour=4).start and e.who["driver"] == "anna"
            steps, hour = (9 if new else 3 + (e.who["driver"] == "twin")), (e.start - drive().start) / 3.6e9
            assert facts(e) == facts(drive(steps, hour=hour, **e.who, seed=int(new)))
        assert others_see(path) == lengths(pool) == lengths(DaskPool(path))

    def test_the_same_from_many(self, path):
        "Many store the same episode in a new folder at once: one commit"
        at_once(*(lambda: DaskPool(path).store(drive()) for _ in range(8)))
        pool = DaskPool(path)
        assert facts_of(pool) == facts_of([drive()]) and pool.version == 1 and litter(path) == [] and others_see(path) == {drive().id: 6}

    def test_opening_while_it_is_made(self, path, monkeypatch):
        "Somebody makes the pool between any two looks at the folder: it is no stranger's"
        looks = 0
        for name, k in itertools.product(("exists", "is_dir", "is_file", "iterdir"), range(3)):
            place, calls, real = path / f"{name}{k}", 0, getattr(Path, name)
            place.mkdir(parents=True)
            def look(self, *args, **kwargs):
                nonlocal calls, looks
                found = real(self, *args, **kwargs)
                if str(place) not in str(self): return found
                calls += 1
                if calls == k + 1:
                    looks += 1
                    found = iter(list(found)) if name == "iterdir" else found
                    (place / "_delta_log").mkdir()
                return found
            with monkeypatch.context() as m:
                m.setattr(Path, name, look)
                assert len(DaskPool(place)) == 0
        assert looks

    def test_two_schemas_at_once(self, path):
        "Of two first writers with different schemas one wins, the other is told, and the table is the winner's"
        schema = replace(drive().schema, identity={"vehicle": "integer", "driver": "text"})
        other = replace(drive(hour=1), schema=schema, who={"vehicle": 7, "driver": "bo"})
        for n in range(8):
            place, results = path / str(n), []
            def store(e):
                try: results.append(DaskPool(place).store(e))
                except DataIOError as error: results.append(type(error).__name__)
            at_once(*(lambda e=e: store(e) for e in (drive(), other)))
            pool = DaskPool(place)
            assert len(pool) == 1 and set(results) == {next(iter(pool)).id, "SchemaError"}, results
            columns = {f.name: str(f.type) for f in pa.schema(deltalake.DeltaTable(str(place)).schema().to_arrow())}
            assert (columns["vehicle"] == "int64") == (pool.schema == schema) and pool.schema in (schema, drive().schema)
            assert others_see(place) == lengths(pool) and litter(place) == []

    def test_deleting_while_reading(self, path):
        "An iterator goes on at its version while its episodes are deleted, overwritten, compacted and given up behind its back"
        pool = DaskPool(path)
        for h in range(8): pool.store(drive(hour=h))
        running, seen = iter(DaskPool(path, "r")), []
        for h, e in enumerate(running):
            seen.append(e)
            pool.delete(e.id)
            if h == 2: pool.compact()
            if h == 4: pool.store(drive(3, hour=7, seed=5), overwrite=True)
        assert facts_of(seen) == facts_of(drive(hour=h) for h in range(8)) and len(pool) == 0 == len(others_see(path))

    @pytest.mark.parametrize("value", ["", " ", "\0", "a\0b", "\uffff", "😀", "e\u0301", "\n", '"\\', "%2F/..", "x" * 20_000, "NULL", "\u202e"])
    def test_odd_text(self, path, value):
        "Whatever an identity says, others find its rows by it"
        polars, pool = pytest.importorskip("polars"), DaskPool(path)
        pool.store(drive(4, driver=value)); pool.store(drive(hour=1)); pool.extend([drive(3, hour=2, driver=value), drive(hour=3, driver="zz")])
        for p in (pool, DaskPool(path)):
            assert facts_of(p.find(PoolQuery(driver=value))) == facts_of([drive(4, driver=value), drive(3, hour=2, driver=value)])
        assert polars.scan_delta(str(path)).filter(polars.col("driver") == value).collect().height == 7
        assert pool.verify() == [] and pool.compact() == 3 and len(DaskPool(path)) == 4

    def test_huge_numbers(self, path):
        "Integers beyond what a float can tell apart, in identities and step numbers"
        polars, pool = pytest.importorskip("polars"), DaskPool(path)
        schema = replace(drive().schema, identity={"vehicle": "integer", "driver": "text"})
        numbers = [-2**63, -2**53 - 1, -1, 0, 2**53, 2**53 + 1, 2**63 - 1]
        for n in numbers: pool.store(replace(drive(step=max(-2**62, min(n, 2**62))), schema=schema, who={"vehicle": n, "driver": ""}))
        pool.compact(); pool.store(replace(drive(2, hour=1), schema=schema, who={"vehicle": 2**53, "driver": ""}))
        for n in numbers:
            found = list(DaskPool(path).find(PoolQuery(vehicle=n)))
            assert {e.who["vehicle"] for e in found} == {n}
            assert polars.scan_delta(str(path)).filter(polars.col("vehicle") == n).collect().height == sum(map(len, found)) == 6 + 2 * (n == 2**53)
        assert pool.verify() == []

    @pytest.mark.parametrize("year", [1, 999, 1000, 1582, 1899, 1969, 1970, 2262, 9999])
    def test_far_times(self, path, year):
        "Before 1970 and far away, with all microseconds: others that skip files by their statistics skip none that counts"
        pool, stamp = DaskPool(path), pd.Timestamp(year=year, month=12, day=31, hour=23, microsecond=1, tz="UTC").as_unit("us")
        shift = int(stamp.asm8.view("i8")) - drive().start
        e = replace(drive(), times=drive().times + shift, start=drive().start + shift)
        pool.store(e); pool.store(drive(hour=1))
        assert facts_of(DaskPool(path).find(e.id)) == facts_of([e]) and pool.verify() == []
        low, high = (pa.scalar(int(t), pa.timestamp("us", "UTC")) for t in (e.times[0], e.times[-1]))
        field = pa.dataset.field("timestamp")
        rows = deltalake.DeltaTable(str(path)).to_pyarrow_dataset().to_table(filter=(field >= low) & (field <= high))
        assert rows.num_rows == 6 and set(rows["episode"].to_pylist()) == {e.id}
        stats = json.loads(next(a["add"]["stats"] for a in actions(path, 1) if "add" in a))
        assert stats["minValues"]["timestamp"] == f"{year:04d}-12-31T23:00:00.000001Z"

    def test_beyond_the_calendar(self, path):
        "A time stamp after the year 9999 is stored, or refused by an error of this package"
        shift = 10**18 // 2
        e = replace(drive(), times=drive().times + shift, start=drive().start + shift)
        try: assert facts(DaskPool(path)[DaskPool(path).store(e)]) == facts(e) and others_see(path) == {e.id: 6}
        except DataIOError: assert not path.exists()

    def test_a_fork_after_deltalake(self, path):
        "A forked child stores across a checkpoint, also where its parent used `deltalake` before"
        code = f"""
import os, sys, warnings
from data_io_nbdev.storage.pool import delta
from data_io_nbdev.storage.pool.dask import DaskPool
from data_io_nbdev.testing import drive
delta._INTERVAL = 3
pool = DaskPool({str(path)!r})
for h in range(4): pool.store(drive(hour=h))
delta.deltalake.DeltaTable({str(path)!r}).count()
if os.fork() == 0:
    for h in range(4, 8): pool.store(drive(hour=h))
    os._exit(0 if len(pool) == 8 else 1)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
for h in range(8, 10): pool.store(drive(hour=h))
assert len(pool) == 10
"""
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert facts_of(DaskPool(path)) == facts_of(drive(hour=h) for h in range(10)) and others_see(path) == lengths(DaskPool(path))

    def test_a_moved_folder(self, path, tmp_path):
        "A lake is its folder: copied or moved it is the same lake"
        right = everything(history(path))
        path.rename(tmp_path / "moved here")
        shutil.copytree(tmp_path / "moved here", tmp_path / "köpie ü #?")
        for there in ("moved here", "köpie ü #?"):
            pool = DaskPool(tmp_path / there)
            assert everything(pool) == right and pool.verify() == []
            pool.store(drive(hour=30)); pool.compact()
            assert others_see(tmp_path / there) == lengths(pool)

    def test_numbers_that_sum_to_nothing(self, path):
        "Rewards of nan and infinity do not keep other readers out of the log"
        e = drive(3)
        reward = np.array([np.inf, -np.inf, np.nan], "float32")
        pool = DaskPool(path)
        pool.store(replace(e, blocks={**e.blocks, "reward": reward}))
        assert math.isnan(pool.catalogue()["return"].iloc[0]) and others_see(path) == {e.id: 3} and DaskPool(path).verify() == []
