"""State files: what is written comes back, bit for bit, and a file that was damaged is refused; a save happens or does not.

`tests/data/prioritized-text.json` was written once, by the version in which arrays in states were text: `learner().state_dict()`, and what `learn` gave
next. It is never written again: such states must load for ever."""
import copy
import io
import json
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_io_nbdev import MemoryBuffer, MemoryPool, NStep, Prioritized, Sampler, Windows, open_pool
from data_io_nbdev.errors import CorruptData, PoolNotFound, PoolUnavailable, QueryError, SnapshotNotFound
from data_io_nbdev.storage.buffer.sampler import Draw
from data_io_nbdev.storage.buffer.state import read_state, same_state, take_apart, write_state
from data_io_nbdev.testing import draws, drive

OLD = Path(__file__).parent / "data" / "prioritized-text.json"


@pytest.fixture
def path(tmp_path): return tmp_path / "learner.state"


def others(path): return sorted(p.name for p in path.parent.iterdir() if p != path)


def pool_of_drives():
    pool = MemoryPool()
    for h in range(4): pool.store(drive(5, hour=h))
    return pool


def learner(sampler=None, capacity=None):
    "A buffer in the middle of learning"
    buffer = MemoryBuffer(pool=pool_of_drives(), batch_size=8, seed=3, capacity=capacity, sampler=sampler or Prioritized())
    learn(buffer, 5)
    return buffer


def learn(buffer, batches=3):
    "What a learner gets that tells priorities"
    seen = []
    for _ in range(batches):
        batch = buffer.sample()
        seen.append((batch.anchor.tolist(), batch.weight.tolist(), batch.reward.tolist()))
        buffer.update_priorities(batch.anchor, batch.anchor % 7 / 3)
    return seen


# --- what comes back ---

ARRAYS = hnp.arrays(
    st.sampled_from(["bool", "int8", ">i4", "uint64", "float16", "float32", ">f8", "float64", "longdouble", "complex64"]).map(np.dtype),
    hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
NUMBERS = st.integers(-2**200, 2**200) | st.floats() | st.booleans() | st.none()
STATES = st.dictionaries(st.text(), st.recursive(NUMBERS | st.text() | ARRAYS | ARRAYS.map(np.asfortranarray), lambda inner: (
    st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4) | st.tuples(inner, inner)), max_leaves=12), max_size=5)


def as_lists(value):
    "A state with lists for tuples; NaN, which equals nothing, as text"
    if isinstance(value, dict): return {key: as_lists(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)): return [as_lists(v) for v in value]
    return "NaN" if isinstance(value, float) and value != value else value


@settings(max_examples=50, deadline=None)
@given(STATES, STATES)
def test_round_trips(tmp_path_factory, state, other):
    "Any JSON values and arrays of numbers come back with their types and bits, and in their order"
    path = tmp_path_factory.getbasetemp() / "any.state"
    write_state(path, state)
    found = read_state(path)
    assert same_state(as_lists(found), as_lists(state)) and [*found] == [*state]
    assert repr(take_apart(found).plain) == repr(take_apart(state).plain)  # 1 is not True, nor 1.0
    assert all(a.flags.writeable and a.flags.owndata or a.base.flags.owndata for _, a in take_apart(found).arrays)
    assert same_state(as_lists(state), as_lists(other)) == (repr_of(state) == repr_of(other))


def repr_of(state):
    "All that `same_state` looks at, as text; True equals 1, and 1.0"
    def plain(value):
        if isinstance(value, np.ndarray): return f"array {value.dtype.str} {value.shape} {value.tobytes()!r}"
        if isinstance(value, dict): return {key: plain(value[key]) for key in sorted(value)}
        if isinstance(value, (list, tuple)): return [plain(v) for v in value]
        if isinstance(value, (bool, int, float)) and value == value and abs(value) != float("inf") and value == int(value): return int(value)
        return value
    return repr(plain(state))


def holds_itself():
    state = {}
    state["me"] = state
    return state


