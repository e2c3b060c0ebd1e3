"Statistics of a pool, against numpy on all of its steps at once; and batches that they normalise"
import json
import math
import os
import pickle

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_io_nbdev import (Batch, Episode, Epoch, Episodes, Field, MemoryBuffer, MemoryPool, Normalize, NStep, PoolQuery, Schema, Stack, Stats,
                           Windows)
from data_io_nbdev.errors import NotEnoughData, QueryError, SchemaError
from data_io_nbdev.storage.pool import stats as module
from data_io_nbdev.storage.pool.stats import Sketch, Tally, merged, moments, quantiles_of
from data_io_nbdev.testing import HARNESSES, drive

RICH = Schema([Field("state", "pose", (2, 2), "float64"), Field("state", "heat", (), "float32"), Field("state", "odd", (2,), "float16"),
               Field("action", "gear", (), "int8"), Field("action", "horn", (), "bool"), Field("reward", "r", (), "float32"),
               Field("info", "clock", (), "int64"), Field("info", "eye", (2, 3), "uint8")], identity=["vehicle"])
AT = (0, 0.01, 0.25, 0.5, 0.9, 1)


def rich(steps=40, hour=0, vehicle="a", gaps=True):
    "An episode of every kind of field: a far position with little noise, missing and infinite values, whole numbers, flags, an image"
    rng = np.random.default_rng([steps, hour, *vehicle.encode()])
    state = {"pose": 1e9 + rng.standard_normal((steps + 1, 2, 2)), "heat": rng.exponential(size=steps + 1).astype("float32"),
             "odd": rng.standard_normal((steps + 1, 2)).astype("float16")}
    if gaps:
        state["heat"][rng.random(steps + 1) < 0.2] = np.nan
        state["heat"][rng.random(steps + 1) < 0.1] = np.inf
        state["odd"][:, 1] = np.nan
    action = {"gear": rng.integers(-5, 9, steps).astype("int8"), "horn": rng.random(steps) < 0.3}
    info = {"clock": rng.integers(2**53, 2**62, steps), "eye": rng.integers(0, 255, (steps, 2, 3)).astype("uint8")}
    start = pd.Timestamp("2026-01-01", tz="UTC") + pd.Timedelta(hours=hour)
    return Episode.from_arrays(state={k: v[:-1] for k, v in state.items()}, nstate={k: v[1:] for k, v in state.items()}, action=action,
                               reward={"r": rng.standard_normal(steps).astype("float32")}, info=info, schema=RICH, who={"vehicle": vehicle},
                               timestamp=start + pd.to_timedelta(np.arange(steps), unit="s"))


def right(stats, episodes):
    "Whether statistics are those of these steps, by numpy: exact but for rounding, and quantiles within the error that they state"
    assert stats.steps == sum(map(len, episodes)) and stats.episodes == len({e.id for e in episodes})
    for f in stats.fields:
        values = np.concatenate([e.fields(f.field.role)[f.field.name] for e in episodes])
        assert f.mean.shape == f.error.shape == f.field.shape and f.min.dtype == f.max.dtype == f.quantiles.dtype == f.field.dtype
        for at in np.ndindex(f.field.shape):
            column = values[(slice(None), *at)]
            x = np.sort(column[np.isfinite(column)])
            assert (f.count[at], f.missing[at], f.infinite[at]) == (len(x), np.isnan(column).sum(), np.isinf(column).sum())
            if not len(x):
                assert np.isnan([f.mean[at], f.std[at], f.min[at], f.max[at], *f.quantiles[(slice(None), *at)]]).all()
                continue
            plain = x.astype("float64")
            center = plain[0]
            np.testing.assert_allclose(f.mean[at], center + (plain - center).mean(), rtol=0, atol=2e-15 * abs(plain).max())
            np.testing.assert_allclose(f.std[at], (plain - center).std(), rtol=1e-6)
            assert f.min[at] == x[0] and f.max[at] == x[-1]
            for q, v in zip(stats.quantiles, f.quantiles[(slice(None), *at)]):
                rank, off = max(math.ceil(q * len(x)), 1), f.error[at] * len(x) + 1e-6
                assert np.searchsorted(x, v, "right") >= rank - off and np.searchsorted(x, v, "left") < rank + off
                if not off > 1e-6: assert v == np.quantile(x, q, method="inverted_cdf")
    return True


