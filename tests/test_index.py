"""The index against a plain one, through any sequence of commits, and in cases that are rare: ids that begin alike, equal starts, odd numbers,
one episode of thousands of parts. Interrupts and threads are in `test_attack_index.py`."""
import math
import os
import sys
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from data_io_nbdev.data.core import PoolQuery, from_us
from data_io_nbdev.errors import CorruptData
from data_io_nbdev.storage.pool.columns import Commit, Index, in_one_step
from data_io_nbdev.testing import examples
from index_oracle import (ABSENT, BEGINNING, FACTS, IDS, NUMBERS, PLACES, REWARDS, STARTS, VALUES, WHO, ZONES, Look, Oracle, World, all_told,
                          answers, key, right_answer, same_at, same_columns, same_facts, same_sequence, told)

SOAK = max(1, float(os.environ.get("SOAK", 1)))

# --- any sequence of commits ---

def digits(number, *bases):
    "A number as one choice out of each base: a draw of one number is small, and Hypothesis drops examples that draw too much"
    chosen = []
    for base in bases:
        number, i = divmod(number, len(base))
        chosen.append(base[i])
    return chosen

def choices(*bases): return st.integers(0, math.prod(map(len, bases)) - 1).map(lambda number: digits(number, *bases))

LOOKS = choices((1, 2, 3, 4), (1, 2, 10**6), (0, 0, 0, 1, 5), REWARDS, ZONES, NUMBERS, [(e, l) for e in (False, True) for l in (True, False)],
                (1, 100, 2**40), (0, 0, 1, 16, 64)).map(lambda chosen: Look(*chosen))
ID, ANY = st.sampled_from(IDS), st.sampled_from(IDS + ABSENT)
CHOSEN = st.lists(st.tuples(ID, LOOKS), max_size=5)
NEAR = st.one_of(st.sampled_from(STARTS), st.builds(lambda a, b: a + b, st.sampled_from(STARTS), st.integers(-2, 8)))


def spread(low, high):
    "A range of which an end may be open"
    return st.tuples(st.none() | low, st.none() | high).filter(lambda ends: None in ends or ends[0] < ends[1])

NEAR_TIMES = spread(NEAR, NEAR).map(lambda ends: tuple(t if t is None else from_us(t) for t in ends))


