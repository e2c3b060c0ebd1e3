"""This package beside other replay buffers: the same rows, the same batches, the same run. `make bench-peers` runs it, and writes results.md.

Each peer is optional. What is not installed, fails, or is not offered by a peer has a line in the table that says why. Every figure is a median of
interleaved rounds, in microseconds a batch, in whatever arrays the peer gives: numpy's, torch's or JAX's.
"""
from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np

from data_io_nbdev import MemoryBuffer, NStep, Prioritized, Uniform, Windows
from run import episode, medians

STEPS, BATCH, SLICES, LENGTH, N, GAMMA = 1000, 256, 32, 64, 5, 0.99
KINDS = ("uniform", "prioritized", "n-step", "windows")
RESULTS = Path(__file__).with_name("results.md")
PACKAGES = ("numpy", "numba", "cpprb", "stable-baselines3", "torchrl", "tianshou", "flashbax", "torch", "jax", "jaxlib")
Draws = dict[str, Any]  # By kind: what draws a batch, or a text that says why there is none


class Steps(NamedTuple):
    "What every buffer is filled with: episodes of 1,000 steps one behind the other"
    state: np.ndarray  # `(rows, 24)` float32
    action: np.ndarray  # `(rows, 4)` float32
    reward: np.ndarray  # `(rows,)` float32
    nstate: np.ndarray  # `(rows, 24)` float32
    end: np.ndarray  # `(rows,)` bool: the last of an episode
    errors: np.ndarray  # `(256,)` float64, new priorities of a batch

    @classmethod
    def made(cls, rows: int) -> Steps:
        rng = np.random.default_rng(0)
        state, action, reward = (rng.random(shape, dtype="float32") for shape in ((rows + 1, 24), (rows, 4), (rows,)))
        return cls(state[:-1], action, reward, state[1:], np.arange(rows) % STEPS == STEPS - 1, rng.random(BATCH))


# --- this package, and the floor ---

def floor(steps: Steps) -> Draws:
    "One `take` out of a packed array, with its index draw; for windows of as many rows side by side"
    e, rows, rng = episode(0, 24, 4), len(steps.reward), np.random.default_rng(0)
    packed = np.zeros(rows, np.dtype([(r, b.dtype, b.shape[1:]) for r, b in e.blocks.items()], align=True))
    for role in ("state", "action", "reward", "nstate"): packed[role] = getattr(steps, role)
    side_by_side = lambda: packed.take(rng.integers(rows - LENGTH, size=SLICES)[:, None] + np.arange(LENGTH))
    return {"uniform": lambda: packed.take(rng.integers(rows, size=BATCH)), "windows": side_by_side,
            "prioritized": "a floor for uniform draws", "n-step": "a floor for uniform draws"}


