"""A pool in a database whose writers and servers are killed, whose answers get lost, and that others use too. Against a real server."""
import itertools
import os
import pickle
import random
import shutil
import signal
import socket
import struct
import threading
import time
import traceback
import warnings
from contextlib import contextmanager, suppress
from functools import lru_cache

import numpy as np
import pandas as pd
import pytest

pymongo = pytest.importorskip("pymongo")
import bson
import pymongo.monitoring

from data_io_nbdev import DaskPool, Episode, MemoryBuffer, MemoryPool, MongoBuffer, MongoPool, PoolQuery, open_pool
from data_io_nbdev.errors import CorruptData, PoolNotFound, PoolUnavailable, QueryError, SchemaError
from data_io_nbdev.storage.pool import mongo
from data_io_nbdev.testing import MongoHarness, MongoServer, at_once, draws, drive, facts, facts_of, python, trace


@pytest.fixture
def harness(tmp_path): return MongoHarness(tmp_path)


@pytest.fixture
def pool(harness): return harness.open()


@pytest.fixture
def server(tmp_path):
    "A server of the test's own, which it may kill"
    if not (shutil.which("mongod") or shutil.which("ferretdb")):
        what = "a server that can be killed needs mongod or ferretdb on the PATH"
        if os.environ.get("CI") and not os.environ.get("MONGODB_URI"): pytest.fail(what)
        warnings.warn(f"NOT TESTED: {what}")
        pytest.skip(what)
    server = MongoServer(tmp_path / "data")
    server.start()
    yield server
    server.kill()


def leftovers(harness):
    "Tokens in the collections that no commit names"
    named = {token for d in harness.of("log").find() for token in d["tokens"]}
    return {d["token"] for what in ("entries", "chunks") for d in harness.of(what).find({}, {"token": 1})} - named


# --- what can be stored ---

def test_larger_than_a_document(pool, harness):
    "An episode beyond the limit of 16 MB simply works, and so does a part of it"
    state = np.random.default_rng(0).normal(size=(8001, 600)).astype("float32")
    whole = Episode.from_arrays(state=state[:-1], nstate=state[1:], action=state[:-1, :2], reward=state[:-1, 0].copy(), who={"vehicle": "A"},
                                timestamp=pd.date_range("2026-01-01", periods=8000, freq="1s", tz="UTC"))
    pool.store(whole[:10]); pool.store(whole)
    assert harness.open()[whole.id] == whole and pool.verify() == []
    assert max(len(d["data"]) for d in harness.of("chunks").find()) < 16 << 20 < sum(len(d["data"]) for d in harness.of("chunks").find())


def test_many_at_once(pool, harness):
    "No document lists the episodes of a commit; many share a chunk"
    items = [drive(2, hour=h) for h in range(3000)]
    assert len(pool.extend(items)) == 3000 == harness.of("entries").count_documents({}) and harness.of("chunks").count_documents({}) < 10
    assert sum(len(d["data"]) for d in harness.of("chunks").find()) < sum(e.nbytes for e in items), "a short episode costs no more than its steps"
    assert len(str(harness.of("log").find_one({"_id": 1}))) < 3000
    assert facts_of(harness.open()) == facts_of(items)


def test_seen_by_others(pool, harness):
    "Who, when and how long are fields that a planner can use; times are exact"
    e = drive(5, hour=1 / 3.6e9)
    pool.store(e)
    found = harness.of("entries").find_one({"vehicle": "VB7", "driver": "anna", "seq_len": 5})
    assert (found["id"], found["start"], found["episodestart"]) == (e.id, e.start, pd.Timestamp("2026-01-01").to_pydatetime())
    assert {"token_1", "id_1", "start_1", "seq_len_1", "vehicle_1", "driver_1"} <= set(harness.of("entries").index_information())


