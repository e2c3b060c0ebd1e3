"""Ctrl-C, errors and forks at any moment: what a pool knows and what a buffer has read is as it was before, or as it is after.

An interrupt comes in two ways: as a real signal after a random time, and at a random line of the package, by a trace function."""
import gc
import os
import pickle
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import data_io_nbdev
from data_io_nbdev.data.core import PoolQuery
from data_io_nbdev.errors import EpisodeConflict
from data_io_nbdev.storage.buffer.memory import MemoryBuffer
from data_io_nbdev.storage.buffer.sampler import Draw, Episodes, Sampler, Uniform
from data_io_nbdev.storage.pool.memory import MemoryPool
from data_io_nbdev.testing import HARNESSES, bits, draws, drive, facts_of, through_json, trace

PACKAGE = str(Path(data_io_nbdev.__file__).parent)


# --- how to interrupt ---

def after(seconds, call):
    "Call, with a Ctrl-C after so many seconds; whether it came"
    armed = [True]
    def ctrl_c(*_):
        if armed[0]: raise KeyboardInterrupt
    before = signal.signal(signal.SIGALRM, ctrl_c)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
            call()
            armed[0] = False
        except KeyboardInterrupt: return True
        finally:
            armed[0] = False
            signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt: return True  # between two lines of ours
    finally: signal.signal(signal.SIGALRM, before)
    return False


SOURCE = {}

def line_of(frame):
    "The line that is about to run"
    name = frame.f_code.co_filename
    if name not in SOURCE: SOURCE[name] = Path(name).read_text().splitlines()
    return SOURCE[name][frame.f_lineno - 1].lstrip()


class Lines:
    "A trace function that counts the lines of the package, and raises at one of them"
    def __init__(self, at=None): self.at, self.n = at, 0

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(PACKAGE): return None
        # Leaving a `with` counts as a line of it, though no signal is taken there: the lock would seem to be lost.
        if event == "line" and not line_of(frame).startswith("with "):
            self.n += 1
            if self.n == self.at: raise KeyboardInterrupt
        return self

    def run(self, call):
        before = sys.gettrace()
        try:
            sys.settrace(self)
            call()
        except KeyboardInterrupt: return True
        finally: sys.settrace(before)
        return False


def whole_or_not_at_all(make, rng):
    """One trial: `make(rng)` gives an act, what to look at, and perhaps a first half of the act; the same rng gives the same act.
    The act is interrupted; what is seen is as before or as after it, or its first half; and it can be done again."""
    seed = int(rng.integers(2**32))
    act, look, *half = make(np.random.default_rng(seed))
    before, began, lines = look(), time.perf_counter(), Lines()
    act()
    took, done, right = time.perf_counter() - began, look(), [before]
    if half:
        _, look, half = make(np.random.default_rng(seed))
        half()
        right.append(look())
    act, look, *_ = make(np.random.default_rng(seed))
    assert look() == before
    if rng.random() < 0.5: after(rng.uniform(0, 1.2 * took), act)
    else:
        lines.run(make(np.random.default_rng(seed))[0])
        Lines(int(rng.integers(1, lines.n + 1))).run(act)
    assert look() in (*right, done), "neither as before nor as after"
    act()
    assert look() == done, "done again, it is not as it should be"


# --- what there is to see ---

def seen(buffer):
    "All that a buffer has read, in values that compare"
    view = buffer._view
    state = repr(buffer._rng.bit_generator.state), repr(buffer.sampler.state_dict()), buffer.query.to_json(), buffer.capacity
    if not view.versions: return "not loaded", state
    if view.rows is None: return [list(v) for v in view.versions], state
    rows, all = view.rows, np.arange(len(view.rows))
    taken = rows.take(all)
    traced = rows.ledger.trace(taken.slots)
    episodes = [r.tolist() for r in rows.episodes()]
    assert sorted(i for e in episodes for i in e) == all.tolist()
    steps = list(zip(traced["index"].tolist(), traced["episode"].tolist(), traced["step"].tolist()))
    return [list(v) for v in view.versions], view.trail, view.serial, steps, [bits(a) for a in taken.transition], episodes, state


def sound(buffer):
    "Every row is the step of the pool that it says it is"
    if len(buffer): trace(buffer.sample(64), buffer.pool.snapshot(buffer._view.versions[-1][1]).__getitem__)


def told(pool):
    "All that a pool says, of its newest version and of those before it"
    oldest, newest = pool._oldest(), pool.version
    return newest, oldest, len(pool), [facts_of(pool.snapshot(v)) for v in range(oldest, newest + 1)], pool.catalogue().to_csv()


