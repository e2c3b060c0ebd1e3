"""`record`: what a pool has of an environment is what a plain loop over it saw, however the environment resets itself."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_io_nbdev import DaskBuffer, DaskPool, MemoryPool
from data_io_nbdev.errors import ClosedError, QueryError, SchemaError

gymnasium = pytest.importorskip("gymnasium", reason="the extra gym")
from gymnasium import spaces  # noqa: E402
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv  # noqa: E402
from gymnasium.wrappers import Autoreset  # noqa: E402

from data_io_nbdev.interop.gymnasium import record  # noqa: E402

START = "2026-01-01T00:00Z"
US = pd.Timestamp(START).value // 1000


class Walk(gymnasium.Env):
    "A state says where it is from: lane, number of the episode, number of the step. Episodes end as `ends` says, one after the other, over and over"
    observation_space, action_space = spaces.Box(-1, 1000, (3,), "float32"), spaces.Discrete(100)

    def __init__(self, lane=0, ends=((3, "t"),), reuse=False):
        self.lane, self.ends, self.episode, self.at, self.reuse, self.buffer = lane, ends, -1, 0, reuse, np.zeros(3, "float32")

    def seen(self):
        self.buffer[:] = self.lane, self.episode, self.at
        return self.buffer if self.reuse else self.buffer.copy()

    def reset(self, *, seed=None, options=None):
        self.episode, self.at = self.episode + 1, 0
        return self.seen(), {"speed": -1.0}

    def step(self, action):
        self.at += 1
        length, kind = self.ends[self.episode % len(self.ends)]
        ended = self.at == length
        return self.seen(), self.at / 4, ended and kind == "t", ended and kind == "c", {"speed": self.at / 2}


def stored(pool):
    "What a pool has, as lists of steps for each lane, by the start of the episode"
    found = {}
    for e in pool:
        steps = zip(e.times.tolist(), e.state.tolist(), e.action[:, 0].tolist(), e.reward.tolist(), e.nstate.tolist(), e.terminated.tolist(), e.truncated.tolist(),
                    e.fields("info")["seed"].tolist())
        found[e.who.get("environment", 0), e.start] = list(steps)
    return found


def obvious(lane, ends, calls, mode, resets, seeds, action):
    "A plain loop over one environment. `resets`: before which calls it is reset; `seeds`: with which seeds"
    env, episodes, steps, ended, seed = Walk(lane, ends), [], [], False, -1
    state = env.reset()[0]
    for n in range(calls):
        if n in resets or n == 0:
            if n: state, ended = env.reset()[0], False
            seed, steps = seeds.get(n, -1), []
        elif mode is None and ended: continue  # nobody resets it
        elif mode is AutoresetMode.NEXT_STEP and ended:
            state, ended, steps, seed = env.reset()[0], False, [], -1
            continue
        elif ended: steps = []
        nstate, reward, terminated, truncated, _ = env.step(action(n, lane))
        if not steps: episodes.append(steps)
        steps.append((US + n * 10_000, state.tolist(), action(n, lane), reward, nstate.tolist(), terminated, truncated, seed))
        state, ended = nstate, terminated or truncated
        if ended and mode in (AutoresetMode.SAME_STEP, AutoresetMode.DISABLED): state, seed = env.reset()[0], -1
    return {(lane, steps[0][0]): steps for steps in episodes}


ENDS = st.lists(st.tuples(st.integers(1, 6), st.sampled_from("tc")), min_size=1, max_size=4)
def action(n, lane): return (7 * n + lane) % 100


class TestOracle:
    @settings(max_examples=60, deadline=None)
    @given(data=st.data(), mode=st.sampled_from(AutoresetMode), ends=st.lists(ENDS, min_size=1, max_size=3), calls=st.integers(1, 25), size=st.integers(1, 9))
    def test_many(self, data, mode, ends, calls, size):
        "Every mode; ends of both kinds; resets of all, or of some, at any time"
        n, pool = len(ends), MemoryPool()
        resets = [data.draw(st.sets(st.integers(1, calls), max_size=3)) for _ in ends]
        seeds = data.draw(st.dictionaries(st.integers(0, calls), st.integers(0, 50), max_size=3))
        inner = SyncVectorEnv([lambda lane=lane, e=e: Walk(lane, e) for lane, e in enumerate(ends)], autoreset_mode=mode)
        with record(inner, pool, dt=0.01, start=START, steps=size) as env:
            for i in range(calls):
                mask = np.array([i in r for r in resets])
                if i == 0: env.reset(seed=seeds.get(0))
                elif mask.all(): env.reset(seed=seeds.get(i))
                elif mask.any(): env.reset(seed=seeds.get(i), options={"reset_mask": mask})
                *_, terminated, truncated, _ = env.step(np.array([action(i, lane) for lane in range(n)]))
                ended = terminated | truncated
                if mode is AutoresetMode.DISABLED and ended.any(): env.reset(options={"reset_mask": ended})
            assert env.writer.acknowledged == sum(map(len, stored(pool).values()))
        expected = {}
        for lane, e in enumerate(ends): expected |= obvious(lane, e, calls, mode, resets[lane], {i: seed + lane for i, seed in seeds.items()}, action)
        assert stored(pool) == expected and pool.verify() == []

    @settings(max_examples=60, deadline=None)
    @given(ends=ENDS, calls=st.integers(1, 25), resets=st.sets(st.integers(1, 25), max_size=4), auto=st.booleans(), reuse=st.booleans())
    def test_one(self, ends, calls, resets, auto, reuse):
        "One environment that somebody resets, or that resets itself, or that nobody resets; its array is perhaps the same each time"
        pool, env = MemoryPool(), Walk(0, ends, reuse)
        with record(Autoreset(env) if auto else env, pool, dt=0.01, start=START) as env:
            for i in range(calls):
                if i == 0 or i in resets: env.reset(seed=i)
                env.step(action(i, 0))
        assert stored(pool) == obvious(0, ends, calls, AutoresetMode.NEXT_STEP if auto else None, resets, {i: i for i in range(calls)}, action)

    def test_processes(self):
        "Environments in processes of their own"
        ends = [[(2, "t"), (3, "c")], [(4, "c")]]
        pool, inner = MemoryPool(), AsyncVectorEnv([lambda lane=lane, e=e: Walk(lane, e) for lane, e in enumerate(ends)], autoreset_mode=AutoresetMode.SAME_STEP)
        with record(inner, pool, dt=0.01, start=START) as env:
            env.reset(seed=5)
            for i in range(9): env.step(np.array([action(i, 0), action(i, 1)]))
        assert stored(pool) == {k: v for lane, e in enumerate(ends) for k, v in obvious(lane, e, 9, AutoresetMode.SAME_STEP, (), {0: 5 + lane}, action).items()}


class Nested(Walk):
    observation_space = spaces.Dict(camera=spaces.Box(0, 255, (2, 2, 3), "uint8"), more=spaces.Tuple([spaces.Discrete(50), spaces.Box(-9, 99, (2,), "float64")]))
    action_space = spaces.Tuple([spaces.Box(-1, 1, (1,)), spaces.MultiBinary(3)])
    def seen(self): return {"camera": np.full((2, 2, 3), self.at, "uint8"), "more": (self.at, np.array([self.episode, self.at / 3]))}


@pytest.mark.parametrize("mode", AutoresetMode)
def test_nested_spaces(mode):
    "A field for each leaf, in its own dtype; the last observation of an episode is put where it belongs, leaf by leaf"
    pool = MemoryPool()
    with record(SyncVectorEnv([lambda: Nested(0, [(2, "t")]), lambda: Nested(1, [(3, "c")])], autoreset_mode=mode), pool, dt=1) as env:
        env.reset()
        env.action_space.seed(0)
        actions = [env.action_space.sample() for _ in range(2)]
        for a in actions: env.step(a)
    first, second = sorted(pool, key=lambda e: e.who["environment"])
    assert first.terminated.tolist() == [False, True] and second.truncated.tolist() == [False, False]
    for lane, e in enumerate((first, second)):
        assert e.fields("nstate")["camera"][:, 1, 1, 2].tolist() == e.fields("nstate")["more.0"].tolist() == [1, 2]
        assert e.fields("nstate")["more.1"].tolist() == [[0, 1 / 3], [0, 2 / 3]] and e.fields("state")["more.1"].dtype == "float64"
        assert np.array_equal(e.fields("action")["0"], [a[0][lane, 0] for a in actions]) and np.array_equal(e.fields("action")["1"], [a[1][lane] for a in actions])


class TestInfo:
    @pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
    def test_many(self, mode):
        "The info of a step, not of the reset that followed it"
        pool = MemoryPool()
        with record(SyncVectorEnv([lambda: Walk(0, [(2, "t")]), lambda: Walk(1, [(3, "c")])], autoreset_mode=mode), pool, info=["speed"], dt=1) as env:
            env.reset(seed=[3, 9])
            for _ in range(3): env.step(np.zeros(2, int))
        speeds = {e.who["environment"]: (e.fields("info")["speed"].tolist(), e.fields("info")["seed"].tolist()) for e in list(pool)[:2]}
        assert speeds == {0: ([.5, 1], [3, 3]), 1: ([.5, 1, 1.5], [9, 9, 9])}

    def test_sometimes(self):
        "Where it is missing a float is NaN; a whole number is an error, with which the episode breaks off"
        class Sometimes(Walk):
            def step(self, action):
                *result, _ = super().step(action)
                return *result, {"far": float(self.at), "n": self.at, "where": [1, 2]} if self.at != 2 else {}
        for names in (["far"], "far", ["far", "n"]):
            pool = MemoryPool()
            env = record(Sometimes(0, [(4, "t")]), pool, info=names)
            env.reset()
            env.step(0)
            if "n" in names:
                with pytest.raises(SchemaError, match="info n: it is missing"): env.step(0)
                with pytest.warns(UserWarning, match="broke off"): env.step(0)
                env.close()
                assert [len(e) for e in pool] == [1]
                continue
            for _ in range(3): env.step(0)
            assert np.array_equal(next(iter(pool)).fields("info")["far"], [1, np.nan, 3, 4], equal_nan=True)
        with record(Sometimes(), pool := MemoryPool(), info=["where"]) as env:
            env.reset()
            env.step(0)
        assert next(iter(pool)).fields("info")["where"].tolist() == [[1, 2]]

    @pytest.mark.parametrize("names, said", [(["speeed"], "the first step has no 'speeed'"), (["label"], "info label"), (["seed"], "fields repeat")])
    def test_bad(self, names, said):
        class Labelled(Walk):
            def step(self, action): return *super().step(action)[:4], {"speed": 1.0, "label": "left", "seed": 3}
        pool = MemoryPool()
        env = record(Labelled(), pool, info=names)
        env.reset()
        with pytest.raises(SchemaError, match=said): env.step(0)
        assert len(pool) == 0

    def test_known(self):
        "A pool that knows the field has it in its own dtype; what it does not have is refused before anything is stored"
        pool = MemoryPool()
        for kind in (np.float32, float):
            class Typed(Walk):
                def step(self, action): return *super().step(action)[:4], {"speed": kind(self.at)}
            with record(Typed(), pool, info=["speed"]) as env:
                env.reset()
                for _ in range(3): env.step(0)
        assert [e.fields("info")["speed"].dtype for e in pool] == ["float32"] * 2
        with pytest.raises(SchemaError, match="got nothing"): record(Walk(), pool)

    def test_options(self):
        "Numbers are kept by name, for the environments that were reset; others are named in a warning, once; no number is an error before the reset"
        pool = MemoryPool()
        with record(SyncVectorEnv([Walk, Walk], autoreset_mode="SameStep"), pool, options=["low"], dt=1) as env:
            with pytest.warns(UserWarning, match="not kept: map"): env.reset(seed=1, options={"low": 0.5, "map": "desert"})
            env.step(np.zeros(2, int))
            env.reset(options={"map": 1, "low": np.float32(2), "reset_mask": np.array([False, True])})
            for _ in range(3): env.step(np.zeros(2, int))
            with pytest.raises(SchemaError, match="options low: expected a number, got 'deep'"): env.reset(options={"low": "deep"})
            assert env.env.envs[0].episode == 1
        found = sorted((e.who["environment"], e.state[0, 1], e.fields("info")["options.low"][0], e.fields("info")["seed"][0]) for e in pool)
        assert [(lane, episode, seed) for lane, episode, _, seed in found] == [(0, 0, 1), (0, 1, -1), (1, 0, 2), (1, 1, -1)]
        assert np.array_equal([low for *_, low, _ in found], [0.5, np.nan, 0.5, 2], equal_nan=True)

    @pytest.mark.parametrize("seed", [2**63, [1], [1, 2, 3], "seven"])
    def test_seeds(self, seed):
        env = record(SyncVectorEnv([Walk, Walk]), MemoryPool())
        with pytest.raises((SchemaError, TypeError), match="seed|str"): env.reset(seed=seed)
        assert env.env.envs[0].episode == -1


def space(observation=Walk.observation_space, action=Walk.action_space):
    env = Walk()
    env.observation_space, env.action_space = observation, action
    return env


def wordless():
    env = SyncVectorEnv([Walk, Walk])
    env.metadata = {}
    return env


RAGGED = spaces.Sequence(spaces.Box(0, 1, (2,)))


@pytest.mark.parametrize("env, options, error, said", [
    (lambda: space(spaces.Text(9)), {}, SchemaError, "state .*Text"), (lambda: space(spaces.Dict(a=spaces.Dict(b=RAGGED))), {}, SchemaError, "state a.b.*Sequence"),
    (lambda: space(action=spaces.Tuple([spaces.Discrete(2), spaces.Graph(spaces.Box(0, 1, (1,)), None)])), {}, SchemaError, "action 1.*Graph"),
    (lambda: SyncVectorEnv([lambda: space(spaces.Dict(t=spaces.Text(9)))]), {}, SchemaError, "state t.*Text"),
    (Walk, dict(who=[{"a": 1}]), QueryError, "one identity"), (Walk, dict(who=3), QueryError, "who"), (Walk, dict(dt=0), QueryError, "dt"), (Walk, dict(dt="fast"), QueryError, "dt"),
    (Walk, dict(dt=np.nan), QueryError, "dt"), (Walk, dict(start=START), QueryError, "dt="), (Walk, dict(dt=1, start="2026-01-01"), QueryError, "zone"),
    (Walk, dict(info=3), QueryError, "info"), (Walk, dict(options=["a", "a"]), QueryError, "each once"), (Walk, dict(steps=0), QueryError, "steps"),
    (lambda: SyncVectorEnv([Walk, Walk]), dict(who=[{"a": 1}]), QueryError, "expected 2"), (lambda: SyncVectorEnv([Walk]), dict(who={"environment": 3}), QueryError, "environment"),
    (wordless, {}, QueryError, "autoreset_mode")])
def test_refused(env, options, error, said):
    "By name, before anything is stored"
    pool = MemoryPool()
    with pytest.raises(error, match=said): record(env(), pool, **options)
    assert len(pool) == 0


class TestValues:
    def test_cast(self):
        "A value gets the dtype of its space, of the reward, too; what that cannot hold is refused, and not stepped"
        class Exact(Walk):
            action_space, reward_space = spaces.Box(-1, 1, (1,)), spaces.Box(-9, 9, (), "float64")
        with record(Exact(), pool := MemoryPool()) as env:
            env.reset()
            for a in (np.array([0.1]), [0.1], np.array([1], "int64")): env.step(a)
        e = next(iter(pool))
        assert e.action[:, 0].tolist() == [np.float32(0.1)] * 2 + [1] and e.reward.tolist() == [0.25, 0.5, 0.75]
        env = record(Walk(), MemoryPool())
        env.reset()
        with pytest.raises(SchemaError, match="action"): env.step(0.5)
        assert env.env.at == 0 and env.step(1)[0].tolist() == [0, 0, 1]
        env.close()

    def test_shape(self):
        "An observation of another shape than its space is refused"
        class Wrong(Walk):
            def seen(self): return np.zeros(3 if self.at == 0 else 4, "float32")
        env = record(Wrong(), MemoryPool())
        env.reset()
        with pytest.raises(SchemaError, match="nstate"): env.step(0)


class TestBreaks:
    def test_one(self):
        "A step that raises leaves a gap, and nothing is recorded across it"
        class Fragile(Walk):
            def step(self, action):
                if action == 99: raise OSError("cable")
                return super().step(action)
        pool = MemoryPool()
        env = record(Fragile(0, [(4, "t")]), pool)
        env.reset()
        env.step(0)
        with pytest.raises(OSError): env.step(99)
        with pytest.warns(UserWarning, match="broke off"): env.step(0)
        env.step(0)
        env.reset()
        for _ in range(4): env.step(0)
        env.close()
        assert [e.state[:, 2].tolist() for e in pool] == [[0], [0, 1, 2, 3]]

    @pytest.mark.parametrize("mode", AutoresetMode)
    def test_many(self, mode):
        class Fragile(SyncVectorEnv):
            def step(self, actions):
                result = super().step(actions)
                if actions[0] == 99: raise KeyboardInterrupt
                return result
        pool = MemoryPool()
        with record(Fragile([lambda: Walk(0, [(9, "t")]), lambda: Walk(1, [(9, "t")])], autoreset_mode=mode), pool, dt=1, start=START) as env:
            env.reset(seed=1)
            env.step(np.zeros(2, int))
            with pytest.raises(KeyboardInterrupt): env.step(np.full(2, 99))
            with pytest.warns(UserWarning, match="broke off"): env.step(np.zeros(2, int))
            env.step(np.zeros(2, int))
            env.reset()
            env.step(np.zeros(2, int))
        lane = [steps for (lane, _), steps in sorted(stored(pool).items()) if lane == 0]
        again = [] if mode is AutoresetMode.DISABLED else [[[0, 0, 3]]]
        assert [[state for _, state, *_ in steps] for steps in lane] == [[[0, 0, 0]], *again, [[0, 1, 0]]]
        assert [steps[0][-1] for steps in lane] == [1, *[-1 for _ in again], -1]

    def test_close(self):
        "Closing stores what is left, once; where the loop raised, too; a closed one takes no steps"
        for how in ("close", "with", "raise"):
            pool = MemoryPool()
            env = record(Walk(0, [(9, "t")]), pool)
            env.reset()
            env.step(0)
            if how == "close": env.close(), env.close()
            elif how == "with":
                with env: env.step(0)
            else:
                with pytest.raises(ZeroDivisionError), env: 1 / 0
            assert [len(e) for e in pool] == [2 if how == "with" else 1]
            with pytest.raises(ClosedError): env.step(0)


class TestClock:
    def walk(self, pool, **options):
        with record(SyncVectorEnv([Walk, lambda: Walk(0, [(2, "c")])]), pool, {"robot": "R2"}, **options) as env:
            env.reset(seed=1)
            for _ in range(7): env.step(np.zeros(2, int))
        return sorted(e.start for e in pool)

    def test_twice(self):
        "With a start it is stored once; without, each recording begins behind the last one, though that reached into the future"
        pool = MemoryPool()
        assert self.walk(pool, dt=0.5, start=START) == self.walk(pool, dt=pd.Timedelta("500ms"), start=START) and pool.version == 5
        pool = MemoryPool()
        first = self.walk(pool, dt=3600)
        last = max(int(e.times[-1]) for e in pool)
        both = self.walk(pool, dt=3600)
        assert len(both) == 2 * len(first) and min(both[len(first):]) > last

    def test_real(self):
        "By default the times are the clock's"
        pool, before = MemoryPool(), pd.Timestamp.now("UTC")
        self.walk(pool)
        assert all(before.value // 1000 <= e.start and e.times[-1] <= pd.Timestamp.now("UTC").value // 1000 + 10 for e in pool)


def test_lake(tmp_path):
    "Into a lake, in commits of a thread; each environment has an identity of its own; a buffer draws what was stored"
    pool = DaskPool(tmp_path / "lake")
    with record(SyncVectorEnv([Walk, Walk]), pool, [{"robot": "A"}, {"robot": "B"}], seconds=0.05) as env:
        env.reset(seed=1)
        for i in range(40): env.step(np.full(2, i))
    assert env.writer.acknowledged == 60 and pool.summary(by="robot")["steps"].tolist() == [30, 30] and pool.verify() == []
    batch = DaskBuffer(pool=pool, batch_size=64, seed=1).sample()
    assert np.array_equal(batch.state[:, :2], batch.nstate[:, :2]) and np.array_equal(batch.state[:, 2] + 1, batch.nstate[:, 2])