class IndexMachine(RuleBasedStateMachine):
    "An index beside its oracle; both take in the same commits"
    @initialize(identity=st.sampled_from(list(WHO)), starts=choices(*[STARTS] * len(IDS)), values=choices(*[range(3)] * len(IDS)),
                places=st.sampled_from(PLACES))
    def begin(self, **choices):
        self.world, self.index, self.held = World(**choices), Index(), []
        self.oracle = self.world.oracle

    def take(self, commit):
        self.index.apply(commit)
        self.oracle.apply(commit)

    def version(self, data): return data.draw(st.integers(self.oracle.oldest, self.oracle.number))

    # what is committed
    @rule(chosen=CHOSEN, columns=st.booleans())
    def put(self, chosen, columns): self.take(self.world.commit(chosen, columns=columns))

    @rule(several=st.lists(CHOSEN, min_size=1, max_size=4), columns=st.booleans())
    def put_a_run(self, several, columns): self.take(self.world.run(several, columns))

    @rule(chosen=CHOSEN, hide=st.lists(ANY, max_size=4))
    def put_and_hide(self, chosen, hide): self.take(self.world.commit(chosen, hide))

    @rule(chosen=st.lists(st.tuples(ID, LOOKS), min_size=1, max_size=3))
    def store_anew(self, chosen): self.take(self.world.commit(chosen, [id for id, _ in chosen]))

    @rule(chosen=CHOSEN, ago=st.integers(1, 3))
    def go_on_with_what_a_ring_kept(self, chosen, ago): self.take(self.world.commit(chosen, born=max(0, self.oracle.number + 1 - ago)))

    @precondition(lambda self: self.oracle.every_part())
    @rule(data=st.data(), hide=st.lists(ID, max_size=2))
    def move(self, data, hide):
        parts = data.draw(st.lists(st.sampled_from(self.oracle.every_part()), min_size=1, max_size=6, unique_by=key))
        gone = self.world.part(IDS[0], Look(), 10**6)  # nothing knows it any longer
        self.take(self.world.commit(hide=hide, move=self.world.placed([*parts, gone])))

    @rule(data=st.data(), chosen=CHOSEN, hide=st.lists(ID, max_size=2))
    def give_up(self, data, chosen, hide):
        oldest = data.draw(st.integers(0, self.oracle.number + 1))
        self.take(self.world.commit(chosen, hide, oldest=oldest))

    @precondition(lambda self: self.oracle.schema)
    @rule(n=st.integers(1, 2), chosen=CHOSEN)
    def give_units(self, n, chosen): self.take(self.world.commit(chosen, units=self.world.schemas[n]))

    @precondition(lambda self: self.oracle.schema)
    @rule(chosen=CHOSEN, hide=st.lists(ID, max_size=2))
    def refuse(self, chosen, hide):
        with pytest.raises(CorruptData): self.index.apply(self.world.commit(chosen, hide, units=self.world.other))

    @precondition(lambda self: self.world.places == "own" and self.oracle.every_part())
    @rule(data=st.data())
    def forget(self, data):
        lives = data.draw(st.lists(st.sampled_from(range(len(self.world.heads()))), min_size=1, max_size=3, unique=True))
        heads = [self.world.heads()[i] for i in lives]
        parts = [part for head in heads for part in head[:data.draw(st.integers(1, len(head)))]]
        changes = self.index.forgetting(parts)
        self.same_newest()  # not yet
        in_one_step(*changes)
        self.oracle.forget(parts)
        self.held = []
        assert [self.index.place(part) for part in parts] == [None] * len(parts)

    # what is asked
    @rule(data=st.data(), criteria=st.lists(st.sampled_from(("who", "start", "time", "length", "ids")), max_size=2, unique=True),
          out_of=st.none() | st.lists(ANY, max_size=9))
    def ask(self, data, criteria, out_of):
        version, levels = self.version(data), self.oracle.schema.identity if self.oracle.schema else ()
        who = st.fixed_dictionaries({name: st.lists(st.sampled_from(VALUES[kind]), min_size=1, max_size=3) for name, kind in levels})
        kinds = dict(who=who, start=NEAR_TIMES, time=NEAR_TIMES, length=spread(st.integers(0, 4), st.integers(5, 12)), ids=st.lists(ANY, max_size=9))
        query = PoolQuery(**{name: data.draw(kinds[name]) for name in criteria})
        want = answers(self.oracle, self.world.times, version, query)
        right_answer(self.index.find(version, query), want, query)
        if out_of is None: return
        some = [(parts, sure) for parts, sure in want if parts[0].id in out_of]
        right_answer(self.index.find(version, query, iter(out_of)), some, query)

    @precondition(lambda self: self.oracle.every_part())
    @rule(data=st.data())
    def ask_for_a_moment(self, data):
        "A range that begins and ends close to steps of one part: at them, between them, beside them"
        version, part = self.version(data), data.draw(st.sampled_from(self.oracle.every_part()))
        moments = sorted({t + near for t in self.world.times[key(part)] for near in (-1, 0, 1)})
        low, high = sorted(data.draw(st.lists(st.sampled_from(moments), min_size=2, max_size=2, unique=True)))
        query = PoolQuery(time=(from_us(low), from_us(high)))
        right_answer(self.index.find(version, query), answers(self.oracle, self.world.times, version, query), query)

    @rule(data=st.data(), ids=st.lists(ANY, max_size=9))
    def ask_for_some(self, data, ids):
        version = self.version(data)
        want = [parts for parts in self.oracle.find(version) if parts[0].id in ids]
        for found in (self.index.find(version, None, ids), self.index.find(version, ids=iter([*ids, *ids]))):
            assert all_told(found) == all_told(want) and not found.unsure.any()
            same_columns(found, want)

    @rule(data=st.data(), id=ANY, digits=st.integers(8, 31))
    def begin_of_an_id(self, data, id, digits):
        version = self.version(data)
        right = sorted(known for known in self.oracle.there[version] if known.startswith(id[:digits]))
        assert sorted(self.index.begins(id[:digits], version)) == right

    @rule(data=st.data())
    def look_back(self, data): same_at(self.index, self.oracle, self.version(data), IDS + ABSENT)

    @rule()
    def look_at_parts(self): same_facts(self.index, self.oracle)

    @rule(data=st.data())
    def look_for_another(self, data):
        "A part is known by its episode, its first step and its version together"
        part = self.world.part(data.draw(ID), data.draw(LOOKS), data.draw(st.integers(1, self.oracle.number + 1)))
        same = [known for known in self.oracle.every_part() if key(known) == key(part)]
        assert [told(found) for found in [self.index.place(part)] if found] == [told(known) for known in same]

    @rule(data=st.data())
    def hold(self, data):
        "What was found stays as it was found, whatever comes"
        version = self.version(data)
        self.held.append((self.index.find(version), [self.index.parts(id, version) for id in IDS], self.oracle.find(version),
                          [self.oracle.there[version].get(id, []) for id in IDS]))

    @rule()
    def look_at_what_is_held(self):
        for found, each, episodes, parts in self.held:
            assert all_told(found, where=False) == all_told(episodes, where=False)
            same_columns(found, episodes)
            for mine, right in zip(each, parts): same_sequence(mine, right, where=False)

    @invariant()
    def same_newest(self):
        number = self.oracle.number
        assert tuple(self.index.totals) == self.oracle.totals and self.index.newest() == (number, self.index.totals)
        assert all_told(self.index.find(number)) == all_told(self.oracle.find(number))

    def teardown(self):
        if not hasattr(self, "oracle"): return
        self.look_at_what_is_held()
        same_facts(self.index, self.oracle)
        for version in range(self.oracle.oldest, self.oracle.number + 1): same_at(self.index, self.oracle, version, IDS)


