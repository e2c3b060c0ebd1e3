"Episodes, schemas and queries show themselves: escaped, in bounded size and time, without changing anything."
import pickle
import re
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from data_io_nbdev import Episode, Field, PoolQuery, Schema
from data_io_nbdev.data.core import from_us, records
from data_io_nbdev.data.show import bars, card, facts, in_bytes, shortened, sparkline, table

EVIL = "<script>alert('&')</script>"
T = pd.date_range("2026-01-01 08:00", periods=4, freq="1s", tz="Europe/Berlin")


def episode(**changes):
    given = dict(state={"speed": [1.0, 2.0, 3.0, 4.0]}, action={"pedal": [0.0] * 4}, reward=[1.0, 2.0, np.nan, 0.0], timestamp=T,
                 final_state={"speed": 5.0}, who={"vehicle": "VB7", "driver": "anna"}, truncated=[False, False, False, True])
    return Episode.from_arrays(**{**given, **changes})


def long(n=1_000_000, fields=3, who=None):
    "An episode of so many steps, some of its rewards missing"
    reward = np.where(np.arange(n) % 7 == 0, np.nan, np.arange(n, dtype="float32"))
    state = {f"s{i}": np.arange(n, dtype="float32") for i in range(fields)}
    return Episode.from_arrays(state=state, action=np.zeros(n, "int8"), reward=reward, timestamp=from_us(np.arange(n) * 1000),
                               who=who or {"driver": "anna"}, terminated=np.arange(n) == n - 1)


def schema(n=700, **more):
    return Schema([*(Field("state", f"beam {i}", unit="m") for i in range(n)), Field("action", "pedal"), Field("reward", "work")], **more)


def points(html): return [p.split() for p in re.findall(r'points="([^"]*)"', html)]


def is_safe(html):
    "No tag but those that the pieces are made of, no script, no style sheet, no link"
    tags = set(re.findall(r"<\s*/?\s*([A-Za-z!]+)", html))
    assert tags <= {"div", "b", "table", "tr", "th", "td", "svg", "polyline", "rect"}, tags
    assert not re.search(r"<[^>]*\s(on\w+|href|src|class|id)\s*=", html), html
    return True


# --- escaping ---

@pytest.mark.parametrize("shown", [
    episode(who={"vehicle": EVIL}), episode(who={EVIL: "VB7"}), episode(state={EVIL: [1.0, 2.0, 3.0, 4.0]}, final_state={EVIL: 5.0}),
    Schema([Field("state", EVIL, unit=EVIL), Field("action", EVIL), Field("reward", EVIL)], {EVIL: str}),
    PoolQuery(vehicle=EVIL), PoolQuery(who={EVIL: 7}), PoolQuery(ids=EVIL)], ids=lambda shown: type(shown).__name__)
def test_what_is_shown_is_text(shown):
    "A name that is HTML is shown as it is written, wherever it stands"
    html = shown._repr_html_()
    assert "<script" not in html and "&lt;script&gt;" in html and is_safe(html)


def test_pieces_escape():
    "Every place into which text goes"
    html = card(EVIL, facts({EVIL: EVIL}), table([EVIL], [[EVIL], [7]]))
    assert "<script" not in html and html.count("&lt;script&gt;") == 5 and is_safe(html)


@pytest.mark.parametrize("text", ["two\nlines", "\x1b[31mred", "\r", "\u2028", "x" * 100_000])
def test_one_line(text):
    "What is printed is one line, and not a long one"
    things = [episode(who={text: text}), Schema([Field("state", text), Field("action", text), Field("reward", text)], {text: str}),
              PoolQuery(who={text: [text] * 3}), PoolQuery(ids=[text])]
    for thing in things:
        assert len(repr(thing).splitlines()) == 1 and len(repr(thing)) < 1000
    for thing in things:
        assert len(str(thing).splitlines()) == 1 and len(str(thing)) < 1000 and len(thing._repr_html_()) < 6000


# --- bounds ---

def test_a_million_steps():
    "A long episode is thinned before it is drawn: few points, little text, little time"
    e = long()
    begun = time.perf_counter()
    html = e._repr_html_()
    assert time.perf_counter() - begun < 2  # 0.05 s on the machine that this was written on
    assert len(html) < 30_000 and is_safe(html)
    assert len(points(html)) >= 5 and sum(map(len, points(html))) <= 6 * 241
    assert len(repr(e)) < 200 and "1,000,000" in html