@pytest.fixture(params=sorted(HARNESSES))
def pool(request, tmp_path): return HARNESSES[request.param](tmp_path).open()


class Watched(MemoryPool):
    "A pool that notes how many parts were read"
    def __init__(self, *args, **kwargs): super().__init__(*args, **kwargs); self.read = 0

    def _read(self, parts):
        self.read += len(parts)
        return super()._read(parts)


# --- every back-end ---

def test_every_pool(pool):
    "All kinds of fields, in queries, time ranges and selections; after more was stored, replaced and deleted; in a snapshot"
    episodes = [rich(hour=h, vehicle="ab"[h % 2]) for h in range(4)]
    with pytest.raises(NotEnoughData, match="no step matches"): pool.stats()
    pool.extend([e[:30] for e in episodes])
    assert right(first := pool.stats(quantiles=AT), [e[:30] for e in episodes]) and not any(f.error.any() for f in first.fields)
    pool.extend(episodes)
    assert right(pool.stats(quantiles=AT), episodes)
    cut = PoolQuery(time=("2026-01-01T01:00:35Z", "2026-01-01T02:00:07.5Z"))
    assert right(pool.stats(cut), list(pool.find(cut))) and pool.stats(cut).steps == 5 + 8
    assert right(pool.stats(PoolQuery(vehicle="b"), threads=1), episodes[1::2])
    assert right(pool.stats(episodes[2].id[:8]), [episodes[2]])
    some = pool.stats(select={"state": ["heat"], "info": ["eye"]})
    assert [f.field.name for f in some.fields] == ["heat", "gear", "horn", "r", "eye"] and right(some, episodes)
    assert all(a.mean.tobytes() == first["info", "eye"].mean.tobytes() for a in [pool.snapshot(1).stats()["info", "eye"]])
    pool.delete(episodes[0].id)
    pool.store(rich(50, hour=3, vehicle="b"), overwrite=True)
    episodes = [*episodes[1:3], rich(50, hour=3, vehicle="b")]
    assert right(last := pool.stats(quantiles=AT), episodes) and right(pool.stats(cut), list(pool.find(cut)))
    assert pool.snapshot(1).stats(quantiles=AT) == first
    plain = MemoryPool(); plain.extend(sorted(episodes, key=lambda e: len(e)))
    assert plain.stats(quantiles=AT)["action", "gear"].count == last["action", "gear"].count


def test_a_lake_reads_what_is_asked_for(tmp_path, monkeypatch):
    "Columns of the fields, parts in the time range; and nothing again after its files were merged"
    lake = HARNESSES["delta"](tmp_path).open()
    for h in range(3): lake.store(drive(20, hour=h))
    asked, plain = [], type(lake)._read_fields
    monkeypatch.setattr(type(lake), "_read_fields", lambda self, parts, some=None: asked.append((len(parts), some)) or plain(self, parts, some))
    lake.stats(PoolQuery(time=("2026-01-01T00:30:00Z", "2026-01-01T01:00:09Z")), select={"state": ["slope"]})
    assert [(n, [f.name for f in some.of("state")]) for n, some in asked] == [(1, ["slope"])]
    before = lake.stats()
    assert lake.compact() and len(asked) == 2
    assert [f.mean.tobytes() for f in lake.stats().fields] == [f.mean.tobytes() for f in before.fields] and len(asked) == 2


# --- what was read is kept ---

