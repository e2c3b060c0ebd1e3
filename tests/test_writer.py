"""`Writer`: whatever it is given, in whatever portions it commits, the pool has each step once, and each episode as the machine had it."""
import base64
import gc
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attack_memory import Lines

from data_io_nbdev import DaskBuffer, DaskPool, Episode, MemoryBuffer, MemoryPool
from data_io_nbdev.errors import ClosedError, EpisodeConflict, PoolUnavailable, QueryError, ReadOnly, SchemaError
from data_io_nbdev.testing import HARNESSES, facts_of

T0 = pd.Timestamp("2026-01-01T08:00Z")
def at(i): return (T0 + pd.Timedelta(milliseconds=10 * i)).to_pydatetime()
def step(i, lane=0): return dict(state=np.array([i, lane], "float32"), action=np.array([-i], "float32"), reward=np.float32(i / 8), nstate=np.array([i + 1, lane], "float32"))


def obvious(lanes):
    "The episodes of each lane: lists of steps `(number, terminated, truncated)`, one list for each episode"
    pool = MemoryPool()
    for lane, (who, episodes) in enumerate(lanes):
        for steps in episodes:
            told = [step(i, lane) for i, *_ in steps]
            arrays = {role: np.array([s[role] for s in told]) for role in told[0]}
            terminated, truncated = (np.array([s[k] for s in steps]) for k in (1, 2))
            pool.store(Episode.from_arrays(**arrays, timestamp=[at(i) for i, *_ in steps], who=who, terminated=terminated, truncated=truncated, step=0))
    return facts_of(pool)


class TestOracle:
    @settings(max_examples=60, deadline=None)
    @given(ends=st.lists(st.sampled_from("....tcr"), min_size=1, max_size=40), size=st.integers(1, 12), flush=st.sets(st.integers(0, 40), max_size=4))
    def test_one(self, ends, size, flush):
        "Steps of one machine, with ends of both kinds and resets, in portions of any size"
        pool, episodes = MemoryPool(), [[]]
        with pool.writer({"car": "A"}, steps=size) as writer:
            for i, end in enumerate(ends):
                writer.append(**step(i), terminated=end == "t", truncated=end == "c", timestamp=at(i))
                episodes[-1].append((i, end == "t", end == "c"))
                if end != ".": episodes.append([])
                if end == "r": writer.reset()
                if i in flush:
                    writer.flush()
                    assert writer.acknowledged == i + 1 and writer.pending == 0
                assert writer.acknowledged + writer.pending == i + 1 and writer.pending < size
        assert facts_of(pool) == obvious([({"car": "A"}, [e for e in episodes if e])]) and writer.last == at(len(ends) - 1)

    @settings(max_examples=60, deadline=None)
    @given(data=st.data(), n=st.integers(1, 5), rows=st.integers(1, 25), size=st.integers(1, 9))
    def test_many(self, data, n, rows, size):
        "Environments side by side, each with ends and resets of its own; some take no step now and then"
        pool, lanes = MemoryPool(), [({"env": lane}, [[]]) for lane in range(n)]
        writer = pool.writer([who for who, _ in lanes], steps=size)
        for i in range(rows):
            kinds = data.draw(st.lists(st.sampled_from("....tcr-"), min_size=n, max_size=n))
            if i == 0: kinds = [k.replace("-", ".") for k in kinds]  # the schema comes from a step
            flags = [np.array([k == kind for k in kinds]) for kind in "tc"]
            told = [step(i, lane) for lane in range(n)]
            where = np.array([k != "-" for k in kinds]) if "-" in kinds else None
            writer.append(**{role: np.array([s[role] for s in told]) for role in told[0]}, terminated=flags[0], truncated=flags[1], timestamp=at(i), where=where)
            for kind, (_, episodes) in zip(kinds, lanes):
                if kind == "-": continue
                episodes[-1].append((i, kind == "t", kind == "c"))
                if kind != ".": episodes.append([])
            if "r" in kinds: writer.reset(np.array([k == "r" for k in kinds]))
        writer.close()
        assert facts_of(pool) == obvious([(who, [e for e in episodes if e]) for who, episodes in lanes])

    @pytest.mark.parametrize("kind", sorted(HARNESSES))
    def test_back_ends(self, tmp_path, kind):
        "On every back-end; fields by name, numbers from Python, a schema that the pool has already"
        pool = HARNESSES[kind](tmp_path).open()
        for _ in range(2):
            with pool.writer({"car": "B"}, steps=5, seconds=0.05) as writer:
                for i in range(12): writer.append({"x": i, "y": 2 * i}, {"push": 0.5}, 1, {"x": i + 1, "y": 2 * i + 2}, i == 8)
            assert writer.acknowledged == 12
        assert [len(e) for e in pool] == [9, 3, 9, 3] and pool.verify() == []
        assert [e.fields("state")["y"].tolist() for e in pool][:2] == [[2 * i for i in range(9)], [18, 20, 22]]


