"""Time, order and remedies: what an error or a warning tells to do is done here, literally, and leads to what it promises."""
import datetime as dt
import importlib
import pickle
import re
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pytest
from dateutil import tz as dateutil_tz

from data_io_nbdev import errors
from data_io_nbdev.data.core import Episode, PoolQuery, Record, records, utc_us
from data_io_nbdev.data.schema import Field, Schema
from data_io_nbdev.errors import (ClosedError, EpisodeConflict, EpisodeNotFound, PoolNotFound, PoolUnavailable, QueryError, ReadOnly, SchemaError,
                                  SnapshotNotFound)
from data_io_nbdev.storage.buffer.memory import MemoryBuffer
from data_io_nbdev.storage.pool.memory import MemoryPool
from data_io_nbdev.storage.pool.pool import open_pool
from data_io_nbdev.testing import HARNESSES, drive, facts, facts_of, python

DAY = pd.Timedelta("1D")


@pytest.fixture(params=sorted(HARNESSES))
def harness(request, tmp_path): return HARNESSES[request.param](tmp_path)


def told(call):
    "What a call warns of: messages, each of which points at this file"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        call()
    assert {w.filename for w in seen} <= {__file__}, "a warning points at the caller's line"
    return [str(w.message) for w in seen]


def arrays(e, **changes):
    "An episode as the arguments of `from_arrays`"
    given = {r: e.fields(r) for r in ("state", "action", "reward", "nstate")} | dict(terminated=e.terminated, truncated=e.truncated)
    return {**given, "timestamp": e.timestamp, "episodestart": e.episodestart, "who": e.who, "schema": e.schema, **changes}


def at(frame, **levels):
    "A frame with levels of its row index changed: `timestamp=times`, or one `episodestart` for all"
    rows = frame.index.to_frame(index=False)
    for name, value in levels.items(): rows[name] = value
    return frame.set_axis(pd.MultiIndex.from_frame(rows))


def as_records(e, **changes): return [Record(**{**vars(r), **changes}) for r in records(e)]


# --- episodes that start at another time than their steps ---

LATE = drive().episodestart + pd.Timedelta("1us")
STARTS = {"frame": lambda start: Episode.from_frame(at(drive().to_frame(), episodestart=start)),
          "arrays": lambda start: Episode.from_arrays(**arrays(drive(), episodestart=start)),
          "record": lambda start: as_records(drive(), episodestart=start)[0].to_episode()}


@pytest.mark.parametrize("door", STARTS)
def test_no_episode_starts_after_its_first_step(door):
    with pytest.raises(SchemaError, match="0:00:00.000001 after the first step, 2026-01-01 00:00:00.*give the first time stamp"): STARTS[door](LATE)
    assert STARTS[door](drive().timestamp[0]).start == drive().start


def test_nor_where_it_is_stored(harness):
    "A pool and a buffer refuse it and stay as they were, whichever way it comes"
    pool = harness.open()
    pool.store(drive(hour=1))
    buffer = harness.buffer(pool=pool, batch_size=4)
    for bad in (at(drive().to_frame(), episodestart=LATE), as_records(drive(), episodestart=LATE)[0]):
        for store in (pool.store, buffer.store):
            with pytest.raises(SchemaError, match="after the first step"): store(bad)
    assert pool.version == len(pool) == 1


LONG_AGO = pd.Timestamp("2001-01-01", tz="UTC")
BOTH = "9131 days, 0:00:00 pass between episodestart, 2001-01-01T00:00:00.*, and step 0, 2026-01-01T00:00:00"
PAUSE = drive().timestamp + np.where(np.arange(6) < 3, 0, 2) * DAY


@pytest.mark.parametrize("door", ["frame", "arrays"])
def test_a_start_years_before_is_told_once(door):
    assert len(said := told(lambda: STARTS[door](LONG_AGO))) == 1 and re.search(BOTH, said[0])
    assert told(lambda: STARTS[door](drive().episodestart - DAY)) == [], "a day is no year"


def test_and_so_it_is_where_things_are_stored(harness):
    "Once for a frame, once for records that go on, not again for what was told, is stored already, or is copied"
    pool, late = harness.open(), drive(hour=0, driver="bo")
    assert len(said := told(lambda: pool.store(at(drive().to_frame(), episodestart=LONG_AGO)))) == 1 and re.search(BOTH, said[0])
    assert told(lambda: pool.store(at(drive().to_frame(), episodestart=LONG_AGO))) == []
    assert len(told(lambda: [pool.store(r) for r in as_records(late, episodestart=LONG_AGO)])) == 1
    assert len(told(lambda: pool.store(Episode.from_arrays(**arrays(drive(driver="cy"), episodestart=LONG_AGO))))) == 1
    assert len(told(lambda: harness.buffer(pool=pool, batch_size=4).store(at(drive(driver="di").to_frame(), episodestart=LONG_AGO)))) == 1
    assert told(lambda: pool.copy_to(MemoryPool())) == []
    assert pool.count(PoolQuery(start=("2001-01-01T00:00Z", "2001-01-02T00:00Z"))) == 4, "it is stored, and found by the start that it was given"


def test_a_pause_of_days_is_told_with_both_times(harness):
    "Within a frame, within arrays, and from one record or part to the next"
    pause = "2 days, 0:00:01 pass between step 2, 2026-01-01T00:00:02.*, and step 3, 2026-01-03T00:00:03"
    frame = at(drive().to_frame(), timestamp=PAUSE)
    pool = harness.open()
    whole, parts = Episode.from_frame, frame.rename({"anna": "bo"}, level="driver")
    for call in (lambda: whole(frame), lambda: Episode.from_arrays(**arrays(drive(), timestamp=PAUSE)), lambda: pool.store(frame)):
        assert len(said := told(call)) == 1 and re.search(pause, said[0])
    said = told(lambda: [pool.store(parts[:3]), pool.store(parts[3:5]), pool.store(parts)])
    assert len(said) == 1 and "2 days, 0:00:01 pass between the step before, 2026-01-01T00:00:02" in said[0]
    steps = []
    assert len(told(lambda: steps.extend(as_records(whole(parts.rename({"bo": "cy"}, level="driver")))))) == 1, "when the frame became an episode"
    assert len(told(lambda: [pool.store(r) for r in steps])) == 1, "and when its records were stored"


