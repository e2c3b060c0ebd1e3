"""`buffer.batches()`: what `sample` would give, whatever happens in between and whichever thread draws; and the limits that hold back the faster side."""
import _thread
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
import traceback

import numpy as np
import pytest

from data_io_nbdev import Epoch, MemoryBuffer, MemoryPool, NStep, Once, PoolQuery, Prioritized, Uniform
from data_io_nbdev.errors import ClosedError, MissingExtra, NotEnoughData, QueryError, TimedOut
from data_io_nbdev.storage.buffer.batches import Count
from data_io_nbdev.testing import drive, through_json

SAMPLERS = {"Uniform": Uniform, "Epoch": Epoch, "Epoch, sorted": lambda: Epoch(shuffle=False), "Once": Once, "Prioritized": Prioritized,
            "NStep": lambda: NStep(3, 0.9, over=Epoch())}
THREAD = "data_io_nbdev batches"


def filled(drivers="anna bo"):
    pool = MemoryPool()
    for hour, driver in enumerate(drivers.split()): pool.store(drive(30, hour=hour, driver=driver))
    return pool


def buffers(n=2, pool=None, sampler=Uniform, **options):
    return [MemoryBuffer(pool=pool or filled(), sampler=sampler(), **{"batch_size": 4, "seed": 3, **options}) for _ in range(n)]


def told(batch): return [batch.index.tolist(), batch.weight.tolist(), *(a.tolist() for a in batch)]


def both(ask):
    "What is given, or the error that is raised instead"
    try: return told(ask())
    except NotEnoughData as e: return str(e)


def stands(buffer):
    "The state, without priorities: a thread that draws ahead gives new rows theirs earlier, and the draws are the same"
    state = buffer.state_dict()
    return state if not isinstance(buffer.sampler, Prioritized) else {**state, "sampler": None}


def threads(): return [t for t in threading.enumerate() if t.name == THREAD]


def until(true, seconds=10):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come to it"
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    if threads(): gc.collect()
    until(lambda: not threads())


# --- the same batches ---

@pytest.mark.parametrize("prefetch", [0, 1, 2, 5])
@pytest.mark.parametrize("name", SAMPLERS)
def test_order(name, prefetch):
    "The batches of `sample`, through everything that may come between two of them; after each, both buffers have the same state"
    rng = np.random.default_rng([len(name), prefetch])
    pools = [filled(), filled()]
    one, two = (buffers(1, pool, SAMPLERS[name])[0] for pool in pools)
    batches = one.batches(prefetch=prefetch)
    hour = 2
    for _ in range(60):
        what = rng.integers(12)
        if what == 0:
            for b in (one, two): b.store(drive(9, hour=hour))
            hour += 1
        elif what == 1:
            for b in (one, two): b.query = PoolQuery(driver="anna") if b.query == PoolQuery() else PoolQuery()
        elif what == 2: assert both(one.sample) == both(two.sample)
        elif what == 3:
            for b in (one, two): b.load()
        elif what == 4 and one._has_loaded():
            for b in (one, two): b.load_state_dict(through_json(b.state_dict()))
        elif what == 5: time.sleep(0.002)
        elif what == 6:
            one.batch_size = two.batch_size = int(rng.integers(1, 6))
        else: assert both(lambda: next(batches)) == both(two.sample)
        if one._has_loaded(): assert stands(one) == stands(two)
    batches.close()
    assert both(one.sample) == both(two.sample)


def test_number():
    "So many batches, and no more; then the iterator stays at its end, and the buffer goes on"
    one, two = buffers()
    batches = one.batches(3)
    assert [told(b) for b in batches] == [told(two.sample()) for _ in range(3)]
    assert list(batches) == [] and told(one.sample()) == told(two.sample())


@pytest.mark.parametrize("name", SAMPLERS)
def test_resume(name):
    "Whoever loads a state goes on with the first batch that was not handed out, while others wait"
    pool = filled()
    one, two = buffers(pool=pool, sampler=SAMPLERS[name])
    batches = one.batches(prefetch=3)
    for _ in range(3):
        batch = next(batches)
        if name == "Prioritized": one.update_priorities(batch.anchor, batch.anchor % 5)
    until(lambda: len(batches._ahead.waiting) == 3 or batches._ahead.waiting and batches._ahead.waiting[-1].error)
    state = through_json(batches.state_dict())
    two.load_state_dict(state)
    three = pickle.loads(pickle.dumps(two))
    goes_on = [both(lambda: next(batches)) for _ in range(6)]
    assert goes_on == [both(two.sample) for _ in range(6)] == [both(lambda: next(b)) for b in [three.batches()] for _ in range(6)]
    batches.close()


def test_two_iterators():
    "Of two iterators each gives the next batch"
    one, two = buffers()
    a, b = one.batches(), one.batches(prefetch=1)
    for turn in range(10): assert told(next(b if turn % 3 else a)) == told(two.sample())
    a.close()
    b.close()


