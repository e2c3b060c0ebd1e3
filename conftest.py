"""Every notebook under nbs/ is a test: pytest runs each in a process of its own, and nbdev's directives hold.

A notebook gets its own process because the shell that runs its cells replaces `__main__`, and because an endless cell
can then be stopped. Exported cells are not run again: their names are imported from the package, so that what is
tested, and counted by coverage, is what users install.
"""
import ast
import os
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


# --- in pytest's process: one item for each notebook ---

def pytest_addoption(parser):
    group = parser.getgroup("notebooks")
    group.addoption("--notebook-timeout", type=float, default=300, metavar="SECONDS",
                    help="the longest that one notebook may run (default: %(default)s)")
    group.addoption("--flags", default="", metavar="NAMES",
                    help="also run the cells with these test flags, for example 'mongo slow'")


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
            process = subprocess.Popen([sys.executable, __file__, str(self.path), str(limit), *flags], stdout=output,
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


def run(path: Path, limit: float, flags: list[str]) -> bool:
    "Run one notebook as nbdev does, within `limit` seconds; on failure print the cell and the traceback"
    from coverage import Coverage
    from execnb.shell import CaptureShell
    from nbdev import test
    from nbdev.config import get_config
    from nbdev.process import NBProcessor, Processor

    class ImportExports(Processor):
        def begin(self):
            exps = [c.directives_["default_exp"][0] for c in self.nb.cells if "default_exp" in c.directives_]
            self.default = exps[0] if exps else None
            # A page without a module is not measured: one of them interrupts itself, and coverage's lock does not bear that.
            if not exps and (coverage := Coverage.current()): coverage.stop()

        def cell(self, cell):
            for directive in {"export", "exports", "exporti"} & cell.directives_.keys():
                target = (cell.directives_[directive] or [self.default])[0]
                cell.set_source(import_instead(cell.source, f"{get_config().lib_path.name}.{target}".removesuffix(".__init__")))

    class Shell(CaptureShell):
        def cell(self, cell, **kwargs):
            self.running = cell
            return super().cell(cell, **kwargs)

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
    test.CaptureShell = Shell
    test.NBProcessor = lambda fn, procs, process: NBProcessor(fn, [procs, ImportExports], process=process)
    config = get_config()
    return test.test_nb(path, skip_flags=config.tst_flags.split(), force_flags=flags, basepath=config.config_path)[0]


if __name__ == "__main__":
    sys.exit(not run(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
