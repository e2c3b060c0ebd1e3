"""A pool in an object store keeps the promises of every pool, and those that only an object store puts to the test.

The store is moto's, in a process of its own: `deltalake` holds Python's lock while it waits for some of the answers, so that
a server in this process could never give them. It says what it was asked for, and refuses or loses answers when it is told to.
"""
import gzip
import importlib.util
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.request
import warnings
from dataclasses import replace

import pytest
from hypothesis import given

missing = [name for name in ("moto", "boto3", "flask", "flask_cors") if importlib.util.find_spec(name) is None]
if missing:
    reason = f"pools in an object store are NOT tested: {', '.join(missing)} not installed; pip install moto flask flask-cors"
    if os.environ.get("CI"): pytest.fail(reason, pytrace=False)
    warnings.warn(reason)
    pytest.skip(reason, allow_module_level=True)

import boto3
import deltalake
import polars as pl

import data_io_nbdev.storage.pool.delta as delta
from data_io_nbdev.data.core import PoolQuery
from data_io_nbdev.errors import CorruptData, PoolNotFound, PoolUnavailable, QueryError, ReadOnly, SchemaError, SnapshotNotFound
from data_io_nbdev.storage.pool.dask import DaskPool, write_files
from data_io_nbdev.storage.pool.delta import RemoteLake
from data_io_nbdev.storage.pool.pool import open_pool
from data_io_nbdev.testing import at_once, bits, by_start, drive, facts, facts_of, histories, python, stored, unchanged
from data_io_nbdev.testing.harness import LakeHarness, examples
from data_io_nbdev.testing.pools import (Catalogue, Choices, Conflicts, Copies, Damage, Deleting, Handles, LostRaces,
                                         Overwriting, Past, ReadOnlyPools, RoundTrip)

SECRET, BUCKET = "secret-key-value", "fleet"

SERVER = """
import json, logging, re, socket, sys, threading
from moto.server import create_backend_app
from werkzeug.serving import make_server
logging.getLogger("werkzeug").disabled = True
app, lock, faults, seen = create_backend_app("s3"), threading.Lock(), [], []
pair = threading.Barrier(2)

def serve(environ, start):
    what = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
    if any(f["status"] == "meet" and re.search(f["what"], what) for f in faults):
        try: pair.wait(2)
        except threading.BrokenBarrierError: pair.reset()
    with lock:  # moto looks whether a key is there, and then puts it
        if what == "POST /_control":
            faults[:], answer = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))), json.dumps(seen).encode()
            seen.clear()
            start("200 OK", [("Content-Length", str(len(answer)))])
            return [answer]
        seen.append(what)
        fault = next((f for f in faults if f["times"] and f["status"] != "meet" and re.search(f["what"], what)), None)
        if fault: fault["times"] -= 1
        if fault and fault["status"]:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(fault["status"], [("Content-Length", "0")])
            return [b""]
        said = []
        answer = b"".join(app(environ, lambda *head: said.append(head)))
        if fault: environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)  # done, and nobody hears of it
        start(*said[-1])
        return [answer]

server = make_server("127.0.0.1", 0, serve, threaded=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(server.server_port, flush=True)
sys.stdin.read()  # until the tests are over, however they end
"""


def fault(what: str, status: str = "", times: int = 1) -> dict:
    "Requests that are refused with a status, or done without an answer, or that wait for another one (`meet`)"
    return dict(what=what, status=status, times=times)


COMMIT = r"PUT .*/_delta_log/\d+\.json$"


class Store:
    "An S3 server, and what a test needs to know of it"
    def __init__(self, port: int):
        self.url = f"http://127.0.0.1:{port}"
        self.options = dict(AWS_ENDPOINT_URL=self.url, AWS_ALLOW_HTTP="true", AWS_ACCESS_KEY_ID="key-id", AWS_SECRET_ACCESS_KEY=SECRET,
                            AWS_REGION="us-east-1", AWS_CONDITIONAL_PUT="etag")
        self.client = boto3.client("s3", endpoint_url=self.url, region_name="us-east-1", aws_access_key_id="key-id",
                                   aws_secret_access_key=SECRET)
        self.client.create_bucket(Bucket=BUCKET)

    def control(self, *faults: dict) -> list[str]:
        "Set the faults to come; gives what the server was asked for since the last time"
        request = urllib.request.Request(f"{self.url}/_control", data=json.dumps(faults).encode())
        with urllib.request.urlopen(request, timeout=30) as answer: return json.loads(answer.read())

    def keys(self, prefix: str) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [found["Key"] for page in pages for found in page.get("Contents", ())]

    def get(self, key: str) -> bytes: return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
    def put(self, key: str, content: bytes) -> None: self.client.put_object(Bucket=BUCKET, Key=key, Body=content)