def test_many_threads():
    "Of many threads that take from one iterator, each batch goes to one"
    one, two = buffers()
    found, batches = [], one.batches(80)
    workers = [threading.Thread(target=lambda: found.extend(told(b) for b in batches)) for _ in range(4)]
    for w in workers: w.start()
    for w in workers: w.join(20)
    right = [told(two.sample()) for _ in range(len(found))]
    assert sorted(map(str, found)) == sorted(map(str, right)) and len(found) == 80


# --- what goes wrong ---

class Falters(Uniform):
    "Fails with some of its draws"
    in_one_step = False
    def __init__(self, *fails): self.fails, self.n = fails, 0
    def draw(self, n, rng, rows):
        self.n += 1
        drawn = super().draw(n, rng, rows)
        if self.n in self.fails: self.gives_up()
        return drawn
    def gives_up(self): raise OSError("gone")


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors(prefetch):
    "An error is raised once, with the place where it arose, and no batch is lost by it"
    (one,), (two,) = buffers(1, sampler=lambda: Falters(3, 4, 7)), buffers(1)
    batches, found, wrong = one.batches(prefetch=prefetch), [], []
    while len(found) < 8:
        try: found.append(told(next(batches)))
        except OSError as e: wrong.append(traceback.format_exc())
    assert len(wrong) == 3 and all("gives_up" in text for text in wrong)
    assert found == [told(two.sample()) for _ in range(8)]
    batches.close()


def test_empty():
    "An empty buffer says so with each batch, until there are rows"
    one, two = (MemoryBuffer(batch_size=4, seed=3) for _ in range(2))
    batches = one.batches()
    for _ in range(3):
        with pytest.raises(NotEnoughData): next(batches)
    for b in (one, two): b.store(drive(9))
    assert told(next(batches)) == told(two.sample())
    one.close()
    for _ in range(2):
        with pytest.raises(ClosedError, match=r"buffer\.load"): next(batches)
    one.load(), two.load()
    assert told(next(batches)) == told(two.sample())
    batches.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_interrupted(prefetch):
    "A `next` that Ctrl-C breaks off gave its batch or did not; the next ones are those that follow"
    rng, broken = np.random.default_rng(prefetch), 0
    for _ in range(100):
        one, two = buffers(sampler=Epoch)
        batches, seconds = one.batches(prefetch=prefetch), float(rng.uniform(0, 0.0004))
        assert told(next(batches)) == told(two.sample())
        interrupt, given = threading.Thread(target=lambda: (time.sleep(seconds), _thread.interrupt_main())), 0
        try:
            interrupt.start()
            while True: next(batches); given += 1
        except KeyboardInterrupt as e: broken += "__next__" in [frame.name for frame in traceback.extract_tb(e.__traceback__)]
        interrupt.join()
        for _ in range(given): two.sample()
        right, found = [told(two.sample()) for _ in range(5)], [told(next(batches)) for _ in range(4)]
        assert found in (right[:4], right[1:])
        batches.close()
    assert broken     # some came in the middle


def test_refused():
    "Options that make no iterator"
    (one,) = buffers(1, capacity=50)
    for wrong in (dict(n=0), dict(prefetch=-1), dict(prefetch=1.5), dict(to="tensorflow"), dict(device="cuda"), dict(pin=True), dict(min_size=51),
                  dict(timeout=3), dict(margin=9), dict(min_size=1, margin=3), dict(samples_per_insert=0), dict(min_size=1, timeout=-1),
                  dict(samples_per_insert="2"), dict(samples_per_insert=float("nan")), dict(samples_per_insert=True)):
        with pytest.raises(QueryError): one.batches(**wrong)
    for to in ("torch", "jax"):
        try: __import__(to)
        except ImportError:
            with pytest.raises(MissingExtra, match=rf"data_io_nbdev\[{to}\]"): one.batches(to=to)


# --- the end ---

def test_close():
    "The thread ends with `close`, with the block, and with a loop that breaks off"
    (one,) = buffers(1)
    batches = one.batches()
    next(batches)
    assert threads()
    batches.close(), batches.close()
    assert not threads()
    with pytest.raises(ClosedError): next(batches)
    with one.batches() as batches: next(batches)
    assert not threads()
    for _ in one.batches(): break
    until(lambda: not threads())


def test_forgotten():
    "An iterator that nobody holds is ended by the garbage collector, also from a cycle, and lets go of the buffer"
    (one,) = buffers(1)
    cycle = [one.batches()]
    cycle.append(cycle)
    next(cycle[0])
    assert threads()
    del cycle
    gc.collect()
    until(lambda: not threads())
    pool = one.pool
    del one
    gc.collect()
    assert pool.closed