def test_a_step_that_does_not_fit():
    "It is refused as a whole, by name, and the next one is taken"
    pool = MemoryPool()
    writer = pool.writer({"car": "A"})
    writer.append(**step(0), timestamp=at(0))
    for change, said in [(dict(state=np.zeros(3, "float32")), "state"), (dict(reward="much"), "reward"), (dict(nstate=None), "missing: nstate"), (dict(terminated=2), "terminated"),
                         (dict(timestamp=at(0)), "behind the last"), (dict(timestamp="2026-01-01"), "zone"), (dict(action=np.array([1e300])), "action"), (dict(info=3), "info")]:
        with pytest.raises(SchemaError, match=said): writer.append(**{**step(1), "timestamp": at(1), **change})
    writer.append(**step(1), timestamp=at(1), terminated=True)
    assert facts_of(pool) == obvious([({"car": "A"}, [[(0, False, False), (1, True, False)]])])


@pytest.mark.parametrize("options, said", [(dict(steps=0), "steps"), (dict(seconds=0), "seconds"), (dict(who=[]), "who"), (dict(who=3), "who"), (dict(most=1.5), "most"),
                                           (dict(start="2026-01-01"), "zone"), (dict(who=[{}, {}], start=["2026-01-01T00:00Z"]), "start")])
def test_options(options, said):
    with pytest.raises(QueryError, match=said): MemoryPool().writer(**options)


def test_who():
    "Environments need identities that differ; a pool that is only read, none"
    writer = MemoryPool().writer([{"env": 1}, {"env": 1}])
    with pytest.raises(SchemaError, match="another identity for each"): writer.append(np.zeros((2, 1)), np.zeros((2, 1)), np.zeros(2), np.zeros((2, 1)))
    with pytest.raises(ReadOnly): MemoryPool().snapshot().writer()


def test_flags_of_many():
    "A flag that is given once is that of each"
    pool = MemoryPool()
    with pool.writer([{"env": 0}, {"env": 1}]) as writer:
        for i in range(3): writer.append(np.zeros((2, 1)), np.zeros((2, 1)), np.zeros(2), np.zeros((2, 1)), **dict(truncated=True) if i == 1 else {})
    assert sorted(len(e) for e in pool) == [1, 1, 2, 2] and sum(e.truncated.sum() for e in pool) == 2


def test_reset():
    "It needs no step, forgets an episode that was to go on, names what is wrong, and is refused where no step is taken"
    pool = MemoryPool()
    with pool.writer({"car": "A"}) as writer: writer.append(**step(0), timestamp=at(0))
    with pool.writer({"car": "A"}, start=at(0)) as writer:
        writer.reset()
        writer.append(**step(1), timestamp=at(1))
    assert facts_of(pool) == obvious([({"car": "A"}, [[(0, False, False)], [(1, False, False)]])])
    with pytest.raises(ClosedError): writer.reset()
    with pytest.raises(QueryError, match="where: expected one for each of 2"): MemoryPool().writer([{"env": 0}, {"env": 1}]).reset([True] * 3)


class Outage:
    "Makes `extend` fail so many times"
    def __init__(self, pool, error, times): self.pool, self.error, self.left, self.extend = pool, error, times, pool.extend; pool.extend = self
    def __call__(self, items):
        if self.left:
            self.left -= 1
            raise self.error
        return self.extend(items)