class Fussy(Sampler):
    "Draws in several steps, and remembers how often"
    def __init__(self): self.drawn, self.last = 0, []

    def draw(self, n, rng, rows):
        self.drawn += 1
        picked = [int(rng.integers(len(rows))) for _ in range(n)]
        self.last.append(picked[0])
        return Draw(np.array(picked))

    def state_dict(self): return {"drawn": self.drawn, "last": list(self.last)}
    def load_state_dict(self, state): self.drawn, self.last = state["drawn"], list(state["last"])


# --- buffers and pools to attack ---

RESIDENCES = {
    "memory": lambda pool, **o: MemoryBuffer(pool=pool, **o),
    "lake": lambda pool, **o: data_io_nbdev.DaskBuffer(pool=pool, progress=False, resident="memory", **o),
    "mapped": lambda pool, **o: data_io_nbdev.DaskBuffer(pool=pool, progress=False, resident="mapped", cache=Path(pool.url).parent / "cache", **o),
    "database": lambda pool, **o: data_io_nbdev.MongoBuffer(pool=pool, progress=False, **o),
}
POOLS = {"memory": "memory", "lake": "delta", "mapped": "delta", "database": "mongodb"}


@pytest.fixture(params=list(RESIDENCES))
def place(request, tmp_path):
    "A residence, and how to make a pool for it"
    harness = HARNESSES[POOLS[request.param]](tmp_path)
    return request.param, RESIDENCES[request.param], lambda: MemoryPool() if request.param == "memory" else harness.fresh().open()


def trials(name, cheap, dear): return cheap if name == "memory" else dear


def change(pool, rng, kinds=6):
    "What another writer does; the first five kinds are one commit each"
    kind, hour = int(rng.integers(kinds)), float(rng.integers(3))
    if kind == 0: pool.store(drive(20, hour=10 + hour)[:int(rng.integers(1, 20))])
    if kind == 1: pool.extend([drive(5, hour=20 + i, linked=bool(i % 2)) for i in range(4)])
    if kind == 2:
        with suppress(EpisodeConflict): pool.store(drive(30, hour=hour, linked=bool(hour % 2)))  # it goes on, unless it was replaced
    if kind == 3: pool.store(drive(12, hour=hour, seed=1), overwrite=True)
    if kind == 4: pool.delete(PoolQuery(start=(drive(hour=hour).episodestart, None)))
    if kind == 5: pool.delete(everything=True); pool.store(drive(5, hour=30))


def filled(make_pool):
    pool = make_pool()
    pool.extend([drive(10, hour=h, linked=bool(h % 2)) for h in range(3)])
    return pool


def test_refresh(attack, place):
    "A refresh after others have stored, overwritten and deleted"
    name, make_buffer, make_pool = place
    def make(rng):
        pool = filled(make_pool)
        capacity = [None, 20][int(rng.integers(2))]
        buffer = make_buffer(pool, batch_size=8, seed=1, states=["once", "twice"][int(rng.integers(2))], capacity=capacity)
        buffer.load()
        for _ in range(int(rng.integers(1, 4))): change(pool, rng)
        return buffer.refresh, lambda: seen(buffer)
    attack(f"Ctrl-C in refresh, {name}", trials(name, 120, 10), lambda rng: whole_or_not_at_all(make, rng))


def test_load(attack, place):
    "The first load, and one more"
    name, make_buffer, make_pool = place
    def make(rng):
        pool = filled(make_pool)
        buffer = make_buffer(pool, batch_size=8, seed=1, capacity=[None, 20][int(rng.integers(2))])
        if rng.integers(2):
            buffer.load()
            change(pool, rng)
        return buffer.load, lambda: seen(buffer)
    attack(f"Ctrl-C in load, {name}", trials(name, 50, 8), lambda rng: whole_or_not_at_all(make, rng))


def test_resume(attack, place):
    "`load_state_dict`: rows, query, sampler and generator together"
    name, make_buffer, make_pool = place
    def make(rng):
        pool = filled(make_pool)
        one = make_buffer(pool, batch_size=8, seed=1, sampler=Fussy(), query=PoolQuery(length=(2, None)))
        one.sample()
        change(pool, rng)
        one.refresh()
        if len(one): one.sample()
        state = through_json(one.state_dict())
        two = make_buffer(pool, batch_size=8, seed=2, sampler=Fussy())
        two.load()
        return lambda: two.load_state_dict(state), lambda: seen(two)
    attack(f"Ctrl-C in load_state_dict, {name}", trials(name, 60, 6), lambda rng: whole_or_not_at_all(make, rng))


