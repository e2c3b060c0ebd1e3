"""Pools of many small episodes: what grows with the pool, and what must not. `run.py` shows it at 200,000 episodes.

Each figure is measured at a size and at a tenth of it, in turns, and has a limit at 200,000 and mostly one for its growth. `python benchmarks/catalogue.py 1000000`
measures at a size of your choice, prints what is met, and puts the figures into catalogue.csv, which nbs/explanations/what_grows_with_what.ipynb shows;
`--only store refresh` measures only these. Limits of what may grow with the pool are scaled to larger sizes.
"""
from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, Optional

import numpy as np
import pandas as pd

from data_io_nbdev import DaskBuffer, DaskPool, Episode, Field, MemoryBuffer, MemoryPool, Pool, PoolQuery, Schema
from data_io_nbdev.data.core import records
from lake import loading
from run import Report

SIZE = 200_000  # episodes at which the limits hold
LINEAR = 1.3  # growth an episode of what may grow with the pool: nothing, but for noise, and for what no longer fits a processor's cache
STEPS, BULK, YEAR = 5, 500, 365 * 86_400_000_000  # of an episode; episodes of an upload; microseconds
FIGURES = Path(__file__).with_suffix(".csv")
SCHEMA = Schema([Field("state", "speed", unit="m/s"), Field("state", "slope"), Field("action", "torque"), Field("reward", "work")],
                identity=["vehicle", "driver"])


class Figure(NamedTuple):
    "Something measured at two sizes"
    name: str
    unit: str
    at: dict[int, float]  # By size
    most: float  # At 200,000
    growth: Optional[float] = None  # At most, from the smaller size to the larger
    linear: bool = False  # It may grow with the size: then `growth` is of the value an episode
    whole: Optional[dict[int, float]] = None  # What grows, where the value is a difference

    def claims(self) -> list[tuple[str, float, float]]:
        "What `run.py` prints: a text, what was measured, and the limit"
        small, large, grows = min(self.at), max(self.at), self.whole or self.at
        grown, most = grows[large] / grows[small], self.most
        if self.linear: grown, most = grown * small / large, most * max(1, large / SIZE)
        claims = [(f"{self.name}, {self.unit}", self.at[large], most)]
        if self.growth: claims.append((f"  growth from {small:,}" + ", an episode" * self.linear, grown, self.growth))
        return claims


# --- measuring ---

def in_turns(measures: dict[Any, Callable[[], float]], rounds: int) -> dict[Any, float]:
    "The median of what each measures, in turns so that all see the same weather"
    found: dict[Any, list[float]] = {name: [] for name in measures}
    for _ in range(rounds):
        for name, measure in measures.items(): found[name].append(measure())
    return {name: statistics.median(values) for name, values in found.items()}


def seconds(call: Callable[[], Any], *prepare: Callable[[], Any]) -> float:
    "How long a call takes, after preparations that do not count"
    for each in prepare: each()
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


# --- pools ---

NOISE = {role: np.random.default_rng(0).random((10_000, *shape), dtype="float32") for role, shape in (("state", (2,)), ("action", (1,)), ("reward", ()))}


def small_episode(i: int, n: int, steps: int = STEPS) -> Episode:
    "The i-th of `n` in a year, of 1,000 vehicles; neighbours are far apart in time, and the i-th behind those n begins in the next year"
    at, start = i % 4000, pd.Timestamp("2026-01-01").value // 1000 + i // n * YEAR + i * 7919 % n * (YEAR // n)
    blocks = {role: noise[at:at + steps] for role, noise in NOISE.items()}
    flags = {flag: np.zeros(steps, bool) for flag in ("terminated", "truncated")}
    return Episode(schema=SCHEMA, who={"vehicle": f"VB{i % 1000:03}", "driver": f"D{i // 7 % 50:02}"}, start=start, zone="UTC",
                   times=start + 1_000_000 * np.arange(steps), blocks={**blocks, "nstate": NOISE["state"][at + 1:at + steps + 1], **flags})


def fill(pool: Pool, n: int) -> Pool:
    "So many episodes, as uploads of 500"
    for i in range(0, n, BULK): pool.extend([small_episode(j, n) for j in range(i, min(i + BULK, n))])
    return pool


