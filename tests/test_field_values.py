"""What values from the field did at the doors: frames, arrays, records, queries and episodes put together by hand. Each kind is decided once."""
import enum
import pathlib
import uuid
from dataclasses import replace

import gymnasium
import numpy as np
import pandas as pd
import pytest

from data_io_nbdev import Episode, MemoryBuffer, MemoryPool, PoolQuery, Record, Schema
from data_io_nbdev.data.core import as_episode, records
from data_io_nbdev.data.schema import Field
from data_io_nbdev.errors import QueryError, SchemaError, SnapshotNotFound
from data_io_nbdev.testing import HARNESSES, drive, facts_of


@pytest.fixture(params=sorted(HARNESSES))
def harness(request, tmp_path): return HARNESSES[request.param](tmp_path)


TIMES = pd.date_range("2026-01-01T08:00Z", periods=3, freq="1s")
ZEROS = np.zeros((3, 2), "f4")
SCHEMA = Schema([Field("state", "state", (2,)), Field("action", "gear", dtype="int64"), Field("reward", "reward")], ["driver"])


def arrays(**change):
    "An episode of three steps, with something changed"
    given = dict(state=ZEROS, nstate=ZEROS, action={"gear": np.zeros(3, "int64")}, reward=np.zeros(3, "f4"), timestamp=TIMES, who={"driver": "kim"})
    return Episode.from_arrays(**{**given, **change})


def record(schema=None, **change):
    "An episode of one recorded step"
    given = dict(state=[0.0, 0.0], nstate=[0.0, 0.0], action={"gear": np.int64(0)}, reward=0.0, timestamp=TIMES[0], episodestart=TIMES[0],
                 who={"driver": "kim"})
    return Record(**{**given, **change}).to_episode(schema)


def framed(who):
    "The same as a frame"
    index = pd.MultiIndex.from_arrays([pd.Index([who] * 3), [TIMES[0]] * 3, TIMES], names=["driver", "episodestart", "timestamp"])
    return Episode.from_frame(arrays().to_frame().set_axis(index))


def by_hand(**change): return as_episode(replace(arrays(), **change))


# --- numbers of steps ---

class Gear(enum.IntEnum): FIRST = 7
class Driver(str, enum.Enum): KIM = "kim"
class Plain(enum.Enum): KIM = "kim"


NUMBERED = {"arrays": lambda n: arrays(step=n), "record": lambda n: record(step=n), "by hand": lambda n: by_hand(first=n)}


@pytest.mark.parametrize("number", [7, np.int64(7), np.uint8(7), np.array(7), Gear.FIRST, np.ma.array([7])[0]], ids=lambda n: type(n).__name__)
@pytest.mark.parametrize("door", NUMBERED)
def test_whole_numbers_of_any_kind_number_steps(door, number):
    "What is kept is a plain `int`"
    first = NUMBERED[door](number).first
    assert first == 7 and type(first) is int


@pytest.mark.parametrize("number", ["7", 2**70, 7.0, True, np.True_, np.float64(7), np.ma.array(7, mask=True), float("nan"), 2**63 - 1, [7]],
                         ids=lambda n: f"{type(n).__name__}-{n}")
@pytest.mark.parametrize("door", NUMBERED)
def test_nothing_else_numbers_steps(door, number):
    "Refused where it enters; also a number that leaves no room for those of the steps behind it"
    with pytest.raises(SchemaError, match="whole numbers of 64 bits"): NUMBERED[door](number)


BY_HAND = [dict(first=np.int64(7)), dict(start=np.int64(arrays().start)), dict(offset=np.int64(0)), dict(zone=np.str_("Europe/Berlin")),
           dict(who={"driver": np.str_("kim")}), dict(who={np.str_("driver"): Driver.KIM})]
