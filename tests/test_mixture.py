"""A mixture against its members drawn alone, and against what breaks off in the middle, in memory, in a ring and in a lake."""
import _thread
import multiprocessing
import pickle
import sys
import threading
import time
from fractions import Fraction

import numpy as np
import pytest

from data_io_nbdev import (DaskBuffer, DaskPool, Episode, Episodes, Epoch, MemoryBuffer, MemoryPool, Mixture, NStep, PoolQuery, Prioritized, Stack,
                           Uniform, Windows)
from data_io_nbdev.errors import NotEnoughData, QueryError, SchemaError, SnapshotNotFound
from data_io_nbdev.storage.buffer.buffer import Buffer
from data_io_nbdev.storage.buffer.mixture import share_out
from data_io_nbdev.storage.buffer.sampler import Sampler
from data_io_nbdev.storage.buffer.state import same_state
from data_io_nbdev.testing import batch_facts, drive, through_json

NAMES = ("mask", "weight", "learn", "terminated", "truncated", "episode", "step", "timestamp", "index", "anchor")


def filled(pool, *hours):
    pool.extend([drive(int(2 + 5 * h % 13), hour=h, driver="anna" if h % 2 else "bo") for h in hours])
    return pool


@pytest.fixture(scope="module")
def lake(tmp_path_factory): return filled(DaskPool(str(tmp_path_factory.mktemp("mixed") / "lake")), *range(6))


def members(lake, sampler=Uniform, **options):
    "A lake, a ring with a pool of its own, and rows that keep each state once"
    ring = MemoryBuffer(batch_size=4, capacity=15, seed=2, sampler=sampler(), **options)
    for h in (50, 51, 52): ring.store(drive(7, hour=h))
    return [DaskBuffer(pool=lake, batch_size=4, seed=1, sampler=sampler(), resident="memory", **options), ring,
            MemoryBuffer(pool=lake, batch_size=4, seed=3, states="once", sampler=sampler(), **options)]


def facts(batch): return {**batch_facts(batch), **{name: getattr(batch, name).tolist() for name in ("learn", "anchor", "source")}}


def drawn(mixture, n=3): return [facts(mixture.sample()) for _ in range(n)]


# --- how many from each ---

def test_shares():
    "As exact arithmetic has it, for thousands of shares: in all n, never a whole item off, ties to the first, the same each time"
    rng = np.random.default_rng(0)
    for _ in range(3000):
        tenths = rng.integers(0, 30, rng.integers(1, 6))
        if not tenths.any(): continue
        n, shares = int(rng.integers(1, 300)), tuple(float(i) / 10 for i in tenths)
        exact = [n * Fraction(int(i), int(tenths.sum())) for i in tenths]
        right = [int(x) for x in exact]
        for i in sorted(range(len(exact)), key=lambda i: (right[i] - exact[i], i))[:n - sum(right)]: right[i] += 1
        assert share_out(n, shares) == tuple(right) and sum(right) == n
        assert all(r == 0 for r, i in zip(right, tenths) if not i)


def test_every_batch():
    "A function of the number of the draw is asked once a draw, also for a draw of another size, and not for one that failed"
    asked, one, two = [], *(MemoryBuffer(batch_size=1, seed=s) for s in (1, 2))
    one.store(drive(9))
    mixture = Mixture({one: 1, two: lambda draw: asked.append(draw) or draw}, batch_size=4)
    assert mixture.sample().source.tolist() == [0] * 4
    for _ in range(2):
        with pytest.raises(NotEnoughData, match="member 1"): mixture.sample()
    two.store(drive(3, hour=1))
    assert [np.bincount(mixture.sample(n).source).tolist() for n in (6, 6, 8)] == [[3, 3], [2, 4], [2, 6]]
    assert asked == [0, 1, 1, 1, 2, 3]
    assert mixture.shares == (0.2, 0.8)


# --- what a batch is ---

SAMPLERS = [Uniform, Episodes, lambda: Windows(3, burn_in=1, edge="cut"), lambda: Stack(3), Prioritized, lambda: NStep(3, 0.9), Epoch]