@pytest.mark.parametrize("wrong", [
    None, [], np.zeros(2), {"a": np.array([None])}, {"a": np.array(["text"])}, {"a": np.zeros(2, [("x", "f8")])}, {"a": np.array(["2026"], "M8[D]")},
    {"a": np.ma.masked_array([1, 2], [True, False])}, {"a": np.float32(1)}, {"a": {1, 2}}, {"a": b"bytes"}, {"a": [0, {3: 4}]}, {"a": 10**6000}, {"a": object()},
    {"a": print}, holds_itself()], ids=lambda w: type(w).__name__)
def test_what_is_no_state(path, wrong):
    "Anything else is refused, and what was there is there still"
    write_state(path, {"kind": "right"})
    with pytest.raises(QueryError): write_state(path, wrong)
    assert read_state(path) == {"kind": "right"} and others(path) == []


# --- damage ---

def test_flipped_bits(path):
    "A file with one byte changed, in every region of it, is refused, or the state is what it was; never another"
    buffer = learner()
    state = buffer.state_dict()
    write_state(path, state)
    data, rng, seen = path.read_bytes(), random.Random(0), []
    right = read_state(path)
    with zipfile.ZipFile(path) as file: content = [(m.header_offset, m.filename, m.file_size) for m in file.infolist()]
    assert len(content) == 4 and len(data) < 6000
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1:])
        try: seen.append(same_state(read_state(path), right))
        except CorruptData: seen.append(None)
    assert False not in seen and seen.count(None) > 0.85 * len(data)
    for begin, name, size in content:  # a member's bytes follow its head of 30 bytes, its name, and perhaps 20 more
        assert all(s is None for s in seen[begin + 50 + len(name):begin + 30 + len(name) + size]), name


def test_cut_and_appended(path):
    "A file that is cut anywhere, or half of zeros, is refused, and a buffer that tried to load it is as it was; rubbish behind it changes nothing"
    buffer = learner()
    buffer.save_state(path)
    data, right = path.read_bytes(), buffer.state_dict()
    for other in [*(data[:n] for n in random.Random(0).sample(range(1, len(data)), 60)), b"", bytes(len(data)), data[:1000] + bytes(len(data) - 1000), bytes(1000) + data[1000:]]:
        path.write_bytes(other)
        with pytest.raises(CorruptData): buffer.load_state(path)
        assert same_state(buffer.state_dict(), right)
    for behind in (b"x", bytes(100), data[:99], data):
        path.write_bytes(data + behind)
        try: assert same_state(read_state(path), right)
        except CorruptData: pass


class Evil:
    def __reduce__(self): return os.mkdir, ("owned",)


def pickled():
    f = io.BytesIO()
    np.save(f, np.array([Evil()], object), allow_pickle=True)
    return f.getvalue()


@pytest.mark.parametrize("change", [
    lambda m: m.pop("state.json"), lambda m: m.pop("array0.npy"), lambda m: m.update({"array9.npy": m["array0.npy"]}), lambda m: m.update({"array0.npy": m["array1.npy"]}),
    lambda m: m.update({"array0.npy": m["array0.npy"][:-8]}), lambda m: m.update({"array0.npy": pickled()}), lambda m: m.update({"state.json": b"{}"}),
    lambda m: m.update({"state.json": b"["}), lambda m: m.update({"state.json": b"[" * 10**5}), lambda m: m.update({"state.json": b"7"}),
    lambda m: m.update({"state.json": m["state.json"].replace(b'"<f8"', b'"|O"')}), lambda m: m.update({"state.json": m["state.json"].replace(b'"shape": [20]', b'"shape": [1000000000000]')}),
    lambda m: m.update({"state.json": m["state.json"].replace(b'"path": ["sampler", ', b'"path": ["nowhere", ')}),
    lambda m: m.update({"state.json": m["state.json"].replace(b'"format": 1', b'"format": 2', 1)})])
