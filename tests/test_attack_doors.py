"""What comes in through the doors: addresses with secrets in them, documents that are none, and times at the ends of the calendar.

An address is built from secrets that the test knows, so that it can look for each word of them in whatever anybody gets to see.
"""
import copy
import json
import logging
import os
import pickle
import string
import traceback
import tracemalloc
import warnings
from datetime import datetime, timedelta, timezone
from urllib.parse import quote, quote_plus, unquote, unquote_plus
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pytest

from data_io_nbdev import Episode, Field, MemoryBuffer, MemoryPool, PoolQuery, Record, Schema, open_pool
from data_io_nbdev.data.core import FIRST, LAST, from_us
from data_io_nbdev.errors import DataIOError, PoolUnavailable, QueryError, SchemaError, SnapshotNotFound
from data_io_nbdev.storage.buffer.rows import row_dtype
from data_io_nbdev.storage.pool.pool import quoted, safe_url
from data_io_nbdev.testing import HARNESSES, drive, facts, facts_of, through_json

pymongo, dns = pytest.importorskip("pymongo"), pytest.importorskip("dns.resolver") and __import__("dns.resolver")
pytest.importorskip("deltalake")
from data_io_nbdev.storage.pool import dask, delta, mongo  # noqa: E402

ODD = ["\n", "\r\n", "\t", " ", "/", "//", "@", "?", "#", ":", "::", "%", "&", "=", ";", ",", "[", "]", "\\", "'", '"', "$", "+", "ü", "温", "\u202e", "\0",
       "://", ":@", "@/", "?x=", "%40", "%3A", "%2F", "%0A", "%25"]
OPTIONS = ["password", "authMechanismProperties", "tlsCertificateKeyFilePassword", "sig", "accountkey", "AWS_SECRET_ACCESS_KEY", "sas_token", "credential",
           "client_secret", "X-Amz-Signature", "PASSWD"]
HOSTS = ["127.0.0.1:1", "host", "a.example.org,b.example.org:27018", "[::1]:1", "[fe80::1%25eth0]", "bucket/lake", "h:port"]


class Secret:
    "A secret of odd characters, and the words in it, none of which may be seen"
    def __init__(self, rng):
        self.words = ["".join(rng.choice(list(string.ascii_letters), 7)) for _ in range(rng.integers(1, 4))]
        ends = [pick(rng, ODD) if rng.random() < 0.2 else "" for _ in range(2)]
        self.text = ends[0] + "".join(w + (pick(rng, ODD) if i else "") for i, w in reversed(list(enumerate(self.words)))) + ends[1]

    def leaked(self, *things) -> list:
        "What shows a word of it: in its text, its repr, the whole traceback, or pickled, escaped or not"
        texts = [(thing, t) for thing in things for t in (
            [thing.decode("latin1")] if isinstance(thing, bytes) else [str(thing), repr(thing)]
            + (traceback.format_exception(thing) if isinstance(thing, BaseException) else []))]
        return [(repr(thing)[:200], t) for thing, t in texts for way in (str, unquote, unquote_plus) if any(w.lower() in way(t).lower() for w in self.words)]


def pick(rng, items): return items[rng.integers(len(items))]


