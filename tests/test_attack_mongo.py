"""Attacks on a database pool: altered, swapped, copied and foreign documents, bombs, crowds of writers, and interrupts. Against a real server.

The sample of format 1 in tests/data was written once, by the version that had format 1."""
import collections
import copy
import gc
import itertools
import json
import os
import signal
import sys
import threading
import time
import zlib
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest

pymongo = pytest.importorskip("pymongo")
import bson
import bson.codec_options
import pyarrow as pa
from bson import json_util
from bson.datetime_ms import DatetimeMS

from data_io_nbdev import MemoryPool, MongoBuffer, PoolQuery, open_pool
from data_io_nbdev.errors import CorruptData, DataIOError, EpisodeNotFound, SchemaError
from data_io_nbdev.storage.pool import mongo
from data_io_nbdev.storage.pool import pool as pools
from data_io_nbdev.testing import HARNESSES, MongoHarness, at_once, drive, facts_of, lose_races, python
from test_memory_file import DATA, everything, fill, held

SAMPLE = DATA / "mongo-format-1.json"
KINDS = ("log", "entries", "chunks")


@pytest.fixture
def harness(tmp_path): return MongoHarness(tmp_path)


AWARE = bson.CodecOptions(tz_aware=True, datetime_conversion=bson.codec_options.DatetimeConversion.DATETIME_AUTO)


def of(harness, what): return harness.of(what).with_options(codec_options=AWARE)
def documents(harness): return {what: list(of(harness, what).find(sort=[("_id", 1)])) for what in KINDS}


def place(harness, docs):
    "These documents, and no others"
    for what in KINDS:
        of(harness, what).delete_many({})
        if docs[what]: of(harness, what).insert_many(docs[what])


def sample(): return {what: docs for what, docs in json_util.loads(SAMPLE.read_text(encoding="utf-8")).items() if what in KINDS}


# --- format 1 ---

def test_format_1(harness):
    "What format 1 stored reads as it was written, is sound, and takes more; then both formats are in one pool"
    place(harness, sample())
    expected = held(1)
    pool = harness.open()
    assert everything(pool) == expected and pool.verify() == [] == pool.repair()
    pool.extend([drive(hour=20)[:3], drive(hour=20), drive(hour=21)]); pool.delete(drive(hour=2).id)
    again, right = harness.open(), fill(MemoryPool())
    right.extend([drive(hour=20)[:3], drive(hour=20), drive(hour=21)]); right.delete(drive(hour=2).id)
    assert everything(again) == everything(right) and again.verify() == [] == again.repair()
    assert [d["data_io_nbdev"] for d in documents(harness)["log"]] == [1] * expected["version"] + [2, 2]


# --- documents that are not as they were written ---

VALUES = [None, "x", "", 7, 0, -1, 2**53, 2**62, -2**63, 1.5, True, False, [], ["x", 3], {}, {"a": [{"b": {"c": 1}}]}, b"\x00\xff", bson.ObjectId(b"0" * 12),
          DatetimeMS(2**55), DatetimeMS(-2**60), "[" * 5000, "é" * 100]


def alter(docs, rng):
    "One field of one document is missing, or of another value; says what was done"
    what = KINDS[rng.integers(3)]
    doc = docs[what][rng.integers(len(docs[what]))]
    field = sorted(doc.keys() - {"_id"})[rng.integers(len(doc) - 1)]
    value = VALUES[rng.integers(len(VALUES))]
    before = doc.get(field)
    if rng.random() < 0.2: del doc[field]
    elif type(value) is type(before) and value == before: return alter(docs, rng)
    else: doc[field] = value
    return what, field, value, doc["_id"]


