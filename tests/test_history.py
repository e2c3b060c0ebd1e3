"""What came and went with each version: the contract says it of every back-end, and here are lakes over the years, rings, files and sequences."""
import numpy as np
import pandas as pd
import pytest

from data_io_nbdev import MemoryBuffer, MemoryPool, open_pool
from data_io_nbdev.errors import SnapshotNotFound
from data_io_nbdev.testing import drive


def holds(pool):
    "Episodes and steps at each version that can be read, by the catalogues of snapshots"
    tables = {n: pool.snapshot(n).catalogue() for n in range(max(1, pool._oldest()), pool.version + 1)}
    return {n: (len(table), int(table["seq_len"].sum())) for n, table in tables.items()}


def check(pool):
    "A history, which agrees with every snapshot"
    table = pool.history()
    assert dict(zip(table.index, zip(table.episodes, table.steps))) == holds(pool)
    for what in ("episodes", "steps"):
        change = (table[f"new_{what}"] - table[f"gone_{what}"]).iloc[1:]
        assert change.tolist() == table[what].diff().iloc[1:].tolist()
    return table


@pytest.mark.parametrize("kind", ["lake", "pool.npz"])
def test_any_sequence(tmp_path, kind):
    "After stores, parts, replacements, deletions, compactions and units it agrees with the snapshots, in a pool that is opened anew as well"
    if kind == "lake": pytest.importorskip("deltalake")
    rng, pool = np.random.default_rng(4), open_pool(tmp_path / kind)
    begun = pd.Timestamp.now("UTC").floor("ms")
    for _ in range(30):
        whole, there = drive(12, hour=int(rng.integers(6))), list(pool.catalogue().index)
        step = int(rng.integers(4))
        if step == 0 and there: pool.delete(there[:2])
        elif step == 1: pool.store(drive(int(rng.integers(1, 12)), hour=int(rng.integers(6)), seed=int(rng.integers(99))), overwrite=True)
        elif whole.id not in there: pool.extend([whole[:5], drive(3, hour=7 + rng.integers(9))] if step == 2 else [whole])
    pool.set_units({"slope": "rad"})
    if kind == "lake": pool.compact()
    table = check(pool)
    assert table.note.tolist().count("units were given") == 1
    if kind == "lake":
        assert table.time.between(begun, pd.Timestamp.now("UTC")).all() and table.moved_steps.iloc[-1] > 0
    pool.close()
    with open_pool(tmp_path / kind, "r") as again: assert again.history().equals(table)


def test_versions_that_were_given_up(tmp_path):
    "After a vacuum their rows are gone, those behind them are as before, and an older snapshot says so"
    pytest.importorskip("deltalake")
    lake = open_pool(tmp_path)
    for hour in range(4): lake.store(drive(hour=hour))
    old = lake.snapshot(2)
    lake.delete(drive(hour=0).id)
    lake.compact()
    before = lake.history()
    lake.vacuum("0s", dry_run=False)
    after = check(lake)
    assert after.iloc[:-1].equals(before.loc[after.index[0]:]) and after.index[0] == 6 and after.note.iloc[-1] == "versions before 6 were given up"
    with pytest.raises(SnapshotNotFound): old.history()


def test_a_log_in_columns(tmp_path, monkeypatch):
    "A lake that keeps its log in columns, in which commits come in runs, has the same history, with a time for each"
    pytest.importorskip("deltalake")
    from data_io_nbdev.storage.pool import delta
    monkeypatch.setattr(delta, "_LOOSE", 5)
    lake = open_pool(tmp_path)
    for hour in range(40): lake.store(drive(1 + hour % 3, hour=hour))
    lake.repair(dry_run=False)
    assert list(tmp_path.glob("_history/*.arrow"))
    again = open_pool(tmp_path, "r")
    assert len(again)
    table = check(again)
    assert table.new_steps.tolist() == [1 + hour % 3 for hour in range(40)] and table.time.notna().all()


def test_a_ring(tmp_path):
    "A ring's history begins with the oldest version that it can still read"
    buffer = MemoryBuffer(batch_size=4, capacity=20)
    for hour in range(10): buffer.store(drive(6, hour=hour))
    table = buffer.pool.history()
    assert table.index.tolist() == [*range(max(1, buffer.pool._oldest()), 11)]
    assert table.iloc[-1][["episodes", "steps"]].tolist() == buffer.pool.summary().iloc[0][["episodes", "steps"]].tolist()