def test_another_query(attack, place):
    "`buffer.query = …`: the query, and that nothing is loaded for it yet, together"
    name, make_buffer, make_pool = place
    def make(rng):
        buffer = make_buffer(filled(make_pool), batch_size=8, seed=1, capacity=[None, 20][int(rng.integers(2))], query=PoolQuery(length=(2, None)))
        buffer.load()
        return lambda: setattr(buffer, "query", PoolQuery(length=(3, None))), lambda: seen(buffer)
    attack(f"Ctrl-C in buffer.query, {name}", trials(name, 50, 6), lambda rng: whole_or_not_at_all(make, rng))


def test_another_query_of_an_own_pool(attack):
    "A pool of the buffer's own moves to the new rows with the query, and keeps the steps that these do not have"
    def make(rng):
        buffer = MemoryBuffer(batch_size=8, seed=1)
        stored = [drive(int(rng.integers(2, 6)), hour=h) for h in range(4)]
        for e in stored: buffer.store(e)
        look = lambda: (seen(buffer), facts_of(buffer.pool) == facts_of(stored))
        return lambda: setattr(buffer, "query", PoolQuery(length=(4, None))), look
    attack("Ctrl-C in buffer.query, own pool", 100, lambda rng: whole_or_not_at_all(make, rng))


def test_cluster(attack, tmp_path):
    "Rows on a cluster: refreshes, and draws of batches that were asked for ahead"
    distributed = pytest.importorskip("distributed")
    harness = HARNESSES["delta"](tmp_path)
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster, \
            distributed.Client(cluster) as client:
        def make(rng):
            pool = filled(lambda: harness.fresh().open())
            buffer = data_io_nbdev.DaskBuffer(pool=pool, batch_size=8, seed=1, resident="cluster", client=client, prefetch=3, progress=False,
                                              capacity=[None, 20][int(rng.integers(2))])
            buffer.sample()
            change(pool, rng)
            return buffer
        def refresh(rng):
            buffer = make(rng)
            return buffer.refresh, lambda: seen(buffer)
        def trial(rng):
            seed = int(rng.integers(2**32))
            right = draws(make(np.random.default_rng(seed)), 6)
            buffer, lines, drawn = make(np.random.default_rng(seed)), Lines(), []
            lines.run(make(np.random.default_rng(seed)).sample)
            for _ in range(int(rng.integers(3))): drawn += draws(buffer, 1)
            Lines(int(rng.integers(1, lines.n + 1))).run(buffer.sample)
            rest = draws(buffer, 6 - len(drawn))
            assert drawn + rest == right or drawn + rest[:-1] == right[:len(drawn)] + right[len(drawn) + 1:], "a batch got lost, or came twice"
        attack("Ctrl-C in refresh, cluster", 12, lambda rng: whole_or_not_at_all(refresh, rng))
        attack("Ctrl-C in sample, cluster", 12, trial)


@pytest.mark.parametrize("sampler", [Uniform, Episodes, Fussy])
def test_sample(attack, sampler):
    "A draw that broke off is drawn again, or was drawn: no state of chance in between"
    def make(rng):
        buffer = MemoryBuffer(pool=filled(MemoryPool), batch_size=8, seed=1, sampler=sampler())
        buffer.load()
        calls = []
        def act():
            if buffer._rng.bit_generator.state != calls[0]: return  # it was drawn, though not received
            buffer.sample()
        calls.append(buffer._rng.bit_generator.state)
        return act, lambda: seen(buffer)
    attack(f"Ctrl-C in sample, {sampler.__name__}", 60, lambda rng: whole_or_not_at_all(make, rng))


@pytest.mark.parametrize("capacity", [None, 24])
def test_own_pool(attack, capacity):
    "A buffer with a pool of its own: rows and pool change together. What is stored and not read yet is read by the next store"
    def make(rng):
        buffer = MemoryBuffer(batch_size=8, seed=1, capacity=capacity, states=["once", "twice"][int(rng.integers(2))])
        for h in range(int(rng.integers(1, 8))): buffer.store(drive(int(rng.integers(1, 12)), hour=h))
        new = drive(int(rng.integers(1, 40)), hour=[9, 0][int(rng.integers(2))], seed=1)
        def half(): buffer.pool.store(new, overwrite=True)
        def act(): half(); buffer.refresh()
        return act, lambda: (seen(buffer), buffer.pool.version, sorted(map(repr, facts_of(buffer.pool)))), half
    attack(f"Ctrl-C in store, own pool, capacity {capacity}", 60, lambda rng: whole_or_not_at_all(make, rng))