class Pools:
    "Lakes and pools in memory of two sizes, filled when they are first asked for, and what was stored in them since"
    def __init__(self, folder: Path, size: int):
        self.folder, self.sizes = folder, (size // 10, size)
        self._next = {}  # by pool

    @cached_property
    def lake(self) -> dict[int, DaskPool]: return {n: fill(DaskPool(self.folder / str(n)), n) for n in self.sizes}
    @cached_property
    def memory(self) -> dict[int, MemoryPool]: return {n: fill(MemoryPool(), n) for n in self.sizes}
    @property
    def kinds(self) -> Iterator[tuple[str, dict[int, Pool]]]: return ((kind, getattr(self, kind)) for kind in ("memory", "lake"))

    @cached_property
    def tiny(self) -> DaskPool: return fill(DaskPool(self.folder / "tiny"), 1)

    def new(self, pool: Pool, n: int) -> Episode:
        "One that the pool of n episodes does not have yet"
        return small_episode(next(self._next.setdefault(id(pool), itertools.count(n))), n)


# --- a fresh handle ---

FRESH = """
import gc, json, sys, time, psutil
from data_io_nbdev import DaskPool, PoolQuery
def uss(): gc.collect(); return psutil.Process().memory_full_info().uss
def ask(folder): pool = DaskPool(folder, "r"); return pool, pool.count(PoolQuery(vehicle="VB000"))
ask(sys.argv[2])  # what every first use takes
before, began = uss(), time.perf_counter()
pool, found = ask(sys.argv[1])
took = time.perf_counter() - began
print(json.dumps([found, took, uss() - before]))
"""


def fresh(pools: Pools, n: int) -> tuple[float, int]:
    "Seconds of the first question to a fresh handle in a fresh process, and the bytes by which that grew"
    command = [sys.executable, "-c", FRESH, pools.folder / str(n), pools.folder / "tiny"]
    found, took, grown = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found == len(range(0, n, 1000))
    return took, grown


def index_bytes(pools: Pools, rounds: int) -> list[Figure]:
    assert pools.tiny and pools.lake
    grown = in_turns({n: lambda n=n: fresh(pools, n)[1] / n for n in pools.sizes}, 3)
    return [Figure("index of a lake a part", "bytes", grown, 300, 1.1)]


def first_count(pools: Pools, rounds: int) -> list[Figure]:
    assert pools.tiny and pools.lake
    return [Figure("first count, lake", "s", in_turns({n: lambda n=n: fresh(pools, n)[0] for n in pools.sizes}, 3), 0.5, LINEAR, linear=True)]


# --- questions ---

ASKED = PoolQuery(vehicle="VB007", start=("2026-06-01T00:00Z", "2026-07-01T00:00Z"))


def questions(pools: Pools, rounds: int) -> list[Figure]:
    "By who and start, without reading a step"
    figures = []
    for kind, by_size in pools.kinds:
        for name in ("count", "find"):
            took = in_turns({n: lambda ask=getattr(pool, name): 1e3 * seconds(partial(ask, ASKED)) for n, pool in by_size.items()}, rounds)
            figures.append(Figure(f"{name} by who and start, {kind}", "ms", took, 10, linear=True))
    return figures


def catalogue(pools: Pools, rounds: int) -> list[Figure]:
    return [Figure(f"catalogue of everything, {kind}", "s", in_turns({n: partial(seconds, pool.catalogue) for n, pool in by_size.items()}, 3),
                   0.6, LINEAR, linear=True) for kind, by_size in pools.kinds]


# --- changes ---

def store(pools: Pools, rounds: int) -> list[Figure]:
    "A new episode a commit"
    def one(pool, n):
        episode = pools.new(pool, n)
        return 1e3 * seconds(lambda: pool.store(episode))
    return [Figure(f"store of one, {kind}", "ms", in_turns({n: partial(one, pool, n) for n, pool in by_size.items()}, rounds), most, 1.3)
            for (kind, by_size), most in zip(pools.kinds, (1.5, 15))]


def delete(pools: Pools, rounds: int) -> list[Figure]:
    "An episode that came alone, and one whose file in the lake holds 499 others, which are written anew"
    def alone(pool, n):
        id = pool.store(pools.new(pool, n))
        return 1e3 * seconds(lambda: pool.delete(id))

    def among(pool, n, at):
        id = small_episode(next(at), n).id
        return 1e3 * seconds(lambda: pool.delete(id))
    kinds = [(f"delete of one, {kind}", by_size, most, alone) for (kind, by_size), most in zip(pools.kinds, (1.5, 15))]
    kinds.append(("delete of one out of 500, lake", pools.lake, 15, lambda pool, n, at=itertools.count(1): among(pool, n, at)))
    return [Figure(name, "ms", in_turns({n: partial(how, pool, n) for n, pool in by_size.items()}, rounds), most, 1.3) for name, by_size, most, how in kinds]


def refresh(pools: Pools, rounds: int) -> list[Figure]:
    "Of a buffer that holds everything, after one store; the lake's has a handle of its own"
    def one(pool, n, buffer):
        pool.store(pools.new(pool, n))
        return 1e3 * seconds(buffer.refresh)

    def loaded(pool):
        lake = isinstance(pool, DaskPool)
        buffer = DaskBuffer(pool=DaskPool(pool.url, "r"), batch_size=64, resident="memory", progress=False) if lake else MemoryBuffer(pool=pool, batch_size=64)
        buffer.load()
        return buffer
    return [Figure(f"refresh after one store, {kind}", "ms", in_turns({n: partial(one, pool, n, loaded(pool)) for n, pool in by_size.items()}, rounds), 10, 1.3)
            for kind, by_size in pools.kinds]


def record(pools: Pools, rounds: int) -> list[Figure]:
    "An episode that comes step by step: the last 50 stores beside the first 50 behind the 50th"
    steps, figures = 5000 if rounds > 5 else 500, []
    for kind, pool, most in (("memory", MemoryPool(), 1), ("lake", DaskPool(pools.folder / "records"), 15)):
        took = [1e3 * seconds(partial(pool.store, step)) for step in records(small_episode(0, 1, steps))]
        figures.append(Figure(f"store of an episode's last step, {kind}", "ms", {100: statistics.median(took[50:100]), steps: statistics.median(took[-50:])}, most, 1.3))
    return figures


# --- reading everything ---

def load(pools: Pools, rounds: int) -> list[Figure]:
    "Beyond a bare read of the same columns by as many threads, which takes longer an episode where these are few; so growth is that of all"
    took = {n: loading(pool, 3) for n, pool in pools.lake.items()}
    beyond, every = ({n: of(t) / n for n, t in took.items()} for of in (lambda t: t["load"] - t["pyarrow, the same columns"], lambda t: t["load"]))
    return [Figure("load beyond bytes an episode, lake", "µs", beyond, 12, LINEAR, whole=every)]


def verify(pools: Pools, rounds: int) -> list[Figure]:
    "Beyond reading and hashing the same files; once each, because it takes long enough"
    def floor(pool):
        for file in Path(pool.url).glob("*.parquet"):
            content = file.read_bytes()
            zlib.crc32(content), hashlib.sha256(content).digest()

    def sound(pool): assert pool.verify() == []
    beyond = {n: 1e3 * (seconds(partial(sound, pool)) - seconds(partial(floor, pool))) / n for n, pool in pools.lake.items()}
    return [Figure("verify beyond bytes an episode, lake", "ms", beyond, 0.1, LINEAR)]


def select(pools: Pools, rounds: int) -> list[Figure]:
    "A twentieth of 600 fields of a state, of 20 episodes of 1,000 steps"
    names = [f"s{i:03}" for i in range(600)]
    schema = Schema([*(Field("state", name) for name in names), Field("action", "torque"), Field("reward", "work")], identity=["vehicle", "driver"])
    pool, rng = DaskPool(pools.folder / "wide"), np.random.default_rng(0)
    for i in range(20):
        e, state = small_episode(i, 20, 1000), rng.random((1001, 600), dtype="float32")
        pool.store(Episode(schema=schema, who=e.who, start=e.start, zone=e.zone, times=e.times, blocks={**e.blocks, "state": state[:-1], "nstate": state[1:]}))

    def loads(**options): DaskBuffer(pool=DaskPool(pool.url, "r"), batch_size=64, resident="memory", progress=False, **options).load()
    took = in_turns({30: lambda: seconds(lambda: loads(select={"state": names[::20]})), 600: lambda: seconds(loads)}, max(3, rounds // 3))
    return [Figure("load of 30 of 600 fields, lake", "of all", {600: took[30] / took[600]}, 0.25)]


# --- showing and keeping ---

SECTIONS = {each.__name__: each for each in (index_bytes, first_count, questions, catalogue, load, verify, store, delete, refresh, record, select)}


def keep(figures: list[Figure]) -> None:
    "Put figures into catalogue.csv, in place of those of the same name and size"
    rows = [dict(figure=f.name, unit=f.unit, limit=f.most, size=size, value=float(f"{value:.3g}")) for f in figures for size, value in f.at.items()]
    known = pd.read_csv(FIGURES, keep_default_na=False) if FIGURES.exists() else pd.DataFrame()
    table = pd.concat([known, pd.DataFrame(rows)]).drop_duplicates(["figure", "size"], keep="last")
    table.sort_values(["figure", "size"]).to_csv(FIGURES, index=False)


def show_all(show: Callable, rounds: int, size: int = SIZE, only: Optional[list[str]] = None, kept: bool = False) -> None:
    "Everything, on pools in a temporary folder"
    with tempfile.TemporaryDirectory() as name:
        pools = Pools(Path(name), size)
        for section in only or SECTIONS:
            figures = SECTIONS[section](pools, rounds)
            show(f"{size:,} episodes of {STEPS} steps: {section.replace('_', ' ')}", {}, [claim for figure in figures for claim in figure.claims()])
            if kept: keep(figures)
            gc.collect()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", nargs="?", type=int, default=SIZE, help="episodes; the default is %(default)s")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="measure only these")
    given, report = parser.parse_args(), Report()
    show_all(report, 15, given.size, given.only, kept=True)
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
