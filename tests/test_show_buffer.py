"Buffers and batches show themselves: escaped, in bounded size and time, without loading, opening or waiting for anything."
import copy
import pickle
import re
import threading
import time
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from data_io_nbdev import Batch, Buffer, Episode, MemoryBuffer, MemoryPool, PoolQuery
from data_io_nbdev.data.core import from_us
from data_io_nbdev.storage.buffer.buffer import make_batch
from data_io_nbdev.storage.buffer.rows import Rows, Run
from data_io_nbdev.storage.buffer.sampler import Draw, Episodes, Sampler, Uniform
from data_io_nbdev.testing import drive

EVIL = "<script>alert('&')</script>"
OFFERED = {"learn", "anchor", "state", "action", "reward", "nstate", "terminated", "truncated", "mask", "weight", "episode", "step", "timestamp", "index",
           "fields", "frames"}
USERS = {"pool", "batch_size", "query", "select", "sampler", "seed", "capacity", "states", "load", "close", "store", "writer", "find", "save", "sample", "batches", "refresh",
         "state_dict", "load_state_dict", "save_state", "load_state", "nbytes", "update_priorities"}


def episode(steps=300, width=2, name="speed", who=None, **more):
    state = np.arange((steps + 1.0) * width, dtype="float32").reshape(-1, width)
    return Episode.from_arrays(state={name: state[:-1]}, nstate={name: state[1:]}, action=state[:-1, 0], reward=np.ones(steps, "float32"),
                               timestamp=from_us(np.arange(steps) * 1_500_000), who=who or {"driver": "anna"}, **more)


def buffer_of(*episodes, **options):
    pool = MemoryPool()
    for e in episodes: pool.store(e)
    return MemoryBuffer(**{"pool": pool, "batch_size": 256, "seed": 7, **options})


def is_free(lock):
    "Whether another thread could take a lock now"
    got = []
    def look():
        if lock.acquire(timeout=0): got.append(1); lock.release()
    thread = threading.Thread(target=look)
    thread.start(); thread.join()
    return bool(got)


def soon(do, seconds=20):
    "What a thread gives, which must not wait for anything"
    found = []
    thread = threading.Thread(target=lambda: found.append(do()), daemon=True)
    thread.start(); thread.join(seconds)
    assert found, "showing waits for something"
    return found[0]


def both(thing): return repr(thing), thing._repr_html_()


# --- batches ---

def test_a_batch_takes_one_line():
    batch = buffer_of(episode()).sample()
    assert repr(batch) == ("Batch(state (256, 2) float32, action (256, 1) float32, reward (256,) float32, nstate (256, 2) float32)")
    assert str(batch) == repr(batch) and f"{batch}" == repr(batch)


@pytest.mark.parametrize("sampler", [Uniform(), Episodes()])
def test_a_batch_stays_a_tuple(sampler):
    buffer = buffer_of(episode(5), episode(3, who={"driver": "bo"}), batch_size=6, sampler=sampler)
    batch = buffer.sample()
    state, action, reward, nstate = batch
    assert isinstance(batch, tuple) and len(batch) == 4 and batch[0] is state and type(batch[:2]) is tuple
    np.testing.assert_equal(batch, (state, action, reward, nstate))
    np.testing.assert_array_equal(batch.nstate, nstate)
    for again in (pickle.loads(pickle.dumps(batch)), copy.copy(batch), copy.deepcopy(batch)):
        assert type(again) is Batch and both(again) == both(batch) and dir(again) == dir(batch)
        np.testing.assert_equal(tuple(again), tuple(batch))


@pytest.mark.parametrize("traced", [False, True])
def test_the_first_rows_say_who_and_when(traced):
    buffer = buffer_of(episode(20), batch_size=9)
    batch = buffer.sample()
    if traced: batch.episode, batch.mask, batch.weight
    html = batch._repr_html_()
    for row in range(5):
        when = str(pd.Timestamp(batch.timestamp[row]))
        cells = [batch.episode[row][:8], str(batch.step[row]), when, *(f"{x:.4g}" for x in (*batch.state[row], *batch.action[row], batch.reward[row]))]
        assert re.search("".join(f"<td[^>]*>{re.escape(cell)}</td>" for cell in cells), html)
    assert batch.episode[0] not in html, "an id is shown short"
    assert "Batch of 9 steps" in html and "5 of 9 steps, 4 of 4 columns" in html
    for role, block in zip(("state", "action", "reward", "nstate"), batch): assert str(block.shape) in html and str(block.dtype) in html, role
    assert "speed[1]" in html and "terminated" in html


def test_showing_a_batch_looks_up_a_few_rows_only():
    batch = buffer_of(episode(20)).sample(1000)
    both(batch)
    assert "episode" not in vars(batch) and "timestamp" not in vars(batch)


