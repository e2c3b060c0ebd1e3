"""Attacks: what is done to the package a great many times, at random moments and places, and may not go wrong once.

A test hands `attack` a name, a number of trials and what one trial does. Trials are seeded by name and number, so each can be
repeated; SOAK=10 makes ten times as many, and ATTACK_SEED=… makes others. Every run ends with a table of its attacks.
"""
import os
import signal
import time
import traceback
import zlib

import numpy as np
import pytest
from coverage import Coverage

from browser import browser, site  # noqa: F401 (fixtures: one browser for every test of a session)

SOAK, SEED = float(os.environ.get("SOAK", 1)), int(os.environ.get("ATTACK_SEED", 0))
PATIENCE = 300  # seconds that a forked child may take at most; `timeout` in pytest.ini is what a test may


def end_in_time():
    "What a test forks is ended by the system if it hangs, instead of keeping its parent waiting for ever"
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(round(PATIENCE * max(1, SOAK)))


os.register_at_fork(after_in_child=end_in_time)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that puts the tests into the background has it ignored


@pytest.fixture(autouse=True)
def uncovered(request):
    "Coverage stands aside for attacks: an interrupt would leave its lock held, and then everything waits. In a worker it runs twice"
    stopped, attacked = [], request.path.name.startswith("test_attack_")
    while attacked and (coverage := Coverage.current()): coverage.stop(); stopped.append(coverage)
    yield
    for coverage in reversed(stopped): coverage.start()


@pytest.fixture
def attack(record_property):
    "`attack(name, trials, once)` calls `once(rng)` so many times, counts what goes wrong, and fails with the first of it"
    def run(name, trials, once):
        trials, wrong, began = max(1, round(trials * SOAK)), [], time.monotonic()
        for n in range(trials):
            try: once(np.random.default_rng([zlib.crc32(name.encode()), SEED, n]))
            except Exception: wrong.append((n, traceback.format_exc()))
        record_property("attack", (name, trials, len(wrong), round(time.monotonic() - began, 1)))
        if wrong: pytest.fail(f"{name}: {len(wrong)} of {trials} trials went wrong; number {wrong[0][0]} (ATTACK_SEED={SEED}):\n{wrong[0][1]}")
    return run


def pytest_terminal_summary(terminalreporter):
    "Each attack, its trials and failures"
    reports = [report for kind in ("passed", "failed") for report in terminalreporter.stats.get(kind, ()) if report.when == "call"]
    rows = sorted(value for report in reports for name, value in report.user_properties if name == "attack")
    if not rows: return
    terminalreporter.section("attacks")
    width = max(len(row[0]) for row in rows)
    for row in [("attack", "trials", "failures", "seconds"), *rows, ("all", *map(sum, zip(*(row[1:3] for row in rows))), "")]:
        terminalreporter.line(f"{row[0]:{width}} {row[1]:>8} {row[2]:>8} {row[3]:>8}")