def test_gaps_everywhere():
    "A value missing at every other step makes no line for each"
    html = card("", sparkline(np.tile([1.0, np.nan], 500_000)))
    assert sum(map(len, points(html))) <= 182


def test_many_fields():
    "A schema and an episode of 700 fields show some, and how many more there are"
    s = schema(identity={f"level {i}": str for i in range(100)})
    html = s._repr_html_()
    assert len(html) < 30_000 and "688 more" in html and "88 more" in html and "beam 11<" in html and "beam 12<" not in html
    assert len(repr(s)) < 300 and "696 more" in repr(s)
    wide = long(50, fields=700, who={f"level {i:03}": i for i in range(100)})
    assert "696 more" in wide._repr_html_() and len(wide._repr_html_()) < 30_000 and len(repr(wide)) < 1000


def test_many_ids():
    "A query of a million ids, or of many levels, shows some"
    q = PoolQuery(ids=[f"{i:032x}" for i in range(1_000_000)])
    assert all(len(text) < 1000 and "more" in text for text in (repr(q), str(q), q._repr_html_()))
    q = PoolQuery(who={f"level {i}": list(range(1000)) for i in range(1000)})
    assert len(str(q)) < 5000 and len(q._repr_html_()) < 10_000 and "980 more levels" in str(q)


def test_bars_are_bounded():
    html = card("", bars(np.ones(1_000_000)))
    assert html.count("<rect") <= 180


# --- odd values ---

@pytest.mark.parametrize("values", [[], [np.nan], [np.inf, -np.inf], [1.0], [7, 7, 7], [1.7e308, -1.7e308], [True, False], [1 + 2j, 3],
                                    np.array([0, 2**64 - 1], "uint64"), np.array([6e4, -6e4], "float16"), [None, 1]], ids=str)
def test_any_numbers_are_drawn(values):
    "Whatever the numbers are, a line stays inside its frame"
    html = card("", sparkline(values, 100, 20))
    for line in points(html):
        assert len(line) > 1
        for x, y in (map(float, point.split(",")) for point in line): assert 0 <= x <= 100 and 0 <= y <= 20


def test_a_peak_stays():
    "Thinning keeps the least and the greatest, and times place them"
    values = np.zeros(100_000)
    values[77_777] = 1
    line, = points(card("", sparkline(values, 100, 20, at=np.arange(100_000) ** 2)))
    x, y = min((tuple(map(float, point.split(","))) for point in line), key=lambda point: point[1])
    assert y == 2 and abs(x - (0.77777**2 * 96 + 2)) < 0.2


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint64", "float16", "complex64"])
def test_episodes_of_any_dtype(dtype):
    e = episode(state={"image": np.zeros((4, 2, 2), dtype), "vector": np.ones((4, 3), dtype), "scalar": np.ones(4, dtype)},
                final_state={"image": np.zeros((2, 2), dtype), "vector": np.ones(3, dtype), "scalar": np.ones(1, dtype)[0]})
    html = e._repr_html_()
    assert "vector[0]" in html and "scalar" in html and ">image" not in html and is_safe(html)


@pytest.mark.parametrize("change, said", [({}, "truncated"), (dict(truncated=None, terminated=[False, False, False, True]), "terminated"),
                                          (dict(truncated=None), "not at the last step")])
def test_how_it_ended(change, said):
    e = episode(**change)
    assert said in e._repr_html_() and ("steps)" in repr(e)) == (said not in repr(e))


def test_parts_and_far_times():
    "A part says what lies before it; a start outside of the calendar is shown all the same"
    assert "after 2 that are not here" in episode()[2:]._repr_html_()
    assert "Episode(" in (text := repr(replace(episode(), start=2**62))) and "\n" not in text
    assert "nobody" in episode(who={})._repr_html_() and "1 step," in repr(episode()[3:])


# --- showing changes nothing ---

@pytest.mark.parametrize("thing", [episode(), schema(5, identity=["vehicle"]), PoolQuery(vehicle="VB7", length=(1, None))], ids=lambda t: type(t).__name__)
def test_showing_changes_nothing(thing):
    before, same = pickle.dumps(thing), pickle.loads(pickle.dumps(thing))
    first = thing._repr_html_(), repr(thing), str(thing), dir(thing)
    assert (thing._repr_html_(), repr(thing), str(thing), dir(thing)) == first
    assert thing == same == pickle.loads(before) and hash(thing) == hash(same) and type(same) is type(thing)