@pytest.mark.parametrize("there", ["memory", "lake", "mongo"])
@pytest.mark.parametrize("here", ["memory", "lake", "mongo"])
def test_copies(harness, tmp_path, here, there):
    "In every direction ids, times and digests stay, and so do the batches"
    count = itertools.count()
    make = {"memory": MemoryPool, "lake": lambda: DaskPool(tmp_path / f"lake{next(count)}"), "mongo": lambda: harness.fresh().open()}
    one, other = make[here](), make[there]()
    one.extend([drive(8, hour=h, linked=h % 2 == 0) for h in range(5)])
    one.store(drive(20, hour=9)[:7]); one.store(drive(20, hour=9)); one.delete(drive(hour=1).id)
    shown = []
    one.copy_to(other, PoolQuery(start=(None, "2026-01-01T03:00Z")))  # and stopped
    class Bar:
        def __init__(self, total, **options): self.left = total; shown.append(total)
        def update(self, n): self.left -= n
        def close(self): assert self.left == 0
    for _ in range(2): one.copy_to(other, progress=Bar)
    assert shown == [4, 0]
    assert facts_of(other) == facts_of(one) and other.version >= 1 and other.verify() == []
    batches = [draws(MemoryBuffer(pool=pool, batch_size=16, seed=3)) for pool in (one, other)]
    assert batches[0] == batches[1]


def test_a_copy_is_read_back(pool):
    "What came down wrong at the other place is said, and not taken for copied"
    pool.extend([drive(hour=h) for h in range(3)])
    class Bad(MemoryPool):
        def _read(self, parts): return (drive(len(e), hour=9, seed=5) if e.start == drive(hour=1).start else e for e in super()._read(parts))
    with pytest.raises(CorruptData, match="has not what was copied to it: episode " + drive(hour=1).id): pool.copy_to(Bad())


def test_neighbours(pool, harness):
    "Parts of a chunk are read together, in any order, and alone; one that is damaged is named"
    es = [drive(3 + h, hour=h, linked=h % 3 > 0) for h in range(12)]
    pool.extend(es)
    parts = [pool._parts(e.id, 1)[0] for e in es]
    for order in (parts, parts[::-1], parts[::2], parts[3:7] + parts[:2] + parts[9:]):
        assert [facts(e) for e in pool._read(order)] == [facts(es[parts.index(p)]) for p in order]
    chunk = harness.of("chunks").find_one()
    table = mongo.unpack([chunk["data"]])
    assert [facts(e) for e in mongo._steps(pool.schema, parts, table)] == [facts(e) for e in es]
    with pytest.raises(CorruptData, match=f"episode {es[11].id} cannot be read: chunk .* rows"): mongo._steps(pool.schema, parts, table.slice(0, len(table) - 1))


def test_following(harness, pool):
    "A buffer takes in what other processes store, while it is drawn from; every row is one that was stored"
    pool.store(drive(30))
    buffer = MongoBuffer(pool=harness.open(), batch_size=32, seed=1, follow=0.05)
    buffer.load()
    code = """
import pickle, sys
from data_io_nbdev.testing import drive
pool = pickle.load(sys.stdin.buffer)
for h in range(1, 30): pool.store(drive(10, hour=h))
"""
    writer, until = threading.Thread(target=python, args=(code, pool)), time.time() + 60
    writer.start()
    stored = lru_cache(None)(lambda id: pool[id])
    while len(buffer) < 30 + 29 * 10 and time.time() < until: trace(buffer.sample(), stored)
    writer.join()
    assert len(buffer) == 320
    buffer.close()
    pool.store(drive(10, hour=40))
    time.sleep(0.2)
    assert not buffer._view.versions, "closed is closed"


# --- what the server is asked ---

class Asked(pymongo.monitoring.CommandListener):
    "Every command that a client sends, and how many documents of which collection came back"
    def __init__(self): self.commands, self.came = [], {}

    def started(self, event): self.commands.append((event.command_name, dict(event.command)))

    def succeeded(self, event):
        if cursor := event.reply.get("cursor"):
            what = cursor["ns"].rpartition(".")[2]
            self.came[what] = self.came.get(what, 0) + len(cursor.get("firstBatch", cursor.get("nextBatch", ())))

    def failed(self, event): pass


@contextmanager
def asked(monkeypatch):
    "What clients that are made meanwhile ask"
    with monkeypatch.context() as m:
        listener, really = Asked(), pymongo.MongoClient
        m.setattr(pymongo, "MongoClient", lambda *args, **kw: really(*args, **kw, event_listeners=[listener]))
        yield listener