@pytest.mark.parametrize("kind", ["memory", "delta", "mongodb"])
def test_first_question(attack, tmp_path, kind):
    "A handle that reads the log for the first time, interrupted, answers as if it had not been"
    harness = HARNESSES[kind](tmp_path)
    pool = harness.open()
    rng = np.random.default_rng(1)
    pool.extend([drive(10, hour=h) for h in range(3)])
    for _ in range(20): change(pool, rng)
    pool.extend([drive(3, hour=100 + h) for h in range(40)])
    right = told(pool)
    if kind == "memory": pool.save()
    def trial(rng):
        handle, lines, began = harness.open("r"), Lines(), time.perf_counter()
        len(handle)
        took, handle = time.perf_counter() - began, harness.open("r")
        if rng.random() < 0.5: after(rng.uniform(0, 1.2 * took), lambda: len(handle))
        else:
            lines.run(lambda: len(harness.open("r")))
            Lines(int(rng.integers(1, lines.n + 1))).run(lambda: len(handle))
        assert told(handle) == right
    attack(f"Ctrl-C in the first question, {kind}", dict(memory=60, delta=25, mongodb=6)[kind], trial)


@pytest.mark.parametrize("kind", ["memory", "delta"])
def test_store_and_delete(attack, tmp_path, kind):
    "A commit that was interrupted is there or not; the handle that made it, and every other one, say the same"
    harness = HARNESSES[kind](tmp_path)
    def make(rng):
        place = harness.fresh()
        pool = filled(place.open)
        seed = int(rng.integers(2**32))
        def act():  # done again, it finds that it is done
            with suppress(EpisodeConflict): change(pool, np.random.default_rng(seed), kinds=5)
        def look():
            others = told(place.open("r"))
            assert told(pool) == others and pool.verify() == []
            return len(pool), sorted(map(repr, facts_of(pool)))
        return act, look
    attack(f"Ctrl-C in store and delete, {kind}", 40 if kind == "memory" else 15, lambda rng: whole_or_not_at_all(make, rng))


def test_close(attack):
    "A buffer whose `close` was interrupted is open or closed, and can be closed and loaded again; so is its pool"
    def trial(rng):
        pool = filled(MemoryPool)
        buffer, twin = MemoryBuffer(pool=pool, batch_size=8, seed=1), MemoryBuffer(pool=pool, batch_size=8, seed=1)
        buffer.load(); twin.load()
        lines = Lines()
        lines.run(MemoryBuffer(pool=filled(MemoryPool), batch_size=8).close)
        Lines(int(rng.integers(1, lines.n + 1))).run(buffer.close)
        assert not pool.closed, "the other buffer holds it"
        buffer.close(); buffer.load()
        assert seen(buffer) == seen(twin)
        del buffer, twin; gc.collect()
        assert pool.closed
    attack("Ctrl-C in close", 20, trial)


# --- forks ---

def in_child(look):
    "What `look()` gives in a forked child; raises where that fails or hangs"
    ours, theirs = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            signal.alarm(30)
            os.close(ours)
            with os.fdopen(theirs, "wb") as f: pickle.dump(look(), f)
            os._exit(0)
        except BaseException as e:
            with suppress(Exception): os.write(2, f"in the child: {e!r}\n".encode())
        finally: os._exit(1)
    os.close(theirs)
    with os.fdopen(ours, "rb") as f: data = f.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"the child ended with status {status}"
    return pickle.loads(data)


@pytest.mark.parametrize("own", [False, True])
def test_fork_while_others_refresh(attack, own):
    "A child that was forked while a thread refreshes has a buffer that is whole, and can go on with it"
    def trial(rng):
        pool = None if own else filled(MemoryPool)
        buffer = MemoryBuffer(pool=pool, batch_size=8, seed=1, capacity=[None, 30][int(rng.integers(2))], states=["once", "twice"][int(rng.integers(2))])
        if own: buffer.store(drive(10))
        buffer.load()
        stop = threading.Event()
        def work():
            for n in range(0, 40_000, 20):
                if stop.is_set(): return
                buffer.pool.extend([drive(int(rng.integers(1, 20)), hour=40 + n + i) for i in range(20)])
                buffer.refresh()
                buffer.pool.delete(PoolQuery(ids=[drive(hour=40 + n + i).id for i in (2, 3, 5)])); buffer.refresh()
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            def look():
                seen(buffer); sound(buffer)
                buffer.store(drive(7, hour=100_000)); buffer.refresh()
                seen(buffer); sound(buffer)
                return drive(hour=100_000).id in set(buffer.sample(500).episode.tolist()) or len(buffer) > 60
            for _ in range(6):
                time.sleep(rng.uniform(0, 0.004))
                assert in_child(look)
        finally:
            stop.set(); thread.join(30)
        seen(buffer); sound(buffer)
    attack(f"fork while a thread refreshes, {'own' if own else 'given'} pool (6 children a trial)", 6, trial)
