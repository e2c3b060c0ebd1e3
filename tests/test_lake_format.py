"""A lake that an earlier version wrote stays readable, and takes more. `python tests/test_lake_format.py` writes the sample of a new format."""
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from data_io_nbdev import DaskPool
from data_io_nbdev.storage.pool.delta import FORMAT
from data_io_nbdev.testing import drive, facts_of
from test_memory_file import DATA, everything, fill

SAMPLE = DATA / "lake-format-1"


@pytest.mark.parametrize("format", range(1, FORMAT + 1))
def test_sample(tmp_path, format):
    "Every version of it is read as it was written; a copy can be written to, compacted and repaired, and old versions stay"
    sample = DATA / f"lake-format-{format}"
    expected = json.loads(sample.with_suffix(".json").read_text(encoding="utf-8"))
    shutil.copytree(sample, tmp_path / "lake")
    pool = DaskPool(tmp_path / "lake")
    assert everything(pool) == everything(DaskPool(sample, "r")) == expected and pool.verify() == []
    new = drive(hour=9)
    pool.store(new)
    assert pool.compact() > 1 and pool.repair() == [] == pool.verify() and facts_of(pool.find(new.id)) == facts_of([new])
    assert everything(DaskPool(tmp_path / "lake").snapshot(expected["version"])) == expected


def test_own_commits_need_not_be_read(tmp_path):
    "What a handle knows of its own commits is what others read of them: numbers that are none, places, deletes and parts"
    odd = [np.nan, np.inf, -0.0, 1e-300, 0.1]
    pool = DaskPool(tmp_path / "lake")
    for hour, reward in enumerate(odd):
        e = drive(6, hour=hour)
        e = replace(e, blocks={**e.blocks, "reward": np.full_like(e.blocks["reward"], reward)})
        pool.extend([e[:2], drive(3, hour=hour + 50)])
        pool.store(e[2:])
        if hour % 2: pool.delete(drive(3, hour=hour + 50).id)
    pool.compact()
    pool.store(drive(hour=99))
    def told(pool): return [repr(part) for part in pool._catch_up(pool.version).every_part()]
    assert told(pool) == told(DaskPool(pool.url, "r")) and pool.catalogue().equals(DaskPool(pool.url, "r").catalogue())


if __name__ == "__main__":
    new = DATA / f"lake-format-{FORMAT}"
    made = fill(DaskPool(new))
    made.compact()
    made.store(drive(7, hour=12))
    new.with_suffix(".json").write_text(json.dumps(everything(made), ensure_ascii=False, indent=1), encoding="utf-8")
