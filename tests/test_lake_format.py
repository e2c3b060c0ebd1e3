"""A lake that an earlier version wrote stays readable, and takes more. `python tests/test_lake_format.py` writes the sample of a new format."""
import json
import shutil

from data_io_nbdev import DaskPool
from data_io_nbdev.testing import drive, facts_of
from test_memory_file import DATA, everything, fill

SAMPLE, EXPECTED = DATA / "lake-format-1", DATA / "lake-format-1.json"


def test_sample(tmp_path):
    "Every version of it is read as it was written; a copy can be written to, compacted and repaired, and old versions stay"
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
    shutil.copytree(SAMPLE, tmp_path / "lake")
    pool = DaskPool(tmp_path / "lake")
    assert everything(pool) == everything(DaskPool(SAMPLE, "r")) == expected and pool.verify() == []
    new = drive(hour=9)
    pool.store(new)
    assert pool.compact() > 1 and pool.repair() == [] == pool.verify() and facts_of(pool.find(new.id)) == facts_of([new])
    assert everything(DaskPool(tmp_path / "lake").snapshot(expected["version"])) == expected


if __name__ == "__main__":
    made = fill(DaskPool(SAMPLE))
    made.compact()
    made.store(drive(7, hour=12))
    EXPECTED.write_text(json.dumps(everything(made), ensure_ascii=False, indent=1), encoding="utf-8")