@pytest.mark.parametrize("number", range(len(SAMPLERS)))
@pytest.mark.parametrize("which", [(0, 1), (1, 2), (2, 1, 0)], ids=str)
def test_oracle(lake, number, which):
    "A batch is the members' own batches one behind the other, whatever is asked of it"
    make = SAMPLERS[number]
    ours, twins = ([members(lake, make)[i] for i in which] for _ in range(2))
    shares = (0.5, 0.3, 0.2)[:len(which)]
    mixture = Mixture(dict(zip(ours, shares)), batch_size=11)
    for n in (11, 11, 6):
        batch = mixture.sample(n)
        own = [twin.sample(k) for twin, k in zip(twins, share_out(n, shares))]
        long = batch.mask.ndim > 1
        assert batch.source.tolist() == [i for i, b in enumerate(own) for _ in range(len(b[0]))]
        assert batch.mask.shape[1:] == max(b.mask.shape[1:] for b in own)
        for i, (b, at) in enumerate(zip(own, np.cumsum([0] + [len(b[0]) for b in own]))):
            mine = (slice(at, at + len(b[0])), *[slice(b.mask.shape[-1])] * long)
            assert not long or not batch.mask[mine[0], b.mask.shape[-1]:].any()
            for role in ("state", "action", "reward", "nstate"):
                assert getattr(batch, role).dtype == getattr(b, role).dtype
                assert np.array_equal(getattr(batch, role)[mine], getattr(b, role))
            for name in NAMES:
                right, found = getattr(b, name), getattr(batch, name)
                if name in ("index", "anchor"): right = np.where(right < 0, right, right * len(which) + i)
                assert np.array_equal(found[mine[:found.ndim]], right, equal_nan=right.dtype.kind == "M"), name
        if long: assert not batch.state[~batch.mask].any() and (batch.step[~batch.mask] == -1).all()
        assert ("discount" in dir(batch)) == (number == 5)
        if number == 5: assert np.array_equal(batch.discount, np.concatenate([b.discount for b in own]))
        assert len(batch.frames()[0]) == batch.mask.sum() if not number == 3 else True
        again = pickle.loads(pickle.dumps(batch))
        assert facts(again) == facts(batch) and dir(again) == dir(batch) and again._repr_html_()
        for a in batch: a[...] = 0          # it belongs to whoever drew it
    for ours_, twin in zip(ours, twins): assert batch_facts(ours_.sample()) == batch_facts(twin.sample())


def test_same_bits_as_rows(lake):
    "Rows come from the pools as they are named, in a large batch and in one of a single row"
    mixture = Mixture(dict(zip(members(lake), (1, 2, 3))), batch_size=200)
    for n in (None, 1):
        batch = mixture.sample(n)
        for row, (i, id, step) in enumerate(zip(batch.source, batch.episode, batch.step)):
            e = mixture.members[i].pool[id]
            for role in ("state", "action", "reward", "nstate"): assert np.array_equal(getattr(batch, role)[row], getattr(e, role)[step])


def test_shapes_that_differ(lake):
    "Single steps and sequences, and states side by side in one only, are refused, and nothing was drawn"
    for wrong in (Windows(3), Stack(3)):
        (a, b, _), (c, d, _) = (members(lake) for _ in range(2))
        b.sampler = wrong
        with pytest.raises(QueryError, match="the same kind of sampler"): Mixture({a: 1, b: 1}, batch_size=4).sample()
        b.sampler = Uniform()
        assert [batch_facts(x.sample()) for x in (a, b)] == [batch_facts(x.sample()) for x in (c, d)]


