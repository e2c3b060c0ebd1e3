"""The command `data-io`, in processes of its own: what it prints and where, its exit codes, what it leaves alone.

Most processes are forks, which share the second that importing takes; a few are started as a shell starts them."""
import configparser
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from io import StringIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("deltalake")
from data_io_nbdev import Episode, Field, MemoryPool, Schema, open_pool
from data_io_nbdev import cli
from data_io_nbdev.cli import COMMANDS, main
from data_io_nbdev.errors import CorruptData
from data_io_nbdev.storage.pool.columns import part_of
from data_io_nbdev.testing import HARNESSES, drive, facts_of

ROOT = Path(__file__).parent.parent
DRIVES = [drive(8, hour=8, driver="bo"), drive(6, hour=9), drive(6, hour=33, vehicle="VB8")]
COMMAND = [sys.executable, "-m", "data_io_nbdev.cli"]


def started(*words, stdin=None):
    "The id of a process that runs the command, and the ends of what it writes to"
    (out, to_out), (err, to_err) = os.pipe(), os.pipe()
    if pid := os.fork():
        os.close(to_out); os.close(to_err)
        return pid, out, err
    code = 99
    try:
        end = os.open(os.devnull, os.O_RDONLY) if stdin is None else stdin
        for there, number in ((end, 0), (to_out, 1), (to_err, 2)): os.dup2(there, number)
        os.close(out); os.close(err)  # so that a reader that goes away is noticed
        sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), open(1, "w", closefd=False), open(2, "w", closefd=False)
        code = main([str(word) for word in words])
        sys.stdout.flush(); sys.stderr.flush()
    finally: os._exit(code)


def ended(pid, out, err):
    "Exit code, stdout and stderr of such a process; it writes less than a pipe holds to stderr"
    with open(out) as o, open(err) as e: said = o.read(), e.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), *said


def run(*words, stdin=None): return ended(*started(*words, stdin=stdin))


def fine(*words):
    "What a command prints that goes well"
    code, out, err = run(*words)
    assert code == 0, (out, err)
    return out


def refused(*words, code=2, stdin=None):
    "The one line with which a command refuses"
    found, out, err = run(*words, stdin=stdin)
    assert found == code and err.startswith("data-io") and err.endswith("\n") and err.count("\n") == 1, (found, out, err)
    return err