@pytest.mark.parametrize("query, entries, chunks", [
    (PoolQuery(driver="bo"), 3, 3), (PoolQuery(start=("2026-01-02T00:00Z", "2026-01-02T04:00Z")), 4, 4),
    (PoolQuery(driver=["bo", "anna"], vehicle="B", start=(None, "2026-01-01T12:00Z")), 4, 4), (PoolQuery(ids=drive(hour=7, vehicle="A").id), 1, 1),
    (PoolQuery(time=("2026-01-01T05:00:01Z", "2026-01-01T05:00:03Z")), 2, 2), (PoolQuery(length=(7, None)), 6, 4),
    (PoolQuery().split(0.2)[0], 12, 12), (PoolQuery(driver="nobody"), 0, 0), (PoolQuery(ids=["\ud800"]), 0, 0), (PoolQuery(driver="\ud800"), 0, 0)], ids=repr)
def test_only_what_matches_travels(harness, pool, monkeypatch, query, entries, chunks):
    "Opening reads no entry; a query reads the entries and the chunks of the episodes asked for, and no others"
    drives = [drive(9 if h in (30, 38) else 6, hour=h, driver="bo" if h in (3, 13, 23) else "anna", vehicle="AB"[h in (2, 5, 8, 9, 22)]) for h in range(40)]
    for e in drives: pool.store(e[:6])
    for h in (30, 38): pool.store(drives[h])
    with asked(monkeypatch) as said:
        own = harness.open("r")
        assert own.version == 42 and len(own) == 40 and own.schema == pool.schema and said.came.get("entries", 0) == said.came.get("chunks", 0) == 0
        assert said.came["log"] <= 5
        found = list(own.find(query))
    assert (said.came.get("entries", 0), said.came.get("chunks", 0)) == (entries, chunks)
    copy = MemoryPool()
    pool.copy_to(copy)
    assert [facts(e) for e in found] == [facts(e) for e in copy.find(query)]
    scanned = [c for name, c in said.commands if name == "find" and c["find"].endswith((".entries", ".chunks")) and not c["filter"]]
    assert scanned == [], "every question about entries and chunks has a filter"


def test_of_many(harness, pool, monkeypatch):
    "A hundred of 3,000 episodes: a hundred entries, and the chunks that they are in"
    pool.extend([drive(2, hour=h, driver="bo" if h % 30 == 0 else "anna") for h in range(3000)])
    pool.delete(PoolQuery(driver="bo", start=(None, "2026-01-02T06:00Z")))
    with asked(monkeypatch) as said: found = harness.open().count(PoolQuery(driver="bo"))
    assert found == 99 and said.came["entries"] == 100 + 1


def test_two_writers_delete_and_store(harness, pool):
    "How many there are is right at every version, whoever writes: overwritten, deleted, in parts, stored again"
    other, right = harness.open(), MemoryPool()
    for n, (here, act) in enumerate([(pool, lambda p: p.extend([drive(9, hour=0)[:4], drive(9, hour=0), drive(hour=1)])), (other, lambda p: p.delete(drive(hour=1).id)),
                                     (pool, lambda p: p.store(drive(hour=1, seed=1))), (other, lambda p: p.store(drive(4, hour=0, seed=2), overwrite=True)),
                                     (other, lambda p: p.delete(everything=True)), (pool, lambda p: p.extend([drive(hour=h) for h in range(3)]))], 1):
        act(here); act(right)
        assert [len(p) for p in (pool, other, right)] == [len(harness.open().catalogue())] * 3 == [len(right.catalogue())] * 3
        assert [len(pool.snapshot(v)) for v in range(n + 1)] == [len(right.snapshot(v)) for v in range(n + 1)]


# --- what cannot ---

def test_strangers(harness):
    "A collection that is no pool's stays as it is"
    harness.of("log").insert_one({"_id": 1, "price": 7})
    for mode in "ar":
        with pytest.raises(SchemaError, match="data_io_nbdev.*price"): harness.open(mode)
    assert harness.of("log").find_one() == {"_id": 1, "price": 7}


def test_nothing(harness):
    with pytest.raises(PoolNotFound): harness.open("r")
    pool = harness.open()
    assert (len(pool), pool.version, pool.verify(), pool.repair()) == (0, 0, [], []) and harness.of("log").find_one() is None


def test_a_newer_format(harness, pool):
    pool.store(drive()); pool.store(drive(hour=1))
    harness.of("log").update_one({"_id": 2}, {"$set": {"data_io_nbdev": 4}})
    with pytest.raises(CorruptData, match="commit 2 has format 4, which needs a newer"): len(harness.open())
    assert facts_of(harness.open().snapshot(1)) == facts_of([drive()])