def test_only_what_came_is_read():
    "The same numbers, bit for bit, as a handle that reads anew: after stores, growth, deletes, replacement, and where a query lets an episode go"
    pool, drives = Watched(), [drive(90, hour=h) for h in range(12)]
    short = PoolQuery(length=(1, 60))
    def check(reads, query=None):
        pool.read = 0
        found = pool.stats(query)
        again = pool.stats(query, quantiles=[0.5])
        assert pool.read == reads and again["state", "slope"].mean == found["state", "slope"].mean
        copy = pickle.loads(pickle.dumps(found.to_json()))
        pool._readings.clear()
        assert pool.stats(query) == found == Stats.from_json(copy)
    pool.extend([e[:50] for e in drives[:6]]); check(6); check(6, short)
    pool.extend(drives[6:]); check(12); pool.stats()
    pool.read = 0; pool.extend(drives[:2]); grown = pool.stats(); assert pool.read == 2
    pool._readings.clear(); assert pool.stats() == grown
    check(4, short)  # two have become too long
    pool.stats(); pool.delete(drives[9].id); check(13)
    pool.store(drive(20, hour=0, seed=1), overwrite=True); check(12)


def test_no_episode_leaves_without_being_noticed():
    "One that is deleted while as many come; a snapshot beside its pool; an older version after a newer one"
    pool = Watched()
    pool.extend([drive(9, hour=h) for h in range(3)])
    old = pool.stats()
    pool.delete(drive(9, hour=0).id); pool.store(drive(9, hour=7))
    assert pool.stats() != old and right(pool.stats(), list(pool)) and pool.snapshot(1).stats() == old
    pool.read = 0
    assert pool.snapshot(1).stats() == old and pool.stats().version == 3 and not pool.read


def test_few_readings_are_kept():
    pool = Watched(); pool.extend([drive(9, hour=h) for h in range(9)])
    for h in range(9): pool.stats(drive(9, hour=h).id)
    assert len(pool._readings) == 4
    pool.read = 0; pool.stats(drive(9, hour=8).id); pool.stats(drive(9, hour=0).id)
    assert pool.read == 1


def test_interrupted():
    "Ctrl-C while it reads leaves what was known, and the next question is right"
    stop = []
    class Breaks(Watched):
        def _read(self, parts):
            if stop: raise stop.pop()
            return super()._read(parts)
    pool = Breaks(); pool.extend([drive(9, hour=h) for h in range(3)]); known = pool.stats()
    pool.store(drive(9, hour=5)); stop.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt): pool.stats()
    assert pool.snapshot(1).stats() == known and right(pool.stats(), list(pool))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a system without fork")
def test_forked():
    pool = MemoryPool(); pool.extend([drive(9, hour=h) for h in range(3)]); pool.stats(); pool.store(drive(9, hour=5))
    if not (child := os.fork()): os._exit(0 if right(pool.stats(), list(pool)) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_threads(monkeypatch):
    "Any number of threads, and any size of what they read at once, give the same numbers"
    monkeypatch.setattr(module, "_MOST", 128)
    pool = MemoryPool(); pool.extend([rich(97, hour=h) for h in range(40)])
    whole = pool.stats()
    for threads, window in ((1, 1), (3, 1 << 14), (8, 1 << 12)):
        monkeypatch.setattr(module, "_WINDOW", window)
        pool._readings.clear()
        assert pool.stats(threads=threads) == whole
    assert right(whole, list(pool)) and whole["info", "clock"].error > 0


def test_a_buffer_s_own_pool():
    "Also of a ring, which forgets its oldest episodes"
    buffer = MemoryBuffer(batch_size=4, capacity=40)
    for h in range(9):
        buffer.store(drive(12, hour=h))
        assert right(buffer.pool.stats(), list(buffer.pool))


# --- the formulas ---

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(1, 200), min_size=1, max_size=8), st.sampled_from([0, 1, -1e6, 1e9, 1e12]), st.randoms())
def test_portions_in_any_order(seed, sizes, offset, random):
    "Moments are those of all values, however these were cut and in whatever order, also far from zero"
    x = offset + np.random.default_rng(seed).standard_normal((2, sum(sizes)))
    x[0, :sizes[0]] = np.nan
    parts = [moments(part) for part in np.split(x, np.cumsum(sizes)[:-1], axis=1)]
    while len(parts) > 1:
        a, b = (parts.pop(random.randrange(len(parts))) for _ in range(2))
        parts.append(merged(a, b))
    found, there = parts[0], x[1] - offset
    assert (found.count == [sum(sizes[1:]), sum(sizes)]).all() and found.missing[0] == sizes[0]
    near = abs(offset) * 1e-15 + 1e-13
    np.testing.assert_allclose(found.mean[1] - offset, there.mean(), atol=4 * near)
    np.testing.assert_allclose(found.squares[1], there.var() * there.size, atol=there.size * 8 * near, rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 3000), st.sampled_from([2, 8, 64]), st.sampled_from(["random", "rising", "falling", "few", "zigzag"]))