def test_a_warning_that_is_an_error_stores_nothing(harness):
    pool = harness.open()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="pass between"): pool.store(at(drive().to_frame(), episodestart=LONG_AGO))
    assert pool.version == 0


# --- the last step of a drive that was cut off ---

CUT = drive(end="truncated").to_frame().drop(columns="nstate", level=0)


def open_ended(e, **more): return Episode.from_arrays(**arrays(e, nstate=None, **more))


def test_a_truncated_drive_stays_truncated(harness):
    "Without its last step, which nobody knows the end of: at every door, told once at the caller's line"
    pool = harness.open()
    buffer = harness.buffer(pool=pool, batch_size=4, query=PoolQuery(vehicle="VB7"))
    buffer.load()
    made = []
    for call in (lambda: made.append(Episode.from_frame(CUT)), lambda: made.append(open_ended(drive(end="truncated"))),
                 lambda: made.append(pool[buffer.store(CUT)]), lambda: made.append(pool[pool.store(CUT.rename({"anna": "bo"}, level="driver"))]),
                 lambda: made.append(pool[pool.extend([CUT.rename({"anna": "cy"}, level="driver")])[0]])):
        said = told(call)
        assert len(said) == 1 and "truncated flag moved to step 4" in said[0] and "give final_state" in said[0]
    for e in made: assert e.truncated.tolist() == [False] * 4 + [True] and np.array_equal(e.nstate, drive(end="truncated").nstate[:5])
    with pytest.raises(EpisodeConflict, match="after a step that ended it"): pool.store(drive(9)[5:])


def test_and_with_its_final_state_it_is_whole():
    "The remedy that the warning names"
    final = drive(end="truncated").nstate[-1]
    for call in (lambda: Episode.from_frame(CUT, final_state=final), lambda: open_ended(drive(end="truncated"), final_state=final)):
        assert told(call) == [] and call() == drive(end="truncated")


@pytest.mark.parametrize("flag", [None, "terminated"])
def test_no_flag_is_made_up(flag):
    "A drive that goes on is not truncated by losing its last step; one that terminated loses none"
    made = []
    said = told(lambda: made.append(open_ended(drive(end=flag))))
    assert len(said) == (flag is None) and not any("flag" in text for text in said)
    assert not made[0].truncated.any() and len(made[0]) == 5 + bool(flag)


@pytest.mark.parametrize("one", [lambda: Episode.from_frame(CUT[:1]), lambda: open_ended(drive()[:1]), lambda: as_records(drive(), nstate=None)[0].to_episode()])
def test_a_lone_step_that_leads_nowhere_is_refused(one):
    with pytest.raises(SchemaError, match="give its nstate, or final_state"): one()


# --- zones ---

BERLIN = ZoneInfo("Europe/Berlin")


class Custom(dt.tzinfo):
    "A zone of a program's own, called like a place that has other rules"
    zone = key = "Europe/London"

    def utcoffset(self, when): return dt.timedelta(hours=3)
    def dst(self, when): return None
    def tzname(self, when): return "CET"


KEPT = {"zoneinfo": (BERLIN, "Europe/Berlin"), "fixed CET": (dt.timezone(dt.timedelta(hours=1), "CET"), "UTC+01:00"),
        "fixed UTC by another name": (dt.timezone(dt.timedelta(0), "Europe/Berlin"), "UTC"), "utc": (dt.timezone.utc, "UTC"),
        "ZoneInfo UTC": (ZoneInfo("UTC"), "UTC"), "Etc": (ZoneInfo("Etc/GMT+5"), "Etc/GMT+5"), "dateutil's utc": (dateutil_tz.tzutc(), "UTC"),
        "dateutil's offset": (dateutil_tz.tzoffset("CET", 7200), "UTC+02:00"), "half an hour": (dt.timezone(-dt.timedelta(hours=3, minutes=30)), "UTC-03:30"),
        "a program's own": (Custom(), "UTC+03:00")}


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("day", ["2026-01-15", "2026-07-15"])
def test_a_zone_is_stored_by_a_name_that_every_machine_knows(kind, day):
    "A step half a year later comes back with the offset that it came with"
    zone, name = KEPT[kind]
    times = pd.DatetimeIndex([day, pd.Timestamp(day) + pd.Timedelta("182D")], tz="UTC").tz_convert(zone)
    us, kept = utc_us(times)
    assert kept == name
    e = drive(2)
    again = replace(e, times=us, start=int(us[0]), zone=kept)
    assert [t.utcoffset() for t in again.timestamp] == [t.utcoffset() for t in times]


class Clock(dateutil_tz.tzlocal):
    "The local time of a machine in Berlin, wherever this runs"
    def __init__(self): self._std_offset, self._dst_offset, self._dst_saved, self._hasdst = dt.timedelta(hours=1), dt.timedelta(hours=2), dt.timedelta(hours=1), True
    def _isdst(self, when): return 4 <= when.month <= 10