WRONG_BY_HAND = [dict(first=7.5), dict(start="2026"), dict(start=2**62), dict(offset=-1), dict(zone="Nowhere/City"), dict(zone=None), dict(who={}),
                 dict(who=["kim"]), dict(who={"driver": 7}), dict(who={"driver": b"kim"}), dict(times=arrays().times[::-1].copy()),
                 dict(times=arrays().times.astype("float64")), dict(blocks={}), dict(times=arrays().times[:2]),
                 dict(blocks={**arrays().blocks, "reward": np.zeros(3)}), dict(blocks={**arrays().blocks, "state": np.zeros((3, 3), "f4")}),
                 dict(blocks={**arrays().blocks, "reward": np.ma.array(np.zeros(3, "f4"), mask=[0, 1, 0])})]


def test_nothing_stored_is_held_up_by_what_cannot_be_written(harness):
    "Every odd value is a plain one or refused, before anything is committed; what was stored is saved, closed and read again"
    pool = harness.open()
    pool.store(arrays())
    odd = [replace(arrays(who={"driver": f"{i}"}), **{"who": {"driver": f"{i}"}, **change}) for i, change in enumerate(BY_HAND)]
    pool.extend(odd)
    pool.store(Record(**{**vars(next(records(arrays(who={"driver": "bo"})))), "step": np.int64(3)}))
    there = facts_of(pool)
    for wrong in WRONG_BY_HAND:
        with pytest.raises(SchemaError): pool.extend([arrays(who={"driver": "jo"}), replace(arrays(), **wrong)])
    with pytest.raises(SchemaError): pool.store(Record(**{**vars(next(records(arrays()))), "step": 7.0}))
    assert facts_of(pool) == there and len(pool) == len({e.id for e in odd} | {arrays().id}) + 1
    pool.close()
    assert facts_of(harness.open()) == there and harness.open().verify() == []


def test_what_a_hand_put_in_another_order_is_put_right():
    "Identity values are stored by position, so they follow the schema"
    e = drive()
    assert list(as_episode(replace(e, who=dict(reversed(e.who.items())))).who.items()) == list(e.who.items())
    assert as_episode(e) is e


# --- identities ---

IDENTITIES = [(Driver.KIM, "kim"), (np.str_("kim"), "kim"), ("", ""), (Gear.FIRST, 7), (np.int32(7), 7), (np.uint64(7), 7), (-2**63, -2**63),
              *[(wrong, None) for wrong in (Plain.KIM, uuid.UUID(int=7), pathlib.PurePath("kim"), b"kim", np.bytes_(b"kim"), 7.0, np.float32(7), True,
                                            np.True_, 2**63, TIMES[0], np.datetime64(7, "s"), 1j, (1, 2))]]
IDENTIFIED = {"arrays": lambda v: arrays(who={"driver": v}).who["driver"], "record": lambda v: record(who={"driver": v}).who["driver"],
              "by hand": lambda v: by_hand(who={"driver": v}, schema=replace(arrays().schema, identity={
                  "driver": int if isinstance(v, (int, np.integer)) else str})).who["driver"],
              "frame": lambda v: framed(v).who["driver"], "query": lambda v: PoolQuery(driver=[v]).who[0][1][0], "who": lambda v: PoolQuery(
                  who={"driver": v}).who[0][1][0]}


@pytest.mark.parametrize("value, plain", IDENTITIES, ids=lambda v: ascii(v)[:30])
@pytest.mark.parametrize("door", IDENTIFIED)
def test_identities_are_decided_once(door, value, plain):
    "Text of any kind is its text and whole numbers their number, at every door; whatever could be written in several ways is refused"
    if door in ("who", "frame") and isinstance(value, tuple): pytest.skip("there it is several values")
    if plain is None:
        with pytest.raises(QueryError if door in ("query", "who") else SchemaError): IDENTIFIED[door](value)
    else:
        got = IDENTIFIED[door](value)
        assert got == plain and type(got) is type(plain)


def test_half_a_letter_is_nobody():
    "It cannot be stored, and a question for it has no answer"
    for door in (arrays, record):
        with pytest.raises(SchemaError, match="unicode"): door(who={"driver": "\ud800"})
    with pytest.raises(SchemaError, match="unicode"): by_hand(who={"driver": "\ud800"})
    assert PoolQuery(driver="\ud800").who == (("driver", ("\ud800",)),)


