"""Pictures: what is drawn is what a slow count says, on the axes that are given, and no buffer notices."""
import io
import sys
from collections import Counter

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from data_io_nbdev import (Balanced, Episode, Episodes, Epoch, MemoryBuffer, MemoryPool, Mixture, NStep, Once, PoolQuery,
                           Prioritized, Recent, Stack, Uniform, Windows)
from data_io_nbdev import viz
from data_io_nbdev.errors import MissingExtra, NotEnoughData, QueryError
from data_io_nbdev.storage.buffer.state import same_state
from data_io_nbdev.testing import drive


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def pool():
    pool = MemoryPool()
    pool.extend([drive(int(20 + hour), hour=30 * hour, vehicle=vehicle, driver=("anna", "bo")[hour % 2])
                 for hour in range(6) for vehicle in ("VB7", "VB9") if (vehicle, hour) != ("VB9", 3)])
    return pool


def buffer_of(pool, sampler=None): return MemoryBuffer(pool=pool, batch_size=8, seed=7, sampler=sampler or Uniform())


def drawings(pool):
    "Each function, as a call that takes `ax`"
    return dict(coverage=lambda **ax: viz.coverage(pool, **ax), returns=lambda **ax: viz.returns(pool, by="driver", **ax),
                spread=lambda **ax: viz.returns(pool, over="return", **ax), fields=lambda **ax: viz.fields(pool, **ax),
                signals=lambda **ax: viz.signals(next(pool.find()), **ax), health=lambda **ax: viz.health(pool, by="driver", **ax),
                **{f"draws by {by}": lambda by=by, **ax: viz.draws(buffer_of(pool, Prioritized()), 3, by=by, **ax)
                   for by in ("time", "age", "priority", "subject", "driver")})


@pytest.mark.parametrize("name", drawings(None))
def test_axes(pool, name):
    "Each gives the axes that it was given, or those of one new figure; it has a title"
    draw = drawings(pool)[name]
    figure, (left, right) = plt.subplots(1, 2)
    assert draw(ax=right) is right and not left.has_data() and right.get_title()
    figures = len(plt.get_fignums())
    ax = draw()
    assert isinstance(ax, Axes) and ax.figure is not figure and len(plt.get_fignums()) == figures + 1


def heights(ax):
    "What the rows of a coverage say, from the highest on"
    return [(patch.get_data().values - patch.get_data().baseline) / 0.8 for patch in ax.patches[::-1]]


class Listed(MemoryPool):
    "A pool of which only the catalogue is known"
    def catalogue(self, query=None, columns=None): return self.frame


def frame_of(n, people=5, days=60, seed=0):
    rng = np.random.default_rng(seed)
    times = pd.Timestamp("2026-01-01", tz="UTC") + pd.to_timedelta(np.sort(rng.integers(0, days * 86_400, n)), unit="s")
    return pd.DataFrame({"driver": rng.choice([f"driver {i}" for i in range(people)], n), "episodestart": times, "seq_len": 5,
                         "return": rng.normal(size=n), "bytes": 100, "version": 1}, pd.RangeIndex(n, name="id"))


def test_coverage():
    "Heights are the episodes of each day; a day without any has none"
    pool = Listed()
    pool.frame = frame_of(400)[lambda f: f.episodestart.dt.day != 7]
    counted = Counter(zip(pool.frame.driver, pool.frame.episodestart.dt.floor("D")))
    ax, most = viz.coverage(pool, "driver"), max(counted.values())
    days = pd.date_range(pool.frame.episodestart.min().floor("D"), pool.frame.episodestart.max().floor("D"))
    names = [text.get_text() for text in ax.get_yticklabels()][::-1]
    for name, row in zip(names, heights(ax), strict=True):
        np.testing.assert_allclose(row * most, [counted[name, day] for day in days], atol=1e-9)
    assert ax.get_title() == f"{len(pool.frame)} episodes, at most {most} a day each"