def test_exit():
    "A process with an iterator that was not closed ends at once"
    code = ("from data_io_nbdev import MemoryBuffer\nfrom data_io_nbdev.testing import drive\nb = MemoryBuffer(batch_size=9)\nb.store(drive(9))\n"
            "it = b.batches(min_size=1, samples_per_insert=100)\nnext(it)\nimport time; print(time.time(), flush=True)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr and time.time() - float(done.stdout) < 5, done


class Slow(Uniform):
    "Takes its time, after the generator has moved"
    in_one_step = False
    def draw(self, n, rng, rows):
        drawn = super().draw(n, rng, rows)
        time.sleep(0.003)
        return drawn


def in_child(what):
    "What a forked child answers"
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try: answer = what()
        except BaseException as e: answer = repr(e)
        os.write(write, pickle.dumps(answer))
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as f: answer = pickle.loads(f.read())
    os.waitpid(child, 0)
    return answer


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork():
    "A child that is forked while a thread draws has the state that its parent shows, and draws on by itself with a thread of its own"
    (one,), (two,) = buffers(1, sampler=Slow), buffers(1)
    batches = one.batches()
    for i in range(12):
        assert told(next(batches)) == told(two.sample())
        time.sleep(0.0005 * i)
        state, found, alive = in_child(lambda: (one._rng.bit_generator.state, [told(next(batches)) for _ in range(4)], len(threads())))
        assert state == two._rng.bit_generator.state and alive == 1
        right = told(two.sample())
        assert told(one.sample()) == right != found[0]
    batches.close()


def worker(make, put):
    b = make()
    put(([told(next(b)) for _ in range(3)]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_of_a_numbered_worker():
    "Workers draw what they would draw without a thread in their parent"
    found = []
    for prefetch in (0, 2):
        (one,) = buffers(1, sampler=Slow)
        batches = one.batches(prefetch=prefetch)
        next(batches)
        context = multiprocessing.get_context("fork")
        queue, process = context.SimpleQueue(), None
        process = context.Process(target=worker, args=(lambda: batches, queue.put))
        process._identity = (5,)
        process.start()
        found.append(queue.get())
        process.join()
        batches.close()
    assert found[0] == found[1]


# --- limits ---

def test_count():
    "Rows up to `min_size`, and those that were there, do not count; nor do those of another view"
    buffer = MemoryBuffer(batch_size=4)
    buffer.store(drive(9))
    count = Count(12, 2, 4)
    count.look(buffer._view)
    assert (count.missing(4), count.behind()) == (3, 0)
    buffer.store(drive(9, hour=1))
    count.look(buffer._view)
    assert (count.inserted, count.missing(4), count.behind()) == (6, 0, 8)
    count.loose = 2
    assert count.behind() == 12
    buffer.query = PoolQuery(driver="nobody")
    count.look(buffer._view)
    assert (count.inserted, count.missing(4)) == (6, 12)


def recorder(store, n):
    "A thread that stores `n` times, and notes when it had"
    stored, wrong = [], []
    def run():
        try:
            for i in range(n):
                store(i)
                stored.append(i)
        except Exception as e: wrong.append(e)
    thread = threading.Thread(target=run)
    thread.start()
    return thread, stored, wrong


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("slow", ["learner", "recorder", "nobody"])
def test_ratio(slow, prefetch):
    "Neither side is ahead by more than the margin, and what it stores at once, whichever is faster"
    buffer, drawn, seen = MemoryBuffer(batch_size=4, seed=1), 0, []
    batches = buffer.batches(60, prefetch=prefetch, min_size=10, samples_per_insert=2, margin=8, timeout=20)
    def store(i):
        if slow == "recorder": time.sleep(0.002)
        buffer.store(drive(5, hour=i))
    thread, stored, wrong = recorder(store, 28)
    for batch in batches:
        inserted = buffer._view.serial - 10
        assert inserted >= 0 and drawn + 4 <= 2 * inserted + 8
        seen.append(2 * inserted - drawn)
        drawn += 4
        if slow == "learner": time.sleep(0.002)
    thread.join(20)
    assert not wrong and len(stored) == 28 and max(seen) <= 8 + 2 * 5 + 4
    if slow == "learner": assert max(seen) > 8     # somebody was held back


def test_min_size():
    "Without a ratio the learner waits for the first rows only, and nobody else waits"
    buffer = MemoryBuffer(batch_size=4, seed=1)
    thread, stored, wrong = recorder(lambda i: (time.sleep(0.01), buffer.store(drive(5, hour=i))), 6)
    assert len(next(iter(buffer.batches(min_size=22))).index) == 4
    assert len(buffer) >= 22
    thread.join(20)
    assert len(stored) == 6 and not wrong


@pytest.mark.parametrize("environments", [0, 3])
def test_writer(environments):
    "Steps that a writer appends count, though they are committed together; who appends is held back, too"
    buffer, n = MemoryBuffer(batch_size=4, seed=1), max(1, environments)
    lead = (environments,) if environments else ()
    writer = buffer.writer(who=[{"machine": i} for i in range(environments)] if environments else {"machine": 0})
    value = np.ones((*lead, 2), "float32")
    batches = buffer.batches(min_size=6, samples_per_insert=2, margin=8, timeout=20)
    thread, stored, wrong = recorder(lambda i: writer.append(value, value, np.ones(lead) if lead else 1.0, value), 40)
    until(lambda: len(stored) * n >= 6 + 4)
    time.sleep(0.05)
    assert len(stored) * n <= 6 + 4 + 2 * n and thread.is_alive()      # 2 · 4 items behind
    for drawn in range(1, 15):
        next(batches)
        assert 4 * drawn <= 2 * (len(stored) * n + n - 6) + 8
    batches.close()
    thread.join(20)
    assert len(stored) == 40 and not wrong and len(buffer) == 40 * n


def test_timeouts():
    "Each side says for what it waited, how long, and what the other did; nothing is stored, no batch is lost"
    buffer = MemoryBuffer(batch_size=4, seed=1)
    batches = buffer.batches(min_size=10, samples_per_insert=2, margin=4, timeout=0.05)
    with pytest.raises(TimedOut, match=r"the learner waited 0\.05 s for 10 more rows.*min_size=10") as e: next(batches)
    assert isinstance(e.value, TimeoutError)
    thread, stored, wrong = recorder(lambda i: buffer.store(drive(10, hour=i)), 3)
    thread.join(20)
    assert stored == [0, 1] and len(buffer) == 20
    assert isinstance(wrong[0], TimedOut) and "to draw 16 more items: it drew 0, and 10 rows came" in str(wrong[0])
    for _ in range(6): next(batches)
    with pytest.raises(TimedOut, match="for 2 more rows: it drew 24 items"): next(batches)
    buffer.store(drive(10, hour=5))      # the learner's own thread would wait for itself
    assert len(next(batches).index) == 4
    batches.close()


def test_freed():
    "Who waits is let go when the iterator is closed, is forgotten, or comes to its end"
    def close(batches): batches[0].close()
    def forget(batches): batches.clear()
    def exhaust(batches): list(batches[0])
    for end in (close, forget, exhaust):
        buffer = MemoryBuffer(batch_size=4)
        batches = [buffer.batches(1, min_size=1, samples_per_insert=1, margin=4)]
        thread, stored, wrong = recorder(lambda i: buffer.store(drive(9, hour=i)), 5)
        until(lambda: len(stored) == 1)
        time.sleep(0.02)
        assert len(stored) == 1
        end(batches)
        thread.join(20)
        assert len(stored) == 5 and not wrong and not buffer._limits


def test_a_learner_is_let_go():
    "A learner that waits is told when another thread closes its batches"
    buffer = MemoryBuffer(batch_size=4)
    batches = buffer.batches(min_size=1)
    def close(i):
        until(lambda: batches._limit.turn._waiters)
        batches.close()
    thread, _, wrong = recorder(close, 1)
    with pytest.raises(ClosedError): next(batches)
    thread.join(20)
    assert not wrong


def test_other_processes():
    "What others store in the pool is looked for while the learner waits"
    pool = filled("anna")
    buffer = MemoryBuffer(pool=pool, batch_size=4)
    batches = buffer.batches(min_size=40, timeout=20)
    thread, _, _ = recorder(lambda i: (time.sleep(0.05), pool.store(drive(30, hour=9))), 1)
    assert len(next(batches).index) == 4 and len(buffer) == 60
    thread.join(20)
    batches.close()


def test_a_learner_that_ended():
    "Nobody waits for a thread that has ended, so that a recorder does not keep a process from its end"
    buffer = MemoryBuffer(batch_size=4)
    batches = buffer.batches(min_size=1, samples_per_insert=1, margin=4)
    learner, _, _ = recorder(lambda i: next(batches), 1)
    thread, stored, wrong = recorder(lambda i: buffer.store(drive(9, hour=i)), 4)
    thread.join(20), learner.join(20)
    assert len(stored) == 4 and not wrong
    batches.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_limits_and_fork():
    "In a child nobody waits for a learner that is in the parent"
    buffer = MemoryBuffer(batch_size=4)
    batches = buffer.batches(min_size=1, samples_per_insert=1, margin=4, timeout=1)
    buffer.store(drive(9))
    def store():
        thread, stored, wrong = recorder(lambda i: buffer.store(drive(9, hour=i + 1)), 5)
        thread.join(20)
        return stored, list(map(str, wrong))
    assert in_child(store) == ([0, 1, 2, 3, 4], [])
    batches.close()
