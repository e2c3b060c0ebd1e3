"""What stores, addresses, errors and a look around did wrong in the field: each report rebuilt, with its neighbours."""
import copy
import gc
import inspect
import json
import linecache
import os
import pickle
import pydoc
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from IPython.core import ultratb

import data_io_nbdev
from data_io_nbdev.data.core import Episode, PoolQuery, Record
from data_io_nbdev.data.schema import Schema
from data_io_nbdev.errors import (DataIOError, EpisodeConflict, EpisodeNotFound, MissingExtra, NotEnoughData, PoolUnavailable, QueryError,
                                  ReadOnly, SchemaError)
from data_io_nbdev.storage.buffer.dask import DaskBuffer
from data_io_nbdev.storage.buffer.memory import MemoryBuffer
from data_io_nbdev.storage.buffer.mongo import MongoBuffer
from data_io_nbdev.storage.pool import delta, mongo, parquet
from data_io_nbdev.storage.pool.dask import DaskPool
from data_io_nbdev.storage.pool.memory import MemoryPool
from data_io_nbdev.storage.pool.mongo import MongoPool
from data_io_nbdev.storage.pool.pool import open_pool, part_of
from data_io_nbdev.testing import HARNESSES, at_once, draws, drive, facts_of, mongo_server, python


@pytest.fixture(params=sorted(HARNESSES))
def harness(request, tmp_path): return HARNESSES[request.param](tmp_path)


def film(steps: int, dtype: str, *shape: int, **more) -> Episode:
    "An episode with a film in its info, whose first numbers count"
    frames = np.zeros((steps, *shape), dtype)
    frames.reshape(steps, -1)[:, 0] = np.arange(steps) % 100
    plain = {role: np.zeros((steps, 1), "float32") for role in ("state", "action", "nstate")}
    times = pd.date_range("2026-01-01", periods=steps, freq="s", tz="UTC")
    return Episode.from_arrays(**plain, reward=np.zeros(steps, "float32"), info={"film": frames}, timestamp=times, **more)


# --- more than 2 GB in a column ---

@pytest.mark.parametrize("back_end", ["delta", "mongodb"])
def test_a_part_of_more_than_two_gigabytes(tmp_path, back_end):
    "2,400 images of 480 x 640 x 3 in one episode come back with an equal digest, by a time range"
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for line in Path("/proc/meminfo").read_text().splitlines() if os.path.exists("/proc/meminfo") else ():
        if line.startswith("MemAvailable"): free = 1024 * int(line.split()[1])
    if free < 9 << 30:
        warnings.warn(f"NOT TESTED: a part of more than 2 GB needs 9 GB of memory, and {free >> 30} are free")
        pytest.skip("too little memory")
    pool, episode = HARNESSES[back_end](tmp_path).open(), film(2400, "uint8", 480, 640, 3)
    assert episode.blocks["info"].nbytes > 2**31
    pool.store(episode)
    (found,) = pool.find(PoolQuery(time=("2026-01-01T00:00:00Z", None)))
    assert len(found) == 2400 and found.digest == episode.digest


def test_a_column_is_never_made_one_arrow_array():
    "Pieces that share a little memory are more than 2 GB together"
    column = parquet.Column("x", pa.binary(), "info", film(1, "uint8", 1 << 20).schema.of("info")[0])
    piece = pa.array([bytes(1 << 20)] * 64, pa.binary())
    values = column._from_arrow(pa.chunked_array([piece] * 33))
    assert values.shape == (33 * 64, 1 << 20) and values.nbytes > 2**31 and not values[-1].any()


