"Signals on one grid are what an obvious, slow reading of their samples gives."
import math
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_io_nbdev import Layout, resample
from data_io_nbdev.errors import SchemaError
from data_io_nbdev.testing import ZONES, examples

START = 1_774_746_000_000_000  # 2026-03-29 01:00 UTC, when clocks in Berlin are set forward


def series(samples, zone="UTC", dtype="float64"):
    index = pd.DatetimeIndex(np.array([START + t for t, _ in samples], "M8[us]"), tz="UTC").tz_convert(zone)
    return pd.Series(np.array([v for _, v in samples], dtype), index)


def slow(samples, grid, step, how, limit):
    "What a signal is at each time: `(value or None, filled)`"
    samples, out = [(t, v) for t, v in samples if not math.isnan(v)], []
    for i, g in enumerate(grid):
        since = grid[i - 1] if i else g - step
        own = [v for t, v in samples if since < t <= g]
        before, after = [(t, v) for t, v in samples if t <= g], [(t, v) for t, v in samples if t >= g]
        value = None
        if how == "hold" and before and g - before[-1][0] <= limit: value = before[-1][1]
        if how == "nearest" and samples:
            t, v = min(samples, key=lambda s: (abs(s[0] - g), s[0]))
            if abs(t - g) <= limit: value = v
        if how == "linear" and before and after and after[0][0] - before[-1][0] <= limit:
            (a, low), (b, high) = before[-1], after[0]
            value = low if a == b else float(Fraction(low) + (Fraction(high) - Fraction(low)) * Fraction(g - a, b - a))
        if how == "mean" and own: value = math.fsum(own) / len(own)
        out.append((value, value is not None and not own))
    return out


values = st.floats(-100, 100, width=16) | st.just(math.nan)
samples = st.lists(st.tuples(st.integers(0, 400), values), max_size=8, unique_by=lambda s: s[0]).map(sorted)


@examples(300)
@given(st.dictionaries(st.sampled_from("abc"), samples, min_size=1), st.integers(1, 90), st.booleans(), st.data())
def test_signals_are_what_a_slow_reading_gives(signals, step, own_clock, data):
    how = {name: data.draw(st.sampled_from(["hold", "linear", "nearest", "mean"])) for name in signals}
    limit, zone = data.draw(st.none() | st.integers(1, 200)), data.draw(st.sampled_from(ZONES))
    known = [t for s in signals.values() for t, v in s if not math.isnan(v)]
    if own_clock:
        clock = data.draw(st.sampled_from(sorted(signals)))
        grid, where = [t for t, v in signals[clock] if not math.isnan(v)], {"at": clock}
        step = grid[1] - grid[0] if len(grid) > 1 else 1
    else:
        where = {"every": pd.Timedelta(step, "us")}
        grid = [t - START for t in range(START + min(known), START + max(known) + 1) if t % step == 0] if known else []
    given = {name: series(s, zone) for name, s in signals.items()}
    table = resample(given, how=how, limit=None if limit is None else pd.Timedelta(limit, "us"), flags=True, **where)
    assert (table.index.tz_convert("UTC").asi8 - START).tolist() == grid and (not grid or str(table.index.tz) == str(next(iter(given.values())).index.tz))
    for name, own in signals.items():
        told = slow(own, grid, step, how[name], math.inf if limit is None else limit)
        expected = [math.nan if v is None else v for v, _ in told]
        assert np.allclose(table[name], expected, rtol=1e-12, atol=1e-12, equal_nan=True)
        assert table[f"{name}_filled"].tolist() == [filled for _, filled in told]
        assert table.attrs["filled"][name] == sum(filled for _, filled in told)
        assert table.attrs["missing"][name] == sum(v is None for v, _ in told)


@pytest.mark.parametrize("dtype, nullable", [("int8", "Int8"), ("uint16", "UInt16"), ("int64", "Int64"), ("bool", "boolean")])
def test_whole_numbers_stay_what_they_are(dtype, nullable):
    s = {"gear": series([(0, 1), (400, 0)], dtype=dtype)}
    whole, holes = resample(s, every="100us"), resample(s, every="100us", limit="100us")
    assert whole["gear"].dtype == dtype and holes["gear"].dtype == nullable
    assert holes["gear"].isna().tolist() == [False, False, True, True, False] and holes["gear"].iloc[[0, 4]].tolist() == [1, 0]
    assert resample(s, every="100us", how="linear")["gear"].tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert resample({"gear": s["gear"].astype(nullable)}, every="100us")["gear"].equals(whole["gear"])


