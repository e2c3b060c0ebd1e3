"""What a database is asked: how many commands, by which index; and never more as the pool grows. Against a real server."""
import itertools

import pytest

pymongo = pytest.importorskip("pymongo")

from data_io_nbdev import MongoBuffer, PoolQuery
from data_io_nbdev.errors import CorruptData
from data_io_nbdev.storage.pool.pool import Commit, part_of
from data_io_nbdev.testing import MongoHarness, drive, facts_of
from test_mongo import asked


@pytest.fixture
def harness(tmp_path): return MongoHarness(tmp_path)


def indexes(harness):
    "The indexes of each collection, by the first field of each"
    return {what: {info["key"][0][0]: name for name, info in harness.of(what).index_information().items()} for what in ("log", "entries", "chunks")}


def is_equality(value): return not isinstance(value, dict)


def is_bounded(value): return isinstance(value, dict) and bool({"$gt", "$gte"} & value.keys())


def questions(commands, known):
    "Commands as texts: what is asked, and the index that serves it: the one of a field that equals a value, or of a bounded `_id`"
    said = []
    for name, command in commands:
        what = command[name].rpartition(".")[2] if isinstance(command[name], str) else ""
        filters = [command["filter"]] if name == "find" else [one["q"] for one in command.get("deletes", ())]
        if name == "distinct": filters = [command["query"]]
        if not filters: said.append(f"{name} {what}".strip())
        for filter in filters:
            by = [field for field, value in filter.items() if is_equality(value) and field in known[what]]
            ranges = [field for field in filter if field == "_id" and is_bounded(filter[field])]
            assert by or ranges, f"no index serves {name} {filter} in the {what}"
            said.append(f"{name} {what} {known[what][by[0]] if by else ranges[0] + ' range'}")
    return said


HEAD = ["find log _id_"] * 2  # are there the two commits behind the last one that was seen?
COMMITTED = ["insert chunks", "insert entries", "insert log"]
ONE = ["find entries id_1", "find log tokens_1"]
EXPECTED = {
    "open": ["find log _id_"],
    "first version": ["find log _id range"],
    "version": HEAD,
    "version of others": 2 * HEAD,
    "store": [*HEAD, "find entries id_1", "hello", *COMMITTED],
    "store, going on": [*HEAD, *ONE, "hello", *COMMITTED],
    "store, nothing new": [*HEAD, *ONE, "find log tokens_1"],  # of two parts
    "overwrite": [*HEAD, *ONE, "hello", *COMMITTED[:2], "insert entries", "insert log"],
    "delete": [*HEAD, *ONE, "insert entries", "insert log"],
    "one by id": [*HEAD, *ONE, "find chunks _id_"],
    "id in pool": [*HEAD, *ONE],
    "no such id": [*HEAD, "find entries id_1"],
    "len": HEAD,
    "schema": HEAD,
    "refresh, nothing new": HEAD,
    "refresh": [*HEAD, *HEAD, "find log _id_", "find entries token_1", *ONE, "find chunks _id_"],
    "taken back": ["find log tokens_1", "delete entries token_1", "delete chunks token_1"],
}


def filled(harness, entries):
    "A pool of so many commits of an entry each"
    pool = harness.open()
    for h in range(entries): pool.store(drive(2, hour=h))
    return pool


@pytest.mark.parametrize("entries", [20, 200])
def test_a_handful(harness, monkeypatch, entries):
    "Each question is so many commands, each served by an index, whatever the pool holds"
    others, e = filled(harness, entries), drive(9, hour=1000)
    known, seen = indexes(harness), {}
    with asked(monkeypatch) as said:
        def watch(what, call):
            said.commands.clear()
            result = call()
            seen[what] = questions(said.commands, known)
            return result
        pool = watch("open", harness.open)
        assert watch("first version", lambda: pool.version) == entries
        pool.store(drive(hour=999))  # makes indexes, where there are none
        watch("version", lambda: pool.version)
        buffer = MongoBuffer(pool=pool, batch_size=4, progress=False)
        buffer.load()
        watch("refresh, nothing new", buffer.refresh)
        others.store(drive(3, hour=1001))
        assert watch("refresh", buffer.refresh) == 3
        others.store(drive(3, hour=1002))
        watch("version of others", lambda: pool.version)
        watch("store", lambda: pool.store(e[:6]))
        watch("store, going on", lambda: pool.store(e))
        watch("store, nothing new", lambda: pool.store(e[:6]))
        watch("overwrite", lambda: pool.store(drive(4, hour=1001, seed=1), overwrite=True))
        watch("delete", lambda: pool.delete(drive(hour=1002).id))
        watch("one by id", lambda: pool[drive(hour=3).id])
        assert watch("id in pool", lambda: drive(hour=3).id in pool) and not watch("no such id", lambda: "f" * 32 in pool)
        assert watch("len", lambda: len(pool)) == entries + 3
        watch("schema", lambda: pool.schema)
        written = pool._write("0" * 32, [(part_of(drive(hour=5000)), drive(hour=5000))], pool.schema)
        watch("taken back", lambda: pool._undo(Commit(0, "0" * 32, tuple(written))))
    assert {what: sorted(some) for what, some in seen.items()} == {what: sorted(some) for what, some in EXPECTED.items()}
    assert pool.verify() == [] and len(harness.open()) == entries + 3