@pytest.mark.parametrize("value, remedy", [(7.0, int), (np.float64(7), int), (uuid.UUID(int=7), str), (b"kim", bytes.decode), (Plain.KIM, lambda who: who.name)])
def test_the_remedy_for_an_identity_works(value, remedy):
    "What the message says, done to a frame, makes an episode of it"
    with pytest.raises(SchemaError) as caught: framed(value)
    said = str(caught.value).partition("in a frame: ")[2]
    index = pd.MultiIndex.from_arrays([pd.Index([value] * 3), [TIMES[0]] * 3, TIMES], names=["driver", "episodestart", "timestamp"])
    frame = arrays().to_frame().set_axis(index)
    assert Episode.from_frame(eval(said, {"frame": frame})).who == {"driver": remedy(value)}


def test_an_enum_finds_what_an_enum_stored(harness):
    "And so does its text, in every back-end"
    pool = harness.open()
    pool.store(arrays(who={"driver": Driver.KIM}))
    pool.store(framed("bo"))
    for asked in (Driver.KIM, "kim", np.str_("kim"), [Driver.KIM], np.array(["kim"])): assert pool.count(PoolQuery(driver=asked)) == 1
    assert PoolQuery.from_json(PoolQuery(driver=Driver).to_json()) == PoolQuery(driver="kim")


@pytest.mark.parametrize("who", [["kim"], "kim", 7, {7: "kim"}, pd.Series({"driver": "kim"})], ids=lambda w: type(w).__name__)
def test_identity_comes_by_level(who):
    "Anything else is refused by name"
    for door in (arrays, record):
        with pytest.raises(SchemaError, match="by name"): door(who=who)
    with pytest.raises(QueryError, match="by name"): PoolQuery(who=who)


# --- pandas objects ---

FRAME = pd.DataFrame({"speed": [1.0, 2.0, 3.0], "gear": np.array([1, 2, 3], "int8")})


@pytest.mark.parametrize("state, fields", [
    (FRAME[["speed"]], {"speed": "float64"}), (FRAME, {"speed": "float64", "gear": "int8"}), (FRAME["speed"], {"speed": "float64"}),
    ({"arm": FRAME}, {"arm.speed": "float64", "arm.gear": "int8"}), (pd.DataFrame(np.zeros((3, 2))), {"state": "float64"}),
    (FRAME["speed"].rename(None), {"state": "float64"}), (pd.Index([1, 2, 3]), {"state": "int64"}), ([FRAME["speed"]] * 3, {"state": "float64"}),
    ([np.zeros(2)] * 3, {"state": "float64"}), ([np.float64(1)] * 3, {"state": "float64"}), ([0.0, np.float64(1), 2], {"state": "float64"}),
    ([1.0, 2.0, 3.0], {"state": "float32"}), (drive(3).to_frame()["state"], {"velocity": "float32", "slope": "float32"})], ids=lambda v: str(type(v).__name__))
def test_nothing_is_narrowed_without_a_word(state, fields):
    "What has a dtype or names keeps them; only Python's own numbers are float32"
    schema = arrays(state=state, nstate=None, final_state=arrays(state=state, nstate=state).fields("state")
                    and {name: v[-1] for name, v in arrays(state=state, nstate=state).fields("state").items()}).schema
    assert {f.name: f.dtype for f in schema.of("state")} == fields


def test_a_frame_in_place_of_an_array_says_what_the_same_frame_of_steps_says():
    "Vectors, order and values; a row of it is a state"
    e = drive(3)
    frame = e.to_frame()
    given = dict(state=frame["state"], action=frame["action"], reward=frame["reward"], timestamp=e.timestamp, who=e.who, episodestart=e.episodestart)
    again = Episode.from_arrays(**given, nstate=frame["nstate"].iloc[:, ::-1], schema=e.schema)
    assert np.array_equal(again.nstate, e.nstate) and np.array_equal(again.state, e.state)
    last = Episode.from_arrays(**given, final_state=frame["nstate"].iloc[-1], schema=e.schema)
    assert np.array_equal(last.nstate[-1], e.nstate[-1])
    one = Record(**{role: frame[role].iloc[0] for role in ("state", "action", "reward", "nstate")}, timestamp=e.timestamp[0],
                 episodestart=e.episodestart, who=e.who).to_episode(e.schema)
    assert np.array_equal(one.state, e.state[:1]) and np.array_equal(one.nstate, e.nstate[:1])


