"""Every sampler out of a million rows: beside the floor, beside cpprb's priorities, and beside itself with a tenth of the rows. `run.py` shows it."""
from __future__ import annotations

import gc
import importlib.util
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, Queue
from unittest.mock import patch

import numpy as np

from data_io_nbdev import (Balanced, Episode, Episodes, Epoch, Fresh, MemoryBuffer, Mixture, NStep, Once, Prioritized, Recent, Sampler, Stack, Uniform,
                           Windows)
from data_io_nbdev.storage.buffer import sampler as trees
from run import STEPS, episode, medians

ROWS, BATCH, VEHICLES = 1_000_000, 256, 8
ERRORS = np.random.default_rng(0).random(BATCH)
FAST = importlib.util.find_spec("numba") is not None
KINDS: dict[str, tuple[Callable[[], Sampler], int]] = {  # and how many items a batch has
    "uniform": (Uniform, BATCH), "stack of 4": (lambda: Stack(4), BATCH), "n-step 5": (lambda: NStep(5, 0.99), BATCH),
    "windows 32 × 64": (lambda: Windows(64), 32), "8 episodes": (Episodes, 8),
    "balanced": (lambda: Balanced("vehicle"), BATCH), "recent, items": (lambda: Recent(10_000), BATCH), "recent, time": (lambda: Recent("1h"), BATCH),
    "fresh": (lambda: Fresh("version", most=50), BATCH), "epoch": (Epoch, BATCH), "once": (Once, BATCH)}


def nth(i: int) -> Episode:
    "An episode of one of eight vehicles, by the i-th version of a policy"
    e = episode(i, 24, 4)
    return Episode.from_arrays(state=e.state, nstate=e.nstate, action=e.action, reward=e.reward, timestamp=e.timestamp,
                               who={"vehicle": f"VB{i % VEHICLES}"}, info={"version": np.full(STEPS, i)})


