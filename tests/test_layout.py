"Plain tables become the episodes that an obvious, slow reading of them gives, whole and in portions, or an error."
import json
import math
import statistics
import warnings
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from itertools import groupby
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_io_nbdev import MemoryPool
from data_io_nbdev.data.layout import Layout, portions
from data_io_nbdev.errors import SchemaError
from data_io_nbdev.testing import examples

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
BASE = Layout(state=["speed"], action=["torque"], reward="work", time="t", who=["vehicle"])


# --- the oracle ---

class Doubt(Exception): "The table is doubtful"


def mean_of(rows):
    "One row of several of one time: floats are averaged, the last of the rest counts"
    out = {**rows[-1], "row": rows[0]["row"]}
    for c in ("speed", "torque", "work", "next"):
        known = [r[c] for r in rows if not math.isnan(r[c])]
        out[c] = statistics.fmean(known) if known else math.nan
    return out


def parted(rows, layout):
    "Rows of one key, in order, as lists of the rows of an episode"
    out = []
    for row in rows:
        last = out[-1][-1] if out else None
        new = last is None or (layout.order == "split" and row["t"] < last["t"])
        if last and layout.gap and row["t"] - last["t"] > pd.Timedelta(layout.gap): new = True
        if last and layout.terminated and last["done"] and not new:
            if layout.episode: raise Doubt("rows follow an end")
            new = True
        if new: out.append([])
        out[-1].append(row)
    return out


def lacks_rest(part, i, layout):
    "Whether a row of an episode lacks what is used of it beside its state"
    used = layout.nstate is not None or i < len(part) - 1 or (layout.terminated and part[i]["done"])
    return bool(used) and (math.isnan(part[i]["torque"]) or math.isnan(part[i]["work"]))


def slow(rows, layout):
    "Episodes by reading row after row: `(who, [(t, speed, torque, work, next, done)])`; or `Doubt`"
    if layout.missing != "drop" and any(r["t"] is None or r["vehicle"] is None for r in rows): raise Doubt("no key")
    rows, keys = [r for r in rows if r["t"] is not None and r["vehicle"] is not None], {}
    for r in rows: keys.setdefault((r["vehicle"], r["trip"] if layout.episode else None), []).append(r)
    found = []
    for (vehicle, _), own in keys.items():
        if layout.order == "sort": own = sorted(own, key=lambda r: r["t"])
        if layout.order == "raise" and any(b["t"] < a["t"] for a, b in zip(own, own[1:])): raise Doubt("time goes back")
        copies = [list(group) for _, group in groupby(own, key=lambda r: r["t"])]
        if layout.duplicates == "raise" and any(len(group) > 1 for group in copies): raise Doubt("duplicates")
        own = [{"first": g[0], "last": g[-1], "mean": mean_of(g), "raise": g[0]}[layout.duplicates] for g in copies]
        no_state = lambda r: math.isnan(r["speed"]) or (layout.nstate is not None and math.isnan(r["next"]))
        parted(own, layout)  # may doubt
        if layout.missing == "raise" and any(map(no_state, own)): raise Doubt("missing")
        if layout.missing == "drop": own = [r for r in own if not no_state(r)]
        parts = parted(own, layout)
        lacking = [r["row"] for part in parts for i, r in enumerate(part) if lacks_rest(part, i, layout)]
        if layout.missing == "raise" and lacking: raise Doubt("missing")
        if layout.missing == "drop": parts = parted([r for r in own if r["row"] not in lacking], layout)
        found += [(vehicle, steps) for part in parts if (steps := steps_of(part, layout))]
    return found


def steps_of(part, layout):
    "The steps of the rows of one episode"
    if layout.nstate is not None: nexts = [r["next"] for r in part]
    else:
        nexts = [r["speed"] for r in part[1:]]
        if layout.terminated and part[-1]["done"]: nexts.append(part[-1]["speed"])
    return [(r["t"], r["speed"], r["torque"], r["work"], n, bool(layout.terminated and r["done"])) for r, n in zip(part, nexts)]


# --- tables ---