def everybody(pool, right):
    "Every question and every write: each gives what it should, or an error of ours; what each said"
    es, ever = [drive(3, hour=30 + h) for h in range(3)], [fact for v in range(right.version + 1) for fact in facts_of(right.snapshot(v))]
    def sound(found): assert all(fact in ever for fact in facts_of(found)), "what nobody stored"  # a filter may pass over what changed: `verify` does not
    def whole(found): assert facts_of(found) == facts_of(right), "not what was stored, and nobody said so"
    calls = {"version": lambda: pool.version, "len": lambda: len(pool), "schema": lambda: pool.schema, "contains": lambda: drive(hour=2).id in pool,
             "list": lambda: whole(pool), "find": lambda: sound(pool.find(PoolQuery(driver="anna"))), "one": lambda: sound([pool[drive(hour=2).id]]),
             "start": lambda: sound(pool.find(PoolQuery(start=("2026-01-01T01:30Z", None)))), "length": lambda: pool.count(PoolQuery(length=(4, None))),
             "catalogue": pool.catalogue, "sample": lambda: sound(pool.sample(2, seed=1)), "snapshot": lambda: list(pool.snapshot(1)),
             "copy": lambda: whole(copied(pool)), "buffer": lambda: buffered(pool), "verify": pool.verify, "repair": lambda: pool.repair(dry_run=False),
             "store": lambda: pool.store(es[0]), "extend": lambda: pool.extend(es), "again": lambda: pool.store(drive(4, hour=2, seed=1)),
             "delete": lambda: pool.delete(drive(hour=3, driver="bo").id), "delete where": lambda: pool.delete(PoolQuery(driver=""))}
    said = {}
    for name, call in calls.items():
        try: said[name] = call()
        except DataIOError as e: said[name] = e
    return said


def copied(pool):
    pool.copy_to(copy := MemoryPool())
    return copy


def buffered(pool):
    buffer = MongoBuffer(pool=pool.snapshot(), batch_size=4, seed=1, progress=False)
    buffer.load()
    buffer.sample()


@pytest.fixture
def filled(harness):
    "A harness, its documents, and the same in memory"
    made, right = fill(harness.open()), fill(MemoryPool())
    for pool in (made, right): pool.extend([drive(5, hour=3, driver="bo"), drive(4, hour=4)])
    return documents(harness), right


def noticed(said): return isinstance(said["verify"], (CorruptData, SchemaError)) or bool(said["verify"])


def opened(harness):
    try: return harness.open()
    except (CorruptData, SchemaError) as e: return e


def test_altered(harness, filled, attack):
    "A field of any document, missing or of another value or type: never a raw error, never wrong data, and `verify` says so"
    docs, right = filled
    def once(rng):
        now = copy.deepcopy(docs)
        what = alter(now, rng)
        place(harness, now)
        pool = opened(harness)
        if isinstance(pool, Exception): return
        try: assert noticed(everybody(pool, right)), f"nobody noticed {what}"
        finally: pool.close()
    attack("mongo: altered documents", 40, once)


def swap(docs, rng):
    "Two documents change places, or one is copied over another, or appears a second time"
    what = KINDS[rng.integers(3)]
    a, b = rng.choice(len(docs[what]), 2, replace=False)
    one, other, how = docs[what][a], docs[what][b], ("swapped", "copied", "repeated")[rng.integers(3)]
    if how == "swapped": docs[what][a], docs[what][b] = {**other, "_id": one["_id"]}, {**one, "_id": other["_id"]}
    if how == "copied": docs[what][a] = {**other, "_id": one["_id"]}
    if how == "repeated":  # beside itself, or behind all
        names = {"log": len(docs["log"]) + 1, "entries": f"{one.get('token')}/{9:08d}", "chunks": f"{one.get('token')}/9/0"}
        docs[what].append({**one, "_id": names[what]})
    return what, how, one["_id"], other["_id"]


def test_swapped(harness, filled, attack):
    "Documents that stand elsewhere than they were put are noticed, though each is as it was"
    docs, right = filled
    def once(rng):
        now = copy.deepcopy(docs)
        what = swap(now, rng)
        place(harness, now)
        pool = harness.open()
        said = everybody(pool, right)
        assert noticed(said) or what[:2] == ("chunks", "repeated"), f"nobody noticed {what}"  # of a chunk that no entry names nothing depends
        pool.close()
    attack("mongo: swapped, copied, repeated documents", 12, once)


def test_altered_format_1(harness, attack):
    "Format 1 covers less, but nothing is a raw error there either; and the plain fields are compared with what the checksum covers"
    docs, right = sample(), fill(MemoryPool())
    def once(rng):
        now = copy.deepcopy(docs)
        what, field, *_ = done = alter(now, rng)
        place(harness, now)
        pool = opened(harness)
        if isinstance(pool, Exception): return
        try: said = everybody(pool, right)
        finally: pool.close()
        asked = what == "entries" and field in ("id", "vehicle", "driver", "start", "begin", "end", "seq_len", "token", "facts")
        assert noticed(said) or not asked, f"nobody noticed {done}"
    attack("mongo: altered documents of format 1", 15, once)


