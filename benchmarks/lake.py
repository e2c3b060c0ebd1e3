"""The data lake: loading, drawing, memory, a cluster, and a log of 10,000 commits. `run.py` shows it.

Like there, claims are ratios of medians of interleaved rounds of one run, but for the few that are promised in seconds.
"""
from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Optional

import pyarrow.parquet as pq

from data_io_nbdev import DaskBuffer, DaskPool, Episode, MemoryBuffer
from data_io_nbdev.storage.pool.parquet import columns_of
from run import WATCH, episode, medians

ANON = WATCH + """
import json, sys
from data_io_nbdev import DaskBuffer, DaskPool
lake, cache, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
buffer = DaskBuffer(pool=DaskPool(lake, "r"), batch_size=64, memory_limit=limit, cache=cache, progress=False)
buffer.load()
loading, peak = peak, 0
for _ in range(1000): buffer.sample()
print(json.dumps([loading, peak, buffer.nbytes, buffer._view.home.key is not None]))
"""
OPEN = """
import sys, time
from data_io_nbdev import DaskPool
t = time.perf_counter(); pool = DaskPool(sys.argv[1], "r"); pool.version; opened = time.perf_counter() - t
t = time.perf_counter(); n = len(pool.catalogue()); print(opened, time.perf_counter() - t, n)
"""


def stored(folder: Path, state: int, action: int, episodes: int, make: Callable = episode) -> DaskPool:
    "A lake of episodes of 1,000 steps, a file each"
    pool = DaskPool(folder)
    for i in range(episodes): pool.store(make(i, state, action))
    return pool


def signals(i: int, state: int, action: int) -> Episode:
    "The same steps with a field for each number"
    e, named = episode(i, state, action), lambda block: {f"signal {k}": column for k, column in enumerate(block.T)}
    return Episode.from_arrays(state=named(e.state), nstate=named(e.nstate), action=named(e.action), reward=e.reward,
                               timestamp=e.timestamp, who=e.who)


def loading(pool: DaskPool, rounds: int) -> dict[str, float]:
    "Microseconds of loading, beside a bare read of the same columns by as many threads"
    columns = [c.name for c in columns_of(pool.schema) if c.role in pool.schema.roles or c.role == "timestamp"]
    files = sorted(Path(pool.url).glob("*.parquet"))

    def bare():
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return list(threads.map(lambda f: pq.read_table(f, columns=columns, use_threads=False).num_rows, files))

    def load():
        DaskBuffer(pool=pool, batch_size=64, resident="memory", progress=False).load()
        pool.load()
    return medians({"pyarrow, the same columns": bare, "load": load}, rounds, 1)


def selecting(pool: DaskPool, rounds: int) -> dict[str, float]:
    "Microseconds of loading all fields, and a twentieth of them"
    some = {role: [f.name for f in pool.schema.of(role)[::20]] for role in ("state", "action")}

    def load(select):
        DaskBuffer(pool=pool, batch_size=64, resident="memory", select=select, progress=False).load()
        pool.load()
    return medians({"all fields": lambda: load(None), "a twentieth": lambda: load(some)}, rounds, 1)


def drawing(pool: DaskPool, folder: Path, batch: int, rounds: int) -> dict[str, float]:
    "Microseconds of drawing a batch from rows of each kind"
    make = {"MemoryBuffer": lambda: MemoryBuffer(pool=pool, batch_size=batch, seed=0),
            **{f"DaskBuffer, {kind}": lambda kind=kind: DaskBuffer(pool=pool, batch_size=batch, seed=0, resident=kind, cache=folder, progress=False)
               for kind in ("memory", "mapped")}}
    buffers = {name: new() for name, new in make.items()}
    for buffer in buffers.values(): buffer.load()
    return medians({name: buffer.sample for name, buffer in buffers.items()}, rounds, 200)


@contextmanager
def cgroup(limit: int) -> Iterator[Optional[Path]]:
    "A cgroup of so many bytes, page cache included: the file that takes processes in; `None` where this machine lets us make none"
    root = Path("/sys/fs/cgroup")
    parent, name = (root / "memory", "memory.limit_in_bytes") if (root / "memory").is_dir() else (root, "memory.max")
    group = parent / f"data_io_nbdev-{os.getpid()}"
    try:
        group.mkdir()
        (group / name).write_text(str(limit))
        made = group / "cgroup.procs"
    except OSError: made = None
    try: yield made
    finally:
        with suppress(OSError): group.rmdir()


