"""Samplers against slow and obvious oracles, while episodes come in parts, end, leave a ring and are hidden."""
import json

import numpy as np
import pandas as pd
import pytest

from data_io_nbdev import DaskPool, Episodes, MemoryBuffer, MemoryPool, PoolQuery, Uniform
from data_io_nbdev.errors import NotEnoughData, QueryError
from data_io_nbdev.storage.buffer.chains import Rows
from data_io_nbdev.storage.buffer.dask import DaskBuffer
from data_io_nbdev.storage.buffer.sampler import Sums, Tally
from data_io_nbdev.storage.buffer.windows import Stack, Windows
from data_io_nbdev.testing import batch_facts, drive, through_json


def life(seed, capacity=None, once=False, events=40):
    "Rows while episodes come in parts, one beside the other, and some are hidden; yields them after each event"
    rng = np.random.default_rng(seed)
    rows, going, begun = Rows(drive().schema, once, capacity), [], 0
    for _ in range(events):
        kind = rng.random()
        if kind < 0.12 and len(rows) and rows.episodes():
            ids = rows.owners(np.arange(len(rows)))[0]
            gone = str(rng.choice(ids))
            fork = rows.fork(); fork.hide([gone]); rows.merge(fork)()
            going = [g for g in going if g[0].id != gone]
        else:
            if not going or (kind < 0.5 and len(going) < 5):
                going.append([drive(int(rng.choice([1, 2, 7, 30])), hour=begun, linked=bool(rng.random() < 0.8)), 0])
                begun += 1
            one = going[rng.integers(len(going))]
            upto = min(len(one[0]), one[1] + int(rng.choice([1, 1, 3, 20])))
            fork = rows.fork(); fork.append(one[0][one[1]:upto]); rows.merge(fork)()
            one[1] = upto
            going = [g for g in going if g[1] < len(g[0])]
        if len(rows): yield rows, rng


LIVES = [dict(seed=s, capacity=c, once=o) for s in range(3) for c in (None, 8, 40) for o in (False, True)]


def neighbours(rows):
    "For each row its episode's rows and its place there, from the plain list of episodes"
    return {int(r): (e, i) for e in rows.episodes() for i, r in enumerate(e)}


@pytest.mark.parametrize("options", LIVES, ids=str)
def test_chains(options):
    "Neighbours, places and whole episodes are those of the plain list of episodes, however rows came and went"
    for rows, rng in life(**options):
        if rng.random() < 0.3: continue   # some events are seen together
        at, steps, known = np.arange(len(rows)), np.arange(-9, 10), neighbours(rows)
        right = [[known[r][0][known[r][1] + k] if 0 <= known[r][1] + k < len(known[r][0]) else -1 for k in steps]
                 for r in at.tolist()]
        assert np.array_equal(rows.beside(at[:, None], steps), right)
        before, behind, step = rows.places(at)
        assert before.tolist() == [known[r][1] for r in at.tolist()]
        assert behind.tolist() == [len(known[r][0]) - 1 - known[r][1] for r in at.tolist()]
        taken = rows.ledger.trace(rows.slots(at))
        assert np.array_equal(step, taken["step"]) and np.array_equal(rows.serials(at), taken["index"])
        assert np.array_equal(rows.times(at), taken["timestamp"].astype("int64"))
        ids, which = rows.owners(at)
        assert np.array_equal(np.array(ids)[which], taken["episode"])
        assert np.array_equal(rows.find(rows.serials(at)), at)
        gone = np.setdiff1d(np.arange(rows.serial + 3), rows.serials(at))
        assert (rows.find(gone) == -1).all()
        some = rng.integers(len(rows), size=4)
        assert all(np.array_equal(a, known[int(r)][0]) for a, r in zip(rows.whole(some), some))


