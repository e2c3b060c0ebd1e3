"""Every page of the site stands alone: what it shows can be pasted, in order, into a fresh notebook

What is shown is what docs/bridge.py shows. The names are checked on all pages; the index, the README, tutorials, how-tos and
explanations are also run, each in a fresh process and an empty folder.
"""
import ast
import builtins
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import symtable
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import nbformat
import pytest
from loud import absent
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

bridge = pytest.importorskip("bridge", reason="what a page shows is what the site is built from, with the dev extra")

ROOT = Path(__file__).parents[1]
NBS = ROOT / "nbs"
PAGES = [*bridge.notebooks(NBS).values()]
RUN = [path for path in PAGES if path == NBS / "index.ipynb" or path.relative_to(NBS).parts[0] in ("tutorials", "howto", "explanations")]
TAUGHT = [path for path in RUN if path.relative_to(NBS).parts[0] in ("tutorials", "howto")]
THERE = {*dir(builtins), "display", "get_ipython", "__name__", "__class__"}
FUTURE = "from __future__ import annotations"  # from such a cell on, annotations are text, and may name what comes later


def named(path): return path.relative_to(NBS).with_suffix("").as_posix()


# --- names ---

def later(table):
    "Whether a block runs when it is called, not where it stands"
    return table.get_type() == "function" and table.get_name() not in ("listcomp", "setcomp", "dictcomp", "genexpr")


class Unannotated(ast.NodeTransformer):
    def visit_arg(self, node): return ast.arg(node.arg)
    def visit_AnnAssign(self, node): return ast.Assign([node.target], node.value or ast.Constant(None), lineno=node.lineno)
    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)
    visit_AsyncFunctionDef = visit_FunctionDef


def names_of(source, annotated=True):
    "The names that a cell binds; those that it needs at once; those that its functions need when they are called"
    if not annotated: source = ast.unparse(ast.fix_missing_locations(Unannotated().visit(ast.parse(source))))
    top = symtable.symtable(source, "cell", "exec")
    binds = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported() or s.is_namespace()}
    needs = {False: {s.get_name() for s in top.get_symbols() if s.is_referenced()}, True: set()}

    def visit(table, called):
        for child in table.get_children():
            within = called or later(child)
            for s in child.get_symbols():
                if s.is_global() and s.is_referenced(): needs[within].add(s.get_name())
                if s.is_global() and s.is_assigned(): binds.add(s.get_name())
            visit(child, within)
    visit(top, False)
    for module in re.findall(r"^from ([\w.]+) import \*", source, re.M):
        found = importlib.import_module(module)
        binds |= set(getattr(found, "__all__", None) or (n for n in vars(found) if not n.startswith("_")))
    return binds, needs[False], needs[True]


def missing(path):
    "Names that the code of a page uses, and that no code shown before (for functions: shown at all) defines"
    shown = bridge.code_shown(path)
    future = next((i for i, cell in enumerate(shown) if FUTURE in cell.source), len(shown))
    cells = [(cell, *names_of(cell.source, annotated=i < future)) for i, cell in enumerate(shown)]
    anywhere = THERE.union(*(binds for _, binds, _, _ in cells))
    known, wrong = set(THERE), []
    for cell, binds, now, when_called in cells:
        known |= binds
        if odd := sorted(now - known | when_called - anywhere):
            wrong.append(f"{', '.join(odd)} in cell {cell.id}: {cell.source.splitlines()[0]}")
    return wrong


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_names(path):
    "No cell that is shown uses a name that only a hidden cell defines, or none"
    if wrong := missing(path):
        pytest.fail("\n".join([f"{named(path)} shows code that cannot be pasted: nothing that it shows before defines", *wrong]), pytrace=False)


@pytest.mark.parametrize("path", TAUGHT, ids=named)
def test_code_of_a_lesson_is_open(path):
    "Tutorials and how-tos fold no code away"
    assert not [cell.source for cell in bridge.code_shown(path) if cell.folded and not cell.source.startswith(("import", "from"))]


# --- as pasted ---

PASTE = """
import faulthandler, json, os, sys
faulthandler.dump_traceback_later(280, exit=True)  # a page that hangs says where
from execnb.shell import CaptureShell
cells = json.load(sys.stdin)
class Shell(CaptureShell):
    def showtraceback(self, *args, **kwargs): "IPython's own, in colours; what follows says it once"
shell = Shell()
for name, source in cells:
    for output in shell.run(source):
        if output["output_type"] == "stream": print("".join(output["text"]))
    if shell.exc:
        import traceback
        print(f"{name}:\\n\\n{source}\\n")
        traceback.print_exception(shell.exc)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(1)
"""