def test_members(path, change, monkeypatch):
    "So is one with other members, though all checksums of the zip are right; nothing is unpickled, and a newer format is named"
    monkeypatch.chdir(path.parent)
    learner().save_state(path)
    with zipfile.ZipFile(path) as old: members = {n: old.read(n) for n in old.namelist()}
    before = dict(members)
    change(members)
    assert members != before
    with zipfile.ZipFile(path, "w") as new:
        for name, text in members.items(): new.writestr(name, text)
    with pytest.raises(CorruptData, match="format 2" if b'"format": 2,' in members.get("state.json", b"")[:20] else None): read_state(path)
    assert others(path) == []


def test_packed(path):
    "A small file that would unpack to a large one is refused before it does"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb: bomb.writestr("state.json", b'{"format": 1, "arrays": [], "state": {}}' + b" " * 10**7)
    with pytest.raises(CorruptData, match="packed"): read_state(path)


@pytest.mark.parametrize("make", [lambda p: p.write_text("a,b\n1,2\n"), lambda p: np.savez(p.open("wb"), state=np.zeros(3)), lambda p: learner().pool.save(p),
                                  lambda p: p.mkdir(), lambda p: os.mkfifo(p)], ids=["text", "arrays", "pool", "folder", "pipe"])
def test_other_files(path, make):
    "What is no state is refused, and not replaced either; nor does anything wait for a pipe"
    make(path)
    look = lambda: path.read_bytes() if path.is_file() else path.stat().st_ino
    before = look()
    with pytest.raises((CorruptData, PoolUnavailable)): read_state(path)
    with pytest.raises(PoolUnavailable): write_state(path, {})
    assert look() == before and others(path) == []


# --- a save happens or does not ---

@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_step(path, monkeypatch, step):
    "A save that fails leaves the old file and no other, says so, and can be repeated"
    write_state(path, {"n": np.zeros(3)})
    before = path.read_bytes()
    def fail(*args, **kwargs): raise OSError(28, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(os, step, fail)
        with pytest.raises(PoolUnavailable, match="No space left"): write_state(path, {"n": np.ones(3)})
    assert path.read_bytes() == before and others(path) == []
    write_state(path, {"n": np.ones(3)})
    assert read_state(path)["n"].tolist() == [1, 1, 1]


def test_order_of_steps(path, monkeypatch):
    "The new file is on the disk before it takes the old one's name, and its name before `write_state` returns"
    calls = []
    def spy(name):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, **kwargs: (calls.append(name), real(*args, **kwargs))[1])
    spy("fsync"); spy("replace")
    write_state(path, {})
    assert calls == ["fsync", "replace", "fsync"]


def test_kill(path):
    "`kill -9` at any moment leaves the old state or the new one, never less than was acknowledged"
    context, rng, known = multiprocessing.get_context("fork"), random.Random(0), 0
    write_state(path, {"n": 0, "worth": np.full(50_000, 0.0)})
    for _ in range(12):
        acknowledged = context.Value("q", known)
        def work():
            for n in range(known, 10**9):
                write_state(path, {"n": n, "worth": np.full(50_000, float(n))})
                acknowledged.value = n
        child = context.Process(target=work)
        child.start()
        least = known + 1 + rng.randrange(3)
        while acknowledged.value < least:
            assert child.is_alive(), "the child ended by itself"
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        os.kill(child.pid, signal.SIGKILL); child.join()
        state = read_state(path)
        assert acknowledged.value <= state["n"] <= acknowledged.value + 1 and (state["worth"] == state["n"]).all()
        known = state["n"]
    for name in others(path): os.utime(path.with_name(name), (0, 0))
    write_state(path, {})
    assert not any(path.with_name(name).stat().st_size for name in others(path))  # what killed ones left is gone, unless it is empty


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a zip that was begun says goodbye to a closed file
def test_interrupt(path):
    "Ctrl-C in any line of a save leaves the old state or the new one, and no other file"
    write_state(path, {"n": 0})
    outcomes = set()
    for line in range(1, 10**6):
        left, before = [line], read_state(path)["n"]
        def trace(frame, event, arg):
            if "data_io_nbdev/storage" not in frame.f_code.co_filename: return None
            if event == "line":
                left[0] -= 1
                if left[0] == 0: raise KeyboardInterrupt
            return trace
        old = sys.gettrace()
        sys.settrace(trace)
        try: write_state(path, {"n": line, "worth": np.ones(9)})
        except KeyboardInterrupt: pass
        finally: sys.settrace(old)
        assert (found := read_state(path)["n"]) in (before, line) and others(path) == []
        outcomes.add(found == line)
        if left[0] > 0: break
    assert line > 40 and outcomes == {True, False}