numbers = st.sampled_from([0.0, 1.5, 2.25, -3.0]) | st.just(math.nan)


@st.composite
def tables(draw, ordered=False, whole=False):
    "Rows of a table, at times that meet, go back and leave gaps"
    n, rows = draw(st.integers(1, 14)), []
    value = st.sampled_from([0.0, 1.5, 2.25, -3.0]) if whole else numbers
    for i in range(n):
        t = draw(st.integers(0, 12)) if not ordered else i + draw(st.sampled_from([0, 0, 20]))
        vehicle = draw(st.sampled_from(["VB7", "XK2"] if whole else ["VB7", "XK2", "VB7", "XK2", None]))
        lost = not whole and draw(st.integers(0, 30)) == 0
        rows.append(dict(t=None if lost else START + timedelta(seconds=t), vehicle=vehicle, trip=draw(st.integers(0, 2)),
                         speed=draw(value), torque=draw(value), work=draw(value), next=draw(value), done=draw(st.integers(0, 5)) == 0))
    if draw(st.booleans()): rows.sort(key=lambda r: (r["vehicle"] or "", r["trip"], r["t"] or START))
    return [{**r, "row": i} for i, r in enumerate(rows)]


layouts = st.builds(lambda episode, gap, order, duplicates, missing, nstate, terminated: replace(
    BASE, episode=episode, gap=gap, order=order, duplicates=duplicates, missing=missing, nstate=nstate, terminated=terminated),
    episode=st.sampled_from([None, "trip"]), gap=st.sampled_from([None, "3s"]), order=st.sampled_from(["raise", "sort", "split"]),
    duplicates=st.sampled_from(["raise", "first", "last", "mean"]), missing=st.sampled_from(["raise", "drop", "keep"]),
    nstate=st.sampled_from([None, ["next"]]), terminated=st.sampled_from([None, "done"]))


def frame_of(rows):
    frame = pd.DataFrame(rows).drop(columns="row")
    return frame.assign(t=pd.to_datetime(frame["t"], utc=True).astype("datetime64[us, UTC]"), vehicle=frame["vehicle"].astype("str" if all(r["vehicle"] for r in rows) else object))


def read(layout, table, **how):
    "Episodes as plain values, in any order"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of episodes of one row
        return sorted(map(plain, layout.episodes(table, **how)), key=repr)


def plain(e):
    columns = [e.timestamp.to_pydatetime().tolist(), *(e.blocks[r].ravel().tolist() for r in ("state", "action", "reward", "nstate", "terminated"))]
    return e.who["vehicle"], [tuple(step) for step in zip(*columns)]


def expected(rows, layout):
    return sorted(slow(rows, layout), key=repr)


@examples(300)
@given(tables(), layouts)
def test_a_table_gives_the_episodes_of_a_slow_reading(rows, layout):
    try: wanted = expected(rows, layout)
    except Doubt:
        with pytest.raises(SchemaError): read(layout, frame_of(rows))
        return
    assert repr(read(layout, frame_of(rows))) == repr(wanted)  # NaN equals NaN in print


@examples(200)
@given(tables(whole=True), layouts, st.integers(1, 6), st.integers(1, 20))
def test_portions_give_the_same_episodes_or_say_that_they_cannot(rows, layout, size, most):
    frame = frame_of(rows)
    cut = [frame[i:i + size] for i in range(0, len(frame), size)]
    try: wanted = expected(rows, layout)
    except Doubt:
        with pytest.raises(SchemaError): read(layout, cut, rows=most)
        return
    try: found = read(layout, cut, rows=most)
    except SchemaError as e: assert "closed in an earlier portion" in str(e)
    else: assert repr(found) == repr(wanted)


@examples(150)
@given(tables(whole=True), layouts, st.integers(1, 6), st.integers(1, 20))
def test_portions_of_a_table_in_order_are_never_refused(rows, layout, size, most):
    rows = sorted(rows, key=lambda r: (r["vehicle"], r["trip"] if layout.episode else 0, r["t"]))
    rows = [{**r, "row": i} for i, r in enumerate(rows)]
    frame = frame_of(rows)
    try: wanted = expected(rows, layout)
    except Doubt: return
    assert repr(read(layout, [frame[i:i + size] for i in range(0, len(frame), size)], rows=most)) == repr(wanted)


