"""Ctrl-C ends a solve of the CPU engine, however long it is; the next solve is right."""

import os
import subprocess
import sys

import pytest
from paths import CASES

from fastdeq.backends import extension

pytestmark = [
    pytest.mark.skipif(
        extension.module is None, reason=f"no compiled extension: {extension.why_missing}"
    ),
    pytest.mark.skipif(os.name != "posix", reason="signals are sent to a process"),
]
LIMIT = 20.0  # seconds; uninterrupted, each of these solves takes minutes


def run(*arguments):
    done = subprocess.run(
        [sys.executable, str(CASES / "engine_interrupt.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("direction", "size", "batch"),
    [
        ("forward", 48, 100),
        ("backward", 1100, 1),  # two threads share each product
        ("one left", 32, 64),  # all samples but one are done: that may be another thread's
    ],
)
def test_a_signal_ends_a_solve(threads, direction, size, batch):
    outcome, seconds, recovered = run("raise", threads, direction, size, batch)
    assert outcome == "KeyboardInterrupt"
    assert float(seconds) < LIMIT
    assert recovered == "True"


def test_a_handler_that_does_not_raise_may_solve_itself():
    outcome, calls, same = run("solve", 2, "forward", 48, 100)
    assert outcome == "finished"
    assert int(calls) >= 1
    assert same == "True"


def test_another_thread_solves_on():
    outcome, _, same = run("thread", 1, "forward", 48, 100)
    assert (outcome, same) == ("finished", "True")