class S3Harness(LakeHarness):
    "A `DaskPool` in a bucket; what is stored there is looked at in a copy on the disk"
    store: Store

    @property
    def key(self) -> str: return f"{self.folder.as_posix().strip('/')}/lake/"
    @property
    def url(self) -> str: return f"s3://{BUCKET}/{self.key.rstrip('/')}"

    def open(self, mode: str = "a", **options) -> DaskPool: return open_pool(self.url, mode, **options)
    def names(self) -> list[str]: return [key.removeprefix(self.key) for key in self.store.keys(self.key)]

    def raw_numbers(self, pool):
        return sorted(int(n[11:-5]) for n in self.names() if n.startswith("_delta_log/0") and n.endswith(".json") and int(n[11:-5]))

    def raw_steps(self, pool):
        self._download()
        return super().raw_steps(pool)

    def raw_steal(self, pool) -> None: self.entry(len(self.raw_numbers(pool)) + 1)

    def raw_damage(self, pool, id: str) -> None:
        before = self._download()
        super().raw_damage(pool, id)
        for name, content in before.items():
            if (now := (self.lake / name).read_bytes()) != content: self.store.put(self.key + name, now)

    def entry(self, number: int) -> None:
        "A valid, empty commit"
        self.store.put(f"{self.key}_delta_log/{number:020d}.json", json.dumps({"commitInfo": {"operation": "NOTHING"}}).encode())

    def _download(self) -> dict[str, bytes]:
        shutil.rmtree(self.lake, ignore_errors=True)
        found = {name: self.store.get(self.key + name) for name in self.names()}
        for name, content in found.items():
            (self.lake / name).parent.mkdir(parents=True, exist_ok=True)
            (self.lake / name).write_bytes(content)
        return found


@pytest.fixture(scope="session")
def store():
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try: yield Store(int(process.stdout.readline()))
    finally:
        process.stdin.close()
        process.stdout.close()
        try: process.wait(10)
        except subprocess.TimeoutExpired: process.kill()


@pytest.fixture
def harness(store, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("AWS_")]: monkeypatch.delenv(name)
    for name, value in store.options.items(): monkeypatch.setenv(name, value)
    monkeypatch.setattr(S3Harness, "store", store, raising=False)
    yield S3Harness(tmp_path)
    store.control()


def columns_fit(harness: S3Harness, pool: DaskPool) -> bool:
    "Whether the table has the columns that its rows have"
    table = deltalake.DeltaTable(harness.url, storage_options=harness.store.options)
    return [f.name for f in table.schema().fields] == [c.name for c in delta.columns_of(pool.schema)]


def other_schema(**kwargs):
    "An episode that fits another schema than `drive`'s"
    e = drive(**kwargs)
    return replace(e, schema=replace(e.schema, identity=["vehicle", "pilot"]), who={"vehicle": "VB7", "pilot": "anna"})


# --- what every pool promises ---

class TestPromises(Deleting, Past, LostRaces, Handles, ReadOnlyPools, Damage, Overwriting):
    "Those promises of a pool whose tests need no hundreds of pools"
    test_delete_and_store_again = test_idempotence = None  # long, and nothing in them depends on the store


class TestMorePromises:
    test_containers = RoundTrip.test_containers
    test_round_trip = examples(3)(given(history=histories())(RoundTrip.test_round_trip.hypothesis.inner_test))
    test_all_or_nothing = Conflicts.test_all_or_nothing
    test_copy_some = Copies.test_copy_some

    def test_other_steps(self, harness): Conflicts().test_other_steps(harness, "nstate", 3)


# --- commits ---

WRITER = "import pickle, sys; pool, episodes = pickle.load(sys.stdin.buffer); [pool.store(e) for e in episodes]"


