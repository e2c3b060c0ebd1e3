"What users install: small to import, complete, typed, and with three requirements."
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("dask", "distributed", "deltalake", "pyarrow", "pymongo", "bson", "matplotlib", "torch", "jax", "nbdev", "gymnasium", "minari", "pytest", "hypothesis", "IPython",
         "tqdm", "asyncio", "sqlite3", "xml")  # the last few of the standard library
NEW = """
import sys, pandas
before = set(sys.modules)
{what}
print(*sorted(set(sys.modules) - before))
"""
NAMES = "from data_io_nbdev import (open_pool, MemoryPool, MemoryBuffer, Episode, Record, PoolQuery, Schema, Uniform)"


def run(code, interpreter=sys.executable, cwd=None):
    env = {name: value for name, value in os.environ.items() if interpreter == sys.executable or name != "PYTHONPATH"}
    done = subprocess.run([str(interpreter), "-c", code], capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("what, most", [("import data_io_nbdev", 3), (NAMES, 60)])
def test_import_is_light(what, most):
    "Importing the package, or everything that users type, brings few modules, and none that is slow to import or optional"
    new = run(NEW.format(what=what)).split()
    assert not {name.partition(".")[0] for name in new} & set(HEAVY)
    assert {name for name in new if name.startswith("fastcore")} <= {"fastcore", "fastcore.basics", "fastcore.imports"}
    assert len([name for name in new if not name.startswith("data_io_nbdev")]) <= most, new


PUBLIC = """
import importlib, inspect, pkgutil, data_io_nbdev

def parts(thing):
    yield thing
    for name, value in vars(thing).items() if inspect.isclass(thing) else ():
        value = getattr(value, "fget", None) or getattr(value, "func", None) or getattr(value, "__func__", value)
        if not name.startswith("_") and inspect.isfunction(value): yield value

def public():
    for found in pkgutil.walk_packages(data_io_nbdev.__path__, "data_io_nbdev."):
        if found.name.rpartition(".")[2].startswith("_"): continue
        module = importlib.import_module(found.name)
        for name in getattr(module, "__all__", ()):
            thing = getattr(module, name)
            if (inspect.isclass(thing) or inspect.isfunction(thing)) and thing.__module__ == module.__name__: yield from parts(thing)
"""
UNFINISHED = "the package was written by nbdev_export alone: run make export"


def test_annotations_are_types():
    "Every annotation of what is public can be evaluated; text are only those of a class that is still being made"
    run(PUBLIC + """
text = []
for thing in public():
    inspect.get_annotations(thing, eval_str=True)
    text += [thing for a in inspect.get_annotations(thing).values() if isinstance(a, str)]
assert len(text) < 100, f"{len(text)}: %s"
""" % UNFINISHED)


def test_docstrings_explain():
    "What the notebooks say in comments is in the docstrings: every parameter that has a comment, results, and errors"
    import data_io_nbdev
    from data_io_nbdev._showdoc import docments
    find = data_io_nbdev.Pool.find
    assert "Parameters\n" in (find.__doc__ or ""), UNFINISHED
    run(PUBLIC + f"""
from data_io_nbdev._showdoc import docments
for thing in public():
    notes = {{name: note for name, note in docments(thing).items() if not name.startswith("_") and name not in ("self", "cls")}}
    if not (doc := inspect.getdoc(thing)) or inspect.isclass(thing): continue
    for name, note in notes.items():
        assert " ".join(note.split()) in " ".join(doc.split()), (thing, name, {UNFINISHED!r})
""")
    doc = data_io_nbdev.MemoryBuffer.__doc__
    assert "batch_size : int\n" in doc and docments(data_io_nbdev.MemoryBuffer)["batch_size"] in doc
    assert "Raises\n" in data_io_nbdev.open_pool.__doc__ and "PoolNotFound\n" in data_io_nbdev.open_pool.__doc__


def test_the_package_explains_itself():
    import data_io_nbdev
    assert data_io_nbdev.__doc__, UNFINISHED
    assert "\n" not in data_io_nbdev.__doc__.strip() and data_io_nbdev.__version__


def test_names():
    "The names that users type are there, listed, and loaded only when they are used; others are not there"
    import data_io_nbdev
    for name in ("open_pool", "MemoryPool", "MemoryBuffer", "Episode", "Record", "PoolQuery", "Schema", "Uniform", "Episodes"):
        assert name in dir(data_io_nbdev) and getattr(data_io_nbdev, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'MemoryPol'"): data_io_nbdev.MemoryPol
    loaded = run("import sys, data_io_nbdev; print(sorted(m for m in sys.modules if m.startswith('data_io_nbdev.')))")
    assert "data_io_nbdev.storage" not in loaded


def test_readme_lines():
    "The two lines of the README"
    from data_io_nbdev import MemoryBuffer
    from data_io_nbdev.testing import drive
    buffer = MemoryBuffer(batch_size=256)
    buffer.store(drive(9).to_frame())
    state, action, reward, nstate = buffer.sample()
    assert (state.shape, action.shape, reward.shape, nstate.shape) == ((256, 3), (256, 2), (256,), (256, 3))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from a copy of the sources"
    folder = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", "_docs", "_proc", ".*cache*", "node_modules")
    shutil.copytree(ROOT, folder / "src", ignore=skip)
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, folder / "src"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = folder.glob("*.whl")
    return made


def requirements(*names):
    "The distributions that some need, by name, and they themselves"
    found = {}
    while names:
        name, *names = names
        if name in found: continue
        try: found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError: continue  # for another platform
        needs = [r for r in found[name].requires or [] if "extra ==" not in r]
        names = [*names, *(re.match(r"[\w.-]+", r).group().lower().replace("_", "-") for r in needs)]
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    "An interpreter with the wheel, fastcore, numpy, pandas, what these need, and nothing else"
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "env", with_pip=False, symlinks=True)
    python = folder / "env" / "bin" / "python"
    done = subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    site = Path(run("import sysconfig; print(sysconfig.get_path('purelib'))", python).strip())
    for dist in requirements("fastcore", "numpy", "pandas").values():
        for top in {f.parts[0] for f in dist.files} - {"..", "__pycache__"}:
            if not (site / top).exists(): (site / top).symlink_to(dist.locate_file(top))
    return python, site


def test_wheel(wheel):
    "It holds the package with `py.typed`, and neither tests nor notebooks"
    import zipfile
    names = zipfile.ZipFile(wheel).namelist()
    assert "data_io_nbdev/py.typed" in names and "data_io_nbdev/storage/pool/memory.py" in names and "data_io_nbdev/testing/pools.py" in names
    assert {n.partition("/")[0].partition("-")[0] for n in names} == {"data_io_nbdev"} and not [n for n in names if n.endswith(".ipynb")]


def test_requirements(wheel):
    "fastcore, numpy and pandas are all that it needs; the rest are extras"
    import email
    import zipfile
    with zipfile.ZipFile(wheel) as file:
        text = email.message_from_bytes(file.read(next(n for n in file.namelist() if n.endswith("METADATA"))))
    needs = {re.match(r"[\w-]+", r).group() for r in text.get_all("Requires-Dist") if "extra ==" not in r}
    assert needs == {"fastcore", "numpy", "pandas"} and {"test", "gym", "dev"} <= set(text.get_all("Provides-Extra"))


def test_installed(installed, tmp_path):
    "With these three alone it imports, stores, samples, saves; what needs an extra says which"
    python, site = installed
    code = NAMES + f"""
import data_io_nbdev, numpy as np, pathlib
assert pathlib.Path(data_io_nbdev.__file__).parent == pathlib.Path({str(site)!r}) / "data_io_nbdev"
assert (pathlib.Path(data_io_nbdev.__file__).parent / "py.typed").exists()
times = ["2026-01-01T00:00Z", "2026-01-01T00:01Z"]
steps = dict(state=np.zeros((2, 3), "f4"), nstate=np.ones((2, 3), "f4"), action=np.zeros((2, 1), "f4"), reward=np.zeros(2, "f4"))
buffer = MemoryBuffer(batch_size=4)
buffer.store(Episode.from_arrays(**steps, timestamp=times, who=dict(vehicle="VB7")).to_frame())
print([a.shape for a in buffer.sample()])
buffer.save("saved.npz")
print(len(MemoryPool("saved.npz", "r")))
from data_io_nbdev.errors import MissingExtra
class Env: observation_space = action_space = None
try: Schema.from_env(Env())
except MissingExtra as e: print(e)
"""
    shapes, count, message = run(code, python, cwd=tmp_path).splitlines()
    assert (shapes, count) == ("[(4, 3), (4, 1), (4,), (4, 3)]", "1") and "data_io_nbdev[gym]" in message
