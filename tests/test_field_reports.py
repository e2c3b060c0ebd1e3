"""What small inputs from the field did wrong: each report rebuilt, with its neighbours in every door and back-end."""
import copy
import gc
import multiprocessing
import os
import pickle

import pytest

from data_io_nbdev.data.core import PoolQuery
from data_io_nbdev.errors import ClosedError
from data_io_nbdev.storage.buffer.memory import MemoryBuffer
from data_io_nbdev.storage.buffer.sampler import Episodes
from data_io_nbdev.storage.pool.memory import MemoryPool
from data_io_nbdev.testing import HARNESSES, draws, drive, facts_of, python


@pytest.fixture(params=sorted(HARNESSES))
def harness(request, tmp_path): return HARNESSES[request.param](tmp_path)


# --- forked workers ---

FORKING = """
import multiprocessing, pickle, sys
pool, kind, seed = pickle.load(sys.stdin.buffer)
buffer, context = kind(pool=pool, batch_size=32, seed=seed), multiprocessing.get_context("fork")
buffer.sample()
def indices(): return [buffer.sample().index.tolist() for _ in range(2)]
def child(pipe): pipe.send(indices())
for _ in range(3):
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs,))
    process.start(); print(ours.recv()); process.join()
print(indices())
"""


@pytest.mark.parametrize("seed", [None, 7])
def test_forked_workers_draw_each_another_stream(harness, seed):
    "No two workers, nor their parent, draw the same; with a seed, the same every time"
    pool = harness.open()
    pool.extend([drive(40, hour=h) for h in range(4)])
    if type(pool) is MemoryPool: pool.save()
    first, second = (python(FORKING, (pool, harness.buffer, seed)) for _ in range(2))
    assert len(set(first.splitlines())) == 4
    assert (first == second) == (seed is not None)


def test_a_child_that_resumes_goes_on_bit_for_bit():
    "What a child loads by `load_state_dict` counts, not that it is a fork"
    buffer = MemoryBuffer(batch_size=8, seed=1)
    buffer.store(drive(40))
    state, right = buffer.state_dict(), draws(buffer, 3)
    ctx = multiprocessing.get_context("fork")
    answers = ctx.Queue()
    def child():
        buffer.load_state_dict(state)
        answers.put(draws(buffer, 3))
    process = ctx.Process(target=child)
    process.start()
    assert answers.get(timeout=60) == right
    process.join()


# --- buffers that travel ---

@pytest.mark.parametrize("way", [copy.deepcopy, lambda buffer: pickle.loads(pickle.dumps(buffer))], ids=["deepcopy", "pickle"])
def test_a_buffer_travels(harness, way):
    "As its pool's handle, options and state; it goes on where it was"
    pool = harness.open()
    pool.extend([drive(40, hour=h) for h in range(4)])
    if type(pool) is MemoryPool: pool.save()
    options = dict(batch_size=8, seed=3, query=PoolQuery(length=(2, None)), sampler=Episodes(), capacity=100, states="once")
    buffer = harness.buffer(pool=pool, **options)
    fresh = way(buffer)
    assert draws(fresh) == draws(harness.buffer(pool=pool, **options)), "one that was not loaded"
    draws(buffer)
    again = way(buffer)
    assert draws(again) == draws(buffer) and again.query == buffer.query and again.capacity == 100


def test_a_buffer_with_a_pool_of_its_own_is_copied():
    buffer = MemoryBuffer(batch_size=8, seed=1, capacity=30)
    for h in range(4): buffer.store(drive(20, hour=h))
    buffer.sample()
    again = copy.deepcopy(buffer)
    assert draws(again) == draws(buffer)
    buffer.store(drive(20, hour=9))
    assert facts_of(again.pool) == facts_of(buffer.pool)


# --- a pool under its user's hands ---

def helper(pool): return MemoryBuffer(pool=pool, batch_size=4).sample()[0].shape


def test_a_pool_outlives_the_buffers_of_a_helper(harness):
    "A buffer in a helper function goes, and the pool that the user opened goes on: to store, find, count, take a snapshot"
    pool = harness.open()
    pool.store(drive(hour=0))
    asked = [lambda: pool.store(drive(hour=1)), lambda: len(pool), lambda: list(pool.find()), lambda: pool.catalogue(), lambda: pool.snapshot(),
             lambda: pool.verify(), lambda: pool.delete(drive(hour=1).id), lambda: drive().id in pool, lambda: pool.schema, lambda: pool.version]
    for ask in asked:
        helper(pool); gc.collect()
        assert pool.closed
        ask()
        assert not pool.closed


def test_a_pool_that_its_user_closed_stays_closed(harness):
    pool = harness.open()
    pool.store(drive())
    past = pool.snapshot()
    helper(pool); helper(past); gc.collect()
    pool.close()
    for ask in (lambda: len(pool), lambda: pool.store(drive(hour=1)), lambda: helper(pool), lambda: len(past), lambda: helper(past)):
        with pytest.raises(ClosedError): ask()
        assert pool.closed
    pool.load()
    assert len(pool) == len(past) == 1
