"Frames, schemas and queries go in and come out without a difference, whatever is in them."
import json
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_io_nbdev.data.core import Episode, PoolQuery, from_us, records
from data_io_nbdev.data.schema import Field, Schema
from data_io_nbdev.errors import QueryError, SchemaError
from data_io_nbdev.testing import DTYPES, ODD, ZONES, episodes, examples, facts, odd_numbers, schemas

NAMES = st.text(min_size=1, max_size=5).filter(lambda n: n not in ("timestep", "episodestart", "timestamp"))


@st.composite
def frames(draw):
    "Frames as loggers write them, in the order in which `to_frame` does; made here by hand"
    steps, rng, blocks, columns = draw(st.integers(1, 6)), np.random.default_rng(draw(st.integers(0, 2**32))), [], []
    scalars = draw(st.booleans())  # then two column levels may do
    def add(role, fields):
        for name, size, dtype in fields:
            columns.extend((role, name, i) for i in range(size))
            blocks.extend(odd_numbers(rng, dtype, (size, steps)))
    def fields(least, most):
        names = draw(st.lists(st.sampled_from(ODD) | NAMES, min_size=least, max_size=most, unique=True))
        return [(n, 1 if scalars else draw(st.integers(1, 4)), draw(st.sampled_from(DTYPES))) for n in names]
    state, info = fields(1, 3), fields(0, 2)
    for role, what in (("state", state), ("action", fields(1, 2)), ("reward", fields(1, 2)), ("nstate", state)): add(role, what)
    for flag in draw(st.lists(st.sampled_from(["terminated", "truncated"]), unique=True).map(sorted)):
        columns.append((flag, draw(st.sampled_from([flag, ""])), 0))
        blocks.append(np.arange(steps) == (steps - 1 if draw(st.booleans()) else -1))
    add("info", info)
    if draw(st.booleans()):
        columns.append(("timestep", "", 0)); blocks.append(np.arange(steps) + draw(st.integers(0, 10**6)))
    levels = 2 if scalars and draw(st.booleans()) else 3
    frame = pd.DataFrame({i: b for i, b in enumerate(blocks)})
    frame.columns = pd.MultiIndex.from_tuples([c[:levels] for c in columns], names=draw(
        st.sampled_from([["role", "name", "element"], ["a", None, "ü"], [None] * 3]))[:levels])
    zone = draw(st.sampled_from(ZONES))
    times = from_us(draw(st.integers(-10**15, 4 * 10**15)) + np.cumsum(rng.integers(1, 10**9, steps)), zone)
    who = draw(st.dictionaries(NAMES, st.text(max_size=5) | st.integers(-2**63, 2**63 - 1), max_size=3))
    rows = pd.MultiIndex.from_arrays([*([v] * steps for v in who.values()), times[:1].repeat(steps) - pd.Timedelta(7, "us"), times],
                                     names=[*who, "episodestart", "timestamp"])
    frame.index = rows
    units = {r: {n: "m/s" for n, _, _ in fs} for r, fs in (("state", state), ("info", info)) if fs and draw(st.booleans())}
    if units: frame.attrs["units"] = units
    return frame


def same_frame(a, b):
    "Equal values, dtypes, order, and names of both indexes, and units; NaN with all its bits"
    pd.testing.assert_frame_equal(a, b, check_index_type="exact", check_column_type="equiv", check_names=True, check_exact=True, check_freq=False)
    assert list(a.columns.names) == list(b.columns.names) and list(a.index.names) == list(b.index.names) and a.attrs == b.attrs
    for i in range(a.shape[1]): assert a.iloc[:, i].to_numpy().tobytes() == b.iloc[:, i].to_numpy().tobytes()


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # pandas compares signalling NaNs
class TestFrames:
    "Frames are lossless"

    @examples(300)
    @given(frame=frames())
    def test_in_and_out(self, frame):
        "A frame comes out as it went in, to the last bit, and does not change on the way"
        before = frame.copy(deep=True)
        out = Episode.from_frame(frame).to_frame()
        same_frame(out, before); same_frame(frame, before)

    @examples(150)
    @given(frame=frames(), seed=st.integers(0, 2**32))
    def test_any_order(self, frame, seed):
        "The order of columns, of index levels, and their number, say nothing"
        e, rng = Episode.from_frame(frame), np.random.default_rng(seed)
        mixed = frame.iloc[:, rng.permutation(frame.shape[1])].reorder_levels(rng.permutation(frame.index.nlevels))
        if frame.columns.nlevels == 2: mixed.columns = pd.MultiIndex.from_tuples([(*c, 0) for c in mixed.columns], names=["r", "n", "e"])
        again = Episode.from_frame(mixed, schema=e.schema)
        assert facts(again) == facts(e)
        assert again.to_frame().shape == frame.shape

    @examples(200)
    @given(episode=episodes())
    def test_out_and_in(self, episode):
        "An episode comes back from its frame, and from its records, images included"
        assert facts(Episode.from_frame(episode.to_frame(), schema=episode.schema)) == facts(episode)
        one = next(records(episode)).to_episode(episode.schema)
        assert {**facts(one), "zone": episode.zone} == facts(episode[:1])

    @pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
    def test_resolutions(self, unit):
        "pandas' own resolutions make no difference"
        times = pd.date_range("2026-03-29 00:30", periods=4, freq="30min", tz="Europe/Berlin").as_unit(unit)
        a = np.zeros((4, 1), "f4")
        e = Episode.from_arrays(state=a, nstate=a, action=a, reward=a[:, 0], timestamp=times)
        assert e.times.tolist() == (times.as_unit("us").asi8).tolist() and (e.timestamp == times).all()


