"""Samplers against slow and obvious oracles, while episodes come in parts, end, leave a ring and are hidden."""
import copy
import gc
import pickle
import sys

import numpy as np
import pandas as pd
import pytest

from data_io_nbdev import DaskPool, Episode, Episodes, MemoryBuffer, MemoryPool, PoolQuery, Uniform
from data_io_nbdev.errors import NotEnoughData, QueryError, SchemaError
from data_io_nbdev.storage.buffer import nstep, sampler as trees
from data_io_nbdev.storage.buffer.buffer import make_batch
from data_io_nbdev.storage.buffer.chains import Rows
from data_io_nbdev.storage.buffer.chances import Balanced, Epoch, Fresh, Once, Prioritized, Recent
from data_io_nbdev.storage.buffer.dask import DaskBuffer
from data_io_nbdev.storage.buffer.nstep import NStep
from data_io_nbdev.storage.buffer.relabel import Relabel
from data_io_nbdev.storage.buffer.sampler import Blocks, Draw, Sums, Tally, sampler_state
from data_io_nbdev.storage.buffer.state import same_state
from data_io_nbdev.storage.buffer.windows import Stack, Windows
from data_io_nbdev.testing import batch_facts, drive, errand, through_json


def life(seed, capacity=None, once=False, events=28):
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
                end = (None, "terminated", "truncated")[begun % 3]
                going.append([drive(int(rng.choice([1, 2, 7, 30])), hour=begun, linked=bool(rng.random() < 0.8), end=end), 0])
                begun += 1
            one = going[rng.integers(len(going))]
            upto = min(len(one[0]), one[1] + int(rng.choice([1, 1, 3, 20])))
            fork = rows.fork(); fork.append(one[0][one[1]:upto]); rows.merge(fork)()
            one[1] = upto
            going = [g for g in going if g[1] < len(g[0])]
        if len(rows): yield rows, rng


LIVES = [dict(seed=s, capacity=c, once=o) for s in range(2) for c in (None, 8, 40) for o in (False, True)]


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
        fresh = Tally(sampler.reach).follow(rows, sampler.anchors)
        assert np.array_equal(fresh.sums.weights, sampler._weights(rows).sums.weights)


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
        tree, plain = Sums(size), np.zeros(size)
        for n in (1, 3, size, 5):
            at = rng.integers(size, size=n)
            at = np.unique(at)
            plain[at] = rng.integers(0, 4, len(at))
            tree.set(at, plain[at])
            assert tree.total == plain.sum() and [tree.upto(i) for i in range(size)] == [plain[:i].sum() for i in range(size)]
            if plain.sum():
                k = np.arange(plain.sum()) + 0.5
                assert np.array_equal(tree.select(k), np.searchsorted(np.cumsum(plain), k, side="right"))


@pytest.mark.parametrize("size", [4096, 2**16])
def test_sums_compiled(size):
    "The loops give the bits that numpy gives, compiled where numba is installed; and a large tree finds what a plain list does"
    rng, plain, looped = np.random.default_rng(size), Sums(size), Sums(size)
    plain.add_up = plain.go_down = None
    looped.add_up, looped.go_down = (trees.fast(loop) or loop for loop in (trees._add_up, trees._go_down))
    for n in (size, 256, 1, 300, 256):
        at = rng.integers(size, size=n)
        weights = rng.exponential(size=n) ** 5 * (rng.random(n) < 0.7)
        for tree in (plain, looped): tree.set(at, weights)
        asked = np.append(rng.random(500) * plain.total, [0, np.nextafter(plain.total, 0)])
        found = plain.select(asked)
        assert np.array_equal(plain.nodes, looped.nodes) and np.array_equal(found, looped.select(asked)) and (plain.weights[found] > 0).all()
        running = np.cumsum(plain.weights)
        near = 1e-9 * running[-1]
        assert (running[found] > asked - near).all() and (running[found] - plain.weights[found] <= asked + near).all()
        assert np.isclose(plain.upto(int(at[0])), running[at[0]] - plain.weights[at[0]], atol=near)


def blocks(weights, compiled):
    found = Blocks(len(weights))
    found.set(np.arange(len(weights)), weights)
    found.inside = trees.fast(trees._inside) or trees._inside if compiled else None
    return found