def test_quantiles_within_their_error(seed, n, k, order):
    "In any order of any values; and the error is no greater than the theory says"
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 4 if order == "few" else 10**6, n).astype("float32")
    x[rng.random(n) < 0.1] = np.nan
    if order in ("rising", "zigzag"): x = np.sort(x)
    if order == "falling": x = np.sort(x)[::-1]
    if order == "zigzag": x[::2] = x[::2][::-1]
    sketch, whole = Sketch(), n - n % k
    for begin in range(0, whole, k): sketch = sketch.add(x[None, begin:begin + k])
    known, at = moments(x[None]), np.linspace(0, 1, 21)
    found, there = quantiles_of(sketch, x[None, whole:], known, at)[:, 0], np.sort(x[~np.isnan(x)])
    assert sketch.error <= n / (2 * k) * max(1, math.log2(n / k)) + n / k if n > k else sketch.error == 0
    if not len(there): assert np.isnan(found).all(); return
    rank = np.maximum(np.ceil(at * len(there)), 1)
    assert (np.searchsorted(there, found, "right") >= rank - sketch.error).all()
    assert (np.searchsorted(there, found, "left") < rank + sketch.error + 1e-9).all()
    assert found[0] == there[0] and found[-1] == there[-1]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9000), st.lists(st.integers(0, 9000), max_size=6))
def test_cuts_do_not_matter(seed, n, cuts):
    "A tally of steps that came in pieces is the same, bit for bit"
    x = np.random.default_rng(seed).standard_normal((n, 2)).astype("float32")
    empty = Tally(x[:0])
    whole, piecewise = empty.add(x), empty
    for piece in np.split(x, sorted(min(cut, n) for cut in cuts)): piecewise = piecewise.add(piece)
    assert whole.moments()[0] == n and all(np.array_equal(a, b) for a, b in zip(whole.moments(), piecewise.moments()))
    assert np.array_equal(whole.rest, piecewise.rest) and whole.sketch.error == piecewise.sketch.error
    for a, b in zip(whole.sketch.levels, piecewise.sketch.levels): assert (a is b is None) or np.array_equal(a, b)
    assert not len(empty.rest)


def test_extremes():
    "A constant is exactly constant, however it rounds; the greatest floats and whole numbers keep their ends"
    ends = np.array([[-2**63, 2**63 - 1]])
    assert moments(ends).min[0] == -2**63 and moments(ends).max[0] == 2**63 - 1
    huge = moments(np.array([[-1.7e308, 1.7e308, 1.7e308]]))
    assert np.isfinite(huge.mean).all() and huge.squares[0] == np.inf
    steps = 9000
    constant = Episode.from_arrays(state=np.full(steps, 0.1), nstate=np.full(steps, 0.1), action=np.full(steps, 0.3, "float32"), reward=np.ones(steps),
                                   timestamp=pd.date_range("2026-01-01", periods=steps, freq="1s", tz="UTC"))
    pool = MemoryPool(); pool.store(constant)
    assert (pool.stats().frame()["std"] == 0).all() and pool.stats().frame()["error"].max() < 1e-3


# --- what it shows ---

