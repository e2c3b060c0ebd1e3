"Every registered back-end keeps every promise of the two suites in `data_io_nbdev.testing`."
import copy
import gc

import pytest

from data_io_nbdev.errors import DataIOError, EpisodeNotFound, SnapshotNotFound
from data_io_nbdev.storage.buffer.memory import MemoryBuffer
from data_io_nbdev.storage.buffer.sampler import Episodes, Uniform
from data_io_nbdev.storage.pool.memory import MemoryPool
from data_io_nbdev.storage.pool.pool import BACKENDS
from data_io_nbdev.testing import (HARNESSES, BufferContract, PoolContract, draws, drive, facts, facts_of, rows, steps_of,
                                   through_json, trace)


@pytest.fixture(params=sorted(HARNESSES))
def harness(request, tmp_path): return HARNESSES[request.param](tmp_path)


class TestPools(PoolContract): pass


class TestBuffers(BufferContract): pass


def test_every_back_end_has_a_harness():
    "A back-end that is registered for users is registered for these tests"
    assert set(HARNESSES) == set(BACKENDS)


@pytest.mark.parametrize("states", ["once", "twice"])
class TestAPoolOfItsOwn:
    "A `MemoryBuffer` without a pool makes one, and shares its rows with it instead of keeping every step twice"

    def test_like_any_other(self, states):
        "It stores, draws, finds and replaces as a buffer over a pool that was given, and gives the same batches"
        own, given = (MemoryBuffer(batch_size=32, seed=7, states=states, **p) for p in ({}, {"pool": MemoryPool()}))
        given.load()
        assert isinstance(own.pool, MemoryPool) and own.pool is not given.pool
        for buffer in (own, given):
            for e in (drive(4, hour=2), drive(6, hour=1)[:2], drive(6, hour=1).to_frame(), drive(3, hour=3, linked=False)): buffer.store(e)
        right = [drive(6, hour=1), drive(4, hour=2), drive(3, hour=3, linked=False)]
        assert facts_of(own.pool) == facts_of(given.pool) == facts_of(right)
        assert rows(own) == rows(given)
        own.load_state_dict(through_json(given.state_dict()))
        assert draws(own) == draws(given)

    def test_what_was_found_stays(self, states):
        "An episode that was found keeps its steps while the rows grow, move, are overwritten and go"
        buffer = MemoryBuffer(batch_size=8, states=states)
        id = buffer.store(drive(40))
        found = buffer.pool[id]
        for h in range(1, 60): buffer.store(drive(80, hour=h))
        buffer.pool.store(drive(10, seed=1), overwrite=True); buffer.refresh()
        assert facts(found) == facts(drive(40)) and facts(buffer.pool[id]) == facts(drive(10, seed=1))
        assert facts(buffer.pool.snapshot(1)[id]) == facts(drive(40)) and facts(buffer.pool[drive(hour=7).id]) == facts(drive(80, hour=7))
        del buffer; gc.collect()
        assert facts(found) == facts(drive(40))

    def test_ring(self, states):
        "Its own pool forgets what leaves the ring, and never gives half an episode for a whole one"
        buffer = MemoryBuffer(batch_size=64, capacity=20, states=states)
        for h in range(9): buffer.store(drive(6, hour=h))
        assert list(rows(buffer, lambda id: {drive(6, hour=h).id: drive(6, hour=h) for h in range(9)}[id]).values()) == steps_of(
            *[drive(6, hour=h) for h in range(9)])[-20:]
        left = list(buffer.pool)
        assert [e.episodestart.hour for e in left][-3:] == [6, 7, 8]
        for e in left: assert facts(e) == facts(drive(6, hour=e.episodestart.hour)[e.offset:])
        with pytest.raises(EpisodeNotFound): buffer.pool[drive(6, hour=0).id]
        with pytest.raises((SnapshotNotFound, EpisodeNotFound)): buffer.pool.snapshot(1)[drive(6, hour=0).id]
        assert buffer.pool.verify() == []

    def test_selected(self, states):
        "With a selection the pool keeps whole steps, and forgets them with their rows; another selection changes the rows alone"
        buffer = MemoryBuffer(batch_size=50, capacity=10, seed=1, states=states, select={"state": ["slope"]})
        for h in range(5): buffer.store(drive(4, hour=h))
        right = facts_of(drive(4, hour=h) for h in (2, 3, 4))
        for select, width in ((None, 3), ({"state": ["slope"]}, 1), ({"state": ["slope", "velocity"]}, 3)):
            assert facts_of(buffer.pool) == right and len(buffer) == 10
            told = {**buffer.state_dict(), "select": select, "format": 2 if select else 1}
            buffer.load_state_dict(through_json(told))
            assert buffer.sample().state.shape == (50, width)
        buffer.store(drive(4, hour=5))
        assert facts_of(buffer.pool) == facts_of(drive(4, hour=h) for h in (3, 4, 5)) and buffer.pool.verify() == []

    def test_save(self, tmp_path, states):
        "It is saved to a file and goes on from there; saving again is no conflict with itself"
        buffer = MemoryBuffer(batch_size=8, states=states)
        for h in range(3):
            buffer.store(drive(6, hour=h))
            buffer.save(tmp_path / "own.npz")
            assert facts_of(MemoryPool(tmp_path / "own.npz", "r")) == facts_of(drive(6, hour=k) for k in range(h + 1))
        again = MemoryBuffer(pool=MemoryPool(tmp_path / "own.npz"), batch_size=8, states=states)
        assert rows(again) == rows(buffer)

    def test_close(self, states):
        "It closes with its buffer, whatever happens to the pools of others"
        buffer = MemoryBuffer(batch_size=8, states=states)
        buffer.store(drive())
        pool = buffer.pool
        del buffer; gc.collect()
        assert pool.closed
        pool.load()
        assert facts_of(pool) == facts_of([drive()])

    def test_refused(self, states):
        "What is refused leaves rows and pool as they were"
        buffer = MemoryBuffer(batch_size=8, states=states)
        buffer.store(drive())
        before = rows(buffer)
        for bad in (drive(seed=1), drive(8)[7:], drive().to_frame()[::-1], 7):
            with pytest.raises(DataIOError): buffer.store(bad)
            assert rows(buffer) == before and facts_of(buffer.pool) == facts_of([drive()]) and buffer.pool.version == 1
        trace(buffer.sample(), buffer.pool.__getitem__)


