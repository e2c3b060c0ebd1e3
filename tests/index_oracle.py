"""A plain index to compare the real one with: for every version a dictionary of the parts of every episode. And what makes its commits."""
import hashlib
from typing import NamedTuple

import numpy as np

from data_io_nbdev.data.core import PoolQuery, from_us
from data_io_nbdev.data.schema import Field, Schema
from data_io_nbdev.storage.pool.columns import Commit, Part, block_of

# --- the oracle ---

def key(part): return part.id, part.offset, part.version


class Oracle:
    "What a log says, at every version, each written out in full"
    def __init__(self): self.number, self.oldest, self.there, self.schemas = 0, 0, {0: {}}, [None]

    @property
    def schema(self): return self.schemas[-1]

    def schema_at(self, version):  # the first one is known at versions before it, too
        return next((schema for schema in self.schemas[version:] if schema), None)

    def apply(self, commit):
        alive = {id: parts for id, parts in self.there[self.number].items() if id not in commit.hide}
        for version in range(self.number + 1, commit.number + 1):
            for part in commit.put:
                if part.version == version: alive = {**alive, part.id: [*alive.get(part.id, ()), part]}
            self.there[version] = alive
            self.schemas.append(commit.units or self.schema or commit.schema)
        self.number, moved = commit.number, {key(part): part for part in commit.move}
        if moved: self._replace(lambda part: moved.get(key(part), part))
        if commit.oldest > self.oldest:
            self.oldest = commit.oldest
            self.there = {version: there for version, there in self.there.items() if version >= self.oldest}

    def forget(self, parts):
        gone = set(map(key, parts))
        self._replace(lambda part: None if key(part) in gone else part)

    def _replace(self, new):
        for version, there in self.there.items():
            kept = {id: [part for part in map(new, parts) if part] for id, parts in there.items()}
            self.there[version] = {id: parts for id, parts in kept.items() if parts}

    def find(self, version):
        return sorted(self.there[version].values(), key=lambda parts: (parts[0].start, parts[0].id))

    def every_part(self):
        return list({key(part): part for there in self.there.values() for parts in there.values() for part in parts}.values())

    @property
    def totals(self):
        parts = [part for parts in self.there[self.number].values() for part in parts]
        return len(self.there[self.number]), len(parts), sum(p.length for p in parts), sum(p.nbytes for p in parts)


# --- values that compare: with their types, and not a number as itself ---

FACTS = tuple(Part.__annotations__)

def told(part, where=True):
    "All that a part says; but where, if that may have changed"
    def plain(value):
        if type(value) is tuple: return tuple(map(plain, value))
        return type(value), value.hex() if type(value) is float else value
    return tuple(plain(getattr(part, name)) for name in FACTS if where or name != "where")

def all_told(found, **how): return [[told(part, **how) for part in parts] for parts in found]

def total(parts, name):
    total = 0
    for part in parts: total += getattr(part, name)
    return total


def same_columns(found, want):
    "A selection says in columns what the parts of its episodes say"
    assert list(found.ids) == [parts[0].id for parts in want]
    assert [(type(id), len(id)) for id in found.ids] == [(str, 32)] * len(want)
    assert found.start.dtype == np.int64 and found.unsure.dtype == bool and len(found.unsure) == len(want)
    for i in range(len(want[0][0].who) if want else 0):
        codes, values = found.who(i)
        who = [values[code] for code in codes]
        assert [(type(v), v) for v in who] == [(type(parts[0].who[i]), parts[0].who[i]) for parts in want]
    numbers = dict(start=[parts[0].start for parts in want], length=[parts[-1].offset + parts[-1].length for parts in want],
                   version=[parts[-1].version for parts in want])
    for name, right in numbers.items(): assert getattr(found, name).tolist() == right, name
    for name in ("length", "nbytes", "reward"):
        values = found.total(name)
        assert values.dtype.kind == ("f" if name == "reward" else "i"), name
        np.testing.assert_array_equal(values, [total(parts, name) for parts in want], name)


def same_sequence(parts, want, **how):
    "A sequence of parts is what a list of them is"
    right = [told(part, **how) for part in want]
    assert len(parts) == len(right) and bool(parts) == bool(right)
    assert [told(part, **how) for part in parts] == right
    assert [told(part, **how) for part in reversed(parts)] == right[::-1]
    assert [told(parts[i], **how) for i in range(-len(right), len(right))] == [*right, *right]
    for i in (len(right), -len(right) - 1):
        try: parts[i]
        except IndexError: continue
        raise AssertionError(f"there is a part {i} of {len(right)}")