def address(rng, secret: str) -> str:
    "A URL that holds a secret, well written or not"
    written = pick(rng, [str, str, quote, quote_plus, lambda s: quote(quote(s))])(secret)
    host, user = pick(rng, HOSTS), pick(rng, ["eve", "eve", "eve%40firm.example", "CN=eve,OU=x", "", "e/ve", "e ve", "a:b", "ü"])
    if rng.random() < 0.25:
        before = pick(rng, ["", "tls=true&", "appName=x&"])
        after = pick(rng, ["", "", "&tls=true", "#end"])
        return f"{pick(rng, ['mongodb', 'mongodb+srv', 's3', 'az', 'abfss', 'gs'])}://{host}/fleet?{before}{pick(rng, OPTIONS)}={written}{after}"
    scheme = pick(rng, ["mongodb://"] * 6 + ["mongodb+srv://", "MongoDB://", "  mongodb://", "\tmongodb://", "mongodb:/", "mongodb:", "mongodb///", "mongodb:///", "//", "",
                                           "delta://mongodb://", "mongodb://mongodb://", "delta://", "file://", "s3://", "s3a://", "gs://", "az://", "abfs://", "abfss://",
                                           "https://", "memory:", "carrier-pigeon://"])
    tail = pick(rng, ["", "/fleet", "/fleet.experience", "/fleet?tls=true", "/fleet?appName=me@work", "?authSource=admin", "/fl%20eet?x=y", "\n", ".npz"])
    return f"{scheme}{user}:{written}@{host}{tail}"


@pytest.fixture
def anywhere(tmp_path, monkeypatch):
    "A folder of its own, in which nothing may come into being; no key and no server in the environment"
    for name in list(os.environ):
        if name.startswith(("AWS", "AZURE", "GOOGLE", "MONGODB")): monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mongo._Log, "exists", lambda log: False)  # as if a server were there, with no pool yet
    monkeypatch.setattr(mongo._Log, "head", lambda log: 0)
    monkeypatch.setattr(dns.resolver, "resolve", no_such_host)
    return monkeypatch


def no_such_host(name, *args, **kw):
    "As without a network, and as `dnspython` says it: with the host's name"
    raise dns.resolver.NoNameservers(f"The DNS query name does not exist: {name}.")


def tried(call) -> list:
    "What a call returned or raised, and every warning"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try: done = call()
        except DataIOError as e: done = e
    return [done, *(str(w.message) for w in seen)]


def same_place(a: str, b: str) -> bool:
    "Whether two URLs lead to the same place, with the same user, password and options"
    a, b = (pymongo.uri_parser.parse_uri(url) for url in (a, b))
    return all(a[k] == b[k] for k in ("nodelist", "username", "password", "options"))


def test_urls(attack, anywhere, tmp_path, caplog):
    "Whatever is done with a URL, nothing that anybody sees holds a word of its secret; and it is a pool, or a typed error"
    caplog.set_level(logging.DEBUG)
    opened = []
    def once(rng):
        secret = Secret(rng)
        url = address(rng, secret.text)
        doors = (lambda: open_pool(url), lambda: open_pool(url, "r"), lambda: mongo.MongoPool(url), lambda: mongo._Link(url, None, "odd name/%", 1),
                 lambda: dask.DaskPool(url), lambda: dask.DaskPool(url, "r"), lambda: delta.open_lake(url), lambda: mongo.MongoPool(safe_url(url)))
        found = [thing for door in doors for thing in tried(door)]
        pools = [thing for thing in found if isinstance(thing, mongo.MongoPool)]
        found += [safe_url(url)] + [thing for pool in pools for thing in (pool.url, pool._link, pool._link.shown, pickle.dumps(pool))] + [r.getMessage() for r in caplog.records]
        assert not (leaked := secret.leaked(*found)), (url, leaked)
        for pool in pools:
            said = pymongo.uri_parser.parse_uri(pool._link._address)
            with pytest.MonkeyPatch.context() as there:
                if "\0" in (said["password"] or ""): continue  # no variable can hold it
                if said["password"]: there.setenv("MONGODB_PASSWORD", said["password"])
                again = tried(lambda: pickle.loads(pickle.dumps(pool)))[0]
            if "=***" in pool.url: assert isinstance(again, PoolUnavailable) and "whole URL" in str(again)
            else:
                assert isinstance(again, mongo.MongoPool)
                assert again.url == pool.url and same_place(again._link._address, pool._link._address)
                assert (again._link.database, again._link.collection) == (pool._link.database, pool._link.collection)
                opened.append(said["password"])
        assert not list(tmp_path.iterdir()), f"{url!r} became a file"
    attack("odd URLs", 300, once)
    assert len(set(opened)) > 5, "many were good, and led to the same place"


