"""``python -m fastdeq study``: runs what is missing of a study, and writes its report."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pandas as pd
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from .data import mnist
from .jobs import Job, jobs_of, run_all
from .plan import Study, quick
from .report import summary, write_report
from .store import Store, machine

_LINES = 20  # of progress, where the output is no terminal
INTERRUPTED = 130  # what a shell calls an exit by Ctrl-C


def parser(defaults: Study) -> ArgumentParser:
    """Options for every setting of a study, nested ones as ``--images.epochs``."""
    options = ArgumentParser(
        prog="python -m fastdeq study",
        usage="python -m fastdeq study [options]",  # all of them would fill a screen
        description="The initialisation study: families and scales of weights, trained on real "
        "data. An interrupted study continues with the same command.",
        allow_abbrev=False,
    )
    options.add_argument("--config", action="config", help="settings from a file (YAML or JSON)")
    options.add_argument("--quick", action="store_true", help="a small study: within three minutes")
    options.add_argument("--out", type=str, default="study", help="folder of runs and report")
    options.add_argument("--jobs", type=int, default=-1, help="processes; -1: one for each core")
    options.add_argument(
        "--scheduler", type=str | None, default=None, help="address of a dask scheduler"
    )
    options.add_argument("--dry_run", action="store_true", help="say what would be run, and stop")
    options.add_class_arguments(Study, None)
    options.set_defaults(asdict(defaults))
    return options


def study_from(arguments: Sequence[str]) -> tuple[Study, Any]:
    """The study that a command line asks for, and the other options.

    Raises:
        SystemExit: with status 2, after a message about options that do not fit.
    """
    reader = parser(quick() if "--quick" in arguments else Study())
    given = reader.parse_args(list(arguments))
    if given.quick and "--quick" not in arguments:  # in a file
        reader = parser(quick())
        given = reader.parse_args(list(arguments))
    options = reader.instantiate(given)
    if options.jobs == 0:
        reader.error("--jobs must be a number of processes, or -1: one for each core.")
    try:
        study = Study(**{f.name: getattr(options, f.name) for f in fields(Study)})
    except ValueError as error:
        reader.error(str(error))
    return study, options


def perform(
    study: Study,
    out: str | Path,
    *,
    jobs: int = -1,
    scheduler: str | None = None,
    console: Console | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Runs what is missing of a study in the folder ``out``, each finished run being written at
    once, and its tables.

    Args:
        study: the settings.
        out: folder; runs that it holds already are not repeated, those that failed are.
        jobs: processes, -1: one for each core.
        scheduler: address of a dask scheduler that is to run them instead.
        console: for progress; None: the standard error.

    Returns:
        The tables of training runs and of statistics at initialisation, in the study's order.

    Raises:
        OSError: the folder cannot be written to, a file of MNIST is not there, or no scheduler
            answers at the address. ValueError: as for :func:`fastdeq.study.mnist`. ImportError: a
            scheduler without dask.
    """
    store = Store(out)
    requested = jobs_of(study)
    if "mnist" in study.tasks and study.mnist is not None:
        store.check_data("mnist", mnist(study.mnist).fingerprint)  # says what is missing now
    missing = [job for job in requested if not store.has(job.part, job.key)]
    console = console or Console(stderr=True)
    kept = len(requested) - len(missing)
    if kept:
        console.print(f"{kept} of {len(requested)} runs are there already")
    with _Shown(len(missing), console) as shown:
        for job, row in run_all(missing, jobs, scheduler):
            store.put(job.part, job.key, row)
            shown.advance(job)
    tables = [
        store.table(part, [job.key for job in requested if job.part == part])
        for part in ("runs", "initial")
    ]
    store.write_tables(asdict(study), *tables)
    return tables[0], tables[1]


class _Shown:
    """A progress bar with an estimate; where the console is no terminal, a line now and then."""

    def __init__(self, total: int, console: Console):
        self.total, self.console, self.count = total, console, 0
        self.begin = time.perf_counter()
        self.bar = Progress(
            TextColumn("{task.description:34}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            # The mean rate over so many seconds: runs differ much in length.
            speed_estimate_period=300,
        )
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> _Shown:
        self.bar.__enter__()
        return self

    def __exit__(self, *what: Any) -> None:
        self.bar.__exit__(*what)

    def advance(self, job: Job) -> None:
        self.count += 1
        what = job.what
        name = getattr(what, "task", "initial")
        self.bar.update(
            self.task, advance=1, description=f"{name}, {what.weight}, scale {what.scale:g}"
        )
        step = max(self.total // _LINES, 1)
        if not self.console.is_terminal and (self.count % step == 0 or self.count == self.total):
            elapsed = time.perf_counter() - self.begin
            left = elapsed / self.count * (self.total - self.count)
            self.console.print(
                f"{self.count} of {self.total} runs, {elapsed:.0f} s, about {left:.0f} s left"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, 1 after an error that it names, or 130."""
    arguments = sys.argv[1:] if arguments is None else arguments
    study, options = study_from(arguments)
    console = Console(markup=False)  # paths and errors may hold brackets
    requested = jobs_of(study)
    training = sum(job.part == "runs" for job in requested)
    console.print(
        f"{training} training runs and {len(requested) - training} sets of draws, in {options.out}"
    )
    if options.dry_run:
        return 0
    try:
        _run(study, options, arguments, console)
    except KeyboardInterrupt:
        kept = Store(options.out)
        done = sum(kept.has(job.part, job.key) for job in requested)
        console.print(
            f"Interrupted: {done} of {len(requested)} runs are kept in {options.out}; the same "
            "command continues."
        )
        return INTERRUPTED
    except (OSError, ValueError, ImportError, BrokenExecutor) as error:
        Console(stderr=True, markup=False).print(_explained(error, options), soft_wrap=True)
        return 1
    return 0


def _run(study: Study, options: Any, arguments: Sequence[str], console: Console) -> None:
    begin = time.perf_counter()
    tables = perform(
        study, options.out, jobs=options.jobs, scheduler=options.scheduler, console=console
    )
    for part, table in zip(("training", "initial"), tables, strict=True):
        failed = int((table["error"] != "").sum()) if len(table) else 0
        if failed:
            console.print(f"{failed} {part} runs ended with an exception: column error")
    console.print(f"Runs done in {time.perf_counter() - begin:.0f} s.")
    settings = {**asdict(study), "command": f"python -m fastdeq study {shlex.join(arguments)}"}
    if len(tables[0]):
        console.print(summary(tables[0]))
    page = write_report(*tables, settings, machine(), Path(options.out))
    console.print(f"Report: {page}", soft_wrap=True)


def _explained(error: Exception, options: Any) -> str:
    """What happened and what helps, instead of a traceback."""
    lines = [f"python -m fastdeq study: {type(error).__name__}: {error}"]
    if isinstance(error, BrokenExecutor):
        lines.append("A process was ended from outside, often for want of memory: fewer --jobs.")
    elif options.scheduler is not None:
        lines.append(f"Is there a dask scheduler at {options.scheduler}?")
    lines.append("Finished runs are kept; the same command continues.")
    return "\n".join(lines)
