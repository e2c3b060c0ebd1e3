"""Speed and memory against a peer (cpprb), numpy, and the floor: one packed `take` with its index draw.

Every figure is a median of interleaved rounds, and every claim a ratio of two figures of the same run, because machines differ and drift.
`python benchmarks/run.py` prints a table and exits with 1 where a target is missed; `--quick` takes fewer rounds.
"""
from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd

from data_io_nbdev import Episode, MemoryBuffer, Prioritized
from data_io_nbdev.storage.buffer.state import read_state

STEPS = 1000  # of an episode


def medians(contenders: dict[str, Callable[[], object]], rounds: int, calls: int) -> dict[str, float]:
    "Microseconds a call of each contender, in turns so that all see the same weather, and in another order each time: a neighbour leaves its traces in the caches"
    took: dict[str, list[float]] = {name: [] for name in contenders}
    order, names = random.Random(0), [*contenders]
    for call in contenders.values(): call()
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            call = contenders[name]
            if calls > 1: call()
            began = time.perf_counter()
            for _ in range(calls): call()
            took[name].append((time.perf_counter() - began) / calls * 1e6)
    return {name: statistics.median(times) for name, times in took.items()}


def episode(i: int, state: int, action: int) -> Episode:
    "A filled episode of float32, the i-th of its kind"
    rng, times = np.random.default_rng(i), pd.date_range("2026-01-01", periods=STEPS, freq="10ms", tz="UTC")
    s, a, r = (rng.random(shape, dtype="float32") for shape in ((STEPS + 1, state), (STEPS, action), (STEPS,)))
    return Episode.from_arrays(state=s[:-1], nstate=s[1:], action=a, reward=r, timestamp=times + pd.Timedelta(minutes=i), who={"vehicle": "VB7"})