@examples(150)
@given(tables(whole=True), layouts, st.sampled_from([None, "ms", "us"]))
def test_there_and_back(rows, layout, epoch):
    layout = replace(layout, order="sort", duplicates="first", truncated="stop", epoch=epoch, info={"gear": "gear"},
                     episode=None if layout.nstate is not None and not layout.terminated else layout.episode)
    frame = frame_of(rows).assign(stop=False, gear=np.arange(len(rows), dtype="float32" if layout.missing == "keep" else "uint8"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = list(layout.episodes(frame))
    except SchemaError: return
    try: table = layout.table(found)
    except SchemaError as e:
        assert "nothing parts" in str(e)
        return
    again = list(layout.episodes(table)) if len(table) else []
    key = lambda e: (str(e.who), e.start, len(e), e.digest)
    assert sorted(again, key=key) == sorted(found, key=key)


# --- clocks ---

def utc_of(naive, zone):
    "UTC of a clock's reading, or why it has none"
    both = [naive.replace(tzinfo=zone, fold=fold) for fold in (0, 1)]
    if any(t.astimezone(timezone.utc).astimezone(zone).replace(tzinfo=None) != naive for t in both): return "never"
    return both[0].astimezone(timezone.utc) if both[0].utcoffset() == both[1].utcoffset() else "twice"


CHANGES = {"Europe/Berlin": ["2026-03-29 02:00", "2026-10-25 02:00"], "America/New_York": ["2026-03-08 02:00", "2026-11-01 01:00"],
           "Australia/Lord_Howe": ["2026-04-05 01:30", "2026-10-04 02:00"], "UTC": ["2026-03-29 02:00"]}


@examples(150)
@given(st.data())
def test_naive_times_get_their_zone_or_are_named(data):
    name = data.draw(st.sampled_from(list(CHANGES)))
    around = datetime.fromisoformat(data.draw(st.sampled_from(CHANGES[name])))
    minutes = sorted(data.draw(st.lists(st.integers(-180, 180), min_size=2, max_size=8, unique=True)))
    naive = [around + timedelta(minutes=m) for m in minutes]
    told = [utc_of(t, ZoneInfo(name)) for t in naive]
    frame = pd.DataFrame({"t": naive, "vehicle": "VB7", "speed": np.arange(len(naive)), "torque": 0, "work": 0})
    if data.draw(st.booleans()): frame["t"] = frame["t"].map(datetime.isoformat)
    layout = replace(BASE, zone=name)
    bad = {why: [i for i, t in enumerate(told) if t == why] for why in ("twice", "never")}
    if not any(bad.values()):
        e, = layout.episodes(frame)
        assert e.timestamp.tz_convert("UTC").to_pydatetime().tolist() == told[:-1] and e.zone == name
        return
    with pytest.raises(SchemaError) as error: list(layout.episodes(frame))
    for why, rows in bad.items():
        named = f"{why} (row{'s' * (len(rows) > 1)} {', '.join(map(str, rows))})"
        assert (named in str(error.value)) == bool(rows)


def test_the_remedies_for_a_clock_change_work():
    t = pd.DatetimeIndex(["2026-10-25 01:30", "2026-10-25 02:30", "2026-10-25 02:30", "2026-10-25 03:30"])
    table = pd.DataFrame({"t": t, "vehicle": "VB7", "speed": 0.0, "torque": 0.0, "work": 0.0})
    layout = replace(BASE, zone="Europe/Berlin")
    with pytest.raises(SchemaError, match=r"tz_localize\('Europe/Berlin', ambiguous=True"): list(layout.episodes(table))
    table["t"] = table["t"].dt.tz_localize("Europe/Berlin", ambiguous="infer")
    e, = layout.episodes(table)
    assert np.diff(e.times).tolist() == [3_600_000_000] * 2
    spring = table.assign(t=pd.DatetimeIndex(["2026-03-29 01:30", "2026-03-29 02:30", "2026-03-29 03:30", "2026-03-29 04:30"]))
    with pytest.raises(SchemaError, match="nonexistent='shift_forward'"): list(layout.episodes(spring))
    spring["t"] = spring["t"].dt.tz_localize("Europe/Berlin", nonexistent="shift_forward")
    assert len(next(layout.episodes(spring))) == 3


@pytest.mark.parametrize("epoch, per", [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
def test_numbers_count_since_1970(epoch, per):
    counts = np.arange(3) * per + 1_767_225_600 * per
    table = pd.DataFrame({"t": counts, "vehicle": "VB7", "speed": 0.0, "torque": 0.0, "work": 0.0})
    with pytest.raises(SchemaError, match=f"epoch='{epoch}'"): list(BASE.episodes(table))
    e, = replace(BASE, epoch=epoch).episodes(table)
    assert e.timestamp.tolist() == pd.date_range("2026-01-01", periods=2, freq="1s", tz="UTC").tolist()
    floats, = replace(BASE, epoch=epoch).episodes(table.assign(t=counts.astype(float)))
    assert floats == e


@pytest.mark.parametrize("t, said", [
    (["2026-01-01T08:00Z", "2026-01-01T08:00"], "offset"), (["1.1.2026", "2.1.2026"], "rows 0, 1"), (["2016-12-31T23:59:60Z"] * 2, "rows 0, 1"),
    (pd.to_datetime(["2026-01-01T00:00:00.000000001Z"] * 2), "below a microsecond"), ([1e300, 2e300], "9999"), ([True, False], "rows 0, 1")])
def test_what_is_no_time(t, said):
    table = pd.DataFrame({"t": t, "vehicle": "VB7", "speed": 0.0, "torque": 0.0, "work": 0.0})
    with pytest.raises(SchemaError, match=said): list(replace(BASE, epoch="s").episodes(table))


# --- kinds of tables ---

@pytest.fixture
def log():
    t = np.arange(40)
    return pd.DataFrame({"t": pd.Timestamp("2026-01-01T08:00", tz="Europe/Berlin") + pd.to_timedelta(t, unit="s"),
                         "vehicle": np.where(t < 20, "VB7", "XK2"), "trip": t // 5, "speed": t + 0.25, "gear": (t % 5).astype("int8"),
                         "u1": t * 1.0, "u2": t * 2.0, "torque": -t * 1.0, "work": 1.0, "done": t % 10 == 9, "note": "x"})


FULL = replace(BASE, state={"speed": "speed", "gear": "gear", "u": "u*"}, episode="trip", terminated="done", units={"speed": "m/s"},
               zone="Europe/Berlin")


@pytest.mark.parametrize("rows", [1, 3, 7, 1000])
def test_every_kind_of_table_gives_the_same(log, tmp_path, rows):
    expected = list(FULL.episodes(log))
    assert len(expected) == 8 and [len(e) for e in expected] == [4, 5] * 4 and expected[0].zone == "Europe/Berlin"
    assert expected[0].schema.block("state").names == ("speed", "gear", "u")
    log.to_parquet(tmp_path / "log.parquet", row_group_size=6)
    log.to_csv(tmp_path / "log.csv", index=False)
    arrow = pa.Table.from_pandas(log)
    kinds = [arrow, pl.from_pandas(log), arrow.to_reader(4), tmp_path / "log.parquet", [log[:13], arrow.slice(13)],
             iter([log[:1], log[1:]]), log.astype({"vehicle": "category", "gear": "Int8", "done": "boolean", "speed": "float64[pyarrow]"}),
             arrow.to_pandas(types_mapper=pd.ArrowDtype), log.set_index("t"), log.set_index(["vehicle", "trip", "t"])]
    for table in kinds: assert list(FULL.episodes(table, rows=rows)) == expected, table
    with_dtype = replace(FULL, dtype={"gear": "int8"})
    assert list(with_dtype.episodes(str(tmp_path / "log.csv"), rows=rows)) == expected
    dtypes = {f.name: f.dtype for f in next(FULL.episodes(tmp_path / "log.csv")).schema.fields}
    assert dtypes["gear"] == "float64"  # a CSV file has no dtypes


def test_a_csv_key_keeps_the_dtype_of_the_first_portion(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("t,vehicle,speed,torque,work\n" + "".join(f"2026-01-01T00:00:0{i}Z,{v},1,2,3\n" for i, v in enumerate(["007", "007", "X1", "X1"])))
    with pytest.raises(SchemaError, match="'str'"): list(BASE.episodes(path, rows=2))
    assert [e.who["vehicle"] for e in replace(BASE, dtype={"vehicle": "str"}).episodes(path, rows=2)] == ["007", "X1"]
    assert [e.who["vehicle"] for e in BASE.episodes(path)] == ["007", "X1"]


def test_only_the_columns_that_are_needed_are_read(log, tmp_path):
    bad = log.assign(note=[b"\xff"] * 40)
    pq.write_table(pa.table({c: pa.array(bad[c]) for c in bad}), tmp_path / "log.parquet")
    assert list(FULL.episodes(tmp_path / "log.parquet")) == list(FULL.episodes(log))


def test_one_episode_keeps_no_portion_alive(log):
    e = next(FULL.episodes(pd.concat([log] * 50).assign(vehicle=np.repeat(np.arange(50), 40))))
    owners = [b if b.base is None else b.base for b in (e.times, *e.blocks.values())]
    assert sum(b.nbytes for b in owners) < 2 * e.nbytes


def test_memory_is_bounded_by_a_portion(log):
    seen = []
    def parts():
        for i in range(200):
            seen.append(i)
            yield log.assign(trip=log["trip"] + 8 * i, t=log["t"] + pd.Timedelta(i, "h"))
    found = FULL.episodes(parts())
    for _ in range(8): next(found)
    assert len(seen) <= 3  # lazily


# --- doubts ---

def test_dtypes_follow_the_first_portion(log):
    first, second = log[:20].assign(gear=1), log[20:].assign(gear=1.5)
    with pytest.raises(SchemaError, match=r"Layout\(dtype=\{'gear': 'float64'\}\)"): list(FULL.episodes([first, second]))
    found = list(replace(FULL, dtype={"gear": "float64"}).episodes([first, second]))
    assert {e.schema for e in found} == {found[0].schema}
    small = list(replace(FULL, dtype="float32").episodes(log))
    assert {f.dtype for f in small[0].schema.fields} == {"float32"}


def test_an_integer_beside_a_missing_value_is_one_again(log):
    table = log.assign(trip=log["trip"].where(log.index != 7))
    with pytest.raises(SchemaError, match="missing in row 7"): list(FULL.episodes(table))
    found = list(replace(FULL, who=["vehicle", "trip"], missing="drop").episodes(table))
    assert [e.who["trip"] for e in found] == list(range(8)) and len(found[1]) == 4


@pytest.mark.parametrize("change, said", [
    (dict(speed="fast"), "column speed"), (dict(done=2), "1 and 0"), (dict(vehicle=1.5), "identity level"), (dict(vehicle=None), "is missing"),
    (dict(done=pd.array([None] * 40, "boolean")), "fillna"), (dict(work=None), "expected|missing")])
def test_what_a_table_may_not_hold(log, change, said):
    with pytest.raises(SchemaError, match=said): list(FULL.episodes(log.assign(**change)))


def test_a_table_of_no_rows_has_no_episodes(log):
    assert list(FULL.episodes(log[:0])) == list(FULL.episodes([])) == list(FULL.episodes([log[:0], log[:0]])) == []
    found = FULL.episodes([log[:0], log[:7], log[7:7], log[7:], log[:0]])  # an episode comes when it is complete
    assert sorted(found, key=lambda e: e.start) == list(FULL.episodes(log))


def test_columns_without_names_are_refused():
    with pytest.raises(SchemaError, match="no column 't'"): list(BASE.episodes(pd.DataFrame(np.ones((2, 3)))))
    with pytest.raises(SchemaError, match="missing: reward"): replace(BASE, reward=...)
    assert "episodes" in dir(BASE) and not any(name.startswith("_") for name in dir(BASE))


def test_episodes_of_one_row_are_told(log):
    with pytest.warns(UserWarning, match="1 episodes of one row make no step, and were left out: row 5"):
        assert len(list(FULL.episodes(log.drop(index=[6, 7, 8, 9]).reset_index(drop=True)))) == 7


def test_a_truncated_last_row_flags_the_last_step(log):
    table = log.drop(columns="done").assign(stop=log.index % 5 == 4)
    found = list(replace(FULL, terminated=None, truncated="stop").episodes(table))
    assert all(e.truncated.tolist() == [False] * 3 + [True] for e in found)
    assert list(replace(FULL, terminated=None, truncated="stop").episodes(replace(FULL, terminated=None, truncated="stop").table(found))) == found


def test_a_function_sees_one_episode_at_a_time_in_order(log):
    seen = []
    def reward(rows):
        seen.append(rows)
        return rows["speed"].diff()
    with pytest.raises(SchemaError, match="gives NaN in row 0"): list(replace(FULL, reward=reward).episodes(log))
    found = list(replace(FULL, reward=lambda rows: rows["speed"].diff().shift(-1).fillna(0), order="sort").episodes(log.sample(frac=1, random_state=1)))
    assert all(np.allclose(e.reward[:4], 1) for e in found) and seen[0]["trip"].nunique() == 1
    with pytest.raises(SchemaError, match="for each of 5 rows, got 2"): list(replace(FULL, reward=lambda rows: [1.0, 2.0]).episodes(log))


def test_a_pool_says_how_to_write_the_layout(log):
    with pytest.raises(SchemaError) as error: MemoryPool().store(log.drop(columns="note"))
    code = str(error.value).split("pool.extend(")[1].split(".episodes(table)")[0]
    pool = MemoryPool()
    pool.extend(eval(code, {"Layout": Layout}).episodes(log))
    assert len(pool) == 8 and eval(code, {"Layout": Layout}) == Layout.guess(log)


@examples(100)
@given(layouts, st.sampled_from([None, "s"]), st.dictionaries(st.text(max_size=5), st.text(min_size=1, max_size=3) | st.integers(0, 9), max_size=2))
def test_json_and_print_bring_a_layout_back(layout, epoch, who):
    layout = replace(layout, epoch=epoch, who={**who, "vehicle": ["Fahrzeug"]}, state={"speed": "v", "u": ["u1", "u2"]}, nstate=None, dtype={"u": "float32"})
    assert Layout.from_json(layout.to_json()) == layout == eval(repr(layout), {"Layout": Layout})
    assert json.loads(layout.to_json())["format"] == 1


def test_guesses_of_common_tables():
    def guess(**columns): return Layout.guess(pd.DataFrame({c: [v] for c, v in columns.items()}))
    flat = guess(observations=1.0, actions=0.5, rewards=1.0, terminals=False, timeouts=False, timestamp=pd.Timestamp("2026", tz="UTC"))
    assert (flat.terminated, flat.truncated, flat.state) == ("terminals", "timeouts", {"observations": "observations"})
    counted = guess(time_ms=1_767_225_600_000, obs_0=1.0, obs_1=2.0, a0=0.0, a1=0.0, r=1.0, episode_id=3)
    assert (counted.epoch, counted.state, counted.action, counted.episode) == ("ms", {"obs": ("obs_0", "obs_1")}, {"a": ("a0", "a1")}, "episode_id")
    paired = guess(Timestamp="2026-01-01T00:00Z", Driver="anna", speed=1.0, next_speed=2.0, Throttle=0.1, reward=1.0)
    assert paired.nstate == {"speed": "next_speed"} and paired.who == {"Driver": ("Driver",)}


def test_many_small_row_groups_are_put_together(log, tmp_path):
    pq.write_table(pa.Table.from_pandas(log), tmp_path / "log.parquet", row_group_size=1)
    assert [len(part) for part in portions(tmp_path / "log.parquet", FULL, 15)] == [15, 15, 10]
