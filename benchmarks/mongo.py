"""The database: storing, loading and drawing, beside one nested document a step on the same server. `run.py` shows it.

The server is the one that the tests use: `MONGODB_URI`, else `mongod`, else FerretDB. What travels is counted by a relay between client and server.
"""
from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any

import numpy as np
import pymongo

from data_io_nbdev import Episode, MemoryBuffer, MongoBuffer, MongoPool
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