class TestSchemas:
    "Schemas are lossless"

    @examples(300)
    @given(schema=schemas(), columns=st.lists(st.none() | st.text(max_size=3), min_size=2, max_size=3),
           flags=st.lists(st.tuples(st.sampled_from(["terminated", "truncated"]), st.text(max_size=3)), max_size=2))
    def test_json(self, schema, columns, flags):
        "A schema comes back from JSON with its order, its units and the way in which it writes frames"
        schema = Schema(schema.fields, schema.identity, tuple(columns), tuple(flags))
        again = Schema.from_json(schema.to_json())
        assert again == schema and hash(again) == hash(schema) and again.fields == schema.fields
        assert (again.identity, again.columns, again.flags) == (schema.identity, schema.columns, schema.flags)
        assert {r: again.block(r) for r in again.roles} == {r: schema.block(r) for r in schema.roles}
        json.loads(schema.to_json())

    @examples(200)
    @given(schema=schemas(), seed=st.integers(0, 2**32), steps=st.integers(0, 4))
    def test_split_and_join(self, schema, seed, steps):
        "Fields make a block, and a block its fields, bit for bit"
        rng = np.random.default_rng(seed)
        for role in schema.roles:
            if role in ("terminated", "truncated"): continue
            parts = {f.name: odd_numbers(rng, f.dtype, (steps, *f.shape)) for f in schema.of(role)}
            block = schema.join(role, parts)
            assert block.shape == (steps, *schema.block(role).shape) and block.dtype == schema.block(role).base
            for name, values in schema.split(role, block).items():
                assert values.tobytes() == parts[name].tobytes() and (values.dtype, values.shape) == (parts[name].dtype, parts[name].shape)

    @examples(200)
    @given(schema=schemas(), data=st.data())
    def test_differences(self, schema, data):
        "The order of fields and levels is no difference; everything else is, and is named"
        schema.check(Schema(data.draw(st.permutations(schema.fields)), data.draw(st.permutations(schema.identity))))
        at = data.draw(st.integers(0, len(schema.fields) - 1))
        f = schema.fields[at]
        for change in ({"shape": (9, 9)}, {"dtype": "uint16"}, {"unit": "furlong"}, {"name": "nobody"}):
            other = Field(**{**{k: getattr(f, k) for k in ("role", "name", "shape", "dtype", "unit")}, **change})
            with pytest.raises(SchemaError, match="nobody" if "name" in change else None) as e:
                schema.check(Schema((*schema.fields[:at], other, *schema.fields[at + 1:]), schema.identity))
            assert str(f) in str(e.value) and str(other) in str(e.value)


QUERIES = st.fixed_dictionaries({}, optional=dict(
    start=st.tuples(*[st.none() | st.integers(-10**15, 4 * 10**15)] * 2), time=st.tuples(*[st.none() | st.integers(-10**15, 4 * 10**15)] * 2),
    length=st.tuples(*[st.none() | st.integers(0, 100)] * 2), ids=st.lists(st.text("0123456789abcdef", min_size=32, max_size=32), max_size=3),
    who=st.dictionaries(st.text(max_size=5), st.text(max_size=4) | st.integers(-2**63, 2**63 - 1) | st.lists(st.text(max_size=4), max_size=3), max_size=3)))


class TestQueries:
    "Queries are values"

    @examples(400)
    @given(ask=QUERIES, zone=st.sampled_from(ZONES))
    def test_json(self, ask, zone):
        "A query comes back from JSON equal and with the same hash, and so does one that says the same in other words"
        reversed_ = any(None not in ask.get(k, (None,)) and ask[k][0] > ask[k][1] for k in ("start", "time", "length"))
        time = lambda z: {k: tuple(t if t is None else from_us(t, z) for t in v) if k in ("start", "time") else v for k, v in ask.items()}
        if reversed_:
            with pytest.raises(QueryError): PoolQuery(**time(zone))
            return
        query = PoolQuery(**time(zone))
        again = PoolQuery.from_json(query.to_json())
        assert again == query and hash(again) == hash(query) and again.to_json() == query.to_json() and len({query, again}) == 1
        assert PoolQuery(**time("UTC")) == query
        who = {k: [v] if isinstance(v, (str, int)) else v[::-1] * 2 for k, v in ask.get("who", {}).items()}
        assert PoolQuery(**{**time(zone), "who": who, **({"ids": ask["ids"][::-1]} if "ids" in ask else {})}) == query

    @examples(100)
    @given(name=NAMES.filter(lambda n: n not in ("self", "start", "time", "length", "ids", "who")), value=st.text(max_size=3))
    def test_names(self, name, value):
        "Any level can be asked for by name"
        assert PoolQuery(**{name: value}) == PoolQuery(who={name: [value]})