@pytest.mark.parametrize("state, message", [
    (FRAME.rename(columns={"gear": "speed"}), "two columns"), (FRAME.set_axis([0, 1], axis=1), "differ in dtype"), (FRAME.astype({"gear": "Int8"}), "astype"),
    (FRAME.astype({"gear": "category"}), "astype"), (FRAME.astype(str), "astype"), (drive(3).to_frame()[["state"]], "take one role"),
    (pd.Series([1, None, 3], dtype="Int64"), "astype"), (pd.Series([1, 2, 3], dtype="Float64"), "astype"), (pd.Categorical([1, 2, 3]), "astype")])
def test_pandas_objects_that_are_no_numbers(state, message):
    "Refused as in a frame of steps, with what to do"
    with pytest.raises(SchemaError, match=message): arrays(state=state, nstate=state)


def test_names_of_a_frame_count(harness):
    "Columns in another order are put right, others are refused"
    pool = harness.open()
    pool.store(arrays(state=FRAME, nstate=FRAME))
    turned = FRAME[["gear", "speed"]]
    assert pool.store(arrays(state=turned, nstate=turned)) == arrays().id and pool.version == 1
    other = FRAME.rename(columns={"gear": "rpm"})
    with pytest.raises(SchemaError, match="rpm"): pool.store(arrays(state=other, nstate=other))


# --- masks ---

MASKED = np.ma.array([[1.0, -9999.0]] * 3, mask=[[False, True]] * 3)
MASKS = {"array": lambda: arrays(state=MASKED), "nstate": lambda: arrays(nstate=MASKED), "nested": lambda: arrays(state={"a": (MASKED,)}),
         "list": lambda: arrays(reward=[1.0, np.ma.masked, 0.0]), "list of arrays": lambda: arrays(state=[[MASKED[0]]] * 3),
         "integers": lambda: arrays(reward=np.ma.array([1, 2, 3], mask=[0, 1, 0])), "final": lambda: arrays(nstate=None, final_state=MASKED[0]),
         "flag": lambda: arrays(truncated=np.ma.array([False, False, True], mask=[0, 0, 1])), "record": lambda: record(state=MASKED[0]),
         "one number": lambda: record(reward=MASKED[0, 1]), "record's flag": lambda: record(truncated=np.ma.masked),
         "times": lambda: arrays(timestamp=np.ma.array([t.isoformat() for t in TIMES], mask=[0, 1, 0])),
         "with a schema": lambda: arrays(state=MASKED.astype("f4"), schema=SCHEMA)}


@pytest.mark.parametrize("door", MASKS)
def test_what_is_masked_is_no_measurement(door):
    "It is refused with the remedy"
    with pytest.raises(SchemaError, match="filled|masked|missing"): MASKS[door]()


def test_a_mask_that_hides_nothing_is_none():
    "And what was filled is stored as that"
    assert np.array_equal(arrays(state=np.ma.array(ZEROS)).state, ZEROS)
    filled = arrays(state=MASKED.filled(np.nan), nstate=ZEROS.astype("f8")).state
    assert np.isnan(filled[:, 1]).all() and (filled[:, 0] == 1).all()


# --- records ---

def test_records_keep_what_they_were_given():
    "However it is nested, and whatever becomes of it"
    seen, frame, who, count = np.zeros(2), pd.Series({"a": 0.0, "b": 0.0}), {"driver": "kim"}, np.array(0)
    kept = [Record(state=state, action=[seen], reward=seen[0:1], nstate=state, info=seen, timestamp=TIMES[0], episodestart=TIMES[0], who=who, step=count)
            for state in (seen, {"arm": (seen, [seen])}, frame, np.ma.array(seen))]
    before = [r.to_episode() for r in kept]
    seen += 1; frame += 1; frame.iloc[0] = 5; count += 1
    who["driver"] = "bo"
    assert [r.to_episode() for r in kept] == before and not before[0].state.any() and before[0].who == {"driver": "kim"}