def test_padding_is_not_shown():
    html = buffer_of(episode(2), episode(9, who={"driver": "bo"}), sampler=Episodes(), batch_size=4).sample()._repr_html_()
    assert "4 sequences" in html and "mask" in html and "NaT" not in html and "-1" not in html


def test_a_wide_batch_stays_small():
    many = {f"beam {i}": np.zeros(4, "float32") for i in range(3000)}
    wide = Episode.from_arrays(state=many, action=np.zeros(4, "float32"), reward=np.zeros(4),
                               timestamp=from_us(np.arange(4) * 1000), who={"driver": "anna"}, terminated=np.arange(4) == 3)
    images = Episode.from_arrays(state=np.zeros((4, 64, 64, 3), "uint8"), action=np.zeros(4, "int8"), reward=np.zeros(4),
                                 timestamp=from_us(np.arange(4) * 1000), who={"driver": "anna"}, terminated=np.arange(4) == 3)
    for e, left in ((wide, "8 of 3,002 columns"), (images, "8 of 12,290 columns")):
        batch = buffer_of(e).sample()
        began = time.perf_counter()
        text, html = both(batch)
        assert time.perf_counter() - began < 1 and len(text) < 200 and len(html) < 20_000 and left in html
    assert "… 2,994 more" in buffer_of(wide).sample()._repr_html_()


def test_a_long_batch_is_shown_at_once():
    batch = buffer_of(episode(1000)).sample(500_000)
    both(batch)  # imports
    began = time.perf_counter()
    assert len(batch._repr_html_()) < 20_000
    assert time.perf_counter() - began < 1


def test_what_a_batch_offers():
    batch = buffer_of(episode(5)).sample()
    assert set(dir(batch)) == OFFERED | {"schema"}
    for name in dir(batch): assert getattr(batch, name) is not None
    with pytest.raises(AttributeError, match="no 'info'"): batch.info
    with pytest.raises(AttributeError, match="no 'colour'"): batch.colour


def test_names_in_a_batch_are_text():
    text, html = both(buffer_of(episode(3, name=EVIL)).sample())
    assert "<script" not in html and "&lt;script" in html


# --- buffers ---

class Watched(MemoryPool):
    "Notes whatever is asked of it"
    asked = ()
    def _head(self): self.asked += ("head",); return super()._head()
    def _read(self, parts): self.asked += ("read",); return super()._read(parts)
    def _changes(self, *args): self.asked += ("changes",); return super()._changes(*args)
    def _wake(self): self.asked += ("wake",); return super()._wake()


def test_showing_loads_nothing_and_opens_nothing():
    pool = Watched()
    pool.store(episode())
    buffer = MemoryBuffer(pool=pool, batch_size=4)
    pool.asked = ()
    text, html = both(buffer)
    assert pool.asked == () and not buffer._view.versions and "not loaded" in text and "not loaded" in html
    assert len(buffer) == 300 and "300 rows" in repr(buffer) and "300 rows" in buffer._repr_html_()
    pool.close()
    pool.asked = ()
    assert "closed" in repr(buffer) and buffer._repr_html_() and pool.asked == ()


@pytest.mark.parametrize("own", [True, False])
def test_showing_takes_no_lock(own):
    buffer = buffer_of(episode(), **({"pool": None} if own else {}))
    if own: buffer.store(episode())
    buffer.sample()
    with buffer._moving, buffer._lock, buffer.pool._lock:
        assert not is_free(buffer._moving) and not is_free(buffer._lock)
        text, html = soon(lambda: both(buffer))
        assert dir(buffer) == soon(lambda: dir(buffer))
    assert "300 rows" in text and "300 rows" in html


@pytest.mark.parametrize("options", [{}, {"capacity": 20}, {"states": "once"}, {"states": "once", "capacity": 20}])
def test_shown_while_it_changes(options):
    "Other threads store, hide and load; what is shown is of one moment"
    buffer, stop, seen = MemoryBuffer(batch_size=4, **options), threading.Event(), []
    def act():
        try:
            for i in range(60):
                buffer.store(drive(3 + i % 5, hour=i))
                if not i % 7 and not options.get("capacity"): buffer.pool.delete([next(iter(buffer.pool)).id]); buffer.refresh()
                if not i % 20: buffer.load()
        finally: stop.set()
    thread = threading.Thread(target=act)
    thread.start()
    while not stop.is_set(): seen.append(both(buffer)[0])
    thread.join()
    assert seen and all(int(re.search(r"\((?:([\d,]+) rows|no rows)", text)[1] or 0) >= 0 for text in seen)
    if "capacity" in options: assert all(int(m[1]) <= 20 for text in seen if (m := re.search(r"\((\d+) rows", text)))