def test_a_commit_that_is_lost(harness, filled):
    "A document of the log that lost its tokens has no entries left: whoever asks for everything is told, and so does `verify`"
    docs, right = filled
    for n, value in itertools.product(range(len(docs["log"])), (None, [], ["x"])):
        now = copy.deepcopy(docs)
        now["log"][n]["tokens"] = value
        place(harness, now)
        pool = harness.open()
        assert noticed(everybody(pool, right)), f"nobody noticed commit {n + 1} with the tokens {value}"
        pool.close()


def test_an_entry_that_hides_nothing(harness):
    "In format 1 no checksum says whom an entry hides; `verify` names one that was not there"
    docs = sample()
    next(d for d in docs["entries"] if d.get("hidden"))["id"] = "nobody"
    place(harness, docs)
    assert "hides episode 'nobody', which was not there" in " ".join(harness.open().verify())


@pytest.mark.parametrize("what, field", [("entries", "start"), ("entries", "driver"), ("entries", "seq_len"), ("entries", "hidden"), ("log", "count"),
                                         ("log", "episodes"), ("log", "tokens"), ("log", "schema"), ("log", "ids"), ("chunks", "crc")])
def test_named(harness, filled, what, field):
    "What was changed is named"
    docs, _ = filled
    doc = next(d for d in docs[what] if field in d or (field == "hidden" and "facts" in d))
    doc[field] = {"start": 5, "driver": "eve", "seq_len": 99, "hidden": True, "count": 9, "episodes": 9, "tokens": ["0" * 32], "schema": "{}", "ids": [], "crc": "0" * 8}[field]
    place(harness, docs)
    if what == "chunks":
        assert any("other bytes" in line for line in harness.open().verify())
    else:
        with pytest.raises(CorruptData, match=f"{'commit' if what == 'log' else 'entry'} .*{doc['_id']}.* damaged"): harness.open().verify()


# --- documents of others ---

def test_strangers_beside(harness, filled, attack):
    "Whatever somebody else keeps in these collections is passed over, and stays when `repair` takes away what a dead writer left"
    docs, right = filled
    old = harness.open()._link.now() - timedelta(days=400)
    def stranger(rng, n):
        ids = [bson.ObjectId(), f"mine-{n}", f"{'f' * 31}g/{n:08d}", f"{n:032x}", {"a": n}, f"{'a' * 32}/{n}/x", n + 0.5, f"{n:032x}/{n:08d}"]
        about = {"token": [None, 7, "photos", f"{n:032x}", ["a"], {"a": 1}][rng.integers(6)], "id": [None, 3, "x", ["y"]][rng.integers(4)], "made": old, "hidden": True,
                 "end": 2**60, "start": "now", "data": b"mine", "facts": "none", "price": 3}
        kept = [k for k in about if rng.random() < 0.6]
        return {"_id": ids[rng.integers(len(ids))], **{k: about[k] for k in kept}}
    def once(rng):
        now = copy.deepcopy(docs)
        there = {what: [stranger(rng, 100 * i + k) for k in range(4)] for i, what in enumerate(("entries", "chunks"))}
        there["log"] = [{"_id": [bson.ObjectId(), "notes", {"a": 1}][rng.integers(3)], "tokens": 3, "schema": "mine", "made": old}]
        for what in there: now[what] += there[what]
        place(harness, now)
        left = open_pool(harness.server, grace="0s", **harness.name)
        left._write("0" * 32, [(pools.part_of(drive(hour=9)), drive(hour=9))], left.schema)
        assert len(left.repair(dry_run=False)) == 1
        for what, mine in there.items():
            assert all(of(harness, what).find_one({"_id": d["_id"]}) == d for d in mine), f"a stranger's document in the {what} is gone"
        pool = harness.open()
        assert everything(pool) == everything(right) and pool.verify() == [] == pool.repair()
        said = everybody(pool, right)
        assert not [e for e in said.values() if isinstance(e, (CorruptData, SchemaError))]
        left.close(); pool.close()
    attack("mongo: strangers' documents", 6, once)