def paste(cells, folder):
    "Run sources, each with a name, one after the other, in a fresh process that knows nothing of the repository but the package"
    # Unmeasured: a page that interrupts itself tears the lock of coverage, and then hangs.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("COV_", "COVERAGE"))}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
    # A file, not a pipe: processes that a page leaves behind would hold a pipe open.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        process = subprocess.Popen([sys.executable, "-c", PASTE], stdin=subprocess.PIPE, stdout=said, stderr=said, text=True, cwd=folder, env=env,
                                   start_new_session=True)
        process.communicate(json.dumps(cells))
        with suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
        said.seek(0)
        if process.returncode: pytest.fail(f"pasted in order, it does not run:\n{said.read()}", pytrace=False)


def flags(cell): return {"mongo", "slow"} & cell.directives.keys()


def to_paste(path):
    "The cells that run here: those for PyTorch and JAX run as notebooks, where these are (`make frameworks`)"
    return [cell for cell in bridge.code_shown(path) if cell.directives.get("eval:") != ["false"] and not {"torch", "jax"} & cell.directives.keys()]


@pytest.mark.parametrize("path", RUN, ids=named)
def test_as_pasted(path, tmp_path):
    paste([(cell.id, cell.source) for cell in to_paste(path) if not flags(cell)], tmp_path)


WITH_SERVER = [path for path in RUN if any(map(flags, to_paste(path)))]


def need_server(what):
    if os.environ.get("MONGODB_URI") or shutil.which("mongod") or shutil.which("ferretdb"): return
    absent(f"{what} as pasted: set MONGODB_URI, or put mongod or ferretdb on the PATH")


@pytest.mark.parametrize("path", WITH_SERVER, ids=named)
def test_as_pasted_with_a_server(path, tmp_path):
    need_server(named(path))
    paste([(cell.id, cell.source) for cell in to_paste(path)], tmp_path)


def test_readme_as_pasted(tmp_path):
    if NBS / "index.ipynb" in WITH_SERVER: need_server("README.md")
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    paste([(f"block {i}", block) for i, block in enumerate(blocks, 1)], tmp_path)


# --- the checks themselves ---

@pytest.fixture
def page(tmp_path):
    "`page(cell, …)` is a notebook with these code cells"
    def write(*cells):
        nbformat.write(new_notebook(cells=[new_markdown_cell("# Page"), *map(new_code_cell, cells)]), tmp_path / "page.ipynb")
        return tmp_path / "page.ipynb"
    return write


@pytest.mark.parametrize("cells", [
    ["x = 1", "x"], ["from os.path import *", "join('a', 'b')"], ["def f(): return g()", "def g(): return 1", "f()"],
    ["import os\n[os.getcwd() for _ in range(3)]"], ["#| export\ndef f(): return 1", "f()"], ["#| hide\nx = 1", "y = 2\ny"],
    ["class A:\n    b = 1\n    c = b", "A.c"], ["if (n := 3) > 2: print(n)"], ["#| mongo\nx = 1", "x"], ["#| varies\nx = 1", "x"],
    ["try: x = 1\nexcept OSError as e: print(e)"], ["def f():\n    global z\n    z = 1\nf()", "z"], ["#| echo: false\nunknown"], ["show_doc(unknown)"],
    [FUTURE, "class A:\n    x: B\n    def f(self, b: B, *c: B) -> B: pass", "class B: pass"],
])
def test_good_names(page, cells): assert missing(page(*cells)) == []


@pytest.mark.parametrize("cells, names", [
    (["#| hide\nx = 1", "x"], "x"), (["#| hide\nfrom fastcore.test import *", "test_eq(1, 1)"], "test_eq"), (["nothing()"], "nothing"),
    (["#| echo: false\nx = 1", "x"], "x"), (["def f(): return y", "f()"], "y"), (["x + 1", "x = 1"], "x"), (["x = 1 #| hide_line\nx"], "x"),
    (["[a for _ in range(3)]", "a = 1"], "a"), (["class A:\n    def f(self): return b\nA().f()"], "b"), (["#| include: false\nx = 1", "print(f'{x}')"], "x"),
    (["def f(a: A): pass", "class A: pass"], "A"), ([FUTURE, "def f(a: A = a): pass", "a = 1"], "a"),
])
def test_bad_names(page, cells, names):
    wrong, = missing(page(*cells))
    assert wrong.startswith(f"{names} in cell ")


def test_pasted_pages(page, tmp_path):
    good = page("#| hide\nraise SystemExit", "#| eval: false\n1 / 0", "#| varies\nx = 1", "assert x == 1\nx")
    paste([(cell.id, cell.source) for cell in to_paste(good)], tmp_path)
    with pytest.raises(pytest.fail.Exception, match="(?s)does not run:\ncell1:\n\nassert x == 2\n.*AssertionError"):
        paste([("cell0", "x = 1"), ("cell1", "assert x == 2")], tmp_path)


def test_varies_is_not_shown(page):
    code, = bridge.code_shown(page("#| varies\nx = 1"))
    assert code.source == "x = 1" and not code.folded
