"""One process that records, learns and tells priorities from several threads at once. Every step says by itself what belongs to it, so a torn row shows."""
import random
import sys
import threading
import time
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
from conftest import SOAK

from data_io_nbdev import Episodes, MemoryBuffer, MemoryPool, NStep, Once, PoolQuery, Prioritized, Recent, Relabel, Windows
from data_io_nbdev.errors import NotEnoughData
from data_io_nbdev.testing import at_once

STEPS, CAPACITY, NOWHERE = 40, 700, -1  # of an episode; of a ring; a goal that no step reaches
MANY = 10**8  # steps between the numbers of two machines


def sign(k): return (np.asarray(k) * 2654435761 + 12345) % 2**20  # of a step, in which neighbours have nothing in common


def state(k): return {"place": np.float64(k), "sign": np.float64(sign(k)), "target": np.float64(NOWHERE)}


def whole(batch, real=Ellipsis):
    "Check that the parts of each single step belong together; gives their numbers"
    now, after = ({name: x[real] for name, x in batch.fields(role).items()} for role in ("state", "nstate"))
    k = now["place"].astype("int64")
    for s, place in ((now, k), (after, k + 1)): assert np.array_equal(s["place"], place) and np.array_equal(s["sign"], sign(place)), "a torn row"
    assert np.array_equal(now["target"], after["target"]) and np.array_equal(batch.action[real].ravel(), -k - 0.5)
    assert np.array_equal(batch.step[real], k % STEPS) and np.array_equal(batch.terminated[real], k % STEPS == STEPS - 1)
    assert np.array_equal(batch.reward[real], np.where(now["target"] == NOWHERE, k + 0.25, now["target"] - k))
    return k


def worth(achieved, desired, info): return desired - achieved + 1


def singles(batch): return whole(batch)


def windows(batch):
    k = whole(batch, batch.mask)
    first = batch.state[..., 0][:, :1]
    assert np.array_equal(k, (first + np.arange(batch.mask.shape[1]))[batch.mask]), "steps out of order"


def returns(batch):
    k, last = batch.fields("state")["place"], batch.fields("nstate")["place"]
    goal, n = batch.fields("state")["target"], last - k
    assert set(n.tolist()) <= {1, 2, 3} and np.array_equal(batch.fields("nstate")["sign"], sign(last.astype("int64")))
    each = np.arange(3)[:, None]
    right = np.where(goal == NOWHERE, k + each + 0.25, goal - k - each) * (each < n)
    assert np.allclose(batch.reward, right.sum(0), rtol=1e-12) and ((goal == NOWHERE) | (goal > k)).all(), "a torn return"


def hindsight(over, **options): return Relabel({"target": "place"}, worth, over=over, **options)


LEARNERS = [(lambda: Prioritized(), singles), (lambda: Prioritized(over=Windows(5)), windows), (lambda: hindsight(NStep(3, 1.0, over=Prioritized())), returns),
            (lambda: hindsight(Recent(200)), singles), (Episodes, windows), (Once, singles)]


def record(buffer, machine, done):
    "Steps of one machine, one at a time or as a small episode at once, until it is done"
    writer, rng, n = buffer.writer({"machine": f"m{machine}"}, steps=16), random.Random(machine), 0
    while not done.is_set():
        k = MANY * machine + n
        writer.append(state=state(k), action=np.float64(-k - 0.5), reward=np.float64(k + 0.25), nstate=state(k + 1), terminated=k % STEPS == STEPS - 1,
                      timestamp=datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=n))
        n += 1
        if rng.random() < 0.05: time.sleep(0.002)
    writer.close()
    return n


def priorities(sampler):
    "The sampler that has them, and what it goes by, or None"
    while sampler is not None and not isinstance(sampler, Prioritized): sampler = getattr(sampler, "over", None)
    return sampler


def kept(buffer, serials, p):
    "Check that rows have the priorities that they were told last, as far as they are still here; gives how many are"
    sampler, rows = priorities(buffer.sampler), buffer._view.rows
    sums = sampler._follow(rows).sums
    here = rows.find(serials) >= 0
    serials, right = serials[here], (p[here] + sampler.eps) ** sampler.alpha
    for what, found in (("kept", sampler._raw[serials % len(sampler._raw)]), ("counted", sums.weights[serials % sums.size])):
        wrong = ~np.isclose(found, right, rtol=1e-12, atol=0)
        assert not wrong.any(), f"rows {serials[wrong]} were told {right[wrong]}, and {found[wrong]} is {what}"
    return len(right)