@pytest.mark.parametrize("sampler", [Uniform(), Episodes()], ids=str)
def test_equal_batches(tmp_path, sampler):
    "For a seed every back-end gives the same batches: at first, after refresh, and from a state that another back-end saved"
    harnesses = [HARNESSES[name](tmp_path / name) for name in sorted(HARNESSES)]
    for h in harnesses: h.folder.mkdir()
    pools = [h.open() for h in harnesses]
    def all_do(call): return [call(thing) for thing in pools]
    all_do(lambda p: p.extend([drive(8, hour=h, linked=h % 2 == 0) for h in range(6)]))
    all_do(lambda p: p.store(drive(20, hour=9)[:7]))
    buffers = [h.buffer(pool=p, batch_size=8, seed=5, sampler=copy.deepcopy(sampler)) for h, p in zip(harnesses, pools)]
    got = [[draws(b)] for b in buffers]
    all_do(lambda p: p.store(drive(20, hour=9))); all_do(lambda p: p.delete(drive(hour=2).id)); all_do(lambda p: p.store(drive(5, hour=3, seed=1), overwrite=True))
    for b, g in zip(buffers, got): b.refresh(); g.append(draws(b))
    states = [through_json(b.state_dict()) for b in buffers]
    for b, g in zip(buffers, got): g.append(draws(b))
    for h, p, state, g in zip(harnesses, pools, states[1:] + states[:1], got):
        later = h.buffer(pool=p, batch_size=8, seed=1, sampler=copy.deepcopy(sampler))
        later.load_state_dict(state)
        g.append(draws(later))
        assert g[-1] == g[-2]
    assert all(g == got[0] for g in got)