def filled(state: int, action: int, rows: int, **options) -> MemoryBuffer:
    "A buffer with a pool of its own, fed one episode after another"
    buffer = MemoryBuffer(**options)
    for i in range(rows // STEPS): buffer.store(episode(i, state, action))
    return buffer


def peer(state: int, action: int, rows: int):
    "cpprb with the same fields, full"
    from cpprb import ReplayBuffer
    fields = {"obs": {"shape": state}, "act": {"shape": action}, "rew": {}, "next_obs": {"shape": state}, "done": {}}
    buffer = ReplayBuffer(rows, fields)
    for i in range(rows // STEPS):
        e = episode(i, state, action)
        buffer.add(obs=e.state, act=e.action, rew=e.reward, next_obs=e.nstate, done=e.terminated)
    return buffer


def sampling(state: int, action: int, rows: int, batch: int, rounds: int) -> dict[str, float]:
    "Microseconds of drawing a batch"
    rng, e = np.random.default_rng(0), episode(0, state, action)
    dtype = np.dtype([(r, b.dtype, b.shape[1:]) for r, b in e.blocks.items()], align=True)
    packed = np.empty(rows, dtype)
    for at in range(0, rows, STEPS):
        for role, block in e.blocks.items(): packed[role][at:at + STEPS] = block
    four = [np.tile(e.blocks[r], (rows // STEPS, *[1] * (e.blocks[r].ndim - 1))) for r in ("state", "action", "reward", "nstate")]

    def takes():
        index = rng.integers(rows, size=batch)
        return [array.take(index, axis=0) for array in four]

    theirs = peer(state, action, rows)
    ours = {f"sample, states {s}": filled(state, action, rows, batch_size=batch, states=s, seed=0) for s in ("twice", "once")}
    return medians({"floor: packed take": lambda: packed.take(rng.integers(rows, size=batch)), "numpy: four takes": takes,
                    "cpprb sample": lambda: theirs.sample(batch), **{name: buffer.sample for name, buffer in ours.items()}}, rounds, 200)


def adding(rounds: int) -> dict[str, float]:
    "Microseconds of adding an episode of 1,000 steps (24 + 4), to an empty buffer and to one that holds a million"
    from cpprb import ReplayBuffer
    ready = [episode(n, 24, 4) for n in range(10_000, 10_002 + 2 * rounds)]  # each is stored once, and hashed for the first time then
    small, large = MemoryBuffer(batch_size=1), filled(24, 4, 1_000_000, batch_size=1)
    theirs, e = ReplayBuffer(1_000_000, {"obs": {"shape": 24}, "act": {"shape": 4}, "rew": {}, "next_obs": {"shape": 24}, "done": {}}), episode(0, 24, 4)
    add = lambda: theirs.add(obs=e.state, act=e.action, rew=e.reward, next_obs=e.nstate, done=e.terminated)
    return medians({"its hash alone": lambda: replace(e).digest, "cpprb add": add,
                    "store, empty buffer": lambda: small.store(ready.pop()), "store, 1,000,000 rows": lambda: large.store(ready.pop())}, rounds, 1)


def saving(rounds: int) -> dict[str, float]:
    "Microseconds of a million priorities on their way to a file and back; the floor is numpy's own file, which the disk has, and which has a CRC"
    buffer = filled(1, 1, 1_000_000, batch_size=256, sampler=Prioritized())
    buffer.update_priorities(np.arange(1_000_000), np.random.default_rng(0).random(1_000_000))
    buffer.sample()
    chances, sampler = buffer.state_dict()["sampler"]["chances"], Prioritized()
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = f"{folder}/learner.state", f"{folder}/chances.npz"

        def save():
            with open(theirs, "wb") as f:
                np.savez(f, chances=chances)
                f.flush()
                os.fsync(f.fileno())

        return medians({"numpy's save and fsync": save, "save_state": lambda: buffer.save_state(ours), "numpy's load": lambda: np.load(theirs)["chances"],
                        "read_state": lambda: read_state(ours), "and into the sampler": lambda: sampler.load_state_dict(read_state(ours)["sampler"])}, rounds, 1)


def growth(state: int, action: int, rows: int) -> float:
    "Growth of a fresh process that fills a buffer, in bytes a row"
    code = (f"import sys, gc, psutil; sys.path.insert(0, 'benchmarks'); import run; run.filled({state}, {action}, 1000, batch_size=1)\n"
            f"gc.collect(); before = psutil.Process().memory_info().rss\nbuffer = run.filled({state}, {action}, {rows}, batch_size=1)\n"
            f"gc.collect(); print((psutil.Process().memory_info().rss - before) / len(buffer))")
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def importing(rounds: int) -> dict[str, float]:
    "Microseconds of a processor that a fresh process spends on importing pandas, and on what users type beyond it"
    names = "open_pool, MemoryPool, MemoryBuffer, Episode, Record, PoolQuery, Schema, Uniform"
    code = (f"import time; began = time.process_time(); import pandas; between = time.process_time()\n"
            f"from data_io_nbdev import {names}\nprint(between - began, time.process_time() - between)")
    with tempfile.TemporaryDirectory() as compiled:  # as an installed package has it
        env = {**os.environ, "PYTHONPYCACHEPREFIX": compiled, "PYTHONDONTWRITEBYTECODE": ""}
        times = [subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.split() for _ in range(rounds + 1)]
    return {name: statistics.median(map(float, took)) * 1e6 for name, took in zip(("import pandas", "import data_io_nbdev, beyond it"), zip(*times[1:]))}


# For a fresh process: `anon()` are its bytes of anonymous memory, `peak` the most that a thread has seen since it was set
WATCH = """
import threading, time
def anon(): return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) * 1024
peak = 0
def watch():
    global peak
    while True: peak = max(peak, anon()); time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
"""


class Report:
    "Prints figures and claims as they come, and counts the targets that were missed"
    missed = 0

    def __call__(self, title: str, figures: dict[str, float], claims: list[tuple[str, float, float]]) -> None:
        print(f"\n{title}")
        for name, us in figures.items(): print(f"  {name:<28}{us:>10.1f} µs")
        for claim, is_, limit in claims:
            self.missed += is_ > limit
            print(f"  {claim:<44}{is_:>6.2f}  (at most {limit:g}){'' if is_ <= limit else '   MISSED'}", flush=True)

    def end(self) -> int:
        "The exit status"
        print(f"\n{self.missed} targets missed" if self.missed else "\nevery target is met")
        return int(self.missed > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, for a first look")
    rounds = 5 if parser.parse_args().quick else 25
    show = Report()

    t = sampling(24, 4, 1_000_000, 256, rounds)
    show("Drawing 256 rows out of 1,000,000, state 24, action 4", t, [
        ("packed sample / floor", t["sample, states twice"] / t["floor: packed take"], 1.3),
        ("packed sample / cpprb", t["sample, states twice"] / t["cpprb sample"], 1 / 3)])
    gc.collect()
    t = sampling(600, 68, 100_000, 64, rounds)
    show("Drawing 64 rows out of 100,000, state 600, action 68", t, [
        ("states once / floor", t["sample, states once"] / t["floor: packed take"], 1.35),
        ("states once / cpprb", t["sample, states once"] / t["cpprb sample"], 1.0)])
    gc.collect()
    t = adding(max(rounds, 15))
    show("Adding an episode of 1,000 steps, state 24, action 4", t, [
        ("store / 1 ms", t["store, 1,000,000 rows"] / 1000, 1.0),
        ("store: 1,000,000 rows / empty", t["store, 1,000,000 rows"] / t["store, empty buffer"], 1.5)])
    gc.collect()
    t = saving(rounds)
    show("A state with a million priorities", t, [
        ("save_state / numpy's save and fsync", t["save_state"] / t["numpy's save and fsync"], 2.0),
        ("save_state / 50 ms", t["save_state"] / 50_000, 1.0),
        ("read_state / numpy's load", t["read_state"] / t["numpy's load"], 2.0),
        ("read_state, and into the sampler / 50 ms", t["and into the sampler"] / 50_000, 1.0)])
    gc.collect()
    packed = {24: episode(0, 24, 4), 600: episode(0, 600, 68)}
    dtype = {n: np.dtype([(r, b.dtype, b.shape[1:]) for r, b in e.blocks.items()]).itemsize for n, e in packed.items()}
    lean, wide = filled(24, 4, 10_000, batch_size=1), filled(600, 68, 10_000, batch_size=1)
    show("Bytes", {}, [
        ("a step in the rows, packed / its dtype", lean.nbytes / len(lean) / dtype[24], 1.05),
        ("a step in the rows, states once / packed dtype", wide.nbytes / len(wide) / dtype[600], 0.58),
        ("growth of the process / rows, state 24", growth(24, 4, 500_000) / (lean.nbytes / len(lean)), 1.15),
        ("growth of the process / rows, state 600", growth(600, 68, 100_000) / (wide.nbytes / len(wide)), 1.15)])
    t = importing(5)
    show("Importing", t, [("import data_io_nbdev / import pandas", t["import data_io_nbdev, beyond it"] / t["import pandas"], 0.2)])
    gc.collect()
    import catalogue
    import lake
    import mongo
    import samplers
    import tables
    import writer
    samplers.show_all(show, rounds)
    gc.collect()
    writer.show_all(show, rounds)
    gc.collect()
    tables.show_all(show, rounds)
    gc.collect()
    lake.show_all(show, rounds)
    gc.collect()
    mongo.show_all(show, rounds)
    gc.collect()
    catalogue.show_all(show, rounds, catalogue.SIZE if rounds > 5 else 20_000)
    return show.end()


if __name__ == "__main__":
    sys.exit(main())