def test_words_of_libraries(attack):
    "What a library says is shown without any piece of a secret, wherever in a chain of errors it is, and shown as it is where it has none"
    def once(rng):
        secret, plain, link = Secret(rng), rng.random() < 0.3, rng.integers(3)
        way = pick(rng, [str, quote, quote_plus, str.lower, str.upper, unquote])
        said = "connection refused" if plain else f"no port: {way(pick(rng, secret.words + [secret.text]))}"
        inner, outer = OSError(said), OSError("it failed")
        if link == 1: outer.__cause__ = inner
        elif link: outer.__context__ = inner
        error = outer if link else inner
        if whole := way(secret.text) in said or rng.random() < 0.5: words, cause = quoted(error, f"mongodb://eve:{quote_plus(secret.text)}@host/db")
        else: words, cause = quoted(error, "s3://bucket/lake", {"AWS_SECRET_ACCESS_KEY": secret.text, "AWS_REGION": "here"})
        if plain: assert (words, cause) == (str(error), error)
        elif whole: assert not secret.leaked(words, *[cause] * (cause is not None))
        words, cause = quoted(OSError(f"GET http://eve:{quote(secret.text, safe='')}@host/x?list failed"), "s3://bucket/lake")
        assert not secret.leaked(words, *[cause] * (cause is not None)) and "GET http://" in words and "@host" in words
    attack("words of libraries", 200, once)


def test_names_that_are_no_secrets():
    "A container of Azure, a user, a key file's path and a folder with odd names are shown, and stay openable"
    for url in ("abfss://box-1@account.dfs.core.windows.net/lake", "abfs://$web@account.blob.core.windows.net/lake", "mongodb://eve@host/db", "s3://bucket/key=3/sig=a",
                "mongodb://eve%40FIRM@host/?authMechanism=GSSAPI", "mongodb://host/?tlsCertificateKeyFile=/etc/me.pem", "/home/eve@firm/run:1@2", "./a:b@c", "C:\\lakes\\a@b"):
        assert safe_url(url) == url
    for url in ("abfss://box:key@account.dfs.core.windows.net", "abfss://a2V5PT0=@account.dfs.core.windows.net", "s3://AKIA@bucket"): assert "***@" in safe_url(url)


@pytest.mark.parametrize("url", ["user:pw@host", "mongodb:/user:pw@host", "mongodb//user:pw@host/db.npz", "//user:pw@host", "host?password=pw"])
def test_no_folder_of_such_a_name(tmp_path, monkeypatch, url):
    "What looks like a URL is not taken for a path; as ./name it is"
    monkeypatch.chdir(tmp_path)
    for door in (open_pool, dask.DaskPool, lambda url: open_pool(url, "r")):
        with pytest.raises(QueryError, match=r"\./name"): door(url)
    with open_pool("./user:pw@host") as pool: assert pool.url == str(tmp_path / "user:pw@host")


@pytest.mark.parametrize("given", [{"AWS_ENDPOINT_URL": "http://eve:SECRET@127.0.0.1:1"}, {"AWS_SECRET_ACCESS_KEY": "SECRET\n", "AWS_ENDPOINT_URL": "http://SECRET"},
                                   {"AWS_SECRET_ACCESS_KEY": "SECRET", "timeout": "SECRET"}, {"AWS_SECRET_ACCESS_KEY": "SECRET", "AWS_ENDPOINT_URL": "SECRET"}])
def test_a_store_with_secrets_in_its_options(anywhere, given):
    "A store's words are not quoted where they repeat an option that is secret, or show an endpoint's password"
    secret = Secret(np.random.default_rng(1))
    options = {"AWS_ALLOW_HTTP": "true", "AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "k",
               "max_retries": "0", "retry_timeout": "1s", "timeout": "1s", **{k: v.replace("SECRET", secret.words[0]) for k, v in given.items()}}
    found = tried(lambda: dask.DaskPool("s3://bucket/lake", storage_options=options))
    assert isinstance(found[0], (PoolUnavailable, QueryError)) and not secret.leaked(*found)


