"""How pools show themselves: escaped, without secrets, in bounded time, and without opening or reading anything; short ids find episodes."""
from __future__ import annotations

import gc
import hashlib
import pickle
import random
import time
from dataclasses import replace

import pandas as pd
import pytest

from data_io_nbdev.data.core import PoolQuery
from data_io_nbdev.errors import EpisodeNotFound, PoolUnavailable, QueryError
from data_io_nbdev.storage.pool.memory import MemoryPool
from data_io_nbdev.storage.pool.columns import Commit, Index, Part, Totals, part_of
from data_io_nbdev.storage.pool.pool import Pool
from data_io_nbdev.testing import HARNESSES, drive, facts_of


@pytest.fixture(params=sorted(HARNESSES))
def harness(request, tmp_path): return HARNESSES[request.param](tmp_path)


def html(pool: Pool) -> str: return pool._repr_html_()


def counted(index: Index, version: int) -> Totals:
    "The totals of a version, one part after the other"
    ids = {part.id for part in index.every_part()}
    found = [parts for id in ids if (parts := index.parts(id, version))]
    every = [part for parts in found for part in parts]
    return Totals(len(found), len(every), sum(p.length for p in every), sum(p.nbytes for p in every))


def fill(pool: Pool, episodes: int, at_once: int = 5000) -> Pool:
    "An index as if that many episodes had been stored, of one to three parts; nothing is stored"
    first = part_of(drive(6))
    for number, begin in enumerate(range(0, episodes, at_once), 1):
        put = []
        for i in range(begin, min(begin + at_once, episodes)):
            part = replace(first, id=hashlib.sha256(b"%d" % i).hexdigest()[:32], who=("VB7", f"driver {i % 40}"), version=number,
                           start=first.start + i * 3_600_000_000, begin=first.begin + i * 3_600_000_000, end=first.end + i * 3_600_000_000)
            put += [replace(part, offset=k * part.length, born=number) for k in range(1 + i % 3)]
        pool._index.apply(Commit(number, str(number), tuple(put), schema=drive().schema if number == 1 else None))
    pool._shared["last"] = pool._index.number
    return pool


# --- what is shown ---

def test_facts(harness):
    "Where, version, episodes, steps, size, time and identity of every back-end; of a database what one question answers"
    pool = harness.open()
    assert "episodes" in html(pool) and type(pool).__name__ in html(pool)
    es = [drive(3, hour=h, driver=("anna", "bo")[h % 2]) for h in range(4)]
    pool.extend(es)
    shown, at_once = html(pool), type(pool)._glance(pool, 1).steps is not None
    for text in (pool.url, "<td", ">4<", "vehicle", "driver", *(("<svg", ">12<", "driver (2)", "2026-01-01 00:00:00") if at_once else ())):
        assert text in shown, f"{text} in {shown}"
    assert repr(pool).endswith("open, version 1, 4 episodes)"), pool
    pool.delete(es[0].id)
    assert ">3<" in html(pool) and "a snapshot, read-only" in html(pool.snapshot(1)) and ">4<" in html(pool.snapshot(1))
    assert html(pool.snapshot(0)) and html(harness.open("r")).count("read-only") == 1
    assert repr(pool.snapshot(1)).startswith(type(pool).__name__) and "read-only, version 1" in repr(pool.snapshot(1))


def test_text_is_text():
    "An identity, a level or a name that is HTML is text"
    bad = "<script>alert('&')</script>"
    pool = MemoryPool(name=bad)
    e = drive(3)
    pool.store(replace(e, schema=replace(e.schema, identity=[bad, "driver"]), who={bad: bad, "driver": bad}))
    for thing in (pool, pool.snapshot(), pool.catalogue()):
        assert "<script" not in thing._repr_html_() and "&lt;script" in thing._repr_html_()
    pool.close()
    assert "<script" not in html(pool)