def test_schemas(lake):
    "Fields that differ are named with the select that helps; with it the same fields meet, and who drove may differ"
    e = drive(9)
    state = {"slope": e.state[:, 2], "heat": e.state[:, 0], "velocity": e.state[:, :2]}
    options = dict(action={"pedal": e.action[:, 0], "brake": e.action[:, 1]}, reward={"work": e.reward}, timestamp=e.timestamp,
                   info={"load": e.reward})
    pool = MemoryPool()
    pool.store(Episode.from_arrays(state=state, nstate=state, who={"rig": "R1"}, **options))
    mixture = Mixture({DaskBuffer(pool=lake, batch_size=2, resident="memory"): 1, MemoryBuffer(pool=pool, batch_size=2): 1}, batch_size=4)
    for ask in (mixture.sample, mixture.load):
        with pytest.raises(SchemaError, match="member 1 has state heat.*select={'state': \\['velocity', 'slope'\\]}"): ask()
    some = dict(select={"state": ["velocity", "slope"]}, batch_size=2)
    mixture = Mixture({DaskBuffer(pool=lake, resident="memory", **some): 1, MemoryBuffer(pool=pool, **some): 1}, batch_size=4)
    batch = mixture.sample()
    assert [f.name for f in batch.schema.of("state")] == ["velocity", "slope"] and batch.state.shape == (4, 3)
    assert np.array_equal(batch.fields("state")["slope"][2:], e.state[batch.step[2:], 2]) and batch.schema.identity == ()
    assert "info" not in dir(batch)
    with pytest.raises(AttributeError, match="no info, or not the same"): batch.info
    loaded = MemoryBuffer(pool=pool, batch_size=2)
    loaded.load()
    with pytest.raises(SchemaError, match="member 1"): Mixture({mixture.members[0]: 1, loaded: 1}, batch_size=4)   # at once, where both are known
    both = Mixture({loaded: 1, MemoryBuffer(pool=pool, batch_size=2): 1}, batch_size=4).sample()
    assert np.array_equal(both.info.ravel(), e.reward[both.step])


def test_nested(lake):
    "A mixture of mixtures draws what its leaves would, numbers each row once, and tells priorities to where they belong"
    a, b, c = members(lake, lambda: Prioritized(alpha=1, eps=0))
    twins = members(lake, lambda: Prioritized(alpha=1, eps=0))
    inner = Mixture({a: 1, b: 1}, batch_size=2)
    mixture = Mixture({inner: 2, c: 1}, batch_size=12)
    batch = mixture.sample()
    assert batch.source.tolist() == [0] * 8 + [1] * 4
    own = [t.sample(4) for t in twins]
    assert np.array_equal(batch.state, np.concatenate([x.state for x in own]))
    names = np.concatenate([own[0].index * 2 * 2, (own[1].index * 2 + 1) * 2, own[2].index * 2 + 1])
    assert np.array_equal(batch.index, names)
    mixture.update_priorities(batch.anchor, np.arange(12.0))
    for i, t in enumerate(twins): t.update_priorities(own[i].anchor, np.arange(12.0)[4 * i:4 * i + 4])
    assert [batch_facts(x.sample()) for x in (a, b, c)] == [batch_facts(t.sample()) for t in twins]


# --- priorities ---

def test_priorities(lake):
    "Members without priorities are passed over, late ones are harmless, and a refusal or Ctrl-C tells nobody"
    class Picky(Uniform):
        def update(self, serials, priority): raise QueryError("not these")
    a, b, c = members(lake)
    mixture = Mixture({a: 1, b: 1, c: 1}, batch_size=9)
    with pytest.raises(QueryError, match="no member of this mixture"): mixture.update_priorities([0], [1.0])
    a.sampler, b.sampler = Prioritized(), NStep(2, 0.9, over=Prioritized())
    early = mixture.sample()
    for h in (60, 61, 62): b.store(drive(7, hour=h))     # all that the ring had is gone
    before = mixture.state_dict()
    mixture.update_priorities(early.anchor, np.arange(9.0))
    assert not same_state(mixture.state_dict(), before)
    expected = drawn(mixture)
    assert len(expected) == 3
    before = mixture.state_dict()
    for wrong in ((early.anchor, np.full(9, np.nan)), (early.anchor, np.arange(8.0)), (early.state, np.arange(9.0))):
        with pytest.raises(QueryError): mixture.update_priorities(*wrong)
        assert same_state(mixture.state_dict(), before)
    before = [a.state_dict(), b.state_dict()]
    c.sampler = Picky()
    with pytest.raises(QueryError, match="not these"): mixture.update_priorities(early.anchor, np.arange(9.0))
    assert same_state([a.state_dict(), b.state_dict()], before)


# --- all members or none ---

def interrupted(line, call):
    "Call, with Ctrl-C before so many lines of the buffers were run; how many were left"
    left = [line]
    def trace(frame, event, arg):
        if "storage/buffer" not in frame.f_code.co_filename: return None
        if event == "line":
            left[0] -= 1
            if left[0] == 0: raise KeyboardInterrupt
        return trace
    before = sys.gettrace()
    sys.settrace(trace)
    try: call()
    except KeyboardInterrupt: pass
    finally: sys.settrace(before)
    return left[0]


