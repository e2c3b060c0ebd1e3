"Cases that were got wrong once: each test is one of them."
import os
import pickle
import subprocess
import sys
import threading

import numpy as np
import pandas as pd
import pytest

from data_io_nbdev.data.core import Episode, PoolQuery, Record
from data_io_nbdev.errors import ClosedError, DataIOError, PoolUnavailable, QueryError, SchemaError
from data_io_nbdev.storage.buffer.buffer import Buffer
from data_io_nbdev.storage.buffer.memory import MemoryBuffer
from data_io_nbdev.storage.buffer.rows import Rows
from data_io_nbdev.storage.pool.memory import MemoryPool
from data_io_nbdev.storage.pool.pool import open_pool
from data_io_nbdev.testing import draws, drive, facts_of


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("linked", [True, False])
def test_an_episode_longer_than_the_ring(once, linked):
    "Only its end stays, whatever was there before"
    for before in ([], [drive(3, linked=False)], [drive(9)]):
        long, ring = drive(30, hour=5, linked=linked), Rows(drive().schema, once=once, capacity=7)
        for e in (*before, long): ring.append(e)
        state, _, reward, nstate = ring.take(np.arange(7)).transition
        assert len(ring) == 7 and np.array_equal(state, long.state[-7:]) and np.array_equal(nstate, long.nstate[-7:])
        ring.append(drive(4, hour=6))
        assert len(ring) == 7 and np.array_equal(ring.take(np.arange(3)).transition[2], long.reward[-3:])


def test_a_refused_state_changes_nothing():
    "Not even which parts a buffer's own pool holds"
    ring, buffer = MemoryBuffer(batch_size=4, capacity=15, seed=1), MemoryBuffer(batch_size=4, seed=1)
    for h in range(6):
        for b in (ring, buffer): b.store(drive(5, hour=h))
    right = facts_of(buffer.pool)
    with pytest.raises(DataIOError): buffer.load_state_dict({**ring.state_dict(), "rows": 99})
    assert facts_of(buffer.pool) == right and len(buffer) == 30
    earlier, expected = buffer.state_dict(), draws(buffer)
    buffer.store(drive(5, hour=9))
    buffer.load_state_dict(earlier)
    assert len(buffer) == 30 and draws(buffer) == expected


def test_another_pool_is_not_resumed():
    "As many rows at the same version are not the same rows"
    one, two = (MemoryBuffer(batch_size=4) for _ in range(2))
    one.store(drive(5)); two.store(drive(5, seed=1))
    with pytest.raises(LookupError): two.load_state_dict(one.state_dict())


def test_loading_beside_storing():
    "A store that is acknowledged while a buffer loads its own pool again is there"
    buffer, ids = MemoryBuffer(batch_size=4), []
    def store():
        for h in range(60): ids.append(buffer.store(drive(2, hour=h)))
    writer = threading.Thread(target=store)
    writer.start()
    while writer.is_alive(): buffer.load(); threading.Event().wait(0.002)
    writer.join()
    assert {e.id for e in buffer.pool} == set(ids) and buffer.pool.verify() == []


