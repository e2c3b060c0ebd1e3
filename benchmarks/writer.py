"""Steps one at a time: a writer beside cpprb's `add` of the same steps, and a recorded environment beside the bare one. `run.py` shows it."""
from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable

import gymnasium
import numpy as np

from data_io_nbdev import MemoryPool, open_pool
from data_io_nbdev.interop.gymnasium import record
from run import medians

STEPS, LANES, ROWS = 10_000, 16, 1_000  # after so many rows a writer commits


def steps(lanes: int | None) -> tuple[np.ndarray, ...]:
    "States, one more than steps; actions, rewards, and flags that are never set"
    rng, n, lead = np.random.default_rng(0), STEPS if lanes is None else ROWS, () if lanes is None else (lanes,)
    made = (rng.random(shape, dtype="float32") for shape in ((n + 1, *lead, 24), (n, *lead, 4), (n, *lead)))
    return *made, np.zeros(lead, bool)[()]


def ours(pool, lanes: int | None = None) -> Callable[[], None]:
    "A loop over a writer, which goes on with each call"
    s, a, r, flag = steps(lanes)
    writer = pool.writer({"car": "A"} if lanes is None else [{"car": i} for i in range(lanes)], seconds=1)

    def loop():
        for i in range(len(a)): writer.append(s[i], a[i], r[i], s[i + 1], flag, flag)
    return loop


def theirs(lanes: int | None = None) -> Callable[[], None]:
    "The same loop over cpprb"
    from cpprb import ReplayBuffer
    s, a, r, flag = steps(lanes)
    buffer = ReplayBuffer(1_000_000, {"obs": {"shape": 24}, "act": {"shape": 4}, "rew": {}, "next_obs": {"shape": 24}, "done": {}})

    def loop():
        for i in range(len(a)): buffer.add(obs=s[i], act=a[i], rew=r[i], next_obs=s[i + 1], done=flag)
    return loop


def walking(env) -> Callable[[], None]:
    "A loop over an environment whose episodes have 200 steps"
    push = np.zeros(1, "float32")

    def loop():
        env.reset(seed=0)
        for i in range(STEPS // 5):
            *_, terminated, truncated, _ = env.step(push)
            if terminated or truncated: env.reset()
    return loop


def each(contenders: dict[str, Callable[[], None]], rounds: int, calls: int) -> dict[str, float]:
    "Microseconds of one of so many calls in a loop"
    return {name: us / calls for name, us in medians(contenders, rounds, 1).items()}


def show_all(show, rounds: int) -> None:
    "One machine, into memory and into a lake; sixteen side by side; and an environment"
    rounds = max(5, rounds // 2)
    with tempfile.TemporaryDirectory() as folder, open_pool(folder) as lake:
        t = each({"cpprb add": theirs(), "append, memory": ours(MemoryPool()), "append, a lake": ours(lake)}, rounds, STEPS)
        show("Appending one step, state 24, action 4", t, [
            ("append, memory / cpprb add", t["append, memory"] / t["cpprb add"], 1.5),
            ("append, a lake / cpprb add", t["append, a lake"] / t["cpprb add"], 2.0)])
    gc.collect()
    t = each({"cpprb add": theirs(LANES), "append, memory": ours(MemoryPool(), LANES)}, rounds, ROWS)
    show(f"Appending a step of {LANES} environments at once", t, [("append, memory / cpprb add", t["append, memory"] / t["cpprb add"], 1.0)])
    gc.collect()
    bare, recorded = gymnasium.make("Pendulum-v1"), record(gymnasium.make("Pendulum-v1"), MemoryPool(), {"machine": "A"})
    t = each({"step": walking(bare), "step, recorded": walking(recorded)}, rounds, STEPS // 5)
    show("A step of a Gymnasium environment", t, [("beyond the environment's own / 30 µs", (t["step, recorded"] - t["step"]) / 30, 1.0)])
