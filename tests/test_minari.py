"""Minari: there and back is the same bit for bit, in each of its formats; what it cannot have is refused by name, and leaves nothing behind."""
import numpy as np
import pandas as pd
import pytest

from data_io_nbdev import Episode, Field, MemoryPool, PoolQuery, Schema
from data_io_nbdev.errors import CorruptData, NotEnoughData, QueryError, SchemaError

minari = pytest.importorskip("minari", reason="the extra minari")
from gymnasium import spaces  # noqa: E402
from minari.data_collector import EpisodeBuffer  # noqa: E402

from data_io_nbdev.interop import minari as interop  # noqa: E402
from data_io_nbdev.interop.minari import from_minari, to_minari  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")  # that it recommends an author, and more
FORMATS = ("hdf5", "arrow", "parquet")
CAMERA, PIXEL = (32, 33, 3), "uint8" if interop._LOSSLESS else "int16"  # what is smaller is no image for Minari


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "datasets"))
    return tmp_path / "datasets"


def schema(*more, state=None):
    state = state or [Field("state", "camera", CAMERA, PIXEL), Field("state", "arm.angle", (2,), "float64", "rad"), Field("state", "arm.lit", (), "bool")]
    action = [Field("action", "0", (), "int64"), Field("action", "1", (3,), "float32")]
    return Schema([*state, *action, Field("reward", "work", (), "float64", "J"), *more], {"robot": str, "day": int})


INFO = (Field("info", "seed", (), "int64"), Field("info", "forces", (2, 2), "float32"))


def values(field, rng, n):
    dtype = np.dtype(field.dtype)
    if dtype.kind == "f": return rng.normal(size=(n, *field.shape)).astype(dtype)
    low, high = (0, 2) if dtype.kind == "b" else (0, 200)
    return rng.integers(low, high, (n, *field.shape)).astype(dtype)


def episode(kind, i, steps=6, ends="terminated"):
    rng = np.random.default_rng(i)
    of = lambda role, n: {f.name: values(f, rng, n) for f in kind.of(role)}
    state, flags = of("state", steps + 1), {ends: np.arange(steps) == steps - 1} if ends else {}
    times = pd.date_range(f"2026-01-0{1 + i} 08:00", periods=steps, freq="20ms", tz="Europe/Berlin")
    return Episode.from_arrays(state={k: v[:-1] for k, v in state.items()}, nstate={k: v[1:] for k, v in state.items()}, action=of("action", steps), reward=of("reward", steps),
                               info=of("info", steps) or None, timestamp=times, episodestart=times[0] - pd.Timedelta(milliseconds=5 * i), who={"robot": "R2", "day": i}, schema=kind,
                               step=None if i else 40, **flags)


def filled(kind=None):
    pool, kind = MemoryPool(), kind or schema(*INFO)
    pool.extend([episode(kind, i, 4 + i, ends) for i, ends in enumerate(("terminated", "truncated", None))])
    return pool


def same(a, b): return [(e.id, e.digest, e.first, e.zone) for e in a] == [(e.id, e.digest, e.first, e.zone) for e in b] and a.schema == b.schema


class TestThereAndBack:
    @pytest.mark.parametrize("kind", FORMATS)
    def test_pool(self, kind):
        "Images, booleans, whole numbers, info, units, zones, starts and numbers; what a pool has of it is the same"
        pool, back = filled(), MemoryPool()
        to_minari(pool, "arm/all-v0", data_format=kind)
        back.extend(from_minari(minari.load_dataset("arm/all-v0")))
        assert same(pool, back)

    def test_seed_and_query(self):
        pool = filled()
        dataset = to_minari(pool, "arm/one-v0", query=PoolQuery(day=1), author="me")
        e = next(iter(pool.find(PoolQuery(day=1))))
        assert dataset.total_episodes == 1 and dataset.storage.metadata["author"] == {"me"}
        assert next(iter(dataset.storage.get_episode_metadata([0])))["seed"] == e.fields("info")["seed"][0]
        assert [x.id for x in from_minari(dataset)] == [e.id]

    @pytest.mark.parametrize("role", ["state", "action"])
    @pytest.mark.parametrize("names", [["{}"], ["x"], ["0", "1"], ["a.0", "a.1", "b"], ["a", "a.b"], ["1", "0"], ["0", "2"]])
    def test_names(self, names, role):
        "Names that nest, that count, that are in each other's way"
        names = [name.format(role) for name in names]
        fields = [Field(role, name, (2,)) for name in names] + [Field({"state": "action", "action": "state"}[role], "z"), Field("reward", "r")]
        kind = Schema(fields, {"robot": str, "day": int})
        pool, back = filled(kind), MemoryPool()
        back.extend(from_minari(to_minari(pool, "names/all-v0")))
        assert same(pool, back)