def test_a_loop_that_reuses_its_array(harness):
    "Every state is stored as it was, though all records are stored at the end"
    seen, kept = np.zeros(2, "f4"), []
    for i, t in enumerate(TIMES):
        state = seen.copy()
        seen += 1
        kept.append(Record(state=state, action=0.0, reward=np.float64(i), nstate=seen, timestamp=t, episodestart=TIMES[0]))
    pool = harness.open()
    pool.extend(kept)
    e = next(pool.find())
    assert e.nstate[:, 0].tolist() == [1, 2, 3] and e.links.all()


# --- queries ---

LISTS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "array": np.array, "objects": lambda v: np.array(v, object), "series": pd.Series,
         "strings": lambda v: pd.Series(v, dtype="string"), "index": pd.Index, "keys": lambda v: dict.fromkeys(v).keys(),
         "values": lambda v: dict(enumerate(v)).values(), "generator": lambda v: (x for x in v), "map": lambda v: map(str, v),
         "categorical": pd.Categorical, "unique": lambda v: pd.Series(v).astype("category").unique(), "extension": pd.array}


@pytest.mark.parametrize("kind", LISTS)
def test_queries_take_anything_like_a_list(kind):
    "Levels, ids, and ids that are asked for outright"
    pool, some = MemoryPool(), LISTS[kind]
    ids = pool.extend([arrays(who={"driver": who}) for who in ("kim", "bo", "jo")])
    assert PoolQuery(driver=some(["kim", "bo"])) == PoolQuery(driver=["kim", "bo"])
    assert PoolQuery(ids=some(ids[:2])) == PoolQuery(ids=ids[:2]) and all(type(id) is str for id in PoolQuery(ids=some(ids)).ids)
    assert [pool.count(some(ids[:2])), len(list(pool.find(some(ids[:2])))), len(pool.catalogue(some(ids[:2])))] == [2, 2, 2]
    assert pool.count(PoolQuery(driver=pool.catalogue()["driver"].unique())) == 3
    assert set(pool.delete(some(ids[:2]))) == set(ids[:2]) and len(pool) == 1


@pytest.mark.parametrize("wrong", [pd.DataFrame({"kim": ["bo"]}), {"kim": "bo"}, b"kim", bytearray(b"kim"), np.array([["kim"]]), [None], [7.0], pd.Series([np.nan])],
                         ids=lambda w: type(w).__name__)
def test_queries_refuse_what_is_no_list_of_identities(wrong):
    "Also where iterating it would give texts or numbers that nobody meant"
    with pytest.raises(QueryError): PoolQuery(driver=wrong)
    with pytest.raises(QueryError): PoolQuery(ids=wrong)
    with pytest.raises(QueryError): MemoryPool().find(wrong).__next__()


def test_ranges_are_pairs_of_any_kind():
    "But not of a kind without order"
    for pair in (TIMES[:2], pd.Series(TIMES[:2]), [*TIMES[:2]], (t for t in TIMES[:2])): assert PoolQuery(time=pair) == PoolQuery(time=tuple(TIMES[:2]))
    assert PoolQuery(length=np.array([1, 2])) == PoolQuery(length=(1, 2)) and type(PoolQuery(length=np.array([1, 2])).length[0]) is int
    for wrong in ({1, 2}, {1: 2, 3: 4}, "12", 7, [1], [1, 2, 3]):
        with pytest.raises(QueryError, match="expected a pair"): PoolQuery(length=wrong)


@pytest.mark.parametrize("ask", [lambda pool, ids: list(pool.find(ids)), lambda pool, ids: [0] * pool.count(ids), lambda pool, ids: pool.catalogue(ids),
                                 lambda pool, ids: pool.sample(2, ids), lambda pool, ids: pool.copy_to(MemoryPool(), ids)])
