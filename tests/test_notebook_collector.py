"""The collector in conftest.py: what a notebook may do to its test, and what the test then says"""
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

pytest_plugins = "pytester"
CONFTEST = Path(__file__).parents[1] / "conftest.py"


@pytest.fixture
def project(pytester):
    "A project with this collector and a package `lib`; `project(name=[cells])` writes notebooks, and runs them"
    pytester.makeconftest(CONFTEST.read_text(encoding="utf-8"))
    pytester.makefile(".ini", settings="[DEFAULT]\nlib_name = lib\nlib_path = lib\nnbs_path = nbs\nrepo = lib\nuser = u\n"
                                       "branch = main\nversion = 0\ntst_flags = slow mongo\n")
    pytester.mkpydir("lib").joinpath("tools.py").write_text("def _half(x): return x // 2\n\ndef four(): return _half(8)\n")
    pytester.mkdir("nbs")

    def run(*options, **notebooks):
        for name, cells in notebooks.items():
            cells = [new_markdown_cell(f"# {name}"), *map(new_code_cell, cells)]
            nbformat.write(new_notebook(cells=cells), pytester.path / "nbs" / f"{name}.ipynb")
        return pytester.runpytest_subprocess("nbs", "-p", "no:cacheprovider", *options)
    return run


def test_one_item_for_each_notebook(project):
    result = project("-v", good=["x = 1", "assert x == 1"], bad=["print('so far')", "y = 2\nassert y == 3, 'not three'"])
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*good.ipynb::notebook PASSED*", "AssertionError in cell 3 (*) of bad.ipynb", "*1 y = 2", "*2 assert y == 3*",
                                 "*AssertionError: not three"])
    result.stdout.no_fnmatch_line("*IPython*")


def test_exported_cells_come_from_the_package(project):
    "The module halves with //; the notebook's own text would give 4.0, and `_half` is there for the cells that follow"
    result = project(tools=["#| default_exp tools", "#| export\ndef _half(x): return x / 2",
                            "#| export\ndef four(): return _half(8)", "assert repr((four(), _half(2))) == '(4, 1)'",
                            "assert four.__module__ == 'lib.tools'"])
    result.assert_outcomes(passed=1)


def test_directives(project):
    cells = ["#| eval: false\n1 / 0", "#| slow\n1 / 0", "#| hide\nx = 1", "assert x == 1"]
    project(plain=cells).assert_outcomes(passed=1)
    project("--flags", "slow").assert_outcomes(failed=1)
    project("--flags", "mongo").assert_outcomes(passed=1)
    project("--flags", "slwo").stderr.fnmatch_lines(["*--flags slwo: settings.ini has tst_flags = slow mongo"])


def test_an_endless_notebook_is_stopped_where_it_is(project):
    start = time.monotonic()
    result = project("--notebook-timeout", "3", endless=["import time", "while True:\n    time.sleep(0.1)"])
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*2     time.sleep(0.1)", "TimeoutError: the notebook ran for more than 3 seconds*"])
    assert time.monotonic() - start < 30


def test_a_notebook_that_dies_says_so(project):
    result = project(dies=["import os", "os._exit(7)"])
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*ended without a word; status: 7"])


def test_processes_started_by_a_notebook(project):
    "Spawned pools work in a cell, and what a notebook leaves running ends with it"
    result = project("--notebook-timeout", "30", pools=[
        "import multiprocessing, subprocess, sys", "from concurrent.futures import ProcessPoolExecutor",
        "with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool: assert pool.submit(abs, -1).result() == 1",
        "left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])",
        "print(left.pid, file=open('left', 'w'))"])
    result.assert_outcomes(passed=1)
    pid = int(Path("nbs/left").read_text())
    deadline = time.monotonic() + 5
    while running(pid):
        assert time.monotonic() < deadline, "still running"
        time.sleep(0.05)


def running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"