def test_json():
    "There and back bit for bit, also what is missing, in text that every reader of JSON takes"
    pool = MemoryPool(); pool.store(rich())
    stats = pool.stats(PoolQuery(vehicle=["a", "b"]), quantiles=AT)
    text = stats.to_json()
    def refuse(word): raise AssertionError(word)
    json.loads(text, parse_constant=refuse)
    again = Stats.from_json(text)
    assert again == stats and hash(again) == hash(stats) and again.schema == stats.schema and again != MemoryBuffer
    for a, b in zip(again.fields, stats.fields):
        assert all(getattr(a, n).dtype == getattr(b, n).dtype and getattr(a, n).tobytes() == getattr(b, n).tobytes() for n in module._NUMBERS)
    for wrong in ("", "[]", "{}", text[:-9], text.replace('"format": 1', '"format": 2'), text.replace('"mean"', '"mien"')):
        with pytest.raises(SchemaError, match="statistics"): Stats.from_json(wrong)
    with pytest.raises(ValueError): again.fields[0].mean[...] = 0


def test_frame_and_html():
    pool = MemoryPool(); pool.store(rich())
    stats = pool.stats(quantiles=[0.005, 0.5])
    frame = stats.frame()
    assert frame.shape[0] == 4 + 1 + 2 + 1 + 1 + 1 + 1 + 6 and frame.loc[("info", "eye", 5), "max"] == stats["info", "eye"].max[1, 2]
    assert list(frame)[-4:] == ["0.5%", "50%", "max", "error"] and frame["count"].dtype == "int64"
    assert "infinite" in stats._repr_html_() and "more rows" in stats._repr_html_() and "exact" in stats._repr_html_()
    assert stats["nstate", "heat"] is stats["state", "heat"]
    with pytest.raises(QueryError, match="no statistics of 'heat'"): stats["heat"]


def test_asked_wrongly():
    pool = MemoryPool(); pool.store(drive())
    for wrong in ([1.1], [-0.1], [np.nan], ["a"], 0.5, "0.5", [True]):
        with pytest.raises(QueryError, match="from 0 to 1"): pool.stats(quantiles=wrong)
    with pytest.raises(QueryError, match="threads"): pool.stats(threads=0)
    with pytest.raises(QueryError, match="no field 'speed'"): pool.stats(select={"state": ["speed"]})
    with pytest.raises(QueryError, match="no identity level"): pool.stats(PoolQuery(truck=1))


def test_complex_numbers_have_none():
    n = 5
    e = Episode.from_arrays(state={"z": np.arange(n) * 1j, "x": np.arange(n) * 1.0}, nstate={"z": np.arange(n) * 1j, "x": np.arange(n) * 1.0},
                            action=np.zeros(n), reward=np.zeros(n), timestamp=pd.date_range("2026-01-01", periods=n, freq="1s", tz="UTC"))
    buffer = MemoryBuffer(batch_size=3); buffer.store(e)
    stats = buffer.pool.stats()
    assert [f.field.name for f in stats.fields if f.field.role == "state"] == ["x"]
    with pytest.raises(SchemaError, match="leave its role out"): Normalize(stats)(buffer.sample())
    assert Normalize(stats, "action")(buffer.sample()).state.dtype.names


# --- batches ---

@pytest.fixture(scope="module")
def buffer():
    buffer = MemoryBuffer(batch_size=32, seed=3)
    for h in range(5): buffer.store(rich(30, hour=h, gaps=False))
    return buffer


