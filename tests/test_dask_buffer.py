"""`DaskBuffer` keeps every promise of a buffer wherever its rows are: in memory, on disk, on a cluster of two processes."""
from dataclasses import dataclass
from pathlib import Path

import pytest

from data_io_nbdev.storage.buffer.dask import DaskBuffer
from data_io_nbdev.testing import BatchesOfBuffers, BufferContract, LakeHarness, Refreshing, RowsOfQueries, SameDraws

distributed = pytest.importorskip("distributed")


@dataclass(kw_only=True, eq=False)
class Mapped(DaskBuffer):
    resident: str = "mapped"


@dataclass(kw_only=True, eq=False)
class OnCluster(DaskBuffer):
    resident: str = "cluster"
    prefetch: int = 3


class MappedHarness(LakeHarness): buffer = Mapped


class ClusterHarness(LakeHarness): buffer = OnCluster


@pytest.fixture(scope="module")
def cluster():
    "Two worker processes, on this machine only"
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address=None) as cluster:
        yield cluster


@pytest.fixture
def client(cluster):
    with distributed.Client(cluster) as client: yield client


class TestMapped(BufferContract):
    @pytest.fixture
    def harness(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # other processes unpickle `Mapped`
        (tmp_path / "place").mkdir()
        return MappedHarness(tmp_path / "place")


class TestReadByWorkers(BatchesOfBuffers, RowsOfQueries, Refreshing, SameDraws):
    @pytest.fixture
    def harness(self, tmp_path, client): return LakeHarness(tmp_path)


class TestOnCluster(BufferContract):
    @pytest.fixture
    def harness(self, tmp_path, client): return ClusterHarness(tmp_path)

    test_interpreter_exit = None  # a client belongs to its process, so another one has none