def leaves(space, sample, path=""):
    "Path, shape and dtype of each leaf of a space, and a sample of it, by walking both"
    if isinstance(space, gym.spaces.Dict): items = [(k, s, sample[k]) for k, s in space.spaces.items()]
    elif isinstance(space, gym.spaces.Tuple): items = [(str(i), s, sample[i]) for i, s in enumerate(space.spaces)]
    else: return [(path, np.asarray(sample), space.dtype)]
    return [leaf for k, s, x in items for leaf in leaves(s, x, f"{path}.{k}" if path else k)]


BOXES = st.builds(lambda shape, dtype: gym.spaces.Box(0, 100, shape, dtype), st.lists(st.integers(1, 3), max_size=3).map(tuple),
                  st.sampled_from([np.float32, np.float64, np.float16, np.uint8, np.int16, np.int64]))
LEAVES = BOXES | st.integers(1, 9).map(gym.spaces.Discrete) | st.lists(st.integers(1, 9), min_size=1, max_size=3).map(gym.spaces.MultiDiscrete) | st.integers(
    1, 4).map(gym.spaces.MultiBinary) | st.just(gym.spaces.MultiDiscrete([[2, 3], [4, 5]])) | st.just(gym.spaces.MultiBinary([2, 3]))
SPACES = st.recursive(LEAVES, lambda s: st.dictionaries(st.sampled_from(["arm", "camera", "Größe", "0"]), s, min_size=1, max_size=3).map(gym.spaces.Dict) | st.lists(
    s, min_size=1, max_size=3).map(gym.spaces.Tuple), max_leaves=5)


class TestEnvironments:
    "Gymnasium's spaces become fields"

    @examples(200)
    @given(state=SPACES, action=SPACES, seed=st.integers(0, 2**31 - 1))
    def test_spaces(self, state, action, seed):
        "Each leaf is a field of its shape and dtype; what the environment returns fits, and comes back from store and frame"
        schema = Schema.from_env(SimpleNamespace(observation_space=state, action_space=action), identity=["machine"])
        state.seed(seed); action.seed(seed)
        s, s2, a = state.sample(), state.sample(), action.sample()
        for role, space, sample in (("state", state, s), ("action", action, a)):
            found = leaves(space, sample)
            assert [f.name for f in schema.of(role)] == [p or role for p, _, _ in found]
            for f, (_, x, dtype) in zip(schema.of(role), found):
                assert f.shape == (() if x.shape == (1,) else x.shape) and f.dtype == dtype.name
        def lift(x): return {k: lift(v) for k, v in x.items()} if isinstance(x, dict) else tuple(map(lift, x)) if isinstance(x, tuple) else np.asarray(x)[None]
        e = Episode.from_arrays(state=lift(s), nstate=lift(s2), action=lift(a), reward=[1.0], timestamp=["2026-01-01T00:00Z"],
                                who={"machine": "m1"}, schema=schema)
        for role, space, sample in (("state", state, s), ("action", action, a), ("nstate", state, s2)):
            for (name, got), (_, x, _) in zip(e.fields(role).items(), leaves(space, sample)):
                np.testing.assert_array_equal(got[0].reshape(x.shape), x)
        assert facts(Episode.from_frame(e.to_frame(), schema=schema)) == facts(e)

    @pytest.mark.parametrize("space", [gym.spaces.Text(3), gym.spaces.Sequence(gym.spaces.Discrete(2)),
                                       gym.spaces.Graph(gym.spaces.Discrete(2), None), gym.spaces.Dict(a=gym.spaces.Text(3))])
    def test_refused(self, space):
        "Spaces without a fixed size are refused by name"
        with pytest.raises(SchemaError, match="Box"): Schema.from_env(SimpleNamespace(observation_space=space, action_space=gym.spaces.Discrete(2)))

    @pytest.mark.parametrize("name", ["Pendulum-v1", "MountainCarContinuous-v0", "CartPole-v1", "FrozenLake-v1"])
    def test_real_environments(self, name):
        "A rollout of a real environment fits the schema of its spaces"
        env = gym.make(name)
        schema, (s, _) = Schema.from_env(env), env.reset(seed=0)
        env.action_space.seed(0)
        steps = []
        for _ in range(5):
            a = env.action_space.sample(); n, r, *_ = env.step(a); steps.append((s, a, r, n)); s = n
        state, action, reward, nstate = zip(*steps)
        e = Episode.from_arrays(state=np.array(state), action=np.array(action), reward=[float(r) for r in reward], nstate=np.array(nstate),
                                timestamp=pd.date_range("2026-01-01", periods=5, tz="UTC"), schema=schema)
        assert len(e) == 5 and e.links.all()