def files(folder): return {str(path): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture(params=["lake", "week.npz"])
def pool(request, tmp_path):
    with open_pool(tmp_path / request.param) as pool: pool.extend(DRIVES)
    return tmp_path / request.param


class TestReading:
    def test_every_question(self, pool):
        "info, ls, show, history and verify answer, and leave everything as it was"
        before, kind = files(pool.parent), "DaskPool" if pool.name == "lake" else "MemoryPool"
        about = json.loads(fine("info", pool, "--json"))
        assert (about["kind"], about["episodes"], about["steps"]) == (kind, 3, 20)
        assert (about["first day"], about["last day"]) == ("2026-01-01", "2026-01-02") and Schema.from_json(json.dumps(about["schema"])) == DRIVES[0].schema
        assert re.search(r"velocity +float32 +\(2,\) +m/s", fine("info", pool))
        table = fine("ls", pool)
        assert all(e.id[:8] in table and e.id not in table for e in DRIVES)
        shown = fine("show", pool, DRIVES[1].id[:8], "-n", 2)
        assert DRIVES[1].id in shown and "anna" in shown and shown.count("2026-01-01 09:00:0") == 4
        whole = pd.read_csv(StringIO(fine("show", pool, DRIVES[0].id, "--csv")))
        assert len(whole) == 8 and np.array_equal(whole.velocity_1.astype("float32"), DRIVES[0].fields("state")["velocity"][:, 1])
        [row] = json.loads(fine("history", pool, "--json"))
        assert (row["version"], row["new_episodes"], row["steps"], row["time"] is None) == (1, 3, 20, kind == "MemoryPool")
        assert "sound: 3 episodes" in fine("verify", pool)
        assert files(pool.parent) == before

    def test_filters(self, pool):
        "By whom and when, the last so many, as CSV and JSON"
        def asked(*words): return list(pd.read_csv(StringIO(fine("ls", pool, "--csv", *words))).id)
        bo, anna, late = (e.id for e in DRIVES)
        assert asked() == [bo, anna, late] and asked("-n", 1) == [late] and asked("-n", 0) == []
        assert asked("--where", "driver=anna") == [anna, late] and asked("--where", "driver=anna", "--where", "driver=bo") == [bo, anna, late]
        assert asked("--where", "driver=anna", "--where", "vehicle=VB7") == [anna]
        assert asked("--since", "2026-01-02") == [late] and asked("--until", "2026-01-01T10:00+01:00") == [bo]
        assert [row["id"] for row in json.loads(fine("ls", pool, "--json"))] == [bo, anna, late]
        assert fine("ls", pool, "--where", "driver=eve") == "no episodes\n"

    def test_whole_numbers(self, tmp_path):
        "A level of whole numbers is asked by numbers"
        with MemoryPool(tmp_path / "cells.npz") as pool:
            pool.extend([Episode.from_arrays(state=[1.0], action=[0.0], reward=[0.0], nstate=[2.0], who={"cell": n}, timestamp=["2026-01-01T00:00Z"])
                         for n in (4, 40)])
        assert fine("ls", tmp_path / "cells.npz", "--where", "cell=4", "--csv").count("\n") == 2
        assert "cell" in refused("ls", tmp_path / "cells.npz", "--where", "cell=four")

    def test_installation(self):
        "Without a pool, what is installed, in a process that a shell starts"
        done = subprocess.run([*COMMAND, "info"], capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr and re.search(r"^pandas +\d", done.stdout, re.M)

    def test_missing_extras(self, monkeypatch, capsys):
        "An extra that lacks something says how to install it"
        needs = ['dask>=2025.1; extra == "dask"', 'deltalake>=1.1; extra == "dask"', 'pytest; extra == "test"', "numpy>=1.24"]
        monkeypatch.setattr(cli.metadata, "requires", lambda name: needs)
        monkeypatch.setattr(cli, "_installed", lambda name: None if name == "deltalake" else "2.0")
        assert main(["info"]) == 0
        out = capsys.readouterr().out
        assert "missing deltalake: pip install 'data_io_nbdev[dask]'" in out and "pytest" not in out


class TestMoving:
    def test_copy(self, pool, tmp_path):
        "To a file and to a lake; what is made is told, and a second time nothing changes"
        for to in (tmp_path / "copy.npz", tmp_path / "copy"):
            code, out, err = run("copy", pool, to, "--where", "driver=anna")
            assert code == 0 and "2 episodes, 12 steps" in out and err == f"data-io: {to} is a new pool\n"
            code, out, err = run("copy", pool, to)
            assert code == 0 and "3 episodes, 20 steps" in out and not err
            with open_pool(to, "r") as copy:
                assert facts_of(copy) == facts_of(DRIVES) and copy.version == 2
        assert "no episode" in refused("copy", pool, tmp_path / "none", "--where", "driver=eve") and not (tmp_path / "none").exists()

    @pytest.mark.parametrize("name", ["out.csv", "out.parquet"])
    def test_table_and_back(self, pool, tmp_path, name, monkeypatch):
        "The episodes come back bit for bit, in several portions as in one; nothing is replaced unasked"
        monkeypatch.setattr(cli, "_PORTION", 1)
        table, layout = tmp_path / name, tmp_path / "out.layout.json"
        assert "3 episodes, 20 steps" in fine("export", pool, table) and "--overwrite" in refused("export", pool, table)
        fine("export", pool, table, "--overwrite")
        fine("import", table, tmp_path / "back.npz", "--layout", layout)
        fine("import", table, tmp_path / "back.npz", "--layout", layout)
        with MemoryPool(tmp_path / "back.npz", "r") as back:
            assert facts_of(back) == facts_of(DRIVES) and back.version == 3 and back.schema == DRIVES[0].schema

    def test_odd_fields(self, tmp_path):
        "Names that clash, axes, missing values, whole numbers and flags: the values come back, of axes one"
        schema = Schema([Field("state", "time", (2, 2), "float64"), Field("state", "x"), Field("action", "x", (), "int8"), Field("action", "on", (), "bool"),
                         Field("reward", "a"), Field("reward", "b"), Field("info", "next_x", (1,), "int64")], identity={"x": "text", "episode": "integer"})
        rng = np.random.default_rng(0)
        values = dict(state={"time": rng.normal(size=(5, 2, 2)), "x": [1, np.nan, 3, 4, np.nan]}, action={"x": [*range(5)], "on": [True, False] * 2 + [True]},
                      reward={"a": rng.normal(size=5).astype("float32"), "b": [0] * 5}, info={"next_x": [[2**60]] * 5}, nstate={"time": rng.normal(size=(5, 2, 2)), "x": [7] * 5})
        with MemoryPool(tmp_path / "odd.npz") as pool:
            odd = pool[pool.store(Episode.from_arrays(**values, schema=schema, who={"x": "007", "episode": 3}, truncated=[False] * 4 + [True],
                                                      timestamp=pd.date_range("2026-01-01", periods=5, freq="123456us", tz="Europe/Berlin")))]
        for name in ("odd.csv", "odd.parquet"):
            fine("export", tmp_path / "odd.npz", tmp_path / name, "--overwrite")
            fine("import", tmp_path / name, tmp_path / f"{name}.npz", "--layout", tmp_path / "odd.layout.json")
            [back] = MemoryPool(tmp_path / f"{name}.npz", "r")
            assert back.id == odd.id and back.who == odd.who and np.array_equal(back.times, odd.times) and back.truncated[-1]
            for role in ("state", "action", "reward", "info", "nstate"):
                for field, there in odd.fields(role).items():
                    np.testing.assert_array_equal(back.fields(role)[field].reshape(there.shape), there, strict=True)

    def test_minari(self, pool, tmp_path, monkeypatch):
        "To a Minari dataset and back"
        pytest.importorskip("minari")
        monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
        code, out, _ = run("export", pool, "minari:drives/all-v0")
        assert code == 0 and "3 episodes" in out
        assert run("import", "minari:drives/all-v0", tmp_path / "back.npz")[0] == 0
        with MemoryPool(tmp_path / "back.npz", "r") as back: assert facts_of(back) == facts_of(DRIVES)

    def test_guess(self, tmp_path):
        "Without a layout nothing is stored, and the guess that is printed can be used"
        pd.DataFrame({"ts": ["2026-01-01 08:00Z", "2026-01-01 08:01Z", "2026-01-01 08:02Z"], "vehicle": "VB7", "speed": [3.5, 4, 4], "torque": [1.0, 0, 0],
                      "reward": [0.0, -1, -2]}).to_csv(tmp_path / "trips.csv", index=False)
        code, out, err = run("import", tmp_path / "trips.csv", tmp_path / "trips")
        assert code == 0 and "--layout layout.json" in err and not (tmp_path / "trips").exists()
        (tmp_path / "layout.json").write_text(out)
        assert "1 episode, 2 steps" in fine("import", tmp_path / "trips.csv", tmp_path / "trips", "--layout", tmp_path / "layout.json")


class TestTidying:
    def test_damage(self, pool):
        "A damaged part is listed, or the file that holds it is named: exit code 1"
        path = next(pool.glob("*.parquet")) if pool.is_dir() else pool
        content = bytearray(path.read_bytes())
        content[300] ^= 1
        path.write_bytes(content)
        code, out, err = run("verify", pool)
        assert code == 1 and (DRIVES[0].id in out if pool.is_dir() else "damaged" in err) and "Traceback" not in err

    def test_repair(self, pool):
        "What a killed writer left is shown, kept by a dry run and by a refusal, and removed with --yes"
        if pool.is_dir():
            left = pool / f"{'ab' * 16}-0.parquet"
            open_pool(pool)._write("ab" * 16, [(part_of(drive(hour=50)), drive(hour=50))], DRIVES[0].schema)
        else:
            left = pool.with_name(f".{pool.name}.{'ab' * 8}")
            left.write_bytes(pool.read_bytes())
        os.utime(left, (time.time() - 10**6,) * 2)
        before = files(pool.parent)
        assert left.name in fine("repair", pool, "--dry-run") and "--yes" in refused("repair", pool)
        assert left.name in fine("repair", pool, "--dry-run", "--yes") and files(pool.parent) == before
        fine("repair", pool, "--yes")
        assert files(pool.parent).keys() == before.keys() - {str(left)} and fine("repair", pool) == "nothing to remove\n"

    @pytest.mark.parametrize("words", [[DRIVES[1].id, DRIVES[2].id[:8]], ["--where", "driver=anna"], ["--since", "2026-01-01T09:00Z"]])
    def test_delete(self, pool, words):
        "By ids or by filters: listed first, kept by a dry run and by a refusal, and gone with --yes from the next version on"
        before = files(pool.parent)
        for more in (["--dry-run"], ["--dry-run", "--yes"]):
            listed = fine("delete", pool, *more, *words)
            assert "nothing was deleted, 2 episodes, 12 steps would be" in listed and DRIVES[0].id[:8] not in listed and all(e.id[:8] in listed for e in DRIVES[1:])
        code, out, err = run("delete", pool, *words)
        assert code == 2 and DRIVES[1].id[:8] in out and "--yes" in err and files(pool.parent) == before
        done = fine("delete", pool, words[0], "--yes", *words[1:]) if words[0] == DRIVES[1].id else fine("delete", pool, *words, "--yes")
        assert "deleted 2 episodes, 12 steps; version 2 is the newest" in done and ("vacuum" in done) == pool.is_dir()
        with open_pool(pool, "r") as left: assert facts_of(left) == facts_of(DRIVES[:1]) and left.version == 2 and len(left.snapshot(1)) == 3

    @pytest.mark.parametrize("make", [lambda p: p.write_text("a,b\n1,2\n"), lambda p: np.savez(p.open("wb"), state=[1.0]), lambda p: p.mkdir() or (p / "x.txt").write_text("x")],
                             ids=["text", "arrays", "folder"])
    def test_no_pool(self, tmp_path, make):
        "What is no pool is a mistake, and not damage"
        make(tmp_path / "other")
        before = files(tmp_path)
        for words in (["verify"], ["ls"], ["delete", "--yes", "--where", "driver=bo"]): assert "no pool" in refused(*words, tmp_path / "other")
        assert files(tmp_path) == before

    @pytest.mark.parametrize("cut", [0, 1, 2, 300, -1], ids=["nothing", "a byte", "two", "some", "all but one"])
    def test_a_file_that_was_cut(self, tmp_path, cut):
        "A saved pool that lost its end, or all but its length, is damaged: exit code 1"
        with MemoryPool(tmp_path / "week.npz") as pool: pool.extend(DRIVES)
        content = (tmp_path / "week.npz").read_bytes()
        for left in (content[:cut], bytes(len(content))):
            (tmp_path / "week.npz").write_bytes(left)
            assert "damaged" in refused("verify", tmp_path / "week.npz", code=1)

    def test_compact_and_vacuum(self, tmp_path):
        "A lake is compacted, and gives up versions; a dry run and a refusal change nothing"
        lake = tmp_path / "lake"
        with open_pool(lake) as pool:
            for e in DRIVES: pool.store(e)
        assert "rewrote 3 files" in fine("compact", lake) and "nothing to compact" in fine("compact", lake)
        before = files(lake)
        assert fine("vacuum", lake, "--older-than", "0s", "--dry-run").count("not needed") == 3
        assert "--yes" in refused("vacuum", lake, "--older-than", "0s") and files(lake) == before
        assert fine("vacuum", lake, "--older-than", "365D", "--yes") == "nothing to remove\n" and files(lake) == before
        assert "removed 3" in fine("vacuum", lake, "--older-than", "0s", "--yes") and len(list(lake.glob("*.parquet"))) == 1
        assert "sound" in fine("verify", lake) and "older" in refused("vacuum", lake, "--older-than", "soon")

    def test_only_lakes(self, tmp_path):
        "Other pools have no files to merge"
        with MemoryPool(tmp_path / "week.npz") as pool: pool.store(DRIVES[0])
        for words in (["compact"], ["vacuum", "--older-than", "1D"]): assert "for lakes" in refused(*words, tmp_path / "week.npz")

    @pytest.mark.parametrize("answer, removed", [("y\n", True), ("n\n", False), ("\n", False)])
    def test_a_question(self, tmp_path, answer, removed):
        "On a terminal it asks, and only a yes removes"
        with MemoryPool(tmp_path / "week.npz") as pool: pool.store(DRIVES[0])
        left = tmp_path / f".week.npz.{'ab' * 8}"
        left.write_bytes((tmp_path / "week.npz").read_bytes())
        os.utime(left, (time.time() - 10**6,) * 2)
        ours, terminal = pty.openpty()
        os.write(ours, answer.encode())
        code, out, err = run("repair", tmp_path / "week.npz", stdin=terminal)
        os.close(ours); os.close(terminal)
        assert code == 0 and "remove 1? [y/N]" in err and left.exists() != removed and ("nothing was removed" in out) != removed


class TestPlot:
    @pytest.mark.parametrize("words", [["coverage"], ["coverage", "--by", "vehicle", "--by", "driver"], ["returns", "--over", "return", "--by", "vehicle"], ["fields", "-n", 2, "--since", "2026-01-02"],
                                       ["signals", DRIVES[1].id[:8], "--field", "velocity"], ["health", "--range", "velocity=0:60", "--by", "vehicle"], ["health", DRIVES[0].id]])
    def test_every_picture(self, tmp_path, monkeypatch, words):
        "A file is made, which is named, and no window is opened; what was there before is not written over"
        pytest.importorskip("matplotlib")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("matplotlib.pyplot.figure", lambda *args, **named: pytest.fail("a window"))
        with MemoryPool("week.npz") as pool: pool.extend(DRIVES)
        for name in (f"week-{words[0]}.png", f"week-{words[0]}-1.png"):
            assert fine("plot", "week.npz", *words) == f"{name}\n" and Path(name).read_bytes().startswith(b"\x89PNG")
        assert fine("plot", "week.npz", *words, "--out", "my.svg") == "my.svg\n" and "<svg" in Path("my.svg").read_text(encoding="utf-8")
        assert "my.svg is there already" in refused("plot", "week.npz", *words, "--out", "my.svg")
        assert fine("plot", "week.npz", *words, "--out", "my.svg", "--overwrite") == "my.svg\n"

    def test_names(self, tmp_path, monkeypatch):
        "A name that is chosen stands for the pool, and shows no password"
        monkeypatch.chdir(tmp_path)
        def chosen(url): return str(cli._picture(cli._parser().parse_args(["plot", url, "coverage"])))
        assert chosen(".") == f"{tmp_path.name}-coverage.png" and chosen("a/lake/") == "lake-coverage.png" and chosen("s3://bucket/fleet") == "fleet-coverage.png"
        assert chosen("mongodb://eve:s3cr3t@host/db.trips?authSource=x") == "db.trips-coverage.png" and "s3cr3t" not in chosen("mongodb://eve:s3cr3t@host")

    def test_without_matplotlib(self, tmp_path, monkeypatch, capfd):
        "One line, which says what to install"
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        with MemoryPool(tmp_path / "week.npz") as pool: pool.store(DRIVES[0])
        assert main(["plot", str(tmp_path / "week.npz"), "coverage"]) == 2
        assert capfd.readouterr().err == "data-io: matplotlib.figure is not installed; this needs: pip install 'data_io_nbdev[viz]'\n"


class TestMistakes:
    @pytest.mark.parametrize("words, said", [
        ([], "required"), (["list", "x"], "there are 'info'|there are info"), (["ls"], "POOL"), (["ls", "{}/none"], "no pool at"), (["ls", "{}/none.npz"], "no pool at"),
        (["verify", "{}/none"], "no pool at"), (["delete", "{}/none", "0" * 8], "no pool at"), (["repair", "{}/none", "--yes"], "no pool at"), (["compact", "{}/none"], "no pool at"),
        (["export", "{}/none", "out.csv"], "no pool at"), (["history", "{}/none"], "no pool at"), (["ls", "{}/week.npz", "--where", "driver"], "LEVEL=VALUE"),
        (["ls", "{}/week.npz", "--where", "colour=red"], "no identity level"), (["ls", "{}/week.npz", "--since", "soon"], "--since"), (["ls", "{}/week.npz", "-n", "-1"], "-n"),
        (["ls", "{}/week.npz", "-n", "x"], "invalid int"), (["show", "{}/week.npz", "0" * 32], "no episode .0*.; data-io ls"), (["show", "{}/week.npz", "bb8"], "no episode .bb8.; expected an id, or its first 8 digits"),
        (["delete", "{}/week.npz"], "IDs or filters, got neither"), (["delete", "{}/week.npz", "0" * 8, "--where", "driver=bo"], "got both"), (["delete", "{}/week.npz", "bb8", "--yes"], "first 8 digits"),
        (["delete", "{}/week.npz", "0" * 8, "--yes"], "no episode"), (["delete", "{}/week.npz", "--where", "driver=eve", "--yes"], "no episode of .* matches"),
        (["ls", "{}/week.npz", "0" * 8], "unrecognized"), (["delete", "{}/week.npz", "0" * 8, "--not"], "unrecognized"), (["plot", "{}/week.npz", "coverage", "bb8"], "first 8 digits"), (["export", "{}/week.npz", "out.xls"], "out.csv"),
        (["import", "{}/none.csv", "{}/new"], "No such file"), (["import", "{}/none.csv", "{}/new", "--layout", "{}/none.json"], "No such file"),
        (["import", "{}/week.npz", "{}/new", "--layout", "{}/week.npz"], "."), (["ls", "ftp://host/x"], "no back-end"), (["completion", "fish"], "fish"),
        (["plot", "{}/week.npz", "pie"], "coverage"), (["plot", "{}/week.npz", "signals"], "needs its ID"), (["plot", "{}/week.npz", "signals", "0" * 8], "no episode"),
        (["plot", "{}/week.npz", "coverage", "0" * 8], "no episode .0"), (["plot", "{}/week.npz", "fields", "0" * 8, "--where", "driver=bo"], "ID or filters"), (["plot", "{}/week.npz", "coverage", "--by", "colour"], "there are"),
        (["plot", "{}/week.npz", "fields", "--over", "time"], "--over is not for fields, but for returns"), (["plot", "{}/week.npz", "health", "--range", "speed"], "speed=0:60"),
        (["plot", "{}/week.npz", "coverage", "--out", "{}/x.doc"], "picture.svg"), (["plot", "{}/week.npz", "coverage", "--out", "{}/week.npz"], "--overwrite"), (["plot", "{}/none", "coverage"], "no pool at"),
        (["plot", "{}/week.npz", "coverage", "--where", "driver=eve"], "no episode matches"), (["plot", "{}/week.npz", "fields", "-n", "-1"], "n: ")])
    def test_one_line(self, tmp_path, capfd, words, said):
        "Exit code 2, one line, no traceback, and nothing is made"
        with MemoryPool(tmp_path / "week.npz") as pool: pool.store(DRIVES[0])
        before = files(tmp_path)
        assert main([word.format(tmp_path) for word in words]) == 2
        out, err = capfd.readouterr()
        assert not out and err.startswith("data-io") and err.count("\n") == 1 and re.search(said, err) and "Traceback" not in err
        assert files(tmp_path) == before and len(list(tmp_path.iterdir())) == 1

    @pytest.mark.parametrize("url", ["mongodb://eve:s3cr3t@host:port/db", "mongodb://eve:s3cr3t@host/db@x", "ftp://eve:s3cr3t@host/x", "eve:s3cr3t@host/db",
                                     "s3://key:s3cr3t@bucket/x?secret=s3cr3t"])
    def test_no_password_is_shown(self, tmp_path, url, capfd):
        "Wherever a URL stands"
        with MemoryPool(tmp_path / "week.npz") as pool: pool.store(DRIVES[0])
        week = str(tmp_path / "week.npz")
        for words in ([url], ["ls", week, url], ["ls", week, "--where", url], ["ls", week, "--since", url],
                      ["ls", week, "-n", url], ["show", week, url], ["export", week, url], [f"--{url}"], ["completion", url]):
            assert main(words) == 2, words
            out, err = capfd.readouterr()
            assert "s3cr3t" not in out + err and err.count("\n") == 1

    def test_bugs(self, monkeypatch, capsys):
        "What no one foresaw is one line as well, and --debug raises it; what is damaged is exit code 1"
        def fails(error):
            def run(args): raise error
            monkeypatch.setitem(COMMANDS, "verify", COMMANDS["verify"]._replace(run=run))
        fails(ValueError("no place\nfor eve:s3cr3t"))
        assert main(["verify", "mongodb://eve:s3cr3t@host/db"]) == 2
        err = capsys.readouterr().err
        assert "ValueError" in err and "s3cr3t" not in err and err.count("\n") == 1
        with pytest.raises(ValueError): main(["verify", "x", "--debug"])
        with pytest.raises(ValueError): main(["--debug", "verify", "x"])
        fails(CorruptData("commit 3 is damaged"))
        assert main(["verify", "x"]) == 1 and capsys.readouterr().err == "data-io: commit 3 is damaged\n"

    def test_warnings(self, monkeypatch, capsys):
        "A warning is one line, too"
        import warnings
        monkeypatch.setitem(COMMANDS, "verify", COMMANDS["verify"]._replace(run=lambda args: warnings.warn("a gap\nof a day")))
        assert main(["verify", "x"]) == 0 and capsys.readouterr().err == "data-io: a gap of a day\n"


class TestShells:
    def test_ctrl_c(self, monkeypatch, tmp_path):
        "Exit code 130, and one line"
        def waits(args):
            (tmp_path / "begun").touch()
            time.sleep(60)
        monkeypatch.setitem(COMMANDS, "verify", COMMANDS["verify"]._replace(run=waits))
        pid, out, err = started("verify", "x")
        while not (tmp_path / "begun").exists(): time.sleep(0.01)
        os.kill(pid, signal.SIGINT)
        assert ended(pid, out, err) == (130, "", "data-io: interrupted\n")

    def test_a_reader_that_has_enough(self, tmp_path):
        "`| head -1` is no error, and says nothing"
        with MemoryPool(tmp_path / "long.npz") as pool:
            n = 4000
            id = pool.store(Episode.from_arrays(state=np.arange(n) / 7, action=np.zeros(n), reward=np.zeros(n), nstate=np.ones(n), who={"car": "a"},
                                                timestamp=pd.date_range("2026-01-01", periods=n, freq="1s", tz="UTC")))
        line = f"{' '.join(COMMAND)} show {tmp_path}/long.npz {id} --csv | head -1; echo ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
        assert done.stdout.startswith("time,") and done.stdout.endswith("\n0\n") and not done.stderr

    def test_completion(self, tmp_path):
        "bash takes the script, and completes commands, options and words; where nothing is offered, names of files"
        script = tmp_path / "completion.sh"
        script.write_text(fine("completion", "bash"))
        subprocess.run(["bash", "-n", script], check=True)
        def offered(*words):
            typed = " ".join(f"'{word}'" for word in words)
            line = f"source {script}; COMP_WORDS=(data-io {typed}); COMP_CWORD={len(words)}; _data_io; echo ${{COMPREPLY[@]}}"
            return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.split()
        assert offered("") == list(COMMANDS) and offered("ve") == ["verify"] and offered("--v") == ["--version"]
        assert offered("ls", "lake", "--s") == ["--since"] and offered("completion", "") == ["bash", "zsh"] and offered("ls", "") == []
        assert offered("plot", "") == [] and offered("plot", "lake", "") == list(cli._PLOTS) and offered("plot", "lake", "h") == ["health"] and offered("plot", "--o") == ["--out", "--over", "--overwrite"]
        assert "complete -o bashdefault -o default -F _data_io data-io" in script.read_text()

    def test_completion_for_zsh(self):
        "Every command and its options are in the script for zsh, and its quotes are closed"
        script = fine("completion", "zsh")
        assert script.startswith("#compdef data-io") and script.count("'") % 2 == 0
        for name, command in COMMANDS.items():
            [case] = re.findall(rf"^ +{name}\) (.*) ;;$", script, re.M)
            assert f"'{name}:" in script and all(f"'{option}[" in case for names, _ in command.arguments for option in names if option.startswith("-"))

    def test_the_page(self):
        "Its table says something of every command, with a line that can be typed"
        page = json.loads((ROOT / "nbs" / "cli.ipynb").read_text(encoding="utf-8"))
        told = dict(re.findall(r"^\| `(\w+)` \| .* \| `(.*)` \|$", "".join(line for c in page["cells"][:4] for line in (*c["source"], "\n")), re.M))
        assert set(told) == set(COMMANDS)
        for name, line in told.items(): assert cli._parsed(line.removeprefix('eval "$(').removesuffix(')"').split()[1:]).command == name

    def test_the_script(self):
        "What pip installs leads to `main`"
        settings = configparser.ConfigParser(delimiters=["="])
        settings.read(ROOT / "settings.ini")
        name, target = settings["DEFAULT"]["console_scripts"].split("=", 1)
        module, function = target.split(":")
        assert name == "data-io" and getattr(import_module(module), function) is main

    def test_help(self, capsys):
        "Every command has help, and says what its arguments are"
        for name in COMMANDS:
            assert main([name, "--help"]) == 0 and COMMANDS[name].help in " ".join(capsys.readouterr().out.split())
        assert re.fullmatch(r"\d+\.\d+.*\n", fine("--version"))

    def test_demo(self, monkeypatch, capsys):
        "demo hands its options on"
        given = []
        monkeypatch.setattr(import_module("data_io_nbdev.demo"), "main", given.append)
        assert main(["demo", "--store", "here", "--episodes", "3"]) == 0 and given == [["--store", "here", "--episodes", "3"]]


def test_a_database(tmp_path, capsys):
    "The same commands on a database"
    pool = HARNESSES["mongodb"](tmp_path).open()
    pool.extend(DRIVES)
    for words in (["info"], ["ls"], ["show", DRIVES[0].id[:8]], ["history"], ["verify"], ["repair"]):
        assert main([words[0], pool.url, *words[1:]]) == 0
    assert main(["copy", pool.url, str(tmp_path / "copy.npz")]) == 0 and main(["compact", pool.url]) == 2
    capsys.readouterr()
    assert main(["history", pool.url, "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["new_episodes"] == 3 and row["time"]