def test_import_is_not_paid_for():
    "What draws is loaded when something is drawn"
    code = ("import sys; from data_io_nbdev import Episode, PoolQuery; q = PoolQuery(a=1); "
            "print([m for m in ('fastcore.xml', 'data_io_nbdev.data.show') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# --- words and one line ---

def test_query_in_words():
    q = PoolQuery(vehicle="VB7", driver=["bo", "anna"], start=("2026-01-01T00:00Z", "2026-02-01T00:00Z"), length=(3, None), ids="abcdef12")
    assert str(q) == ("driver: 'anna' or 'bo'; vehicle: 'VB7'; began: from 2026-01-01 00:00:00+00:00 and before 2026-02-01 00:00:00+00:00; "
                      "length: at least 3 steps; id: 'abcdef12'")
    assert str(PoolQuery()) == "all episodes" and str(PoolQuery(ids=[])) == "id: none"
    assert str(PoolQuery(who={"length": 3}, length=(1, 2))) == "level length: 3; length: at least 1 and at most 2 steps"


@pytest.mark.parametrize("q", [PoolQuery(), PoolQuery(vehicle=["a", "b"], trip=7), PoolQuery(time=("2026-01-01T00:00Z", None), length=(1, 5), ids=["a" * 32]),
                               PoolQuery(returns=(0.1, float("inf"))).split(0.3, by="driver", salt="a")[1]], ids=str)
def test_query_as_code(q):
    "A query of ordinary size is printed as the code that makes it"
    assert eval(repr(q)) == q


def test_ids_may_be_beginnings():
    "A query takes the beginning of an id; it matches what it names exactly, until a pool has looked it up"
    e = episode()
    begun, whole = PoolQuery(ids=e.id[:8]), PoolQuery(ids=e.id)
    facts = e.id, e.who, e.start, len(e)
    assert begun.ids == (e.id[:8],) and not begun.matches(*facts) and whole.matches(*facts)


def test_printed_lines():
    e = episode()
    assert repr(e) == "Episode(vehicle='VB7', driver='anna', 2026-01-01T08:00:00+01:00, 4 steps, truncated)"
    assert repr(e.schema) == "Schema(state: speed; action: pedal; reward: reward; identity: vehicle, driver)"


# --- completion ---

ROLES = {"state", "action", "reward", "nstate", "terminated", "truncated"}


def test_completion_of_an_episode():
    shown = set(dir(episode()))
    assert ROLES | {"to_frame", "id", "who", "timestamp", "step", "schema", "fields", "nbytes"} <= shown and "info" not in shown
    assert "info" in dir(episode(info={"t": [1.0] * 4}))
    assert not shown & {"blocks", "links", "first", "offset", "from_frame", "from_arrays"}


def test_completion_of_the_others():
    record = next(records(episode()))
    assert set(dir(record)) == {"state", "action", "reward", "nstate", "timestamp", "episodestart", "who", "terminated", "truncated", "info", "step", "to_episode"}
    assert set(dir(Field("state", "speed"))) == {"role", "name", "shape", "dtype", "unit", "nbytes"}
    assert set(dir(schema(2))) == {"fields", "identity", "levels", "roles", "of", "block", "split", "join", "select", "check", "to_json"}
    assert set(dir(PoolQuery())) == {"who", "start", "time", "length", "returns", "ids", "shares", "split", "check", "matches", "to_json"}


@pytest.mark.parametrize("thing", [episode(), next(records(episode())), Field("state", "s"), schema(2), PoolQuery()], ids=lambda t: type(t).__name__)
def test_completion_has_no_plumbing(thing):
    "No name with an underscore, and every name is there"
    assert not [name for name in dir(thing) if name.startswith("_")]
    for name in dir(thing): getattr(thing, name)


def test_constructors_are_on_the_class():
    assert {"from_frame", "from_arrays"} <= set(dir(Episode)) and {"from_frame", "from_env", "from_json"} <= set(dir(Schema))


# --- sizes and lists ---

def test_sizes():
    assert [in_bytes(n) for n in (0, 999, 1000, 999_999, 1.5e9, 2e13, 5e15)] == ["0 B", "999 B", "1 kB", "1 MB", "1.5 GB", "20 TB", "5,000 TB"]


def test_shortened():
    assert shortened("abc", 3) == ["a", "b", "c"] and shortened("abcd", 3) == ["a", "b", "c", "… 1 more"] and shortened([], 3) == []
    assert len(card("", facts({"long": "x" * 10**6}))) < 2000