def test_any_sequence():
    "After any sequence of commits the index says of every version what the oracle says"
    run_state_machine_as_test(IndexMachine, settings=examples(round(150 * SOAK), stateful_step_count=25))


# --- cases ---

def plain_world(identity="both", starts=None, places="rows"): return World(identity, starts or [0] * len(IDS), [0] * len(IDS), places)

def taken(world, *commits):
    "An index of commits, of which each is made when those before it are known; the same as the oracle in everything"
    index = Index()
    for make in commits:
        commit = make()
        index.apply(commit)
        world.oracle.apply(commit)
    same_facts(index, world.oracle)
    for version in range(world.oracle.oldest, world.oracle.number + 1): same_at(index, world.oracle, version, IDS + ABSENT)
    return index


def test_nothing():
    "An index of nothing has answers"
    index = Index()
    same_facts(index, Oracle())
    same_at(index, Oracle(), 0, IDS)
    assert index.begins(BEGINNING[:8], 0) == [] and len(index.find(0, PoolQuery(ids=IDS[0]), IDS)) == 0
    assert index.place(plain_world().part(IDS[0], Look(), 1)) is None and list(index.every_part()) == []
    assert index.find(0).total("reward").tolist() == index.find(0).start.tolist() == index.find(0).ids == []


def test_whole_numbers_are_summed_exactly():
    "Also those that a float does not hold"
    world, index = plain_world(), Index()
    parts = world.placed([first := world.part(IDS[0], Look(nbytes=2**53), 1), second := world.part(IDS[0], Look(nbytes=1), 1, first),
                          world.part(IDS[0], Look(nbytes=1), 1, second)])
    index.apply(Commit(1, "", parts, schema=world.schemas[0]))
    assert index.find(1).total("nbytes").tolist() == [2**53 + 2] == [index.totals.nbytes]