def anchors(sampler, rows):
    "Which rows anchor an item, from the definition"
    for r, (e, i) in sorted(neighbours(rows).items()):
        if isinstance(sampler, Episodes): yield r, i == 0
        elif sampler.edge == "strict":
            yield r, i >= sampler.burn_in * sampler.dilation and i + sampler.steps[-1] < len(e)
        else: yield r, i == 0 or rows.places(np.array([r]))[2][0] % sampler.length == 0


KINDS = [Episodes(), Windows(3, edge="strict"), Windows(2, burn_in=3, bootstrap=2, edge="strict", dilation=2), Windows(4, edge="cut")]


@pytest.mark.parametrize("options", LIVES, ids=str)
@pytest.mark.parametrize("sampler", KINDS, ids=str)
def test_items(sampler, options):
    "Items are counted and numbered as if all rows had been asked, and what was counted on the way is what a new sampler counts"
    for rows, rng in life(**options):
        if rng.random() < 0.3: continue
        right = [r for r, yes in anchors(sampler, rows) if yes]
        assert sampler.count(rows) == len(right)
        if right:
            assert sampler.take(np.arange(len(right)), rows).anchor.tolist() == right
        fresh = Tally(sampler.anchors, sampler.reach).follow(rows)
        assert np.array_equal(fresh._sums.nodes, sampler._anchors._sums.nodes)


@pytest.mark.parametrize("options", LIVES[::2], ids=str)
def test_windows(options):
    "Every row of every window is the step that it says, and what is cut side by side is learned from once"
    for rows, rng in life(**options):
        if rng.random() < 0.5: continue
        known, at = neighbours(rows), np.arange(len(rows))
        for w in (Windows(3), Windows(4, burn_in=2, bootstrap=1, dilation=2), Windows(9, seconds=3)):
            draw = w.around(at, rows)
            for r, found, real, learn in zip(at.tolist(), draw.rows, draw.mask, draw.learn):
                e, i = known[r]
                for k, step in enumerate(range(-w.burn_in, w.length + w.bootstrap)):
                    j = i + step * w.dilation
                    there = 0 <= j < len(e) and (w.seconds is None or abs(j - i) <= w.seconds)
                    assert real[k] == there and (not there or found[k] == e[j])
                    assert learn[k] == (there and 0 <= step < w.length)
        cut = Windows(4, edge="cut", burn_in=1, bootstrap=2)
        draw = cut.take(np.arange(cut.count(rows)), rows)
        assert sorted(draw.rows[draw.learn].tolist()) == at.tolist()
        stack = Stack(3).around(at, rows)
        assert all([e[max(0, i + k)] for k in (-2, -1, 0)] == found.tolist() for r, found in zip(at.tolist(), stack.rows) for e, i in [known[r]])


def test_sums():
    "Sums and searches are those of a plain list"
    rng = np.random.default_rng(0)
    for size in (1, 2, 64, 1024):
        sums, plain = Sums(size), np.zeros(size)
        for n in (1, 3, size, 5):
            at = rng.integers(size, size=n)
            at = np.unique(at)
            plain[at] = rng.integers(0, 4, len(at))
            sums.set(at, plain[at])
            assert sums.nodes[1] == plain.sum() and [sums.upto(i) for i in range(size)] == [plain[:i].sum() for i in range(size)]
            if plain.sum():
                k = np.arange(plain.sum()) + 0.5
                assert np.array_equal(sums.select(k), np.searchsorted(np.cumsum(plain), k, side="right"))


def chi_square(counts, chances):
    "How far counts are from what was to be expected, in standard deviations of that number"
    right = np.asarray(chances) / np.sum(chances) * np.sum(counts)
    return ((counts - right) ** 2 / right).sum() / np.sqrt(2 * (len(counts) - 1)) - np.sqrt((len(counts) - 1) / 2)


