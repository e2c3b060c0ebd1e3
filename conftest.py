"""Every notebook under nbs/ is a test: pytest runs each in a process of its own, and nbdev's directives hold.

A notebook gets its own process because the shell that runs its cells replaces `__main__`, and because an endless cell
can then be stopped. Exported cells are not run again: their names are imported from the package, so that what is
tested, and counted by coverage, is what users install.

What a cell shows is compared with the output that the notebook keeps, because that is what readers get: text and HTML word by
word, pictures by their kind. A cell that begins with `#| varies` shows something else each time. `make outputs PAGE=…` runs a
notebook in the same way, and keeps what it shows.
"""
import ast
import difflib
import os
import re
import signal
import subprocess
import symtable
import sys
import tempfile
import traceback
import warnings
from configparser import ConfigParser
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest

GRACE = 10  # seconds between asking an endless notebook to stop and ending it
PINNED = (3, 11)  # the Python of constraints.txt: with other versions of pandas and numpy, the same values look another way


# --- in pytest's process: one item for each notebook ---

def pytest_addoption(parser):
    group = parser.getgroup("notebooks")
    group.addoption("--notebook-timeout", type=float, default=300, metavar="SECONDS",
                    help="the longest that one notebook may run (default: %(default)s)")
    group.addoption("--flags", default="", metavar="NAMES",
                    help="also run the cells with these test flags, for example 'mongo slow'")
    group.addoption("--outputs", choices=("compare", "ignore"), default="compare" if sys.version_info[:2] == PINNED else "ignore",
                    help="whether a notebook must show what it keeps (default: on Python {}.{}, which has the pinned requirements)".format(*PINNED))


def pytest_configure(config):
    settings = ConfigParser(delimiters=["="])
    settings.read(config.rootpath / "settings.ini", encoding="utf-8")
    known = settings.get("DEFAULT", "tst_flags", fallback="").split()
    if unknown := set(config.getoption("--flags").split()) - set(known):
        raise pytest.UsageError(f"--flags {' '.join(sorted(unknown))}: settings.ini has tst_flags = {' '.join(known)}")


def pytest_collect_file(file_path, parent):
    hidden = any(part.startswith((".", "_")) for part in file_path.relative_to(parent.config.rootpath).parts)
    if file_path.suffix == ".ipynb" and not hidden: return NotebookFile.from_parent(parent, path=file_path)


class NotebookFile(pytest.File):
    def collect(self): yield Notebook.from_parent(self, name="notebook")


class NotebookFailed(Exception):
    "What the notebook's process printed before it failed"


class Notebook(pytest.Item):
    def runtest(self):
        limit, flags = self.config.getoption("--notebook-timeout"), self.config.getoption("--flags").split()
        # A file, not a pipe: workers that a notebook leaves behind would hold a pipe open.
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
            command = [sys.executable, __file__, str(self.path), str(limit), self.config.getoption("--outputs"), *flags]
            process = subprocess.Popen(command, stdout=output,
                                       stderr=output, cwd=self.config.rootpath, start_new_session=True)
            try: status = process.wait(limit + GRACE)
            except subprocess.TimeoutExpired: status = f"none; it ran for more than {limit:g} seconds"
            finally:
                with suppress(ProcessLookupError): os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            if status: raise NotebookFailed(output.read() or f"The notebook's process ended without a word; status: {status}")

    def repr_failure(self, excinfo, style=None):
        return str(excinfo.value) if excinfo.errisinstance(NotebookFailed) else super().repr_failure(excinfo, style)

    def reportinfo(self): return self.path, None, str(self.path.relative_to(self.config.rootpath))


# --- in the notebook's process ---

def bound_names(source: str) -> list[str]:
    "The names that a cell defines, assigns or imports"
    symbols = symtable.symtable(source, "cell", "exec").get_symbols()
    return [s.get_name() for s in symbols if s.is_assigned() or s.is_imported() or s.is_namespace()]