def test_ids_that_begin_alike():
    "Ids whose first 64 bits are the same are different episodes: one is hidden, stored anew and moved without the others"
    world = plain_world()
    alike, one = IDS[:4], IDS[2]
    assert len({id[:16] for id in alike}) == 1
    index = taken(world, lambda: world.commit([(id, Look()) for id in alike]), lambda: world.commit([(id, Look(2)) for id in alike[::-1]]),
                  lambda: world.commit(hide=[one]), lambda: world.run([[(one, Look())], [(id, Look()) for id in alike]]),
                  lambda: world.commit(move=world.placed(world.oracle.there[5][one])))
    assert [len(index.parts(id, 5)) for id in alike] == [3, 3, 2, 3] and not index.parts(one, 3)
    assert sorted(index.begins(BEGINNING, 5)) == index.find(5).ids == sorted(alike)
    assert index.begins(one[:17], 5) == [one] and index.begins(one[:31], 3) == []


def test_equal_starts():
    "Episodes that began in the same microsecond are ordered by id, also where they came in another order, and long after each other"
    world = plain_world(starts=[-1 if i % 3 else 5 for i in range(len(IDS))])
    index = taken(world, *(lambda id=id: world.commit([(id, Look())]) for id in sorted(IDS, reverse=True)))
    assert list(zip(index.find(len(IDS)).start.tolist(), index.find(len(IDS)).ids)) == sorted((world.start[id], id) for id in IDS)


@pytest.mark.parametrize("identity, asked, right", [("text", {"vehicle": "1"}, "1"), ("numbers", {"line": 1}, 1)])
def test_values_that_look_equal(identity, asked, right):
    'The text "1" and the number 1 stay what they are'
    world = plain_world(identity)
    index = taken(world, lambda: world.commit([(id, Look()) for id in IDS[:3]]))
    found = index.find(1, PoolQuery(who=asked))
    codes, values = found.who(0)
    assert [values[code] for code in codes] == [right] * 3 and type(values[codes[0]]) is type(right)
    assert len(index.find(1, PoolQuery(who={name: "2" if isinstance(right, str) else 2 for name in asked}))) == 0


def test_no_levels():
    "Episodes without an identity"
    world = plain_world("none")
    index = taken(world, lambda: world.commit([(id, Look()) for id in IDS]), lambda: world.commit(hide=IDS[:2]))
    assert {part.who for part in index.every_part()} == {()}
    with pytest.raises((IndexError, KeyError)): index.find(2).who(0)


def test_odd_numbers():
    "Times before 1970, no machine's number and its number 0, rewards that are no numbers, bytes of zeros: all come back as they came"
    world = plain_world(starts=[-10**15 - i for i in range(len(IDS))])
    looks = [Look(2, reward=reward, number=number, zone=zone, rough=rough) for reward in REWARDS for number in NUMBERS[1:]
             for zone, rough in zip(ZONES, (0, 1, 64))]
    index = taken(world, lambda: world.commit([(IDS[i % len(IDS)], look) for i, look in enumerate(looks)]))
    rewards = [part.reward for part in index.every_part()]
    assert sum(map(math.isnan, rewards)) and {math.inf, -math.inf} <= set(rewards) and "-0.0" in map(str, rewards)
    assert {part.number for part in index.every_part()} == set(NUMBERS) and {part.zone for part in index.every_part()} == set(ZONES)