@pytest.mark.parametrize("zone", [Clock(), dateutil_tz.gettz("Europe/Berlin"), "dateutil/Europe/Berlin"], ids=["tzlocal", "file", "pandas' name of it"])
def test_a_zone_that_only_this_machine_knows_is_refused_with_a_remedy_that_works(zone):
    times = drive().timestamp.tz_convert(zone)
    for door in (lambda t: utc_us(t), lambda t: Episode.from_arrays(**arrays(drive(), timestamp=t)), lambda t: Episode.from_frame(at(drive().to_frame(), timestamp=t))):
        with pytest.raises(SchemaError, match=r"same on every machine; convert the times: tz_convert\('Europe/Berlin'\)"): door(times)
    assert Episode.from_arrays(**arrays(drive(), timestamp=times.tz_convert("Europe/Berlin"))) == drive()


@pytest.mark.parametrize("name", ["localtime", "posixrules", "posix/Europe/Berlin", "right/Europe/Berlin"])
def test_files_that_lie_among_the_zones_are_no_names(name):
    try: zone = ZoneInfo(name)
    except Exception: pytest.skip(f"this machine has no {name}")
    times = drive().timestamp.tz_convert(zone)
    try: assert utc_us(times)[1].startswith("UTC")
    except SchemaError as e: assert "same on every machine" in str(e)


def test_a_question_needs_no_name_of_a_zone():
    "Only times count in a query and in an episodestart"
    time = drive().episodestart.tz_convert(Clock())
    assert PoolQuery(start=(time, None)) == PoolQuery(start=(drive().episodestart, None))
    assert Episode.from_arrays(**arrays(drive(), episodestart=time)) == drive()


def test_local_zones_that_were_stored_stay_readable():
    "A pool that an earlier version wrote may have one"
    pool = MemoryPool()
    pool.store(replace(drive(), zone="tzlocal()"))
    assert list(pool) == [drive()] and str(list(pool)[0].episodestart)


# --- numbers that are meant as times ---

def split(message): return re.search(r'(start \+ )?pd\.to_(datetime|timedelta)\(t, unit="\w+"(, utc=True)?\)(\.round\("us"\))?', message).group()


UNITS = {"s": 10**6, "ms": 10**3, "us": 1}
STAMPS = {f"{kind} of {unit}": (unit, make) for unit in UNITS for kind, make in {
    "int64": lambda n: n.astype("int64"), "uint64": lambda n: n.astype("uint64"), "list": lambda n: n.astype("int64").tolist(), "series": pd.Series,
    "index": pd.Index, "Int64": lambda n: pd.array(n, dtype="Int64"), "objects": lambda n: n.astype(object), "categories": pd.Categorical,
    "floats": lambda n: n.astype("float64")}.items()}