class Grudging(Sampler):
    "Raises at some of its draws, after it has used the generator"
    def __init__(self, *when): self.when, self.draws = when, 0
    def draw(self, n, rng, rows):
        self.draws += 1
        drawn = Uniform().draw(n, rng, rows)
        if self.draws in self.when: raise RuntimeError("not now")
        return drawn


@pytest.mark.parametrize("deep", [False, True])
def test_a_member_raises(lake, deep):
    "Then the others have not drawn either"
    def make(*when):
        a, b, c = members(lake, lambda: Epoch(over=Uniform()))
        c.sampler = Grudging(*when)
        return Mixture({Mixture({a: 1, b: 2}, batch_size=1): 2, c: 1}, batch_size=7) if deep else Mixture({a: 1, b: 1, c: 1}, batch_size=7)
    calm, angry = make(), make(2, 3, 5)
    found = []
    while len(found) < 6:
        try: found.append(facts(angry.sample()))
        except RuntimeError: assert len(found) in (1, 2)
    assert found == drawn(calm, 6)


def test_from_a_cluster(lake):
    "What travels ahead from a cluster is mixed as what is in memory, and drawn again where another member raises"
    distributed = pytest.importorskip("distributed")
    def make(**options):
        ring = members(lake)[1]
        ring.sampler = Grudging(2, 4)
        return Mixture({DaskBuffer(pool=lake, batch_size=1, seed=1, sampler=Epoch(), **options): 2, ring: 1}, batch_size=9)
    def drawn(mixture):
        for _ in range(7):
            try: yield facts(mixture.sample())
            except RuntimeError: yield "not now"
    workers = dict(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None, silence_logs=50)
    with distributed.LocalCluster(**workers) as cluster, distributed.Client(cluster) as client:
        far = list(drawn(make(resident="cluster", client=client, prefetch=3)))
    assert far == list(drawn(make(resident="memory"))) and far.count("not now") == 2


def test_interrupted_draws(lake):
    "A draw that breaks off anywhere was made by all or by none"
    make = lambda: Mixture(dict(zip(members(lake, lambda: Prioritized(over=Windows(2))), (2, 1, lambda draw: draw % 2))), batch_size=6)
    mixture, came = make(), 0
    states = [mixture.state_dict()]
    mixture.sample()
    states.append(mixture.state_dict())
    for line in [*range(1, 60, 2), *range(60, 900, 29)]:
        mixture.load_state_dict(states[0])
        came += interrupted(line, mixture.sample) <= 0
        found = mixture.state_dict()
        told = [[one["rng"] for one in s["members"]] + [s["draws"]] for s in (found, *states)]
        assert told[0] in told[1:]
    assert came > 40


