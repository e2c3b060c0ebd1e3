"""The file of a `MemoryPool`: replaced in one step or not at all, and never read wrongly.

The stored samples in tests/data were each written once by `python tests/test_memory_file.py`, with the version that introduced their
format, and hold the same, or from format 3 on the same with units. They are never written again: what was saved then must open for ever."""
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data_io_nbdev import MemoryPool, open_pool
from data_io_nbdev.errors import CorruptData, DataIOError, PoolUnavailable, ReadOnly
from data_io_nbdev.storage.pool.memory import FORMAT
from data_io_nbdev.testing import drive, facts_of, python

DATA = Path(__file__).parent / "data"
def sample(format): return DATA / f"pool-format-{format}.npz"
def held(format): return json.loads((DATA / f"pool-format-{1 if format < 3 else 3}.json").read_text(encoding="utf-8"))


@pytest.fixture
def path(tmp_path): return tmp_path / "pool.npz"


def fill(pool):
    "A little of everything: parts, an overwritten episode, a deleted one, three zones of history"
    pool.extend([drive(6, hour=1)[:2], drive(3, hour=2, end="terminated")])
    pool.store(drive(6, hour=1, end="truncated"))
    pool.store(drive(4, hour=2, seed=1), overwrite=True)
    pool.store(drive(5, hour=3, driver="Ünïcödé 温", linked=False))
    pool.delete(drive(hour=1).id)
    pool.store(drive(2, hour=0, step=7, driver=""))
    return pool


def measured(pool):
    "The same, and fields are given units"
    fill(pool).set_units({f.name: "m" for f in pool.schema.fields if f.unit is None and f.role == "state"})
    pool.store(drive(hour=9))
    return pool


def everything(pool):
    "All versions of a pool, in values that JSON knows"
    versions = [facts_of(pool.snapshot(v)) for v in range(pool.version + 1)]
    return json.loads(json.dumps(dict(version=pool.version, schema=pool.schema and pool.schema.to_json(), versions=versions)))


def others(path): return sorted(p.name for p in path.parent.iterdir() if p != path)


class TestSaving:
    "A save happens or does not"

    def test_open_again(self, path):
        "Every version comes back, by class, by URL and by pickle; closing saves what changed"
        with fill(MemoryPool(path)) as pool: right = everything(pool)
        for again in (MemoryPool(path), MemoryPool(str(path), "r"), open_pool(path), open_pool(str(path), mode="r")):
            assert everything(again) == everything(pickle.loads(pickle.dumps(again))) == right and again.verify() == []
        assert others(path) == []

    def test_closing_an_unchanged_pool_writes_nothing(self, path):
        "Looking is not changing"
        fill(MemoryPool(path)).close()
        before = path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()
        with MemoryPool(path) as pool: list(pool), pool.catalogue(), pool.verify()
        assert (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()) == before

    def test_elsewhere(self, path, tmp_path, monkeypatch):
        "`save(path)` writes a copy; a relative path is where it was when the pool was made"
        monkeypatch.chdir(tmp_path)
        pool = fill(MemoryPool("here.npz"))
        (tmp_path / "sub").mkdir(); monkeypatch.chdir(tmp_path / "sub")
        pool.save(path); pool.close()
        assert everything(MemoryPool(path, "r")) == everything(MemoryPool(tmp_path / "here.npz", "r"))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["here.npz", "pool.npz", "sub"]

    def test_nowhere(self):
        "A pool without a path needs one to be saved"
        with pytest.raises(DataIOError): fill(MemoryPool()).save()

    def test_reading_does_not_write(self, path):
        "A reader cannot save over what it read"
        fill(MemoryPool(path)).close()
        before = path.read_bytes()
        with MemoryPool(path, "r") as reader:
            with pytest.raises(ReadOnly): reader.save()
        assert path.read_bytes() == before

    @pytest.mark.parametrize("step", ["fsync", "replace"])
    def test_a_failing_step(self, path, monkeypatch, step):
        "A save that fails leaves the old file and no other, says so, and can be repeated"
        fill(MemoryPool(path)).close()
        before, pool = path.read_bytes(), MemoryPool(path)
        pool.store(drive(hour=9))
        def fail(*args, **kwargs): raise OSError(28, "No space left on device")
        with monkeypatch.context() as m:
            m.setattr(os, step, fail)
            with pytest.raises(PoolUnavailable): pool.save()
        assert path.read_bytes() == before and others(path) == []
        right = everything(pool)
        pool.save()
        assert everything(MemoryPool(path, "r")) == right

    def test_order_of_steps(self, path, monkeypatch):
        "The new file is on the disk before it takes the old one's name, and its name before `save` returns"
        calls = []
        def spy(name):
            real = getattr(os, name)
            def called(*args, **kwargs): calls.append(name); return real(*args, **kwargs)
            monkeypatch.setattr(os, name, called)
        spy("fsync"); spy("replace")
        fill(MemoryPool(path)).save()
        assert calls == ["fsync", "replace", "fsync"]

    def test_a_full_disk(self, path):
        "So does one that runs out of room at any point of the file"
        fill(MemoryPool(path)).close()
        before, pool = path.read_bytes(), MemoryPool(path)
        pool.store(drive(90, hour=9))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            for room in (1, 100, 1000, 4000, len(before)):
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
                try:
                    with pytest.raises(PoolUnavailable): pool.save()
                finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
                assert path.read_bytes() == before and others(path) == []
        finally: signal.signal(signal.SIGXFSZ, old)
        pool.close()
        assert len(MemoryPool(path, "r")) == 4

    def test_kill(self, path):
        "`kill -9` at any moment leaves the old file or the new one, never less than was acknowledged"
        context, rng = multiprocessing.get_context("fork"), random.Random(0)
        with MemoryPool(path) as pool: pool.store(drive(60, hour=0))
        known = 1
        for _ in range(20):
            acknowledged = context.Value("i", known)
            def work():
                pool = MemoryPool(path)
                for h in range(len(pool), 10**6):
                    pool.store(drive(60, hour=h)); pool.save()
                    acknowledged.value = h + 1
            child = context.Process(target=work)
            child.start()
            least = known + rng.randrange(4)
            while acknowledged.value < least:
                assert child.is_alive(), "the child ended by itself"
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.01))
            os.kill(child.pid, signal.SIGKILL); child.join()
            pool = MemoryPool(path, "r")
            assert acknowledged.value <= len(pool) <= acknowledged.value + 1 and pool.verify() == []
            assert facts_of(pool) == facts_of(drive(60, hour=h) for h in range(len(pool)))
            known = len(pool)
        assert known > 20