def test_a_long_episode():
    "One episode of 5,000 parts beside others: any of its parts, at any version, moved, and forgotten"
    world, index, n = plain_world(places="own"), Index(), 5000
    long, other = IDS[0], IDS[1]
    [beside], parts = world.placed([world.part(other, Look(), 1)]), []
    for version in range(1, n // 5 + 1):
        new = parts[-1:]
        for i in range(5): new.append(world.part(long, Look(1 + i % 3, reward=0.1), version, new[-1] if new else None, 1))
        new = world.placed(new[-5:])
        index.apply(Commit(version, "", (*new, beside) if version == 1 else new, schema=world.schemas[0] if version == 1 else None))
        parts += new
    for version in (1, 2, 500, n // 5):
        same_sequence_of_many(index.parts(long, version), parts[:5 * version])
        found = index.find(version)
        assert found.ids == [long, other] and found.version[0] == version
        assert found.total("length").tolist() == [sum(p.length for p in parts[:5 * version]), 1]
        same_columns(found, [parts[:5 * version], [beside]])
    assert index.totals[:3] == (2, n + 1, sum(p.length for p in parts) + 1)
    for i in (0, 1, n // 2, n - 1): assert told(index.place(parts[i])) == told(parts[i])
    index.apply(Commit(n // 5 + 1, "", move=(moved := world.placed(parts[::7]))))
    parts[::7] = moved
    same_sequence_of_many(index.parts(long, n // 5 + 1), parts)
    for gone in (1, 10, n - 20):
        in_one_step(*index.forgetting(parts[:gone]))
        del parts[:gone]
        same_sequence_of_many(index.parts(long, n // 5 + 1), parts)
        assert index.totals[1] == len(parts) + 1
    assert len(list(index.every_part())) == len(parts) + 1

def same_sequence_of_many(parts, want):
    "As `same_sequence`, which looks at each part by its number: of many that takes long"
    right = [told(part) for part in want]
    assert len(parts) == len(right) and [told(part) for part in parts] == right and [told(part) for part in reversed(parts)] == right[::-1]
    for i in (0, 1, len(want) // 2, -2, -1): assert told(parts[i]) == right[i]


def test_a_commit_costs_what_it_did():
    "Whether an index took in ten commits or hundreds, the next one takes about as many calls: of parts that follow, and of episodes that begin"
    def calls(world, index, chosen):
        commit, n = world.commit(chosen), []
        sys.setprofile(lambda frame, event, arg: n.append(event))
        try: index.apply(commit)
        finally: sys.setprofile(None)
        world.oracle.there = {commit.number - 1: world.oracle.there[commit.number - 1]}  # it would take long to keep all
        world.oracle.apply(commit)
        return len(n)
    for name, chosen in (("parts", lambda n: [(IDS[n % 2], Look())]), ("episodes", lambda n: [(f"{n:032x}", Look())])):
        world, index = plain_world(), Index()
        world.start, world.who = defaultdict(int), defaultdict(lambda: ("1", 1))
        n = [calls(world, index, chosen(n)) for n in range(600)]
        assert max(np.median(n[i:i + 10]) for i in range(400, 590)) < 3 * np.median(n[5:25]), name


@pytest.mark.parametrize("wrong", [{"id": IDS[0][:31]}, {"id": IDS[0][:31] + "G"}, {"id": IDS[0].replace("a", "A")}, {"digest": "ab"}, {"tail": ""},
                                   {"who": ("1",)}, {"start": 2**63}, {"length": "three"}, {"number": 2**64}])
def test_what_is_no_part(wrong):
    "A part that says what none can say is refused, with its whole commit, and the index goes on"
    world, index = plain_world(), Index()
    for _ in range(2):
        commit = world.commit([(id, Look()) for id in IDS[:5]])
        bad = type(commit.put[0])(**{**{name: getattr(commit.put[3], name) for name in FACTS}, **wrong})
        with pytest.raises(CorruptData): index.apply(commit._replace(put=(*commit.put[:3], bad, *commit.put[4:]), hide=(IDS[0],)))
        if index.number: same_at(index, world.oracle, 1, IDS)
        index.apply(commit)
        world.oracle.apply(commit)
        same_facts(index, world.oracle)
        same_at(index, world.oracle, index.number, IDS)