def test_interrupted_loads(lake):
    "Going on from a state breaks off before or after, for all members"
    own, pool = MemoryBuffer(batch_size=1, seed=1, sampler=Epoch()), filled(MemoryPool(), 7, 8)
    own.store(drive(9))
    ring = MemoryBuffer(pool=pool, batch_size=1, seed=2, capacity=9, sampler=Prioritized())
    mixture = Mixture({members(lake, Prioritized)[0]: 2, own: 1, ring: 1}, batch_size=6)
    early = mixture.state_dict()
    mixture.sample(); own.store(drive(5, hour=70)); pool.store(drive(5, hour=70)); mixture.refresh(); mixture.sample()
    late = mixture.state_dict()
    total, found = 10**6 - interrupted(10**6, lambda: mixture.load_state_dict(early)), []
    for line in (*range(1, total, total // 15), *range(total - 110, total, 2)):     # the last ones install what was read
        mixture.load_state_dict(late)
        interrupted(line, lambda: mixture.load_state_dict(early))
        found.append([same_state(mixture.state_dict(), state) for state in (early, late)].index(True))
    assert found.count(1) > 40
    mixture.load_state_dict(early)
    assert same_state(mixture.state_dict(), early)
    mixture.load_state_dict(late)
    after = drawn(mixture)
    mixture.load_state_dict(late)
    assert drawn(mixture) == after


# --- stop and go on ---

@pytest.mark.parametrize("number", range(len(SAMPLERS)))
def test_resume(number, tmp_path):
    "Through a file, another mixture of buffers on the same pools goes on bit for bit, through refreshes and with rings"
    lake, online = filled(DaskPool(str(tmp_path / "lake")), *range(4)), filled(MemoryPool(), 7, 8)
    def make(seed):
        log = DaskBuffer(pool=lake, batch_size=1, seed=seed, sampler=SAMPLERS[number](), resident="memory")
        ring = MemoryBuffer(pool=online, batch_size=1, seed=seed, capacity=9, sampler=SAMPLERS[number]())
        rest = MemoryBuffer(pool=online, batch_size=1, seed=seed, sampler=SAMPLERS[number]())
        return Mixture({log: 1, Mixture({ring: lambda draw: 1 + draw, rest: 1}, batch_size=1): lambda draw: draw % 3}, batch_size=8)
    one = make(5)
    for turn in range(3):
        drawn(one)
        two = make(None)
        one.save_state(tmp_path / "mixture.state")
        two.load_state(tmp_path / "mixture.state")
        assert drawn(two) == drawn(one)
        lake.store(drive(4, hour=20 + turn)); online.store(drive(5, hour=20 + turn))
        if turn == 1: lake.delete(PoolQuery(driver="bo"))
        assert one.refresh() == two.refresh() == 14 and len(one) == len(two)
        assert drawn(two) == drawn(one)


def test_pickled(lake):
    "A mixture travels with its members, and goes on where it arrives"
    a, b, c = members(lake)
    mixture = Mixture({Mixture({c: 1}, batch_size=2): 1, a: 2}, batch_size=5)
    mixture.sample()
    again = pickle.loads(pickle.dumps(mixture))
    assert drawn(again) == drawn(mixture) and again._draws == mixture._draws == 4


def test_states_of_others(lake):
    "A state of something else is refused, and then all is as before"
    a, b, c = members(lake)
    mixture = Mixture({a: 1, b: 1}, batch_size=4)
    mixture.sample()
    state = through_json(mixture.state_dict())
    empty = MemoryBuffer(pool=MemoryPool(), batch_size=1)
    other = Mixture({a: 1, empty: 1}, batch_size=1).state_dict()["members"][1]
    for wrong in (None, {}, a.state_dict(), {**state, "format": 2}, {**state, "draws": -1}, {**state, "members": state["members"][:1]},
                  {**state, "members": [state["members"][0], {"format": 1}]}, {**state, "members": "ab"},
                  {**state, "members": [state["members"][0], {**other, "versions": [[99, 99]]}]}):
        with pytest.raises((QueryError, SnapshotNotFound)): mixture.load_state_dict(wrong)
        assert through_json(mixture.state_dict()) == state
    with pytest.raises(QueryError): a.load_state_dict(state)


# --- life ---

def test_options(lake):
    "What makes no mixture is refused when it is made"
    a, b, c = members(lake)
    for wrong in (lambda: Mixture({}, batch_size=4), lambda: Mixture([a, b], batch_size=4), lambda: Mixture({a: 1, b: -1}, batch_size=4),
                  lambda: Mixture({a: 1, "b": 1}, batch_size=4), lambda: Mixture({a: 0, b: 0}, batch_size=4), lambda: Mixture({a: 1}, batch_size=0),
                  lambda: Mixture({a: float("nan")}, batch_size=4), lambda: Mixture({a: True}, batch_size=4), lambda: Mixture({a: "half"}, batch_size=4),
                  lambda: Mixture({Mixture({a: 1}, batch_size=4): 1, a: 1}, batch_size=4), lambda: Mixture({a: 1}, batch_size=4).sample(0),
                  lambda: Mixture({a: lambda draw: "much"}, batch_size=4).sample(), lambda: Mixture({a: 1}, batch_size=2.5)):
        with pytest.raises(QueryError): wrong()
    mixture = Mixture({a: 1, b: 1}, batch_size=4)
    assert isinstance(mixture, Buffer) and bool(mixture)
    for name in ("pool", "query", "store", "writer", "save", "find", "sampler", "capacity", "select"):
        with pytest.raises(QueryError, match=f"mixture.members\\[0\\].{name}"): getattr(mixture, name)
        with pytest.raises(QueryError): setattr(mixture, name, None)
    assert [batch_facts(x.sample()) for x in (a, b)] == [batch_facts(x.sample()) for x in members(lake)[:2]]


def test_threads(lake):
    "Two mixtures of the same buffers in opposite order, a share that asks a buffer, and a thread that stores: nobody waits for ever"
    a, b, c = members(lake)
    one, two = Mixture({a: 1, b: lambda draw: len(b)}, batch_size=8), Mixture({b: 1, c: 1, a: 1}, batch_size=8)
    stop, wrong = threading.Event(), []
    def run(call):
        try:
            while not stop.is_set(): call()
        except BaseException as e: wrong.append(e)
    hours = iter(range(100, 100_000))
    calls = (one.sample, two.sample, two.state_dict, one.refresh, lambda: b.store(drive(3, hour=next(hours))), a.sample)
    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for t in threads: t.start()
    stop.wait(0.7)
    stop.set()
    for t in threads: t.join(20)
    assert not wrong and not any(t.is_alive() for t in threads)


def test_forked(lake):
    "A child draws its own batches, all members of it, and leaves its parent's alone"
    mixture, twin = (Mixture(dict(zip(members(lake), (1, 1, 1))), batch_size=60) for _ in range(2))
    for m in (mixture, twin): m.sample()
    ours, theirs = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=lambda: theirs.send(mixture.sample().index.tolist()))
    child.start()
    found = ours.recv()
    child.join(20)
    right = twin.sample().index.tolist()
    assert mixture.sample().index.tolist() == right
    assert all(found[i:i + 20] != right[i:i + 20] for i in (0, 20, 40))


# --- batches that are drawn ahead ---

def shared(seed=0, sampler=Uniform):
    "A log, a ring that is empty for now, and rows whose share changes with each draw; and what stores"
    log, pool = filled(MemoryPool(), 1, 2, 3), filled(MemoryPool(), 7, 8)
    ring = MemoryBuffer(batch_size=1, seed=1, capacity=9, sampler=sampler())
    inner = Mixture({MemoryBuffer(pool=log, batch_size=1, seed=2, sampler=sampler()): 1, ring: lambda draw: len(ring)}, batch_size=1)
    rest = MemoryBuffer(pool=pool, batch_size=1, seed=3, sampler=sampler())
    return Mixture({inner: 1, rest: lambda draw: draw % 3}, batch_size=6), ring, log, pool


def stands(leaf):
    "Priorities aside: a thread gives new rows theirs earlier"
    return leaf._moment()[0], leaf._view.versions, None if isinstance(leaf.sampler, Prioritized) else leaf.sampler.state_dict()


def waiting(batches, n):
    end = time.monotonic() + 10
    while len(batches._ahead.waiting) < n: assert time.monotonic() < end


@pytest.mark.parametrize("prefetch", [0, 1, 2, 5])
@pytest.mark.parametrize("sampler", [Uniform, Epoch, Prioritized])
def test_batches(sampler, prefetch):
    "What `sample` would give, of nested mixtures, through whatever comes between two of them; and the same state"
    (one, *ours), (two, *theirs) = (shared(sampler=sampler) for _ in range(2))
    rng, batches, hour = np.random.default_rng(prefetch), one.batches(prefetch=prefetch), 20
    for _ in range(60):
        what, hour = rng.integers(11), hour + 1
        for mixture, ring, log, pool in ((one, *ours), (two, *theirs)):
            if what == 0: ring.store(drive(4, hour=hour))
            elif what == 1: (log.store(drive(4, hour=hour)), mixture.refresh())
            elif what == 2: mixture.members[1].query = PoolQuery(driver="bo") if hour % 2 else PoolQuery()
            elif what == 3 and mixture.members[0].members[0]._has_loaded(): mixture.load_state_dict(mixture.state_dict())
            elif what == 4: mixture.batch_size = 2 + hour % 5
        if what == 5: assert facts(one.sample(3)) == facts(two.sample(3))
        elif what == 6: assert batch_facts(one.members[0].members[0].sample()) == batch_facts(two.members[0].members[0].sample())
        elif what == 7: time.sleep(0.002)
        elif what > 7: assert facts(next(batches)) == facts(two.sample())
        told = [m._still(lambda: [m._draws, m.members[0]._draws, *map(stands, m._leaves)]) for m in (one, two)]
        assert same_state(*told)
    batches.close()


@pytest.mark.parametrize("prefetch", [1, 3])
def test_batches_resume(prefetch):
    "While batches wait, the state is that of the first which was not handed out, and whoever has it goes on bit for bit"
    (one, ring, *_), (again, other, *_) = shared(sampler=Epoch), shared(sampler=Epoch)
    for r in (ring, other): r.store(drive(9, hour=30))
    batches = one.batches(prefetch=prefetch)
    for _ in range(4): assert facts(next(batches)) == facts(again.sample())
    waiting(batches, prefetch)
    for state in (one.state_dict(), batches.state_dict()):
        assert [s["rng"] for s in again.members[0].state_dict()["members"]] == [s["rng"] for s in state["members"][0]["members"]]
    expected = [facts(again.sample()) for _ in range(4)]
    assert [facts(next(batches)) for _ in range(4)] == expected
    one.load_state_dict(state)
    assert [facts(next(batches)) for _ in range(4)] == expected
    batches.close()


def test_batches_of_shares_that_fail():
    "An error of a share is raised once, in its place, and no batch is lost; a share asks of the number of its own draw"
    asked = []
    def share(draw):
        asked.append(draw)
        if asked.count(draw) == 1 and draw in (2, 3): raise OSError("gone")
        return 1
    log = filled(MemoryPool(), 1, 2)
    mixture, right = (Mixture({MemoryBuffer(pool=log, batch_size=1, seed=1): 1, MemoryBuffer(pool=log, batch_size=1, seed=2): s}, batch_size=4) for s in (share, 1))
    found, wrong = [], 0
    with mixture.batches() as batches:
        while len(found) < 6:
            try: found.append(facts(next(batches)))
            except OSError: wrong += 1
    assert found == drawn(right, 6) and wrong == 2 and set(asked) >= set(range(6))
    unsure = Mixture({mixture.members[0]: 1, mixture.members[1]: lambda draw: np.random.default_rng().random()}, batch_size=4)
    with unsure.batches(5, prefetch=2) as batches: assert len(list(batches)) == 5      # it comes to an end
    for wrong in (dict(min_size=1), dict(samples_per_insert=2)):
        with pytest.raises(QueryError, match="this is a mixture"): mixture.batches(**wrong)


def test_interrupted_batches():
    "A `next` that breaks off anywhere has moved all members or none"
    mixture = shared(sampler=Epoch)[0]
    mixture.sample()
    state, came = mixture.state_dict(), 0
    with mixture.batches(prefetch=0) as batches:
        for line in [*range(1, 90, 2), *range(90, 500, 29)]:
            mixture.load_state_dict(state)
            if line % 4 == 1: batches._ahead.fill()     # as a thread does
            came += interrupted(line, lambda: next(batches)) <= 0
            draws, told = mixture._draws, facts(mixture.sample())
            mixture.load_state_dict(state)
            for _ in range(draws - state["draws"]): mixture.sample()
            assert facts(mixture.sample()) == told
    assert came > 20


def test_interrupted_beside_a_thread():
    "Ctrl-C while a thread draws ahead: the batch was given or it was not"
    rng = np.random.default_rng(0)
    for _ in range(40):
        one, two = (shared(sampler=Epoch)[0] for _ in range(2))
        batches, seconds, given = one.batches(), float(rng.uniform(0, 0.0006)), False
        assert facts(next(batches)) == facts(two.sample())
        interrupt = threading.Thread(target=lambda: (time.sleep(seconds), _thread.interrupt_main()))
        try:
            interrupt.start()
            next(batches)
            given = True
            while True: time.sleep(0.001)
        except KeyboardInterrupt: pass
        interrupt.join()
        right, found = drawn(two, 4), [facts(next(batches)) for _ in range(3)]
        assert found == right[1:] or not given and found == right[:3]
        batches.close()


def test_batches_in_threads():
    "A thread that draws ahead, others that draw, and one that stores into a member whose share asks for it: nobody waits for ever"
    mixture, ring, *_ = shared()
    stop, wrong, hours = threading.Event(), [], iter(range(100, 100_000))
    batches = mixture.batches()
    def run(call):
        try:
            while not stop.is_set(): call()
        except BaseException as e: wrong.append(e)
    calls = (lambda: next(batches), mixture.sample, mixture.members[0].sample, mixture.state_dict, lambda: ring.store(drive(3, hour=next(hours))))
    threads = [threading.Thread(target=run, args=(call,), daemon=True) for call in calls]
    for t in threads: t.start()
    stop.wait(0.7)
    stop.set()
    for t in threads: t.join(20)
    batches.close()
    assert not wrong and not any(t.is_alive() for t in threads)