@pytest.mark.parametrize("what", ["entry gone", "entry changed", "commit gone", "chunk gone"])
def test_damage(harness, pool, what):
    "What is missing or was changed is noticed, and named"
    for h in range(3): pool.store(drive(hour=h))
    entry = harness.of("entries").find_one({"id": drive(hour=1).id})
    if what == "entry gone": harness.of("entries").delete_one({"_id": entry["_id"]})
    if what == "entry changed": harness.of("entries").update_one({"_id": entry["_id"]}, {"$set": {"facts": entry["facts"].replace(",6,", ",7,", 1)}})
    if what == "commit gone": harness.of("log").delete_one({"_id": 2})
    if what == "chunk gone": harness.of("chunks").delete_many({"token": entry["token"]})
    again = harness.open()
    if what == "chunk gone":
        assert [line.split(",")[0] for line in again.verify()] == [f"episode {drive(hour=1).id}"]
        with pytest.raises(CorruptData, match="is missing"): again[drive(hour=1).id]
        assert again[drive(hour=2).id] == drive(hour=2)
    else:
        with pytest.raises(CorruptData, match={"entry changed": "checksum", "commit gone": "gap"}.get(what, "version 3 has 3 episodes by the log, and 2 by its entries")): list(again)
        with pytest.raises(CorruptData, match={"entry gone": "commit 2 has 0 of its 1 entries", "entry changed": "checksum", "commit gone": "gap"}[what]):
            again.verify()
        assert facts_of(again.snapshot(1)) == facts_of([drive()])


def test_passwords(monkeypatch):
    "No text shows one, and none is pickled"
    secret = "s3cret"  # a traceback shows lines of this file, which therefore must not hold the URL
    url = f"mongodb://eve:{secret}@127.0.0.1:1/fleet.experience?authSource=admin"
    with pytest.raises(PoolUnavailable) as e: MongoPool(url, timeout=0.1)
    assert secret not in "".join(traceback.format_exception(e.value)) and "eve:***@127.0.0.1:1/fleet.experience?authSource=admin" in str(e.value)
    link = mongo._Link(url, None, None, 1)
    assert secret not in repr(link) + link.shown
    with pytest.raises(PoolUnavailable, match="MONGODB_PASSWORD"): mongo._Link(link.shown, None, None, 1)
    monkeypatch.setenv("MONGODB_PASSWORD", "s3:cr@et")
    assert mongo._Link(link.shown, None, None, 1)._address.startswith("mongodb://eve:s3%3Acr%40et@")
    with pytest.raises(QueryError) as e: MongoPool(f"mongodb://eve:{secret}@host:port/fleet")
    assert secret not in "".join(traceback.format_exception(e.value))


def test_wrong_password(tmp_path):
    "Wrong, or none: said at once, without the password"
    if shutil.which("mongod") or not shutil.which("ferretdb"): pytest.skip("only FerretDB takes its first user from the command line")
    right, wrong = "r1ght", "wr0ng"
    server = MongoServer(tmp_path, "--test-enable-new-auth", "--setup-username=eve", f"--setup-password={right}", "--setup-database=admin")
    server.start()
    try:
        address = server.url.partition("//")[2]
        pool = MongoPool(f"mongodb://eve:{right}@{address}/fleet?authSource=admin")
        pool.store(drive())
        assert facts_of(pool) == facts_of([drive()]) and right not in repr(pool) + pool.url
        with pytest.raises(PoolUnavailable, match="wrong user or password") as e: MongoPool(f"mongodb://eve:{wrong}@{address}/fleet?authSource=admin")
        assert wrong not in "".join(traceback.format_exception(e.value))
        with pytest.raises(PoolUnavailable, match="has not the right"): MongoPool(f"{server.url}/fleet").store(drive(hour=1))
    finally: server.kill()


@pytest.mark.parametrize("url", ["mongodb://no-such-host.invalid/fleet", "mongodb+srv://no-such-host.invalid/fleet"])
def test_unknown_host(url):
    began = time.monotonic()
    with pytest.raises(PoolUnavailable, match="no-such-host.invalid"): MongoPool(url, timeout=0.5)
    assert time.monotonic() - began < 30


# --- lines that break ---