class TestRaces:
    def check(self, harness, pool, right):
        for again in (pool, harness.open()):
            assert facts_of(again) == facts_of(by_start(right)) and again.version == len(right)
        assert harness.raw_numbers(pool) == list(range(1, len(right) + 1))
        for entry in pool._lake.entries(0, pool.version): assert {p.version for p in entry.commit.put} == {entry.commit.number}
        assert pool.verify() == [] and columns_fit(harness, pool)

    def test_threads(self, harness):
        "Handles that write at once: each commit has a number of its own, and nothing is lost or there twice"
        pools = [harness.open() for _ in range(3)]
        pools[0].store(drive(hour=9))
        def write(k: int):
            for h in range(2):
                for driver in (f"d{k}", "everybody"): pools[k].store(drive(hour=h, driver=driver))
        at_once(*[lambda k=k: write(k) for k in range(3)])
        self.check(harness, pools[0], [
            *(drive(hour=h, driver=d) for h in range(2) for d in ("d0", "d1", "d2", "everybody")), drive(hour=9)])

    def test_processes(self, harness):
        "The same for processes"
        pool = harness.open()
        pool.store(drive(hour=9))
        mine = [[drive(hour=k), drive(hour=8), drive(hour=k, driver="bo")] for k in range(3)]
        at_once(*[lambda k=k: python(WRITER, (pool, mine[k])) for k in range(3)])
        self.check(harness, pool, [*(drive(hour=h, driver=d) for h in range(3) for d in ("anna", "bo")), drive(hour=8), drive(hour=9)])

    def test_threads_share_a_handle(self, harness, monkeypatch):
        "A commit gets the number for which it was decided, or none; whatever other threads do with the pool meanwhile"
        pool, rival, transact = harness.open(), harness.open(), delta._transact
        pool.store(drive(hour=0))
        def late(*args):
            monkeypatch.setattr(delta, "_transact", transact)
            rival.store(drive(hour=1))
            look = threading.Thread(target=lambda: pool.version, daemon=True)
            look.start()
            look.join(0.5)  # it may have to wait for this commit
            return transact(*args)
        monkeypatch.setattr(delta, "_transact", late)
        pool.store(drive(hour=2))
        at_once(*[lambda k=k: [pool.store(drive(hour=h, driver=f"d{k}")) for h in range(2)] for k in range(3)])
        right = [*(drive(hour=h, driver=f"d{k}") for h in range(2) for k in range(3)), *(drive(hour=h) for h in range(3))]
        self.check(harness, pool, right)


class TestCreation:
    @pytest.mark.parametrize("others", [drive, other_schema])
    def test_at_once(self, harness, others):
        "Of those that make a table at once all store, or, where their schemas differ, one does and the others are told"
        pools, items = [harness.open() for _ in range(2)], [drive(hour=0), others(hour=1)]
        harness.store.control(fault(r"PUT .*/_delta_log/0*\.json$", "meet"))
        def write(k: int):
            try: return bool(pools[k].store(items[k]))
            except SchemaError: return False
        done = at_once(*[lambda k=k: write(k) for k in range(2)])
        harness.store.control()
        right = [e for e, is_done in zip(items, done) if is_done]
        assert facts_of(harness.open()) == facts_of(right) and harness.open().version == len(right)
        assert len(right) == (2 if others is drive else 1) and columns_fit(harness, harness.open())

    def test_a_table_that_another_made(self, harness):
        "A writer died, or is slow, between making the table and its first commit: the columns are those of the rows"
        slow, pool = harness.open(), harness.open()
        slow._lake.create(drive().schema)
        try: pool.store(other_schema())
        except SchemaError: slow.store(drive())
        assert columns_fit(harness, harness.open())

    def test_looking_makes_nothing(self, harness):
        "Whoever only looks makes no table"
        with pytest.raises(PoolNotFound): harness.open("r")
        assert (harness.open().version, len(harness.open())) == (0, 0) and harness.names() == []

    def test_no_pool(self, harness):
        "A table that is no pool is refused"
        deltalake.write_deltalake(harness.url, pl.DataFrame({"x": [1]}).to_arrow(), storage_options=harness.store.options)
        for mode in ("a", "r"):
            with pytest.raises(SchemaError, match="no pool"): harness.open(mode)