def made(id="other/made-v0", infos=True, **options):
    "A dataset as Minari makes it, of spaces in spaces"
    observation_space = spaces.Dict(camera=spaces.Box(0, 255, CAMERA, PIXEL), more=spaces.Tuple([spaces.Discrete(9), spaces.Box(-9, 9, (1,), "float64")]))
    buffer, log = [], []
    for i, n in enumerate((5, 3, 4)):
        rng = np.random.default_rng(i)
        obs = {"camera": rng.integers(0, 255, (n + 1, *CAMERA)).astype(PIXEL), "more": (rng.integers(0, 9, n + 1), rng.normal(size=(n + 1, 1)))}
        actions, rewards, ends = rng.integers(0, 4, n), rng.normal(size=n), np.arange(n) == n - 1
        buffer.append(EpisodeBuffer(observations=obs, actions=actions, rewards=rewards, terminations=ends & (i == 0), truncations=ends & (i > 0),
                                    infos={"speed": np.arange(n + 1) / 2, "late": np.arange(n)} if infos else None))
        log.append((obs, actions, rewards, ends))
    dataset = minari.create_dataset_from_buffers(id, buffer, observation_space=observation_space, action_space=spaces.Discrete(4),
                                                 **dict(jpeg_encoding=False) if interop._LOSSLESS else {}, **options)
    return dataset, log


class TestOthers:
    def test_read(self):
        "Observation t + 1 is the next state of step t; times are made, the identity is the dataset's, and reading twice stores once"
        dataset, log = made()
        pool = MemoryPool()
        for _ in range(2): pool.extend(from_minari(dataset, dt=0.5, info=["speed", "late"]))
        assert pool.version == 1 and len(pool) == 3
        for i, (e, (obs, actions, rewards, ends)) in enumerate(zip(pool, log, strict=True)):
            assert e.who == {"dataset": "other/made-v0", "episode": i} and np.diff(e.times).tolist() == [500_000] * (len(e) - 1)
            for role, rows in (("state", slice(None, -1)), ("nstate", slice(1, None))):
                found = e.fields(role)
                assert np.array_equal(found["camera"], obs["camera"][rows]) and np.array_equal(found["more.0"], obs["more"][0][rows])
                assert np.array_equal(found["more.1"], obs["more"][1][rows, 0]) and found["more.1"].dtype == "float64"
            assert np.array_equal(e.action[:, 0], actions) and np.array_equal(e.reward, rewards) and e.reward.dtype == "float64"
            assert np.array_equal(e.terminated, ends & (i == 0)) and np.array_equal(e.truncated, ends & (i > 0))
            assert e.fields("info")["speed"].tolist() == [(t + 1) / 2 for t in range(len(e))] and e.fields("info")["late"].tolist() == list(range(len(e)))

    def test_back(self):
        "With its own spaces it comes back as it was"
        dataset, log = made()
        pool = MemoryPool()
        pool.extend(from_minari(dataset, dt=1))
        again = to_minari(pool, "other/again-v0", observation_space=dataset.observation_space, action_space=dataset.action_space)
        assert again.observation_space == dataset.observation_space and again.action_space == dataset.action_space
        for ours, (obs, actions, rewards, _) in zip(again, log, strict=True):
            assert np.array_equal(ours.observations["camera"], obs["camera"]) and all(map(np.array_equal, ours.observations["more"], obs["more"]))
            assert np.array_equal(ours.actions, actions) and np.array_equal(ours.rewards, rewards)

    def test_filtered(self):
        "Some of the episodes have the ids that they have among all"
        dataset, _ = made()
        ids = [e.id for e in from_minari(dataset, dt=1)]
        assert [e.id for e in from_minari(dataset.filter_episodes(lambda e: e.truncations[-1]), dt=1)] == ids[1:]

    def test_who(self):
        "An identity of one's own, also for what has one; and times of one's own"
        dataset = to_minari(filled(), "arm/all-v0")
        found = list(from_minari(dataset, who={"cell": 4}, dt=pd.Timedelta("1s"), start="2026-05-01T00:00Z"))
        assert [e.who for e in found] == [{"cell": 4, "episode": i} for i in range(3)] and [e.start % 10**6 for e in found] == [0, 1, 2]
        assert [e.state["camera"].tobytes() for e in found] == [e.state["camera"].tobytes() for e in filled()]


