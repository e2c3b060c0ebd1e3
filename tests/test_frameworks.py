"""PyTorch and JAX: batches are tensors with every number that NumPy's have, and the workers of a `DataLoader` draw streams of their own.

They are large, so `make test` does not install them, and says that they are not tested; `make frameworks` does, in a venv of its own.
"""
import importlib
import itertools
import os
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest

from data_io_nbdev import DaskBuffer, DaskPool, Episode, Episodes, MemoryBuffer, NStep, Prioritized
from data_io_nbdev.errors import QueryError
from data_io_nbdev.interop.torch import Stream, as_dataset, keep
from data_io_nbdev.testing import drive


def framework(name):
    "A framework, or a loud word that it is not tested"
    try: return importlib.import_module(name)
    except ModuleNotFoundError:
        if os.environ.get("FRAMEWORKS"): raise
        warnings.warn(f"NOT TESTED: {name} is not installed; make frameworks tests it in a venv of its own")
        pytest.skip(f"{name} is not installed")


@pytest.fixture
def torch(): return framework("torch")


@pytest.fixture
def jax(): return framework("jax")


@pytest.fixture(params=["torch", "jax"])
def to(request):
    framework(request.param)
    return request.param


def episode(**fields):
    "Twenty steps whose fields have some dtypes, told as `name=dtype`; state also has a float32"
    rng, n = np.random.default_rng(0), 21
    def values(dtype): return rng.integers(0, 2 if dtype == "bool" else 100, (n, 3)).astype(dtype)
    state = {name: values(dtype) for name, dtype in fields.items()}
    info = {"forces": rng.normal(size=(20, 2)).astype("float32")}
    return Episode.from_arrays(state={k: v[:-1] for k, v in state.items()}, nstate={k: v[1:] for k, v in state.items()}, action=np.arange(20) % 3,
                               reward=np.arange(20.0), info=info, terminated=np.arange(20) == 19, who={"driver": "anna"},
                               timestamp=pd.date_range("2026-01-01", periods=20, freq="1s", tz="UTC"))


def numbers(x): return np.asarray(x)


def same(tensors, batch, to):
    "Whether all that a batch says is said by tensors, bit for bit; JAX has 32 bits"
    def alike(x, a):
        if a.dtype.kind in "UM": return x is a or (x == a).all()
        now = numbers(x)
        wide = to == "torch" or a.itemsize <= 4 or isinstance(x, np.ndarray)
        return (now == a.astype(now.dtype)).all() and now.shape == a.shape and (not wide or now.dtype == a.dtype)
    for role, block in zip(("state", "action", "reward", "nstate"), batch):
        mine = tensors.fields(role)
        assert all(alike(mine[name], a) for name, a in batch.fields(role).items()), role
        assert block.dtype.names or alike(getattr(tensors, role), block)
    for name in batch._names(): assert alike(getattr(tensors, name), getattr(batch, name)), name
    return True


DTYPES = ("uint8", "int16", "int32", "int64", "float16", "float32", "float64", "bool")