def test_a_tunnel(tmp_path):
    "While the pool cannot be reached steps wait, none is lost, and `flush` says so; then all are stored once"
    pool = DaskPool(tmp_path / "lake")
    writer = pool.writer({"car": "A"}, steps=3, seconds=0.01)
    outage = Outage(pool, PoolUnavailable("no network"), 10**9)
    for i in range(20): writer.append(**step(i), timestamp=at(i))
    with pytest.raises(PoolUnavailable, match="no network"): writer.flush()
    assert (writer.acknowledged, writer.pending) == (0, 20)
    outage.left = 0
    for i in range(20, 25): writer.append(**step(i), timestamp=at(i), terminated=i == 24)
    writer.close()
    assert (writer.acknowledged, writer.pending) == (25, 0)
    assert facts_of(pool) == obvious([({"car": "A"}, [[(i, i == 24, False) for i in range(25)]])])


def test_the_longest_tunnel(tmp_path):
    "More than `most` steps do not wait: that step is not taken"
    pool = DaskPool(tmp_path / "lake")
    writer = pool.writer({"car": "A"}, steps=2, seconds=0.01, most=5)
    outage = Outage(pool, PoolUnavailable("no network"), 10**9)
    with pytest.raises(PoolUnavailable, match="5 steps wait"):
        for i in range(9):
            writer.append(**step(i), timestamp=at(i))
            time.sleep(0.05)
    assert writer.pending == 5
    outage.left = 0
    writer.close()
    assert sum(map(len, pool)) == 5


def test_an_error_in_the_loop(tmp_path):
    "What was appended is stored; where it cannot be, the loop's error comes through, and a warning says how much that is"
    pool = DaskPool(tmp_path / "lake")
    with pytest.raises(ZeroDivisionError), pool.writer({"car": "A"}) as writer:
        for i in range(7): writer.append(**step(i), timestamp=at(i))
        1 / 0
    assert writer.acknowledged == 7 == sum(map(len, pool))
    Outage(pool, PoolUnavailable("no network"), 10**9)
    with pytest.warns(UserWarning, match="3 steps that were appended are not stored: no network"), pytest.raises(ZeroDivisionError), pool.writer({"car": "B"}) as writer:
        for i in range(3): writer.append(**step(i), timestamp=at(i))
        1 / 0
    del pool.extend
    writer.close()
    assert sum(map(len, pool)) == 10


def test_a_conflict(tmp_path):
    "What can never be stored is said with the next step, and how much it is"
    pool = DaskPool(tmp_path / "lake")
    with pool.writer({"car": "A"}) as first: first.append(**step(0), timestamp=at(0))
    writer = pool.writer({"car": "A"}, steps=2, seconds=0.01)
    with pytest.raises(EpisodeConflict, match=r"\d steps that were appended cannot be stored"):
        for i in range(1, 100):
            writer.append(**step(i), timestamp=at(i - 1))
            time.sleep(0.02)
    with pytest.raises(EpisodeConflict): writer.close()
    assert sum(map(len, pool)) == 1
    writer._desk.waiting.clear()


def test_seconds(tmp_path):
    "A step waits no longer than it may, though no other follows, and later ones neither"
    pool = DaskPool(tmp_path / "lake")
    writer = pool.writer({"car": "A"}, seconds=0.05)
    for i in range(3):
        writer.append(**step(i), timestamp=at(i))
        until = time.monotonic() + 20
        while writer.acknowledged < i + 1 and time.monotonic() < until: time.sleep(0.01)
        assert writer.acknowledged == i + 1
        time.sleep(0.2)  # the thread has gone
    writer.close()
    assert not any(t.name == "data_io_nbdev writer" and t is writer._desk.thread for t in threading.enumerate() if t.is_alive() and writer._desk.due.is_set() is False)
    assert len(pool) == 1


def test_steps_and_ends(tmp_path):
    "`steps=` steps, or the end of an episode, are stored soon, however long the others may wait; so is what follows an error"
    pool = DaskPool(tmp_path / "lake")
    writer = pool.writer({"car": "A"}, steps=3, seconds=1000)
    def soon(n):
        until = time.monotonic() + 30
        while writer.acknowledged < n and time.monotonic() < until: time.sleep(0.01)
        assert (writer.acknowledged, writer.pending) == (n, 0)
    for i in range(3): writer.append(**step(i), timestamp=at(i))
    soon(3)
    writer.append(**step(3), timestamp=at(3), terminated=True)
    soon(4)
    outage = Outage(pool, SchemaError("never"), 1)
    writer.append(**step(4), timestamp=at(4), terminated=True)
    while outage.left: time.sleep(0.01)
    writer.flush()
    writer.append(**step(5), timestamp=at(5), terminated=True)
    soon(6)