@pytest.mark.parametrize("lost", ["a number", "its tokens"])
def test_repair_of_a_damaged_log(harness, filled, lost):
    "What a commit named that is gone, or cannot be read, is not taken for left behind"
    docs, _ = filled
    place(harness, docs)
    if lost == "a number": of(harness, "log").delete_one({"_id": 2})
    else: of(harness, "log").update_one({"_id": 2}, {"$set": {"tokens": []}})
    before = documents(harness)
    with pytest.raises(CorruptData, match="gap|damaged"): open_pool(harness.server, grace="0s", **harness.name).repair(dry_run=False)
    assert documents(harness) == before


# --- bombs ---

def bomb(schema, megabytes):
    "A chunk of so many megabytes of zeros, with the right columns"
    columns = mongo.layout(schema)
    rows = (megabytes << 20) // len(columns) // 4
    def zeros(kind):
        if pa.types.is_list(kind): return pa.ListArray.from_arrays(pa.array(np.zeros(rows + 1, "int32")), pa.array([], kind.value_type), type=kind)
        return pa.Array.from_buffers(kind, rows, [None, pa.py_buffer(np.zeros(rows * 8, "u1"))])
    table = pa.table([zeros(kind) for kind in columns.types], columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, columns, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer: writer.write_table(table)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("kind", [1, 2])
def test_bomb(harness, kind):
    "A chunk of kilobytes that says gigabytes is damage, and takes no memory; whatever its checksum says, and in either format"
    pool = harness.open()
    pool.extend([drive(hour=0), drive(hour=1)])
    id = pool.store(drive(hour=2))
    chunk = of(harness, "chunks").find_one({"token": pool._parts(id, 2)[0].where.key.partition("/")[0]})
    data = bomb(pool.schema, 400)
    assert len(data) < 200_000 < 300 << 20 < mongo.unpacked_size(pa.py_buffer(data))
    evil = {k: v for k, v in {**chunk, "data": data}.items() if k != "crc"}
    evil = mongo.sealed(evil) if kind == 2 else {**evil, "crc": zlib.crc32(data)}
    of(harness, "chunks").replace_one({"_id": chunk["_id"]}, evil)
    code = """
import pickle, sys
from data_io_nbdev.errors import CorruptData
pool, id, other = pickle.load(sys.stdin.buffer)
pool[other]
most = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))  # not ru_maxrss, which counts the parent too
before = most()
for call in (lambda: pool[id], lambda: list(pool)):
    try: call()
    except CorruptData as e: assert "bytes, and its entry allows" in str(e), e
    else: raise AssertionError("it was read")
assert len(pool.verify()) == 1
print(most() - before)
"""
    assert int(python(code, (pool, id, drive(hour=0).id))) < 40_000  # KB


@pytest.mark.parametrize("name, value", [("pieces", 10**9), ("length", 2**50), ("row", 2**60), ("nbytes", 2**62), ("length", -1), ("offset", "x"), ("who", [[1]]), ("row", 1.5)])
def test_bomb_in_an_entry(harness, name, value):
    "Facts that ask for more than there can be, or are of another kind, with a checksum that fits"
    pool = harness.open()
    id = pool.store(drive())
    entry = of(harness, "entries").find_one({"id": id})
    facts = json.loads(entry["facts"].partition(" ")[2])
    facts[[*mongo._FACTS, "key", "pieces", "row"].index(name)] = value
    text = json.dumps(facts, separators=(",", ":"))
    entry = mongo.sealed({**{k: v for k, v in entry.items() if k != "crc"}, "facts": f"{zlib.crc32(text.encode()):08x} {text}"})
    of(harness, "entries").replace_one({"_id": entry["_id"]}, entry)
    began = time.monotonic()
    for call in (lambda: list(harness.open()), lambda: harness.open()[id]):
        try: found = call()
        except CorruptData: continue
        assert name == "nbytes" and facts_of(found if isinstance(found, list) else [found]) == facts_of([drive()])  # it only says how much to ask for at once
    assert time.monotonic() - began < 20


# --- many writers ---

WRITER = """
import json, pickle, sys, time
from data_io_nbdev.testing import drive
pool, w, n, seconds = pickle.load(sys.stdin.buffer)
pool.store(drive(hour=10_000 + w, vehicle="ready"))
while sum(e.startswith("ready") for e in pool.catalogue().vehicle) < n: time.sleep(0.02)
took, until = [], time.monotonic() + seconds
while time.monotonic() < until:
    began = time.monotonic()
    pool.store(drive(hour=len(took), vehicle=f"w{w}"))
    took.append(time.monotonic() - began)
print(json.dumps(took))
"""


@pytest.mark.parametrize("kind", ["mongodb", "delta"])
def test_eight_writers(tmp_path, kind):
    "They share: nobody waits long, nobody gets much less than another. (One that lost asked anew, and slept the longer the more often: 18 s of 30, one to six.)"
    seconds = min(60, 8 * max(1, float(os.environ.get("SOAK", 1))))
    pool = HARNESSES[kind](tmp_path).open()
    pool.store(drive(hour=20_000))
    said = [json.loads(text) for text in at_once(*(lambda w=w: python(WRITER, (pool, w, 8, seconds)) for w in range(8)))]
    counts, slowest = sorted(map(len, said)), max(map(max, said))
    print(f"{kind}: {sum(counts) / seconds:.1f} stores a second, of each {counts}, slowest {slowest:.2f} s")
    assert slowest < 8 and counts[-1] <= 3 * counts[0]
    assert len(pool) == 9 + sum(counts) and pool.verify() == []


def test_eight_threads():
    pool, until, counts = MemoryPool(), time.monotonic() + 3, [0] * 8
    def write(w):
        slowest = 0
        while (began := time.monotonic()) < until:
            pool.store(drive(hour=counts[w], vehicle=f"w{w}"))
            counts[w] += 1
            slowest = max(slowest, time.monotonic() - began)
        return slowest
    slowest = max(at_once(*(lambda w=w: write(w) for w in range(8))))
    assert slowest < 3 and max(counts) <= 2.5 * min(counts) and len(pool) == sum(counts)


class Counted:
    "How often a pool's writer decides, writes and sleeps"
    def __init__(self, pool, monkeypatch):
        self.of = collections.Counter()
        for name in ("_write", "_newest"): monkeypatch.setattr(pool, name, self.counted(name, getattr(pool, name)))
        for kind in (pools._Extend, pools._Delete): monkeypatch.setattr(kind, "__call__", self.counted("decides", kind.__call__))
        monkeypatch.setattr(time, "sleep", self.counted("sleeps", time.sleep))

    def counted(self, name, call):
        def count(*args, **options):
            self.of[name] += threading.current_thread() is threading.main_thread()  # not what drivers do behind
            return call(*args, **options)
        return count


@pytest.mark.parametrize("kind", sorted(HARNESSES))
@pytest.mark.parametrize("call", ["store", "extend many", "overwrite", "delete", "delete where"])
def test_loses_often(tmp_path, kind, call, monkeypatch):
    "Thirty others come first, one at each attempt: the plan stands, so nothing is decided or written anew, and nobody sleeps"
    pool, es = HARNESSES[kind](tmp_path).open(), [drive(hour=100 + h) for h in range(40)]
    pool.extend([drive(hour=h) for h in range(3)])
    calls = {"store": lambda: pool.store(drive(hour=50)), "extend many": lambda: pool.extend(es), "overwrite": lambda: pool.store(drive(4, hour=1, seed=1), overwrite=True),
             "delete": lambda: pool.delete(drive(hour=2).id), "delete where": lambda: pool.delete(PoolQuery(driver="anna", start=(None, "2026-01-01T01:30Z")))}
    put = type(pool)._put
    def rival(n):
        steps = drive(3, hour=10 + n, driver="bo")
        part = pools.part_of(steps)
        token = f"{n:032x}"
        version = pool._head()
        (written,) = type(pool)._write(pool, token, [(part, steps)], pool._schema(version))
        assert put(pool, pools.Commit(version + 1, token, (replace(written, version=version + 1),), (), None))
    lose_races(pool, [lambda n=n: rival(n) for n in range(30)])
    with monkeypatch.context() as m:
        counted = Counted(pool, m)
        calls[call]()
    again = call == "delete where" and kind != "mongodb"  # an index in memory is asked again, rather than the log what came
    assert counted.of["decides"] == (31 if again else 1) and counted.of["sleeps"] == 0 and counted.of["_write"] == (0 if "delete" in call else 1)
    assert pool.version == 32 and pool.verify() == []
    right = MemoryPool()
    right.extend([drive(hour=h) for h in range(3)])
    mine, pool = pool, right
    calls[call]()
    right.extend([drive(3, hour=10 + n, driver="bo") for n in range(30)])
    assert facts_of(mine) == facts_of(right) and len(mine) == len(right)


@pytest.mark.parametrize("kind", sorted(HARNESSES))
def test_overlaps(tmp_path, kind):
    "What came first and touches the plan is seen: a delete finds what was put meanwhile, a part follows what grew, an overwrite hides what is there now"
    harness = HARNESSES[kind](tmp_path)
    pool = harness.open()
    rival, e = harness.beside(pool), drive(9)
    pool.extend([e[:3], drive(hour=1), drive(hour=2, driver="bo")])
    lose_races(pool, [lambda: rival.store(drive(hour=3)), lambda: rival.store(drive(hour=4, driver="bo"))])
    assert set(pool.delete(PoolQuery(driver="anna"))) == {e.id, drive(hour=1).id, drive(hour=3).id}
    pool.store(e[:3])
    lose_races(pool, [lambda: rival.store(e[:5]), lambda: rival.store(e[:6]), lambda: rival.store(drive(hour=5))])
    pool.store(e)
    assert facts_of([pool[e.id]]) == facts_of([e]) and sum(p.length for p in pool._parts(e.id, pool.version)) == 9
    lose_races(pool, [lambda: rival.extend([drive(hour=50 + h) for h in range(40)] + [drive(9, seed=1)], overwrite=True)])
    pool.store(drive(7, seed=2), overwrite=True)
    assert facts_of([pool[e.id]]) == facts_of([drive(7, seed=2)])
    lose_races(pool, [lambda: rival.delete(e.id)])
    with pytest.raises(EpisodeNotFound): pool.delete([e.id, drive(hour=2, driver="bo").id])
    assert len(pool) == len(pool.catalogue()) == 43 and pool.verify() == [] and len(harness.beside(pool)) == 43


# --- interrupts ---

@pytest.fixture
def interrupted():
    "Calls something, and presses Ctrl-C after so many seconds; `None` where that hit"
    def press(*_): raise KeyboardInterrupt
    before = signal.signal(signal.SIGALRM, press)
    def run(call, after):
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, after)
                return call()
            finally: signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt: return None
    yield run
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts(harness, attack, interrupted):
    "Ctrl-C at a random moment of a store, an extend, an overwrite or a delete; the same handle goes on, the same call again leaves one, and threads beside it notice nothing"
    pool = harness.open()
    hours, right = itertools.count(1000), MemoryPool()
    for p in (pool, right): p.store(drive(hour=0))
    calls = [lambda p, h, some: p.store(drive(3, hour=h)), lambda p, h, some: p.extend([drive(3, hour=h), drive(9, hour=h, driver="bo")[:4], drive(9, hour=h, driver="bo")]),
             lambda p, h, some: p.store(drive(4, hour=h, seed=h), overwrite=True), lambda p, h, some: p.delete(some[:1]) if len(some) > 4 else p.store(drive(2, hour=h)),
             lambda p, h, some: len(list(p))]
    def once(rng):
        call, h, some = calls[rng.integers(len(calls))], next(hours), [e.id for e in right]
        said = interrupted(lambda: call(pool, h, some), rng.uniform(0, 0.06))
        ids = {e.id for e in pool}
        after = MemoryPool()
        right.copy_to(after)
        call(after, h, some)
        assert facts_of(pool) in (facts_of(right), facts_of(after)) if said is None else facts_of(pool) == facts_of(after), "more, or less, than what was interrupted"
        if ids == {e.id for e in right}: call(pool, h, some)  # again, through the same handle
        call(right, h, some)
        assert facts_of(pool) == facts_of(right) and len(pool) == len(right)
    attack("mongo: Ctrl-C", 80, once)
    assert pool.verify() == [] and facts_of(harness.open()) == facts_of(right) and harness.raw_numbers(pool) == list(range(1, pool.version + 1))
    open_pool(harness.server, grace="0s", **harness.name).repair(dry_run=False)
    named = {token for d in of(harness, "log").find() for token in d["tokens"]}
    assert {d["token"] for what in ("entries", "chunks") for d in of(harness, what).find({}, {"token": 1})} <= named and pool.verify() == []