def same_at(index, oracle, version, ids=(), **how):
    "Both say the same of a version"
    want = oracle.find(version)
    found = index.find(version)
    assert len(found) == len(want) and all_told(found, **how) == all_told(want, **how)
    assert not found.unsure.any()
    same_columns(found, want)
    for i in range(-len(want), len(want)): same_sequence(found[i], want[i], **how)
    for id in ids: same_sequence(index.parts(id, version), oracle.there[version].get(id, ()), **how)
    assert index.schema_at(version) == oracle.schema_at(version)


def same_facts(index, oracle):
    "Both say the same of the whole log, and of every part"
    assert (index.number, index.oldest, index.schema) == (oracle.number, oracle.oldest, oracle.schema)
    assert tuple(index.totals) == oracle.totals and index.newest() == (oracle.number, index.totals)
    every = oracle.every_part()
    assert sorted(map(repr, map(told, index.every_part()))) == sorted(map(repr, map(told, every)))
    for part in every: assert told(index.place(part)) == told(part)


# --- questions ---

def within(value, low, high): return (low is None or value >= low) and (high is None or value < high)

def answers(oracle, times, version, query):
    """The episodes that a query is about, in order; and whether an index, which knows no steps, can be sure of each: where a part begins
    or ends in the range. `times` are those of the steps of each part"""
    schema, (least, most), found = oracle.schema, query.length, []
    for parts in oracle.find(version):
        head, length = parts[0], parts[-1].offset + parts[-1].length
        who = dict(zip(schema.levels, head.who)) if schema else {}
        if not (query.ids is None or head.id in query.ids): continue
        if not all(who[level] in values for level, values in query.who) or not within(head.start, *query.start): continue
        if (least is not None and length < least) or (most is not None and length > most): continue
        if not any(within(t, *query.time) for part in parts for t in times[key(part)]): continue
        found.append((parts, any(within(t, *query.time) for part in parts for t in (part.begin, part.end))))
    return found

def right_answer(found, want, query):
    "A selection holds every episode that is asked for, those of which it is sure, and of others only such as reach over the range"
    wanted, given = [parts[0].id for parts, _ in want], list(found.ids)
    sure = [id for id, unsure in zip(given, found.unsure) if not unsure]
    assert sure == [parts[0].id for parts, sure in want if sure]
    assert [id for id in given if id in wanted] == wanted and len(set(given)) == len(given)
    assert list(zip(found.start.tolist(), given)) == sorted(zip(found.start.tolist(), given))
    low, high = query.time
    for parts, id in zip(found, given):
        if id in wanted: continue
        assert (high is None or parts[0].begin < high) and (low is None or parts[-1].end >= low), "not even near"


# --- a world that makes commits ---

BEGINNING = "0123456789abcdef"
IDS = [*(BEGINNING + f"{n:016x}" for n in (0, 1, 2**63, 2**64 - 1)),  # the first 64 bits are the same
       *(BEGINNING[:8] + hashlib.md5(bytes([n])).hexdigest()[8:] for n in range(3)),
       "0" * 32, "f" * 32, "0" * 31 + "1", *(hashlib.md5(bytes([n])).hexdigest() for n in range(9, 13))]
ABSENT = [BEGINNING + "7" * 16, "7" * 32]
STARTS = (-10**15, -1, 0, 1, 10**15)
WHO = {"none": {}, "text": {"vehicle": str}, "numbers": {"line": int, "id": int}, "both": {"vehicle": str, "id": int}}
VALUES = {"text": ("1", "", "1 ", "é", "e\u0301"), "integer": (1, 0, -1, 2**62)}
REWARDS = (0.0, -0.0, 0.1, -2.5, 1e300, 1e300, float("nan"), float("inf"), float("-inf"))
ZONES = ("UTC", "Europe/Berlin", "UTC+05:30")
NUMBERS = (None, None, 0, 7, 2**62)
PLACES = ("own", "rows")  # an object for each part, as in memory; rows of a file that several share, as in a lake

class Look(NamedTuple):
    "What is chosen of a part"
    length: int = 1
    pause: int = 1  # before its first step, and between its steps
    gap: int = 0  # steps that were lost before it
    reward: float = 0.0
    zone: str = "UTC"
    number: int | None = None
    flags: tuple = (False, True)  # ended, linked
    nbytes: int = 100
    rough: int = 0  # zeros at the end of its digests


class Steps:
    "Where steps are, known by identity alone"

class File(NamedTuple):
    path: str