@pytest.mark.parametrize("dtype", ["uint8", "int8", "bool", "float16", "float32"])
@pytest.mark.parametrize("back_end", ["delta", "mongodb"])
def test_parts_in_many_pieces(tmp_path, monkeypatch, back_end, dtype):
    "Large parts are written and read some rows at a time, and nobody sees it"
    pool, episodes = HARNESSES[back_end](tmp_path).open(), [film(300, dtype, 7, 5), drive(50, linked=False), drive(40, hour=1)]
    episodes[0] = film(300, dtype, 7, 5, who=dict(vehicle="VB7"))
    monkeypatch.setattr(parquet, "_SLICE", 1000)
    monkeypatch.setattr(parquet, "_GROUP", 800)
    tables, whole = [], parquet.steps_of
    for module in (parquet, mongo): monkeypatch.setattr(module, "steps_of", lambda table, *rest: tables.append(table) or whole(table, *rest))
    pool.store(episodes[0])
    assert facts_of(pool) == facts_of(episodes[:1]) and pool.verify() == []
    assert min(column.num_chunks for column in tables[0].columns) > 3
    copied = MemoryPool()
    pool.copy_to(copied)
    assert facts_of(copied) == facts_of(pool)
    if back_end == "delta":
        monkeypatch.setattr(parquet, "_GROUP", 8 << 20)
        pool.store(film(20, dtype, 7, 5, who=dict(vehicle="VB8")))
        assert pool.compact() == 2 and len(pool) == 2 and facts_of([pool[episodes[0].id]]) == facts_of(episodes[:1])


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint8", "float64", "bool"])
def test_narrow_numbers_are_no_bomb(tmp_path, dtype):
    "Parquet keeps small numbers in four bytes; what unpacks to that is as large as the log says"
    pool, episode = DaskPool(tmp_path / "lake"), film(400, dtype, 100_000)
    pool.store(episode)
    assert next(pool.find()).digest == episode.digest and pool.verify() == []


def test_a_long_name_on_many_short_steps():
    "The text of an identity stands in every row, and counts for how many rows one Arrow array has"
    long = film(30_000, "uint8", 1, who=dict(driver="x" * 5000))
    table = parquet.to_table(part_of(long), long)
    assert max(chunk.nbytes for chunk in table["driver"].chunks) < 80 << 20 and len(table) == 30_000


# --- servers end with who started them ---

SERVING = """
import os, sys
from data_io_nbdev.testing import mongo_server
server = mongo_server({folder!r})
print(server.__enter__(), flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "os._exit(1)", "1 / 0", "del server", "os.abort()", "sys.exit()"])
def test_no_server_outlives_its_process(tmp_path, end):
    "However the process ends, the server's port is free again before long"
    if os.environ.get("MONGODB_URI") is None: HARNESSES["mongodb"](tmp_path)  # skips, loudly, where there is no server
    done = subprocess.run([sys.executable, "-c", SERVING.format(folder=str(tmp_path / "data"), end=end)], capture_output=True, text=True)
    port, until = int(done.stdout.rsplit(":", 1)[1]), time.monotonic() + 20
    while time.monotonic() < until:
        try: socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError: return
        time.sleep(0.01)
    pytest.fail(f"the server still answers on port {port}")


def test_a_child_leaves_the_server_alone(tmp_path, monkeypatch):
    "A forked child that ends, and with it all that its parent had begun: newer Pythons do that to children of `multiprocessing`"
    HARNESSES["mongodb"](tmp_path)
    monkeypatch.delenv("MONGODB_URI", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    server = mongo_server()
    url = server.__enter__()
    folder, = tmp_path.glob("tmp*")
    if (child := os.fork()) == 0:
        try: server.__exit__(None, None, None)
        finally: os._exit(0)
    os.waitpid(child, 0)
    assert folder.exists()
    open_pool(url, database="another").store(drive())
    server.__exit__(None, None, None)
    assert not folder.exists()


def test_a_start_that_is_interrupted_leaves_no_server(tmp_path, monkeypatch):
    HARNESSES["mongodb"](tmp_path)
    from data_io_nbdev.testing import server as module
    began = []
    def interrupted(*args): raise KeyboardInterrupt
    server = module.MongoServer(tmp_path / "data")
    popen = subprocess.Popen
    monkeypatch.setattr(module.subprocess, "Popen", lambda *args, **kw: began.append(popen(*args, **kw)) or began[-1])
    monkeypatch.setattr(module.socket, "create_connection", interrupted)
    with pytest.raises(KeyboardInterrupt): server.start()
    assert began[0].poll() is not None and server.process is None


# --- extras that are missing ---

WITHOUT = """
import sys
import tempfile
class Missing:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in {gone}: raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
import inspect, io, pydoc, contextlib
import data_io_nbdev
from data_io_nbdev.errors import MissingExtra
def told(call):
    try: call()
    except MissingExtra as e: return str(e)
    raise AssertionError("nobody was told")
{what}
"""


def without(gone, what): return subprocess.run([sys.executable, "-c", WITHOUT.format(gone=gone, what=what)], capture_output=True, text=True)


def test_looking_around_never_fails():
    "help, hasattr, dir and getmembers need no extra; use says which is missing"
    done = without(("deltalake", "pyarrow", "pymongo", "bson", "dask", "distributed", "pytest", "hypothesis"), """
