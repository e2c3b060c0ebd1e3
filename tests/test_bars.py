"Bars of progress: they tick to their total, are silent where nobody looks, warn of nothing, and are gone when the work ends, however it ends"
import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
import textwrap
import threading
from contextlib import closing
from functools import partial

import pytest

pytest.importorskip("tqdm"), pytest.importorskip("deltalake"), pytest.importorskip("pymongo")
from data_io_nbdev import DaskBuffer, MemoryPool, MongoBuffer
from data_io_nbdev.data import show
from data_io_nbdev.testing import HARNESSES, drive, facts_of


class Kept(list):
    "A class like `tqdm`, made for one test; lists what was drawn: what, how much of which total, and whether it is gone"
    def __call__(self, desc, total, **options):
        kept, bar = self, [desc, 0, total, False]
        kept.append(bar)
        class Bar:
            def update(self, n=1): bar[1] += n
            def close(self): bar[3] = True
        return Bar()


class Interrupted(Kept):
    "The same, where Ctrl-C comes while it draws"
    def __call__(self, **options):
        bar = super().__call__(**options)
        def update(n=1): raise KeyboardInterrupt
        bar.update = update
        return bar


@pytest.fixture(params=list(HARNESSES))
def harness(request, tmp_path): return HARNESSES[request.param](tmp_path)


@pytest.fixture
def pool(harness):
    with closing(harness.open()) as pool:
        for h in range(4): pool.store(drive(5, hour=h))
        pool.delete(drive(hour=1).id)
        yield pool


class TestTotals:
    def test_of_every_kind_of_pool(self, pool, capfd):
        "verify, copy_to, compact and vacuum tick to their total, which is that of every version; without a bar they say nothing"
        parts, kept = 4, Kept()
        assert pool.verify(progress=kept) == [] and kept == [["verify", parts, parts, True]]
        del kept[:]
        pool.copy_to(MemoryPool(), progress=kept)
        assert kept == [["copy", 3, 3, True]]
        if hasattr(pool, "compact"):
            del kept[:]
            assert pool.compact(progress=kept) > 1 and kept == [["compact", 3, 3, True]]
            del kept[:]
            gone = pool.vacuum("0s", dry_run=False, progress=kept)
            assert gone and kept == [["vacuum", len(gone), len(gone), True]]
        for progress in (True, False):
            assert pool.verify(progress=progress) == [] and pool.copy_to(MemoryPool(), progress=progress)
        assert capfd.readouterr() == ("", "")

    def test_of_every_kind_of_buffer(self, harness, pool, capfd):
        "Loading does, too, once; what comes later is no long work"
        kind, kept = MongoBuffer if "mongodb" in str(pool.url) else DaskBuffer, Kept()
        with closing(kind(pool=pool, batch_size=4, seed=1, progress=kept)) as buffer:
            buffer.load()
            [[what, n, total, gone]] = kept
            assert (what, n, gone) == ("load", total, True) and total > 0 and len(buffer) == 15
        assert capfd.readouterr() == ("", "")


class TestEnds:
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_by_an_error(self, error):
        "The bar is gone before anyone reads of the error, which is the one that was raised"
        kept = Kept()
        with pytest.raises(error) as raised:
            with show.progress_bar(kept, 3, "load", "parts") as tick:
                tick(1)
                raise error("at the second")
        assert kept == [["load", 1, 3, True]] and raised.value.args == ("at the second",)

    def test_by_ctrl_c_while_it_draws(self, tmp_path):
        "Each kind of work ends, its bar is gone, and nothing changed: compact, vacuum, verify, copy_to and load"
        with closing(HARNESSES["delta"](tmp_path).open()) as pool:
            for h in range(4): pool.store(drive(5, hour=h))
            pool.compact()
            for h in range(4, 6): pool.store(drive(5, hour=h))
            before, other, interrupted = facts_of(pool), MemoryPool(), Interrupted()
            for work in (pool.compact, pool.verify, partial(pool.copy_to, other), partial(pool.vacuum, "0s", False)):
                with pytest.raises(KeyboardInterrupt): work(progress=interrupted)
            with pytest.raises(KeyboardInterrupt): DaskBuffer(pool=pool, batch_size=4, progress=interrupted).load()
            assert [bar[0] for bar in interrupted] == ["compact", "verify", "copy", "vacuum", "load"] and all(bar[3] for bar in interrupted)
            assert facts_of(pool) == before and pool.verify() == [] and not len(other)


ON_A_TERMINAL = """
import sys, time, warnings
warnings.simplefilter("error")
clock, later = time.time, [0]
time.time = lambda: clock() + later[0]
from data_io_nbdev.data import show
{kernel}
with show.progress_bar({progress}, 3, "verify", "parts") as tick:
    tick(1)
    later[0] += {seconds}
    tick(1)
    import threading
    assert threading.active_count() == 1, "tqdm's monitor"
print("done")
"""
A_KERNEL = "import IPython; IPython.get_ipython = lambda: type('Shell', (), {'config': {'IPKernelApp': {}}})()"


def seen(terminal=True, **how):
    "What stdout and a terminal, or a file, at stderr show of a bar"
    code = textwrap.dedent(ON_A_TERMINAL.format(**{"kernel": "", "progress": True, "seconds": 2.2, **how}))
    ours, theirs = pty.openpty() if terminal else os.pipe()
    if terminal: fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.set_blocking(ours, False)
    try: text = os.read(ours, 1 << 16).decode()  # before the end is closed: a terminal would forget it
    except BlockingIOError: text = ""
    os.close(ours); os.close(theirs)
    assert (done.returncode, done.stdout) == (0, "done\n"), text
    return text


class TestWhoSees:
    def test_a_terminal(self):
        "A bar is drawn after two seconds, and the line is empty in the end; no thread is started, nothing warns"
        text = seen()
        assert "verify: " in text and "2/3" in text and "1/3" not in text
        assert text.rstrip("\r").rsplit("\r", 1)[-1].strip() == ""

    @pytest.mark.parametrize("how", [dict(progress=False), dict(seconds=0), dict(terminal=False)])
    def test_nothing(self, how): assert seen(**{"seconds": 0.0 if "seconds" in how else 2.2, **how}) == ""

    def test_a_notebook_without_ipywidgets(self):
        "tqdm would warn that there are none; text is drawn, and nothing warns"
        text = seen(kernel=A_KERNEL + "\nsys.modules['ipywidgets'] = None", terminal=False)
        assert "2/3" in text and "IProgress" not in text

    def test_without_tqdm(self): assert seen(kernel="sys.modules['tqdm'] = sys.modules['tqdm.auto'] = None", seconds=0) == ""


def test_it_costs_nothing(monkeypatch):
    "Where it is off, nothing is made or imported"
    monkeypatch.setattr(show, "_tqdm", lambda process: pytest.fail("a bar"))
    for progress in (True, False):
        with show.progress_bar(progress, 10**6, "load", "parts") as tick: assert tick(1) is None


def test_a_fork_while_another_thread_draws():
    "A child has bars of its own, with a lock of its own"
    bar = show._tqdm(os.getpid())
    with bar._lock:
        if not (pid := os.fork()):
            done = []
            def draws():
                with show._tqdm(os.getpid())(total=1, file=io.StringIO(), desc="load") as child: child.update(1)
                done.append(True)
            thread = threading.Thread(target=draws, daemon=True)
            thread.start(); thread.join(10)
            os._exit(0 if done else 1)
        assert os.waitpid(pid, 0)[1] == 0