def test_no_password(monkeypatch):
    "Neither a repr nor HTML has the password of an address, also where the server cannot be reached; that is said, and not raised"
    pytest.importorskip("pymongo")
    from data_io_nbdev.storage.pool import mongo
    url = "mongodb://anna:s3cr3t@127.0.0.1:1/db?serverSelectionTimeoutMS=50&authMechanismProperties=AWS_SESSION_TOKEN:t0k3n"
    with monkeypatch.context() as m:
        m.setattr(mongo._Link, "ask", lambda self, call, *args: False)  # as if there had been a server when it was opened
        pool = mongo.MongoPool(url, timeout=0.1)
    assert pool._link._address.count("s3cr3t") == 1
    for each in (pool, pool._view(1), pool._view()):
        said = html(each) + repr(each)
        assert "cannot be read now" in said and "anna" in said and "s3cr3t" not in said and "t0k3n" not in said
    pool.close()
    assert "s3cr3t" not in html(pool) + repr(pool) and "closed" in html(pool)


def test_no_option_of_a_store(monkeypatch):
    "What opens an object store is not shown"
    pytest.importorskip("deltalake")
    from data_io_nbdev.storage.pool.dask import DaskPool
    from data_io_nbdev.storage.pool.delta import RemoteLake
    options = {"AWS_ACCESS_KEY_ID": "anna", "AWS_SECRET_ACCESS_KEY": "s3cr3t", "AWS_REGION": "eu-west-1", "AWS_ALLOW_HTTP": "true",
               "AWS_ENDPOINT_URL": "http://127.0.0.1:1", "max_retries": "0", "retry_timeout": "1s"}
    with monkeypatch.context() as m:
        m.setattr(RemoteLake, "check", lambda self: True)
        pool = DaskPool("s3://bucket/lake", storage_options=options)
    for each in (pool, pool._view(1)): assert "s3cr3t" not in html(each) + repr(each) and "s3://bucket/lake" in html(each)


# --- nothing else happens ---

def test_closed_pools_stay_closed(harness, monkeypatch):
    "A closed pool shows that it is, and asks and opens nothing; one that its last buffer closed stays so"
    pool = harness.open()
    pool.store(drive())
    past = pool.snapshot()
    for close in (lambda: pool.close(), lambda: (pool._hold("a"), pool._release("a"))):
        pool.load()
        close()
        with monkeypatch.context() as m:
            def never(*args, **kwargs): raise AssertionError("a closed pool was asked")
            for name in ("_head", "_open", "_read", "_changes", "_glance"): m.setattr(type(pool), name, never)
            for each in (pool, past): assert "closed" in html(each) and "closed" in repr(each) and each.closed


def test_no_step_is_read(harness, monkeypatch):
    "Showing reads no step, and a repr not even the log"
    pool = harness.open()
    pool.extend([drive(3, hour=h) for h in range(5)])
    if not isinstance(pool, MemoryPool): pool = harness.open()
    def never(*args, **kwargs): raise AssertionError("steps were read")
    monkeypatch.setattr(type(pool), "_read", never)
    assert html(pool) and html(pool.snapshot())
    found = pool.find()
    assert len(found) == 5 and repr(found) == "Found(5 episodes, version 1)" and pool.catalogue()._repr_html_()
    if isinstance(pool, MemoryPool): return
    fresh = harness.open()
    for name in ("_head", "_changes", "_count"): monkeypatch.setattr(type(fresh), name, never)
    assert repr(fresh).startswith(type(fresh).__name__)


def test_completion(harness):
    "Completion offers what users call"
    pool = harness.open()
    assert {"store", "extend", "find", "count", "catalogue", "sample", "snapshot", "delete", "copy_to", "verify", "repair", "save", "version",
            "schema", "close", "load", "closed", "url"} <= set(dir(pool))
    assert not [name for name in dir(pool) if name.startswith("_")] and not {"view", "hold", "lend", "from_url"} & set(dir(pool))


# --- bounded ---