class TestAnswers:
    "A store that answers late, not at all, or with a refusal"
    @pytest.fixture
    def pool(self, harness):
        pool = harness.open()
        pool.extend([drive(hour=0), drive(hour=1)])
        return pool

    def check(self, harness, pool, right):
        for again in (pool, harness.open()): assert facts_of(again) == facts_of(right)
        assert pool.version == 2 == len(harness.raw_numbers(pool)) and pool.verify() == []

    def test_recognised(self, harness, pool, monkeypatch):
        "A commit that was done, although `deltalake` says that it failed, is recognised by its token"
        transact = delta._transact
        def lose(*args):
            transact(*args)
            monkeypatch.setattr(delta, "_transact", transact)
            raise deltalake.exceptions.DeltaError("the answer got lost")
        monkeypatch.setattr(delta, "_transact", lose)
        pool.store(drive(hour=2))
        self.check(harness, pool, [drive(hour=h) for h in range(3)])

    @pytest.mark.parametrize("what", ["store", "delete"])
    def test_lost(self, harness, pool, what):
        "A commit whose answer got lost is done once"
        harness.store.control(fault(COMMIT))
        if what == "store": pool.store(drive(hour=2))
        else: pool.delete(drive(hour=1).id)
        assert len([r for r in harness.store.control() if r.endswith("2.json") and "PUT" in r]) == 2
        self.check(harness, pool, [drive(hour=0), *([drive(hour=1), drive(hour=2)] if what == "store" else [])])

    @pytest.mark.parametrize("what", ["delete", "overwrite", "compact"])
    def test_unknown(self, harness, pool, what):
        "Whoever is told that a commit failed, although it was done, loses no steps"
        right = {"delete": [drive(hour=1)], "overwrite": [drive(3, seed=1), drive(hour=1)],
                 "compact": [drive(hour=h) for h in range(3)]}[what]
        if what == "compact": pool.store(drive(hour=2))
        harness.store.control(fault(COMMIT), fault(COMMIT, "403 Forbidden"))  # it was done; then the keys expire
        try:
            if what == "delete": pool.delete(drive(hour=0).id)
            elif what == "overwrite": pool.store(drive(3, seed=1), overwrite=True)
            else: pool.compact()
        except PoolUnavailable: pass
        harness.store.control()
        for again in (pool, harness.open()): assert facts_of(again) == facts_of(right) and again.verify() == []

    @pytest.mark.parametrize("what", [r"\.parquet$", COMMIT, "."])
    def test_refused(self, harness, pool, what):
        "What is refused raises `PoolUnavailable`, and leaves the pool as it was; afterwards the same call stores"
        before = stored(harness, pool)
        for call in (lambda: pool.store(drive(hour=2)), lambda: pool.delete(drive(hour=0).id)):
            harness.store.control(fault(what, "403 Forbidden", times=1000))
            with pytest.raises(PoolUnavailable): call()
            harness.store.control()
            assert stored(harness, pool) == before
        pool.store(drive(hour=2))
        self.check(harness, pool, [drive(hour=h) for h in range(3)])

    def test_failed(self, harness, pool, monkeypatch):
        "So does an error of `deltalake` before the commit"
        def fail(*args): raise deltalake.exceptions.DeltaError("no")
        with monkeypatch.context() as patch:
            patch.setattr(delta, "_transact", fail)
            with unchanged(harness, pool, PoolUnavailable, match="commit 2 failed"): pool.store(drive(hour=2))
        pool.store(drive(hour=2))
        self.check(harness, pool, [drive(hour=h) for h in range(3)])

    @pytest.mark.parametrize("call", ["find", "verify", "compact"])
    def test_unread(self, harness, pool, call):
        "A file that cannot be reached, or only to its middle, is not damaged for that"
        pool.store(drive(hour=2))
        for what in (r"HEAD .*\.parquet$", r"GET .*\.parquet$"):
            harness.store.control(fault(what, "403 Forbidden", times=1000))
            with pytest.raises(PoolUnavailable): list(pool.find()) if call == "find" else getattr(pool, call)()
            harness.store.control()
        self.check(harness, pool, [drive(hour=h) for h in range(3)])

    def test_unlisted(self, harness, pool):
        "Upkeep that cannot see the files says that the pool cannot be reached"
        for call in (pool.repair, lambda: pool.vacuum("0s")):
            harness.store.control(fault(rf"GET /{BUCKET}$", "403 Forbidden", times=1000))
            with pytest.raises(PoolUnavailable): call()
            harness.store.control(fault(rf"GET /{BUCKET}$", "403 Forbidden", times=1000))
            with pytest.raises(PoolUnavailable): pool._lake.listing()