@pytest.mark.parametrize("kind", ["alike", "rising", "0 and 1", "any", "few", "one", "tiny and huge"])
@pytest.mark.parametrize("size", [1, 32, 64, 256, 2**13])
def test_blocks(size, kind):
    "As many numbers lead to a leaf as it weighs, by numpy and by a loop, also at the edges of what rounding leaves"
    rng = np.random.default_rng(size)
    weights = {"alike": lambda: np.full(size, 0.1), "rising": lambda: np.exp2(np.arange(size) / size), "any": lambda: rng.exponential(size=size) ** 5,
               "0 and 1": lambda: np.float64(rng.random(size) < 0.7), "few": lambda: np.where(rng.random(size) < 0.05, rng.random(size), 0),
               "one": lambda: np.arange(size) == size // 3, "tiny and huge": lambda: 10.0 ** rng.integers(-200, 3, size)}[kind]().astype("float64")
    if not weights.any(): weights[-1] = 0.3
    plain, looped = (blocks(weights, compiled) for compiled in (False, True))
    assert np.isclose(plain.total, weights.sum()) and np.isclose(plain.upto(size // 2), weights[:size // 2].sum())
    edges = np.append(plain.sums.running, 64 * plain.least.cumsum())
    asked = np.concatenate([rng.random(500) * plain.total, edges, np.nextafter(edges, 0), np.nextafter(edges, np.inf), [0]])
    asked = asked[(asked >= 0) & (asked <= plain.total)]
    found = plain.select(asked)
    assert np.array_equal(found, looped.select(asked)) and (weights[found] > 0).all() and (found < size).all()
    grid = (np.arange(200_000) + rng.random()) / 200_000 * plain.total
    shares = np.bincount(plain.select(grid), minlength=size) / 200_000
    assert np.abs(shares - weights / weights.sum()).max() < 3e-5
    if set(weights) <= {0, 1}: assert np.array_equal(plain.select(np.arange(weights.sum()) + 0.5), np.flatnonzero(weights))   # in their order


def test_blocks_changed():
    "What was changed step by step is what is set at once"
    rng, weights, blocks = np.random.default_rng(0), np.zeros(1024), Blocks(1024)
    for n in (1024, 1, 300, 7):
        at = rng.choice(1024, n, replace=False)
        weights[at] = rng.random(n)
        blocks.set(at, weights[at])
        weights[gone := at[::3]] = 0
        blocks.set(gone, weights[gone])
        once = Blocks(1024)
        once.set(np.arange(1024), weights)
        assert all(np.array_equal(a, b) for a, b in ((blocks.weights, weights), (blocks.least, once.least), (blocks.sums.nodes, once.sums.nodes)))


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("most", [64, 0])
def test_returns_looked_up(monkeypatch, once, most):
    "Looking ahead gives the bits that fetching every step gives, and what is kept of it follows the rows, whatever came, left or was hidden"
    monkeypatch.setattr(nstep, "_FEW", most)
    for seed, capacity in ((5, None), (6, 8), (7, 40)):
        sampler, kept = NStep(4, 0.97), pickle.loads(pickle.dumps(NStep(4, 0.97)))
        for rows, rng in life(seed, capacity, once, events=60):
            if rng.random() < 0.3: continue
            looked, new = (s.draw(50, np.random.default_rng(0), rows) for s in (sampler, kept))
            assert looked.ends is not None and all(np.array_equal(a, b) for a, b in zip(looked.ends, new.ends))
            fetched = sampler.whole(Uniform().draw(50, np.random.default_rng(0), rows), rows)
            one, other = ([*batch, batch.discount, batch.terminated, batch.truncated, batch.index] for batch in (make_batch(rows, draw) for draw in (looked, fetched)))
            assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one, other))
            kept = pickle.loads(pickle.dumps(sampler))   # a copy asks anew


@pytest.mark.parametrize("make", [lambda: NStep(4, 0.97), lambda: Windows(2, edge="strict"), Episodes])
def test_shared(make):
    "Buffers that share a sampler draw as if each had its own; nothing is asked again for that, and nothing is kept for rows that are gone"
    ours = make()
    both, apart = ([MemoryBuffer(batch_size=5, seed=seed, sampler=s) for seed, s in enumerate(samplers)] for samplers in ([ours] * 2, [make(), make()]))
    kept = lambda: ours._kept[1] if isinstance(ours, NStep) else ours._tally
    for hour in range(6):
        for buffers in (both, apart): buffers[hour % 2].store(drive(9, hour=hour))
        if hour: assert all(batch_facts(a.sample()) == batch_facts(b.sample()) for a, b in zip(both, apart))
    for b in both: b.sample()
    before = [kept()._of[b._view.rows.line][1] for b in both]
    for b in both: b.sample()
    assert all(kept()._of[b._view.rows.line][1] is k for b, k in zip(both, before)) and len(kept()._of) == 2
    both[0].load()
    both[0].sample()
    gc.collect()
    assert len(kept()._of) == 2


def test_options_changed():
    "What a learner changes on the way counts from the next draw on, also where it is kept of every row"
    sampler = NStep(3, 0.9)
    buffer = MemoryBuffer(batch_size=200, seed=0, sampler=sampler)
    buffer.store(drive(30))
    for hour, (n, gamma) in enumerate(((3, 0.9), (1, 0.9), (2, 0.5)), 1):
        sampler.n, sampler.gamma = n, gamma
        buffer.store(drive(30, hour=hour))
        batch = buffer.sample()
        last = np.minimum(batch.step + n, 30)
        assert np.allclose(batch.discount, gamma ** (last - batch.step))


def test_arrays_of_a_batch_apart():
    "Who writes to one array of a batch changes no other"
    for sampler in (Prioritized(), Balanced("driver"), NStep(2, 0.9), Epoch(), Windows(2), Prioritized(over=Windows(2))):
        buffer = MemoryBuffer(batch_size=5, seed=0, sampler=sampler)
        buffer.store(drive(30))
        batch = buffer.sample()
        batch.anchor[...] += 1
        for array in batch: array[...] = 0
        index = batch.index
        assert (np.where(index < 0, 0, index) < 30).all() and np.array_equal(index, batch.step)


def test_sequences_without_a_mask():
    "Sequences all of whose steps are real have a mask of their shape"
    class Two(Uniform):
        every = False
        def anchors(self, at, rows): return rows.places(at)[1] > 0
        def around(self, at, rows): return Draw(rows.beside(at[:, None], np.arange(2)), anchor=at)
    buffer = MemoryBuffer(batch_size=5, seed=0, sampler=Two())
    buffer.store(drive(30))
    batch = buffer.sample()
    assert batch.mask.shape == batch.learn.shape == (5, 2) and batch.mask.all() and batch.weight.shape == (5,)
    assert len(batch.frames()[0]) == 10 and batch._repr_html_()


def test_half_lives_interrupted(monkeypatch):
    "A draw that breaks off while rows are weighed anew leaves none that is weighed against another moment"
    sampler = Recent("1s")
    buffer = MemoryBuffer(batch_size=200, seed=0, sampler=sampler)
    buffer.store(drive(40))
    buffer.sample()
    buffer.store(drive(20, hour=1))
    with monkeypatch.context() as m:
        m.setattr(Recent, "_of_anchors", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt): buffer.sample()
    assert (buffer.sample().index >= 40).all()


@pytest.mark.parametrize("reward", ["float64", "int32", (2,)], ids=str)
def test_returns_of_any_reward(reward):
    "Rewards of several elements, and of integers, are summed up as fetched ones are"
    e, shape = drive(9, end="terminated"), reward if isinstance(reward, tuple) else ()
    values = np.arange(9 * 2)[:9 * (shape or (1,))[0]].reshape(9, *shape).astype("float32" if shape else reward)
    one = Episode.from_arrays(state=e.state, action=e.action, reward=values, nstate=e.nstate, timestamp=e.timestamp, terminated=e.terminated, who={"vehicle": "VB7"})
    rows, sampler = Rows(one.schema), NStep(3, 0.9)
    rows.append(one)
    looked = make_batch(rows, sampler.draw(20, np.random.default_rng(0), rows))
    fetched = make_batch(rows, sampler.whole(Uniform().draw(20, np.random.default_rng(0), rows), rows))
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip([*looked, looked.discount], [*fetched, fetched.discount]))