def test_a_reader_follows_a_buffer_that_loads():
    "A handle on a buffer's own pool sees what is stored after the buffer loaded again"
    buffer = MemoryBuffer(batch_size=4)
    buffer.store(drive())
    reader = open_pool(buffer.pool.url, mode="r")
    buffer.load(); buffer.store(drive(hour=1))
    assert facts_of(reader) == facts_of([drive(), drive(hour=1)])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_child_leaves_its_parents_file_alone(tmp_path):
    "A forked child that exits does not save what its parent stored"
    code = """
import os, sys
from data_io_nbdev.storage.buffer.memory import MemoryBuffer
from data_io_nbdev.storage.pool.memory import MemoryPool
from data_io_nbdev.testing import drive
buffer = MemoryBuffer(pool=MemoryPool(sys.argv[1]), batch_size=4)
buffer.store(drive())
if os.fork() == 0: sys.exit(0)
os.wait()
buffer.store(drive(hour=1))
buffer.close()
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "pool.npz")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and len(MemoryPool(tmp_path / "pool.npz", "r")) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_child_does_not_wait_for_its_parents_threads():
    "Locks that a thread held at the fork are free in the child"
    buffer, held, done = MemoryBuffer(batch_size=4), threading.Event(), threading.Event()
    buffer.store(drive())
    def hold():
        with buffer._lock, buffer._moving, buffer.pool._lock: held.set(); done.wait(30)
    thread = threading.Thread(target=hold)
    thread.start(); held.wait()
    child = os.fork()
    if child == 0:
        try: os._exit(0 if len(buffer.sample()[0]) == 4 and len(list(buffer.pool)) == 1 else 1)
        finally: os._exit(2)
    for _ in range(1000):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid: break
        threading.Event().wait(0.02)
    else: os.kill(child, 9)
    done.set(); thread.join()
    assert pid and os.waitstatus_to_exitcode(status) == 0


def test_deleting_what_a_generator_names():
    "Any iterable of ids will do, also one that can be read once"
    pool = MemoryPool()
    pool.extend([drive(), drive(hour=1)])
    assert len(pool.delete(e.id for e in pool.find([drive().id]))) == 1 and len(pool) == 1


def test_nothing_is_stored_that_cannot_be_asked_for():
    "A buffer whose query does not fit says so before it commits"
    buffer = MemoryBuffer(batch_size=4, query=PoolQuery(truck="x"))
    with pytest.raises(QueryError): buffer.store(drive())
    assert buffer.pool.version == 0
    with pytest.raises(QueryError): MemoryBuffer(batch_size=4, capacity=9, query=PoolQuery(driver="anna"))


def test_a_failed_save_can_be_repeated(tmp_path):
    "A pool that could not be saved stays open, and is saved by the next close"
    (tmp_path / "folder").mkdir()
    pool = MemoryPool(tmp_path / "folder" / "pool.npz")
    pool.store(drive())
    (tmp_path / "folder").rmdir()
    with pytest.raises(PoolUnavailable): pool.close()
    assert not pool.closed
    (tmp_path / "folder").mkdir()
    pool.close()
    assert len(MemoryPool(pool.path, "r")) == 1


def test_a_plain_pool_will_do():
    "A user's buffer with nothing but load, close and sample, over anything that stores, finds and closes"
    class Plain:
        def __init__(self): self.items, self.closed = [], 0
        def store(self, item): self.items.append(item); return len(self.items)
        def find(self, query): return list(self.items)
        def close(self): self.closed += 1
    class Mine(Buffer[Episode]):
        def load(self): pass
        def close(self): self._close()
        def sample(self): return tuple(np.zeros((self.batch_size, 1)) for _ in range(4))
    pool = Plain()
    buffer = Mine(pool=pool, batch_size=3)
    buffer.store("anything")
    assert buffer.find(None) == ["anything"] and len(buffer.sample()) == 4
    buffer.close(); buffer.close()
    assert pool.closed == 1


def test_a_snapshot_keeps_its_pool_open():
    "The pool closes with the last buffer on it or on a snapshot of it; one that only snapshots were read of stays open"
    pool = MemoryPool()
    pool.store(drive())
    one, two = MemoryBuffer(pool=pool, batch_size=4), MemoryBuffer(pool=pool.snapshot(), batch_size=4)
    one.close()
    assert len(list(two.find(None))) == 1
    two.close()
    assert pool.closed
    pool.load()
    MemoryBuffer(pool=pool.snapshot(), batch_size=4).close()


def test_a_pool_closed_by_its_user_stays_closed():
    "A new buffer opens a pool that its last buffer closed, and no other"
    pool = MemoryPool()
    MemoryBuffer(pool=pool, batch_size=4).close()
    buffer = MemoryBuffer(pool=pool, batch_size=4)
    buffer.store(drive())
    pool.close()
    with pytest.raises(ClosedError): MemoryBuffer(pool=pool, batch_size=4).sample()


@pytest.mark.parametrize("times", [["junk", "text"], pd.period_range("2026-01-01", periods=2, freq="s"), [pd.NaT, pd.NaT]])
def test_times_that_are_none(times):
    "What pandas cannot read as times with a zone is a schema error"
    frame = drive(2).to_frame()
    rows = frame.index.to_frame(index=False)
    rows["timestamp"] = times
    with pytest.raises(SchemaError): Episode.from_frame(frame.set_axis(pd.MultiIndex.from_frame(rows)))


def test_a_float64_reward_in_a_record():
    "Most environments return one, whatever the pool holds"
    pool, e = MemoryPool(), drive(1)
    pool.store(drive(2, hour=2))
    fields = {role: {k: v[0] for k, v in e.fields(role).items()} for role in ("state", "action", "nstate")}
    record = Record(**fields, reward=np.float64(0.25), timestamp=e.timestamp[0], episodestart=e.episodestart, who=e.who)
    assert pool[pool.store(record)].reward.tolist() == [0.25]


def test_what_was_pickled_is_read_only():
    "An episode does not become writable on its way through a process pool"
    again = pickle.loads(pickle.dumps(drive()))
    with pytest.raises(ValueError): again.state[0] = 0
    assert again == drive()


def test_a_pool_of_its_own_keeps_what_a_time_range_cuts():
    "Rows that hold only some steps of an episode are not lent for the whole of it, neither at once nor by a later load"
    buffer = MemoryBuffer(batch_size=4, query=PoolQuery(time=("2026-01-01T00:00:03Z", None)))
    right = [drive(6, hour=h) for h in range(3)]
    for e in right: buffer.store(e)
    for look in (lambda: None, buffer.load, lambda: buffer.load_state_dict(buffer.state_dict())):
        look()
        assert facts_of(buffer.pool) == facts_of(right) and buffer.pool.verify() == [] and len(buffer) == 15