@pytest.mark.parametrize("states", ["once", "twice"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(to, dtype, states):
    "Numbers of every dtype come as they are, from rows of either layout"
    one, two = (MemoryBuffer(batch_size=7, seed=1, states=states) for _ in range(2))
    for b in (one, two): b.store(episode(x=dtype))
    with one.batches(3, to=to) as batches:
        for tensors in batches: assert same(tensors, two.sample(), to)


@pytest.mark.parametrize("sampler", [Episodes, lambda: NStep(3, 0.9), Prioritized], ids=["Episodes", "NStep", "Prioritized"])
def test_attributes(to, sampler):
    "Masks, weights, discounts, ends and what else a batch says, of every sampler; state of several dtypes is a dict"
    one, two = (MemoryBuffer(batch_size=7, seed=1, sampler=sampler()) for _ in range(2))
    for b in (one, two): b.store(episode(x="float32", gear="int16"))
    with one.batches(3, prefetch=0 if sampler is Prioritized else 2, to=to) as batches:
        for tensors in batches:
            batch = two.sample()
            assert same(tensors, batch, to) and set(tensors.state) == {"x", "gear"} and "gear" in repr(tensors)
            assert tensors.mask.shape == batch.mask.shape and set(dir(batch)) == set(dir(tensors))
            with pytest.raises(AttributeError): tensors.nothing
            again = pickle.loads(pickle.dumps(tensors))
            assert (numbers(again.reward) == numbers(tensors.reward)).all() and (again.episode == batch.episode).all()
            assert (numbers(again.index) == batch.index).all() and set(again.fields("state")) == {"x", "gear"}
            if sampler is Prioritized:
                for b in (one, two): b.update_priorities(tensors.anchor, np.ones(7))


def test_torch_without_a_copy(torch):
    "Tensors lie where NumPy's arrays do, as far as PyTorch can say where that is"
    buffer = MemoryBuffer(batch_size=7)
    buffer.store(drive(20))
    tensors = next(buffer.batches(to="torch", prefetch=0))
    batch = tensors._batch
    for tensor, a in zip(tensors, batch):
        assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32 and np.shares_memory(tensor.numpy(), a)
    assert tensors.terminated.dtype == tensors.mask.dtype == torch.bool and tensors.index.dtype == torch.int64
    tensors.state[0] = 5
    assert (batch.state[0] == 5).all()
    assert repr(tensors).startswith("Tensors(state (7, 3) torch.float32")


def test_torch_on_a_device(torch, monkeypatch):
    "Tensors are where they shall be; pinned memory needs a GPU"
    buffer = MemoryBuffer(batch_size=7)
    buffer.store(drive(20))
    with buffer.batches(2, to="torch", device="meta") as batches:
        for tensors in batches: assert {t.device.type for t in (*tensors, tensors.mask, tensors.index, tensors.weight)} == {"meta"}
    assert next(buffer.batches(to="torch", device=torch.device("cpu"))).state.device.type == "cpu"
    with pytest.raises(QueryError, match="PyTorch knows no 'abacus'"): buffer.batches(to="torch", device="abacus")
    if torch.cuda.is_available(): return
    with pytest.raises(QueryError, match="pin: expected a GPU"): buffer.batches(to="torch", pin=True)
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: calls.append(("pin", t.is_contiguous())) or t)
    monkeypatch.setattr(torch.Tensor, "to", lambda t, device, non_blocking: calls.append((device.type, non_blocking)) or t)
    next(buffer.batches(to="torch", device="cuda", pin=True, prefetch=0))
    assert calls == [("pin", True), ("cuda", True)] * 4


def test_jax_arrays(jax):
    "JAX's arrays are on the device that is named; numbers of rows stay NumPy's"
    buffer = MemoryBuffer(batch_size=7)
    buffer.store(drive(20))
    for device in (None, "cpu", jax.devices()[0]):
        arrays = next(buffer.batches(to="jax", device=device))
        assert all(isinstance(a, jax.Array) and a.dtype == "float32" for a in arrays)
        assert {type(getattr(arrays, name)) for name in ("index", "anchor", "step", "episode", "timestamp")} == {np.ndarray}
        assert isinstance(arrays.mask, jax.Array) and arrays.mask.dtype == bool
    with pytest.raises(QueryError, match="JAX knows no 'abacus'"): buffer.batches(to="jax", device="abacus")
    loss = jax.jit(lambda state, action, reward, nstate: (state.sum() + nstate.sum()) * reward.mean())
    assert np.isfinite(float(loss(*arrays)))


# --- DataLoader ---

@pytest.fixture
def lake(tmp_path):
    pool = DaskPool(str(tmp_path / "lake"))
    pool.extend([drive(40, hour=hour) for hour in range(3)])
    return pool


def loaded(torch, buffer, workers, n=6, epoch=None, **options):
    "What a loader gives, as lists of serial numbers"
    loader = torch.utils.data.DataLoader(as_dataset(buffer, n, epoch), batch_size=None, num_workers=workers, collate_fn=keep, **options)
    return [batch.index.tolist() for batch in loader]


def test_loader(torch, lake):
    "Without workers the stream is the buffer's; a loader has the length of its data set"
    one, two = (DaskBuffer(pool=lake, batch_size=4, seed=3) for _ in range(2))
    assert loaded(torch, one, 0) == [two.sample().index.tolist() for _ in range(6)]
    assert len(torch.utils.data.DataLoader(as_dataset(one, 6), batch_size=None)) == 6
    state, action, reward, nstate = next(iter(torch.utils.data.DataLoader(as_dataset(one), batch_size=None)))
    assert state.shape == (4, 3) and isinstance(reward, torch.Tensor)
    endless = iter(torch.utils.data.DataLoader(as_dataset(one), batch_size=None, num_workers=1, collate_fn=keep))
    assert len([next(endless) for _ in range(20)]) == 20


def test_forked_or_spawned(torch, lake):
    "A worker's stream depends on the seed and on its number, not on how it was started; each draws another"
    make = lambda seed=3: DaskBuffer(pool=lake, batch_size=4, seed=seed)
    forked, spawned = (loaded(torch, make(), 2, epoch=1, multiprocessing_context=how) for how in ("fork", "spawn"))
    right = [[b.index.tolist() for b in Stream(make(), 6, epoch=1).share(worker, 2, 0, to="numpy")] for worker in (0, 1)]
    assert forked == spawned == [*itertools.chain(*zip(*right))] and right[0] != right[1]
    assert forked != loaded(torch, make(4), 2, epoch=1) and forked != loaded(torch, make(), 2, epoch=2)


def test_passes(torch, lake):
    "Each pass over a loader is another stream, which the seed of PyTorch repeats; workers that stay go on"
    buffer = DaskBuffer(pool=lake, batch_size=4, seed=3)
    def passes(**options):
        loader = torch.utils.data.DataLoader(as_dataset(buffer, 6), batch_size=None, num_workers=2, collate_fn=keep,
                                             generator=torch.Generator().manual_seed(1), **options)
        return [[batch.index.tolist() for batch in loader] for _ in range(2)]
    first, second = passes()
    assert first != second and [first, second] == passes()
    first, second = passes(persistent_workers=True)
    assert first != second


def test_what_a_worker_sends(torch, lake):
    "A batch comes from a worker with all that it says"
    buffer = DaskBuffer(pool=lake, batch_size=4, seed=3)
    loader = torch.utils.data.DataLoader(as_dataset(buffer, 2, epoch=0), batch_size=None, num_workers=1, collate_fn=keep)
    right = Stream(DaskBuffer(pool=lake, batch_size=4, seed=3), 2, epoch=0).share(0, 1, 0, to="numpy")
    for tensors, batch in zip(loader, right): assert same(tensors, batch, "torch")
