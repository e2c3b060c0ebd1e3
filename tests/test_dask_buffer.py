"""`DaskBuffer` keeps every promise of a buffer wherever its rows are: in memory, on disk, on a cluster of two processes."""
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_io_nbdev import DaskPool, Episode, Episodes, MemoryBuffer, MemoryPool, PoolQuery
from data_io_nbdev.errors import CorruptData, PoolUnavailable, QueryError
from data_io_nbdev.storage.buffer.dask import DaskBuffer
from data_io_nbdev.storage.pool import parquet
from data_io_nbdev.storage.pool.delta import LocalLake
from data_io_nbdev.testing import (BatchesOfBuffers, BufferContract, LakeHarness, Refreshing, RowsOfQueries, RowsOfSelections, SameDraws, at_once, draws,
                                   drive, python, rows, steps_of, through_json, trace)

distributed = pytest.importorskip("distributed")


@dataclass(kw_only=True, eq=False)
class Mapped(DaskBuffer):
    resident: str = "mapped"


@dataclass(kw_only=True, eq=False)
class OnCluster(DaskBuffer):
    resident: str = "cluster"
    prefetch: int = 3


class MappedHarness(LakeHarness): buffer = Mapped


class ClusterHarness(LakeHarness): buffer = OnCluster


@pytest.fixture(scope="module")
def cluster():
    "Two worker processes, on this machine only"
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
        yield cluster


@pytest.fixture
def client(cluster):
    with distributed.Client(cluster) as client: yield client