def filled(rows: int) -> MemoryBuffer:
    buffer = MemoryBuffer(batch_size=BATCH, seed=0)
    for i in range(rows // STEPS): buffer.store(nth(i))
    return buffer


def drawing(buffer: MemoryBuffer, sampler: Sampler, n: int) -> Callable[[], object]:
    "Draws so many items by a sampler; each keeps what it knows while others draw from the same buffer"
    def draw():
        if buffer.sampler is not sampler: buffer.sampler, buffer.batch_size = sampler, n
        return buffer.sample()
    return draw


def once(buffer: MemoryBuffer) -> Callable[[], object]:
    "The first batch of its only pass, again and again: a pass over fewer rows would end in the middle"
    sampler = Once()
    start, draw = sampler.moment(), drawing(buffer, sampler, BATCH)

    def again():
        sampler.go_back(start)
        return draw()
    return again


def learning(buffer: MemoryBuffer, compiled: bool) -> Callable[[], None]:
    "A batch by priority, and its new priorities"
    draw = drawing(buffer, Prioritized(), BATCH)

    def learn(): buffer.update_priorities(draw().anchor, ERRORS)
    with patch.object(trees, "fast", trees.fast if compiled else lambda loop: None): learn()  # which makes the tree
    return learn


def every(buffer: MemoryBuffer) -> dict[str, Callable[[], object]]:
    "A batch of each sampler"
    found = {name: once(buffer) if make is Once else drawing(buffer, make(), n) for name, (make, n) in KINDS.items()}
    return {**found, **{f"prioritized, {how}": learning(buffer, how == "compiled") for how in ("numpy", "compiled")[:1 + FAST]}}


def peer() -> Callable[[], None]:
    "cpprb: a batch by priority, and its new priorities"
    from cpprb import PrioritizedReplayBuffer
    fields = {"obs": {"shape": 24}, "act": {"shape": 4}, "rew": {}, "next_obs": {"shape": 24}, "done": {}}
    buffer = PrioritizedReplayBuffer(ROWS, fields, alpha=0.6)
    for i in range(ROWS // STEPS):
        e = episode(i, 24, 4)
        buffer.add(obs=e.state, act=e.action, rew=e.reward, next_obs=e.nstate, done=e.terminated)

    def learn(): buffer.update_priorities(buffer.sample(BATCH, beta=0.4)["indexes"], ERRORS)
    return learn


def floors(buffer: MemoryBuffer) -> dict[str, Callable[[], object]]:
    "One `take` out of the buffer's own rows, with its index draw: of rows anywhere, of the first and last of five, and of 32 × 64 side by side"
    packed, rng, steps = buffer._view.rows.data, np.random.default_rng(0), np.arange(64)
    return {"floor": lambda: packed.take(rng.integers(ROWS, size=BATCH)),
            "floor of n-step 5": lambda: packed.take(rng.integers(ROWS - 5, size=BATCH)[:, None] + steps[:5:4]),
            "floor of windows": lambda: packed.take(rng.integers(ROWS - 64, size=32)[:, None] + steps)}


def mixing(one: MemoryBuffer, other: MemoryBuffer) -> dict[str, Callable[[], object]]:
    "Half a batch of each, by hand and by a mixture"
    both = Mixture({one: 0.5, other: 0.5}, batch_size=BATCH)
    for buffer in (one, other): buffer.sampler, buffer.batch_size = Uniform(), BATCH // 2
    return {"two halves": lambda: (one.sample(), other.sample()), "mixture": both.sample}


def array(x=np.random.default_rng(0).random((256, 256), dtype="float32")) -> None:
    "As a learner of numpy, PyTorch or JAX: others may run meanwhile"
    np.matmul(x, x)


def python() -> None:
    "As a learner that lets nobody else run"
    sum(range(1000))


@contextmanager
def queued(buffer: MemoryBuffer) -> Iterator[Callable[[], object]]:
    "What one would write by hand: a thread draws, and a queue of two hands over"
    waiting: Queue = Queue(2)
    ended = threading.Event()

    def draw():
        while not ended.is_set(): waiting.put(buffer.sample())
    thread = threading.Thread(target=draw)
    thread.start()
    try: yield waiting.get
    finally:
        ended.set()
        while thread.is_alive():
            with suppress(Empty): waiting.get(timeout=0.01)


def waits(buffer: MemoryBuffer, work: Callable[[], None], rounds: int) -> dict[str, float]:
    "Microseconds in the median that a learner waits for a batch, which then computes for a millisecond"
    took: dict[str, list[float]] = {"sample": [], "prefetch=0": [], "prefetch=2": [], "a thread and a queue": []}
    for _ in range(rounds):
        for name in took:
            by_hand, number = name.startswith("a thread"), 2 * (name == "prefetch=2")
            with queued(buffer) if by_hand else buffer.batches(prefetch=number) as it:
                ask = it if by_hand else buffer.sample if name == "sample" else it.__next__
                for turn in range(60):
                    began = time.perf_counter()
                    batch = ask()
                    came = time.perf_counter()
                    if turn > 5: took[name].append((came - began) * 1e6)
                    del batch
                    while time.perf_counter() < came + 0.001: work()
    return {name: float(np.median(times)) for name, times in took.items()}


def show_all(show, rounds: int) -> None:
    "In one run: floors, the peer, every sampler, and every sampler again with a tenth of the rows"
    buffer = filled(ROWS)
    for name, work in (("computes with arrays", array), ("computes in Python", python)):
        t = waits(buffer, work, rounds)
        claims = [("microseconds with prefetch=2", t["prefetch=2"], 10), ("prefetch=2 / a thread and a queue", t["prefetch=2"] / t["a thread and a queue"], 0.7)
                  ] if work is array else []  # who lets nobody run waits for whoever wants to
        show(f"What a learner waits that {name} for a millisecond, 256 items out of 1,000,000 rows", t, claims)
    t = medians(mixing(buffer, fewer := filled(ROWS // 10)), 2 * rounds, 100)
    show("A mixture of two", t, [("mixture / its two halves", t["mixture"] / t["two halves"], 1.3)])
    large, small = every(buffer), every(fewer)
    t = medians({**floors(buffer), "cpprb, prioritized": peer(), **large, **{f"{name}, 100,000": draw for name, draw in small.items()}}, 2 * rounds, 100)
    uniform, theirs = t["uniform"], t["cpprb, prioritized"]
    claims = [("uniform / floor", uniform / t["floor"], 1.3),
              ("prioritized, sample and update, numpy / cpprb", t["prioritized, numpy"] / theirs, 1.0),
              *[("prioritized, sample and update, [fast] / cpprb", t[name] / theirs, 0.4) for name in ("prioritized, compiled",) if FAST],
              ("windows 32 × 64 / floor of windows", t["windows 32 × 64"] / t["floor of windows"], 1.5),
              ("n-step 5 / uniform", t["n-step 5"] / uniform, 2.0)]
    claims += [(f"{name} / uniform", t[name] / uniform, 1.5) for name in ("balanced", "recent, items", "recent, time", "epoch")]
    show("Samplers out of 1,000,000 rows, state 24, action 4, 256 items", {name: t[name] for name in t if not name.endswith(", 100,000")}, claims)
    if not FAST: print("  prioritized with [fast]: NOT MEASURED, numba is not installed")
    show("Samplers, 1,000,000 rows / 100,000", {}, [(name, t[name] / t[f"{name}, 100,000"], 1.6) for name in large])
    gc.collect()