def import_instead(source: str, module: str) -> str:
    "A cell that takes from `module` the names that the exported cell `source` binds"
    # `from x import *` binds names that cannot be read off the source; `__future__` is about the cells that follow.
    kept = [ast.unparse(node) for node in ast.parse(source).body if isinstance(node, ast.ImportFrom)
            and (node.module == "__future__" or node.names[0].name == "*")]
    present = [name for name in bound_names(source) if name in vars(import_module(module))]
    return "\n".join(kept + [f"from {module} import {', '.join(present)}"] * bool(present))


ADDRESS = re.compile(r"( at)? 0x[0-9a-fA-F]+\b")  # `nbdev_clean` drops those of reprs


def joined(text) -> str: return text if isinstance(text, str) else "".join(text)


def seen(outputs: list, module: str) -> list[str]:
    "What a reader sees of a cell's outputs, to be compared: Jupyter and the shell here order and split them in different ways"
    def plain(text):
        # Where the page's own module is not imported but typed, as in Jupyter, its classes are at home in `__main__`.
        return ADDRESS.sub("", re.sub(rf"\b{re.escape(module)}\.(?=\w)", "__main__.", joined(text)) if module else joined(text))
    printed = "".join(joined(o["text"]) for o in outputs if o["output_type"] == "stream" and o["name"] == "stdout")
    found = [f"printed:\n{plain(printed)}"] * bool(printed.strip())
    for data in (o["data"] for o in outputs if o["output_type"] in ("display_data", "execute_result")):
        pictures = sorted(kind for kind in data if kind.startswith("image/"))
        found += [f"a picture: {', '.join(pictures)}"] if pictures else [f"{kind}:\n{plain(data[kind])}" for kind in sorted(data) if kind.startswith("text/")]
    return found


def compared(cell) -> bool:
    "Whether what a cell shows belongs to the page: not what the site prints anew, leaves out, or is told to expect anything of"
    said = {name.rstrip(":"): value for name, value in cell.directives_.items()}
    left_out = "hide" in said or ["false"] in (said.get("output"), said.get("include"))
    return not ({"varies", "export", "exports", "exporti"} & said.keys() or "show_doc(" in cell.source or left_out)


def difference(cell, stored: list, came: list, module: str) -> str:
    "What a notebook keeps of a cell against what the cell shows now; empty where they agree"
    before, now = seen(stored, module), seen(came, module)
    if before == now: return ""
    lines = "\n".join(f"     {line}" for line in cell.source.splitlines()[:12])
    for which in (before, now): which or which.append("nothing")
    def lines_of(texts): return "\n".join(texts).replace("><", ">\n<").splitlines()  # HTML has long ones
    changes = list(difflib.unified_diff(lines_of(before), lines_of(now), "stored", "came", lineterm="", n=2))
    more = [f"… and {len(changes) - 60} lines more"] * (len(changes) > 60)
    return "\n".join([f"cell {cell.idx_ + 1} ({cell.id}) shows something else than the notebook keeps\n\n{lines}\n", *changes[:60], *more, ""])


def store(path: Path, shown: dict[str, list]) -> None:
    "Put outputs into a notebook, by the ids of their cells, and clean it as `nbdev_clean` does"
    from execnb.nbio import read_nb, write_nb
    from nbdev.clean import clean_nb
    nb = read_nb(path)
    for cell in nb.cells:
        if cell.id in shown: cell.outputs = shown[cell.id]
    clean_nb(nb)
    for cell in nb.cells:  # as they are in the file
        cell.pop("idx_", None)
    write_nb(nb, path)