class TestRefused:
    @pytest.mark.parametrize("options, error, said", [({}, SchemaError, "have no times"), (dict(dt=-1), QueryError, "dt"), (dict(dt=1, info=["depth"]), SchemaError, "no 'depth'"),
                                                      (dict(dt=1, who=3), QueryError, "who"), (dict(dt=1, start="2026"), QueryError, "zone"), (dict(dt=1, info=3), QueryError, "info")])
    def test_reading(self, options, error, said):
        dataset, _ = made()
        with pytest.raises(error, match=said): list(from_minari(dataset, **options))

    @pytest.mark.parametrize("kind, said", [
        (schema(state=[Field("state", "a/b")]), "slash"), (schema(state=[Field("state", "")]), "slash"), (schema(state=[Field("state", "z", (), "complex64")]), "complex"),
        (schema(Field("reward", "more")), "one number"), (schema(Field("info", "timestamp_us")), "timestamp_us"), (schema(Field("info", "a/b")), "a/b")])
    def test_writing(self, folder, kind, said):
        pool = MemoryPool()
        pool.store(Episode.from_arrays(**{role: {f.name: np.zeros((3, *f.shape), f.dtype) for f in kind.of(role)} or None for role in ("state", "action", "reward", "info")},
                                       timestamp=pd.date_range("2026-01-01", periods=3, freq="1s", tz="UTC"), terminated=[False, False, True], who={"robot": "A", "day": 1}, schema=kind))
        with pytest.raises(SchemaError, match=said): to_minari(pool, "arm/bad-v0")
        assert not list(folder.rglob("*.hdf5"))

    def test_spaces(self):
        "Spaces that are not those of the fields"
        with pytest.raises(SchemaError, match="action 0"): to_minari(filled(), "arm/bad-v0", action_space=spaces.Box(0, 1, (3,)))

    @pytest.mark.parametrize("kind", FORMATS)
    def test_gap(self, folder, kind):
        "A next state that is not the state that follows is said with its step; the episodes before it are not left behind"
        pool, e = filled(), episode(schema(*INFO), 5)
        state = {name: a.copy() for name, a in e.fields("state").items()}
        state["camera"][3] ^= 1
        pool.store(Episode.from_arrays(state=state, nstate=e.fields("nstate"), action=e.fields("action"), reward=e.fields("reward"), info=e.fields("info"), timestamp=pd.to_datetime(e.times, unit="us", utc=True),
                                       who=e.who, schema=e.schema))
        with pytest.raises(SchemaError, match="next state of step 2 is not the state of step 3"): to_minari(pool, "arm/gap-v0", data_format=kind)
        assert not (folder / "arm" / "gap-v0").exists()
        assert to_minari(pool, "arm/gap-v0", query=PoolQuery(day=[0, 1, 2]), data_format=kind).total_episodes == 3

    def test_images(self, monkeypatch):
        "A version of Minari that can only store them with loss gets none"
        monkeypatch.setattr(interop, "_LOSSLESS", False)
        with pytest.raises(SchemaError, match="stores arrays of uint8 such as 'camera' with loss"): to_minari(filled(schema(state=[Field("state", "camera", (32, 32), "uint8")])), "arm/bad-v0")

    def test_there_already(self):
        dataset = to_minari(filled(), "arm/all-v0")
        with pytest.raises(SchemaError, match="already"): to_minari(filled(), "arm/all-v0")
        assert len(list(from_minari(dataset))) == 3

    def test_nothing(self):
        for pool, query in [(MemoryPool(), None), (filled(), PoolQuery(day=77))]:
            with pytest.raises(NotEnoughData): to_minari(pool, "arm/none-v0", query)

    def test_short(self, monkeypatch):
        "Minari that reads fewer steps than it says there are"
        dataset = to_minari(filled(), "arm/all-v0")
        whole = type(dataset.storage).get_episodes
        cut = lambda self, ids: ({**e, "rewards": e["rewards"][:-1]} for e in whole(self, ids))
        monkeypatch.setattr(type(dataset.storage), "get_episodes", cut)
        with pytest.raises(CorruptData, match="has 4 steps, of which Minari reads 3"): list(from_minari(dataset))