@pytest.mark.parametrize("sampler", [*KINDS, Windows(3), Stack(2), Uniform(), Episodes(buckets=4)], ids=str)
def test_uniform(sampler):
    "Every item is equally likely"
    *_, (rows, rng) = life(1, capacity=40, events=60)
    if not sampler.count(rows): pytest.fail("nothing to draw: choose another life")
    seen = []
    n = 1 if getattr(sampler, "buckets", None) else 50   # what comes in one batch of a bucket is no chance
    for _ in range(200 * 50 // n // (1 if n > 1 else 4)):
        draw = sampler.draw(n, rng, rows)
        seen.append(draw.rows if draw.anchor is None else draw.anchor)
    counts = np.bincount(np.concatenate(seen), minlength=len(rows))
    there = sampler.anchors(np.arange(len(rows)), rows)
    assert not counts[~there].any() and chi_square(counts[there], np.ones(there.sum())) < 4


def filled(pool):
    "A pool of episodes of many lengths, two of which came in parts"
    pool.extend([drive(n, hour=h, driver=d) for h, (n, d) in enumerate([(1, "anna"), (9, "bo"), (30, "anna"), (4, "cleo"), (2, "bo")])])
    pool.store(drive(7, hour=9)[:3]); pool.store(drive(6, hour=8)[:2]); pool.store(drive(7, hour=9))
    return pool


SAMPLERS = [Uniform, Episodes, lambda: Episodes(buckets=3), lambda: Windows(4, burn_in=2, bootstrap=1), lambda: Windows(4, edge="strict"),
            lambda: Windows(3, edge="cut"), lambda: Windows(5, seconds=2.5), lambda: Stack(3)]


def more(batch):
    "Everything that a batch says, also what only some samplers give"
    return {**batch_facts(batch), "learn": batch.learn.tolist(), "anchor": batch.anchor.tolist(),
            "discount": batch.discount.tolist() if "discount" in dir(batch) else None}


@pytest.mark.parametrize("number", range(len(SAMPLERS)))
def test_every_buffer(number, tmp_path):
    "A seed gives the same batches from memory, from a lake, and from rows in a mapped file, before and after a refresh"
    make, options = SAMPLERS[number], dict(batch_size=6, seed=3)
    pools = [filled(MemoryPool()), filled(DaskPool(str(tmp_path / "lake")))]
    buffers = [MemoryBuffer(pool=pools[0], sampler=make(), **options), MemoryBuffer(pool=pools[0], states="once", sampler=make(), **options),
               DaskBuffer(pool=pools[1], sampler=make(), **options),
               DaskBuffer(pool=pools[1], resident="mapped", cache=str(tmp_path / "cache"), sampler=make(), **options)]
    for _ in range(2):
        facts = [[more(b.sample()) for _ in range(3)] for b in buffers]
        assert all(f == facts[0] for f in facts)
        for pool in pools:
            pool.delete(PoolQuery(driver="cleo")); pool.store(drive(12, hour=20)[:5]); pool.store(drive(6, hour=8))
        for b in buffers: b.refresh()


@pytest.mark.parametrize("capacity", [None, 25])
@pytest.mark.parametrize("number", range(len(SAMPLERS)))
def test_resume(number, capacity):
    "A learner that was stopped goes on, through refreshes and with a ring, as if it had not been"
    pool, options = filled(MemoryPool()), dict(batch_size=3, capacity=capacity)
    buffer = MemoryBuffer(pool=pool, sampler=SAMPLERS[number](), seed=3, **options)
    for turn in range(4):
        for _ in range(2): buffer.sample()
        other = MemoryBuffer(pool=pool, sampler=SAMPLERS[number](), **options)
        other.load_state_dict(through_json(buffer.state_dict()))
        assert [more(other.sample()) for _ in range(3)] == [more(buffer.sample()) for _ in range(3)]
        pool.store(drive(8, hour=30 + turn)); pool.store(drive(12, hour=20)[:3 * turn + 1])
        if turn == 2: pool.delete(PoolQuery(driver="bo"))
        for b in (buffer, other): b.refresh()
        assert [more(other.sample()) for _ in range(3)] == [more(buffer.sample()) for _ in range(3)]