class TestTwoHandles:
    "Two pools on one file don't lose each other's episodes in silence"

    @pytest.mark.parametrize("existed", [True, False])
    @pytest.mark.parametrize("how", ["save", "close"])
    def test_both_save(self, path, existed, how):
        "The second is told, keeps what it has, and can put it elsewhere"
        if existed: fill(MemoryPool(path)).close()
        one, two = MemoryPool(path), MemoryPool(path)
        one.store(drive(hour=8)); two.store(drive(hour=9))
        one.save()
        before = path.read_bytes()
        with pytest.raises(DataIOError): getattr(two, how)()
        assert path.read_bytes() == before and drive(hour=8).id in [e.id for e in MemoryPool(path, "r")]
        two.load()
        assert two[drive(hour=9).id] == drive(hour=9)
        two.copy_to(one); one.save()
        assert {drive(hour=8).id, drive(hour=9).id} <= {e.id for e in MemoryPool(path, "r")}

    def test_another_pool_is_not_replaced(self, path):
        "Nor is a file with other experience, or one that is no pool at all"
        fill(MemoryPool(path)).close()
        notes = path.with_name("notes.txt")
        notes.write_text("do not lose this")
        for there in (path, notes):
            before = there.read_bytes()
            with pytest.raises(DataIOError): fill(MemoryPool()).save(there)
            assert there.read_bytes() == before

    def test_the_file_vanished(self, path):
        "If somebody removed the file, saving makes it again"
        pool = fill(MemoryPool(path)); pool.save(); path.unlink()
        pool.store(drive(hour=9)); pool.save()
        assert everything(MemoryPool(path, "r")) == everything(pool)

    def test_within_one_process_only(self):
        "A pool without a file is the same one after pickling here, and is not found elsewhere"
        pool = fill(MemoryPool())
        again = pickle.loads(pickle.dumps(pool))
        assert everything(again) == everything(pool)
        again.store(drive(hour=9))
        assert facts_of(pool) == facts_of(again)
        text = python("import pickle, sys\ntext = pickle.load(sys.stdin.buffer)\ntry: pickle.loads(text)\n"
                      "except FileNotFoundError as e: print(type(e).__name__)", pickle.dumps(pool))
        assert text.strip() == "PoolNotFound"