@pytest.mark.parametrize("kind", STAMPS)
def test_numbers_as_stamps_are_called_numbers(kind):
    "And the remedy, done to the letter, gives the times that were meant"
    unit, make = STAMPS[kind]
    t = make(drive().times // UNITS[unit])
    with pytest.raises(SchemaError, match="got the number 1767225600") as e: Episode.from_arrays(**arrays(drive(), timestamp=t))
    assert "naive" not in str(e.value) and f'pd.to_datetime(t, unit="{unit}", utc=True)' in str(e.value)
    if kind.startswith(("series", "categories", "objects")): t = np.asarray(t).astype("int64")
    assert Episode.from_arrays(**arrays(drive(), timestamp=eval(split(str(e.value)), {"pd": pd, "t": t}))) == drive()


def test_fractions_of_seconds_since_1970_come_back_to_the_microsecond():
    t = [1767225600.123456, 1767225601.123457]
    with pytest.raises(SchemaError) as e: utc_us(t)
    assert utc_us(eval(split(str(e.value)), {"pd": pd, "t": t}))[0].tolist() == [1767225600123456, 1767225601123457]


DOORS = {"frame's timestamp": lambda t: Episode.from_frame(at(drive().to_frame(), timestamp=t)),
         "frame's episodestart": lambda t: Episode.from_frame(at(drive().to_frame(), episodestart=t[0])),
         "two of them": lambda t: Episode.from_frame(at(drive().to_frame(), episodestart=t)),
         "arrays' episodestart": lambda t: Episode.from_arrays(**arrays(drive(), episodestart=t[0])),
         "record": lambda t: as_records(drive(), timestamp=t[0])[0].to_episode(), "record's float": lambda t: as_records(drive(), timestamp=t[0] / 1e6)[0].to_episode(),
         "query": lambda t: PoolQuery(start=(t[0], None)), "query's time": lambda t: PoolQuery(time=(None, int(t[0]))),
         "JSON": lambda t: PoolQuery.from_json(f'{{"format": 1, "start": [{t[0]}, null]}}')}


@pytest.mark.parametrize("door", DOORS)
def test_numbers_at_every_door(door):
    with pytest.raises((SchemaError, QueryError), match=r"got the number 1.*pd.to_datetime\(t, unit"): DOORS[door](drive().times)


@pytest.mark.parametrize("spans", [np.arange(6) * 1_000_000, np.arange(6.0), list(range(6))])
def test_counts_from_a_start_are_told_from_counts_since_1970(spans):
    with pytest.raises(SchemaError, match="got the number 0") as e: Episode.from_arrays(**arrays(drive(), timestamp=spans))
    seconds = np.asarray(spans) / max(1, spans[1])
    assert 'pd.to_datetime(t, unit="us", utc=True)' in str(e.value)
    times = eval(split(str(e.value)), {"pd": pd, "t": seconds, "start": drive().episodestart})
    assert Episode.from_arrays(**arrays(drive(), timestamp=times)) == drive()


@pytest.mark.parametrize("t", [pd.to_timedelta(np.arange(6), "s"), pd.Series(pd.to_timedelta(np.arange(6), "s")), np.arange(6).astype("m8[s]"),
                               (np.arange(6) * 10**9).astype("m8[ns]"), [dt.timedelta(seconds=n) for n in range(6)]])
def test_spans_are_no_times_either(t):
    with pytest.raises(SchemaError, match=r"a span of time; add it to when it began: start \+ t"): Episode.from_arrays(**arrays(drive(), timestamp=t))
    t = pd.to_timedelta(t)
    assert Episode.from_arrays(**arrays(drive(), timestamp=drive().episodestart + t)) == drive()


@pytest.mark.parametrize("t", [None, pd.NaT, float("nan"), np.datetime64("NaT", "us")])
def test_a_missing_time_is_called_missing(t):
    with pytest.raises(SchemaError, match="a time is missing"): as_records(drive(), timestamp=t)[0].to_episode()


# --- several episodes in one frame ---

def groups(message, frame):
    "The parts that the remedy in a message gives"
    return eval(re.search(r"\[part for .*\]", message).group(), {"frame": frame})


def test_splitting_keeps_every_row():
    "Rows whose identity is missing are refused, and not dropped"
    a, b, c = (drive(4, hour=h, vehicle=v).to_frame() for h, v in ((0, "A"), (1, "B"), (2, "A")))
    frame = pd.concat([b, a.rename({"anna": np.nan}, level="driver"), c])
    with pytest.raises(SchemaError, match="expected one episode") as e: Episode.from_frame(frame)
    parts = groups(str(e.value), frame)
    assert sorted(map(len, parts)) == [4, 4, 4]
    pool = MemoryPool()
    with pytest.raises(SchemaError, match=r"driver is missing \(NaN\)"): pool.extend(parts)
    pool.extend(p for p in parts if not p.index.get_level_values("driver").isna().any())
    assert list(pool) == [drive(4, hour=1, vehicle="B"), drive(4, hour=2, vehicle="A")]


@pytest.mark.parametrize("change", [lambda f: f, lambda f: f[::-1], lambda f: at(f, vehicle=pd.Categorical(f.index.get_level_values("vehicle"))),
                                    lambda f: f.reorder_levels([3, 2, 1, 0]), lambda f: f.sample(frac=1, random_state=1)])
def test_splitting_gives_the_episodes(change):
    "Also where rows are shuffled: the next message sorts them"
    whole = [drive(4, hour=h, vehicle=v) for h in (0, 1) for v in "AB"]
    frame = change(pd.concat([e.to_frame() for e in whole]))
    with pytest.raises(SchemaError, match="expected one episode") as e: Episode.from_frame(frame)
    pool = MemoryPool()
    for frame in groups(str(e.value), frame):
        try: pool.store(frame)
        except SchemaError as e: pool.store(eval(re.search(r"frame\.sort_index\(.*?\)", str(e)).group(), {"frame": frame}))
    assert facts_of(sorted(pool, key=lambda e: e.id)) == facts_of(sorted(whole, key=lambda e: e.id))


# --- clocks that were set back ---

def choices(message):
    "The span to add, and from which step on"
    span, step = re.search(r"add (pd\.Timedelta\('.*?'\)) to the times from step (\d+) on", message).groups()
    return eval(span, {"pd": pd}), int(step)


@pytest.mark.parametrize("back", [pd.Timedelta("1us"), pd.Timedelta("2s"), pd.Timedelta("1h"), pd.Timedelta("400D")])
@pytest.mark.parametrize("door", ["frame", "arrays"])
def test_a_clock_that_was_set_back(door, back):
    "The message says where and by how much; adding that gives the drive that there was, whose states follow each other"
    whole, t = drive(), drive().timestamp.to_series(index=range(6))
    clock = t - (pd.Timedelta("1s") + back) * np.repeat([0, 1], [4, 2])  # so that step 4 is `back` before step 3
    make = {"frame": lambda t: Episode.from_frame(at(whole.to_frame(), timestamp=t)),
            "arrays": lambda t: Episode.from_arrays(**arrays(whole, timestamp=t))}[door]
    with pytest.raises(SchemaError, match=rf"step 4 is {re.escape(str(back.to_pytimedelta()))} before step 3.*the clock was set back") as e:
        make(clock)
    span, step = choices(str(e.value))
    assert make(clock + span * (np.arange(6) >= step).astype(int)) == whole


def test_or_the_steps_behind_it_are_an_episode_of_their_own():
    frame = at(drive().to_frame(), timestamp=drive().timestamp - pd.Timedelta("1h") * np.repeat([0, 1], [4, 2]))
    with pytest.raises(SchemaError, match="or make those steps an episode of their own, with an episodestart of its own") as e: Episode.from_frame(frame)
    step, pool = choices(str(e.value))[1], MemoryPool()
    ids = pool.extend([frame[:step], at(frame[step:], episodestart=frame.index.get_level_values("timestamp")[step])])
    assert [len(pool[id]) for id in ids] == [4, 2] and np.array_equal(np.concatenate([pool[id].state for id in ids]), drive().state)


def test_a_record_from_a_clock_that_was_set_back(harness):
    "Is refused with the same choices, and never replaces anything by itself"
    pool = harness.open()
    stream = as_records(drive())
    for r in stream[:4]: pool.store(r)
    back = replace(stream[4], timestamp=stream[1].timestamp + pd.Timedelta("1ms"))
    with pytest.raises(EpisodeConflict, match=r"where no step is stored, and 2026-01-01 00:00:03\+00:00 is the last.*set back, correct it, or begin an episode"):
        pool.store(back)
    pool.store(stream[4])
    pool.store(replace(back, episodestart=back.timestamp))
    assert sorted(map(len, pool)) == [1, 5]


def test_copies_go_and_steps_that_share_a_stamp_stay():
    "Dropping what is equal in all its values loses no step; a microsecond tells the others apart"
    frame = at(drive().to_frame(), timestamp=drive().timestamp.floor("2s"))  # a coarse clock: each two steps share a stamp
    frame = pd.concat([frame[:3], frame[2:]])  # and one row was sent twice
    with pytest.raises(SchemaError, match="steps 0 and 1 have the same") as e: Episode.from_frame(frame)
    drop, spread = re.search(r"frame\[~.*?\)\]", str(e.value)).group(), re.search(r"t \+ pd\..*", str(e.value)).group()
    frame = eval(drop, {"frame": frame})
    t = frame.index.get_level_values("timestamp")
    e = Episode.from_frame(at(frame, timestamp=eval(spread, {"pd": pd, "t": t})))
    assert np.array_equal(e.state, drive().state) and (np.diff(e.times) % 2_000_000).tolist() == [1, 1_999_999] * 2 + [1]
    again = Episode.from_arrays(**arrays(drive(), timestamp=eval(spread, {"pd": pd, "t": t})))
    assert again.times.tolist() == e.times.tolist()


# --- environments that reset themselves ---

def test_the_reset_of_an_environment_is_no_step():
    "A stream of a vector environment, split as the message says: the episodes that a single environment has"
    gym = pytest.importorskip("gymnasium")
    env = gym.make_vec("CartPole-v1", num_envs=1, vectorization_mode="sync", vector_kwargs=dict(autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP))
    steps, (state, _) = [], env.reset(seed=1)
    while sum(step[4] for step in steps) < 3:
        action = np.array([len(steps) % 2])
        nstate, reward, terminated, truncated, _ = env.step(action)
        steps.append((state[0], action[0], np.float32(reward[0]), nstate[0], bool(terminated[0]), bool(truncated[0])))
        state = nstate
    names = ("state", "action", "reward", "nstate", "terminated", "truncated")
    stream = dict(zip(names, map(np.array, zip(*steps))), timestamp=drive().episodestart + pd.to_timedelta(np.arange(len(steps)), "s"))
    pool, begin = MemoryPool(), 0
    while begin < len(steps):
        left = {name: values[begin:] for name, values in stream.items()}
        try: pool.store(Episode.from_arrays(**left)); break
        except SchemaError as e:
            assert "NEXT_STEP" in str(e) and "each part with its own episodestart" in str(e) and "leave it out" in str(e)
            end = int(re.match(r"step (\d+) is terminated", str(e)).group(1))
        pool.store(Episode.from_arrays(**{name: values[:end + 1] for name, values in left.items()}))
        begin += end + 2
    assert len(pool) == 3
    for e in pool:
        assert np.abs(e.state[0]).max() <= 0.05, "it begins where CartPole is reset to"
        assert e.links.all() and e.terminated.tolist() == [False] * (len(e) - 1) + [True] and e.reward.all()


def test_nor_where_records_are_stored(harness):
    pool = harness.open()
    first, second = drive(3, end="terminated"), drive(3, hour=1)
    for r in records(first): pool.store(r)
    *_, last = records(first)
    reset = replace(last, state=last.nstate, nstate=next(records(second)).state, terminated=False, timestamp=second.timestamp[0] - pd.Timedelta("1s"))
    with pytest.raises(EpisodeConflict, match="a new episode has its own episodestart.*NEXT_STEP.*leave it out"): pool.store(reset)
    for r in records(second): pool.store(r)
    assert facts_of(pool) == facts_of([first, second])


# --- every other remedy, carried out ---

FRAME, START = drive().to_frame(), drive().episodestart


def level(name): return FRAME.index.get_level_values(name)


# What is refused, with which words, and what these words say to do; that gives the episode, or whatever is asserted
DATA = {
    "a naive frame": (lambda: Episode.from_frame(FRAME.tz_localize(None, level="timestamp")), r"tz_localize\('UTC'\)",
                      lambda: Episode.from_frame(FRAME.tz_localize(None, level="timestamp").tz_localize("UTC", level="timestamp"))),
    "a naive start": (lambda: Episode.from_arrays(**arrays(drive(), episodestart=START.tz_localize(None))), r"tz_localize\('UTC'\)",
                      lambda: Episode.from_arrays(**arrays(drive(), episodestart=START.tz_localize(None).tz_localize("UTC")))),
    "naive text": (lambda: Episode.from_arrays(**arrays(drive(), episodestart="2026-01-01 00:00")), "'Z' at the end of a text",
                   lambda: Episode.from_arrays(**arrays(drive(), episodestart="2026-01-01 00:00" + "Z"))),
    "digits, floored": (lambda: Episode.from_arrays(**arrays(drive(), timestamp=drive().timestamp.as_unit("ns") + pd.Timedelta(1, "ns"))), r"floor\('us'\)",
                        lambda: Episode.from_arrays(**arrays(drive(), timestamp=(drive().timestamp.as_unit("ns") + pd.Timedelta(1, "ns")).floor("us")))),
    "digits, rounded": (lambda: Episode.from_frame(at(FRAME, timestamp=level("timestamp").as_unit("ns") - pd.Timedelta(1, "ns"))), r"round\('us'\)",
                        lambda: Episode.from_frame(at(FRAME, timestamp=(level("timestamp").as_unit("ns") - pd.Timedelta(1, "ns")).round("us")))),
    "a step in the year 10000": (lambda: Episode.from_arrays(**arrays(drive(7), timestamp=[*drive().timestamp, pd.Timestamp(253402300800, unit="s", tz="UTC")])),
                                 "leave such steps out", lambda: Episode.from_arrays(**arrays(drive(7)[:6]))),
    "a column of text": (lambda: Episode.from_frame(FRAME.astype({("action", "pedal", 0): str})), "convert it with astype, or leave",
                         lambda: Episode.from_frame(FRAME.astype({("action", "pedal", 0): str}).astype({("action", "pedal", 0): "float32"}))),
    "a note": (lambda: Episode.from_frame(pd.concat([FRAME, pd.DataFrame({("info", "note", 0): "x"}, FRAME.index)], axis=1)), "or leave the column out",
               lambda: Episode.from_frame(pd.concat([FRAME, pd.DataFrame({("info", "note", 0): "x"}, FRAME.index)], axis=1).drop(columns=("info", "note", 0)))),
    "another dtype": (lambda: Episode.from_arrays(**arrays(drive(), reward=drive().reward + 1e-12j)), "convert it with astype",
                      lambda: Episode.from_arrays(**arrays(drive(), reward=(drive().reward + 0j).real.astype("float32")))),
    "a field called 5": (lambda: Episode.from_frame(FRAME.rename(columns={"pedal": 5}, level=1)), "rename the column",
                         lambda: Episode.from_frame(FRAME.rename(columns={"pedal": 5}, level=1).rename(columns={5: "pedal"}, level=1))),
    "levels that JSON has no word for": (lambda: Episode.from_frame(FRAME.rename_axis(columns=[b"role", "name", "element"])), r"rename_axis\(columns=…\)",
                                         lambda: Episode.from_frame(FRAME.rename_axis(columns=[b"role", "name", "element"]).rename_axis(columns=["role", "name", "element"]))),
}


@pytest.mark.parametrize("what", DATA)
def test_data(what):
    refused, words, remedy = DATA[what]
    with pytest.raises(SchemaError, match=words): refused()
    assert facts(remedy()) == facts(drive())


def test_a_step_that_is_too_large():
    "More than 2 GB do not go into a step; several steps take them"
    field = lambda n: Schema([Field("state", "eye", (n,), "uint8"), Field("action", "a"), Field("reward", "r")])
    for size in (2**31, 2**30):
        with pytest.raises(SchemaError, match="more than 2 GB; store it as several steps"): field(size)
    assert field(2**29)


# Of a pool on any back-end: what is done, the error, its words, and the remedy, which is asserted to give something true
def stored(pool, *items, **options): return [pool.store(item, **options) for item in items]


OTHER, LOOSE = drive(seed=1), as_records(drive(4, linked=False))
POOLS = {
    "other steps, overwritten": (lambda p, h: stored(p, drive(), OTHER), EpisodeConflict, "overwrite=True replaces the whole episode with what came",
                                 lambda p, h: stored(p, OTHER, overwrite=True) and facts_of(p) == facts_of([OTHER])),
    "other steps, of another identity": (lambda p, h: stored(p, drive(), OTHER), EpisodeConflict, "or give one of them another identity",
                                         lambda p, h: stored(p, OTHER.to_frame().rename({"anna": "bo"}, level="driver")) and sorted(map(len, p)) == [6, 6]),
    "a numbered part too early": (lambda p, h: stored(p, drive(3, step=5), drive(9, step=5)[6:].to_frame()), EpisodeConflict, "a part is missing, send it first",
                                  lambda p, h: stored(p, drive(9, step=5)[3:6].to_frame(), drive(9, step=5)[6:].to_frame()) and facts_of(p) == facts_of([drive(9, step=5)])),
    "a part too early": (lambda p, h: stored(p, drive(3), drive(9)[6:].to_frame()), EpisodeConflict, "a part is missing, send it first",
                         lambda p, h: stored(p, drive(9)[3:6].to_frame(), drive(9)[6:].to_frame()) and facts_of(p) == facts_of([drive(9)])),
    "states that do not follow": (lambda p, h: stored(p, *LOOSE), EpisodeConflict, "number the steps of its episodes, from their first on: step=0, 1",
                                  lambda p, h: p.delete(drive().id) and stored(p, *[replace(r, step=n) for n, r in enumerate(LOOSE)]) and list(map(len, p)) == [4]),
    "a cut before its head": (lambda p, h: stored(p, drive(9)[:2], drive(9)[4:]), EpisodeConflict, "send what is missing first",
                              lambda p, h: stored(p, drive(9)[2:4], drive(9)[4:]) and facts_of(p) == facts_of([drive(9)])),
    "a cut, then the whole": (lambda p, h: stored(p, drive(9)[:2], drive(9)[4:]), EpisodeConflict, "or the whole episode",
                              lambda p, h: stored(p, drive(9)) and facts_of(p) == facts_of([drive(9)])),
    "after the end": (lambda p, h: stored(p, drive(3, end="truncated"), drive(9)[3:]), EpisodeConflict, "a new episode has its own episodestart",
                      lambda p, h: stored(p, at(drive(9)[3:].to_frame(), episodestart=drive(9).timestamp[3])) and sorted(map(len, p)) == [3, 6]),
    "a closed pool": (lambda p, h: (p.close(), len(p)), ClosedError, r"pool\.load\(\) opens it again", lambda p, h: p.load() or len(p) == 0),
    "a closed buffer": (lambda p, h: closed(h.buffer(pool=p, batch_size=4)).sample(), ClosedError, r"buffer\.load\(\) opens it again",
                        lambda p, h: stored(p.load() or p, drive()) and reloaded(closed(h.buffer(pool=p, batch_size=4))).sample()[0].shape == (4, 3)),
    "a snapshot": (lambda p, h: p.snapshot().store(drive()), ReadOnly, "the pool that it was taken of writes",
                   lambda p, h: stored(p, drive()) and list(p) == [drive()]),
    "a pool for reading": (lambda p, h: stored(p, drive()) and h.open("r").store(drive(hour=1)), ReadOnly, r"open_pool\(url, mode='a'\) writes",
                           lambda p, h: stored(written := open_pool(h.open("r").url, mode="a"), drive(hour=1)) and list(written) == [drive(), drive(hour=1)]),
    "an unknown id": (lambda p, h: (p.store(drive()), p["0" * 32]), EpisodeNotFound, r"catalogue\(\) lists what there is",
                      lambda p, h: [p[id] for id in p.catalogue().index] == [drive()]),
    "to delete all": (lambda p, h: (p.store(drive()), p.delete()), QueryError, r"delete\(everything=True\) does it",
                      lambda p, h: p.delete(everything=True) and len(p) == 0),
    "to delete steps": (lambda p, h: (p.store(drive()), p.delete(PoolQuery(time=(START, None)))), QueryError, r"use start=\(from, to\)",
                        lambda p, h: p.delete(PoolQuery(start=(START, None))) and len(p) == 0),
    "to copy steps": (lambda p, h: (p.store(drive()), p.copy_to(MemoryPool(), PoolQuery(time=(START, None)))), QueryError, r"use start=\(from, to\)",
                      lambda p, h: p.copy_to(MemoryPool(), PoolQuery(start=(START, None))) == [drive().id]),
    "no pool there": (lambda p, h: h.fresh().open("r"), PoolNotFound, "mode='a' creates one",
                      lambda p, h: stored(h.fresh().open("a"), drive())),
    "how states are kept": (lambda p, h: h.buffer(pool=p, batch_size=4, states="thrice"), QueryError, "'auto', 'once' or 'twice'",
                            lambda p, h: all(h.buffer(pool=p, batch_size=4, states=states) for states in ("auto", "once", "twice"))),
}


def closed(it): return it.close() or it
def reloaded(it): return it.load() or it


@pytest.mark.parametrize("what", POOLS)
def test_pools(harness, what):
    refused, error, words, remedy = POOLS[what]
    pool = harness.open()
    with pytest.raises(error, match=words): refused(pool, harness)
    assert remedy(pool, harness)


# Of one back-end or buffer, in a folder
def saved(path, *items):
    pool = MemoryPool(path)
    pool.extend(items); pool.save()
    return pool


def theirs(folder):
    "A pool whose file somebody else wrote since"
    path = Path(tempfile.mkdtemp(dir=folder)) / "a.npz"
    mine = filled(MemoryPool(path))
    saved(path, drive(hour=1))
    return mine


def merged(folder):
    mine = theirs(folder)
    other = MemoryPool(mine.path)
    mine.copy_to(other)
    other.save()
    return facts_of(MemoryPool(mine.path)) == facts_of([drive(), drive(hour=1)])


def left_alone(folder):
    mine = theirs(folder)
    mine.save(folder / "b.npz")
    return (list(MemoryPool(mine.path)), list(MemoryPool(folder / "b.npz"))) == ([drive(hour=1)], [drive()])


def replaced(folder):
    mine = theirs(folder)
    mine.save(overwrite=True)
    return list(MemoryPool(mine.path)) == [drive()]


def foreign(folder):
    "A lake to which another engine added rows"
    deltalake = pytest.importorskip("deltalake")
    pool = open_pool(folder / "lake")
    pool.store(drive())
    deltalake.write_deltalake(str(folder / "lake"), deltalake.DeltaTable(str(folder / "lake")).to_pyarrow_table(), mode="append")
    return pool


def table(folder):
    "A Delta table that is no pool"
    deltalake, e = pytest.importorskip("deltalake"), drive()
    columns = {"when": e.timestamp, "speed": e.state[:, 0], "pedal": e.action[:, 0], "work": e.reward, "next speed": e.nstate[:, 0]}
    path = tempfile.mkdtemp(dir=folder)
    deltalake.write_deltalake(path, pytest.importorskip("pyarrow").Table.from_pandas(pd.DataFrame(columns)))
    return path


def taken_over(folder):
    frame = pytest.importorskip("deltalake").DeltaTable(table(folder)).to_pyarrow_table().to_pandas()
    frame.index = pd.MultiIndex.from_arrays([["VB7"] * 6, frame.when[:1].repeat(6), frame.pop("when")], names=["vehicle", "episodestart", "timestamp"])
    frame.columns = pd.MultiIndex.from_tuples([("state", "speed"), ("action", "pedal"), ("reward", "work"), ("nstate", "speed")])
    pool = open_pool(folder / "ours")
    return np.array_equal(pool[pool.store(frame)].reward, drive().reward)


def lake(folder): return open_pool(folder / "lake")
def lake_buffer(folder, **options): return buffer_of("dask", "DaskBuffer")(pool=filled(lake(folder)), batch_size=4, **options)
def filled(pool): return pool if stored(pool, drive()) else None
def drawn(buffer): return buffer.sample()[0].shape == (4, 3)
def blocked(folder): return (folder / "file").write_text("no folder") and folder / "file" / "cache"


def buffer_of(module, name): return getattr(importlib.import_module(f"data_io_nbdev.storage.buffer.{module}"), name)


def on_workers(folder, given):
    with pytest.importorskip("distributed").Client(processes=False, n_workers=1, dashboard_address=None) as client:
        return drawn(lake_buffer(folder, resident="cluster", **({"client": client} if given else {})))


ARRIVES = """
import pickle, sys
try: print("there", len(pickle.loads(pickle.load(sys.stdin.buffer))))
except Exception as e: print(type(e).__name__, e)
"""


def sent(pool):
    "Whether a pool arrives in another process with what it has; raises what is raised there"
    kind, _, said = python(ARRIVES, pickle.dumps(pool)).partition(" ")
    if kind != "there": raise getattr(errors, kind)(said)
    return int(said) == len(pool)


PLACES = {
    "no file yet": (lambda d: MemoryPool().save(), PoolUnavailable, r"save\(path\) says where", lambda d: MemoryPool().save(d / "a.npz") or (d / "a.npz").exists()),
    "read-only": (lambda d: MemoryPool(saved(d / "a.npz", drive()).path, "r").save(), ReadOnly, r"save\(path\) writes a copy elsewhere",
                  lambda d: MemoryPool(d / "a.npz", "r").save(d / "b.npz") or list(MemoryPool(d / "b.npz")) == [drive()]),
    "nothing to read": (lambda d: MemoryPool(mode="r"), PoolNotFound, "give the path of a saved one",
                        lambda d: list(MemoryPool(saved(d / "a.npz", drive()).path, mode="r")) == [drive()]),
    "somebody else's file, opened": (lambda d: theirs(d).save(), PoolUnavailable, "open it and copy_to it", merged),
    "somebody else's file, left": (lambda d: theirs(d).save(), PoolUnavailable, "choose another path",
                                   left_alone),
    "somebody else's file, replaced": (lambda d: theirs(d).save(), PoolUnavailable, "overwrite=True to replace it",
                                       replaced),
    "a folder": (lambda d: MemoryPool(d), PoolUnavailable, "give the path of a file", lambda d: saved(d / "a.npz", drive())),
    "no folder": (lambda d: filled(MemoryPool()).save(d / "new" / "a.npz"), PoolUnavailable, r"see that its folder exists.*save again",
                  lambda d: (d / "new").mkdir() or filled(MemoryPool()).save(d / "new" / "a.npz") or list(MemoryPool(d / "new" / "a.npz")) == [drive()]),
    "no folder, elsewhere": (lambda d: filled(MemoryPool()).save(d / "new" / "a.npz"), PoolUnavailable, r"or save\(path\) elsewhere",
                             lambda d: filled(MemoryPool()).save(d / "a.npz") or list(MemoryPool(d / "a.npz")) == [drive()]),
    "another process's memory": (lambda d: sent(filled(MemoryPool())), PoolNotFound, r"save\(path\) it, and send the pool of that file, MemoryPool\(path\)",
                                 lambda d: filled(MemoryPool()).save(d / "a.npz") or sent(MemoryPool(d / "a.npz"))),
    "what was not saved": (lambda d: sent(filled(MemoryPool(d / "a.npz"))), SnapshotNotFound, r"save\(\) it first", lambda d: sent(saved(d / "b.npz", drive()))),
    "a ring with a question": (lambda d: MemoryBuffer(batch_size=4, capacity=9, query=PoolQuery(vehicle="VB7")), QueryError, "take a query away",
                               lambda d: filled_buffer(MemoryBuffer(batch_size=4, capacity=9))),
    "a ring with a question, and a pool": (lambda d: MemoryBuffer(batch_size=4, capacity=9, query=PoolQuery(vehicle="VB7")), QueryError, "or give it a pool",
                                           lambda d: filled_buffer(MemoryBuffer(pool=MemoryPool(), batch_size=4, capacity=9, query=PoolQuery(vehicle="VB7")))),
    "no room": (lambda d: filled_buffer(MemoryBuffer(batch_size=4, capacity=10**16)), QueryError, "a smaller capacity= keeps fewer",
                lambda d: filled_buffer(MemoryBuffer(batch_size=4, capacity=5))),
    "seconds above 0": (lambda d: buffer_of("mongo", "MongoBuffer")(pool=MemoryPool(), batch_size=4, follow=0), QueryError, "seconds above 0, or None",
                        lambda d: all(filled_buffer(buffer_of("mongo", "MongoBuffer")(pool=MemoryPool(), batch_size=4, follow=f)) for f in (0.5, None))),
    "a cache in a file": (lambda d: drawn(lake_buffer(d, resident="mapped", cache=blocked(d))), PoolUnavailable, "cache= names another folder",
                          lambda d: drawn(lake_buffer(d, resident="mapped", cache=d / "cache"))),
    "no cache": (lambda d: drawn(lake_buffer(d, resident="mapped", cache=blocked(d))), PoolUnavailable, "and resident='memory' needs none",
                 lambda d: drawn(lake_buffer(d, resident="memory"))),
    "an unknown place for rows": (lambda d: lake_buffer(d, resident="moon"), QueryError, "resident is one of auto, memory, mapped, cluster",
                                  lambda d: all(drawn(lake_buffer(d, resident=r, cache=d / "cache")) for r in ("auto", "memory", "mapped"))),
    "no workers": (lambda d: lake_buffer(d, resident="cluster"), QueryError, "needs a distributed.Client: make one", lambda d: on_workers(d, given=False)),
    "workers that are given": (lambda d: lake_buffer(d, resident="cluster"), QueryError, "or give it as client=", lambda d: on_workers(d, given=True)),
    "no duration": (lambda d: filled(lake(d)).vacuum(older_than="a year"), QueryError, "a duration such as '365D'", lambda d: lake(d).vacuum(older_than="365D") == []),
    "too late": (lambda d: filled(open_pool(d / "lake", grace="1us")), PoolUnavailable, "store them again", lambda d: filled(lake(d)) and list(lake(d)) == [drive()]),
    "rows of another engine": (lambda d: list(foreign(d)), SchemaError, r"snapshot\(1\) reads what was there before", lambda d: list(lake(d).snapshot(1)) == [drive()]),
    "another engine's table": (lambda d: open_pool(table(d)), SchemaError, "give it the index and columns of an episode", taken_over),
    "a folder with other things": (lambda d: blocked(d) and open_pool(d), SchemaError, "name another folder", lambda d: filled(lake(d))),
}


def filled_buffer(buffer): return buffer.store(drive()) and drawn(buffer)


@pytest.mark.parametrize("what", PLACES)
def test_places(tmp_path, what):
    refused, error, words, remedy = PLACES[what]
    with pytest.raises(error, match=words): refused(tmp_path)
    assert remedy(tmp_path)