def test_no_index_for_nothing(harness, monkeypatch):
    "Every index that a pool has made is asked by something"
    pool = filled(harness, 12)
    known, used = indexes(harness), {what: {"_id"} for what in ("log", "entries", "chunks")}
    with asked(monkeypatch) as said:
        own = harness.open()
        for query in (PoolQuery(driver="anna"), PoolQuery(vehicle="VB7"), PoolQuery(start=("2026-01-01T01:30Z", None)), PoolQuery(length=(3, None)),
                      PoolQuery(time=("2026-01-01T05:00Z", None)), PoolQuery(time=(None, "2026-01-01T05:00Z")), PoolQuery(ids=drive(hour=3).id)): list(own.find(query))
        list(own._changes(3, 4))
        own._undo(Commit(0, "0" * 32, tuple(own._write("0" * 32, [(part_of(drive(hour=50)), drive(hour=50))], own.schema))))
    for name, command in said.commands:
        filters = [command["filter"]] if name == "find" else [one["q"] for one in command.get("deletes", ())]
        for filter in filters: used[command[name].rpartition(".")[2]] |= filter.keys()
    assert {what: set(fields) - used[what] for what, fields in known.items()} == {"log": set(), "entries": set(), "chunks": set()}


@pytest.mark.parametrize("missed, equalities, ranges", [(0, 2, 0), (1, 4, 0), (2, 3, 0), (3, 5, 0), (4, 4, 0), (7, 7, 0), (8, 4, 1), (60, 4, 1)])
def test_what_was_missed(harness, monkeypatch, missed, equalities, ranges):
    "A handle that missed commits finds the newest, few by equality, many by one range"
    others = harness.open()
    others.store(drive(2))
    with asked(monkeypatch) as said:
        pool = harness.open()
        assert pool.version == 1
        for h in range(1, 1 + missed): others.store(drive(2, hour=h))
        said.commands.clear()
        assert pool.version == 1 + missed
    ids = [command["filter"]["_id"] for _, command in said.commands]
    assert ([*map(is_equality, ids)].count(True), [*map(is_bounded, ids)].count(True)) == (equalities, ranges)
    assert facts_of(pool) == facts_of(others) and len(pool) == 1 + missed


def test_several_values(harness, monkeypatch):
    "A few ids are asked for by equality, and many at once; both find the same"
    others = harness.open()
    others.extend([drive(2, hour=h) for h in range(30)])
    for count in (1, 2, 8, 9, 30):
        ids = [drive(2, hour=h).id for h in range(count)]
        with asked(monkeypatch) as said: found = list(harness.open().find(ids))
        by_id = [command["filter"]["id"] for name, command in said.commands if name == "find" and command["find"].endswith(".entries")]
        assert len(by_id) == (count if count <= 8 else 1) and [*map(is_equality, by_id)] == [count <= 8] * len(by_id)
        assert sorted(e.id for e in found) == sorted(ids)


# --- a commit that is lost ---

def lost(harness, *numbers): harness.of("log").delete_many({"_id": {"$in": list(numbers)}})


def test_a_gap_is_seen_by_an_open_handle(harness):
    "A commit that is lost behind what a handle saw last is damage to it, too: its buffer says so, and it does not take the number"
    pool, others = harness.open(), harness.open()
    pool.store(drive(hour=0))
    buffer = MongoBuffer(pool=pool, batch_size=2, progress=False)
    buffer.load()
    for h in (1, 2): others.store(drive(hour=h))
    lost(harness, 2)
    with pytest.raises(CorruptData, match="gap"): buffer.refresh()
    pool.store(drive(hour=3))
    assert harness.raw_numbers(pool) == [1, 3, 4]
    for handle in (pool, others, harness.open()):
        with pytest.raises(CorruptData, match="gap"): list(handle)
        with pytest.raises(CorruptData, match="gap"): handle.repair(dry_run=False)


def test_a_gap_is_never_closed(harness, attack):
    "Whichever commits are lost while handles are open, whoever stores then: the last number of a gap is taken by nobody, and who reads everything is told"
    def once(rng):
        place = harness.fresh()
        handles, hours = [place.open() for _ in range(3)], itertools.count()
        for _ in range(int(rng.integers(3, 14))):
            some = handles[rng.integers(3)]
            some.store(drive(2, hour=next(hours)))
        newest = place.of("log").find_one(sort=[("_id", -1)])["_id"]
        first = int(rng.integers(1, newest))
        last = int(rng.integers(first, newest))
        lost(place, *range(first, last + 1))
        for _ in range(6):
            try: handles[rng.integers(3)].store(drive(2, hour=next(hours)))
            except CorruptData: pass
        assert place.of("log").find_one({"_id": last}) is None, f"commits {first} to {last} of {newest} were lost, and {last} was taken"
        for handle in (handles[0], place.open()):
            with pytest.raises(CorruptData): handle.repair(dry_run=False)
        with pytest.raises(CorruptData): list(place.open())
        for handle in handles: handle.close()
    attack("mongo: lost commits", 30, once)