class TestMapped(BufferContract):
    @pytest.fixture
    def harness(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # other processes unpickle `Mapped`
        (tmp_path / "place").mkdir()
        return MappedHarness(tmp_path / "place")


class TestReadByWorkers(BatchesOfBuffers, RowsOfQueries, RowsOfSelections, Refreshing, SameDraws):
    @pytest.fixture
    def harness(self, tmp_path, client): return LakeHarness(tmp_path)


class TestOnCluster(BufferContract):
    @pytest.fixture
    def harness(self, tmp_path, client): return ClusterHarness(tmp_path)

    test_interpreter_exit = None  # a client belongs to its process, so another one has none


@pytest.fixture
def pool(tmp_path):
    "Six drives, two of which are not linked"
    pool = DaskPool(tmp_path / "lake")
    pool.extend([drive(20, hour=h, linked=h % 3 > 0) for h in range(5)])
    pool.store(drive(30, hour=9)[:10])
    return pool


@pytest.mark.parametrize("resident", ["memory", "mapped"])
@pytest.mark.parametrize("seed", range(4))
def test_files_in_any_order(tmp_path, monkeypatch, resident, seed):
    "Rows are in the order of time, whatever order their files have, and a file is opened once; growing, deleted, compacted and unlinked episodes too"
    monkeypatch.setattr(parquet, "_SHARED", 1500)  # some row groups a file
    rng, lake = np.random.default_rng(seed), DaskPool(tmp_path / "lake")
    drives = [drive(int(rng.integers(2, 9)), hour=h, linked=bool(rng.integers(4))) for h in range(40)]
    uploads = [e[:1 + len(e) // 2] if n % 3 == 0 else e for n, e in enumerate(drives)]
    for some in np.array_split(rng.permutation(40), 6): lake.extend([uploads[i] for i in some])
    lake.extend([drives[i] for i in rng.permutation(40)[:25]])  # the rest of some of them
    lake.delete([drives[i].id for i in rng.permutation(40)[:5]])
    if seed % 2: lake.compact()
    opened, whole = [], LocalLake.open
    monkeypatch.setattr(LocalLake, "open", lambda self, file, *rest: opened.append(file.path) or whole(self, file, *rest))
    mine = DaskBuffer(pool=lake, batch_size=64, seed=1, resident=resident, cache=tmp_path / "cache", states="twice", progress=False)
    mine.load()
    assert len(opened) == len(set(opened)) == len({part.where[0] for parts in lake._select(PoolQuery(), lake.version) for part in parts})
    theirs = MemoryBuffer(pool=lake, batch_size=64, seed=1, states="twice")
    theirs.load()
    monkeypatch.undo()
    assert rows(mine) == rows(theirs)  # and each is what the pool has
    assert [(r.episode, r.serial, r.slot, r.step, r.times.tolist()) for r in mine._view.rows.ledger.runs] == \
           [(r.episode, r.serial, r.slot, r.step, r.times.tolist()) for r in theirs._view.rows.ledger.runs]
    assert mine.state_dict()["trail"] == theirs.state_dict()["trail"] and draws(mine, 3) == draws(theirs, 3)


@pytest.fixture
def cache(tmp_path): return tmp_path / "cache"


def make(pool, **options): return DaskBuffer(**{"pool": pool, "batch_size": 16, "seed": 3, **options})


@pytest.fixture
def opened(monkeypatch):
    "The paths of the files that were opened"
    paths, really = [], LocalLake.open
    monkeypatch.setattr(LocalLake, "open", lambda lake, file, *whole: paths.append(file.path) or really(lake, file, *whole))
    return paths


FEW = {"state": ["s7", "s3"], "action": ["a1"]}


def wide(hour: int, fields: int = 60, steps: int = 500) -> Episode:
    "A drive with many signals"
    rng, t = np.random.default_rng(hour), pd.date_range(f"2026-01-01 {hour:02}:00", periods=steps, freq="10ms", tz="UTC")
    state, action = rng.normal(size=(steps + 1, fields)).astype("float32"), rng.normal(size=(steps, 4)).astype("float32")
    named = lambda block, letter: {f"{letter}{i}": column for i, column in enumerate(block.T)}
    return Episode.from_arrays(state=named(state[:-1], "s"), nstate=named(state[1:], "s"), action=named(action, "a"), reward=action[:, 0], timestamp=t)


@pytest.fixture
def wide_pool(tmp_path):
    "Three drives in one file, and one in another"
    pool = DaskPool(tmp_path / "wide")
    pool.extend(map(wide, range(3))); pool.store(wide(3))
    return pool


@pytest.fixture
def fetched(monkeypatch):
    "How many bytes were read from each file of a lake, in the order in which they were opened"
    counts, really = [], LocalLake.source
    class Counting(pa.OSFile):
        def read_buffer(self, *n):
            found = super().read_buffer(*n)
            counts[self.i][1] += len(found)
            return found
    def source(lake, path):
        file = Counting(str(lake.root / path))
        file.i = len(counts)
        counts.append([path, 0])
        return file
    monkeypatch.setattr(LocalLake, "source", source)
    return counts


class TestSomeFields:
    def test_fewer_bytes(self, wide_pool, fetched):
        "A lake reads the columns of the selected fields, the footers, and nothing else"
        read = {}
        for name, select in (("all", None), ("few", FEW)):
            fetched.clear()
            buffer = make(wide_pool, select=select, resident="memory")
            buffer.load()
            read[name] = sum(n for _, n in fetched)
            assert len({path for path, _ in fetched}) == 2
        footers = sum(file.footer for file in {p.where[0].path: p.where[0] for p in wide_pool._index.every_part()}.values())
        assert read["few"] - footers < (read["all"] - footers) / 8
        fetched.clear()
        assert [e.schema for e in wide_pool.find(select=FEW)] == [wide_pool.schema.select(FEW)] * 4
        assert sum(n for _, n in fetched) == read["few"]

    def test_entries_of_the_cache(self, wide_pool, cache, opened):
        "Each selection has an entry of its own, and one that says the same in other words shares it"
        selections = [None, FEW, {"state": ["s3", "s7"], "action": ["a1"]}, {"state": ["s7", "s3"]}]
        whole = draws(make(wide_pool, resident="memory"))
        for again in (False, True):
            for select in [*selections, {"action": ("a1",), "state": np.array(["s7", "s3"]), "nstate": ["s7", "s3"]}]:
                opened.clear()
                buffer = make(wide_pool, select=select, resident="mapped", cache=cache)
                drawn = draws(buffer)
                assert drawn == draws(make(wide_pool, select=select, resident="memory")), "another entry"
                assert [d["index"] for d in drawn] == [d["index"] for d in whole]
            assert len([f for f in cache.iterdir() if not f.name.startswith(".")]) == len(selections)
        opened.clear()
        make(wide_pool, select=FEW, resident="mapped", cache=cache).load()
        assert opened == [], "read again, although it is in the cache"

    def test_compacted_meanwhile(self, wide_pool):
        "An iterator goes on where its files were merged and removed"
        other, found = DaskPool(wide_pool.url), wide_pool.find(select=FEW)
        assert other.compact() == 2 and other.vacuum("0s", dry_run=False)
        assert [(e.id, e.digest) for e in found] == [(e.id, e.digest) for e in map(lambda h: wide(h).select(FEW), range(4))]

    @pytest.mark.parametrize("field", ["s7", "s8"])
    def test_damage(self, wide_pool, field):
        "Damage is found where it is read, and costs no other field"
        part = wide_pool._parts(wide(3).id, wide_pool.version)[0]
        path = Path(wide_pool.url) / part.where[0].path
        group = pq.ParquetFile(path).metadata.row_group(0)
        chunk = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == f"state_{field}")
        data = bytearray(path.read_bytes())
        data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
        path.write_bytes(data)
        with pytest.raises(CorruptData, match=path.name): wide_pool[wide(3).id]
        load = lambda: make(wide_pool, select=FEW, resident="memory").load()
        if field in FEW["state"]:
            with pytest.raises(CorruptData, match=path.name): load()
        else: load()
        assert any(path.name in line for line in wide_pool.verify())


class TestReading:
    def test_only_what_is_new(self, pool, opened):
        "A file that the query cannot match is not opened; a refresh opens what came since"
        pool.store(drive(5, hour=3, vehicle="other"))
        buffer = make(pool, query=PoolQuery(vehicle="other"))
        buffer.load()
        assert len(opened) == 1 and len(buffer) == 5
        pool.store(drive(6, hour=4, vehicle="other")); pool.store(drive(6, hour=5, vehicle="else"))
        opened.clear()
        assert buffer.refresh() == 6 and len(opened) == 1
        opened.clear()
        assert buffer.refresh() == 0 and opened == [] and len(pool.catalogue()) == 9 and opened == []

    def test_order(self, tmp_path):
        "Portions that are read at the same time enter in their order"
        pool = DaskPool(tmp_path / "lake")
        episodes = [drive(100, hour=h, vehicle="ABC"[h % 3]) for h in range(40)]
        for e in reversed(episodes): pool.store(e)
        pool.compact()
        import data_io_nbdev.storage.pool.dask as lake
        before, lake._WINDOW = lake._WINDOW, 5000
        try: buffer = make(pool); buffer.load()
        finally: lake._WINDOW = before
        assert [(run.episode, run.serial) for run in buffer._view.rows.ledger.runs] == [(e.id, 100 * i) for i, e in enumerate(episodes)]
        assert draws(buffer) == draws(MemoryBuffer(pool=pool, batch_size=16, seed=3))

    def test_damage(self, pool, tmp_path):
        "A damaged file stops loading with its name, and the buffer keeps what it had"
        buffer = make(pool)
        buffer.load()
        before = rows(buffer)
        path = tmp_path / "lake" / pool.snapshot()._parts(drive(30, hour=9).id, pool.version)[0].where[0].path
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(CorruptData, match=path.name): buffer.load()
        path.unlink()
        with pytest.raises(CorruptData, match=path.name): buffer.load()
        assert [before[i] for i in sorted(before)] == [(run.episode, run.step + i) for run in buffer._view.rows.ledger.runs for i in range(len(run.times))]

    @pytest.mark.parametrize("options", [{"resident": "disk"}, {"prefetch": 0}, {"resident": "cluster", "pool": MemoryPool()}, {"resident": "cluster"}])
    def test_options(self, pool, options):
        with pytest.raises(QueryError): make(**{"pool": pool, **options})


class TestMappedRows:
    def test_when(self, pool, cache):
        "`auto` maps what is larger than `memory_limit`, and grows out of memory when it must"
        small, large = (make(pool, memory_limit=n, cache=cache) for n in ("1 GB", "2 kB"))
        assert draws(small) == draws(large) and len(list(cache.iterdir())) == 1
        growing = make(pool, memory_limit=60_000, cache=cache, states="twice")
        growing.load()
        assert isinstance(growing._view.rows.data.base, (type(None), np.ndarray)) and growing._view.rows.data.base is None
        for h in range(20, 40): pool.store(drive(60, hour=h))
        growing.refresh()
        assert growing._view.rows.data.base is not None and draws(growing) and len(growing) == 110 + 1200

    @pytest.mark.parametrize("states", ["once", "twice"])
    def test_recalled(self, pool, cache, opened, states):
        "The next process reads no file, draws the same, and goes on with what is new; a query or a version of its own is an entry of its own"
        mapped = dict(resident="mapped", cache=cache, states=states)
        first = make(pool, **mapped)
        right = draws(first)
        opened.clear()
        again = make(pool, **mapped)
        assert draws(again) == right and opened == [] and again._view.trail == first._view.trail
        pool.store(drive(30, hour=9)); pool.delete(drive(20, hour=1).id); pool.store(drive(4, hour=2, seed=5), overwrite=True)
        assert again.refresh() == 24 and first.refresh() == 24 and rows(again) == rows(first)
        plain = MemoryBuffer(pool=pool, batch_size=16)
        plain.load_state_dict(through_json(again.state_dict()))
        assert draws(plain) == draws(again)
        third = make(pool, query=PoolQuery(time=("2026-01-01T02:00:02Z", "2026-01-01T03:00:05Z")), **mapped)
        assert draws(third) == draws(MemoryBuffer(pool=pool, batch_size=16, seed=3, query=third.query))
        assert len(list(cache.iterdir())) == 2

    def test_at_once(self, pool, cache):
        "Processes that build the same entry at the same time all draw the same, and leave one entry"
        code = """
import pickle, sys
from data_io_nbdev import DaskBuffer
from data_io_nbdev.testing import draws
pool, cache = pickle.load(sys.stdin.buffer)
print(draws(DaskBuffer(pool=pool, batch_size=16, seed=3, resident="mapped", cache=cache)))
"""
        said = at_once(*[lambda: python(code, (pool, cache))] * 3)
        assert len(set(said)) == 1 and len(list(cache.iterdir())) == 1

    def test_damaged_entry(self, pool, cache):
        "An entry that is cut, or lacks a file, is made again"
        for name in ("rows.bin", "times.npy", "runs.npy"):
            right = draws(make(pool, resident="mapped", cache=cache))
            (entry,) = cache.iterdir()
            os.truncate(entry / name, 100)
            assert draws(make(pool, resident="mapped", cache=cache)) == right
            os.remove(entry / name)
            assert draws(make(pool, resident="mapped", cache=cache)) == right and len(list(cache.iterdir())) == 1

    def test_bounded(self, pool, cache):
        "The cache keeps to its limit; what is open stays readable when its entry goes"
        buffers = [make(pool, resident="mapped", cache=cache, cache_limit="40 kB", query=PoolQuery(ids=[e.id for e in list(pool)[:n]])) for n in (1, 2, 3, 4)]
        for buffer in buffers: trace(buffer.sample(), pool.__getitem__)
        assert 1 <= len(list(cache.iterdir())) < 4
        for buffer in buffers: trace(buffer.sample(), pool.__getitem__)

    def test_no_room(self, pool, cache, monkeypatch):
        "A full disk is a typed error, and what was loaded before stays"
        buffer = make(pool, resident="mapped", cache=cache)
        buffer.load()
        def full(*args): raise OSError(28, "No space left on device")
        monkeypatch.setattr(os, "posix_fallocate", full)
        pool.store(drive(50, hour=11))
        with pytest.raises(PoolUnavailable, match="no room"): buffer.load()
        assert len(buffer) == 110 and [p for p in cache.iterdir() if p.name.startswith(".")] == []
        trace(buffer.sample(), pool.__getitem__)

    def test_ring(self, pool, cache):
        "A ring on disk is private: nothing is left of it"
        ring, plain = make(pool, resident="mapped", cache=cache, capacity=37), MemoryBuffer(pool=pool, batch_size=16, seed=3, capacity=37)
        assert draws(ring) == draws(plain)
        for h in range(20, 30):
            pool.store(drive(9, hour=h)); ring.refresh(); plain.refresh()
            assert draws(ring) == draws(plain)
        assert list(cache.iterdir()) == []


class TestClusterRows:
    def test_ahead(self, pool, client):
        "Whatever comes between two batches, they are what a buffer in memory draws"
        far, near = make(pool, resident="cluster", prefetch=4), MemoryBuffer(pool=pool, batch_size=16, seed=3)
        for step in range(30):
            assert draws(far, 3) == draws(near, 3)
            if step % 7 == 1: assert draws(far, 1) == draws(near, 1) and far.sample(5).index.tolist() == near.sample(5).index.tolist()
            if step % 7 == 2: pool.store(drive(5, hour=20 + step)); assert far.refresh() == near.refresh() == 5
            if step % 7 == 3: far.load_state_dict(through_json(near.state_dict()))
            if step % 7 == 4: near.load_state_dict(through_json(far.state_dict()))
            if step % 7 == 5: far.sampler, near.sampler = Episodes(), Episodes()
            if step % 7 == 6: far.load(); near.load()

    @pytest.mark.parametrize("options", [{"capacity": 33}, {"states": "once"}, {"states": "twice"},
                                         {"query": PoolQuery(time=("2026-01-01T01:00:02Z", "2026-01-01T03:00:05Z"))}])
    def test_like_memory(self, pool, client, options):
        far, near = make(pool, resident="cluster", **options), MemoryBuffer(pool=pool, batch_size=16, seed=3, **options)
        assert draws(far) == draws(near) and len(far) == len(near) and far.nbytes > 0
        pool.delete(drive(20, hour=2).id); pool.store(drive(30, hour=9))
        assert far.refresh() == near.refresh() and draws(far) == draws(near) and rows(far, pool.snapshot().__getitem__) == rows(near)

    def test_a_worker_dies(self, pool):
        "Its rows are read again, by another worker, and the batches go on as they would have"
        with distributed.LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster:
            with distributed.Client(cluster) as client:
                import data_io_nbdev.storage.buffer.dask as module
                before, module._CHUNK = module._CHUNK, 2000
                far, near = make(pool, resident="cluster", prefetch=2), MemoryBuffer(pool=pool, batch_size=16, seed=3)
                try: far.load()
                finally: module._CHUNK = before
                assert draws(far) == draws(near) and len(far._view.rows.chunks) > 2
                os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
                for _ in range(5): assert draws(far) == draws(near)

    def test_compacted_meanwhile(self, pool, client):
        "A pool that was compacted and vacuumed between two looks is read from where its steps are now"
        far, near = make(pool, resident="cluster"), MemoryBuffer(pool=pool, batch_size=16, seed=3)
        assert draws(far) == draws(near)
        other = DaskPool(pool.url)
        other.store(drive(8, hour=15)); other.compact(); time.sleep(0.01); other.vacuum("0s", dry_run=False)
        far.load(); near.load()
        assert draws(far) == draws(near)