@pytest.mark.parametrize("state, info", [((1,), None), ((24,), (1,)), ((3,), (50,)), ((5,), (3,)), ((600,), None)], ids=str)
@pytest.mark.parametrize("capacity", [None, 16])
@pytest.mark.parametrize("kind", ["float32", "float64", "uint8"])
def test_endings(state, info, capacity, kind):
    "What is copied of the rows in which transitions end is what the whole rows have, aligned, whatever a row looks like"
    rng, n = np.random.default_rng(0), 20
    s = rng.integers(0, 200, (n + 1, *state)).astype(kind)
    told = {} if info is None else {"info": {"heat": rng.random((n, *info))}}
    e = Episode.from_arrays(state=s[:-1], nstate=s[1:], action=rng.random((n, 2)), reward=rng.random(n).astype("float32"), truncated=np.arange(n) == n - 1,
                            timestamp=drive(n).timestamp, who={"vehicle": "VB7"}, **told)
    rows = Rows(e.schema, capacity=capacity)
    rows.append(e)
    at = rng.integers(len(rows), size=50)
    whole, (nstate, flags) = rows.take(at), rows.endings(at)
    assert np.array_equal(nstate, whole.transition[3]) and nstate.dtype == whole.transition[3].dtype and nstate.flags.aligned
    assert all(np.array_equal(flags[name], whole.rows[name]) for name in ("terminated", "truncated"))


def chi_square(counts, chances):
    "How unlikely counts are, in standard deviations (Wilson and Hilferty, 1931)"
    right, n = np.asarray(chances) / np.sum(chances) * np.sum(counts), len(counts) - 1
    if n == 0: return 0
    return ((((counts - right) ** 2 / right).sum() / n) ** (1 / 3) - (1 - 2 / 9 / n)) / np.sqrt(2 / 9 / n)


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


def weights_of(weights, rows):
    "The weight of each row, as a sampler's tree has it"
    return weights.sums.weights[rows.serials(np.arange(len(rows))) % weights.sums.size]


OVER = [Uniform, lambda: Windows(2, burn_in=1, bootstrap=1, edge="strict"), Episodes, lambda: Windows(3, edge="cut")]
SOME = LIVES[1::2]


@pytest.mark.parametrize("options", SOME, ids=str)
@pytest.mark.parametrize("over", range(len(OVER)))
def test_priorities(over, options):
    "Each item has the chance that it was last told, or the largest so far, and late news of what has left changes nothing"
    sampler, plain, top, told = Prioritized(alpha=0.7, over=OVER[over]()), {}, 1.0, []
    for rows, rng in life(**options):
        if rng.random() < 0.3: continue
        here = rows.serials(np.arange(len(rows))).tolist()
        for serials, p in told:
            for i, x in zip(serials.tolist(), p.tolist()):
                if i in plain and i >= rows.oldest():
                    plain[i] = (x + 1e-6) ** 0.7
                    top = max(top, plain[i])
        told = []
        for i in range(rows.oldest(), rows.serial): plain.setdefault(i, top)
        right = np.array([plain[i] for i in here]) * sampler.over.anchors(np.arange(len(rows)), rows)
        if not right.sum():
            with pytest.raises(NotEnoughData): sampler.draw(5, rng, rows)
            continue
        draw = sampler.draw(5, rng, rows)
        found = weights_of(sampler._follow(rows), rows)
        assert np.allclose(found, right, rtol=1e-12, atol=0)
        at = draw.rows if draw.anchor is None else draw.anchor
        assert np.allclose(draw.weight, (right[at] / right[at].min()) ** -0.4)
        counts = np.bincount(np.concatenate([at_of(sampler.draw(20, rng, rows)) for _ in range(30)]), minlength=len(rows))
        right = weights_of(sampler._follow(rows), rows)
        assert not counts[right == 0].any() and chi_square(counts[right > 0], right[right > 0]) < 4
        for _ in range(2):
            told.append((rng.integers(rows.serial + 5, size=6), rng.exponential(size=6)))
            sampler.update(*told[-1])


def at_of(draw): return draw.rows if draw.anchor is None else draw.anchor


@pytest.mark.parametrize("over", range(len(OVER)))
def test_recent(over):
    "With each half-life, of items or of time, the chance is half as much"
    items, time = Recent(3, over=OVER[over]()), Recent("90min", over=OVER[over]())
    for rows, rng in life(2, capacity=60, events=30): weights = time._follow(rows)
    anchors = np.flatnonzero(items.over.anchors(np.arange(len(rows)), rows))
    age = np.arange(len(anchors))[::-1] / 3
    lives = rows.times(anchors) / 90 / 60e6
    for sampler, lives in ((items, -age), (time, lives - lives.max())):
        counts = np.bincount(np.concatenate([at_of(sampler.draw(20, rng, rows)) for _ in range(300)]), minlength=len(rows))
        assert counts.sum() == counts[anchors].sum()
        seen = counts[anchors][2 ** lives > 1e-3]
        assert chi_square(seen, 2 ** lives[2 ** lives > 1e-3]) < 4
    fresh = Recent("90min", over=OVER[over]())._follow(rows)
    assert np.array_equal(weights_of(fresh, rows) / fresh.total, weights_of(weights, rows) / weights.total)


def test_half_lives_without_end():
    "After a thousand half-lives the chances are as fine as on the first day"
    rows, sampler, rng = Rows(drive().schema), Recent("10min"), np.random.default_rng(0)
    for hour in range(300):
        rows.append(drive(2, hour=hour))
        assert sampler.draw(2, rng, rows).rows.min() >= 0
    rows.append(drive(1, hour=299 + 1 / 6))
    right = np.exp2((rows.times(np.arange(len(rows))) - rows.times(np.array([600]))) / 600e6)
    found = weights_of(sampler._follow(rows), rows)
    assert np.allclose(found / found[-1], right) and found[-2] > 0