@pytest.mark.parametrize("days, width", [(0.02, "minute"), (3, "hour"), (60, "day"), (500, "week"), (2000, "4 weeks"), (9000, "year")])
def test_widths(days, width):
    "Bins are few, in order, and have all episodes, however long the time is"
    times = np.datetime64("2020-02-29T13:14:15", "us") + (np.sort(np.random.default_rng(0).random(500)) * days * 86_400e6).astype("m8[us]")
    bins = viz.bins_of(times)
    at = bins.of(times)
    assert (bins.width, at.min()) == (width, 0) and at.max() == len(bins) - 1 <= 100
    assert (bins.edges[at] <= times).all() and (times < bins.edges[at + 1]).all()
    alone = viz.bins_of(times[:1])
    assert len(alone) == 1 and alone.of(times[:1]) == [0]


def test_a_million():
    "A million episodes of two thousand drivers are a few shapes, and each episode is counted"
    pool = Listed()
    pool.frame = frame_of(1_000_000, people=2000, days=3000)
    pool.frame.loc[5, "return"] = 1e6
    ax = viz.coverage(pool, "driver")
    most = int(ax.get_title().split("at most ")[1].split(" a ")[0])
    totals = [row.sum() * most for row in heights(ax)]
    np.testing.assert_allclose(sorted(totals[:12])[::-1], pool.frame.driver.value_counts()[:12])
    assert len(totals) == 13 and heights(ax)[12].max() == pytest.approx(1)
    assert [text.get_text() for text in ax.get_yticklabels()][0] == "1,988 more"
    ax = viz.returns(pool)
    assert ax.get_title().startswith("1,000,000 returns, ") and 1e6 in ax.lines[-1].get_ydata() and len(ax.lines) == 2
    spread = viz.returns(pool, over="return", by="driver")
    assert sum(patch.get_data().values.sum() for patch in spread.patches) == 1_000_000


def test_returns():
    "The line is the median of each day, by driver; a missing return is told"
    pool = Listed()
    pool.frame = frame_of(300, people=2)
    pool.frame.loc[[3, 4], "return"] = [np.nan, 500.]
    ax = viz.returns(pool, by="driver")
    days, lines = pool.frame.episodestart.dt.floor("D"), {line.get_label(): line for line in ax.lines}
    for name in ("driver 0", "driver 1"):
        mine = pool.frame[pool.frame.driver == name].groupby(days)["return"].median()
        expected = mine.reindex(pd.date_range(days.min(), days.max()))
        np.testing.assert_array_equal(lines[name].get_ydata(), expected)
    assert 500. in lines["odd"].get_ydata() and ax.get_title().endswith("1 no number")
    pool.frame["return"] = np.nan
    with pytest.raises(NotEnoughData, match="no return that matches is a number"): viz.returns(pool)


def test_fields(pool):
    "Each value is in a bar, or counted as odd or missing; the title says how much was read"
    faulty = MemoryPool()
    for hour in range(5):
        e = drive(50, hour=hour)
        state, reward = e.state.copy(), e.reward.copy()
        if hour == 2: state[3, 2], state[7, 2], reward[5] = np.nan, np.inf, 1e9
        faulty.store(Episode.from_arrays(state=e.schema.split("state", state), nstate=e.fields("nstate"), action=e.fields("action"),
                                         reward=reward, timestamp=e.timestamp, who=e.who))
    ax = viz.fields(faulty)
    lanes = {lane.get_ylabel(): lane for lane in ax.child_axes}
    assert ax.get_title() == "all 5 episodes" and list(lanes)[:2] == ["velocity", "slope"]
    assert lanes["slope"].texts[0].get_text() == "2 missing" and lanes["slope"].patches[0].get_data().values.sum() == 248
    assert lanes["reward"].texts[0].get_text() == "1 odd: 1e+09" and lanes["reward"].patches[0].get_data().values.sum() == 249
    assert lanes["velocity"].patches[0].get_data().values.sum() == 500
    ax = viz.fields(pool, n=3, select={"state": ["velocity"]}, most=2)
    assert ax.get_title() == "3 of 11 episodes, 2 of 4 fields" and ax.child_axes[0].get_ylabel() == "velocity\nm/s"


