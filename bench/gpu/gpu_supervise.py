"""Runs programs with a time limit, and a benchmark that may hang or crash to its end.

A kernel that waits for ever cannot be stopped from within its process, and an illegal access spoils
the process for all that comes after it. So the benchmark says what it is at (``gpu_bench.py``);
when that takes too long, or the process ends in the middle of it, the step is noted as broken and
the benchmark is started again to go on without it.

Needs nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

RESTARTS = 8
HUNG = "did not end"
STOPPED = "time ran out"
_MARGIN = 5.0  # seconds beyond the deadline, for a benchmark that watches it itself
_POLL = 0.2


class Outcome(NamedTuple):
    """How a program ended: ``status`` is None where it was stopped."""

    status: int | None
    seconds: float
    output: str


@contextlib.contextmanager
def _started(
    command: Sequence[str],
    log: Path,
    env: Mapping[str, str],
    cwd: Path,
    show: bool,
    patience: float,
) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A program in a session of its own, so that all it starts can be ended with it.

    When it is to end, it is asked first, and has ``patience`` seconds to say what it has.
    """
    text: list[str] = []
    process = subprocess.Popen(
        list(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=dict(env),
        cwd=cwd,
        start_new_session=True,
    )
    assert process.stdout is not None
    with log.open("a") as file:
        reader = threading.Thread(target=_pass_on, args=(process.stdout, file, text, show))
        reader.start()
        try:
            yield process, text
        finally:
            _end(process, patience)
            reader.join(timeout=5)


def _pass_on(source: IO[str], file: IO[str], text: list[str], show: bool) -> None:
    with contextlib.suppress(ValueError):  # the file is closed: a stray child still writes
        for line in source:
            text.append(line)
            file.write(line)
            file.flush()
            if show:
                print(line, end="", flush=True)


def _end(process: subprocess.Popen[str], patience: float) -> None:
    if patience and process.poll() is None:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(patience)
    # Whatever it has started may still be there when it is not.
    with contextlib.suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def run(
    command: Sequence[str],
    log: Path,
    limit: float,
    env: Mapping[str, str],
    cwd: Path,
    *,
    show: bool = False,
) -> Outcome:
    """Runs ``command`` for at most ``limit`` seconds; its output is appended to ``log``."""
    begin = time.monotonic()
    with _started(command, log, env, cwd, show, 8.0) as (process, text):
        try:
            status: int | None = process.wait(max(limit, 0.1))
        except subprocess.TimeoutExpired:
            status = None
    return Outcome(status, time.monotonic() - begin, "".join(text))


def to_the_end(
    command: Sequence[str],
    work: Path,
    deadline: float,
    env: Mapping[str, str],
    cwd: Path,
    *,
    show: bool = False,
) -> tuple[str, list[list[str]]]:
    """Runs the benchmark ``command`` until it ends by itself or ``deadline`` (since 1970) passes.

    Returns:
        What became of it, "finished" if all went well, a text that begins with ``STOPPED`` if time
        ran out; and the broken steps: section, name, reason.
    """
    progress, noted = work / "progress.json", work / "broken.json"
    broken: list[list[str]] = []
    files = ["--progress", str(progress), "--broken", str(noted)]
    full = [*command, *files, "--deadline", str(deadline)]
    for _ in range(RESTARTS):
        progress.unlink(missing_ok=True)
        noted.write_text(json.dumps(broken))
        with _started(full, work / "benchmark.log", env, cwd, show, 0.0) as (process, _text):
            reason = _watch(process, progress, deadline)
        if reason == "finished":
            return reason, broken
        step = _step(progress)
        if step is None:
            return f"it did not start: {reason}", broken
        if time.time() > deadline:
            return (
                f"{STOPPED}, at {step[0]}: {step[1]}; what would have followed is missing",
                broken,
            )
        broken.append([*step, reason])
        if broken.count(broken[-1]) > 1:
            return f"given up: {step[0]}: {step[1]} twice {reason}", broken
    return f"given up after {RESTARTS} starts", broken


def _watch(process: subprocess.Popen[str], progress: Path, deadline: float) -> str:
    """Waits for the end of the process, of the patience with its step, or of all time."""
    while True:
        status = process.poll()
        if status is not None:
            return "finished" if status == 0 else f"ended the process ({_status_name(status)})"
        if time.time() > deadline + _MARGIN:
            return "was under way at the deadline"
        with contextlib.suppress(OSError, ValueError):
            limit = json.loads(progress.read_text())["limit"]
            if time.time() - progress.stat().st_mtime > limit:
                return f"{HUNG} within {limit:.0f} s"
        time.sleep(_POLL)


def _status_name(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"


def _step(progress: Path) -> list[str] | None:
    try:
        return list(json.loads(progress.read_text())["step"])
    except (OSError, ValueError):
        return None