def test_an_iterator_over_ids_is_read_once(ask):
    "A pool that has to ask again, because others gave a version up meanwhile, still knows them"
    pool = MemoryPool()
    ids = pool.extend([drive(hour=h) for h in range(3)])
    select = pool._select
    def fails_once(*args):
        pool._select = select
        pool.store(drive(hour=9))
        raise SnapshotNotFound("given up")
    pool._select = fails_once
    assert len(ask(pool, iter(ids[:2]))) == 2


# --- what is unclear ---

@pytest.mark.parametrize("label", [lambda role, n: n if "state" in role else np.nan, lambda role, n: str(n), lambda role, n: float(n),
                                   lambda role, n: np.nan if n == 0 else n, lambda role, n: str(n) if n else "", lambda role, n: np.int8(n)])
def test_element_numbers_as_pandas_and_csv_files_write_them(label):
    "They say the same"
    frame = arrays().to_frame()
    keys = [(role, name, label(role, n)) for role, name, n in frame.columns]
    assert Episode.from_frame(frame.set_axis(pd.MultiIndex.from_tuples(keys, names=frame.columns.names), axis=1)) == arrays()


@pytest.mark.parametrize("label, message", [("x", "numbered 0, 1, 2"), (0.5, "numbered 0, 1, 2"), (-1, "numbered 0, 1, 2"), (True, "numbered 0, 1, 2"),
                                            ("0", "two columns"), (7, "ragged"), ("9" * 5000, "numbered 0, 1, 2|ragged")])
def test_element_numbers_that_are_none(label, message):
    "Each is refused for what it is"
    frame = arrays().to_frame()
    keys = [(role, name, label if role == "state" and n else n) for role, name, n in frame.columns]
    with pytest.raises(SchemaError, match=message): Episode.from_frame(frame.set_axis(pd.MultiIndex.from_tuples(keys), axis=1))


@pytest.mark.parametrize("order", "<>")
def test_bytes_in_either_order(order):
    "Fit the schema that was inferred from them, in arrays, records and frames, and are stored in the machine's"
    of = lambda a: a.astype(a.dtype.newbyteorder(order))
    turned = dict(state=of(ZEROS), nstate=of(ZEROS), action={"gear": of(np.arange(3))}, reward=of(np.arange(3, dtype="f4")))
    e = arrays(**turned, final_state=None)
    assert e == arrays(action={"gear": np.arange(3)}, reward=np.arange(3, dtype="f4")) == arrays(**turned, schema=e.schema)
    assert record(e.schema, state=turned["state"][0], reward=turned["reward"][0]) == record(e.schema)
    frame = e.to_frame()
    frame[("reward", "reward", 0)] = pd.Series(of(np.arange(3, dtype="f4")), index=frame.index)
    assert Episode.from_frame(frame) == e == Episode.from_frame(frame, schema=e.schema)


@pytest.mark.parametrize("times, message", [
    (["2026-10-25T02:59:59+02:00", "2026-10-25T02:00:00+01:00", "2026-10-25T02:00:01+01:00"], r"pd\.to_datetime\(times, utc=True\)"),
    (["2016-12-31T23:59:59Z", "2016-12-31T23:59:60Z", "2017-01-01T00:00:00Z"], "leap second.*59.999999"),
    (["2026-01-01T09:00Z", "2026-01-01T09:01", "2026-01-01T09:02+01:00"], "expected times with a zone, got")])
def test_times_that_pandas_does_not_read(times, message):
    "The message says what they are; the remedy for offsets keeps every instant, and is not offered where a zone is missing"
    with pytest.raises(SchemaError, match=message) as caught: arrays(timestamp=times)
    with pytest.raises(QueryError): PoolQuery(time=(times[1], None)) if "leap" in message else PoolQuery(time=times)
    if "to_datetime" in message: assert np.diff(arrays(timestamp=pd.to_datetime(times, utc=True)).times).tolist() == [1_000_000] * 2
    elif "leap" not in message: assert "pd.to_datetime" not in str(caught.value)


