"""The collector in conftest.py: what a notebook may do to its test, and what the test then says"""
import sys
import time
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

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


def outputs_of(*cells):
    "Code cells that keep outputs: text of a result, or a dict of its data, or a stream"
    made = []
    for source, *kept in cells:
        cell = new_code_cell(source)
        cell.outputs = [o if "output_type" in o else new_output("execute_result", data=o) for o in
                        (k if isinstance(k, dict) else {"text/plain": k} for k in kept)]
        made.append(cell)
    return made


def printed(text): return new_output("stream", name="stdout", text=text)


@pytest.fixture
def page(project, pytester):
    "`page((source, output, …), …)` writes a notebook of cells with outputs, and runs it; `page.path` is where it is"
    def run(*cells, options=("--outputs", "compare")):
        nbformat.write(new_notebook(cells=[new_markdown_cell("# Page"), *outputs_of(*cells)]), run.path)
        return project(*options)
    run.path = pytester.path / "nbs" / "page.ipynb"
    return run


PLOT = "import matplotlib.pyplot as plt\nplt.plot([1, 2]);"
HALF = "#| export\ndef four(): return 4"
FRAME = "import pandas as pd\npd.DataFrame([[1]], columns=['a'])"


def test_outputs_that_are_kept_are_those_that_come(page):
    page(("#| default_exp tools",), ("1 + 1", "2"), ("print('a')\nprint('b')", printed("a\n"), printed("b\n")),
         ("#| varies\nimport time\ntime.time()", "0"), ("#| varies: each run\nprint(time.time())",),
         ("object()", "<object>"), ("object()", "<object at 0x7f0000000000>"), ("print(object())", printed("<object object at 0x7f0000000000>\n")),
         ("#| hide\n3",), ("#| output: false\n3",), ("#| slow\n3", "4"), ("#| eval: false\n3", "4"), ("import sys; print('x', file=sys.stderr)",),
         (HALF,), ("four", "<function __main__.four()>"), ("four", "<function lib.tools.four()>"),
         (PLOT, {"image/png": "iVBORw0KGgo=", "text/plain": "<Figure>"}),
         ("from IPython.display import HTML, display\ndisplay(HTML('<b>1</b>'))\n2",
          {"text/html": "<b>1</b>", "text/plain": "<IPython.core.display.HTML object>"}, "2")).assert_outcomes(passed=1)


def test_outputs_that_differ(page):
    "All of them are told, each with its cell, what is kept, what came, and what to do"
    result = page(("1 + 1", "3"), ("5",), ("x = 1", "1"), ("#| varies\n1",), ("print('b')", printed("a\n")), (PLOT, "3"),
                  ("3", {"image/png": "iVBORw0KGgo=", "text/plain": "3"}), (FRAME, {"text/html": "<table></table>", "text/plain": "   a\n0  1"}),
                  ("#| echo: false\n1", "2"))
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines([
        "*page.ipynb: 8 of its outputs are not what its cells show*make outputs PAGE=nbs/page.ipynb*#| varies*",
        "cell 2 (*) shows something else than the notebook keeps", "*1 + 1", "*--- stored", "*+++ came", "-3", "+2", "-nothing", "+5", "-1", "+nothing",
        "cell 6*", "-a", "+b", "+a picture: image/png", "-a picture: image/png", "-<table>", "+<div>", "-2", "+1"])


def test_an_error_is_told_before_outputs(page):
    result = page(("1",), ("raise ValueError('first')",))
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["ValueError in cell 3*"])


def test_outputs_can_be_ignored(page): page(("1 + 1", "3"), options=("--outputs", "ignore")).assert_outcomes(passed=1)


def test_outputs_are_stored(page, pytester):
    "As the test will see them; what does not run, is hidden or exported keeps what it has"
    cells = [("#| default_exp tools",), (HALF,), ("1 + 1", "3"), ("#| varies\nprint('now')",), ("#| slow\n3", "4"), ("#| hide\n5",), ("x = 1", "1")]
    page(*cells).assert_outcomes(failed=1)
    done = pytester.run(sys.executable, "conftest.py", "nbs/page.ipynb", "60", "store")
    assert done.ret == 0
    kept = nbformat.read(page.path, as_version=4)
    found = [["".join(o.get("text") or o["data"]["text/plain"]) for o in c.outputs] for c in kept.cells if c.cell_type == "code"]
    assert found == [[], [], ["2"], ["now\n"], ["4"], [], []] and [c.source for c in kept.cells[1:]] == [c[0] for c in cells]
    before = page.path.read_bytes()
    assert pytester.run(sys.executable, "conftest.py", "nbs/page.ipynb", "60", "store").ret == 0 and page.path.read_bytes() == before
    pytester.runpytest_subprocess("nbs", "--outputs", "compare").assert_outcomes(passed=1)