with contextlib.redirect_stdout(io.StringIO()): help(data_io_nbdev)
assert "DaskPool" in pydoc.render_doc(data_io_nbdev) or True
found = dict(inspect.getmembers(data_io_nbdev))
names = ("DaskPool", "DaskBuffer", "MongoPool", "MongoBuffer")
for name in dir(data_io_nbdev): assert hasattr(data_io_nbdev, name), name
from data_io_nbdev import DaskPool, DaskBuffer, MongoPool, MongoBuffer, MemoryPool
for kind, extra in ((DaskPool, "dask"), (DaskBuffer, "dask"), (MongoPool, "mongo"), (MongoBuffer, "mongo")):
    if kind is MongoBuffer and not issubclass(type(kind), type): continue
    with contextlib.redirect_stdout(io.StringIO()): help(kind)
    inspect.getmembers(kind), inspect.signature(kind), repr(kind), kind.__name__
    assert not isinstance(MemoryPool(), kind) and not hasattr(kind, "nothing")
for kind, extra in ((DaskPool, "dask"), (DaskBuffer, "dask"), (MongoPool, "mongo")):
    for use in (lambda: kind("x"), lambda: type("Mine", (kind,), {}), lambda: kind._from_url("x")): assert f"[{extra}]" in told(use)
assert "[dask]" in told(lambda: data_io_nbdev.open_pool("folder"))
assert "[mongo]" in told(lambda: data_io_nbdev.open_pool("mongodb://localhost/x"))
import data_io_nbdev.testing as testing
inspect.getmembers(testing), dir(testing)
with contextlib.redirect_stdout(io.StringIO()): help(testing)
from data_io_nbdev.testing import drive, mongo_server, facts
assert len(drive(4)) == 4
def suite(): from data_io_nbdev.testing import PoolContract
def harness(): import data_io_nbdev.testing.harness
def pools(): import data_io_nbdev.testing.pools
def buffers(): from data_io_nbdev.testing.buffers import BufferContract
for use in (suite, harness, pools, buffers): assert "[test]" in told(use), use
""")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("what", ["data_io_nbdev.DaskPool('x')", "data_io_nbdev.open_pool('x')", "data_io_nbdev.open_pool('mongodb://h/x')",
                                  "from data_io_nbdev.storage.pool.dask import DaskPool", "data_io_nbdev.testing.PoolContract",
                                  "class Mine(data_io_nbdev.MongoPool): pass"])
def test_a_missing_extra_in_few_lines(what):
    done = without(("deltalake", "pyarrow", "pymongo", "bson", "pytest"), f"import data_io_nbdev.testing\n{what}")
    lines = done.stderr.splitlines()
    assert "MissingExtra" in lines[-1] and "pip install" in lines[-1] and len(lines) < 25, done.stderr


# --- tracebacks ---

FLAT = pd.DataFrame({"speed": [1.0, 2.0], "pedal": [0.0, 1.0]})
TYPO = PoolQuery(vehicel="VB7")


def told(code: str, names: dict, ipython: bool) -> tuple[DataIOError, list[str]]:
    "The error of a line that a user typed, and the lines in which it is shown"
    linecache.cache["cell.py"] = len(code), None, [code + "\n"], "cell.py"
    try: exec(compile(code, "cell.py", "exec"), {**globals(), **names})
    except DataIOError as e:
        e.__traceback__ = e.__traceback__.tb_next  # ours
        if not ipython: return e, traceback.format_exception(type(e), e, e.__traceback__)
        return e, ultratb.FormattedTB(mode="Context", theme_name="nocolor").structured_traceback(type(e), e, e.__traceback__)
    raise AssertionError("nobody was told")


def check_short(code, kind, match="", ipython=False, **names):
    "In under 25 lines, with the user's code, the method and the message"
    error, lines = told(code, names, ipython)
    text, method = "\n".join(lines), re.search(r"(\w+)[(\[]", code)[1]
    assert type(error) is kind and re.search(match, str(error)), str(error)
    assert len(text.splitlines()) < 25 and "direct cause" not in text and "During handling" not in text, text
    assert code in text and str(error) in text and re.search(rf"in (\w+\.)?({METHODS.get(method, method)})\b", text), text
    return str(error)


METHODS = {"pool": "__getitem__", **{name: "__init__|__post_init__|_make" for name in ("PoolQuery", "DaskPool", "MongoPool", "Kind")}}
MISTAKES = {  # what a user types, and what comes of it
    "pool.store(FLAT)": SchemaError, "pool.extend([FLAT])": SchemaError, "buffer.store(FLAT)": SchemaError, "own.store(FLAT)": SchemaError,
    "pool.find(TYPO)": QueryError, "pool.count(TYPO)": QueryError, "pool.catalogue(TYPO)": QueryError, "pool.sample(1, TYPO)": QueryError,
    "pool.delete(TYPO)": QueryError, "pool.copy_to(copy, TYPO)": QueryError, "wrong.load()": QueryError, "wrong.sample()": QueryError, "buffer.find(TYPO)": QueryError,
    "pool['nobody']": EpisodeNotFound, "pool.store(other)": EpisodeConflict, "own.sample()": NotEnoughData, "past.store(other)": ReadOnly,
    "buffer.load_state_dict({'format': 99})": QueryError, "Kind(pool=pool, batch_size=-1)": QueryError, "pool.save('mongodb:/eve@x')": QueryError}


@pytest.mark.parametrize("code", MISTAKES)
@pytest.mark.parametrize("ipython", [False, True], ids=["python", "jupyter"])
def test_mistakes_are_told_in_few_lines(harness, code, ipython):
    pool, kind = harness.open(), harness.buffer
    pool.store(drive())
    names = dict(pool=pool, Kind=kind, buffer=kind(pool=pool, batch_size=4), own=kind(batch_size=4), wrong=kind(pool=pool, batch_size=4, query=TYPO),
                 past=pool.snapshot(), copy=MemoryPool(), other=drive(seed=3))
    check_short(code, MISTAKES[code], ipython=ipython, **names)


@pytest.mark.parametrize("code, kind", [
    ("Episode.from_frame(FLAT)", SchemaError), ("Schema.from_frame(FLAT)", SchemaError), ("PoolQuery(start=('2026-01-01', None))", QueryError),
    ("PoolQuery.from_json('7')", QueryError), ("Episode.from_arrays(**steps)", SchemaError), ("record.to_episode()", SchemaError),
    ("Schema.from_json('[]')", SchemaError), ("open_pool('ftp://x/y')", QueryError)])
@pytest.mark.parametrize("ipython", [False, True], ids=["python", "jupyter"])
def test_mistakes_at_other_doors(code, kind, ipython):
    steps = dict(state=[[1]], action=[[1]], reward=[1], timestamp=["yesterday"])
    check_short(code, kind, ipython=ipython, steps=steps, record=Record(state=[1], action=[1], reward=1, nstate=[1], timestamp="2026", episodestart="2026"))


def test_damage_keeps_its_traceback(tmp_path):
    "What is no mistake of the user is told with all that led to it"
    from data_io_nbdev.errors import CorruptData, at_the_door
    def deep(): raise CorruptData("damaged") from ValueError("why")
    with pytest.raises(CorruptData) as e:
        with at_the_door: deep()
    assert e.traceback[-1].name == "deep" and isinstance(e.value.__cause__, ValueError)


def test_an_empty_buffer_says_so(harness):
    pool = harness.open()
    buffer = harness.buffer(pool=pool, batch_size=4)
    with pytest.raises(NotEnoughData, match="^this buffer is empty, .*version 0 of"): buffer.sample()
    with pytest.raises(NotEnoughData, match="^this buffer is empty"): harness.buffer(batch_size=4).sample()
    pool.store(drive())
    with pytest.raises(NotEnoughData, match="version 0 of .* has no step; store.* or refresh"): buffer.sample()
    buffer.refresh()
    assert len(buffer.sample()[0]) == 4
    with pytest.raises(NotEnoughData, match="this buffer is empty.* matches PoolQuery"):
        harness.buffer(pool=pool, batch_size=4, query=PoolQuery(vehicle="nobody")).sample()


@pytest.fixture
def nobody():
    "A port on which nobody listens"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_a_database_that_is_away(nobody):
    "What refused, in a few lines, and no topology"
    url = f"mongodb://eve:secret@127.0.0.1:{nobody}/fleet"
    for code in ("open_pool(url, timeout=0.5)", "MongoPool(url, timeout=0.5)"):
        for ipython in (False, True):
            said = check_short(code, PoolUnavailable, rf"127\.0\.0\.1:{nobody}: .*refused", ipython, url=url)
            assert "opology" not in said and "timeouts" not in said and "secret" not in said
    away = f"127.0.0.1:{nobody},localhost:{nobody}"
    with pytest.raises(PoolUnavailable) as e: MongoPool(f"mongodb://{away}/fleet?replicaSet=rs0", timeout=0.5)
    assert "opology" not in str(e.value) and str(e.value).count("refused") == 2


@pytest.mark.parametrize("url, names", [("s3://bucket/lake", ["AWS_ENDPOINT_URL", "AWS_REGION", "AWS_ACCESS_KEY_ID"]), ("s3a://bucket/lake", ["AWS_REGION"]),
                                        ("gs://bucket/lake", ["GOOGLE_APPLICATION_CREDENTIALS"]), ("abfss://box@account.dfs.core.windows.net/lake", ["AZURE_STORAGE_ACCOUNT_NAME"])])
def test_an_object_store_that_does_not_answer(monkeypatch, nobody, url, names):
    "One line without colours, and the variables that say where it is"
    for name in list(os.environ):
        if name.startswith(("AWS", "AZURE", "GOOGLE")): monkeypatch.delenv(name)
    here = f"http://127.0.0.1:{nobody}"
    quick = dict(max_retries="0", retry_timeout="1s", timeout="2s", allow_http="true")
    options = {"s3": dict(AWS_ENDPOINT_URL=here, AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="hush", AWS_REGION="x"),
               "gs": dict(google_base_url=here, google_skip_signature="true"), "ab": dict(azure_endpoint=here, azure_storage_account_key="aHVzaA==")}[url[:2]]
    for ipython in (False, True):
        said = check_short("DaskPool(url, storage_options=options)", PoolUnavailable, "", ipython, url=url, options={**quick, **options})
        assert said.isprintable() and all(name in said for name in ["storage_options", *names]) and "hush" not in said, said
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    said = check_short("open_pool('s3://bucket/lake')", PoolUnavailable)
    assert said.isprintable() and "AWS_SECRET_ACCESS_KEY" in said


# --- identities without levels, buffers that travel ---

@pytest.mark.parametrize("who", [["VB7"], "VB7", [("vehicle", "VB7")], {"VB7"}, 7, [], "", {7: "VB7"}], ids=repr)
@pytest.mark.parametrize("schema", [None, drive().schema])
def test_who_without_levels(who, schema):
    "A `SchemaError` that shows how it is written, in every door"
    arrays = dict(state=np.zeros((1, 3), "f4"), action=np.zeros((1, 2), "f4"), reward=np.zeros(1, "f4"), nstate=np.zeros((1, 3), "f4"))
    with pytest.raises(SchemaError, match="who: expected identity levels by name"):
        Episode.from_arrays(**arrays, timestamp=["2026-01-01T00:00Z"], who=who, schema=schema)
    record = Record(**{role: a[0] for role, a in arrays.items()}, timestamp="2026-01-01T00:00Z", episodestart="2026-01-01T00:00Z", who=who)
    with pytest.raises(SchemaError, match="who: expected identity levels by name"): MemoryPool().store(record)
    if who: 
        with pytest.raises(QueryError, match="who: expected identity levels by name"): PoolQuery(who=who)


class Client:
    "What a buffer takes for a `distributed.Client`, and what cannot travel"
    def nthreads(self): return {"here": 1}
    def submit(self, call, *args, **kw): raise AssertionError("nobody reads by it")
    def __reduce__(self): raise TypeError("a client stays where it is")


@pytest.mark.parametrize("way", [copy.deepcopy, lambda buffer: pickle.loads(pickle.dumps(buffer))], ids=["deepcopy", "pickle"])
def test_a_client_stays_where_it_is(tmp_path, way):
    "A lake's buffer travels without its client"
    pool = DaskPool(tmp_path / "lake")
    pool.extend([drive(40, hour=h) for h in range(4)])
    buffer = DaskBuffer(pool=pool, batch_size=8, seed=3, client=Client(), resident="memory")
    assert draws(way(buffer)) == draws(DaskBuffer(pool=pool, batch_size=8, seed=3))
    assert way(buffer).client is None and isinstance(buffer.client, Client)


# --- addresses ---

def test_what_a_path_gives_as_a_url(tmp_path, monkeypatch):
    "`as_uri`, `file://localhost`, `file:` and `~` lead where `Path` and `urllib` say, by every door"
    monkeypatch.setenv("HOME", str(tmp_path))
    there = tmp_path / "with space and ü"
    pool = open_pool(there.as_uri())
    pool.store(drive())
    assert sorted(os.listdir(tmp_path)) == [there.name]
    host, plain, home = there.as_uri().replace("file://", "file://localhost"), there.as_uri().replace("file://", "file:"), f"~/{there.name}"
    for url in (there, str(there), there.as_uri(), host, plain, plain.upper()[:5] + plain[5:], home, Path(home), os.fsencode(there), "delta" + there.as_uri()[4:]):
        assert facts_of(open_pool(url, "r")) == facts_of([drive()]), url
        assert facts_of(DaskPool(url, "r")) == facts_of([drive()]), url
    assert facts_of(pickle.loads(pickle.dumps(open_pool(home)))) == facts_of([drive()])
    assert sorted(os.listdir(tmp_path)) == [there.name]


def test_files_by_url(tmp_path, monkeypatch):
    "The same for what a `MemoryPool` saves, and for the folder of mapped rows"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for i, url in enumerate(((tmp_path / "a b0.npz").as_uri(), "~/a b1.npz", str(tmp_path / "a b2.npz"))):
        for opened in (open_pool, MemoryPool):
            with opened(url) as pool: pool.store(drive())
            assert type(pool) is MemoryPool and facts_of(opened(tmp_path / f"a b{i}.npz", "r")) == facts_of([drive()])
    pool.save("~/copy.npz")
    MemoryBuffer(pool=pool, batch_size=2).save((tmp_path / "another copy.npz").as_uri())
    lake = DaskPool("~/lake")
    lake.store(drive())
    DaskBuffer(pool=lake, batch_size=4, resident="mapped", cache="~/mapped rows").load()
    DaskBuffer(pool=lake, batch_size=4, resident="mapped", cache=(tmp_path / "more rows").as_uri()).load()
    assert sorted(os.listdir(tmp_path)) == ["a b0.npz", "a b1.npz", "a b2.npz", "another copy.npz", "copy.npz", "lake", "mapped rows", "more rows"]


@pytest.mark.parametrize("url", ["file://nas/pool", "file://eve:hush@nas/pool", "file://~/pool", "file://pool", "delta://eve:hush@host", 7, None, 7.5], ids=str)
def test_addresses_that_nobody_can_mean(tmp_path, monkeypatch, url):
    "A host, or what is no path at all, is refused; no folder is made"
    monkeypatch.chdir(tmp_path)
    for call in (open_pool, DaskPool, *((MemoryPool,) if url is not None else ())):
        with pytest.raises(QueryError) as e: call(url)
        assert "hush" not in str(e.value)
    assert os.listdir(tmp_path) == []


def test_a_folder_of_an_earlier_version(tmp_path):
    "What was once made under an escaped name is not passed over for a new, empty pool"
    with pytest.warns(UserWarning, match="take '%20' in a path"): DaskPool(tmp_path / "with%20space").store(drive())
    with pytest.raises(QueryError, match="rename it, or open it by its path"): open_pool((tmp_path / "with space").as_uri())
    assert len(open_pool(tmp_path / "with%20space")) == 1


def test_spaces_in_other_urls(tmp_path):
    "A database's name is unescaped, too, and a pool's own URL leads back to it"
    harness = HARNESSES["mongodb"](tmp_path)
    pool = open_pool(f"{harness.server}/{harness.name['database']}.a%2Bb%20c")
    pool.store(drive())
    assert pool._link.collection == "a+b c" and len(open_pool(pool.url, "r")) == 1
    pool.delete(everything=True)


@pytest.mark.parametrize("name, sign", [("50%25 done", "%25"), ("a%2Fb", "%2F"), ("a\\b", "\\"), ("a\nb", "\n"), ("%e4", "%e4")])
def test_a_folder_that_others_misread(tmp_path, name, sign):
    "Told when it is made, with the reason, and not again; the pool works"
    pool = DaskPool(tmp_path / name / "lake")
    with pytest.warns(UserWarning, match=re.escape(f"take {sign!r} in a path")): pool.store(drive())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool.store(drive(hour=1))
        assert len(DaskPool(tmp_path / name / "lake")) == 2


@pytest.mark.parametrize("name", ["100% done", "a b", "ü温", "a#b", "a?b", "%zz", "a&b"])
def test_a_folder_that_others_read(tmp_path, name):
    "No warning where there is nothing to tell: `deltalake` reads it, and makes a checkpoint"
    import deltalake
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool = DaskPool(tmp_path / name)
        pool.store(drive())
        pool._lake._checkpoint(1)
    assert deltalake.DeltaTable(str(tmp_path / name)).version() == 1


# --- units that are given later ---

def unitless(hour=0, **more) -> Episode:
    "A drive of which nobody said the units"
    episode = drive(hour=hour, **more)
    fields = {role: episode.fields(role) for role in ("state", "action", "reward", "nstate")}
    return Episode.from_arrays(**fields, timestamp=episode.timestamp, episodestart=episode.episodestart, who=episode.who)


def unit_of(schema, *names): return [f.unit for name in names for f in schema.fields if f.name == name]


def again(harness, pool):
    "The pool, opened once more, from storage"
    if type(pool) is MemoryPool: pool.save()
    return harness.open()


def test_units_given_later(harness):
    "In one commit; what is there has them from then on, snapshots from before do not, and other units are refused"
    pool = harness.open()
    pool.extend([unitless(h) for h in range(3)])
    steps, old, past, query = facts_of(pool), pool.schema, pool.snapshot(), PoolQuery(vehicle="VB7", time=("2026-01-01T00:00:02Z", None))
    new = pool.set_units({"velocity": "m/s", "reward": {"work": "kJ"}})
    assert pool.version == 2 and new == pool.schema and unit_of(new, "velocity", "work", "pedal") == ["m/s", "kJ", None]
    for each in (pool, again(harness, pool), pickle.loads(pickle.dumps(pool)) if pool.durable else pool):
        assert each.schema == new and each.snapshot(2).schema == new and each.version == 2 and each.verify() == []
        assert facts_of(each) == steps and len(each.catalogue()) == 3
        found = [*each, *each.find(query), *each.sample(2, seed=1), each[unitless().id]]
        assert {e.schema for e in found} == {new} and found[0].to_frame().attrs["units"]["state"] == {"velocity": "m/s"}
        assert each.snapshot(1).schema == old and {e.schema for e in each.snapshot(1)} == {old} and facts_of(each.snapshot(1)) == steps
        assert unit_of(harness.buffer(pool=each.snapshot(2), batch_size=4).sample().schema, "velocity") == ["m/s"]
    assert past.schema == old and {e.schema for e in past} == {old}
    with pytest.raises(SchemaError, match="velocity.*m/s"): pool.store(Episode.from_frame(units_of(unitless(5), "km/h")))
    pool = harness.open()
    pool.store(Episode.from_frame(units_of(unitless(5), "m/s")))
    pool.store(unitless(6))
    assert pool.store(unitless(6)) and pool.version == 4 and {e.schema for e in pool} == {new} and again(harness, pool).schema == new


def units_of(episode, unit):
    frame = episode.to_frame()
    frame.attrs["units"] = {"state": {"velocity": unit}}
    return frame


def test_units_again(harness):
    "Twice is no commit; a second one adds; several opened pools see it, whoever wrote last"
    pool = harness.open()
    pool.store(unitless())
    first = pool.set_units({"velocity": "m/s"})
    assert pool.set_units({"velocity": "m/s"}) == first == pool.set_units({}) and pool.version == 2
    beside = harness.beside(pool)
    assert beside.schema == first
    pool.store(unitless(1))
    second = beside.set_units({"action": {"pedal": "%"}, "velocity": "m/s"})
    assert beside.version == 4 and pool.schema == second and unit_of(second, "velocity", "pedal") == ["m/s", "%"]
    pool.delete(unitless(1).id)
    for each in (pool, again(harness, pool)):
        assert [unit_of(each.snapshot(v).schema, "velocity", "pedal") for v in (1, 2, 3, 4, 5)] == [[None, None], ["m/s", None], ["m/s", None], ["m/s", "%"], ["m/s", "%"]]
        assert each.verify() == [] and len(each) == 1 and each.repair() == []


@pytest.mark.parametrize("units, match", [
    ({"velocity": "km/h"}, "was stored so, and cannot be made km/h"), ({"sped": "m/s"}, "no field 'sped'.*state velocity"), ({"slope": ""}, "a unit is text"),
    ({"slope": 7}, "a unit is text"), ("m/s", "units are {'speed'"), ({"nstate": {"slope": "1"}}, "no field 'slope'"), (None, "units are"), ({7: "m"}, "no field 7"),
    ({"slope": "1", "velocity": "km/h"}, "cannot be made")], ids=str)
def test_units_that_cannot_be_given(harness, units, match):
    "Nothing is committed, and nothing changes"
    pool = harness.open()
    pool.store(drive())
    with pytest.raises(SchemaError, match=match): pool.set_units(units)
    assert pool.version == 1 and pool.schema == drive().schema


def test_units_of_nothing(harness):
    pool = harness.open()
    with pytest.raises(SchemaError, match="is empty and has no field"): pool.set_units({"velocity": "m/s"})
    pool.store(drive())
    with pytest.raises(ReadOnly): pool.snapshot().set_units({"slope": "1"})
    if pool.durable:
        with pytest.raises(ReadOnly): harness.open("r").set_units({"slope": "1"})
    assert pool.version == 1


def test_a_name_of_two_roles():
    pool = MemoryPool()
    pool.store(Episode.from_arrays(state={"x": [1.0]}, action={"x": [1.0]}, reward={"x": [1.0]}, nstate={"x": [1.0]}, timestamp=["2026-01-01T00:00Z"]))
    with pytest.raises(SchemaError, match=r"state and action and reward.*\{'state': \{'x': 'm'\}\}"): pool.set_units({"x": "m"})
    assert [f.unit for f in pool.set_units({"state": {"x": "m"}, "reward": {"x": "s"}}).fields] == ["m", None, "s"]


def test_units_against_writers(harness):
    "Whoever comes second is checked against the first: another unit is refused, the same one is no commit, a store goes on"
    pool = harness.open()
    pool.store(unitless())
    def ask(i): return outcome(lambda: harness.beside(pool).set_units({"velocity": "m/s" if i % 2 else "km/h"}))
    outcomes = at_once(*(partial(ask, i) for i in range(6)), *(partial(outcome, partial(pool.store, unitless(i))) for i in (6, 7)))
    unit = unit_of(pool.schema, "velocity")[0]
    assert sorted(outcomes[:6]) == ["SchemaError"] * 3 + ["done"] * 3 and outcomes[6:] == ["done"] * 2 and unit in ("m/s", "km/h")
    assert pool.version == 4 and len(pool) == 3 and again(harness, pool).schema == pool.schema and pool.verify() == []


def outcome(call) -> str:
    try: call()
    except DataIOError as e: return type(e).__name__
    return "done"


def test_units_go_where_the_episodes_go(harness, tmp_path):
    "A copy, a saved file, a compacted lake and a buffer that travels have them"
    pool = harness.open()
    pool.extend([unitless(h) for h in range(3)])
    buffer = harness.buffer(pool=pool, batch_size=4, seed=1)
    before, state = draws(buffer, 2), buffer.state_dict()
    new = pool.set_units({"velocity": "m/s"})
    pool.save(tmp_path / "saved.npz", overwrite=True)
    pool.copy_to(copied := MemoryPool())
    assert MemoryPool(tmp_path / "saved.npz").schema == copied.schema == new
    if isinstance(pool, DaskPool):
        for h in range(3, 6): pool.store(unitless(h))
        assert pool.compact() and pool.vacuum("0s", dry_run=False) and again(harness, pool).schema == new
        return
    buffer.load_state_dict(state)
    fresh = draws(buffer, 2)
    again_ = harness.buffer(pool=pool, batch_size=4, seed=1)
    assert draws(again_, 2) == before and fresh != before and buffer.refresh() == 0


def test_units_are_of_the_newest_format(tmp_path, monkeypatch):
    "A log without them is as it was; one that gives some is refused by name where it cannot be understood. A `MemoryPool` writes one format, which knows them"
    from data_io_nbdev.errors import CorruptData
    for harness in (HARNESSES[name](tmp_path / name) for name in sorted({*HARNESSES} - {"memory"}) if (tmp_path / name).mkdir() is None):
        pool = harness.open()
        pool.store(unitless())
        module = {DaskPool: delta, MongoPool: mongo}[type(pool)]
        with monkeypatch.context() as older:
            older.setattr(module, "NEWEST", module.FORMAT)
            assert len(again(harness, pool)) == 1
        pool.set_units({"velocity": "m/s"})
        pool.store(unitless(1))
        pool.close()
        with monkeypatch.context() as older:
            older.setattr(module, "NEWEST", module.FORMAT)
            with pytest.raises(CorruptData, match="has format 3, which needs a newer data_io_nbdev; this one reads up to 2"): list(harness.open("r"))
        assert len(harness.open("r")) == 2


def test_a_back_end_that_keeps_no_units():
    "It says so, before anything is committed"
    class Plain(MemoryPool): gives_units = False
    pool = Plain()
    pool.store(unitless())
    with pytest.raises(QueryError, match="Plain does not keep units"): pool.set_units({"velocity": "m/s"})
    assert pool.version == 1
