"Bad input raises its typed error, which is also the builtin that one would expect, and changes nothing."
import builtins
import hashlib
import zipfile

import numpy as np
import pytest

import data_io_nbdev.errors as errors
from data_io_nbdev import Episode, Episodes, MemoryBuffer, MemoryPool, PoolQuery, Record, Schema, open_pool
from data_io_nbdev.storage.pool.memory import FORMAT
from data_io_nbdev.testing import BAD_FRAMES, drive, facts_of, rows, steps_of


class World:
    "A saved pool, a buffer over it, and a look at everything that a refused call might have changed"

    def __init__(self, folder):
        self.folder, self.path = folder, folder / "pool.npz"
        with MemoryPool(self.path) as pool: pool.extend([drive(hour=1), drive(hour=2)])
        self.pool, self.reader = MemoryPool(self.path), MemoryPool(self.path, "r")
        self.buffer = MemoryBuffer(pool=self.pool, batch_size=8, seed=1)
        self.buffer.load()
        self.empty = MemoryBuffer(batch_size=8)
        self.closed = MemoryPool()
        self.closed.close()
        data = self.path.read_bytes()
        (folder / "cut.npz").write_bytes(data[:len(data) // 2])
        (folder / "flipped.npz").write_bytes(data[:len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1:])
        (folder / "text.npz").write_text("this is no pool")
        (folder / "nothing.npz").write_bytes(b"")
        with zipfile.ZipFile(self.path) as old, zipfile.ZipFile(folder / "newer.npz", "w") as new:
            for name in old.namelist(): new.writestr(name, old.read(name).replace(b'"format": %d' % FORMAT, b'"format": %d' % (FORMAT + 1), 1))

    def look(self):
        "Everything there is, in values that compare"
        files = {p.name: hashlib.sha1(p.read_bytes()).hexdigest() for p in self.folder.iterdir()}
        pools = [(p.version, facts_of(p)) for p in (self.pool, self.reader, self.empty.pool)]
        return files, pools, rows(self.buffer), len(self.empty), self.closed.closed


@pytest.fixture
def world(tmp_path): return World(tmp_path)


def refused(world, call, error, builtin, match=None):
    "The call raises its typed error and changes nothing"
    assert issubclass(getattr(errors, error), getattr(builtins, builtin)) and issubclass(getattr(errors, error), errors.DataIOError)
    before = world.look()
    with pytest.raises(getattr(errors, error), match=match) as caught: call(world)
    assert len(str(caught.value)) > 12, "a message says what was expected, what came and what to do"
    assert world.look() == before


# An empty pool takes its schema from what comes, so these frames are right there.
FOUNDING = {"missing field", "field nobody knows", "wrong shape", "wrong dtype", "wrong unit", "number in identity", "missing level",
            "unknown level"}
DOORS = [(wrong, door) for wrong in BAD_FRAMES for door in ("pool.store", "pool.extend", "buffer.store", "empty.store")
         if not (door == "empty.store" and wrong in FOUNDING)]


@pytest.mark.parametrize("wrong, door", DOORS)
def test_frames(world, wrong, door):
    "Every way in which a frame can be wrong, at every door through which it can come"
    bad = BAD_FRAMES[wrong](drive(hour=9).to_frame())
    owner, method = door.split(".")
    refused(world, lambda w: getattr(getattr(w, owner), method)([drive(hour=8), bad] if method == "extend" else bad), "SchemaError", "ValueError")


@pytest.mark.parametrize("wrong", ["naive timestamp", "digits below a microsecond", "missing action", "unsorted", "duplicate timestamps",
                                   "ragged vector", "two episodes", "empty frame", "NaN in identity"])
def test_frames_before_any_pool(wrong):
    "A frame that is no episode is refused where it becomes one"
    with pytest.raises(errors.SchemaError): Episode.from_frame(BAD_FRAMES[wrong](drive().to_frame()))


ONE = dict(state=[0.0] * 3, action=[0.0] * 2, reward=0.0, nstate=[0.0] * 3, timestamp="2026-01-01T09:00Z", episodestart="2026-01-01T09:00Z",
           who={"vehicle": "VB7", "driver": "anna"})


@pytest.mark.parametrize("change", [
    {"timestamp": "2026-01-01T09:00"}, {"episodestart": "2026-01-01T09:00"}, {"timestamp": "2026-01-01T09:00:00.0000001Z"}, {"timestamp": None},
    {"state": None}, {"state": [0.0] * 4}, {"action": 0.0}, {"reward": "much"}, {"state": np.zeros(3)}, {"nstate": [[0.0], [0.0, 1.0]]},
    {"who": {"vehicle": "VB7"}}, {"who": {"vehicle": "VB7", "driver": float("nan")}}, {"who": {"vehicle": "VB7", "driver": 7}},
    {"who": {"vehicle": "VB7", "driver": None}}, {"info": [1.0]}], ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items())[:50])
def test_records(world, change):
    "The same for single steps"
    refused(world, lambda w: w.pool.store(Record(**{**ONE, **change})), "SchemaError", "ValueError")


STEP = dict(state=np.zeros((2, 3), "f4"), action=np.zeros((2, 2), "f4"), reward=np.zeros(2, "f4"), nstate=np.zeros((2, 3), "f4"),
            timestamp=["2026-01-01T09:00Z", "2026-01-01T09:01Z"], who={"vehicle": "VB7", "driver": "anna"})


@pytest.mark.parametrize("change", [
    {"timestamp": ["2026-01-01T09:00Z"]}, {"timestamp": ["2026-01-01T09:01Z", "2026-01-01T09:00Z"]}, {"timestamp": []}, {"timestamp": 7},
    {"timestamp": ["2026-01-01T09:00Z", "2026-01-01T09:01"]}, {"timestamp": ["2026-01-01T09:00Z", "yesterday"]}, {"reward": np.zeros((2, 2), "f4")},
    {"reward": None}, {"state": np.zeros((3, 3), "f4")}, {"nstate": np.zeros((2, 3))}, {"state": np.zeros((2, 3), object)},
    {"state": np.array([["a"] * 3] * 2)}, {"state": {"velocity": np.zeros((2, 2), "f4")}}, {"terminated": [1, 0]}, {"terminated": [True, True]},
    {"truncated": [True]}, {"who": {"driver": "anna", "vehicle": "\ud800"}}, {"who": {"driver": "anna", "vehicle": True}}],
    ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items())[:50].replace("\ud800", "?"))