def test_nobody_holds_it(tmp_path):
    "A writer that is let go of, or whose pool is closed, stores what is left"
    for end in ("del", "pool"):  # the second is looked at further
        pool = DaskPool(tmp_path / end)
        writer = pool.writer({"car": "A"})
        writer.append(**step(0), timestamp=at(0))
        if end == "pool": pool.close()
        else: del writer; gc.collect()
        assert sum(map(len, DaskPool(tmp_path / end))) == 1
    pool.load()
    writer.append(**step(1), timestamp=at(1))
    writer.close()
    assert sum(map(len, pool)) == 1 + (end == "pool")
    with pytest.raises(ClosedError, match="writer is closed"): writer.append(**step(2), timestamp=at(2))


def test_at_the_end_of_a_process(tmp_path):
    "A process that ends as it should loses nothing"
    code = f"import numpy as np; from data_io_nbdev import DaskPool\nw = DaskPool({str(tmp_path / 'lake')!r}).writer({{'car': 'A'}})\nfor i in range(5): w.append([i], [0], 1, [i + 1])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and sum(map(len, DaskPool(tmp_path / "lake"))) == 5


def test_a_fork(tmp_path):
    "A child neither appends to its parent's writer nor stores what waits in it"
    pool = MemoryPool()
    writer = pool.writer({"car": "A"})
    writer.append(**step(0), timestamp=at(0))
    if not (pid := os.fork()):
        code = 1
        try: writer.append(**step(1), timestamp=at(1))
        except ClosedError: code = 0 if not len(pool) else 2
        finally: os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    writer.append(**step(1), timestamp=at(1))
    writer.close()
    assert [len(e) for e in pool] == [2]


def test_a_fork_of_a_buffer():
    "A child draws what its parent's buffer had; what waits in a writer of its parent's is not for it to store"
    buffer = MemoryBuffer(batch_size=4, seed=0)
    writer = buffer.writer({"car": "A"})
    writer.append(**step(0), timestamp=at(0))
    buffer.sample()
    writer.append(**step(1), timestamp=at(1))
    if not (pid := os.fork()):
        code = 1
        try: code = 0 if len(buffer) == 1 and len(buffer.sample().state) == 4 else 2
        finally: os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert len(buffer) == 2


def test_interrupts(attack):
    "Ctrl-C at any line of `append`: the step was taken or not, as the count says, and the pool is right in the end"
    def once(rng):
        size, stops = int(rng.integers(1, 6)), set(rng.integers(0, 15, 3).tolist())
        pool = MemoryPool()
        writer, ends = pool.writer({"car": "A"}, steps=size), rng.integers(0, 5, 15) == 0
        i = 0
        while i < 15:
            call = lambda: writer.append(**step(i), timestamp=at(i), terminated=bool(ends[i]))
            hurt = Lines(int(rng.integers(1, 120))).run(call) if i in stops else call()
            stops.discard(i)
            assert writer.acknowledged + writer.pending in ((i, i + 1) if hurt else (i + 1,))
            i = writer.acknowledged + writer.pending
        writer.close()
        episodes = [[]]
        for i, end in enumerate(ends):
            episodes[-1].append((i, bool(end), False))
            if end: episodes.append([])
        assert facts_of(pool) == obvious([({"car": "A"}, [e for e in episodes if e])])
    attack("Ctrl-C in append, writer", 150, once)


def test_several_writers(tmp_path):
    "Writers in threads, on one lake: every step once"
    pool = DaskPool(tmp_path / "lake")
    def work(name):
        with DaskPool(pool.url).writer({"car": name}, steps=20, seconds=0.05) as writer:
            for i in range(150): writer.append(**step(i), timestamp=at(i), terminated=i % 50 == 49)
    threads = [threading.Thread(target=work, args=(name,)) for name in "AB"]
    for t in threads: t.start()
    for t in threads: t.join()
    episodes = [[(i, i % 50 == 49, False) for i in range(50 * k, 50 * k + 50)] for k in range(3)]
    right = {json.dumps(f, default=str) for lane in range(1) for f in obvious([({"car": name}, episodes) for name in "A"])}
    assert len(pool) == 6 and pool.verify() == [] and {json.dumps(f, default=str) for f in facts_of(pool)} >= right


# --- buffers ---