def test_where(path, monkeypatch):
    "A relative path, a link, an empty file; a folder that is not there, a name that is none; the mode stays"
    monkeypatch.chdir(path.parent)
    path.touch(mode=0o600)
    os.symlink(path, "link")
    write_state("link", {"n": 1})
    assert os.path.islink("link") and read_state(str(path)) == {"n": 1} and path.stat().st_mode & 0o777 == 0o600
    for missing in ("nowhere", "nowhere/learner.state", "link/learner.state"):
        with pytest.raises(PoolNotFound): read_state(missing)
    for wrong in ("nowhere/learner.state", "link/learner.state", "x" * 300, "a\0b"):
        with pytest.raises(PoolUnavailable): write_state(wrong, {"n": 2})
    for wrong in (None, 7, "mongodb://host/x"):
        for call in (lambda: read_state(wrong), lambda: write_state(wrong, {})):
            with pytest.raises(QueryError): call()
    assert read_state(path) == {"n": 1}


# --- samplers with arrays ---

@pytest.mark.parametrize("make", [Prioritized, lambda: Prioritized(over=Windows(2, edge="strict")), lambda: NStep(3, 0.9, over=Prioritized())])
@pytest.mark.parametrize("capacity", [None, 13])
def test_goes_on(path, make, capacity):
    "From a file, a fresh buffer, a pickle or a copy goes on bit for bit, also where news is not taken in, and a ring has turned"
    buffer = learner(make(), capacity)
    for turn in range(3):
        buffer.save_state(path)
        state = buffer.state_dict()
        others = [MemoryBuffer(pool=buffer.pool, batch_size=8, sampler=make(), capacity=capacity) for _ in range(2)]
        others[0].load_state(path); others[1].load_state_dict(copy.deepcopy(state))
        others.append(pickle.loads(pickle.dumps(buffer)))
        assert all(same_state(other.state_dict(), state) for other in others)
        right = learn(buffer)
        assert not same_state(buffer.state_dict(), state) and all(learn(other) == right for other in others)
        buffer.pool.store(drive(6, hour=10 + turn))
        for other in (buffer, *others): other.refresh()
        right = learn(buffer)
        assert all(learn(other) == right for other in others)


def test_versions_that_are_gone(path, tmp_path):
    "A state of versions that vacuum gave up, or of the original of a copy, is refused; a buffer without it goes on, as the message says"
    pytest.importorskip("deltalake")
    def buffer(pool): return MemoryBuffer(pool=pool, batch_size=4, seed=1)
    with open_pool(tmp_path / "lake") as lake, open_pool(tmp_path / "copy") as copied, open_pool(tmp_path / "other") as other:
        for hour in range(3): lake.store(drive(5, hour=hour))
        learner = buffer(lake)
        learner.sample()
        learner.save_state(path)
        lake.copy_to(copied)
        for hour in range(3): other.store(drive(6, hour=hour))
        lake.delete(drive(5, hour=0).id)
        lake.vacuum("0s", dry_run=False)
        for pool, why, episodes in ((lake, "those before 4 were given up", 2), (copied, "is of another pool, or of the one that this is a copy of", 3), (other, "has 15 rows", 3)):
            anew = buffer(pool)
            with pytest.raises(SnapshotNotFound, match=rf"(?s){why}.*keep the learner's weights, and load a new buffer"): anew.load_state(path)
            assert len(anew) == sum(map(len, pool)) and len(pool) == episodes and len(anew.sample().index) == 4