# --- the log ---

def grow(harness: S3Harness, pool: DaskPool, upto: int) -> None:
    "Commits up to a number; the last one stores something"
    for number in range(pool.version + 1, upto): harness.entry(number)
    pool.store(drive(hour=upto))
    assert pool.version == upto


class TestLog:
    def test_segments(self, harness, monkeypatch):
        "Every so many commits are put together in one file, and a pool that is opened reads that instead of each of them"
        monkeypatch.setattr(delta, "_INTERVAL", 30)
        pool = harness.open()
        for number in (1, 30, 60, 62): grow(harness, pool, number)
        for last in (30, 60):
            head, *lines = gzip.decompress(harness.store.get(f"{harness.key}_history/{last:020d}.json.gz")).splitlines()
            assert len(lines) == 30 and json.loads(head.partition(b" ")[2])["last"] == last
            for number, line in enumerate(lines, last - 29):
                assert [a.get("commitInfo") for a in json.loads(line)] == [
                    {k: v for k, v in a["commitInfo"].items() if k in (delta._FACTS, "operation")}
                    if delta._FACTS not in a["commitInfo"] else {delta._FACTS: a["commitInfo"][delta._FACTS]}
                    for a in pool._lake.actions(number)[:1]]
        right, read, lake = facts_of(drive(hour=h) for h in (1, 30, 60, 62)), [], RemoteLake.read
        monkeypatch.setattr(RemoteLake, "read", lambda self, path: read.append(path) or lake(self, path))
        again = harness.open()
        assert facts_of(again) == right
        assert sorted(read) == ["_delta_log/00000000000000000000.json", "_delta_log/00000000000000000061.json",
                                "_delta_log/00000000000000000062.json", *(f"_history/{n - 29:020d}-{n:020d}.arrow" for n in (30, 60))]
        for damage in (b"", harness.store.get(f"{harness.key}_history/{30:020d}.json.gz")[:-9]):
            harness.store.put(f"{harness.key}_history/{60:020d}.json.gz", damage)
            harness.store.put(f"{harness.key}_history/{31:020d}-{60:020d}.arrow", damage)
            assert facts_of(harness.open()) == right, "a segment that is damaged is not needed"
        grow(harness, pool, 90)
        assert len(gzip.decompress(harness.store.get(f"{harness.key}_history/{60:020d}.json.gz")).splitlines()) == 31, "nor does it stay"

    def test_checkpoint(self, harness, monkeypatch):
        "Who opens a pool with many commits reads a few files, whether with this package or with another one"
        monkeypatch.setattr(delta, "_INTERVAL", 30)
        pool = harness.open()
        for number in (1, 30, 60, 62): grow(harness, pool, number)
        assert f"_delta_log/{60:020d}.checkpoint.parquet" in harness.names()
        harness.store.control()
        table = deltalake.DeltaTable(harness.url, storage_options=harness.store.options)
        assert table.version() == 62 and len(table.file_uris()) == 4
        assert len(harness.store.control()) < 20
        assert facts_of(harness.open()) == facts_of(pool)
        assert len([r for r in harness.store.control() if r.endswith(".json")]) < 20

    def test_other_engines(self, harness):
        "An entry that another engine wrote is taken in; rows of its own are refused; what was before stays readable"
        pool = harness.open()
        pool.store(drive())
        table = deltalake.DeltaTable(harness.url, storage_options=harness.store.options)
        table.optimize.compact()
        table.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
        pool.store(drive(hour=1))
        assert facts_of(harness.open()) == facts_of(drive(hour=h) for h in range(2))
        version = pool.version
        deltalake.write_deltalake(harness.url, pl.read_delta(harness.url, storage_options=harness.store.options).head(1).to_arrow(),
                                  mode="append", storage_options=harness.store.options)
        with pytest.raises(SchemaError, match=f"commit {version + 1}, "): list(pool)
        assert facts_of(pool.snapshot(version)) == facts_of(drive(hour=h) for h in range(2))


# --- upkeep ---