class Proxy:
    "Between clients and a server: the next command of a kind is cut off, or refused"
    def __init__(self, server):
        self.server, self.plan = server, None
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"mongodb://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with suppress(OSError):
            while True: threading.Thread(target=self._serve, args=(self.listener.accept()[0],), daemon=True).start()

    def _serve(self, client):
        with suppress(OSError), client, socket.create_connection(self.server) as server:
            while request := self._message(client):
                act = self._act(request)
                if act == "half a request": return server.sendall(request[:len(request) // 2])
                if act == "no request": return
                if act == "refused":
                    client.sendall(_answer(request, {"ok": 0.0, "code": 13, "codeName": "Unauthorized", "errmsg": "not authorized to do this"}))
                    continue
                server.sendall(request)
                answer = self._message(server)
                if act == "no answer": return
                client.sendall(answer[:len(answer) // 2] if act == "half an answer" else answer)
                if act: return

    def _act(self, request):
        if struct.unpack_from("<i", request, 12)[0] != 2013: return None
        command = _command(request)
        name = next(iter(command))
        kind = f"{name} {str(command[name]).rpartition('.')[2]}" if isinstance(command[name], str) else name
        if not self.plan or self.plan[0] != kind: return None
        act, self.plan = self.plan[1], None
        return act

    @staticmethod
    def _message(end):
        head = end.recv(16, socket.MSG_WAITALL)
        if len(head) < 16: return b""
        return head + end.recv(struct.unpack_from("<i", head)[0] - 16, socket.MSG_WAITALL)

    def close(self): self.listener.close()


def _command(request):
    "The command in an `OP_MSG`: the document of the section of kind 0, which may come behind one of kind 1"
    at = 20
    while request[at]: at += 1 + struct.unpack_from("<i", request, at + 1)[0]
    return bson.decode(request[at + 1:at + 1 + struct.unpack_from("<i", request, at + 1)[0]])


def _answer(request, document):
    body = struct.pack("<iB", 0, 0) + bson.encode(document)
    return struct.pack("<iiii", 16 + len(body), 0, struct.unpack_from("<i", request, 4)[0], 2013) + body


@pytest.fixture
def proxy(harness):
    host, port = pymongo.uri_parser.parse_uri(harness.server)["nodelist"][0]
    proxy = Proxy((host, port))
    yield proxy
    proxy.close()


KINDS = ["find log", "find entries", "find chunks", "insert chunks", "insert entries", "insert log", "createIndexes entries", "createIndexes chunks",
         "createIndexes log", "hello"]


def lose_once(pool, rival):
    "A `_head` after which, once, a rival takes the next number"
    really, lost = pool._head, []
    def head():
        number = really()
        if not lost: lost.append(rival())
        return number
    return head


def through(proxy, harness): return open_pool(proxy.url, timeout=2, **harness.name)


@pytest.mark.parametrize("act", ["no request", "half a request", "no answer", "half an answer"])
@pytest.mark.parametrize("kind", [*KINDS, "delete entries", "delete chunks"])
def test_a_line_that_breaks(proxy, harness, monkeypatch, kind, act):
    "In the middle of every kind of command: done, or said to be not done; the same call again leaves one of everything"
    here, right, failed = through(proxy, harness), MemoryPool(), []
    def again(pool, call):
        for attempt in range(3):
            try: return call(pool)
            except PoolUnavailable as e: failed.append(str(e))
        raise AssertionError(failed)
    calls = [lambda p: p.extend([drive(hour=h) for h in range(3)]), lambda p: p.store(drive(9, hour=3)[:4]), lambda p: p.store(drive(9, hour=3)),
             lambda p: p.delete(drive(hour=1).id), lambda p: p.store(drive(hour=2, seed=1), overwrite=True), list]
    cut = 0
    for n, call in enumerate(calls):
        proxy.plan = kind, act
        if n == 3: monkeypatch.setattr(here, "_head", lose_once(here, lambda: harness.raw_steal(here)))  # what hides is written once, for both attempts
        if n == 4:  # what was to be overwritten is gone: what was written is taken back, and less written anew
            monkeypatch.setattr(here, "_head", lose_once(here, lambda: harness.open().delete(drive(hour=2).id)))
        again(here, call)
        cut += proxy.plan is None
        proxy.plan = None
        call(right)
    assert cut and facts_of(harness.open()) == facts_of(here) == facts_of(right) and here.verify() == []
    assert harness.raw_numbers(here) == list(range(1, here.version + 1)) and len(here) == len(right)
    assert all(harness.name["collection"] in text and "127.0.0.1" in text for text in failed)
    open_pool(harness.server, grace="0s", **harness.name).repair(dry_run=False)
    assert leftovers(harness) == set() and facts_of(harness.open()) == facts_of(right)


@pytest.mark.parametrize("act", ["no request", "half a request", "no answer", "half an answer"])
def test_a_line_that_breaks_while_much_is_read(proxy, harness, act):
    here = through(proxy, harness)
    right = facts_of([drive(hour=h) for h in range(300)])
    here.extend([drive(hour=h) for h in range(300)])
    proxy.plan = "getMore", act
    with pytest.raises(PoolUnavailable): list(here)
    assert proxy.plan is None and facts_of(here) == right


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hello"])
def test_refused(proxy, harness, kind):
    "A user who may not do it is told so; nothing is half there, and who may do it goes on"
    harness.open().store(drive())
    here = through(proxy, harness)
    proxy.plan = kind, "refused"
    with pytest.raises(PoolUnavailable, match="has not the right to do this"): here.store(drive(hour=1)) if kind != "find chunks" else list(here)
    assert proxy.plan is None and facts_of(harness.open()) == facts_of([drive()]) and harness.raw_numbers(here) == [1]
    here.store(drive(hour=1))
    assert facts_of(harness.open()) == facts_of([drive(), drive(hour=1)]) and here.verify() == []


# --- killed ---

def test_writers_killed(harness, pool):
    "`kill -9` of a writer at 50 random moments: what was acknowledged is there, the next commit whole or not at all, and `repair` leaves nothing"
    seed, done = random.SystemRandom().randrange(10**6), 0
    rng = random.Random(seed)
    pool.store(drive(hour=50_000))
    for kill in range(50):
        ready, go = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                own = harness.open()
                for n in itertools.count(done):
                    if n % 5 == 4: own.delete(drive(hour=n - 1, steps=3).id)
                    else: own.extend([drive(3, hour=n), drive(4, hour=n, driver="twin")])
                    os.write(go, b".")
            except BaseException: os.write(go, traceback.format_exc().encode())
            os._exit(1)
        os.close(go)
        said = os.read(ready, 1)
        time.sleep(10 ** rng.uniform(-3, -1.2))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        while more := os.read(ready, 65536): said += more
        os.close(ready)
        assert set(said) == {ord(".")}, said.decode()
        done += len(said)
        found = harness.open()
        assert found.version - 1 in (done, done + 1), f"seed {seed}, kill {kill}"
        done = found.version - 1
    right = MemoryPool()
    right.store(drive(hour=50_000))
    for n in range(done):
        if n % 5 == 4: right.delete(drive(hour=n - 1, steps=3).id)
        else: right.extend([drive(3, hour=n), drive(4, hour=n, driver="twin")])
    assert facts_of(pool) == facts_of(right) and pool.verify() == [] and harness.raw_numbers(pool) == list(range(1, done + 2))
    left = leftovers(harness)
    assert pool.repair() == [] and len(harness.open().repair()) == 0
    swept = open_pool(harness.server, grace="0s", **harness.name).repair(dry_run=False)
    assert len(swept) == len(left) and leftovers(harness) == set() and facts_of(harness.open()) == facts_of(right)


def test_server_killed(server):
    "`kill -9` of the server at 10 moments: nothing acknowledged is lost, and storing again what was not leaves one"
    pool, rng, stop, stored, failed = MongoPool(server.url, timeout=5), random.Random(), threading.Event(), [], []
    pool.store(drive(hour=0))
    def write():
        for n in itertools.count(1):
            if stop.is_set(): return
            while not stop.is_set():
                try: stored.append(pool.store(drive(3, hour=n))); break
                except PoolUnavailable: failed.append(n)
    writer = threading.Thread(target=write)
    writer.start()
    for _ in range(10):
        time.sleep(rng.uniform(0.02, 0.3))
        server.kill()
        server.start()
    give_up = time.monotonic() + 60
    while len(stored) <= 10 and time.monotonic() < give_up: time.sleep(0.05)
    stop.set()
    writer.join()
    again = MongoPool(server.url)
    assert {*stored} <= {e.id for e in again} and again.verify() == [] and len(stored) == len(set(stored)) > 10
    assert again.version == len(again) in (len(stored) + 1, len(stored) + 2)


def test_server_away(server):
    "Said within the time that was given; afterwards the same call stores"
    pool = MongoPool(server.url, timeout=1)
    pool.store(drive())
    server.kill()
    began = time.monotonic()
    for call in (lambda: pool.store(drive(hour=1)), lambda: pool.version, lambda: list(pool), lambda: MongoPool(server.url, timeout=1)):
        with pytest.raises(PoolUnavailable, match="127.0.0.1"): call()
    assert time.monotonic() - began < 30
    server.start()
    pool.store(drive(hour=1))
    assert facts_of(pool) == facts_of([drive(), drive(hour=1)])


def test_server_hangs(server):
    "A server that takes what is sent and answers nothing is away, too; when it goes on, the same call stores"
    pool = MongoPool(server.url, timeout=1)
    pool.store(drive())
    server.process.send_signal(signal.SIGSTOP)
    try:
        for call in (lambda: pool.store(drive(hour=1)), lambda: pool.version, lambda: list(pool)):
            began = time.monotonic()
            with pytest.raises(PoolUnavailable, match="127.0.0.1"): call()
            assert time.monotonic() - began < 10
    finally: server.process.send_signal(signal.SIGCONT)
    pool.store(drive(hour=1))
    assert facts_of(pool) == facts_of([drive(), drive(hour=1)]) and pool.version == 2


def test_level_names_that_meet(harness):
    "Levels whose fields might be called the same are told apart, by queries too"
    pool = harness.open()
    es = [Episode.from_arrays(state=[[1.0]], action=[[0.0]], reward=[0.0], nstate=[[2.0]], timestamp=pd.date_range("2026-01-01", periods=1, tz="UTC"),
                              who={"start": a, "who_start": b, "facts": a}) for a, b in (("x", "y"), ("y", "x"))]
    pool.extend(es)
    for e in es: assert [f.id for f in pool.find(PoolQuery(who={"start": e.who["start"]}))] == [e.id] == [f.id for f in pool.find(PoolQuery(who={"who_start": e.who["who_start"]}))]


def test_options_travel(harness, pool):
    "A handle in another process waits as long, and counts as old what this one does"
    pool.store(drive())
    again = pickle.loads(pickle.dumps(open_pool(harness.server, timeout=3, grace="1h", **harness.name)))
    assert (again._link.timeout, again.grace, facts_of(again)) == (3, pd.Timedelta("1h"), facts_of([drive()]))


def test_everybody_at_once(harness, pool):
    "Four writers and two readers: numbers without a gap, nothing lost, doubled or torn"
    until = time.time() + 12
    code = """
import pickle, sys, time
from data_io_nbdev.testing import drive
pool, writer, until = pickle.load(sys.stdin.buffer)
n, done = 0, []
while time.time() < until or n < 3:
    done += pool.extend([drive(3 + n % 9, hour=n, vehicle=f"w{writer}", driver=d) for d in ("anna", "twin")]); n += 1
print(*done)
"""
    pool.store(drive(hour=50_000))
    def read():
        own = harness.open()
        while time.time() < until:
            ids, snapshot = {}, own.snapshot()
            for e in snapshot.sample(min(20, len(snapshot)), seed=1):
                if e.who["vehicle"].startswith("w"): assert facts(e) == facts(drive(len(e), hour=(e.start - drive().start) / 3.6e9, **e.who))
            for e, row in snapshot.catalogue().iterrows(): ids.setdefault((row.vehicle, row.episodestart), []).append(row.seq_len)
            assert all(len(both) == 2 and both[0] == both[1] for (vehicle, _), both in ids.items() if vehicle.startswith("w")), "half a commit"
    said = at_once(*(lambda w=w: python(code, (pool, w, until)).split() for w in range(4)), read, read)
    stored = [id for ids in said[:4] for id in ids]
    assert len(stored) == len(set(stored)) > 8 and sorted(e.id for e in pool) == sorted([*stored, drive(hour=50_000).id])
    assert harness.raw_numbers(pool) == list(range(1, len(stored) // 2 + 2)) and pool.verify() == [] and leftovers(harness) == set()