def test_interrupts_at_every_line(harness, attack):
    "The same at a chosen line of this package, so that each comes in turn"
    pool, hours = harness.open(), itertools.count()
    pool.store(drive(hour=5000))
    files = {pools.__file__, mongo.__file__}
    def once(rng):
        h, left = next(hours), int(10 ** rng.uniform(0, 2.6))
        def trace(frame, event, arg):
            nonlocal left
            if frame.f_code.co_filename not in files: return None
            if event == "line":
                left -= 1
                if left == 0: raise KeyboardInterrupt
            return trace
        call = [lambda: pool.store(drive(3, hour=h)), lambda: pool.store(drive(4, hour=h - 1, seed=1), overwrite=True), lambda: pool.delete(drive(hour=h - 2).id)][h % 3]
        before, had = sys.gettrace(), len(pool)
        sys.settrace(trace)
        try:
            try: call()
            except KeyboardInterrupt: pass
        finally: sys.settrace(before)
        if h % 3 != 2 or drive(hour=h - 2).id in pool: call()
        assert len(pool) == had + (1, 0, -1)[h % 3] == len(pool.catalogue()) and drive(hour=5000).id in pool
    attack("mongo: Ctrl-C at a line", 120, once)
    assert pool.verify() == [] and harness.raw_numbers(pool) == list(range(1, pool.version + 1))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # some hit a destructor, where they are lost