@pytest.mark.parametrize("options", SOME, ids=str)
@pytest.mark.parametrize("over", range(len(OVER)))
def test_epochs(over, options):
    "No item comes twice in an epoch, and all do that were there from its begin to its end"
    sampler, epoch, seen, there = Epoch(over=OVER[over]()), 0, [], None
    for rows, rng in life(**options):
        anchors = lambda: set(rows.serials(np.flatnonzero(sampler.over.anchors(np.arange(len(rows)), rows))).tolist())
        if not anchors(): continue
        if there is not None: there &= anchors()
        for _ in range(2):
            drawn = rows.serials(at_of(sampler.draw(4, rng, rows))).tolist()
            if sampler.epoch != epoch:
                if there is not None: assert there <= set(seen)
                epoch, seen, there = sampler.epoch, [], anchors()
            if there is None: there = anchors()
            seen += drawn
            assert len(set(seen)) == len(seen) and set(drawn) <= anchors() and 1 <= len(drawn) <= 4


@pytest.mark.parametrize("options", SOME, ids=str)
@pytest.mark.parametrize("over", [Uniform(), Windows(3), Windows(3, edge="cut")], ids=str)
def test_once(over, options):
    "Each item comes once, in order, if it was still there when its turn came"
    sampler, seen, ever = Once(over=over), [], set()
    for rows, rng in life(**options):
        anchors = set(rows.serials(np.flatnonzero(over.anchors(np.arange(len(rows)), rows))).tolist())
        while True:
            due = sorted(i for i in anchors if not seen or i > seen[-1])
            try: drawn = rows.serials(at_of(sampler.draw(3, rng, rows))).tolist()
            except NotEnoughData: break
            assert drawn == [i for i in due if i >= drawn[0]][:3] and len(drawn) == min(3, len(due))
            seen += drawn
        assert not due or options["capacity"]   # in a ring a new first row may anchor a window, behind what was passed
    assert seen == sorted(set(seen))


@pytest.mark.parametrize("options", SOME, ids=str)
@pytest.mark.parametrize("over", range(len(OVER)))
@pytest.mark.parametrize("by", ["driver", ["vehicle", "driver"], lambda row: row["driver"] == "bo"])
def test_balanced(over, options, by):
    "The groups are those of all anchors, and each has the same share"
    sampler, asked = Balanced(by, over=OVER[over]()), []
    names = {drive(hour=h).id: ("VB%d" % (h % 2), ("anna", "bo", "cleo")[h % 3]) for h in range(60)}
    def about(ids):
        asked.extend(ids)
        return pd.DataFrame([names[id] for id in ids], index=ids, columns=["vehicle", "driver"])
    for rows, rng in life(**options):
        if rng.random() < 0.3: continue
        rows.about = about
        anchors = np.flatnonzero(sampler.over.anchors(np.arange(len(rows)), rows))
        ids, which = rows.owners(np.arange(len(rows)))
        right = {}
        for at in anchors.tolist():
            vehicle, driver = names[ids[which[at]]]
            key = driver == "bo" if callable(by) else (driver,) if by == "driver" else (vehicle, driver)
            right.setdefault(key, []).append(int(rows.serials(np.array([at]))[0]))
        groups, alive = sampler._follow(rows)
        assert [groups.of(i).tolist() for i in alive] == [right[key] for key in sorted(right, key=repr)]
        if not right: continue
        seen = np.concatenate([at_of(sampler.draw(50, rng, rows)) for _ in range(10)])
        assert chi_square([np.isin(rows.serials(seen), right[key]).sum() for key in right], np.ones(len(right))) < 4.5
    if not callable(by): assert len(asked) == len(set(asked))


@pytest.mark.parametrize("options", SOME, ids=str)
@pytest.mark.parametrize("over", range(len(OVER)))
def test_fresh(over, options):
    "What is drawn is at most so many versions behind the newest that is there"
    sampler = Fresh("version", most=2, over=OVER[over]())
    version = lambda serials: serials // 6 - (serials * 7919 % 5 == 0)     # rising, with late ones in between
    for rows, rng in life(**options):
        if rng.random() < 0.3: continue
        rows.column = lambda name, at, rows=rows: version(rows.serials(at))
        at = np.arange(len(rows))
        made = version(rows.serials(at))
        right = (made >= made.max() - 2) & sampler.over.anchors(at, rows)
        assert np.array_equal(weights_of(sampler._follow(rows), rows), right)


def ended(seed, capacity=None, drive=drive, once=False):
    "Rows of episodes that terminated, were cut off, or go on, with their first part before others"
    rng, rows, es = np.random.default_rng(seed), Rows(drive().schema, once, capacity), {}
    for h in range(12):
        e = drive(int(rng.choice([1, 2, 5, 12])), hour=h, end=[None, "terminated", "truncated"][h % 3], linked=bool(h % 2))
        es[e.id] = e
    late = []
    for e in es.values():
        cut = int(rng.integers(1, len(e) + 1))
        rows.append(e[:cut])
        if cut < len(e) and rng.random() < 0.7: late.append(e[cut:])
    for e in late: rows.append(e)
    return rows, es


@pytest.mark.parametrize("capacity", [None, 20])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n, k", [(1, 0), (3, 0), (5, 3), (20, 2)])
def test_nstep(n, k, seed, capacity):
    "Return, discount and states are those of a loop over the steps"
    rows, es = ended(seed, capacity)
    sampler, known, gamma = NStep(n, 0.9, over=Stack(k) if k else Uniform()), neighbours(rows), 0.9
    batch = make_batch(rows, sampler.draw(2000, np.random.default_rng(seed), rows))
    assert set(batch.index.tolist()) == set(rows.serials(np.arange(len(rows))).tolist())
    for b, (serial, id, step) in enumerate(zip(batch.index, batch.episode, batch.step)):
        e, (mine, i) = es[id], known[int(rows.find(np.array([serial]))[0])]
        total, factor = 0.0, 1.0
        for j in range(n):
            total += factor * float(e.reward[step + j]); factor *= gamma
            if e.terminated[step + j] or e.truncated[step + j] or i + j + 1 == len(mine) or j + 1 == n: break
        last = step + j
        assert np.isclose(batch.reward[b], total, rtol=1e-5, atol=1e-6) and batch.reward.dtype == "float32"
        assert np.isclose(batch.discount[b], 0 if e.terminated[last] else factor)
        assert batch.terminated[b] == e.terminated[last] and batch.truncated[b] == e.truncated[last]
        assert np.array_equal(batch.action[b], e.action[step])
        head = step - i
        if not k: assert np.array_equal(batch.state[b], e.state[step]) and np.array_equal(batch.nstate[b], e.nstate[last])
        else:
            assert np.array_equal(batch.state[b], [e.state[max(head, step + o)] for o in range(1 - k, 1)])
            assert np.array_equal(batch.nstate[b], [*(e.state[max(head, last + o)] for o in range(2 - k, 1)), e.nstate[last]])