def test_an_own_pool_is_drawn_from_at_once():
    buffer = MemoryBuffer(batch_size=4, seed=0)
    writer = buffer.writer({"car": "A"})
    for i in range(30):
        writer.append(**step(i), timestamp=at(i))
        assert len(buffer) == i + 1 and i in buffer.sample(400).state[:, 0]
    assert facts_of(buffer.pool) == obvious([({"car": "A"}, [[(i, False, False) for i in range(30)]])])


@pytest.mark.parametrize("own", [True, False])
def test_writers_that_go(own):
    "The steps of a writer that is gone are drawn, and so are those of the next one, also where they are as many"
    buffer, there = MemoryBuffer(batch_size=4, **({} if own else {"pool": MemoryPool()})), 0
    len(buffer)
    for name in "ABCD":
        writer = buffer.writer({"car": name}, steps=2)
        for i in range(4): writer.append(**step(i), timestamp=at(i))
        assert len(buffer) == (there := there + 4)
        writer.append(**step(4), timestamp=at(4))
        writer.close()
        del writer
        gc.collect()
        if name in "BD": assert len(buffer) == there + 1
        there += 1
    buffer.writer({"car": "E"}).append(**step(0), timestamp=at(0))   # gone before anybody looks
    gc.collect()
    assert len(buffer) == there + 1 and not buffer._desks


def test_another_pool_is_drawn_from_once_steps_are_acknowledged(tmp_path):
    pool = DaskPool(tmp_path / "lake")
    with pool.writer({"car": "A"}) as writer: writer.append(**step(0), timestamp=at(0))
    buffer = DaskBuffer(pool=pool, batch_size=4, seed=0, progress=False)
    buffer.load()
    writer = buffer.writer({"car": "B"}, seconds=100)
    writer.append(**step(1), timestamp=at(1))
    assert len(buffer) == 1
    writer.flush()
    assert set(buffer.sample(100).state[:, 0]) == {0, 1}


# --- kill -9 ---

KILLED = """
import base64, json, os, pickle, sys, time
from test_writer import T0, at, step
import pandas as pd
for line in sys.stdin:
    told, acks, delay = json.loads(line)
    if not (pid := os.fork()):
        try:
            pool = pickle.loads(base64.b64decode(told))
            writer = pool.writer({"car": "A"}, steps=7, seconds=0.02, start=T0)
            first = 0 if writer.last is None else round((writer.last - T0) / pd.Timedelta("10ms")) + 1
            with open(acks, "w") as f:
                for i in range(first, 400):
                    writer.append(**step(i), timestamp=at(i), terminated=i == 399)
                    f.seek(0); f.write(f"{first + writer.acknowledged:4}"); f.flush()
                    time.sleep(0.0005)
                writer.close()
                f.seek(0); f.write(" 400"); f.flush()
        except BaseException as e: print(repr(e), file=sys.stderr, flush=True)
        finally: os._exit(0)
    time.sleep(delay)
    os.kill(pid, 9); os.waitpid(pid, 0); print("killed", flush=True)
"""


@pytest.mark.parametrize("kind", ["delta", "mongodb"])
def test_kills(tmp_path, kind, attack):
    "`kill -9` at any moment: what was acknowledged is there, the episode goes on behind it, and in the end it is the one that was driven"
    harness = HARNESSES[kind](tmp_path)
    harness.open().version
    helper = subprocess.Popen([sys.executable, "-c", KILLED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])})
    right, found = facts_of_steps(400), 0
    try:
        def once(rng):
            nonlocal found
            acks = tmp_path / "acks"
            acks.write_text("   0")
            pool = harness.open()
            print(json.dumps([base64.b64encode(pickle.dumps(pool)).decode(), str(acks), float(rng.uniform(0.02, 0.6))]), file=helper.stdin, flush=True)
            assert helper.stdout.readline() == "killed\n"
            there = sum(map(len, harness.open()))
            assert there >= max(found, int(acks.read_text() or 0)), "acknowledged, and not there"
            found = there
            if there: assert facts_of(harness.open()) == facts_of_steps(there)
            if there == 400:  # begin anew
                pool.delete(everything=True)
                found = 0
        attack(f"kill -9 of a writer, {kind}", 14, once)
    finally:
        helper.stdin.close(); helper.wait(30); helper.stdout.close()


def facts_of_steps(n): return obvious([({"car": "A"}, [[(i, i == 399, False) for i in range(n)]])])