class World:
    "Episodes of one pool, an oracle of what was committed, and what would be the next commit"
    def __init__(self, identity, starts, values, places):
        given = WHO[identity]
        self.schemas = [Schema((Field("state", "x", unit=unit), Field("action", "a"), Field("reward", "r")), given) for unit in (None, "m", "km")]
        self.other = Schema((Field("state", "y", unit="m"), Field("action", "a"), Field("reward", "r")), given)
        self.levels = self.schemas[0].identity
        self.start = dict(zip(IDS, starts))
        self.who = {id: tuple(VALUES[kind][(i + n) % len(VALUES[kind])] for n, (_, kind) in enumerate(self.levels)) for id, i in zip(IDS, values)}
        self.places, self.files, self.oracle, self.times = places, 0, Oracle(), {}

    def part(self, id, look, version, before=None, born=0):
        "A part that follows another one, or begins an episode"
        begin = before.end + look.pause if before else self.start[id]
        times = [begin + i * look.pause for i in range(look.length)]
        offset = (before.offset + before.length if before else 0) + look.gap
        digest = hashlib.sha256(repr((id, offset, version)).encode()).hexdigest()
        digest = digest[:64 - look.rough] + "0" * look.rough
        ended, linked = look.flags
        part = Part(id=id, who=self.who[id], start=self.start[id], zone=look.zone, offset=offset, length=look.length,
                    begin=times[0], end=times[-1], number=look.number, digest=digest, reward=look.reward, nbytes=look.nbytes,
                    ended=ended, linked=linked, tail=digest[-16:], born=born if born != version else 0, version=version)
        self.times[key(part)] = times
        return part

    def placed(self, parts):
        "The same parts, with their steps in a new place"
        self.files += 1
        spots = [Steps() if self.places == "own" else (File(f"part-{self.files}"), row) for row in range(len(parts))]
        return tuple(Part(**{name: getattr(part, name) for name in FACTS if name != "where"}, where=spot) for part, spot in zip(parts, spots))

    def put(self, version, chosen, alive, born=0):
        "Parts of one version of ids and looks, which follow those in `alive`; that knows them then"
        parts = []
        for id, look in chosen:
            before = alive[id][-1] if id in alive else None
            life = before.born or before.version if before else 0 if any(id == known[0] for known in self.times) else born
            parts.append(self.part(id, look, version, before, life))
            alive[id] = [*alive.get(id, ()), parts[-1]]
        return self.placed(parts)

    def commit(self, chosen=(), hide=(), born=0, columns=False, **more):
        "The next commit, which puts, and hides before"
        number = self.oracle.number + 1
        alive = {id: parts for id, parts in self.oracle.there[number - 1].items() if id not in hide}
        put = self.put(number, chosen, alive, born if born < number else 0)
        schema = self.schemas[0] if number == 1 else None
        return Commit(number, f"token {number}", block_of(put) if columns and put else put, tuple(hide), schema, **more)

    def run(self, several, columns=False):
        "A run of commits that only put, as one"
        first, alive, put = self.oracle.number + 1, dict(self.oracle.there[self.oracle.number]), ()
        for version, chosen in enumerate(several, first): put += self.put(version, chosen, alive)
        number = first + len(several) - 1
        return Commit(number, f"token {number}", block_of(put) if columns and put else put, schema=self.schemas[0] if first == 1 else None)

    def heads(self):
        "The lives of every episode, each as the list of its parts"
        lives = {}
        for part in sorted(self.oracle.every_part(), key=lambda p: (p.version, p.offset)):
            lives.setdefault((part.id, part.born or part.version), []).append(part)
        return list(lives.values())


def random_world(rng):
    pick = lambda values: values[int(rng.integers(len(values)))]
    return World(pick(list(WHO)), [pick(STARTS) for _ in IDS], rng.integers(3, size=len(IDS)).tolist(), pick(PLACES))

def random_commit(world, rng, keep=False):
    "Any commit that can come next; it gives up no version where they are to be kept"
    pick = lambda values: values[int(rng.integers(len(values)))]
    def look():
        return Look(int(rng.integers(1, 4)), int(rng.integers(1, 5)), int(rng.random() < 0.1), pick(REWARDS), pick(ZONES), pick(NUMBERS),
                    (bool(rng.integers(2)), bool(rng.integers(2))))
    def some(most): return [(pick(IDS), look()) for _ in range(rng.integers(1, most))]
    oracle, kind, columns = world.oracle, rng.random(), bool(rng.integers(2))
    if kind < 0.25: return world.run([some(4)[:int(rng.integers(4))] for _ in range(rng.integers(1, 4))], columns)
    if kind < 0.5 or not oracle.number: return world.commit(some(9), columns=columns)
    hide = [pick(IDS) for _ in range(rng.integers(1, 4))]
    if kind < 0.7: return world.commit(some(4) if rng.integers(2) else (), hide)
    if kind < 0.8: return world.commit([(id, look()) for id in hide], hide)  # stored anew
    if kind < 0.85: return world.commit(units=world.schemas[int(rng.integers(1, 3))])
    parts = [part for part in oracle.every_part() if rng.integers(2)]
    if kind < 0.95 or keep: return world.commit(move=world.placed(parts))
    return world.commit(oldest=int(rng.integers(oracle.oldest, oracle.number + 2)))