def near(achieved, desired, info): return np.linalg.norm(achieved - desired, axis=-1) < 1
def worth(achieved, desired, info): return 100 - np.linalg.norm(achieved - desired, axis=-1)   # no recorded reward is so large
def relabel(*args, **options): return Relabel({"target": "position"}, worth, *args, **options)


def goals_of(e, steps):
    "For each of some steps what was achieved by it"
    return {tuple(e.nstate[j, :2].tolist()): j for j in steps}


def field_of(batch, role, name): return batch.fields(role)[name]


def relabelled(rows, es, hidden=()):
    "The rows of `ended`, with some episodes hidden"
    for id in hidden:
        fork = rows.fork(); fork.hide([id]); rows.merge(fork)()
    return rows, es, {r: [int(s) for s in rows.places(np.array(e))[2]] for e in rows.episodes() for r in e.tolist()}


@pytest.mark.parametrize("capacity, once", [(None, False), (None, True), (25, False), (25, True)])
@pytest.mark.parametrize("ends", [None, near])
@pytest.mark.parametrize("strategy", ["future", "final", "episode"])
def test_relabel(strategy, ends, capacity, once):
    "Goals were reached by steps that may be, rewards and flags are those of a loop, and all else is as it was recorded"
    rows, es = ended(5, capacity, errand, once)
    rows, es, steps = relabelled(rows, es, list(es)[9:10])
    batch = make_batch(rows, relabel(strategy, share=0.5, terminated=ends).draw(1500, np.random.default_rng(1), rows))
    assert set(batch.index.tolist()) == set(rows.serials(np.arange(len(rows))).tolist()) and batch.mask.shape == (1500,)
    seen, new, now, after = set(), 0, batch.fields("state"), batch.fields("nstate")
    for b, (id, step, at) in enumerate(zip(batch.episode, batch.step, rows.find(batch.index).tolist())):
        e, there, target, position = es[id], steps[at], now["target"][b], after["position"][b]
        assert np.array_equal([*now["position"][b], now["slope"][b]], e.state[step, [0, 1, 4]]) and np.array_equal(batch.action[b], e.action[step])
        assert np.array_equal([*position, after["slope"][b]], e.nstate[step, [0, 1, 4]]) and np.array_equal(target, after["target"][b])
        right, flags = e.reward[step], (bool(e.terminated[step]), bool(e.truncated[step]))
        if not np.array_equal(target, e.state[step, 2:4]):
            may = {"future": [j for j in there if j >= step], "final": there[-1:], "episode": there}[strategy]
            seen.add((id, step, goals_of(e, may)[tuple(target.tolist())]))
            right, new = np.float32(100 - np.linalg.norm(position - target)), new + 1
            if ends: flags = (got := bool(np.linalg.norm(position - target) < 1)), any(flags) and not got
        assert np.isclose(batch.reward[b], right) and (batch.terminated[b], batch.truncated[b]) == flags
    assert abs(new - 750) < 4 * np.sqrt(375) and batch.reward.dtype == "float32"
    assert len(seen) > 15 and (strategy != "episode" or any(j < step for _, step, j in seen))


@pytest.mark.parametrize("strategy", ["future", "final", "episode"])
def test_relabel_chances(strategy):
    "Each step that may give the goal is as likely as any other, and the share is kept, both by chance and for each item alone"
    rows, es = ended(2, 40, errand)
    draw = relabel(strategy, share=0.7).draw(40_000, np.random.default_rng(3), rows)
    at, goal, chosen = draw.rows[:, 0], draw.rows[:, 1], draw.mask[:, 1]
    assert draw.mask[:, 0].all() and abs(chosen.sum() - 28_000) < 4 * np.sqrt(40_000 * 0.21)
    assert abs((chosen[1:] & chosen[:-1]).mean() - 0.49) < 0.02
    for r, (e, i) in neighbours(rows).items():
        may = {"future": e[i:], "final": e[-1:], "episode": e}[strategy]
        counts = np.bincount(goal[chosen & (at == r)], minlength=len(rows))
        assert counts.sum() == counts[may].sum() and chi_square(counts[may], np.ones(len(may))) < 4


@pytest.mark.parametrize("capacity", [None, 25])
@pytest.mark.parametrize("ends", [None, near])
def test_relabel_nstep(ends, capacity):
    "A return of several steps has one goal, each of its steps the reward of that, and ends where an episode does"
    rows, es = ended(6, capacity, errand)
    rows, es, steps = relabelled(rows, es)
    sampler = relabel(share=1, terminated=ends, over=NStep(4, 0.9, over=Prioritized()))
    batch = make_batch(rows, sampler.draw(1000, np.random.default_rng(1), rows))
    assert batch.weight.shape == (1000,) and np.array_equal(batch.anchor, batch.index)
    for b, (id, step, at) in enumerate(zip(batch.episode, batch.step, rows.find(batch.index).tolist())):
        e, there, target = es[id], steps[at], batch.state[b, 2:4]
        assert goals_of(e, [j for j in there if j >= step])[tuple(target.tolist())] >= step
        total, factor = 0.0, 1.0
        for j in range(step, min(step + 4, there[-1] + 1)):
            away, ended_there = np.linalg.norm(e.nstate[j, :2] - target), bool(e.terminated[j] or e.truncated[j])
            total += factor * (100 - away); factor *= 0.9
            done = away < 1 if ends else bool(e.terminated[j])
            if done or ended_there: break
        assert np.isclose(batch.reward[b], total, rtol=1e-5) and np.isclose(batch.discount[b], 0 if done else factor)
        assert batch.terminated[b] == done and batch.truncated[b] == (ended_there and not done)
        assert np.array_equal(batch.nstate[b], [*e.nstate[j, :2], *target, e.nstate[j, 4]]) and np.array_equal(batch.state[b, :2], e.state[step, :2])