def run(path: Path, limit: float, outputs: str, flags: list[str]) -> bool:
    """Run one notebook as nbdev does, within `limit` seconds; on failure print the cell and the traceback

    `outputs` says what to do with what its cells show: `compare` it with what the notebook keeps, `ignore` it, or `store` it there.
    """
    from coverage import Coverage
    from execnb.shell import CaptureShell
    from nbdev import test
    from nbdev.config import get_config
    from nbdev.process import NBProcessor, Processor

    class ImportExports(Processor):
        def begin(self):
            nonlocal module
            exps = [c.directives_["default_exp"][0] for c in self.nb.cells if "default_exp" in c.directives_]
            self.default = exps[0] if exps else None
            module = f"{get_config().lib_path.name}.{self.default}".removesuffix(".__init__") if exps else ""
            # A page without a module is not measured: one of them interrupts itself, and coverage's lock does not bear that.
            if not exps and (coverage := Coverage.current()): coverage.stop()

        def cell(self, cell):
            for directive in {"export", "exports", "exporti"} & cell.directives_.keys():
                target = (cell.directives_[directive] or [self.default])[0]
                cell.set_source(import_instead(cell.source, f"{get_config().lib_path.name}.{target}".removesuffix(".__init__")))

    class Shell(CaptureShell):
        def __init__(self, path): super().__init__(path, mpl_format="png")

        def cell(self, cell, **kwargs):
            if cell.cell_type != "code": return
            self.running, stored, cell.outputs = cell, cell.get("outputs", []), []
            super().cell(cell, **kwargs)
            if self.exc: return
            if not {"export", "exports", "exporti", "hide"} & cell.directives_.keys(): shown[cell.id] = cell.outputs
            if compared(cell) and (wrong := difference(cell, stored, cell.outputs, module)): differences.append(wrong)

        def prettytb(self, fname=None):
            "The cell with line numbers, what it printed, and the traceback from the cell on"
            cell, error = self.running, self.exc or sys.exc_info()[1]
            lines = "\n".join(f"{i:4} {line}" for i, line in enumerate(cell.source.splitlines(), 1))
            printed = "".join("".join(o.text) for o in cell.outputs if o.output_type == "stream")
            frames = error.__traceback__
            while frames and "ipython-input" not in frames.tb_frame.f_code.co_filename: frames = frames.tb_next
            trace = "".join(traceback.format_exception(type(error), error, frames or error.__traceback__))
            return f"{type(error).__name__} in cell {cell.idx_ + 1} ({cell.id}) of {path.name}\n\n{lines}\n\n{printed}{trace}"

        def showtraceback(self, *args, **kwargs): "IPython's own, in colours; prettytb says it once"

    def stop(*_): raise TimeoutError(f"the notebook ran for more than {limit:g} seconds (--notebook-timeout)")
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    for category in (DeprecationWarning, FutureWarning, RuntimeWarning):  # as in pytest.ini
        warnings.filterwarnings("error", category=category, module=get_config().lib_path.name)
    os.environ["COLUMNS"] = "80"  # as Jupyter has it; so has pandas as many columns of a frame, and more than would fit in a terminal
    with suppress(ImportError): import_module("pandas").set_option("display.max_columns", 20)
    module, shown, differences = "", {}, []
    test.CaptureShell = Shell
    test.NBProcessor = lambda fn, procs, process: NBProcessor(fn, [procs, ImportExports], process=process)
    config = get_config()
    ran = test.test_nb(path, skip_flags=config.tst_flags.split(), force_flags=flags, basepath=config.config_path)[0]
    if ran and outputs == "store": store(path, shown)
    elif ran and outputs == "compare" and differences:
        name = os.path.relpath(path, config.config_path)
        print(f"{name}: {len(differences)} of its outputs are not what its cells show. Where the new ones are right, keep them: "
              f"make outputs PAGE={name}. Where they can't be the same each time, begin the cell with `#| varies`.\n")
        print("\n".join(differences))
        return False
    return ran


if __name__ == "__main__":  # conftest.py NOTEBOOK SECONDS compare|ignore|store [FLAG…]
    sys.exit(not run(Path(sys.argv[1]).absolute(), float(sys.argv[2]), sys.argv[3], sys.argv[4:]))