def test_normalised_by_field(buffer):
    "Floats of every size by their numbers, in columns; whole numbers, flags and images as they are; and back"
    batch, stats = buffer.sample(), buffer.pool.stats()
    normalize = Normalize(stats, roles=("state", "action", "reward", "info"))
    there = normalize(batch)
    assert type(there) is Batch and [a.dtype for a in there] == [a.dtype for a in batch]
    for role in ("state", "nstate", "reward"):
        for name, values in there.fields(role).items():
            known = stats[role, name]
            expected = (batch.fields(role)[name].astype("float64") - known.mean) / known.std
            np.testing.assert_allclose(values, expected, rtol=2e-3 if name == "odd" else 1e-5, atol=2e-3 if name == "odd" else 1e-5)
    assert there.action is batch.action and there.info is batch.info
    back = normalize.undo(there)
    np.testing.assert_allclose(back.state["pose"], batch.state["pose"], rtol=1e-15)
    np.testing.assert_allclose(back.reward, batch.reward, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", [Windows(4, edge="pad"), Episodes(), Stack(3), NStep(3, 0.9), Epoch()], ids=str)
def test_every_sampler(sampler):
    "Sequences, padding, stacked states and returns: the same attributes, 0 where a mask hides, NaN nowhere"
    pool = MemoryPool(); pool.extend([drive(5 + h, hour=h) for h in range(9)])
    buffer = MemoryBuffer(pool=pool, batch_size=16, seed=1, sampler=sampler)
    batch, normalize = buffer.sample(), Normalize(pool.stats(), roles=["action", "state"])
    there = pickle.loads(pickle.dumps(normalize(batch)))
    assert there.state.shape == batch.state.shape and there.state.dtype == "float32" and dir(there) == dir(batch)
    for name in batch._names(): np.testing.assert_array_equal(getattr(there, name), getattr(batch, name))
    mask, known = batch.mask, normalize.stats["action", "brake"]
    np.testing.assert_allclose(there.action[mask][..., 1], (batch.action[mask][..., 1] - known.mean) / known.std, rtol=1e-4, atol=1e-5)
    assert not there.state[~mask].any() and not there.nstate[~mask].any() and not normalize.undo(there).action[~mask].any()
    np.testing.assert_allclose(normalize.undo(there).nstate, batch.nstate, atol=1e-5)
    assert normalize(batch.state, "nstate").shape == batch.state.shape


def test_constant_and_missing_fields():
    "One that never changes becomes 0 and comes back, one that is never there stays missing"
    n = 20
    state = {"still": np.full(n, 7, "float32"), "never": np.full(n, np.nan, "float32"), "x": np.arange(n, dtype="float32")}
    e = Episode.from_arrays(state=state, nstate=state, action=np.full(n, 0.1), reward=np.zeros(n, "float32"),
                            timestamp=pd.date_range("2026-01-01", periods=n, freq="1s", tz="UTC"))
    buffer = MemoryBuffer(batch_size=8, seed=1); buffer.store(e)
    normalize, batch = Normalize(buffer.pool.stats()), buffer.sample()
    there = normalize(batch)
    assert not there.state[:, 0].any() and np.isnan(there.state[:, 1]).all() and (abs(there.action) < 1e-15).all()
    assert (normalize.undo(there).state[:, 0] == 7).all() and (normalize.undo(there).action == 0.1).all()


def test_selected_and_unlike(buffer):
    "Fields by name, in any order; typed errors for others"
    stats = buffer.pool.stats()
    some = MemoryBuffer(pool=buffer.pool, batch_size=8, select={"state": ["odd", "heat"]}, seed=4)
    batch = some.sample()
    assert batch.schema.of("state")[0].name == "odd"
    for known in (stats, buffer.pool.stats(select=some.select)):
        np.testing.assert_allclose(Normalize(known)(batch).state["heat"], (batch.state["heat"] - known["state", "heat"].mean) / known["state", "heat"].std,
                                   rtol=1e-5, atol=1e-6)
    with pytest.raises(SchemaError, match="do not have state pose"): Normalize(buffer.pool.stats(select=some.select))(buffer.sample())
    other = MemoryBuffer(batch_size=2); other.store(drive())
    with pytest.raises(SchemaError, match="do not have state velocity"): Normalize(stats)(other.sample())
    with pytest.raises(SchemaError, match="say schema="): Normalize(other.pool.stats())(np.zeros((4, 5), "float32"), "state")
    one = Schema([Field("state", "slope"), *drive().schema.fields[2:]], drive().schema.identity)
    assert Normalize(other.pool.stats())(np.zeros((4, 1), "float32"), "state", schema=one).shape == (4, 1)
    with pytest.raises(SchemaError, match="astype"): Normalize(other.pool.stats())(np.zeros((4, 3), int), "state")
    for wrong in ((), "speed", ["nstate"], None, [1]):
        with pytest.raises(QueryError, match="roles"): Normalize(stats, wrong)
    with pytest.raises(QueryError, match="pool.stats()"): Normalize(buffer.pool)
    assert repr(Normalize(stats, ["action", "reward"])) == "Normalize(action: nothing; reward: r)"