def test_arrays(world, change):
    "And for arrays"
    refused(world, lambda w: w.pool.store(Episode.from_arrays(**{**STEP, **change}, schema=w.pool.schema)), "SchemaError", "ValueError")


CALLS = [
    ("a batch from an empty buffer", lambda w: w.empty.sample(), "NotEnoughData", "LookupError"),
    ("episodes from an empty buffer", lambda w: MemoryBuffer(batch_size=2, sampler=Episodes()).sample(), "NotEnoughData", "LookupError"),
    ("a batch of no rows", lambda w: w.buffer.sample(0), "QueryError", "ValueError"),
    ("start reversed", lambda w: w.pool.count(PoolQuery(start=("2026-01-02T00:00Z", "2026-01-01T00:00Z"))), "QueryError", "ValueError"),
    ("time reversed", lambda w: w.pool.count(PoolQuery(time=("2026-01-02T00:00Z", "2026-01-01T00:00Z"))), "QueryError", "ValueError"),
    ("length reversed", lambda w: w.pool.count(PoolQuery(length=(5, 1))), "QueryError", "ValueError"),
    ("naive range", lambda w: w.pool.count(PoolQuery(start=("2026-01-01", None))), "QueryError", "ValueError"),
    ("half a range", lambda w: w.pool.count(PoolQuery(start="2026-01-01T00:00Z")), "QueryError", "ValueError"),
    ("unknown level", lambda w: list(w.pool.find(PoolQuery(truck="VB7"))), "QueryError", "ValueError"),
    ("unknown level, counted", lambda w: w.pool.count(PoolQuery(truck="VB7")), "QueryError", "ValueError"),
    ("unknown level, deleted", lambda w: w.pool.delete(PoolQuery(truck="VB7")), "QueryError", "ValueError"),
    ("unknown level, in a buffer", lambda w: MemoryBuffer(pool=w.pool, batch_size=2, query=PoolQuery(truck="VB7")).load(), "QueryError", "ValueError"),
    ("level of another kind", lambda w: w.pool.count(PoolQuery(vehicle=7)), "QueryError", "ValueError"),
    ("what is no query", lambda w: list(w.pool.find(7)), "QueryError", "ValueError"),
    ("what is no id", lambda w: w.pool["VB7"], "EpisodeNotFound", "KeyError"),
    ("id nobody has", lambda w: list(w.pool.find("0" * 32)), "EpisodeNotFound", "KeyError"),
    ("ids of which one is missing", lambda w: w.pool.delete([drive(hour=1).id, "0" * 32]), "EpisodeNotFound", "KeyError"),
    ("a version to come", lambda w: w.pool.snapshot(9), "SnapshotNotFound", "LookupError"),
    ("a version before the first", lambda w: w.pool.snapshot(-1), "SnapshotNotFound", "LookupError"),
    ("a closed pool, stored to", lambda w: w.closed.store(drive()), "ClosedError", "RuntimeError"),
    ("a closed pool, extended by nothing", lambda w: w.closed.extend([]), "ClosedError", "RuntimeError"),
    ("a closed pool, asked", lambda w: w.closed.count(), "ClosedError", "RuntimeError"),
    ("a closed pool, listed", lambda w: list(w.closed), "ClosedError", "RuntimeError"),
    ("a read-only pool", lambda w: w.reader.store(drive()), "ReadOnly", "PermissionError"),
    ("a read-only pool, extended", lambda w: w.reader.extend([drive()]), "ReadOnly", "PermissionError"),
    ("a read-only pool, deleted from", lambda w: w.reader.delete(drive(hour=1).id), "ReadOnly", "PermissionError"),
    ("a read-only pool, saved", lambda w: w.reader.save(), "ReadOnly", "PermissionError"),
    ("a snapshot", lambda w: w.pool.snapshot().store(drive()), "ReadOnly", "PermissionError"),
    ("a buffer over a read-only pool", lambda w: MemoryBuffer(pool=w.reader.snapshot(), batch_size=2).store(drive()), "ReadOnly", "PermissionError"),
    ("a mistyped path", lambda w: open_pool(w.folder / "pol.npz", mode="r"), "PoolNotFound", "FileNotFoundError"),
    ("a mistyped path without a suffix", lambda w: open_pool(w.folder / "experience", mode="r"), "PoolNotFound", "FileNotFoundError"),
    ("a mistyped path, by class", lambda w: MemoryPool(w.folder / "pol.npz", "r"), "PoolNotFound", "FileNotFoundError"),
    ("a mistyped folder", lambda w: open_pool(w.folder / "nowhere" / "pool.npz", mode="r"), "PoolNotFound", "FileNotFoundError"),
    ("a mode nobody knows", lambda w: MemoryPool(w.path, "w"), "QueryError", "ValueError"),
    ("a scheme nobody knows", lambda w: open_pool("carrier-pigeon://loft"), "QueryError", "ValueError"),
    *[(f"a {name} save, mode {mode}", lambda w, name=name, mode=mode: open_pool(w.folder / f"{name}.npz", mode=mode), "CorruptData", "OSError")
      for name in ("cut", "flipped", "text", "nothing", "newer") for mode in "ra"],
    ("delete of everything by accident", lambda w: w.pool.delete(), "QueryError", "ValueError"),
    ("delete of everything by an empty query", lambda w: w.pool.delete(PoolQuery()), "QueryError", "ValueError"),
    ("delete of everything by None", lambda w: w.pool.delete(None), "QueryError", "ValueError"),
    ("delete by a range of steps", lambda w: w.pool.delete(PoolQuery(time=("2026-01-01T00:00Z", None))), "QueryError", "ValueError"),
    ("copy of a range of steps", lambda w: w.pool.copy_to(MemoryPool(), PoolQuery(time=("2026-01-01T00:00Z", None))), "QueryError", "ValueError"),
    ("other steps under a stored id", lambda w: w.pool.store(drive(hour=1, seed=1)), "EpisodeConflict", "ValueError"),
    ("a part after a gap", lambda w: w.pool.store(drive(9, hour=1)[7:]), "EpisodeConflict", "ValueError"),
    ("a schema of a newer format", lambda w: Schema.from_json('{"format": 2}'), "SchemaError", "ValueError"),
    ("a query of a newer format", lambda w: PoolQuery.from_json('{"format": 2}'), "QueryError", "ValueError"),
]


@pytest.mark.parametrize("what, call, error, builtin", CALLS, ids=[c[0] for c in CALLS])
def test_calls(world, what, call, error, builtin):
    "Everything else"
    refused(world, call, error, builtin)


def test_messages(world):
    "A message names what was expected and what came"
    for wrong, words in {"wrong unit": "km/h", "wrong dtype": "float64", "wrong shape": "velocity", "missing action": "action",
                         "naive timestamp": "tz_localize", "digits below a microsecond": "floor", "two episodes": "groupby"}.items():
        refused(world, lambda w: w.pool.store(BAD_FRAMES[wrong](drive(hour=9).to_frame())), "SchemaError", "ValueError", match=words)
    refused(world, lambda w: open_pool(w.folder / "newer.npz", mode="r"), "CorruptData", "OSError", match="newer")
    refused(world, lambda w: w.pool.count(PoolQuery(truck="VB7")), "QueryError", "ValueError", match="vehicle")


def test_nothing_was_wrong_with_the_rest(world):
    "The same world takes what is right"
    world.buffer.store(drive(hour=9))
    assert list(rows(world.buffer).values()) == steps_of(*(drive(hour=h) for h in (1, 2, 9)))