def test_states_are_copies():
    "A state shares no memory with the sampler, neither when it is told nor when it is loaded"
    buffer = learner()
    state, right = buffer.state_dict(), copy.deepcopy(buffer.state_dict())
    def spoil():
        for _, a in take_apart(state).arrays: a[...] = 3
    spoil()
    assert same_state(buffer.state_dict(), right)
    state = copy.deepcopy(right)
    buffer.load_state_dict(state)
    spoil()
    assert same_state(buffer.state_dict(), right)


@pytest.mark.parametrize("wrong", [np.zeros((20, 1)), np.zeros(20, "float32"), np.full(20, np.nan), np.full(20, -1.0), np.zeros(19), np.zeros(20, object), [0.0] * 20, None],
                         ids=str)
def test_arrays_of_others(wrong):
    "Priorities that are none, or too few, of another dtype or shape, are refused, and change nothing"
    buffer = learner()
    right = buffer.state_dict()
    with pytest.raises(QueryError): buffer.load_state_dict({**right, "sampler": {**right["sampler"], "chances": wrong}})
    assert same_state(buffer.state_dict(), right)


def test_plain_json():
    "A state without arrays is JSON as ever; one with arrays is not, and says so"
    buffer = MemoryBuffer(batch_size=1)
    buffer.store(drive(3))
    assert json.loads(json.dumps(buffer.state_dict())) == buffer.state_dict()
    with pytest.raises(TypeError): json.dumps(learner().state_dict())


def test_old_states():
    "States whose arrays are text go on as they went on when they were saved"
    told = json.loads(OLD.read_text(encoding="utf-8"))
    buffer = MemoryBuffer(pool=pool_of_drives(), batch_size=8, sampler=Prioritized())
    buffer.load_state_dict(told["state"])
    assert isinstance(told["state"]["sampler"]["chances"], str) and len(told["state"]["sampler"]["given"]) == 1
    assert json.loads(json.dumps(learn(buffer))) == told["next"]


class Learned(Sampler):
    "Draws in two steps, and remembers counts in an array"
    def __init__(self): self.counts, self.fails = np.zeros(4, "int64"), False

    def draw(self, n, rng, rows):
        rng.random()
        self.counts = self.counts + 1
        if self.fails: raise RuntimeError("in the middle")
        return Draw((rng.integers(len(rows), size=n) + self.counts[0]) % len(rows))

    def state_dict(self): return {"counts": self.counts}
    def load_state_dict(self, state): self.counts = state["counts"]


def test_a_sampler_of_your_own(path):
    "Arrays in a state of one's own go back after a draw that broke off, into a file, and into a moment that compares"
    buffer = MemoryBuffer(pool=pool_of_drives(), batch_size=4, seed=1, sampler=Learned())
    buffer.sample()
    buffer.save_state(path)
    before = copy.deepcopy(buffer.state_dict())
    buffer.sampler.fails = True
    with pytest.raises(RuntimeError): buffer.sample()
    buffer.sampler.fails = False
    assert same_state(buffer.state_dict(), before) and same_state(buffer.sampler.moment(), {"counts": np.ones(4, "int64")})
    again = MemoryBuffer(pool=buffer.pool, batch_size=4, sampler=Learned())
    again.load_state(path)
    assert draws(again) == draws(buffer)


def test_beside_a_learner(path):
    "While another thread learns, each state that is saved is one of some moment: it goes on as that learner did from there"
    buffer, done, saved = learner(), threading.Event(), []
    def save():
        while not done.is_set():
            buffer.save_state(path)
            saved.append(read_state(path))
    thread = threading.Thread(target=save)
    thread.start()
    for _ in range(100):
        batch = buffer.sample()
        buffer.update_priorities(batch.anchor, batch.anchor % 7 / 3)
    done.set(); thread.join()
    for state in saved[:: max(1, len(saved) // 5)]:
        other = MemoryBuffer(pool=buffer.pool, batch_size=8, sampler=Prioritized())
        other.load_state_dict(state)
        assert same_state(other.state_dict(), state) and len(learn(other)) == 3

