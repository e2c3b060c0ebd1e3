"""The cache of mapped rows, and loading from a lake, under attack: damage, kill -9, failing and full disks, crowds, forks, Ctrl-C.

Whatever is done, batches are those of a `MemoryBuffer`, and nothing is gone that somebody else put into the cache's folder."""
import errno
import fcntl
import gc
import io
import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("distributed")
from data_io_nbdev import DaskBuffer, DaskPool, MemoryBuffer, PoolQuery
from data_io_nbdev.errors import PoolUnavailable
from data_io_nbdev.storage.buffer import dask as buffers
from data_io_nbdev.storage.buffer import mapped, rows
from data_io_nbdev.storage.pool import dask as lakes
from data_io_nbdev.testing import batch_facts, drive
from test_lake_faults import absent, flipped

pytestmark = [pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, kill -9 and tmpfs"),
              pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")]
FILES = ("rows.bin", "runs.npy", "times.npy", "entry.json")
N = 8  # episodes


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    "Eight drives, some of which are not linked, four of each length"
    pool = DaskPool(tmp_path_factory.mktemp("lake") / "lake")
    pool.extend([drive(20 + h // 4, hour=h, linked=h % 3 > 0) for h in range(N)])
    return pool


@pytest.fixture
def cache(tmp_path): return tmp_path / "cache"


@pytest.fixture
def small(monkeypatch):
    "So small that a few episodes are many blocks, and many portions"
    for name, n in (("_BLOCK", 512), ("_PIECE", 128)): monkeypatch.setattr(mapped, name, n)
    monkeypatch.setattr(lakes, "_WINDOW", 1000)


def only(*hours): return PoolQuery(ids=[drive(hour=h).id for h in hours]) if hours else PoolQuery()
def make(pool, cache, *hours, **options):
    "A buffer of everything, or of some hours, whose rows are on disk"
    return DaskBuffer(**{**dict(pool=pool, batch_size=999, seed=3, resident="mapped", cache=cache, progress=False, query=only(*hours)), **options})


RIGHT = {}

def batches(buffer): return [batch_facts(buffer.sample()) for _ in range(2)]  # so large that every row is in them
def right(pool, *hours):
    "What a buffer in memory draws"
    if hours not in RIGHT: RIGHT[hours] = batches(MemoryBuffer(pool=pool, batch_size=999, seed=3, query=only(*hours)))
    return RIGHT[hours]


def content(folder):
    "Everything in a folder, links as links"
    def look(path):
        if path.is_symlink(): return os.readlink(path)
        return {p.name: look(p) for p in path.iterdir()} if path.is_dir() else (path.read_bytes(), path.stat().st_mtime_ns)
    return {p.name: look(p) for p in folder.iterdir()}


def of_theirs(cache, rng):
    "Put things of the user's own into a cache; gives a function that sees whether they are untouched"
    cache.mkdir(exist_ok=True, parents=True)
    ours = set(os.listdir(cache))
    name = lambda: rng.bytes(20).hex()
    outside = cache.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "rows.bin").write_bytes(b"theirs")
    folders = [cache / n for n in ("photos", name(), name(), f".{name()[:16]}", name(), ".hidden", f".{name()[:16]}")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
        (folder / "1.jpg").write_bytes(rng.bytes(5_000))
    for n in FILES[:3]: (folders[1] / n).write_bytes(rng.bytes(999))
    (folders[1] / "1.jpg").unlink()
    for n in FILES: (folders[2] / n).write_bytes(b"{}")
    (folders[3] / "site.json").write_text(json.dumps({"package": "theirs", "site": folders[3].name}))
    (folders[4] / "entry.json").write_text(json.dumps({"package": "data_io_nbdev", "format": 2, "key": folders[4].name}))
    os.mkfifo(folders[5] / "entry.json"); os.mkfifo(folders[6] / "site.json")
    (cache / name()).symlink_to(outside); (cache / f".{name()[:16]}").symlink_to(outside); (cache / name()).write_bytes(b"a file")
    for folder in folders: os.utime(folder, (1, 1))  # older than anything else
    pipes = [folders[5] / "entry.json", folders[6] / "site.json"]
    def look():
        for pipe in pipes: pipe.unlink()
        try: return {n: v for n, v in content(cache).items() if n in names}, content(outside)
        finally:
            for pipe in pipes: os.mkfifo(pipe)
    names = set(os.listdir(cache)) - ours
    before = look()
    def untouched():
        after = look()
        assert after == before, [n for a, b in zip(before, after) for n in a if a[n] != b.get(n)]
        return True
    return untouched


def hidden(cache, theirs=()):
    "The sites and what is left of entries, as far as there is something in them"
    folders = [p for p in cache.glob(".*") if p.name not in theirs and p.is_dir() and not p.is_symlink()]
    return [p for p in folders if any(f.stat().st_size for f in p.iterdir())]


def entries(cache): return [p for p in cache.iterdir() if (p / "rows.bin").exists() and (p / "entry.json").exists() and not p.is_symlink()]
def taken(cache): return sum(f.stat().st_blocks * 512 for e in [*entries(cache), *hidden(cache)] for f in e.iterdir())


@contextmanager
def forked(job):
    "A child at work; then it must have done its job, within a minute"
    ours, theirs = os.pipe()
    if not (pid := os.fork()):
        try:
            job()
            os._exit(0)
        except BaseException: os.write(theirs, traceback.format_exc()[-4000:].encode())
        finally: os._exit(1)
    os.close(theirs)
    try:
        yield pid
        if not select.select([ours], [], [], 60)[0]: raise AssertionError("a child hangs")
        said = os.read(ours, 4000).decode()
    finally:
        os.close(ours)
        if sys.exc_info()[0]: os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    assert status == 0, f"status {status}: {said}"


def in_child(job):
    with forked(job): pass


def die_building(pool, cache, *hours):
    "For a child: be killed when an entry is nearly made"
    mapped._seal = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    make(pool, cache, *hours).load()


def same(buffer, expected): assert batches(buffer) == expected, "other batches than from memory"


# --- damage ---

def entry_of(pool, cache, *hours):
    "An entry, made or found"
    same(make(pool, cache, *hours), right(pool, *hours))
    before = set(entries(cache))
    buffer = make(pool, cache, *hours); buffer.load()
    assert set(entries(cache)) == before
    return cache / buffer._view.home.key


def goes_on(pool, cache, entry, *hours):
    "Loads what is right, and leaves a sound entry"
    same(make(pool, cache, *hours), right(pool, *hours))
    again = make(pool, cache, *hours)
    same(again, right(pool, *hours))
    assert again._view.home.recalled and {*os.listdir(entry)} == {*FILES}


def test_flipped_bit(pool, cache, small, attack):
    def once(rng):
        entry = entry_of(pool, cache, 0, 1, 2)
        path = entry / FILES[rng.integers(4)]
        data = path.read_bytes()
        path.write_bytes(flipped(data, int(rng.integers(8 * len(data)))))
        goes_on(pool, cache, entry, 0, 1, 2)
    attack("cache: a flipped bit in an entry", 60, once)


def test_files_of_another_size(pool, cache, small, attack):
    "Cut, longer, missing, empty, a pipe, a folder, a link; other bytes"
    def once(rng):
        entry, kind = entry_of(pool, cache, 0, 1, 2), rng.integers(8)
        path = entry / FILES[rng.integers(4)]
        data = path.read_bytes()
        if kind == 0: os.truncate(path, int(rng.integers(len(data))))
        if kind == 1: path.write_bytes(data + rng.bytes(int(rng.integers(1, 1000))))
        if kind == 2: path.unlink()
        if kind == 3: path.write_bytes(b"")
        if kind == 4: path.write_bytes(rng.bytes(len(data)))
        if kind == 5: path.unlink(); os.mkfifo(path)
        if kind == 6: path.unlink(); path.symlink_to(cache / "nowhere")
        if kind == 7: os.truncate(path, 1 << 40)
        goes_on(pool, cache, entry, 0, 1, 2)
    attack("cache: cut, longer, missing, empty files", 90, once)


def test_swapped(pool, cache, small, attack):
    "Blocks that changed places, files of an entry of the same shape, and that entry as a whole"
    def once(rng):
        entry, other = entry_of(pool, cache, 0, 1), entry_of(pool, cache, 2, 3)
        kind, name = rng.integers(3), FILES[rng.integers(3)]
        if kind == 0:
            data = bytearray((entry / "rows.bin").read_bytes())
            size = int(rng.choice([24, 128, 512]))
            a, b = (int(i) * size for i in rng.choice(len(data) // size, 2, replace=False))
            data[a:a + size], data[b:b + size] = data[b:b + size], data[a:a + size]
            (entry / "rows.bin").write_bytes(data)
        if kind == 1: shutil.copy(other / name, entry / name)
        if kind == 2:
            for n in FILES[:3]: shutil.copy(other / n, entry / n)
        goes_on(pool, cache, entry, 0, 1)
    attack("cache: swapped blocks and files", 80, once)


def test_under_another_key(pool, cache, attack):
    "A renamed entry is nobody's: it is not believed, and not removed; loading goes on without an entry, and says so"
    def once(rng):
        entry, other = entry_of(pool, cache, 0, 1), entry_of(pool, cache, 2, 3)
        shutil.rmtree(entry); other.rename(entry)
        before = content(entry)
        with pytest.warns(UserWarning, match="could not be kept"): same(make(pool, cache, 0, 1), right(pool, 0, 1))
        same(make(pool, cache, 4, cache_limit=1), right(pool, 4))
        assert content(entry) == before and not hidden(cache)
        shutil.rmtree(cache)
    attack("cache: an entry under another key", 10, once)


def declares(array, n):
    "The header of an array of so many"
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(shape=(n,), fortran_order=False, descr=np.lib.format.dtype_to_descr(array.dtype)))
    return header.getvalue()


def test_lies(pool, cache, attack):
    "Tables whose checksums are right, but which make no sense, and sizes that nobody has room for"
    def once(rng):
        entry = entry_of(pool, cache, 0, 1, 2)
        about, name = mapped._read_mark(entry), ("runs.npy", "times.npy")[rng.integers(2)]
        array, kind = np.load(entry / name), rng.integers(5)
        if kind == 0 and name == "runs.npy":
            array[("serial", "slot", "length")[rng.integers(3)]][rng.integers(len(array))] += rng.choice([-5, 3, 1 << 40, 1 << 62])
        elif kind == 0 and name == "times.npy": array = array[:-1]
        elif kind == 1: array = np.concatenate([array, array[-1:]])
        elif kind == 2: array = array[:0]
        buffer = io.BytesIO()
        np.save(buffer, array)
        data = buffer.getvalue()
        if kind == 3: data = declares(array, 1 << 60) + data[-array.nbytes:]
        if kind == 4: about["slots"] = int(rng.choice([0, 1 << 60, about["slots"] + 1]))
        (entry / name).write_bytes(data)
        with open(entry / name, "rb") as f: about["files"][name] = [len(data), len(data), mapped._sums(f, mapped._place(entry.name, name), len(data))]
        (entry / "entry.json").write_bytes(mapped._mark(about))
        same(make(pool, cache, 0, 1, 2), right(pool, 0, 1, 2))
        shutil.rmtree(cache)
    attack("cache: sound checksums, and no sense", 40, once)


# --- what is not ours ---

def old(entry, name):
    "An entry as format 1 had it"
    (entry / "entry.json").unlink()
    return entry.rename(entry.parent / name)


def test_nothing_of_theirs_goes(pool, cache, small, attack):
    "Evictions, damage and dead sites all around: what the user has there stays; old entries of ours go when their turn comes"
    def once(rng):
        gone = old(entry_of(pool, cache, 5), rng.bytes(20).hex())
        os.utime(gone, (2, 2))
        untouched = of_theirs(cache, rng)
        for h in rng.permutation(5):
            same(make(pool, cache, h, cache_limit=int(rng.integers(1, 60_000))), right(pool, h))
            if rng.integers(2) and (mine := [e for e in entries(cache) if e.stat().st_mtime > 9]): (mine[0] / FILES[rng.integers(3)]).write_bytes(b"")
        same(make(pool, cache, 6, cache_limit=1), right(pool, 6))
        assert untouched() and not gone.exists() and len(entries(cache)) == 2  # the last one, and theirs with our names in it
        shutil.rmtree(cache)
    attack("cache: evictions in a folder of the user's", 20, once)


def test_their_notes_in_our_entry(pool, cache, attack):
    def once(rng):
        entry = entry_of(pool, cache, 0)
        (entry / "notes.txt").write_text("theirs")
        if rng.integers(2): (entry / "rows.bin").write_bytes(b"")
        else: make(pool, cache, 1, cache_limit=1).load()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            for _ in range(2): same(make(pool, cache, 0), right(pool, 0))
        assert (entry / "notes.txt").read_text() == "theirs"
        shutil.rmtree(cache)
    attack("cache: notes in an entry", 10, once)


# --- kill -9, crowds ---

def test_killed(pool, cache, small, attack):
    "A writer is killed at any moment: nothing wrong is ever drawn, and what it left is gone, and within the limit, after the next build"
    sizes = []
    for h in range(N): make(pool, cache, h).load(); sizes.append(taken(cache) - sum(sizes))
    limit = 3 * max(sizes)
    began = time.monotonic()
    make(pool, cache.parent / "other", 0, 1, 2, 3).load()
    took = time.monotonic() - began
    def once(rng):
        untouched = of_theirs(cache, rng)
        theirs = {*os.listdir(cache)}
        def write():
            signal.alarm(30)
            for h in range(N): make(pool, cache, h, (h + 1) % N, cache_limit=limit).load()
            os._exit(0)
        if not (pid := os.fork()):
            try: write()
            finally: os._exit(1)
        time.sleep(rng.uniform(0, 2 * took))
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        h = int(rng.integers(N))
        same(make(pool, cache, h, (h + 1) % N, cache_limit=limit), right(pool, h, (h + 1) % N))
        same(make(pool, cache, h, (h + 3) % N, cache_limit=limit), right(pool, h, (h + 3) % N))
        assert not hidden(cache, theirs), "a dead writer's site is still there"
        ours = [e for e in entries(cache) if e.name not in theirs]
        assert ours and sum(f.stat().st_blocks * 512 for e in ours for f in e.iterdir()) <= limit and untouched()
        shutil.rmtree(cache)
    attack("cache: kill -9 while it is built", 16, once)


def test_living_writer(pool, cache, small, attack):
    "A site whose writer is at work stays and counts, whoever needs room; also when children were forked from it, which don't keep its lock"
    def once(rng):
        at_work, go = os.pipe(), os.pipe()
        def write():
            really = mapped._seal
            def wait(*args):
                if not (child := os.fork()): time.sleep(100)
                os.write(at_work[1], child.to_bytes(4, "little")); os.read(go[0], 1)
                return really(*args)
            mapped._seal = wait
            same(make(pool, cache, 0, 1), right(pool, 0, 1))
        with forked(write) as pid:
            child = int.from_bytes(os.read(at_work[0], 4), "little")
            try:
                (site,) = hidden(cache)
                for h in range(2, 5): same(make(pool, cache, h, cache_limit=1), right(pool, h))
                assert hidden(cache) == [site] and len(entries(cache)) == 1
                if killed := rng.integers(2): os.kill(pid, signal.SIGKILL)
                else: os.write(go[1], b".")
                if killed:
                    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
                    make(pool, cache, 5, cache_limit=1).load()
                    assert not hidden(cache), "the child keeps its parent's lock"
            finally: os.kill(child, signal.SIGKILL)
            if killed: raise Done
    class Done(Exception): "The writer is gone, as it should be"
    def swallow(rng):
        try: once(rng)
        except Done: pass
        shutil.rmtree(cache)
    attack("cache: a writer at work, and its children", 20, swallow)


def test_no_locks(pool, cache, small, attack, monkeypatch):
    "Where files cannot be locked, or the writer was on another machine, a site stays for a week"
    def once(rng):
        with pytest.raises(AssertionError): in_child(lambda: die_building(pool, cache, 0))
        (site,) = hidden(cache)
        with monkeypatch.context() as m:
            if rng.integers(2): m.setattr(fcntl, "flock", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
            else: m.setattr(mapped, "_host", lambda: "elsewhere")
            make(pool, cache, 1, cache_limit=1).load()
            assert hidden(cache) == [site]
            for file in site.iterdir(): os.utime(file, (9, 9))
            make(pool, cache, 2, cache_limit=1).load()
        assert not hidden(cache)
        shutil.rmtree(cache)
    attack("cache: sites where locks say nothing", 10, once)


def test_crowd(pool, cache, small, attack):
    "Processes that load with a tiny limit at once: no error, the same batches, and little is left"
    def once(rng):
        untouched, limit = of_theirs(cache, rng), int(rng.integers(1, 30_000))
        theirs = {*os.listdir(cache)}
        def load(seed):
            signal.alarm(60)
            warnings.simplefilter("error")
            mine = np.random.default_rng(seed)
            for h in mine.integers(N, size=8): same(make(pool, cache, h, cache_limit=limit), right(pool, h))
        for h in range(N): right(pool, h)
        first = int(rng.integers(1 << 30))
        with forked(lambda: load(first)), forked(lambda: load(first + 1)), forked(lambda: load(first + 2)), forked(lambda: load(first + 3)): pass
        assert not hidden(cache, theirs) and untouched()
        assert len([e for e in entries(cache) if e.name not in theirs]) <= 1 or taken(cache) <= limit + 200_000
        shutil.rmtree(cache)
    attack("cache: a crowd with a tiny limit", 8, once)


# --- a disk that fails ---

class Disk:
    "Counts what is asked of the disk in the module, and lets one of these calls fail"
    PLACES = [*((os, n) for n in ("mkdir", "rename", "replace", "unlink", "rmdir", "scandir", "listdir", "utime", "posix_fallocate", "fsync",
                                  "fstat", "stat", "lstat", "pread", "open")), (shutil, "disk_usage"), (fcntl, "flock"), (np, "save")]

    def __init__(self, monkeypatch):
        self.calls, self.fail, self.kind = [], None, None
        for place, name in self.PLACES: monkeypatch.setattr(place, name, self.wrap(name, getattr(place, name)))
        monkeypatch.setattr(mapped, "open", self.wrap("open", self.opened), raising=False)
        monkeypatch.setattr(mapped.tempfile, "TemporaryFile", self.wrap("open", mapped.tempfile.TemporaryFile))
        class Asked(np.memmap):
            def __new__(cls, *args, really=np.memmap, **kw):
                self.ask("mmap")
                return really(*args, **kw)
        monkeypatch.setattr(np, "memmap", Asked)

    def wrap(self, name, really):
        def call(*args, **kw):
            self.ask(name)
            return really(*args, **kw)
        return call

    def opened(self, path, mode="rb", buffering=-1, opener=None):
        "A file whose every call counts"
        disk = self
        class Raw(io.FileIO):
            def write(self, data): disk.ask("write"); return super().write(data)
            def truncate(self, *args): disk.ask("truncate"); return super().truncate(*args)
            def readinto(self, data): disk.ask("read"); return super().readinto(data)
        raw = Raw(path, mode.replace("b", ""), opener=opener)
        if not buffering: return raw
        return (io.BufferedRandom if "+" in mode else io.BufferedWriter if "x" in mode else io.BufferedReader)(raw)

    def ask(self, name):
        frame = sys._getframe(2)
        for _ in range(8):
            if frame is None or frame.f_code.co_filename == mapped.__file__: break
            frame = frame.f_back
        else: return
        if frame is None: return
        self.calls.append(name)
        if len(self.calls) - 1 == self.fail: raise OSError(self.kind, os.strerror(self.kind))


STRIDE, SHIFT = dict(build=2, recall=1, damaged=2, grow=1), dict(build=0, recall=0, damaged=1, grow=0)  # the two that build share their calls


@pytest.mark.parametrize("scene", ["build", "recall", "damaged", "grow"])
def test_failing_calls(pool, cache, attack, monkeypatch, scene):
    "Each call to the disk fails once: rows are right or the disk is named, what was there stays, and the next one finds all as it should be"
    for h in (4, 5): make(pool, cache, h).load()
    with pytest.raises(AssertionError): in_child(lambda: die_building(pool, cache, 6))
    assert hidden(cache)
    if scene != "build": entry = entry_of(pool, cache, 0, 1)
    if scene == "damaged": (entry / "times.npy").write_bytes(b"")
    model = cache.rename(cache.parent / "model")
    disk, numbers = Disk(monkeypatch), itertools.count()
    def prepare(rng):
        disk.fail = None
        shutil.rmtree(cache, ignore_errors=True)
        shutil.copytree(model, cache)
        ours = {*os.listdir(cache)}
        untouched = of_theirs(cache, rng)
        disk.calls.clear()
        return untouched, {*os.listdir(cache)} - ours
    def act():
        hours = (0, 1)
        options = dict(states="twice", capacity=30) if scene == "grow" else dict(cache_limit=20_000)
        buffer = make(pool, cache, *hours, **options)
        if scene == "grow":
            buffer.load()
            return
        same(buffer, right(pool, *hours))
    prepare(np.random.default_rng(0)); act()
    total = len(disk.calls)
    assert total > (2 if scene == "grow" else 20)
    def once(rng):
        untouched, theirs = prepare(rng)
        disk.kind = int(rng.choice([errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EMFILE]))
        disk.fail = (next(numbers) * STRIDE[scene] + SHIFT[scene]) % total
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            try: act()
            except PoolUnavailable as e: assert "cache= names another folder" in str(e)
        assert len(disk.calls) > disk.fail
        disk.fail = None
        gc.collect()
        act()
        make(pool, cache, 7, cache_limit=60_000).load()
        assert not hidden(cache, theirs) and untouched()
    attack(f"cache: a failing call, {scene}", total if scene in ("recall", "grow") else total // 5, once)


@pytest.fixture(scope="module")
def tiny():
    "A disk of 2 MB"
    place = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)], capture_output=True).returncode:
        place.rmdir()
        absent("a small tmpfs cannot be mounted (mount -t tmpfs needs root)")
    try: yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()


def fill(place, free):
    "Leave so many bytes"
    there = shutil.disk_usage(place).free
    with open(place / "filled", "wb") as f: os.posix_fallocate(f.fileno(), 0, max(1, there - free))


def test_full_disk(tmp_path, tiny, attack, monkeypatch):
    "On a full disk, `load` and `refresh` say so or do it; nothing is ended by SIGBUS; with room again, all goes on"
    monkeypatch.setattr(rows, "_RESERVE", 1)  # else 64 MB are more than there is
    def once(rng):
        tmp = tmp_path / rng.bytes(4).hex()
        lake = DaskPool(tmp / "lake")
        lake.extend([drive(199, hour=h) for h in range(40)])
        states, holes, early = ("once", "twice")[rng.integers(2)], rng.integers(3) == 0, rng.integers(3) == 0
        free = int(rng.integers(0, 400_000)) if early or rng.integers(2) else 0
        def work():
            if early: fill(tiny, free)
            buffer = make(lake, tiny / "cache", states=states)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                try: buffer.load()
                except PoolUnavailable as e:
                    assert "cache= names another folder" in str(e) and early
                    (tiny / "filled").unlink()
                    buffer.load()
            if holes and not early:
                for entry in entries(tiny / "cache"):
                    about = mapped._read_mark(entry)
                    os.truncate(entry / "rows.bin", about["files"]["rows.bin"][1]); os.truncate(entry / "rows.bin", about["files"]["rows.bin"][0])
                buffer = make(lake, tiny / "cache", states=states); buffer.load()
            plain = MemoryBuffer(pool=lake, batch_size=999, seed=3, states=states)
            same(buffer, batches(plain))
            fill(tiny, free)
            lake.extend([drive(int(rng.integers(1, 199)), hour=50 + h) for h in range(10)])
            plain.refresh()
            try: buffer.refresh()
            except PoolUnavailable as e:
                assert "cache= names another folder" in str(e)
                (tiny / "filled").unlink()
                buffer.refresh()
            same(buffer, batches(plain))
        in_child(work)
        for path in tiny.iterdir(): shutil.rmtree(path) if path.is_dir() else path.unlink()
    attack("cache: a full disk", 25, once)


# --- forks ---

def test_forked_children_load(pool, cache, small, attack):
    "The main thread has loaded; its children load, and theirs, in memory and mapped"
    for resident in ("memory", "mapped"): make(pool, cache, resident=resident).load()
    def once(rng):
        kind = {} if (hours := tuple(map(int, rng.choice(N, rng.integers(1, 4), replace=False)))) and rng.integers(2) else dict(resident="memory")
        expected = right(pool, *hours)
        def load(depth):
            signal.alarm(40)
            same(make(pool, cache, *hours, **kind), expected)
            if depth: in_child(lambda: load(depth - 1))
        in_child(lambda: load(int(rng.integers(3))))
        same(make(pool, cache, *hours, **kind), expected)
    attack("forks: children load", 20, once)


def test_forked_while_threads_load(pool, cache, small, attack):
    "A fork at any moment while threads load and refresh: the child loads, draws what its buffers had, and removes nothing of its parent's"
    hours = [(h, (h + 1) % N) for h in range(N)]
    for h in hours: right(pool, *h)
    stop, wrong = threading.Event(), []
    def work(n):
        for i in itertools.count(n):
            if stop.is_set(): return
            try: same(make(pool, cache, *hours[i % N], cache_limit=1, resident=("memory", "mapped")[i % 2]), right(pool, *hours[i % N]))
            except BaseException: wrong.append(traceback.format_exc())
    held = make(pool, cache, 0, 1); same(held, right(pool, 0, 1))
    held.load_state_dict(state := held.state_dict())
    expected = batches(held)
    threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in (0, 3)]
    for t in threads: t.start()
    def once(rng):
        time.sleep(rng.uniform(0, 0.02))
        def load():
            signal.alarm(50)
            held.load_state_dict(state)
            same(held, expected)
            same(make(pool, cache, 2, 3, resident=("memory", "mapped")[rng.integers(2)]), right(pool, 2, 3))
            gc.collect()
        in_child(load)
        assert not wrong, wrong[0]
    try: attack("forks: while threads load", 12, once)
    finally:
        stop.set()
        for t in threads: t.join(60)


def test_forked_rings(tmp_path, attack):
    "A ring on disk, and a room that grew, belong to one process: neither what a child takes in nor what its parent does shows in the other"
    def once(rng):
        tmp = tmp_path / rng.bytes(4).hex()
        lake = DaskPool(tmp / "lake")
        lake.extend([drive(20, hour=h) for h in range(3)])
        options = dict(capacity=int(rng.integers(20, 60))) if rng.integers(2) else {}
        options |= dict(states=("once", "twice")[rng.integers(2)])
        mine, plain = make(lake, tmp / "cache", **options), MemoryBuffer(pool=lake, batch_size=999, seed=3, **options)
        same(mine, batches(plain))
        lake.extend([drive(60, hour=4)])
        mine.refresh(); plain.refresh()
        same(mine, batches(plain))
        lake.extend([drive(9, hour=5 + h) for h in range(4)])
        late, done = os.pipe(), os.pipe()
        def child():
            signal.alarm(40)
            for buffer in (mine, plain): vars(buffer).update(_generator=np.random.default_rng(0), _at=None, _astray=False)  # a child's streams are its own
            if early := rng.integers(2): mine.refresh(); plain.refresh()
            os.write(done[1], b".")
            os.read(late[0], 1)
            same(mine, batches(plain))
            if not early: mine.refresh(); plain.refresh(); same(mine, batches(plain))
        with forked(child):
            os.close(done[1])  # so that a child which ends early is not waited for
            os.read(done[0], 1)
            same(mine, batches(plain))  # the child may have taken in what is new
            lake.extend([drive(11, hour=9 + h) for h in range(4)])
            mine.refresh(); plain.refresh()
            same(mine, batches(plain))
            os.write(late[1], b".")
        same(mine, batches(plain))
        for fd in (*late, done[0]): os.close(fd)
    attack("forks: rings and rooms that grew", 20, once)


def test_forked_in_the_middle_of_a_refresh(tmp_path, attack):
    "A fork while a thread changes a ring on disk: the child goes on drawing what was there"
    lake = DaskPool(tmp_path / "lake")
    lake.extend([drive(20, hour=h) for h in range(3)])
    ring = make(lake, tmp_path / "cache", capacity=50); ring.load()
    hours = itertools.count(4)
    def once(rng):
        lake.extend([drive(7, hour=next(hours)) for h in range(5)])
        find = {e.id: e for e in lake}
        refresh = threading.Thread(target=ring.refresh)
        def draw():
            signal.alarm(40)
            for _ in range(3):
                batch = ring.sample()
                for i in range(0, 999, 7):
                    e = find[batch.episode[i]]
                    assert (batch.state[i] == e.state[int(batch.step[i])]).all() and batch.reward[i] == e.reward[int(batch.step[i])]
                time.sleep(0.002)
        refresh.start()
        time.sleep(rng.uniform(0, 0.01))
        in_child(draw)
        refresh.join()
    attack("forks: while a ring on disk changes", 30, once)


def test_data_loader(pool, cache, attack):
    "`multiprocessing` as a data loader uses it: workers that are forked again for each epoch"
    import multiprocessing
    context = multiprocessing.get_context("fork")
    make(pool, cache).load()
    def worker(out, hours): out.put(batches(make(pool, cache, *hours, resident="memory")) == right(pool, *hours))
    def once(rng):
        out, workers = context.SimpleQueue(), []
        for h in range(3):
            right(pool, h, h + 1)
            workers.append(context.Process(target=worker, args=(out, (h, h + 1))))
        for w in workers: w.start()
        for w in workers: w.join(40)
        alive = [w for w in workers if w.is_alive()]
        for w in alive: w.kill()
        assert not alive, "a worker hangs"
        assert [out.get() for _ in workers] == [True] * 3
    attack("forks: workers of a data loader", 10, once)


def test_forked_from_a_cluster(pool, cache, attack):
    "A child does not wait for its parent's cluster: it reads by itself, or says that there is none"
    import distributed
    with distributed.Client(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None):
        far = make(pool, cache, resident="cluster", prefetch=1); far.load()
        expected = right(pool)
        def once(rng):
            def load():
                signal.alarm(40)
                with pytest.raises(PoolUnavailable, match="was forked"): far.sample()
                with pytest.raises(PoolUnavailable, match="was forked"): far.load()
                same(make(pool, cache, resident="memory"), expected)
                os._exit(0)
            in_child(load)
        attack("forks: from a process with a cluster", 8, once)


# --- Ctrl-C ---

def end_of(before):
    "Threads that were not there before end by themselves"
    until = time.monotonic() + 5
    while set(threading.enumerate()) - before:
        assert time.monotonic() < until, "a thread goes on"
        time.sleep(0.001)


def test_interrupted(attack):
    "Ctrl-C while portions are read: it comes through, nothing enters any more, and no thread is left"
    main = threading.main_thread().ident
    def once(rng):
        n, threads, entered, begun = int(rng.integers(1, 60)), int(rng.integers(1, 6)), [], []
        at, before = int(rng.integers(n)), set(threading.enumerate())
        def read(i):
            begun.append(i)
            if i == at: signal.pthread_kill(main, signal.SIGINT)
            return i
        with pytest.raises(KeyboardInterrupt):
            buffers.in_parallel(range(n), read, lambda i, found: entered.append(found), threads, progress=bool(rng.integers(2)))
            time.sleep(5)  # the signal was for the very last one, and is about to be seen
        seen = len(entered)
        end_of(before)
        assert len(entered) == seen, "something entered"
        assert entered == list(range(len(entered))) and len(begun) <= len(entered) + 2 * threads + 1
    attack("Ctrl-C: while portions are read", 60, once)


def test_interrupted_load(pool, cache, small, attack):
    "Ctrl-C while a buffer loads: no site stays, what was loaded stays, and the next load does all"
    main, really = threading.main_thread().ident, lakes.read_parts
    before = set(threading.enumerate())
    def once(rng):
        buffer, left = make(pool, cache), [int(rng.integers(8))]
        if rng.integers(2): shutil.rmtree(cache, ignore_errors=True); buffer.load(); same(buffer, right(pool))
        shutil.rmtree(cache, ignore_errors=True)
        held = buffer._view
        def read(*args):
            left[0] -= 1
            if not left[0]: signal.pthread_kill(main, signal.SIGINT)
            return really(*args)
        lakes.read_parts = read
        caught = None
        try: buffer.load()
        except KeyboardInterrupt as e: caught = e  # whoever keeps it keeps every frame
        finally: lakes.read_parts = really
        if caught: assert not hidden(cache) and buffer._view is held, "something stays"
        end_of(before)
        del caught
        same(make(pool, cache), right(pool))
    attack("Ctrl-C: while a buffer loads", 30, once)