def test_one_observation_more_than_actions():
    "The message names `final_state`, and doing what it says works"
    state = np.arange(8, dtype="f4").reshape(4, 2)
    with pytest.raises(SchemaError, match="final_state") as caught: arrays(state=state, nstate=None)
    assert "timestamp[:-1]" not in str(caught.value)
    assert np.array_equal(arrays(state=state[:-1], nstate=None, final_state=state[-1]).nstate, state[1:])
    later = TIMES.append(TIMES[-1:] + pd.Timedelta("1s"))
    with pytest.raises(SchemaError, match=r"final_state.*timestamp\[:-1\]"): arrays(state=state, nstate=None, timestamp=later)
    with pytest.raises(SchemaError) as caught: arrays(reward=np.zeros(2, "f4"))
    assert "final_state" not in str(caught.value)


def flagged(values):
    frame = arrays().to_frame()
    frame["truncated", "stop", 0] = values
    return Episode.from_frame(frame)


FLAGS = {"arrays": lambda v: arrays(truncated=v), "record": lambda v: record(truncated=v[-1]), "frame": flagged}


@pytest.mark.parametrize("wrong, remedy", [([0, 0, 1], r"astype\(bool\)"), ([0.0, 0.0, 1.0], r"astype\(bool\)"), ([0.0, 0.0, np.nan], "missing"),
                                           (["no", "no", "yes"], "compare"), ([0, 0, 2], "compare"), ([False, False, None], "missing")])
@pytest.mark.parametrize("door", FLAGS)
def test_flags_are_bools(door, wrong, remedy):
    "Everywhere, and the message says how they become ones; of a single record, 0 and 1 are clear"
    if door == "record" and wrong[-1] == 1 and type(wrong[-1]) is int: assert record(truncated=1).truncated[0]
    else:
        with pytest.raises(SchemaError, match=remedy): FLAGS[door](wrong)
    if "astype" in remedy: assert FLAGS[door](np.array(wrong).astype(bool)).truncated[-1]


# --- casts ---

REWARDS = [np.int64(1), np.uint8(1), np.bool_(True), np.float16(1), np.float32(1), np.float64(1), np.array(1.0), np.array(1), 1, True, 1.0, np.longdouble(1)]
REWARDED = {"record": lambda v: record(SCHEMA, reward=v), "list": lambda v: arrays(reward=[v] * 3, schema=SCHEMA)}