# --- documents ---

DEEP, HUGE = "[" * 100_000 + "]" * 100_000, "1" + "0" * 5000
RAW = {"@deep": DEEP, "@dicts": '{"a":' * 50_000 + "1" + "}" * 50_000, "@huge": HUGE, "@-huge": "-" + HUGE, "@inf": "1e400", "@nan": "NaN", "@infinity": "-Infinity"}
WRONG = [None, True, False, 0, -1, 1, 2, 2.5, 1.0, 2**31, 2**53 + 1, 2**62, 2**63, -2**63 - 1, 10**400, "", "x", "7", "\ud800", "x" * 5000, [], [[]], [None], [1] * 40, [2**62], [1, 2**32],
         [[1, 2**32]], [[2**32, 1]], [[3, 3], [1, 1]], [[1, 1]] * 3, {}, {"a": 1}, {"kind": 7}, {"kind": "Uniform", "x": [[[[]]]]}, *RAW]


def places(doc, at=()) -> list:
    "The path to each value in a document"
    items = doc.items() if isinstance(doc, dict) else enumerate(doc) if isinstance(doc, list) else ()
    return [at] + [path for key, value in items for path in places(value, (*at, key))]


def mutated(rng, doc):
    "A document of which one to three values were dropped, retyped, nested, enlarged or swapped"
    doc = copy.deepcopy(doc)
    for _ in range(rng.integers(1, 4)):
        path = pick(rng, places(doc))
        if not path: continue
        inside = doc
        for key in path[:-1]: inside = inside[key]
        value, how = inside[path[-1]], rng.integers(6)
        if how == 0: del inside[path[-1]]
        elif how == 1: inside[path[-1]] = pick(rng, [[value], [[value]], {"a": value}, {str(path[-1]): value}])
        elif how == 2 and isinstance(value, (int, float)): inside[path[-1]] = pick(rng, [-value, value + 1, value - 1, value * 10**20, bool(value), str(value)])
        elif how == 2 and isinstance(value, (list, str)) and len(value) < 1000: inside[path[-1]] = value * int(pick(rng, [0, 2, 1000]))
        elif how == 3 and isinstance(inside, dict): inside[str(pick(rng, [*inside, "else"]))] = copy.deepcopy(value)
        else: inside[path[-1]] = copy.deepcopy(pick(rng, WRONG))
    return doc


def written(doc) -> str:
    "As JSON, with what no Python object of this test could hold"
    text = json.dumps(doc)
    for name, raw in RAW.items(): text = text.replace(json.dumps(name), raw)
    return text


def spread(doc):
    "A document with what `json.loads` makes of odd texts, where it makes anything; deep nesting as lists in lists"
    if isinstance(doc, dict): return {k: spread(v) for k, v in doc.items()}
    if isinstance(doc, list): return [spread(v) for v in doc]
    if not isinstance(doc, str) or doc not in RAW: return doc
    if doc in ("@huge", "@-huge"): return 10**5000
    if doc not in ("@deep", "@dicts"): return float(RAW[doc].replace("Infinity", "inf"))
    out = []
    for _ in range(20_000): out = [out] if doc == "@deep" else {"a": out}
    return out


@pytest.fixture
def lean():
    "What a test may take of memory: far less than the sizes that are claimed"
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400e6, f"{peak / 1e6:.0f} MB were taken"  # rows reserve 64 MB of addresses at a time


SCHEMA = Schema([Field("state", "velocity", (3,), unit="m/s"), Field("state", "camera", (8, 8, 3), "uint8"), Field("action", "torque", (2,)), Field("reward", "work"),
                 Field("info", "note", (), "int64")], {"vehicle": str, "trip": int}, flags=(("terminated", "done"),))