def ours(steps: Steps) -> Draws:
    buffer = MemoryBuffer(batch_size=BATCH, seed=0)
    for i in range(len(steps.reward) // STEPS): buffer.store(episode(i, 24, 4))

    def drawing(sampler, n=BATCH):
        def draw():
            buffer.sampler, buffer.batch_size = sampler, n
            return buffer.sample()
        return draw
    by_priority = drawing(Prioritized())
    return {"uniform": drawing(Uniform()), "prioritized": lambda: buffer.update_priorities(by_priority().anchor, steps.errors),
            "n-step": drawing(NStep(N, GAMMA)), "windows": drawing(Windows(LENGTH), SLICES)}


# --- peers ---

def cpprb(steps: Steps) -> Draws:
    "n-step returns are made when a step is added"
    from cpprb import PrioritizedReplayBuffer, ReplayBuffer
    rows = len(steps.reward)
    fields = {"obs": {"shape": 24}, "act": {"shape": 4}, "rew": {}, "next_obs": {"shape": 24}, "done": {}}
    ahead = {"size": N, "gamma": GAMMA, "rew": "rew", "next": "next_obs"}
    plain, by_priority, several = ReplayBuffer(rows, fields), PrioritizedReplayBuffer(rows, fields, alpha=0.6), ReplayBuffer(rows, fields, Nstep=ahead)
    for buffer in (plain, by_priority, several):
        for at in range(0, rows, STEPS):
            some = slice(at, at + STEPS)
            buffer.add(obs=steps.state[some], act=steps.action[some], rew=steps.reward[some], next_obs=steps.nstate[some], done=steps.end[some])
            buffer.on_episode_end()
    return {"uniform": lambda: plain.sample(BATCH), "n-step": lambda: several.sample(BATCH), "windows": "has none",
            "prioritized": lambda: by_priority.update_priorities(by_priority.sample(BATCH, beta=0.4)["indexes"], steps.errors)}


def stable_baselines3(steps: Steps) -> Draws:
    "Filled through its arrays, because it adds one step at a time"
    from gymnasium.spaces import Box
    from stable_baselines3.common import buffers

    def full(kind, **options):
        made = kind(len(steps.reward), Box(-1, 1, (24,), "float32"), Box(-1, 1, (4,), "float32"), device="cpu", **options)
        for name, values in dict(observations=steps.state, next_observations=steps.nstate, actions=steps.action, rewards=steps.reward,
                                 dones=steps.end).items(): getattr(made, name)[:, 0] = values
        made.full = True
        return made
    plain = full(buffers.ReplayBuffer)
    several = getattr(buffers, "NStepReplayBuffer", None)
    ahead = several and full(several, n_steps=N, gamma=GAMMA)
    return {"uniform": lambda: plain.sample(BATCH), "n-step": (lambda: ahead.sample(BATCH)) if ahead else "has none",
            "prioritized": "has none", "windows": "has none for replay"}


def torchrl(steps: Steps) -> Draws:
    import torch
    from tensordict import TensorDict
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
    from torchrl.data.replay_buffers.samplers import PrioritizedSampler, RandomSampler, SliceSampler
    rows, tensor = len(steps.reward), torch.from_numpy
    end = tensor(steps.end)[:, None]
    told = TensorDict({"observation": tensor(steps.state), "action": tensor(steps.action),
                       "next": {"observation": tensor(steps.nstate), "reward": tensor(steps.reward)[:, None], "done": end, "terminated": end}}, [rows])

    def full(sampler, n=BATCH):
        made = TensorDictReplayBuffer(storage=LazyTensorStorage(rows), sampler=sampler, batch_size=n)
        made.extend(told)
        return made
    plain, by_priority = full(RandomSampler()), full(PrioritizedSampler(rows, alpha=0.6, beta=0.4))
    slices = full(SliceSampler(slice_len=LENGTH, end_key=("next", "done"), truncated_key=None, cache_values=True), SLICES * LENGTH)
    errors = tensor(steps.errors.astype("float32"))
    return {"uniform": plain.sample, "windows": slices.sample, "prioritized": lambda: by_priority.update_priority(by_priority.sample()["index"], errors),
            "n-step": "made when steps are added, by a transform; then drawn as uniform"}


def tianshou(steps: Steps) -> Draws:
    "Filled in one piece, as its `from_data` does, because it adds one step at a time"
    from tianshou.data import Batch, PrioritizedReplayBuffer, ReplayBuffer
    rows, no = len(steps.reward), np.zeros(len(steps.reward), bool)

    def full(made):
        made.set_batch(Batch(obs=steps.state, act=steps.action, rew=steps.reward, terminated=steps.end, truncated=no, done=steps.end,
                             obs_next=steps.nstate, info=Batch(), policy=Batch()))
        made._size = rows
        return made
    plain, by_priority = full(ReplayBuffer(rows)), full(PrioritizedReplayBuffer(rows, alpha=0.6, beta=0.4))
    by_priority.init_weight(np.arange(rows))
    return {"uniform": lambda: plain.sample(BATCH), "prioritized": lambda: by_priority.update_weight(by_priority.sample(BATCH)[1], steps.errors),
            "n-step": "made by its algorithms, from batches of indices", "windows": "has none"}


def flashbax(steps: Steps) -> Draws:
    "Each draw is compiled, with the split of its key. States are kept once: the next one is that of the next row"
    import flashbax as fbx
    import jax
    rows = len(steps.reward)
    told = {"obs": steps.state, "act": steps.action, "rew": steps.reward, "done": steps.end}
    sequences = dict(add_sequences=True, add_batch_size=None)
    flat = dict(max_length=rows, min_length=BATCH, sample_batch_size=BATCH, **sequences)
    window = dict(add_batch_size=1, sample_batch_size=SLICES, sample_sequence_length=LENGTH, period=1, min_length_time_axis=LENGTH, max_size=rows)

    def full(buffer, batched=False):
        state = buffer.init({name: values[0] for name, values in told.items()})
        add = jax.jit(buffer.add, donate_argnums=0)
        for at in range(0, rows, 10 * STEPS):
            some = {name: values[at:at + 10 * STEPS] for name, values in told.items()}
            state = add(state, {name: values[None] for name, values in some.items()} if batched else some)
        return buffer, state

    def drawing(buffer, state):
        key = jax.random.PRNGKey(0)
        sample = jax.jit(lambda state, key: (buffer.sample(state, key), jax.random.split(key)[0]))

        def draw():
            nonlocal key
            batch, key = sample(state, key)
            return jax.block_until_ready(batch)
        return draw

    def learning(buffer, state):
        key, tell = jax.random.PRNGKey(0), jax.jit(buffer.set_priorities, donate_argnums=0)
        sample = jax.jit(lambda state, key: (buffer.sample(state, key), jax.random.split(key)[0]))
        errors = steps.errors.astype("float32")

        def learn():
            nonlocal state, key
            batch, key = sample(state, key)
            state = jax.block_until_ready(tell(state, batch.indices, errors))
        return learn
    return {"uniform": drawing(*full(fbx.make_flat_buffer(**flat))), "prioritized": learning(*full(fbx.make_prioritised_flat_buffer(**flat))),
            "windows": drawing(*full(fbx.make_trajectory_buffer(**window), batched=True)), "n-step": "has none"}


CONTENDERS: dict[str, Callable[[Steps], Draws]] = {
    "floor: packed take": floor, "data_io_nbdev": ours, "cpprb": cpprb, "stable-baselines3": stable_baselines3, "torchrl": torchrl,
    "tianshou": tianshou, "flashbax": flashbax}


# --- measuring and telling ---

def tried(make: Callable[[Steps], Draws], steps: Steps) -> Draws:
    "The draws of a contender, each of which worked once; or why there is none"
    try: draws = make(steps)
    except Exception as e: return dict.fromkeys(KINDS, _why(e))
    for kind, draw in draws.items():
        if callable(draw):
            try: draw()
            except Exception as e: draws[kind] = _why(e)
    return draws


def _why(e: Exception) -> str:
    text = f"not installed: {e.name}" if isinstance(e, ModuleNotFoundError) else f"failed: {type(e).__name__}: {e}"
    return text.splitlines()[0][:100].replace("|", "/")


def measured(rows: int, rounds: int, calls: int = 100) -> dict[str, dict[str, Any]]:
    "Microseconds a batch by contender and kind, or why not"
    with suppress(ImportError):
        import torch
        torch.set_num_threads(1)  # more of them wait for each other at such batches
    steps = Steps.made(rows)
    draws = {name: tried(make, steps) for name, make in CONTENDERS.items()}
    took = medians({(name, kind): draw for name, of in draws.items() for kind, draw in of.items() if callable(draw)}, rounds, calls)
    return {name: {kind: took.get((name, kind), draw) for kind, draw in of.items()} for name, of in draws.items()}


def version(package: str) -> Optional[str]:
    try: return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError: return None


def machine() -> str:
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), platform.processor())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB of memory"