def learn(buffer, check, own, done):
    "Draw, check, and tell priorities of those rows that are this learner's own; gives what it told, how many batches, and how often a priority was looked up"
    told, rng, batches, last, checked = {}, np.random.default_rng(own), 0, (), 0
    while not done.is_set():
        try: batch = buffer.sample()
        except NotEnoughData:
            time.sleep(0.001)
            continue
        check(batch)
        batches += 1
        if not priorities(buffer.sampler): continue
        if last:
            with buffer._lock: checked += kept(buffer, *last)
        serials = np.unique(batch.anchor[batch.anchor % 2 == own])
        p = rng.exponential(size=len(serials))
        buffer.update_priorities(serials, p)
        told.update(zip(serials.tolist(), p.tolist()))
        last = serials, p
    return told, batches, checked


@pytest.fixture
def restless():
    "Threads take turns five hundred times as often as usual, and so at many more places; what numba compiles is compiled before"
    for make, _ in LEARNERS:
        buffer = MemoryBuffer(batch_size=8, sampler=make(), capacity=CAPACITY)
        with buffer.writer({"machine": "m0"}) as writer:
            for k in range(STEPS): writer.append(state=state(k), action=np.float64(0), reward=np.float64(0), nstate=state(k + 1))
        batch = buffer.sample()
        if priorities(buffer.sampler): buffer.update_priorities(batch.anchor, np.ones(len(batch.anchor))); buffer.sample()
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 500)
    yield
    sys.setswitchinterval(before)


@pytest.mark.timeout(60 + 30 * SOAK)
@pytest.mark.parametrize("own", [True, False], ids=["pool of its own", "a pool that others use"])
def test_threads(own, restless, record_property):
    "Two machines record, learners draw and tell priorities, others refresh, delete and save: no torn row, no lost priority, no deadlock"
    pool, done = None if own else MemoryPool(), threading.Event()
    few = LEARNERS[:1] if own else LEARNERS
    buffers = [MemoryBuffer(pool=pool, batch_size=32, seed=1, capacity=CAPACITY, states=("once", "twice")[i % 2], sampler=make()) for i, (make, _) in enumerate(few)]
    learners = [(b, check, n) for b, (_, check) in zip(buffers, few) for n in range(2 if priorities(b.sampler) else 1)]
    def refresh():
        rng = random.Random(1)
        while not done.is_set():
            for b in buffers: b.refresh()
            time.sleep(rng.random() / 100)
    def meddle():
        rng = random.Random(2)
        while not done.is_set():
            rng.choice(buffers).state_dict()
            lengths = buffers[0].pool.catalogue(columns=["seq_len"]).seq_len
            if len(over := lengths.index[lengths == STEPS]) and not own: buffers[0].pool.delete(PoolQuery(ids=[rng.choice(over[-9:])]))
            time.sleep(0.03)
    def stop(): time.sleep(1.5 * SOAK); done.set()
    jobs = [lambda m=m: record(buffers[0], m, done) for m in range(2)] + [lambda a=a: learn(*a, done) for a in learners]
    def safely(job):
        def run():
            try: return job()
            except BaseException: done.set(); raise
        return run
    results = at_once(*map(safely, [*jobs, refresh, meddle, stop]))
    learned = results[2:2 + len(learners)]
    assert min(results[:2]) > 10 and all(batches > 1 for _, batches, _ in learned) and sum(checked for *_, checked in learned) > 10
    for b in buffers:
        b.refresh()
        if not priorities(b.sampler): continue
        told = {s: p for (buffer, *_), (mine, *_) in zip(learners, learned) if buffer is b for s, p in mine.items()}
        kept(b, np.array([*told]), np.array([*told.values()]))
    record_property("attack", (f"threads, {'own pool' if own else 'a pool of others'}", sum(batches for _, batches, _ in learned), 0, 1.5 * SOAK))


def test_writers_come_and_go(restless):
    "A draw sees all writers or all but the newest, while others are made and go"
    buffer, done, most = MemoryBuffer(batch_size=4, seed=1), threading.Event(), 1000
    first = buffer.writer({"machine": "first"})
    first.append(state=state(0), action=0.0, reward=0.0, nstate=state(1))
    def come():
        try: return len([buffer.writer({"machine": f"m{n}"}) for n in range(most)])
        finally: done.set()
    def look():
        while not done.is_set(): buffer.sample()
    assert at_once(come, look, look)[0] == most