def test_signals():
    "Lines are the very values, a missing one is marked, the end is; of a long episode a peak stays"
    e = drive(60, end="truncated")
    ax = viz.signals(e, ["velocity", "work"])
    velocity, work = ax.child_axes
    seconds = np.arange(60)
    for i in range(2): np.testing.assert_array_equal(velocity.lines[i].get_xydata(), np.c_[seconds, e.state[:, i]])
    np.testing.assert_array_equal(work.lines[0].get_ydata(), e.reward)
    assert work.get_ylabel() == "work\nkJ" and "truncated" in ax.get_title() and velocity.get_xlim() == work.get_xlim()
    assert [lane.lines[-1].get_label() for lane in ax.child_axes] == ["truncated"] * 2
    n = 200_000
    x = np.zeros(n, "float32")
    x[[100, 77_777]] = np.nan, 9
    long = Episode.from_arrays(state=x, nstate=x, action=x != 0, reward=x, who={"vehicle": "$x_1"}, terminated=np.arange(n) == n - 1,
                               timestamp=pd.date_range("2026-01-01", periods=n, freq="10ms", tz="UTC"))
    ax = viz.signals(long, "state")
    (at, high), = [p for p in ax.child_axes[0].lines[0].get_xydata() if p[1] == 9]
    assert (at, high) == (777.77, 9) and len(ax.child_axes[0].lines[0].get_xydata()) <= 4000
    assert {line.get_label(): line for line in ax.child_axes[0].lines}["missing"].get_xdata().tolist() == [1.0]
    ax.figure.savefig(io.BytesIO(), format="svg")
    assert r"\$x_1" in ax.get_title()


def slow_health(pieces, low, high, stuck):
    "Steps of an episode that are missing, stuck, odd, one by one"
    found = [0, 0, 0]
    for i, x in enumerate(pieces):
        a = b = i
        while a > 0 and pieces[a - 1] == x: a -= 1
        while b + 1 < len(pieces) and pieces[b + 1] == x: b += 1
        found[0] += not np.isfinite(x)
        found[1] += bool(np.isfinite(x) and b - a + 1 >= stuck)
        found[2] += bool(np.isfinite(x) and not low <= x <= high)
    return found


@pytest.mark.parametrize("seed", range(4))
def test_health(seed):
    "Shares are those that are counted step by step; whole numbers are never stuck"
    rng, pool, values = np.random.default_rng(seed), MemoryPool(), {}
    for day in range(6):
        n = int(rng.integers(2, 60))
        x = rng.integers(0, 3, n).astype("float32")
        x[rng.random(n) < 0.1], x[rng.random(n) < 0.05] = np.nan, np.inf
        e = Episode.from_arrays(state={"x": x, "gear": np.ones(n, "int8")}, nstate={"x": x, "gear": np.ones(n, "int8")},
                                action=rng.random(n), reward=rng.random(n), who={"vehicle": f"VB{day % 2}"},
                                timestamp=pd.date_range(f"2026-01-{day + 1:02}", periods=n, freq="1s", tz="UTC"))
        pool.store(e)
        values.setdefault(f"VB{day % 2}", []).append(x)
    found = viz.sampled(pool)
    ids = [e.id for e in found.episodes]
    table = viz.health_table(found, viz.subjects(pool.catalogue(ids).loc[ids]), {"x": (0, 1)}, stuck=3)
    for who, pieces in values.items():
        expected = np.sum([slow_health(x, 0, 1, 3) for x in pieces], axis=0) / sum(map(len, pieces))
        np.testing.assert_allclose([table.loc[("state", "x"), (finding, who)] for finding in viz.FINDINGS], expected)
        assert table.loc[("state", "gear"), ("stuck", who)] == 0
    texts = [text.get_text() for text in viz.health(pool, ranges={"x": (0, 1)}, stuck=3).texts]
    assert f"{table.loc[('state', 'x'), ('odd', 'VB0')]:.0%}" in texts