def test_floats_keep_their_width():
    s = {"speed": series([(0, 1), (400, 2)], dtype="float32")}
    for how in ("hold", "linear", "nearest", "mean"): assert resample(s, every="100us", how=how)["speed"].dtype == "float32"


@pytest.mark.parametrize("zone, night, hours", [("Europe/Berlin", "2026-03-29", 23), ("Europe/Berlin", "2026-10-25", 25), ("America/New_York", "2026-11-01", 25)])
def test_a_day_with_a_clock_change_has_its_hours(zone, night, hours):
    day = pd.date_range(night, periods=2, freq="1D", tz=zone)
    table = resample({"speed": pd.Series([0.0, hours], day)}, every="1h", how="linear")
    assert np.allclose(table["speed"], np.arange(hours + 1)) and (np.diff(table.index.asi8) == 3_600_000_000).all()


def test_a_microsecond_counts():
    big = pd.Series([1.0, 2.0], pd.DatetimeIndex(["2026-01-01T00:00:00.000001Z", "9999-01-01T00:00:00.000002Z"]))
    assert resample({"a": big}, at="a", limit="1us")["a"].tolist() == [1.0, 2.0]
    with pytest.raises(SchemaError, match="was a clock never set"): resample({"a": big}, every="1ms")
    with pytest.raises(SchemaError, match="floor"):
        resample({"a": pd.Series([1.0], pd.DatetimeIndex(["2026-01-01T00:00:00.0000001Z"]))}, every="1ms")


@pytest.mark.parametrize("given, how, said", [
    ({}, {}, "got none"), ({"a": [1]}, {}, "expected a Series"), ({1: series([(0, 1)])}, {}, "got the name 1"), ({"a": series([(0, 1)])}, {"every": None}, "say one of"),
    ({"a": series([(0, 1)])}, {"at": "a"}, "say one of"), ({"a": series([(0, 1)])}, {"how": "cubic"}, "expected one of hold"),
    ({"a": series([(0, 1)])}, {"how": {"b": "hold"}}, "there is no signal 'b'"), ({"a": series([(0, 1)])}, {"limit": "0s"}, "whole microseconds"),
    ({"a": series([(0, 1)])}, {"every": "soon"}, "span of time"), ({"a": series([(0, 1)])}, {"every": "1ns"}, "whole microseconds"),
    ({"a": series([(0, 1)])}, {"every": None, "at": "b"}, "there is no signal 'b'"), ({"a": pd.Series(["D"], series([(0, 1)]).index)}, {}, "a boolean or number")])
def test_what_is_refused(given, how, said):
    with pytest.raises(SchemaError, match=said): resample(given, **{"every": "1ms", **how})


def test_the_remedies_for_times_work():
    s = series([(0, 1), (100, 2), (200, 3)])
    with pytest.raises(SchemaError, match=r"s\.sort_index\(\)"): resample({"a": s[::-1]}, every="100us")
    with pytest.raises(SchemaError, match=r"s\[~s\.index\.duplicated\(\)\]"): resample({"a": s.iloc[[0, 0, 1, 2]]}, every="100us")
    s2 = s.iloc[[0, 0, 2, 1]].sort_index()
    assert resample({"a": s2[~s2.index.duplicated()]}, every="100us").equals(resample({"a": s}, every="100us"))


def test_a_layout_parts_what_is_beyond_the_limit():
    a = series([(t * 100_000, t) for t in range(40) if not 10 <= t < 25])
    table = resample({"a": a, "b": a * 2}, every="100ms", limit="200ms", flags=True)
    layout = Layout(state=["a"], action="b", reward="b", info=["a_filled"], time="timestamp", gap="1s", missing="drop")
    first, second = layout.episodes(table)
    assert (len(first), len(second)) == (11, 14) and first.info.ravel().tolist() == [False] * 10 + [True]
    frame = pd.DataFrame({"a": a, "b": a * 2})
    assert resample(frame, every="100ms", limit="200ms", flags=True).equals(table)