def test_what_a_buffer_says():
    ring = MemoryBuffer(batch_size=32, capacity=25, states="once")
    for hour in range(5): ring.store(drive(10, hour=hour))
    assert re.fullmatch(r"MemoryBuffer\(25 rows, [\d.]+ kB, each state once, ring of the last 25 steps, batches of 32 by Uniform\(\), "
                        r"pool of its own, versions 0 to 5\)", repr(ring))
    shared = buffer_of(drive(), drive(hour=1, driver="bo"), query=PoolQuery(driver="anna"), sampler=Episodes())
    shared.load()
    assert repr(shared).startswith("MemoryBuffer(6 rows, ") and "each state twice" in repr(shared) and "by Episodes()" in repr(shared)
    assert "where " in repr(shared) and "anna" in repr(shared) and f"MemoryPool({shared.pool.url!r})" in repr(shared) and "version 2" in repr(shared)
    html = shared._repr_html_()
    for said in ("6 rows", "each state twice", "batches of 256 by Episodes()", "memory://", "anna", "version 2"): assert said in html


def test_closed_buffers_and_half_made_ones():
    buffer = buffer_of(drive())
    buffer.load(); buffer.close()
    assert repr(buffer).startswith("MemoryBuffer(closed, ") and "closed" in buffer._repr_html_() and buffer.pool.closed
    bare = object.__new__(MemoryBuffer)
    assert all(both(bare)) and isinstance(dir(bare), list)
    class Own(Buffer):
        def load(self): pass
        def close(self): pass
        def sample(self): pass
        def __post_init__(self): pass
    assert all(both(Own(pool=None, batch_size=1)))


class Elsewhere:
    "A pool of somebody else's making"
    url, closed = "mongodb://anna:geheim@db.example.org/fleet.experience?tls=true", False
    def close(self): pass


def test_no_password_is_shown():
    text, html = both(MemoryBuffer(pool=Elsewhere(), batch_size=1))
    assert "geheim" not in text + html and "Elsewhere('mongodb://anna:***@db.example.org/" in text and "anna:***@db.example.org" in html


class Odd(Sampler):
    def draw(self, n, rng, rows): return Draw(rng.integers(len(rows), size=n))
    def __repr__(self): return EVIL + "\n" * 50 + "x" * 5000


class Broken(Odd):
    def __repr__(self): raise RuntimeError("cannot be shown")


def test_what_users_wrote_is_text_and_short(tmp_path):
    pool = MemoryPool(tmp_path / "<b>.npz")
    pool.store(episode(3, who={"driver": EVIL}))
    buffer = MemoryBuffer(pool=pool, batch_size=4, query=PoolQuery(driver=[EVIL, *map(str, range(5000))]), sampler=Odd())
    buffer.load()
    text, html = both(buffer)
    assert "<script" not in html and "<b>." not in html and "&lt;script" in html
    assert "\n" not in text and len(text) < 1000 and len(html) < 10_000
    assert "cannot be shown" in "".join(both(MemoryBuffer(batch_size=4, sampler=Broken())))
    buffer.sample()._repr_html_()


def test_many_versions_and_episodes_are_shown_at_once():
    "200,000 episodes, and a look at every second version of many"
    buffer = buffer_of(episode(3))
    buffer.load()
    rows = buffer._view.rows = Rows(episode(3).schema)
    rows._make_room(0, 200_000)
    times = np.zeros(1, "int64")
    for i in range(200_000): rows.register(Run(f"{i:032x}", i, i, 0, times))
    buffer._view.versions = [[i, i] for i in range(1, 400_000, 2)]
    both(buffer)  # imports
    began = time.perf_counter()
    text, html = both(buffer)
    assert time.perf_counter() - began < 0.2 and len(text) < 400 and len(html) < 5000
    assert "200,000 rows" in text and "versions …, " in text and text.endswith("399999)")
    batch = make_batch(rows, Draw(np.arange(100_000)))
    began = time.perf_counter()
    assert len(batch._repr_html_()) < 10_000
    assert time.perf_counter() - began < 0.5


def test_what_a_buffer_offers():
    buffer = buffer_of(drive())
    buffer.sample()
    assert set(dir(buffer)) == USERS
    @dataclass(kw_only=True, eq=False)
    class Mine(MemoryBuffer):
        temperature: float = 1.0
        def cool(self): ...
    assert set(dir(Mine(batch_size=1))) == USERS | {"temperature", "cool"}


def test_subclasses_show_themselves_too():
    @dataclass(kw_only=True, eq=False)
    class Mine(MemoryBuffer):
        temperature: float = 1.0
    class Named:
        def __repr__(self): return "a name"
    class Mixed(Named, MemoryBuffer): ...
    @dataclass(kw_only=True, eq=False)
    class Own(MemoryBuffer):
        def __repr__(self): return "my own"
    class Grandchild(Own): ...
    assert repr(Mine(batch_size=1)).startswith("Mine(no rows, ") and "<b>Mine</b>" in Mine(batch_size=1)._repr_html_()
    assert [repr(kind(batch_size=1)) for kind in (Mixed, Own, Grandchild)] == ["a name", "my own", "my own"]
