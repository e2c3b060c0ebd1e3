"""What comes in through the doors: addresses with secrets in them, documents that are none, and times at the ends of the calendar.

An address is built from secrets that the test knows, so that it can look for each word of them in whatever anybody gets to see.
"""
import logging
import os
import pickle
import string
import traceback
import warnings
from urllib.parse import quote, quote_plus, unquote, unquote_plus

import numpy as np
import pytest

from data_io_nbdev import open_pool
from data_io_nbdev.errors import DataIOError, PoolUnavailable, QueryError
from data_io_nbdev.storage.pool.pool import quoted, safe_url

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
    monkeypatch.setattr(mongo, "_check_ours", lambda pool: False)  # as if a server were there, with no pool yet
    monkeypatch.setattr(mongo._Link, "head", lambda link: 0)
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
    assert len(set(opened)) > 10, "many were good, and led to the same place"


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
