"""Ctrl-C, readers and writers at any line of the index: a commit is there as a whole or not at all, and what is asked of a version is answered as
if nobody else were there. Two threads are run one inside the other, which reaches every line, and side by side."""
import sys
import threading
from functools import partial

import numpy as np

from data_io_nbdev.storage.pool.columns import Index
from index_oracle import IDS, all_told, random_commit, random_world, same_at, same_columns, same_facts, told
from test_attack_memory import Lines, PACKAGE, after

# --- histories ---

def history(rng, n, keep=False):
    "A world, its commits, and what its oracle said after each of them: versions by number, and totals"
    world, commits, said = random_world(rng), [], []
    for _ in range(n):
        commits.append(random_commit(world, rng, keep))
        world.oracle.apply(commits[-1])
        said.append((dict(world.oracle.there), world.oracle.totals))
    return world, commits, said

def index_of(commits):
    index = Index()
    for commit in commits: index.apply(commit)
    return index

def in_order(there): return sorted(there.values(), key=lambda parts: (parts[0].start, parts[0].id))

def seen(index):
    "All that an index says, in values that compare"
    versions = {v: (all_told(index.find(v)), index.find(v).ids, index.schema_at(v)) for v in range(index.oldest, index.number + 1)}
    return index.number, index.oldest, index.newest(), index.schema, versions, sorted(repr(told(part)) for part in index.every_part())


# --- Ctrl-C ---

def test_apply(attack):
    "A commit whose `apply` was interrupted is there or not; it can be taken in again, and the next ones are"
    def trial(rng):
        world, commits, _ = history(rng, int(rng.integers(3, 12)))
        index = Index()
        for n, commit in enumerate(commits):
            before, done = seen(index), seen(index_of(commits[:n + 1]))
            for _ in range(rng.integers(4)):
                act = partial(index.apply, commit)
                if rng.random() < 0.3: after(rng.uniform(0, 0.002), act)
                else:
                    (lines := Lines()).run(partial(index_of(commits[:n]).apply, commit))
                    Lines(int(rng.integers(1, lines.n + 1))).run(act)
                assert seen(index) == (done if index.number == commit.number else before), "neither as before nor as after"
                if index.number == commit.number: break
            else: index.apply(commit)
            assert seen(index) == done
        same_facts(index, world.oracle)
        for version in range(index.oldest, index.number + 1): same_at(index, world.oracle, version, IDS)
    attack("Ctrl-C in apply, index", 30, trial)


# --- one inside the other ---

class Between:
    "A trace function that calls something before one line of the package, or before every one"
    def __init__(self, act, at=None): self.act, self.at, self.n = act, at, 0

    def __call__(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(PACKAGE): return None
        if event == "line":
            self.n += 1
            if self.at is None or self.n == self.at: self.act()
        return self

    def run(self, call):
        before = sys.gettrace()
        try:
            sys.settrace(self)
            return call()
        finally: sys.settrace(before)


def answer(index, kind, version):
    "What a reader is told of a version"
    if kind == "find": return all_told(index.find(version), where=False)
    if kind == "parts": return [[told(part, where=False) for part in index.parts(id, version)] for id in IDS[:7]]
    if kind == "ends": return [[told(part, where=False) for part in (parts[0], parts[-1])] for id in IDS if (parts := index.parts(id, version))]
    if kind == "sums": return [(found := index.find(version, ids=IDS[:9])).ids, *(repr(found.total(n)) for n in ("length", "reward"))]
    return sorted(index.begins(IDS[0][:8], version))

READS = "find", "parts", "ends", "sums", "begins"


def test_a_commit_while_one_reads(attack):
    "A reader in whose way commits are taken in, at each of its lines, is told of its version what it was told without"
    def trial(rng):
        _, commits, said = history(rng, int(rng.integers(1, 9)))
        known = int(rng.integers(len(commits)))
        oldest = min(said[-1][0])
        newest = commits[known - 1].number if known else 0
        if newest < oldest: return
        version = newest if rng.random() < 0.7 else int(rng.integers(oldest, newest + 1))
        def go_on():
            for commit in commits[known:]: index.apply(commit)
        for kind in READS:
            index = index_of(commits[:known])
            right, lines = answer(index, kind, version), Between(lambda: None)
            lines.run(partial(answer, index, kind, version))
            for at in rng.permutation(np.arange(1, lines.n + 1))[:10]:
                index = index_of(commits[:known])
                assert Between(go_on, at).run(partial(answer, index, kind, version)) == right, f"{kind} of version {version}, at line {at}"
    attack("commits inside a question, index", 40, trial)


def test_a_question_while_one_commits(attack):
    "Whoever asks while a commit is taken in, before any line of that, is told what is so before it or after it"
    def trial(rng):
        _, commits, said = history(rng, int(rng.integers(1, 9)))
        oldest, index = min(said[-1][0]), Index()
        for n, commit in enumerate(commits):
            (before, totals), (there, then) = said[n - 1] if n else ({0: {}}, (0, 0, 0, 0)), said[n]
            moments = {max(before): totals, commit.number: then}
            rights = {v: all_told(in_order(there[v]), where=False) for v in {oldest, max(before), commit.number} if v in there}
            def ask():
                number, now = index.newest()
                assert tuple(now) == moments[number]
                for version, right in rights.items():
                    if oldest <= version <= number: assert all_told(index.find(version), where=False) == right
            Between(ask).run(partial(index.apply, commit))
            ask()
    attack("questions inside a commit, index", 15, trial)


# --- side by side ---

def test_readers_and_a_writer(attack):
    "Threads ask about fixed versions while another one takes in commits"
    def trial(rng):
        world, commits, said = history(rng, 60, keep=bool(rng.integers(2)))
        index, wrong, done = Index(), [], threading.Event()
        oldest, there = min(said[-1][0]), said[-1][0]
        right = {v: in_order(there[v]) for v in there}
        told_of = {v: all_told(found, where=False) for v, found in right.items()}
        def read(seed):
            rng, last = np.random.default_rng(seed), False
            try:
                while not last:
                    last, number = done.is_set(), index.number
                    if number < oldest: continue
                    version = number if rng.random() < 0.5 else int(rng.integers(oldest, number + 1))
                    found, parts = index.find(version), {id: index.parts(id, version) for id in IDS[::3]}
                    assert all_told(found, where=False) == told_of[version], version
                    same_columns(found, right[version])
                    for id, some in parts.items():
                        assert [told(p, where=False) for p in some] == [told(p, where=False) for p in there[version].get(id, ())], version
            except BaseException as e: wrong.append(e)
        threads = [threading.Thread(target=read, args=(int(rng.integers(2**32)),), daemon=True) for _ in range(3)]
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            for thread in threads: thread.start()
            for commit in commits: index.apply(commit)
        finally:
            done.set()
            for thread in threads: thread.join(60)
            sys.setswitchinterval(before)
        if wrong: raise wrong[0]
        assert not any(thread.is_alive() for thread in threads)
        same_facts(index, world.oracle)
    attack("readers beside a writer, index", 25, trial)