def test_relabel_sequences():
    "All steps of a window, a stack or an episode have one goal; what is padding stays zero, and can be traced as ever"
    rows, es = ended(7, None, errand)
    for over in (Windows(4, burn_in=2, bootstrap=1), Windows(3, edge="cut"), Episodes(), Balanced("driver", over=Windows(2, edge="strict")), Stack(3), NStep(2, 1, over=Stack(3))):
        if isinstance(over, Balanced): rows.about = lambda ids: pd.DataFrame({"driver": [es[id].who["driver"] for id in ids]}, index=ids)
        old = make_batch(rows, over.draw(300, np.random.default_rng(1), rows))
        new, none = (make_batch(rows, relabel(share=share, over=over).draw(300, np.random.default_rng(1), rows)) for share in (1, 0))
        assert more(none) == more(old)
        same = {name: x for name, x in more(new).items() if name not in ("state", "reward", "nstate")}
        assert same == {name: x for name, x in more(none).items() if name in same}
        stacked = isinstance(over, Stack) or isinstance(over, NStep)
        real = np.ones(new.state.shape[:2], bool) if stacked else new.mask
        for role in ("state", "nstate"):
            goals, place = field_of(new, role, "target"), field_of(new, role, "position")
            assert np.array_equal(place, field_of(old, role, "position")) and not goals[~real].any()
            assert all(len(np.unique(g[r], axis=0)) == 1 for g, r in zip(goals, real))
        if not stacked: assert np.allclose(new.reward, np.where(real, worth(place, goals, {}), 0))
        elif isinstance(over, Stack): assert np.allclose(new.reward, worth(place[:, -1], goals[:, -1], {}))


def test_relabel_asks():
    "Several fields go by name, the info comes with them, kinds of fields lie as they lie, and no array is the batch's own"
    n, t = 6, pd.date_range("2026-01-01", periods=6, freq="1s", tz="UTC")
    count = np.arange(n)
    fields = lambda k: {"image": np.tile((count + k).astype("uint8")[:, None, None], (1, 2, 3)), "wanted": np.zeros((n, 2, 3), "uint8"),
                        "height": count + k + 0.25, "top": np.zeros(n)}
    e = Episode.from_arrays(state=fields(0), nstate=fields(1), action=count.astype("float32"), reward=np.full(n, 7, "int16"), timestamp=t, who={"robot": "R2"},
                            info={"grip": count.astype("int8")}, terminated=count == n - 1)
    asked = []
    def reward(achieved, desired, info):
        asked.append((achieved, desired, info))
        found = (achieved["wanted"] == desired["wanted"]).all((1, 2)) & (achieved["top"] == desired["top"])
        for a in (*achieved.values(), *desired.values(), *info.values()): a[...] = 1
        return found
    buffer = MemoryBuffer(batch_size=500, seed=1, sampler=Relabel({"wanted": "image", "top": "height"}, reward, share=0.9))
    buffer.store(e)
    batch = buffer.sample()
    state, after = batch.fields("state"), batch.fields("nstate")
    new = state["top"] != 0
    (achieved, desired, info), = asked
    assert new.sum() == len(info["grip"]) and list(achieved) == list(desired) == ["wanted", "top"] and list(info) == ["grip"]
    assert desired["wanted"].shape == (new.sum(), 2, 3) and desired["top"].shape == (new.sum(),)
    assert np.array_equal(state["image"][:, 0, 0], batch.step) and np.array_equal(after["height"], batch.step + 1.25) and np.array_equal(batch.fields("info")["grip"], batch.step)
    assert (state["wanted"][new] == np.floor(state["top"][new])[:, None, None].astype("uint8")).all() and not state["wanted"][~new].any()
    assert np.array_equal(batch.reward, np.where(new, after["height"] == after["top"], 7)) and batch.reward.dtype == "int16"
    assert np.array_equal(batch.terminated, batch.step == n - 1)
    for wrong, error in ((lambda a, d, i: 0.0, QueryError), (lambda a, d, i: [None] * len(a["top"]), QueryError), (lambda a, d, i: a["top"] + 0.5, SchemaError),
                         (lambda a, d, i: np.full(len(a["top"]), 1e9), SchemaError), (lambda a, d, i: a["top"][1:], QueryError)):
        state, buffer.sampler = buffer.state_dict(), Relabel({"wanted": "image", "top": "height"}, wrong)
        for _ in range(2):
            with pytest.raises(error): buffer.sample()
        assert buffer.state_dict()["rng"] == state["rng"], "a draw that failed leaves no trace"
    for goal in ({"top": "image"}, {"wanted": "height"}, {"top": "grip"}, {"tip": "height"}):
        buffer.sampler = Relabel(goal, reward)
        with pytest.raises(QueryError, match="goal: "): buffer.sample()


def filled(pool, drive=errand):
    "A pool of episodes of many lengths, two of which came in parts"
    pool.extend([drive(n, hour=h, driver=d) for h, (n, d) in enumerate([(1, "anna"), (9, "bo"), (30, "anna"), (4, "cleo"), (2, "bo")])])
    pool.store(drive(7, hour=9)[:3]); pool.store(drive(6, hour=8)[:2]); pool.store(drive(7, hour=9))
    return pool


SAMPLERS = [Uniform, Episodes, lambda: Episodes(buckets=3), lambda: Windows(4, burn_in=2, bootstrap=1), lambda: Windows(4, edge="strict"),
            lambda: Windows(3, edge="cut"), lambda: Windows(5, seconds=2.5), lambda: Stack(3), Prioritized,
            lambda: Prioritized(over=Windows(4, edge="strict")), lambda: Recent(7), lambda: Recent("2h", over=Episodes()), Epoch,
            lambda: Epoch(drop_last=True, over=Windows(3, burn_in=1, edge="cut")), Once, lambda: Balanced("driver"),
            lambda: Balanced(lambda row: row["seq_len"] > 5, over=Windows(2, edge="strict")), lambda: NStep(3, 0.9),
            lambda: NStep(3, 0.9, over=Prioritized(over=Stack(2))), lambda: NStep(2, 1, over=Epoch()),
            relabel, lambda: relabel("final", over=Prioritized(over=Windows(3)), terminated=near), lambda: relabel("episode", over=NStep(3, 0.9, over=Epoch()))]


def more(batch):
    "Everything that a batch says, also what only some samplers give"
    return {**batch_facts(batch), "learn": batch.learn.tolist(), "anchor": batch.anchor.tolist(),
            "discount": batch.discount.tolist() if "discount" in dir(batch) else None}