def test_interrupts_leave_nothing_open(harness, interrupted):
    "A handle that was interrupted two hundred times has as many threads and connections as before, and others who share it were not disturbed"
    pool, stop, failed = harness.open(), threading.Event(), []
    pool.extend([drive(3, hour=h) for h in range(20)])
    def read():
        while not stop.is_set():
            try: assert len(list(pool.snapshot())) == 20
            except Exception as e: failed.append(e)
    reader = threading.Thread(target=read)
    reader.start()
    rng = np.random.default_rng(0)
    for _ in range(200): interrupted(lambda: list(pool), rng.uniform(0, 0.03))
    stop.set(); reader.join()
    assert not failed and len(list(pool)) == 20
    gc.collect()
    until = time.monotonic() + 30
    while (n := sum("pymongo" in t.name for t in threading.enumerate())) > 40 and time.monotonic() < until: time.sleep(0.1)
    assert n <= 40, f"{n} threads of connections that nobody uses"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_with_one_connection(harness, interrupted):
    "Not one connection is counted as taken for ever: there is only one to take"
    pool = open_pool(f"{harness.server}/?maxPoolSize=1&waitQueueTimeoutMS=3000", **harness.name)
    pool.extend([drive(3, hour=h) for h in range(5)])
    rng = np.random.default_rng(0)
    for _ in range(600):
        interrupted(lambda: list(pool), rng.uniform(0, 0.012))
    assert len(list(pool)) == 5