class TestUpkeep:
    def test_upkeep(self, harness):
        "Files are merged, given up and tidied away; every version that is left reads as before"
        pool = harness.open()
        for h in range(4): pool.store(drive(hour=h))
        pool.delete(drive(hour=3).id)
        right, then = facts_of(drive(hour=h) for h in range(3)), facts_of(pool.snapshot(4))
        parquet = lambda: [name for name in harness.names() if name.endswith(".parquet")]
        assert pool.compact() == 3 and pool.compact() == 0 and len(parquet()) == 5
        assert facts_of(pool) == right and facts_of(pool.snapshot(4)) == facts_of(harness.open().snapshot(4)) == then
        assert len(pool.vacuum("0s")) == 4 and len(parquet()) == 5 and pool.vacuum("1D") == []
        assert len(pool.vacuum("0s", dry_run=False)) == 4 and len(parquet()) == 1
        for again in (pool, harness.open()):
            assert facts_of(again) == right and again.verify() == []
            with pytest.raises(SnapshotNotFound): again.snapshot(4)
        with pytest.raises(ReadOnly): harness.open("r").vacuum("0s", dry_run=False)

    def test_repair(self, harness):
        "What a dead writer left is found, and removed once it is old enough"
        pool = harness.open()
        pool.store(drive())
        before = harness.names()
        write_files(pool._lake, "0" * 32, [(next(pool._catch_up(1).every_part()), drive())])
        harness.store.put(f"{harness.key}{'1' * 32}-0.parquet", b"called like one of the pool's")
        before = sorted([*before, f"{'1' * 32}-0.parquet"])
        assert pool.repair() == [] and pool.verify() == []
        old = harness.open(grace="1us")
        time.sleep(0.01)
        assert len(old.repair()) == 1 and len(harness.names()) == len(before) + 1
        assert len(old.repair(dry_run=False)) == 1 and sorted(harness.names()) == before
        assert facts_of(harness.open()) == facts_of([drive()])

    def test_late(self, harness):
        "Steps that waited too long for their commit are refused: a `repair` elsewhere may have removed them"
        pool, late = harness.open(), harness.open(grace="1us")
        pool.store(drive())
        with unchanged(harness, pool, PoolUnavailable, match="store them again"): late.store(drive(hour=1))

    def test_verify(self, harness):
        "A file that is damaged, or gone, is named"
        pool = harness.open()
        for h in range(3): pool.store(drive(hour=h))
        first, second = [entry.files[0].path for entry in pool._lake.entries(0, 2)]
        content = bytearray(harness.store.get(harness.key + first))
        content[4] ^= 1
        harness.store.put(harness.key + first, bytes(content))
        harness.store.client.delete_object(Bucket=BUCKET, Key=harness.key + second)
        lines = pool.verify()
        assert [e.id for h in range(2) if (e := drive(hour=h)).id in lines[h]] == [drive(hour=h).id for h in range(2)] and len(lines) == 2
        assert second in lines[1]
        with pytest.raises(CorruptData, match=drive(hour=1).id): harness.open()[drive(hour=1).id]
        assert harness.open()[drive(hour=2).id] == drive(hour=2)


class TestOtherTools:
    def test_rows(self, harness):
        "`deltalake` and Polars read the rows that the pool has"
        pool = harness.open()
        for h in range(3): pool.store(drive(4 + h, hour=h))
        pool.delete(drive(5, hour=1).id)
        pool.store(drive(9, hour=2))
        right = sorted((e.id, int(t), float(r)) for e in pool for t, r in zip(e.times, e.reward))
        assert len(right) == 13
        lazy = pl.scan_delta(harness.url, storage_options=harness.store.options)
        frame = lazy.select("episode", pl.col("timestamp").dt.epoch("us"), "reward_work").collect()
        assert sorted(frame.rows()) == right
        early = lazy.filter(pl.col("episode") == drive().id).select("step").collect()["step"].to_list()
        assert sorted(early) == [0, 1, 2, 3]
        table = deltalake.DeltaTable(harness.url, storage_options=harness.store.options)
        rows = table.to_pyarrow_table(columns=["episode", "timestamp", "reward_work"]).to_pylist()
        assert sorted((r["episode"], int(r["timestamp"].timestamp() * 1_000_000), r["reward_work"]) for r in rows) == right
        assert table.version() == pool.version and columns_fit(harness, pool)
        table.load_as_version(3)
        assert table.to_pyarrow_table().num_rows == sum(map(len, pool.snapshot(3))) == 15