QUERY = PoolQuery(vehicle=["VB7", "VB8"], trip=7, start=("2026-01-01T00:00Z", None), time=(None, "2027-01-01T00:00Z"), length=(1, 99), ids=["0" * 32])


def test_schemas_as_json(attack, lean):
    "A text is a schema that numpy can lay out and that is read back equal, or a `SchemaError`"
    right, good = json.loads(SCHEMA.to_json()), []
    def once(rng):
        text = pick(rng, [written, written, written, lambda d: written(d)[:rng.integers(len(written(d)))], lambda d: written(d).encode()])(mutated(rng, right))
        try: schema = Schema.from_json(text)
        except SchemaError as e: assert len(str(e)) > 12; return
        assert Schema.from_json(schema.to_json()) == schema and hash(schema) is not None and schema.to_json().encode()
        assert row_dtype(schema, False).itemsize < 2**31
        good.append(1)
    attack("schemas as JSON", 400, once)
    assert len(good) > 20


def test_queries_as_json(attack, lean):
    "A text is a query that can be asked, or a `QueryError`"
    right, pool, good = json.loads(QUERY.to_json()), MemoryPool(), []
    pool.store(drive())
    def once(rng):
        text = pick(rng, [written, written, written, lambda d: written(d)[:rng.integers(len(written(d)))], lambda d: written(d).encode()])(mutated(rng, right))
        try: query = PoolQuery.from_json(text)
        except QueryError as e: assert len(str(e)) > 12; return
        assert PoolQuery.from_json(query.to_json()) == query and repr(query) and hash(query) is not None
        try: pool.count(query)
        except QueryError: pass
        good.append(1)
    attack("queries as JSON", 400, once)
    assert len(good) > 20