SAMPLERS = dict(uniform=Uniform, episodes=Episodes, windows=lambda: Windows(4), stack=lambda: Stack(2), nstep=lambda: NStep(3, 0.9),
                epoch=Epoch, once=Once, recent=lambda: Recent(20), balanced=lambda: Balanced("driver"), prioritized=Prioritized,
                surprising=lambda: NStep(2, 0.9, over=Prioritized()))


@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_change_nothing(pool, name):
    "The state is what it was, the batches that follow are those of a twin, also after an interrupt"
    mine, twin = (buffer_of(pool, SAMPLERS[name]()) for _ in range(2))
    for buffer in (mine, twin): buffer.sample()
    before = mine.state_dict()
    ax = plt.figure().add_subplot()
    for by in ("time", "age", "driver"): viz.draws(mine, 3, by=by, ax=ax)
    assert same_state(before, mine.state_dict())
    if hasattr(mine.sampler, "update"):
        for buffer in (mine, twin): buffer.update_priorities(np.arange(10), np.arange(10.))
        viz.draws(mine, 3, by="priority", ax=ax)
    count, whole = [], mine._drawn
    def interrupted(*args):
        count.append(1)
        if len(count) == 3: raise KeyboardInterrupt
        return whole(*args)
    mine._drawn = interrupted
    with pytest.raises(KeyboardInterrupt): viz.draws(mine, 5)
    del mine._drawn
    for _ in range(4):
        for a, b in zip(mine.sample(), twin.sample()): np.testing.assert_array_equal(a, b)


def test_draws_are_what_comes(pool):
    "What a trial tells is what is drawn next; bars are the shares of it"
    mine = buffer_of(pool, Recent(30))
    ax = viz.draws(mine, 20, by="driver")
    found = [mine.sample() for _ in range(20)]
    drivers = pool.catalogue().driver[np.concatenate([batch.episode for batch in found])]
    there = Counter({d: n for d, n in pool.summary("driver").steps.items()})
    bars = [[patch.get_width() for patch in kind] for kind in ax.containers]
    np.testing.assert_allclose(bars[0], [there[d] / sum(there.values()) for d in ("anna", "bo")])
    np.testing.assert_allclose(bars[1], [(drivers == d).mean() for d in ("anna", "bo")])
    assert ax.get_title() == "160 steps in 20 batches by Recent(half_life=30)"


def test_ages(pool):
    "The newest step has age 0, and is what Recent draws most; a uniform draw is as old as what there is"
    for sampler, least in ((Recent(3), 0.7), (Uniform(), 0.0)):
        there, drawn = (patch.get_data() for patch in viz.draws(buffer_of(pool, sampler), 100, by="age").patches)
        assert there.edges[0] == 0 and drawn.values[:3].sum() >= least and abs(drawn.values.sum() - 1) < 1e-9
    np.testing.assert_allclose(drawn.values, there.values, atol=0.03)


def test_fence():
    "Three times the width of the middle half, on both sides; endless where that has none, or nothing is a number"
    assert viz.fence(np.array([np.nan, 0, 1, 2, 3, 4])) == (-5, 9)
    assert viz.fence(np.array([0, 0, 0, 0, 9])) == viz.fence(np.array([np.nan])) == (-np.inf, np.inf)


def test_edges():
    "Bins hold every value, also of numbers so large that few floats are between them"
    for values in (np.array([2.0**60, 2.0**60 + 512]), np.array([5.0]), np.random.default_rng(0).normal(size=100)):
        assert np.histogram(values, viz.edges_of(values, 60))[0].sum() == len(values)