def nest(sampler):
    "A sampler, and what it goes around"
    while sampler is not None: yield sampler; sampler = getattr(sampler, "over", None)


def learn(buffer, batches=3):
    "What a learner gets, that tells priorities where the sampler wants them"
    for _ in range(batches):
        try: batch = buffer.sample()
        except NotEnoughData as e: yield str(e)
        else:
            yield more(batch)
            if any(isinstance(s, Prioritized) for s in nest(buffer.sampler)):
                buffer.update_priorities(batch.anchor, batch.anchor % 7 / 3)


@pytest.mark.parametrize("number", range(len(SAMPLERS)))
def test_every_buffer(number, tmp_path):
    "A seed gives the same batches from memory, from a lake, and from rows in a mapped file, before and after a refresh"
    make, options = SAMPLERS[number], dict(batch_size=6, seed=3)
    pools = [filled(MemoryPool()), filled(DaskPool(str(tmp_path / "lake")))]
    buffers = [MemoryBuffer(pool=pools[0], sampler=make(), **options), MemoryBuffer(pool=pools[0], states="once", sampler=make(), **options),
               DaskBuffer(pool=pools[1], sampler=make(), **options),
               DaskBuffer(pool=pools[1], resident="mapped", cache=str(tmp_path / "cache"), sampler=make(), **options)]
    for _ in range(2):
        facts = [list(learn(b)) for b in buffers]
        assert all(f == facts[0] for f in facts)
        for pool in pools:
            pool.delete(PoolQuery(driver="cleo")); pool.store(errand(12, hour=20)[:5]); pool.store(errand(6, hour=8))
        for b in buffers: b.refresh()


@pytest.mark.parametrize("capacity", [None, 25])
@pytest.mark.parametrize("number", range(len(SAMPLERS)))
def test_resume(number, capacity, tmp_path):
    "A learner that was stopped goes on, through refreshes and with a ring, as if it had not been"
    pool, options = filled(MemoryPool()), dict(batch_size=3, capacity=capacity)
    buffer = MemoryBuffer(pool=pool, sampler=SAMPLERS[number](), seed=3, **options)
    for turn in range(4):
        for _ in learn(buffer, 2): pass
        other = MemoryBuffer(pool=pool, sampler=SAMPLERS[number](), **options)
        buffer.save_state(tmp_path / "learner.state")
        other.load_state(tmp_path / "learner.state")
        assert list(learn(other)) == list(learn(buffer))
        pool.store(errand(8, hour=30 + turn)); pool.store(errand(12, hour=20)[:3 * turn + 1])
        if turn == 2: pool.delete(PoolQuery(driver="bo"))
        for b in (buffer, other): b.refresh()
        assert list(learn(other)) == list(learn(buffer))


@pytest.mark.parametrize("number", range(len(SAMPLERS)))
def test_interrupted(number):
    "A draw that breaks off anywhere was made or was not: the next ones are those that follow, bit for bit"
    for line in range(1, 400, 41):
        pool, make, options = filled(MemoryPool()), SAMPLERS[number], dict(batch_size=3, seed=3, capacity=40)
        one, two, three = buffers = [MemoryBuffer(pool=pool, sampler=make(), **options) for _ in range(3)]
        for b in buffers: list(learn(b, 2))
        pool.store(errand(8, hour=30))
        if line % 2: pool.delete(PoolQuery(driver="cleo"))
        for b in buffers: b.refresh()
        left = [line]
        def trace(frame, event, arg):
            if "storage/buffer" not in frame.f_code.co_filename: return None
            if event == "line":
                left[0] -= 1
                if left[0] == 0: raise KeyboardInterrupt
            return trace
        before = sys.gettrace()
        sys.settrace(trace)
        try: one.sample()
        except (KeyboardInterrupt, NotEnoughData): pass
        finally: sys.settrace(before)
        try: three.sample()
        except NotEnoughData: pass
        right = [list(learn(three))] if left[0] > 0 else [list(learn(two)), list(learn(three))]
        assert list(learn(one)) in right


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster, distributed.Client(cluster) as client:
        yield client


@pytest.mark.parametrize("number", range(8, len(SAMPLERS)))
def test_look_ahead(number, tmp_path, cluster):
    "Batches that travel ahead from a cluster are those that memory gives, also where priorities come meanwhile"
    make = SAMPLERS[number]
    lake = filled(DaskPool(str(tmp_path / "lake")))
    near, far = MemoryBuffer(pool=filled(MemoryPool()), batch_size=4, seed=1, sampler=make()), DaskBuffer(
        pool=lake, batch_size=4, seed=1, resident="cluster", prefetch=2, sampler=make())
    assert list(learn(far, 7)) == list(learn(near, 7))


def test_refused():
    "What cannot be nested, and what makes no sampler, is refused when it is made"
    for wrong in (lambda: Prioritized(over=Prioritized()), lambda: Epoch(over=NStep(3, 0.9)), lambda: NStep(3, 0.9, over=Episodes()),
                  lambda: NStep(3, 0.9, over=NStep(3, 0.9)), lambda: NStep(3, 0.9, over=relabel()), lambda: Prioritized(over=relabel()),
                  lambda: relabel(over=relabel()), lambda: relabel("past"), lambda: relabel(share=1.5), lambda: relabel(over=None), lambda: relabel(terminated=True),
                  lambda: Relabel({"target": "position"}, None), lambda: Relabel({}, worth), lambda: Relabel({"a": "b", "b": "c"}, worth), lambda: Relabel({"a": ["b"]}, worth), lambda: Once(over=Windows(3, edge="strict")), lambda: Windows(0), lambda: NStep(3, 1.1),
                  lambda: Windows(3, edge="round"), lambda: Windows(3, seconds=-1), lambda: Stack(0), lambda: Recent(0), lambda: Recent("-3d"),
                  lambda: Balanced(by=[]), lambda: Balanced(by=3), lambda: Prioritized(alpha=-1), lambda: Prioritized(beta="much"), lambda: Fresh("version", most=-1)):
        with pytest.raises(QueryError): wrong()


