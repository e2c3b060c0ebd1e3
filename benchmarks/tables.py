"""Plain tables: a million rows into a pool, beside what pandas needs to sort the same table and part it. `run.py` shows it."""
from __future__ import annotations

import gc
import subprocess
import sys

import numpy as np
import pandas as pd

from data_io_nbdev import Layout, MemoryPool
from run import WATCH, medians

ROWS, TRIPS = 1_000_000, 2_000
LAYOUT = Layout(state=[f"s{i}" for i in range(5)], action="a0", reward="r", who=["vehicle"], episode="trip", time="time", order="sort")
GROWTH = WATCH + """
import gc, sys; sys.path.insert(0, 'benchmarks')
import tables
from data_io_nbdev import MemoryPool
MemoryPool().extend(tables.LAYOUT.episodes(tables.table(1_000, 10)))
table = tables.table(tables.ROWS, tables.TRIPS, sys.argv[1] == "shuffled"); gc.collect()
before = peak = anon()
pool = MemoryPool(); pool.extend(tables.LAYOUT.episodes(table))
assert len(pool) == tables.TRIPS
print((peak - before) / table.memory_usage(deep=True).sum())
"""


def table(rows: int, trips: int, shuffled: bool = False) -> pd.DataFrame:
    "A log of ten columns, in order or not"
    rng, trip = np.random.default_rng(0), np.arange(rows) * trips // rows
    signals = {name: rng.random(rows) for name in ("s0", "s1", "s2", "s3", "s4", "a0", "r")}
    times = pd.date_range("2026-01-01", periods=rows, freq="100ms", tz="UTC")
    made = pd.DataFrame({"vehicle": np.where(trip % 7, "VB7", "XK2"), "trip": trip, "time": times, **signals})
    return made.sample(frac=1, random_state=0, ignore_index=True) if shuffled else made


def reading(shuffled: bool, rounds: int) -> dict[str, float]:
    "Microseconds of sorting and parting a table, and of storing its episodes"
    log = table(ROWS, TRIPS, shuffled)

    def part():
        return [trip for _, trip in log.sort_values(["vehicle", "trip", "time"]).groupby(["vehicle", "trip"])]

    def store():
        pool = MemoryPool()
        pool.extend(LAYOUT.episodes(log))
        assert len(pool) == TRIPS
    return medians({"pandas, sort and groupby": part, "episodes and extend": store}, rounds, 1)


def growth(kind: str) -> float:
    "How far a fresh process grows at most while it stores a table, in tables"
    return float(subprocess.run([sys.executable, "-c", GROWTH, kind], capture_output=True, text=True, check=True).stdout)


def show_all(show, rounds: int) -> None:
    "A table in order, and one in none"
    for kind in ("in order", "shuffled"):
        t = reading(kind == "shuffled", max(3, rounds // 5))
        gc.collect()
        show(f"A plain table of 1,000,000 rows, 10 columns, 2,000 trips, {kind}", t, [
            ("episodes and extend / pandas", t["episodes and extend"] / t["pandas, sort and groupby"], 3.0),
            ("growth of the process / the table", growth(kind), 2.0)])