def test_draws_of_an_end(pool):
    "Where a sampler has no more, what it had is drawn; where it had nothing, this is told"
    mine = buffer_of(pool, Once())
    assert f" in {-(-len(mine) // 8)} batches" in viz.draws(mine, 1000).get_title()
    for _ in range(-(-len(mine) // 8)): mine.sample()
    with pytest.raises(NotEnoughData, match="each item was drawn"): viz.draws(mine)


def test_priorities(pool):
    "Of ten priorities, half of the items have each, and drawn is what is worth more"
    mine = buffer_of(pool, Prioritized(alpha=0.5))
    mine.sample()
    mine.update_priorities(np.arange(len(mine)), np.where(np.arange(len(mine)) % 2, 1., 9.))
    there, drawn = (patch.get_data() for patch in viz.draws(mine, 300, by="priority").patches)
    np.testing.assert_allclose(there.edges[[0, -1]], [1, 9], atol=1e-5)
    np.testing.assert_allclose(there.values[[0, -1]], 0.5, atol=0.01)
    np.testing.assert_allclose(drawn.values[[0, -1]], [0.25, 0.75], atol=0.05)   # as sqrt(1) to sqrt(9)


def test_errors(pool):
    "What is asked for and is not there is told, with what is; nothing is drawn before"
    figures, empty = plt.get_fignums(), MemoryPool()
    wrong = [(QueryError, "identity level 'drivr'; there are", lambda: viz.coverage(pool, "drivr")),
             (QueryError, "identity level 'return'", lambda: viz.returns(pool, by=["driver", "return"])),
             (QueryError, "identity level 7", lambda: viz.health(pool, by=7)),
             (QueryError, "identity level 'tyme'", lambda: viz.draws(buffer_of(pool), by="tyme")),
             (QueryError, "has no priorities", lambda: viz.draws(buffer_of(pool), by="priority")),
             (QueryError, "'time' or 'return'", lambda: viz.returns(pool, over=["time"])),
             (QueryError, "no field 'sped'", lambda: viz.fields(pool, select={"state": ["sped"]})),
             (QueryError, "no field 'sped'", lambda: viz.signals(next(pool.find()), ["velocity", "sped"])),
             (QueryError, "no field 'sped'", lambda: viz.health(pool, ranges={"sped": (0, 1)})),
             (QueryError, "expected .from, to. of 'slope'", lambda: viz.health(pool, ranges={"slope": (1, 0)})),
             (QueryError, "n: expected a whole number", lambda: viz.fields(pool, n=0)),
             (QueryError, "n: expected a whole number", lambda: viz.draws(buffer_of(pool), n=1.5)),
             (QueryError, r"mixture.members\[0\]", lambda: viz.draws(Mixture({buffer_of(pool): 1}, batch_size=4))),
             (QueryError, "expected a PoolQuery", lambda: viz.coverage(pool, query=7)),
             (NotEnoughData, "no step to draw", lambda: viz.draws(buffer_of(empty)))]
    for draw in (viz.coverage, viz.returns, viz.fields, viz.health):
        wrong.append((NotEnoughData, "no episode matches", lambda draw=draw: draw(empty)))
        wrong.append((NotEnoughData, "no episode matches", lambda draw=draw: draw(pool, query=PoolQuery(driver="eve"))))
    for error, said, ask in wrong:
        with pytest.raises(error, match=said): ask()
    assert plt.get_fignums() == figures


def test_the_extra_is_named(pool, monkeypatch):
    "Without matplotlib the error says what to install"
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]: monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=r"data_io_nbdev\[viz\]"): viz.coverage(pool)
    assert viz.health_table(viz.sampled(pool), viz.Subjects(["all"], np.zeros(11, int), 1)).shape[1] == 3