@pytest.mark.parametrize("value", REWARDS, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("door", REWARDED)
def test_rewards_of_any_kind(door, value):
    "A number is a number"
    e = REWARDED[door](value)
    assert e.reward.dtype == np.float32 and (e.reward == 1).all()


CASTS = [("int32", "int64"), ("bool", "float32"), ("uint8", "float32"), ("float16", "float32"), ("float32", "float64"), ("int64", "uint8"), ("int64", "float32")]
REFUSED = [("float64", "float32"), ("float32", "int64"), ("complex64", "float32"), ("float32", "float16"), ("float32", "bool")]


def schema_of(dtype): return replace(SCHEMA, fields=[replace(f, dtype=dtype) if f.role == "action" else f for f in SCHEMA.fields])


ACTED = {"arrays": lambda a, to: arrays(action={"gear": a}, schema=schema_of(to)), "bare": lambda a, to: arrays(action=a, schema=schema_of(to)),
         "record": lambda a, to: record(schema_of(to), action=a[-1:]), "episode": lambda a, to: as_episode(arrays(action={"gear": a}), schema_of(to)),
         "frame": lambda a, to: Episode.from_frame(arrays(action={"gear": a}).to_frame(), schema_of(to))}


@pytest.mark.parametrize("given, to", CASTS)
@pytest.mark.parametrize("door", ACTED)
def test_what_casts_without_loss_passes(door, given, to):
    "At every door, and is stored in the schema's dtype"
    e = ACTED[door](np.array([0, 1, 1], given), to)
    assert e.action.dtype == to and e.action[-1] == 1 and e.schema == schema_of(to)


@pytest.mark.parametrize("given, to", REFUSED)
@pytest.mark.parametrize("door", ACTED)
def test_no_float_is_narrowed(door, given, to):
    "Whatever its values: the next would not fit"
    with pytest.raises(SchemaError, match=f"expected.*{to}.*got.*{given}"): ACTED[door](np.array([0, 1, 1], given), to)


@pytest.mark.parametrize("values, given, to", [([0, 1, 256], "int64", "uint8"), ([0, 1, -1], "int64", "uint64"), ([0, 1, 2**24 + 1], "int64", "float32"),
                                               ([0, 1, 2], "uint8", "bool"), ([0, 1, 2**53 + 1], "int64", "float64"), ([0, 1, 2**63], "uint64", "int64")])
@pytest.mark.parametrize("door", ACTED)
def test_whole_numbers_are_exact(door, values, given, to):
    "Or refused"
    with pytest.raises(SchemaError, match="cannot hold"): ACTED[door](np.array(values, given), to)


@pytest.mark.parametrize("number", [1e300, np.float64(-1e300), 1j, np.complex64(1j), 2**24 + 1, np.int64(2**24 + 1), np.array(1e300)], ids=str)
@pytest.mark.parametrize("door", REWARDED)
def test_numbers_that_a_field_cannot_hold(door, number):
    "Floats round as in code, and never become infinite or lose a part"
    with pytest.raises(SchemaError, match="cannot hold"): REWARDED[door](number)
    assert REWARDED[door](0.1).reward[0] == np.float32(0.1) and np.isinf(REWARDED[door](np.inf).reward[0])


def test_a_pool_casts_what_it_is_given(harness):
    "And knows it when it comes again"
    pool = harness.open()
    buffer = MemoryBuffer(pool=pool, batch_size=3) if type(pool) is MemoryPool else harness.buffer(pool=pool, batch_size=3)
    pool.store(arrays())
    narrow = arrays(action={"gear": np.ones(3, "int32")}, who={"driver": "bo"})
    buffer.store(narrow); pool.store(narrow); pool.store(narrow.to_frame())
    assert pool.version == 2 and pool[narrow.id].action.dtype == np.int64 and (pool[narrow.id].action == 1).all() and pool.verify() == []


def test_a_copy_is_never_cast(harness):
    "Its digests would be others: the pools' dtypes must agree"
    pool, other = harness.open(), MemoryPool()
    pool.store(arrays(action={"gear": np.zeros(3, "int32")}))
    other.store(arrays(who={"driver": "bo"}))
    with pytest.raises(SchemaError, match="int64.*int32"): pool.copy_to(other)
    assert len(other) == 1


# --- environments ---

class Goals(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (3,))
    action_space = gymnasium.spaces.Discrete(4)
    reward_space = gymnasium.spaces.Box(-1, 1, (2,), np.float64)
    def reset(self, *, seed=None, options=None): return np.zeros(3, "f4"), {}
    def step(self, action): return np.zeros(3, "f4"), np.zeros(2), False, False, {}


@pytest.mark.parametrize("env", [Goals(), gymnasium.wrappers.TimeLimit(Goals(), 9)], ids=["plain", "wrapped"])
def test_an_environment_of_several_objectives(env):
    "Its reward space counts, and its rewards fit"
    schema = Schema.from_env(env, units={"reward": {"reward": "J"}})
    assert schema.of("reward") == (Field("reward", "reward", (2,), "float64", "J"),)
    env.reset()
    state, reward, *_ = env.step(0)
    one = Record(state=state, action=np.int64(0), reward=reward, nstate=state, timestamp=TIMES[0], episodestart=TIMES[0]).to_episode(schema)
    assert one.reward.shape == (1, 2)


def test_a_vector_of_environments_has_the_rewards_of_one():
    "As it has the states of one; without a space of its own, a reward is one number"
    envs = gymnasium.vector.SyncVectorEnv([Goals, Goals])
    assert Schema.from_env(envs).of("reward")[0].shape == ()
    envs.single_reward_space, envs.reward_space = Goals.reward_space, gymnasium.spaces.Box(-1, 1, (2, 2))
    assert Schema.from_env(envs).of("reward")[0].shape == (2,)
    with pytest.raises(SchemaError, match="expected Box"): Schema.from_env(object())