@pytest.mark.parametrize("episodes", [200_000])
def test_many_episodes(episodes):
    "Two hundred thousand episodes show themselves in a moment, with exact totals; a snapshot of them with estimates that say so"
    pool = fill(MemoryPool(name="many"), episodes)
    gc.collect()
    best = min(timed(lambda: html(pool)) for _ in range(5))
    assert best < 0.2, f"it took {best:.3f} s"
    shown = html(pool)
    assert f">{episodes:,}<" in shown and "driver (at least 40)" in shown and "that were looked at" in shown
    steps = 6 * sum(1 + i % 3 for i in range(episodes))
    assert f">{steps:,}<" in shown and len(shown) < 20_000
    past = pool.snapshot(pool.version // 2)
    assert min(timed(lambda: html(past)) for _ in range(5)) < 0.2
    estimate = past._glance(past.version)
    assert estimate.about and abs(estimate.episodes - episodes / 2) < episodes / 100 and "about " in html(past)
    assert min(timed(lambda: repr(pool)) for _ in range(5)) < 0.01 and repr(pool).endswith(f"{episodes:,} episodes)")


def test_one_long_episode():
    "An episode of a great many parts is not looked at whole again and again"
    pool, part = MemoryPool(name="long"), replace(part_of(drive(6)), version=1)
    put = tuple(replace(part, offset=6 * i) for i in range(100_000))
    pool._index.apply(Commit(1, "a", put, schema=drive().schema))
    pool._shared["last"] = 1
    assert min(timed(lambda: html(pool)) for _ in range(3)) < 0.3 and ">600,000<" in html(pool)


def timed(call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def test_totals_follow_the_log():
    "The totals that an index keeps are those that are counted, after whatever was put, hidden, moved, given up and forgotten"
    for seed in range(40):
        rng, pool = random.Random(seed), MemoryPool()
        for _ in range(30):
            some = [drive(rng.randint(1, 6), hour=rng.randint(0, 5)) for _ in range(rng.randint(1, 3))]
            what = rng.random()
            if what < 0.5: pool.extend(list({e.id: e for e in some}.values()), overwrite=True)
            elif what < 0.7 and len(pool): pool.delete(rng.choice(list(pool.catalogue().index)))
            elif what < 0.8 and len(pool):
                e = drive(9, hour=7 + rng.randint(0, 2))
                for cut in range(0, 9, 3): pool.store(e[cut:cut + 3])
            elif what < 0.9 and len(pool):
                parts = pool._parts(rng.choice(list(pool.catalogue().index)), pool.version)
                with pool._lock:
                    for change in pool._forgetting(parts[:rng.randint(1, len(parts))]): change()
            index = pool._catch_up(pool.version)
            assert index.totals == counted(index, pool.version) and index.totals.episodes == len(pool) == pool.count()
            fresh = Index()
            for commit in pool._changes(0, pool.version): fresh.apply(commit)
            assert fresh.totals == index.totals


def test_totals_when_versions_are_given_up():
    "Giving up old versions changes no total of the newest; hiding twice, or what is not there, counts once"
    index, part = Index(), part_of(drive(6))
    index.apply(Commit(1, "a", (replace(part, version=1),)))
    index.apply(Commit(2, "b", (replace(part, id="0" * 32, version=2),), (part.id, part.id, "nobody")))
    index.apply(Commit(3, "c", hide=(part.id,)))
    index.apply(Commit(4, "d", oldest=4))
    assert index.totals == counted(index, 4) == Totals(1, 1, 6, part.nbytes)


# --- beginnings of ids ---

def test_beginnings(harness):
    "Eight digits or more of an id do wherever an id does; fewer don't, and neither do those of an episode that is gone"
    pool = harness.open()
    es = [drive(3, hour=h) for h in range(6)]
    pool.extend(es)
    id = es[2].id
    for n in (8, 9, 31, 32):
        assert pool[id[:n]].id == id and id[:n] in pool and pool.count(id[:n]) == 1 and list(pool.catalogue(id[:n]).index) == [id]
        assert facts_of(pool.find([id[:n], es[4].id, id])) == facts_of([es[2], es[4]]) and pool.sample(1, id[:n])[0].id == id
    for wrong in (id[:7], "0" * 8, id[:8].upper() if id[:8].upper() != id[:8] else "F" * 8, "", id[:8] + "g", id + "0"):
        assert wrong not in pool
        for ask in (pool.__getitem__, pool.count, pool.catalogue, pool.delete, lambda w: list(pool.find(w))):
            with pytest.raises(EpisodeNotFound): ask(wrong)
    assert pool.count(PoolQuery(ids=id[:8])) == 0, "a query is taken literally"
    assert pool.delete(id[:8]) == [id] and id[:8] not in pool and len(pool) == 5
    assert pool.snapshot(1)[id[:8]].id == id and id[:8] in pool.snapshot(1)
    with pytest.raises(EpisodeNotFound): pool[id[:8]]
    assert pool.copy_to(MemoryPool(), es[0].id[:10]) == [es[0].id]
    for odd in (7, None, b"abcdefgh", 1.5): assert odd not in pool


def test_beginnings_that_two_share():
    "An ambiguous beginning is refused with some that it may mean; one digit more decides"
    pool, part = MemoryPool(), replace(part_of(drive(6)), version=1)
    ids = ["abcdef01" + "0" * 23 + c for c in "0123"] + ["abcdef02" + "0" * 24]
    pool._index.apply(Commit(1, "a", tuple(replace(part, id=id) for id in ids), schema=drive().schema))
    pool._shared["last"] = 1
    for ask in (pool.__getitem__, pool.count, pool.catalogue, pool.delete, pool.find, pool.__contains__):
        with pytest.raises(QueryError, match=f"{ids[0]}.*…; give more digits"): ask("abcdef01")
    assert pool.count("abcdef02") == 1 and pool.count(ids) == 5
    table = pool.catalogue()
    assert list(table.index) == ids and list(table._short().index) == ids, "as many digits as tell them apart"
    assert list(table.iloc[3:]._short().index) == [ids[3][:8], ids[4][:8]]


# --- find and catalogue ---

def test_find_says_how_many(harness):
    "An iterator with a length that counts down, at its own version, read as it goes"
    pool = harness.open()
    es = [drive(3, hour=h) for h in range(3)]
    pool.extend(es)
    found = pool.find()
    assert iter(found) is found and len(found) == 3 and repr(found) == "Found(3 episodes, version 1)" and found.version == 1
    pool.delete(es[1].id)
    assert next(found).id == es[0].id and len(found) == 2 and repr(found) == "Found(2 episodes left of 3, version 1)"
    assert [e.id for e in found] == [es[1].id, es[2].id] and len(found) == 0 and list(found) == []
    with pytest.raises(StopIteration): next(found)
    assert len(pool.find(PoolQuery(driver="nobody"))) == 0 and len(list(pool.find())) == 2


def test_a_find_that_fails_has_none_left():
    "After an error there is nothing left to read"
    pool = MemoryPool()
    pool.extend([drive(3, hour=h) for h in range(3)])
    def read(parts):
        yield parts[0].where.read()
        raise PoolUnavailable("the line dropped")
    pool._read = read
    found = pool.find()
    next(found)
    with pytest.raises(PoolUnavailable): next(found)
    assert len(found) == 0 and list(found) == []


def test_catalogues_are_frames():
    "Ids are short where a catalogue is shown, and whole everywhere else; it is a frame for pandas, in parts, pickled and compared"
    pool = MemoryPool()
    ids = pool.extend([drive(3, hour=h, driver=d) for h, d in enumerate(["anna", "bo", "cleo"])])
    table = pool.catalogue()
    assert isinstance(table, pd.DataFrame) and list(table.index) == ids
    for part in (table, table.head(2), table[table.driver != "bo"], table[["driver"]], table.sort_values("driver"), table.iloc[1:], table.copy(),
                 pickle.loads(pickle.dumps(table)), pd.concat([table, table])):
        assert isinstance(part, pd.DataFrame) and set(part.index) <= set(ids)
        for shown in (repr(part), part._repr_html_()): assert part.index[0][:8] in shown and part.index[0] not in shown
        assert part.index[0] in part.to_csv()
    plain = pd.DataFrame(table)
    assert type(plain) is pd.DataFrame
    for a, b in ((plain, table), (table, plain), (table, table.copy())): pd.testing.assert_frame_equal(a, b)
    pd.testing.assert_series_equal(plain["driver"], table["driver"])
    with pytest.raises(AssertionError): pd.testing.assert_frame_equal(plain.iloc[:1], table)
    counts = table.groupby("driver").seq_len.sum()
    assert list(counts) == [3, 3, 3] and list(table.reset_index()["id"]) == ids and ids[0] in repr(table.reset_index().to_dict())
    assert repr(table.set_index("driver")) == repr(plain.set_index("driver"))
    assert MemoryPool().catalogue()._repr_html_() and repr(MemoryPool().catalogue())
    assert list(pool.find(table.index)) == list(pool)