def test_closing_is_interrupted(harness, monkeypatch):
    "Closed and forgotten in one step: the handle opens again"
    pool = harness.open()
    pool.store(drive())
    really = pymongo.MongoClient.close
    def late(client):
        really(client)
        raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(pymongo.MongoClient, "close", late)
        with pytest.raises(KeyboardInterrupt): pool.close()
    pool.load()
    assert facts_of(pool) == facts_of([drive()])


def test_a_child_has_its_own(harness, attack):
    "A fork at a random moment, while threads store and read: the child asks by a connection of its own, and both go on"
    pool, stop, hours = harness.open(), threading.Event(), itertools.count(100)
    pool.store(drive(hour=0))
    def work():
        while not stop.is_set(): pool.store(drive(2, hour=min(200, next(hours)))); list(pool.find(PoolQuery(start=(None, "2026-01-03T00:00Z"))))
    worker = threading.Thread(target=work)
    worker.start()
    def once(rng):
        time.sleep(rng.uniform(0, 0.02))
        ready, go = os.pipe()
        if (pid := os.fork()) == 0:
            try:
                signal.alarm(20)
                assert facts_of([pool[drive(hour=0).id]]) == facts_of([drive(hour=0)]) and len(pool) == len(list(pool.snapshot())) or len(pool) > 1
                os.write(go, b"ok")
            except BaseException as e: os.write(go, repr(e).encode())
            os._exit(0)
        os.close(go)
        said = os.read(ready, 65536)
        os.close(ready); os.waitpid(pid, 0)
        assert said == b"ok", said.decode() or "killed: it hung"
    try: attack("mongo: forks", 20, once)
    finally: stop.set(); worker.join()
    assert pool.verify() == []