def test_objects_made_directly(attack, lean):
    "The same values are refused by the constructors, too, with the same errors"
    odd = [*map(spread, WRONG), 10**5000, float("nan"), np.float32(2), np.int8(2), np.zeros(2), np.array(3), {1, 2}, {1: 2}, b"x", object(), print, int, str, range(3), "float32", np.dtype("f4"),
           [("a", "f4")], np.array(["a"]), pd.NaT, pd.Timestamp("2026", tz="UTC"), (None, pd.Timestamp("2026", tz="UTC")), [10**400, None], slice(3), (5, 1), Field("state", "x")]
    field, query = dict(role="state", name="v", shape=(2,), dtype="f4", unit="m"), dict(start=None, time=None, length=None, ids=None, who=None, vehicle="VB7")
    schema = dict(fields=SCHEMA.fields, identity=SCHEMA.identity, columns=SCHEMA.columns, flags=SCHEMA.flags)
    def once(rng):
        kind, right, error = [(Field, field, SchemaError), (Schema, schema, SchemaError), (PoolQuery, query, QueryError)][rng.integers(3)]
        what = pick(rng, [*right])
        value = pick(rng, odd)
        if rng.random() < 0.3: value = [value] if rng.random() < 0.5 else (value, value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try: made = kind(**{**right, what: value})
            except error as e: assert len(str(e)) > 12
            else: assert isinstance(hash(made), int) and (kind is Field or kind.from_json(made.to_json()) == made)
    attack("fields, schemas and queries", 600, once)


def test_states(attack, lean):
    "What is no state of this buffer is a `QueryError`, or another pool's; and then the buffer is as it was"
    pool = MemoryPool()
    for h in range(4): pool.store(drive(hour=h))
    buffers = [MemoryBuffer(pool=pool, batch_size=4, seed=1, capacity=capacity) for capacity in (None, 9)]
    for buffer in buffers: buffer.load()
    pool.store(drive(hour=4)); pool.delete(drive(hour=1).id)
    for buffer in buffers: buffer.refresh(); buffer.sample()
    rights, done = [through_json(buffer.state_dict()) for buffer in buffers], []
    def once(rng):
        i = rng.integers(2)
        state = spread(mutated(rng, rights[i]))
        if rng.random() < 0.2: state = spread({**rights[i], pick(rng, [*rights[i]]): pick(rng, WRONG)})
        if rng.random() < 0.3: state = {**rights[i], "rng": spread(mutated(rng, rights[i]["rng"]))}
        if isinstance(state, dict) and any(isinstance(n := state.get(name), int) and 10**6 < n <= 2**53 for name in ("capacity",)): return  # some machine may hold it
        before = buffers[i].state_dict()
        try: buffers[i].load_state_dict(state)
        except DataIOError as e:
            assert len(str(e)) > 12 and buffers[i].state_dict() == before
            done.append("refused")
        else:
            done.append("taken")  # another number of the generator, say
            buffers[i].load_state_dict(rights[i])
    attack("states of buffers", 400, once)
    assert done.count("refused") > 5 * done.count("taken") > 0


@pytest.mark.parametrize("change", [
    {"versions": [[1, 2**32]]}, {"versions": [[1, 2**62]]}, {"versions": [[4, 6], [1, 3]]}, {"versions": [[1, 4], [4, 6]]}, {"versions": [[6, 4]]}, {"versions": [[-1, 6]]}, {"versions": [[1.0, 6]]},
    {"versions": [[True, 6]]}, {"versions": []}, {"versions": [[1]]}, {"versions": 6}, {"versions": [[4, 4]] * 10**6}, {"rows": -1}, {"rows": 10**400}, {"rows": 99}, {"rows": "9"}, {"serial": -1},
    {"serial": True}, {"serial": 2**62}, {"capacity": 0}, {"capacity": 2**62}, {"capacity": 10**400}, {"capacity": 1}, {"trail": ""}, {"trail": "Z" * 64}, {"trail": 7}, {"trail": "ab"}, {"sampler": {}},
    {"sampler": "Uniform"}, {"sampler": {"kind": 7}}, {"sampler": {"kind": "Uniform", "x": {1, 2}}}, {"rng": {}}, {"rng": {"bit_generator": "MT19937"}}, {"rng": None}, {"query": 7}, {"query": DEEP},
    {"query": HUGE}, {"format": True}, {"format": 2}, {"format": HUGE}], ids=lambda c: str(c)[:40])
def test_each_part_of_a_state(change):
    "What can be told from a state alone is told, whatever the pool has"
    pool = MemoryPool()
    for h in range(6): pool.store(drive(hour=h))
    buffer = MemoryBuffer(pool=pool, batch_size=4, capacity=9)
    buffer.load()
    right = through_json(buffer.state_dict())
    others = ({"versions": [[1, 2**32]]},)  # which some pool may have
    with pytest.raises(SnapshotNotFound if change in others else QueryError): buffer.load_state_dict({**right, **change})
    buffer.load_state_dict(right)
    for name, wrong in [("state", {"state": -1, "inc": 1}), ("state", {"state": 2**128, "inc": 1}), ("state", {"state": 1.5, "inc": 1}), ("state", {"inc": 1}), ("has_uint32", 2**40), ("uinteger", -1),
                        ("uinteger", "a"), ("has_uint32", 7), ("uinteger", 2**32)]:
        with pytest.raises(QueryError): buffer.load_state_dict({**right, "rng": {**right["rng"], name: wrong}})


# --- times ---

ENDS = [*[FIRST, LAST] * 4, -2**53, 2**53, *(n * 10**6 for n in (-2**31, 2**31, 2**40)), *(n // 1000 for n in (-2**63 + 1, 2**63 - 1)), 0]
TZS = [timezone.utc, ZoneInfo("Asia/Tokyo"), ZoneInfo("America/New_York"), ZoneInfo("Pacific/Kiritimati"), timezone(timedelta(hours=-12)), timezone(timedelta(hours=14)),
       timezone(timedelta(hours=23, minutes=59)), timezone(timedelta(hours=-23, minutes=-59)), ZoneInfo("Europe/Berlin")]


def around(rng, steps: int) -> np.ndarray:
    "Some microseconds near an end of something"
    by = pick(rng, [1, 10**3, 10**6, 60 * 10**6, 3600 * 10**6, 86400 * 10**6])
    return np.array(pick(rng, ENDS) + int(rng.integers(-30, 30)) * by + np.arange(steps) * by)


def spelled(rng, us: np.ndarray):
    "Times in one of the forms in which they come; raises where such times cannot be spelled so"
    tz, far = pick(rng, TZS), pd.DatetimeIndex(us.view("M8[us]"), tz="UTC")
    how, coarse = rng.integers(8), pick(rng, ["s", "ms", "us", "ns"])
    if how >= 6: return far.tz_convert(tz)
    if how <= 2 and not (us % {"s": 10**6, "ms": 10**3}.get(coarse, 1)).any():
        index = (far.as_unit(coarse) if coarse != "ns" else pd.DatetimeIndex((us.astype(object) * 1000).astype("int64").view("M8[ns]"), tz="UTC")).tz_convert(tz)
        return [index, pd.Series(index), list(pd.DatetimeIndex(index, tz="UTC"))][how]
    when = [datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(microseconds=int(t)) for t in us]
    if how == 3: return [t.astimezone(tz) for t in when]
    if how == 4: return [t.isoformat() for t in when]
    if how == 5 and len(gaps := {t.astimezone(tz).utcoffset() for t in when}) == 1 and not gaps.pop() % timedelta(minutes=1):
        return np.array([t.astimezone(tz).isoformat() for t in when])
    return far


@pytest.mark.filterwarnings("ignore:.*Discarding nonzero nanoseconds.*", "ignore:.*vectorized.*")
@pytest.mark.parametrize("kind", sorted(HARNESSES))
def test_times(attack, tmp_path, kind):
    "A time in the years 1 to 9999 comes back equal from every back-end, whichever way it came; any other is refused at the door"
    harness = HARNESSES[kind](tmp_path)
    pool, right, refused = harness.open(), {}, []
    def once(rng):
        us = around(rng, int(rng.integers(1, 4)))
        try: times = spelled(rng, us)
        except Exception: return  # pandas or Python cannot spell it
        try: first = times.iloc[0] if isinstance(times, pd.Series) else times[0]
        except Exception: first = times[:1]  # pandas cannot say it alone
        n, ok = len(us), FIRST <= us[0] and us[-1] <= LAST
        arrays = dict(state=np.zeros((n, 3), "f4"), action=np.zeros((n, 2), "f4"), reward=np.zeros(n, "f4"), nstate=np.ones((n, 3), "f4"))
        who = {"vehicle": "VB7", "driver": str(len(right))}
        episodestart = times if rng.random() < 0.3 and n == 1 else None
        def doors():
            yield "arrays", lambda: Episode.from_arrays(**arrays, timestamp=times, episodestart=episodestart, who=who)
            if isinstance(times, pd.DatetimeIndex):  # pandas itself forgets the year of anything else
                shape = Episode.from_arrays(**arrays, timestamp=pd.date_range("2026", periods=n, freq="s", tz="UTC"), who=who).to_frame()
                levels = [[who["vehicle"]], [who["driver"]], times[:1], times]
                index = pd.MultiIndex(levels, [[0] * n] * 3 + [range(n)], names=["vehicle", "driver", "episodestart", "timestamp"])
                yield "frame", lambda: Episode.from_frame(shape.set_axis(index))
            if len(np.shape(first)) == 0: yield "record", lambda: Record(**{k: v[0] for k, v in arrays.items()}, timestamp=first, episodestart=first, who=who).to_episode()
        for name, door in doors():
            inside = ok or (name == "record" and FIRST <= us[0] <= LAST)
            if not inside:
                with pytest.raises(SchemaError): pool.store(door())
                refused.append(name)
                continue
            e = door()
            assert e.times.tolist() == us[:len(e)].tolist() and e.start == us[0]
            assert repr(e) and e.episodestart.isoformat() and [t.isoformat() for t in e.timestamp] and e.timestamp.as_unit("us").asi8.tolist() == e.times.tolist()
            assert Episode.from_frame(frame := e.to_frame()) == e and repr(frame)
        if not FIRST <= us[0] <= LAST:
            for part in ("start", "time"):
                with pytest.raises(QueryError): PoolQuery(**{part: (first, None)})
            return
        query = PoolQuery(start=(first, first), time=(first, None))
        assert query.start == (us[0], us[0]) and PoolQuery.from_json(query.to_json()) == query and repr(query)
        if not ok: return
        e = Episode.from_arrays(**arrays, timestamp=times, who=who)
        right[pool.store(e)] = facts(e)
        assert facts_of(pool.find(PoolQuery(driver=who["driver"], start=(first, None), time=(first, None)))) == [facts(e)]
    attack(f"times, {kind}", 120 if kind != "mongodb" else 60, once)
    again = harness.open()
    catalogue = again.catalogue()
    assert repr(catalogue) and catalogue["episodestart"].dt.as_unit("us").astype("int64").to_dict() == {id: e["start"] for id, e in right.items()}
    assert {e.id: facts(e) for e in again} == right and again.verify() == [] and len(right) > 10 and len(refused) > 3
    buffer = MemoryBuffer(pool=again, batch_size=8)
    buffer.load()
    assert {e for e in buffer.sample(500).frames()[0].index.get_level_values("timestamp").year} <= set(range(1, 10_000))


def test_what_was_put_together_by_hand(tmp_path):
    "An `Episode` from outside the calendar is refused by every pool, and can be looked at"
    e = drive()
    for shift in (FIRST - e.start - 1, LAST - e.start, 2**62):
        far = Episode(schema=e.schema, who=e.who, start=e.start + shift, times=e.times + shift, blocks=e.blocks)
        assert "Episode(" in repr(far)
        for pool in (MemoryPool(), dask.DaskPool(tmp_path / "lake")):
            with pytest.raises(SchemaError, match="years 1 to 9999"): pool.store(far)
            assert pool.version == 0


def test_times_that_are_no_times():
    "Nothing else comes through, either: not two where one is asked, not none, and no number of any size"
    arrays = dict(state=np.zeros((1, 3), "f4"), action=np.zeros((1, 2), "f4"), reward=np.zeros(1, "f4"), nstate=np.ones((1, 3), "f4"))
    now = pd.Timestamp("2026", tz="UTC")
    for odd in (10**400, -10**5000, 7, 1.5, float("inf"), [[now]], {}, b"x", True, object(), np.datetime64("2026"), np.array(["2026"], "M8[D]"), np.array([2**62], "M8[s]"), [10**400], "9" * 5000,
                pd.DatetimeIndex([], tz="UTC"), pd.DatetimeIndex(np.array([2**61], "M8[s]"), tz="UTC"), pd.NaT, [pd.NaT], None, [None], lambda: now):
        with pytest.raises(SchemaError): Episode.from_arrays(**arrays, timestamp=odd)
        if odd is not None:
            with pytest.raises(SchemaError): Episode.from_arrays(**arrays, timestamp=[now], episodestart=odd)
            with pytest.raises(QueryError): PoolQuery(start=(odd, None))
    with pytest.raises(QueryError, match="one time"): PoolQuery(start=([now, now], None))
    for step in (10**400, 2**63, -2**63 - 1, 1.5, True, "7"):
        with pytest.raises(SchemaError): Episode.from_arrays(**arrays, timestamp=[now], step=step)
    assert from_us(LAST, "Asia/Tokyo") == from_us(LAST) and from_us(np.array([0, FIRST]), "America/New_York").tz is not None
