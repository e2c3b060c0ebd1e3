"""The database: storing, loading and drawing, beside one nested document a step on the same server. `run.py` shows it.

`python benchmarks/mongo.py` shows what questions take in a small pool and in a large one; `--entries 2000 20000` says how many entries these have.

The server is the one that the tests use: `MONGODB_URI`, else `mongod`, else FerretDB. What travels is counted by a relay between client and server.
"""
from __future__ import annotations

import argparse
import itertools
import socket
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pymongo
from fastcore.basics import chunked

from data_io_nbdev import Episode, MemoryBuffer, MongoBuffer, MongoPool
from data_io_nbdev.storage.pool import mongo
from data_io_nbdev.storage.pool.pool import Commit, part_of
from data_io_nbdev.testing import mongo_server
from run import episode, medians

STEPS, EPISODES = 300, 3  # of an episode; that are loaded


class Relay:
    "Passes bytes between clients and a server, and counts them"
    def __init__(self, server: str):
        self.server, self.count = pymongo.uri_parser.parse_uri(server)["nodelist"][0], 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"mongodb://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, server = self.listener.accept()[0], socket.create_connection(self.server)
                for ends in ((client, server), (server, client)): threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, here: socket.socket, there: socket.socket) -> None:
        with suppress(OSError), here, there:
            while data := here.recv(1 << 16):
                self.count += len(data)
                there.sendall(data)

    def during(self, call: Callable[[], Any]) -> int: # Bytes
        before = self.count
        call()
        return self.count - before

    def close(self) -> None: self.listener.close()


class Nested:
    "One nested document a step"
    def __init__(self, url: str, name: str):
        self.steps = pymongo.MongoClient(url, w="majority", journal=True).bench[name]

    def store(self, e: Episode) -> None:
        about = {"id": e.id, **e.who, "episodestart": e.start}
        columns = (e.times.tolist(), *(e.blocks[role].tolist() for role in ("state", "action", "reward", "nstate")))
        self.steps.insert_many([{**about, "timestamp": t, "state": s, "action": a, "reward": r, "nstate": ns} for t, s, a, r, ns in zip(*columns)])

    def load(self) -> dict[str, np.ndarray]:
        found = list(self.steps.find(sort=[("episodestart", 1), ("timestamp", 1)]))
        return {role: np.array([d[role] for d in found], "float32") for role in ("state", "action", "reward", "nstate")}


def show_all(show: Callable, rounds: int) -> None:
    with mongo_server() as url, closing(Relay(url)) as relay:
        new = (episode(i, 600, 68)[:STEPS] for i in itertools.count())
        pool, nested = (MongoPool(url, database="bench", collection="stored"), Nested(url, "stored"))
        t = medians({"one document a step": lambda: nested.store(next(new)), "MongoPool.store": lambda: pool.store(next(new))}, rounds, 1)
        show(f"Storing {STEPS} steps in a database, state 600, action 68", t, [("store / one document a step", t["MongoPool.store"] / t["one document a step"], 1 / 10)])

        pool, nested = (MongoPool(url, database="bench", collection="loaded"), Nested(url, "loaded"))
        through, beside = MongoPool(relay.url, database="bench", collection="loaded"), Nested(relay.url, "loaded")
        given = [episode(i, 600, 68)[:STEPS] for i in range(EPISODES)]
        wire = {"in": relay.during(lambda: [through.store(e) for e in given]) / relay.during(lambda: [beside.store(e) for e in given])}

        def load(pool: MongoPool = pool) -> MongoBuffer:
            buffer = MongoBuffer(pool=pool, batch_size=64, seed=0, progress=False)
            buffer.load()
            return buffer
        assert np.array_equal(np.concatenate([e.state for e in pool]), nested.load()["state"])
        wire["out"] = relay.during(lambda: load(through)) / relay.during(beside.load)
        t = medians({"one document a step": nested.load, "MongoBuffer.load": load}, max(3, rounds // 5), 1)
        show(f"Loading {EPISODES * STEPS} steps from a database", t, [
            ("load / one document a step", t["MongoBuffer.load"] / t["one document a step"], 1 / 20),
            ("bytes on the wire, storing", wire["in"], 1 / 3), ("bytes on the wire, loading", wire["out"], 1 / 3)])

        buffers = {"MemoryBuffer": MemoryBuffer(pool=pool, batch_size=64, seed=0), "MongoBuffer": load()}
        buffers["MemoryBuffer"].load()
        t = medians({name: buffer.sample for name, buffer in buffers.items()}, rounds, 200)
        show("Drawing 64 rows after that", t, [("MongoBuffer / MemoryBuffer", t["MongoBuffer"] / t["MemoryBuffer"], 1.1)])


def grown(url: str, entries: int) -> MongoPool:
    "A new pool of so many entries, each a commit of its own: the documents that `store` writes, by the thousand"
    opened = lambda: MongoPool(url, database="bench", collection=f"of{entries}")
    collections = {what: opened()._link.of(what) for what in ("chunks", "entries", "log")}
    for docs in collections.values(): docs.drop()
    store, now, given = opened()._store, opened()._link.now(), episode(0, 600, 68)
    store.make_indexes(given.schema)
    for numbers in chunked(range(1, entries + 1), 1000):
        new: dict[str, list[dict]] = {what: [] for what in collections}
        for number in numbers:
            token, one = f"{number:032x}", replace(given[:1], start=given.start + number)
            place = mongo.Place(f"{token}/0", 1, 0, now)
            part = replace(part_of(one), where=place, version=number)
            new["chunks"].append(mongo.sealed({"_id": f"{token}/0/0", "token": token, "made": now, "data": mongo.pack([(part, one)])[0]}))
            new["entries"].append(mongo.entry_of(f"{token}/00000000", token, part, given.schema.levels, now))
            new["log"].append(store.log.document(Commit(number, token, (part,), schema=given.schema if number == 1 else None), now))
            store.log.learn(new["log"][-1])
        for what, docs in new.items(): collections[what].insert_many(docs, ordered=False)
    return opened()


def questions(pool: MongoPool, rounds: int) -> dict[str, float]:
    "Milliseconds of each question about a pool"
    took: dict[str, list[float]] = {}

    def take(what: str, call: Callable[[], Any]) -> None:
        began = time.perf_counter()
        call()
        took.setdefault(what, []).append((time.perf_counter() - began) * 1000)
    new = (episode(i, 600, 68)[:STEPS] for i in itertools.count(1))
    pool.store(next(new))
    for _ in range(rounds):
        others, e, long = MongoPool(pool.url), next(new), next(new)
        take("version, of a new handle", lambda: others.version)
        take("version, nothing is new", lambda: pool.version)
        take("store a new episode", lambda: pool.store(e))
        pool.store(long[:STEPS // 2])
        take("store what goes on", lambda: pool.store(long))
        take("version, 3 are new", lambda: others.version)
        take("id in pool", lambda: e.id in pool)
        take("pool[id]", lambda: pool[e.id])
        take("len(pool)", lambda: len(pool))
        take("delete by id", lambda: pool.delete(e.id))
        others.close()
    return {what: statistics.median(times) for what, times in took.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, nargs="+", default=[2000, 20_000], help="of each pool; by default 2000 20000")
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    with mongo_server() as url:
        table = pd.DataFrame({f"{entries:,} entries": questions(grown(url, entries), asked.rounds) for entries in asked.entries})
    table["growth"] = table.iloc[:, -1] / table.iloc[:, 0]
    print("Milliseconds of a question, by how many entries the pool has\n", table.round(1).to_string(), sep="\n")


if __name__ == "__main__": main()