# --- a store that is not there ---

def silent(*things) -> bool:
    "Whether the secret key is in nothing that people or other processes get to see"
    texts = [t for thing in things for t in (str(thing), repr(thing))]
    texts += ["".join(traceback.format_exception(e)) for e in things if isinstance(e, BaseException)]
    return not any(SECRET in text for text in texts)


class TestKeys:
    def test_options(self, harness, monkeypatch):
        "Keys that were given stay in this process; where there are none in the environment, that is said"
        for name in harness.store.options: monkeypatch.delenv(name)
        pool = harness.open(storage_options=harness.store.options)
        pool.store(drive())
        assert facts_of(harness.open("r", storage_options=harness.store.options)) == facts_of([drive()])
        views = [pool, pool.snapshot(1), pool._lake, harness.open("r", storage_options=harness.store.options)]
        assert silent(*views) and not any(SECRET.encode() in pickle.dumps(view) for view in views)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("AWS_ENDPOINT_URL", harness.store.url)
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        with pytest.raises(PoolUnavailable) as e: pickle.loads(pickle.dumps(pool))
        assert silent(e.value)
        for name, value in harness.store.options.items(): monkeypatch.setenv(name, value)
        assert facts_of(pickle.loads(pickle.dumps(pool))) == facts_of([drive()])

    def test_refusals(self, harness, monkeypatch):
        "No error says the secret key"
        pool = harness.open(storage_options=harness.store.options)
        pool.store(drive())
        harness.store.control(fault(".", "403 Forbidden", times=1000))
        for call in (lambda: pool.store(drive(hour=1)), pool.count, pool.repair, lambda: harness.open(), lambda: harness.open("r")):
            with pytest.raises(PoolUnavailable) as e: call()
            assert silent(e.value)

    def test_unreachable(self, harness):
        "Where nobody answers, that is said before long"
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))  # and nobody listens
            options = {**harness.store.options, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{taken.getsockname()[1]}"}
            begin = time.monotonic()
            with pytest.raises(PoolUnavailable, match="fleet") as e: harness.open(storage_options=options)
            assert time.monotonic() - begin < 30 and silent(e.value)

    def test_mute(self, harness):
        "The same for a server that takes requests and never answers"
        with socket.create_server(("127.0.0.1", 0)) as mute:
            options = {**harness.store.options, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{mute.getsockname()[1]}", "timeout": "1s",
                       "max_retries": "1", "retry_timeout": "3s"}
            begin = time.monotonic()
            with pytest.raises(PoolUnavailable) as e: harness.open(storage_options=options)
            assert time.monotonic() - begin < 20 and silent(e.value)

    def test_a_bucket_that_is_not_there(self, harness):
        "A bucket that does not exist is no empty pool"
        for mode in ("r", "a"):
            with pytest.raises(PoolUnavailable, match="NoSuchBucket"): DaskPool("s3://nobucket/lake", mode)

    def test_mistakes(self, harness):
        "A URL or an option that cannot be is a mistake of the caller, and said so"
        options = harness.store.options
        for url, more in (("s4://fleet/lake", {}), ("s3://", {}), (harness.url, {"timeout": "soon"}), (harness.url, {"timeout": 3})):
            with pytest.raises(QueryError) as e: DaskPool(url, storage_options={**options, **more})
            assert silent(e.value)


FORK = """
import os, pickle, sys, traceback
from data_io_nbdev.errors import PoolUnavailable
pool = pickle.load(sys.stdin.buffer)
assert pool.count() == 1
sys.stdout.flush()
if not (child := os.fork()):
    said = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for call in (lambda: pool.version, lambda: list(pool), lambda: type(pool)(pool.url), lambda: pool._lake.read("_delta_log/0.json")):
        try: call()
        except PoolUnavailable as e: os.write(said, b"told " if "fork" in str(e) and "spawn" in str(e) else b"untold ")
        except BaseException as e: os.write(said, type(e).__name__.encode() + b" ")
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(pool.count())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork(harness):
    "`deltalake` cannot work in a forked child; the child is told so, and the parent goes on"
    pool = harness.open()
    pool.store(drive())
    assert python(FORK, pool).split() == ["told"] * 4 + ["1"]