def test_states_of_others():
    "A state that was drawn over other items, or is damaged, is refused and changes nothing"
    pool = filled(MemoryPool())
    buffer = MemoryBuffer(pool=pool, batch_size=3, sampler=Prioritized(), seed=1)
    buffer.sample()
    state, right = buffer.state_dict(), buffer.state_dict()
    for name, value in dict(over={"kind": "Episodes"}, chances="AAAA", upto=10**9, low=-1, given=[["AAAAAAAAAAA=", ""]], top=-1).items():
        with pytest.raises(QueryError): buffer.load_state_dict({**state, "sampler": {**state["sampler"], name: value}})
    assert same_state(buffer.state_dict(), right)
    for sampler in (Epoch(), Once()):
        buffer = MemoryBuffer(pool=pool, batch_size=3, sampler=sampler, seed=1)
        buffer.sample()
        state = through_json(buffer.state_dict())
        with pytest.raises(QueryError): buffer.load_state_dict({**state, "sampler": {**state["sampler"], "at": [1, 2]}})


OTHERS = [(Windows(8), Windows(4)), (Windows(4), Windows(4, edge="cut")), (Epoch(drop_last=True), Epoch()), (Epoch(), Epoch(shuffle=False)), (Recent("30d"), Recent(7)),
          (Prioritized(over=Windows(8)), Prioritized(over=Windows(4))), (NStep(3, 0.9), NStep(3, 0.8)), (NStep(3, 0.9, over=Epoch()), NStep(3, 0.9, over=Epoch(drop_last=True))),
          (NStep(3, 0.9, over=Prioritized(over=Stack(2))), NStep(3, 0.9, over=Prioritized(over=Stack(4)))), (Balanced("driver"), Balanced(["driver", "vehicle"])),
          (relabel("final"), relabel()), (relabel(share=0.5), relabel()), (relabel(over=NStep(3, 0.9)), relabel(over=NStep(2, 0.9))), (Episodes(buckets=2), Episodes()), (Episodes(), Uniform())]


@pytest.mark.parametrize("told, mine", OTHERS, ids=str)
def test_states_of_other_options(told, mine):
    "A state that was drawn by other options is refused by an error that says both, either way; nothing changes"
    pool = filled(MemoryPool())
    for told, mine in ((told, mine), (mine, told)):
        one, other = (MemoryBuffer(pool=pool, batch_size=3, seed=seed, sampler=copy.deepcopy(s)) for seed, s in enumerate((told, mine)))
        for b in (one, other): b.sample()
        before, state = other.state_dict(), one.state_dict()
        with pytest.raises(QueryError) as e: other.load_state_dict(state)
        inner, own = list(nest(told)), list(nest(mine))
        which = next(i for i, (a, b) in enumerate(zip(inner, own)) if not same_state(sampler_state(a) | {"over": 0}, sampler_state(b) | {"over": 0}))
        assert f"drawn by {type(inner[which]).__name__}(" in str(e.value) and f"the sampler here is {own[which]!r}" in str(e.value)
        assert same_state(other.state_dict(), before)
        again = MemoryBuffer(pool=pool, batch_size=3, seed=9, sampler=copy.deepcopy(told))
        again.load_state_dict(state)
        assert list(learn(again)) == list(learn(one))


def without_options(state):
    "A state as it was before it said the options of a sampler"
    return {name: without_options(x) if isinstance(x, dict) else x for name, x in state.items() if name != "options"}


@pytest.mark.parametrize("number", range(len(SAMPLERS)))
def test_states_that_say_no_options(number):
    "A state of former days says nothing about options, and is gone on from"
    pool, options = filled(MemoryPool()), dict(batch_size=3)
    one, other = (MemoryBuffer(pool=pool, sampler=SAMPLERS[number](), seed=seed, **options) for seed in (1, 2))
    list(learn(one))
    other.load_state_dict(without_options(one.state_dict()))
    assert list(learn(other)) == list(learn(one))


class Warm(Uniform):
    "A user's sampler, whose option changes while it learns and is part of its state, and which has functions"
    def __init__(self, heat=1.0, cool=None, **more): self.heat, self.cool = heat, cool
    def state_dict(self): return {"heat": self.heat}
    def load_state_dict(self, state): self.heat = state["heat"]


def test_options_that_change():
    "What a state restores, and what is no plain value, is no reason to refuse it; a state whose options are none is"
    pool = filled(MemoryPool())
    one = MemoryBuffer(pool=pool, batch_size=3, sampler=Warm(2.0, cool=np.tanh), seed=1)
    one.sample()
    other = MemoryBuffer(pool=pool, batch_size=3, sampler=Warm(cool=np.float64(0.5)))
    other.load_state_dict(state := through_json(one.state_dict()))
    assert other.sampler.heat == 2.0 and np.array_equal(other.sample().index, one.sample().index)
    sampler = Prioritized()
    sampler.beta = np.float32(0.5)
    for options in (7, [], {"heat": 1, "cold": 2}, {"seed": None}):
        with pytest.raises(QueryError): other.load_state_dict({**state, "sampler": {**state["sampler"], "options": options}})
    assert sampler_state(Windows(np.int64(4)))["options"]["length"] == 4 and "by" not in sampler_state(Balanced(len)).get("options", {})


def test_another_query():
    "Serial numbers begin anew with another query, and so does what was remembered by them"
    pool = filled(MemoryPool())
    for sampler in (Prioritized(alpha=1), Epoch(), Once()):
        buffer = MemoryBuffer(pool=pool, batch_size=4, sampler=sampler, seed=1)
        batch = buffer.sample()
        if isinstance(sampler, Prioritized): buffer.update_priorities(np.arange(9), np.full(9, 1e9))
        buffer.query = PoolQuery(driver="anna")
        seen = [buffer.sample(len(buffer)) for _ in range(3 if isinstance(sampler, Prioritized) else 1)]
        if isinstance(sampler, Prioritized): assert all((b.weight == 1).all() for b in seen)
        else: assert sorted(seen[0].index.tolist()) == list(range(len(buffer)))


def test_batches_travel():
    "A batch that was sent to another process says what it said here"
    for make in SAMPLERS:
        batch = MemoryBuffer(pool=filled(MemoryPool()), batch_size=4, seed=1, sampler=make()).sample()
        again = pickle.loads(pickle.dumps(batch))
        assert more(again) == more(batch) and dir(again) == dir(batch)
