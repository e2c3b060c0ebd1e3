"What the command line shows on a terminal of 80 columns, as tmux has it on its screen: no line too long, no bar left behind, no colour that stays"
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("deltalake")
from data_io_nbdev import MemoryPool
from data_io_nbdev.testing import drive
from loud import absent
from test_cli import ROOT

DONE = re.compile(r"^\[exit (\d+)\]$", re.M)


@pytest.fixture(scope="module")
def screen(tmp_path_factory):
    "A shell on a screen of 80 by 50, in a folder with the pool week.npz"
    if not (tmux := shutil.which("tmux")): absent("the command line on a terminal: tmux is not installed")
    folder = tmp_path_factory.mktemp("screen")
    with MemoryPool(folder / "week.npz") as pool:
        ids = pool.extend([drive(60, hour=hour, driver=driver) for hour in range(12) for driver in ("anna", "bo")])
    python = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environ = {**os.environ, "PYTHONPATH": python, "TERM": "xterm-256color", "HOME": str(folder)}
    for unwanted in ("TMUX", "COLUMNS", "LINES"): environ.pop(unwanted, None)

    def run(*words):
        said = subprocess.run([tmux, "-S", str(folder / "socket"), "-f", os.devnull, *words], env=environ, cwd=folder, capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        return said.stdout

    run("new-session", "-d", "-x", "80", "-y", "50", "sh")
    run("send-keys", "PS1='$ '", "Enter")  # whoever runs the test
    run("pipe-pane", f"cat >> {shlex.quote(str(folder / 'written'))}")
    (folder / "written").touch()
    yield SimpleNamespace(run=run, folder=folder, id=ids[0])
    run("kill-server")


def shown(screen, *words):
    "After `python words`: the screen's rows, its lines as they were before they were wrapped, the last row with its escapes; what was written; the exit code"
    typed = shlex.join([sys.executable, *words])
    (screen.folder / "typed").write_text(f"{typed}\nprintf '[exit %s]\\n' $?\n")
    before = len((screen.folder / "written").read_bytes().decode())
    screen.run("send-keys", "clear; . ./typed", "Enter")
    until = time.monotonic() + 60
    while not (DONE.search(now := screen.run("capture-pane", "-p")) and now.rstrip().endswith("$")):
        assert time.monotonic() < until, now
        time.sleep(0.05)
    def lines(*options): return [row.rstrip() for row in screen.run("capture-pane", "-p", *options).split("[exit", 1)[0].splitlines()]
    return SimpleNamespace(rows=lines(), joined=lines("-J"), prompt=screen.run("capture-pane", "-p", "-e").rstrip().splitlines()[-1],
                           written=(screen.folder / "written").read_bytes().decode()[before:], code=int(DONE.search(now)[1]))


@pytest.mark.parametrize("words", [["info"], ["info", "week.npz"], ["ls", "week.npz"], ["show", "week.npz", "ID"], ["history", "week.npz"],
                                   ["verify", "week.npz"]], ids=" ".join)
def test_a_screen_is_whole(screen, words):
    found = shown(screen, "-m", "data_io_nbdev.cli", *(screen.id if word == "ID" else word for word in words))
    assert found.code == 0 and any(row.strip() for row in found.rows)
    assert found.rows == found.joined, "a line is longer than the terminal is wide"
    assert re.fullmatch(r"(\x1b\[[039;]*m)*\$", found.prompt.rstrip()), f"the prompt is not in its own colours: {found.prompt!r}"


SLOW = """
import time
from data_io_nbdev.data.show import progress_bar
with progress_bar(True, 6, "copy", "parts") as tick:  # comes after two seconds
    for _ in range(6):
        time.sleep(0.5)
        tick()
"""


def test_a_bar_moves_on_one_line_and_goes(screen):
    pytest.importorskip("tqdm")
    found = shown(screen, "-c", SLOW)
    bars = re.findall(r"\r(copy: [^\r\n]*)(\r?\n)?", found.written)
    assert found.code == 0 and bars, "no bar was drawn"
    assert [bar for bar, ended in bars if len(bar) > 80 or ended] == [], "a bar took more than its line"
    assert not re.search(r"\d%\||it/s", "\n".join(found.rows)), "what is left of a bar stands on the screen"