def replaced(members, name, old, new):
    "Change a text in a member"
    assert old in members[name]
    members[name] = members[name].replace(old, new, 1)


def said(members, name, value):
    "Change what the first part says of itself"
    rows = np.load(io.BytesIO(members["parts.npy"]), allow_pickle=False)
    rows[name][0] = value
    head = len(members["parts.npy"]) - rows.nbytes
    members["parts.npy"] = members["parts.npy"][:head] + rows.tobytes()


class TestDamage:
    "What was damaged is refused or does not matter; nothing is ever read wrongly"

    def unharmed(self, path, right):
        "Whether the file opens, and then with nothing changed"
        try: return everything(MemoryPool(path, "r")) == right or pytest.fail("damaged data was read as if it were sound")
        except CorruptData: return False

    def test_every_truncation(self, path):
        "A file that is cut anywhere is refused"
        right, data = everything(fill(MemoryPool(path))), None
        fill(MemoryPool(path)).close()
        data = path.read_bytes()
        for length in sorted({0, 1, 2, len(data) - 1, len(data) - 2, *random.Random(0).sample(range(len(data)), 60)}):
            path.write_bytes(data[:length])
            assert not self.unharmed(path, right), f"cut after {length} of {len(data)} bytes"

    def test_single_bytes(self, path):
        "So is one with a byte that changed, unless all data are equal"
        fill(MemoryPool(path)).close()
        data, right, rng, seen = path.read_bytes(), everything(MemoryPool(path, "r")), random.Random(1), 0
        for at in sorted(rng.sample(range(len(data)), min(len(data), 700))):
            path.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1:])
            seen += not self.unharmed(path, right)
        assert seen > 400

    def test_appended_and_doubled(self, path):
        "Rubbish at the end, two files in one, zeros where data was"
        fill(MemoryPool(path)).close()
        data, right = path.read_bytes(), everything(MemoryPool(path, "r"))
        for other in (data + b"x", data + data, data[:len(data) // 2] + bytes(len(data) // 2), bytes(len(data)), data + bytes(100)):
            path.write_bytes(other)
            self.unharmed(path, right)

    def rewrite(self, path, change):
        "The saved pool with its members changed, and right checksums of the zip"
        with zipfile.ZipFile(path) as old: members = {n: old.read(n) for n in old.namelist()}
        change(members)
        with zipfile.ZipFile(path, "w") as new:
            for name, text in members.items(): new.writestr(name, text)

    @pytest.mark.parametrize("format", [1, FORMAT])
    @pytest.mark.parametrize("change", [
        lambda m: m.pop("log.json"), lambda m: m.pop("times.npy"), lambda m: m.pop("state.npy"), lambda m: m.update({"log.json": b"{}"}),
        lambda m: m.update({"log.json": b"[1"}), lambda m: m.update({"times.npy": m["times.npy"][:-8]}),
        lambda m: m.update({"state.npy": m["nstate.npy"]}), lambda m: m.update({"reward.npy": m["action.npy"]}),
        lambda m: replaced(m, "log.json", b'"length": 2', b'"length": 3') if "parts.npy" not in m else said(m, "length", 3),
        lambda m: replaced(m, "log.json", b'"anna"', b'"emma"'),
        lambda m: m.pop("parts.npy", None) or m.pop("action.npy"), lambda m: said(m, "who", 1) if "parts.npy" in m else m.update({"parts.npy": m["times.npy"]}),
        lambda m: m.update({"parts.npy": m.get("parts.npy", m["times.npy"])[:-100]}),
    ], ids=["no log", "no times", "no states", "empty log", "half a log", "short times", "states exchanged", "another shape", "a length", "an identity",
            "no parts", "another code", "short parts"])
    def test_members(self, path, change, format):
        "Damage that the zip's checksums don't show: opening notices it, or `verify`"
        shutil.copy(sample(format), path)
        self.rewrite(path, change)
        try: pool = MemoryPool(path, "r")
        except CorruptData: return
        assert pool.verify() != [], "nothing was noticed"

    def test_pickles_are_not_opened(self, path):
        "A member that is a pickle is refused without being run"
        fill(MemoryPool(path)).close()
        class Evil:
            def __reduce__(self): return (os.mkdir, (str(path.parent / "owned"),))
        def change(members):
            f = io.BytesIO(); np.save(f, np.array([Evil()], object), allow_pickle=True)
            members["reward.npy"] = f.getvalue()
        self.rewrite(path, change)
        with pytest.raises(CorruptData): everything(MemoryPool(path, "r"))
        assert others(path) == []

    def test_newer_format(self, path):
        "A format of the future is refused by name, and left alone"
        fill(MemoryPool(path)).close()
        self.rewrite(path, lambda m: m.update({"log.json": m["log.json"].replace(b'"format": %d' % FORMAT, b'"format": %d' % (FORMAT + 1), 1)}))
        before = path.read_bytes()
        for mode in "ra":
            with pytest.raises(CorruptData, match=f"format {FORMAT + 1}"): MemoryPool(path, mode)
        with pytest.raises(DataIOError): fill(MemoryPool()).save(path)
        assert path.read_bytes() == before

    @pytest.mark.parametrize("make", [
        lambda p: p.write_bytes(b""), lambda p: p.write_text("a,b\n1,2\n"), lambda p: p.write_bytes(random.Random(0).randbytes(5000)),
        lambda p: zipfile.ZipFile(p, "w").close(), lambda p: np.savez(p, state=np.zeros(3)), lambda p: p.mkdir()],
        ids=["empty", "text", "noise", "empty zip", "arrays", "folder"])
    def test_not_a_pool(self, path, make):
        "What is no pool is refused, and stays what it is"
        make(path)
        before = path.read_bytes() if path.is_file() else sorted(path.iterdir())
        for mode in "ra":
            with pytest.raises((CorruptData, PoolUnavailable)): MemoryPool(path, mode)
        assert (path.read_bytes() if path.is_file() else sorted(path.iterdir())) == before


class TestFormat:
    "The format is a promise"

    def test_what_is_in_it(self, path):
        "A zip of a JSON log and plain arrays, stored without compression: numpy and zipfile are all it takes to read it"
        with MemoryPool(path) as pool: pool.extend([drive(3, hour=2), drive(2, hour=1)]); pool.store(drive(5, hour=1))
        with zipfile.ZipFile(path) as file:
            assert {i.compress_type for i in file.infolist()} == {zipfile.ZIP_STORED}
            assert set(file.namelist()) == {"log.json", *(f"{n}.npy" for n in ("times", "parts", *drive().schema.roles))}
            log = json.loads(file.read("log.json"))
        assert (log["format"], log["last"], log["parts"], [c["number"] for c in log["commits"]]) == (FORMAT, 2, 3, [1, 2])
        arrays = np.load(path, allow_pickle=False)
        parts = arrays["parts"]
        assert parts["length"].tolist() == [3, 2, 3] and parts["version"].tolist() == [1, 1, 2] and parts["offset"].tolist() == [0, 0, 2]
        assert [id.tobytes().hex() for id in parts["id"]] == [drive(hour=h).id for h in (2, 1, 1)]
        assert [tuple(log["who"][i][code] for i, code in enumerate(who)) for who in parts["who"].tolist()] == [tuple(drive().who.values())] * 3
        assert parts["digest"][0].tobytes().hex() == drive(3, hour=2).digest and parts["reward"][0] == drive(3, hour=2).reward.sum(dtype="f8")
        both = (drive(3, hour=2), drive(5, hour=1))
        np.testing.assert_array_equal(arrays["times"], np.concatenate([e.times for e in both]))
        np.testing.assert_array_equal(arrays["state"], np.concatenate([e.state for e in both]))

    @pytest.mark.parametrize("format", range(1, FORMAT + 1))
    def test_stored_sample(self, tmp_path, format):
        "A pool that was saved when its format was new opens as it did then, and takes new episodes"
        expected = held(format)
        assert everything(MemoryPool(sample(format), "r")) == expected
        assert MemoryPool(sample(format), "r").verify() == []
        shutil.copy(sample(format), tmp_path / "copy.npz")
        with MemoryPool(tmp_path / "copy.npz") as pool: pool.store(drive(hour=8))
        assert everything(MemoryPool(tmp_path / "copy.npz", "r").snapshot(expected["version"])) == expected


if __name__ == "__main__":
    with MemoryPool(sample(FORMAT)) as made: measured(made)
    assert everything(made.load() or made) == held(FORMAT)