def report(found: dict[str, dict[str, Any]], rows: int, remark: str) -> str:
    "The table as Markdown, with what it was measured on"
    cell = lambda x: f"{x:.0f}" if isinstance(x, float) else "–"
    lines = [f"| µs a batch | {' | '.join(KINDS)} |", "|---|" + "---:|" * len(KINDS),
             *(f"| {name} | {' | '.join(cell(of[kind]) for kind in KINDS)} |" for name, of in found.items())]
    whys: dict[tuple[str, str], list[str]] = {}
    for name, of in found.items():
        for kind in KINDS:
            if not isinstance(of[kind], float): whys.setdefault((name, of[kind]), []).append(kind)
    missing = [f"- {name}, {', '.join(kinds)}: {why}" for (name, why), kinds in whys.items()]
    versions = ", ".join(f"{p} {v}" for p in PACKAGES if (v := version(p)))
    return "\n".join([
        "# Beside other replay buffers", "", "Written by `make bench-peers`.", "",
        f"Out of {rows:,} rows (24 + 4 float32, reward, next state, flags; episodes of {STEPS:,} steps): uniform, {BATCH} rows; prioritized, {BATCH} rows and "
        f"the update of their priorities;", f"n-step, {BATCH} rows with the return of {N} steps; windows, {SLICES} slices of {LENGTH} steps. Medians of interleaved "
        "rounds in one process. Each gives its own arrays: torch's and", "JAX's where the peer is made for these; torch has one thread.", "", *lines, "", "No figure:", "", *missing, "",
        f"- {datetime.date.today()}, {machine()}", f"- Python {platform.python_version()}, {versions}", *([f"- {remark}"] if remark else []), ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--remark", default=os.environ.get("REMARK", ""), help="a line for results.md, such as what else the machine did")
    parser.add_argument("--dry", action="store_true", help="print, and leave results.md as it is")
    given = parser.parse_args()
    text = report(measured(given.rows, given.rounds), given.rows, given.remark)
    print(text)
    if not given.dry: RESULTS.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