def anonymous(lake: Path, folder: Path) -> tuple[int, int, int, bool]:
    """Peaks of anonymous memory while loading and while drawing; the limit, a fifth of the bytes of the rows; and whether a cgroup
    of that limit and 300 MB held the process, which then was not ended for want of memory"""
    limit = int(DaskPool(lake, "r").catalogue()["bytes"].sum()) // 10  # each state counts twice there, and is kept once
    with cgroup(limit + (300 << 20)) as procs:
        done = subprocess.run([sys.executable, "-c", ANON, lake, folder, str(limit)], capture_output=True, text=True, check=True,
                              preexec_fn=procs and (lambda: procs.write_text(str(os.getpid()))))
    load, draw, nbytes, mapped = json.loads(done.stdout)
    assert mapped and nbytes > 4.9 * limit
    return load, draw, limit, procs is not None


def on_cluster(folder: Path, seconds: float) -> float:
    "Batches of 256 rows (24 + 4) a second, from two workers"
    from distributed import Client, LocalCluster
    pool = DaskPool(folder)
    pool.extend(episode(i, 24, 4) for i in range(200))
    with LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0") as cluster, Client(cluster):
        buffer = DaskBuffer(pool=pool, batch_size=256, resident="cluster", seed=0, progress=False)
        buffer.sample()
        drawn, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds: buffer.sample(); drawn += 1
        return drawn / (time.perf_counter() - began)


def after_years(folder: Path, commits: int) -> dict[str, float]:
    "Seconds of opening, of the catalogue in a fresh process, and of storing 300 steps of state 600, behind so many commits"
    pool = DaskPool(folder)
    ready = [episode(10_000 + i, 600, 68)[:300] for i in range(15)]
    first = episode(0, 600, 68)
    while pool.version < commits:
        i = pool.version
        pool.store(first[i % 1000:i % 1000 + 1] if i < 1000 else episode(i, 600, 68)[:1])
    runs = [list(map(float, subprocess.run([sys.executable, "-c", OPEN, folder], capture_output=True, text=True, check=True).stdout.split()))
            for _ in range(5)]
    took = []
    for e in ready:
        began = time.perf_counter()
        pool.store(e)
        took.append(time.perf_counter() - began)
    return {"opening": statistics.median(r[0] for r in runs), "catalogue": statistics.median(r[1] for r in runs), "store": statistics.median(took)}


def show_all(show, rounds: int) -> None:
    "Everything, on a lake in a temporary folder"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wide = stored(folder / "wide", 600, 68, 100)
        t = loading(wide, max(3, rounds // 3))
        show("Loading 100,000 steps, state 600, action 68", t, [("load / pyarrow", t["load"] / t["pyarrow, the same columns"], 2.0)])
        t = selecting(stored(folder / "signals", 600, 68, 100, signals), 3)
        show("Loading 100,000 steps, 600 fields of state, 68 of action", t, [("a twentieth / all fields", t["a twentieth"] / t["all fields"], 0.25)])
        t = drawing(wide, folder / "cache", 64, rounds)
        show("Drawing 64 rows of them", t, [("memory / MemoryBuffer", t["DaskBuffer, memory"] / t["MemoryBuffer"], 1.1),
                                            ("mapped, in the page cache / MemoryBuffer", t["DaskBuffer, mapped"] / t["MemoryBuffer"], 2.0)])
        load, draw, limit, held = anonymous(folder / "wide", folder / "fresh")
        where = "in a cgroup of that and 300 MB" if held else "NOT in a cgroup, which cannot be made here"
        show(f"Anonymous memory with memory_limit {limit >> 20} MB and five times as much data, in MB beyond it, {where}", {}, [
            ("while loading", (load - limit) / 2**20, 300), ("while drawing", (draw - limit) / 2**20, 300)])
        speed = on_cluster(folder / "narrow", 5)
        show("Rows on two workers, batches of 256 rows, state 24, action 4", {}, [("200 / batches a second", 200 / speed, 1.0)])
        took = after_years(folder / "long", 10_000 if rounds > 5 else 1000)
        show("A log of 10,000 commits" if rounds > 5 else "A log of 1,000 commits", {k: 1e6 * v for k, v in took.items()}, [
            ("opening / 0.5 s", took["opening"] / 0.5, 1.0), ("catalogue / 1 s", took["catalogue"], 1.0),
            ("storing 300 steps of state 600 / 50 ms", took["store"] / 0.05, 1.0)])
