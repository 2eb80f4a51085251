"""``python -m fastdeq study``: runs what is missing of a study, and writes its report."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
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
    made = ArgumentParser(
        prog="python -m fastdeq study",
        description="The initialisation study: families and scales of weights, trained on real "
        "data. An interrupted study continues with the same command.",
        allow_abbrev=False,
    )
    made.add_argument("--config", action="config", help="settings from a file (YAML or JSON)")
    made.add_argument("--quick", action="store_true", help="a small study: within three minutes")
    made.add_argument("--out", type=str, default="study", help="folder of runs and report")
    made.add_argument("--jobs", type=int, default=-1, help="processes; -1: one for each core")
    made.add_argument(
        "--scheduler", type=str | None, default=None, help="address of a dask scheduler"
    )
    made.add_argument("--dry_run", action="store_true", help="say what would be run, and stop")
    made.add_class_arguments(Study, None)
    made.set_defaults(asdict(defaults))
    return made


def study_from(arguments: Sequence[str]) -> tuple[Study, Any]:
    """The study that a command line asks for, and the other options."""
    made = parser(quick() if "--quick" in arguments else Study())
    given = made.parse_args(list(arguments))
    options = made.instantiate(given)
    try:
        study = Study(**{f.name: getattr(options, f.name) for f in fields(Study)})
    except ValueError as error:
        made.error(str(error))
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
        out: folder; runs that it holds already are not made again, those that failed are.
        jobs: processes, -1: one for each core.
        scheduler: address of a dask scheduler that is to run them instead.
        console: for progress; None: the standard error.

    Returns:
        The tables of training runs and of statistics at initialisation, in the study's order.
    """
    store = Store(out)
    wanted = jobs_of(study)
    if study.mnist is not None:
        mnist(study.mnist)  # a file that is missing is said now
    missing = [job for job in wanted if not store.has(job.part, job.key)]
    console = console or Console(stderr=True)
    kept = len(wanted) - len(missing)
    if kept:
        console.print(f"{kept} of {len(wanted)} runs are there already")
    with _Shown(len(missing), console) as shown:
        for job, row in run_all(missing, jobs, scheduler):
            store.put(job.part, job.key, row)
            shown.advance(job)
    tables = [
        store.table(part, [job.key for job in wanted if job.part == part])
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
    """The command; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    study, options = study_from(arguments)
    console = Console()
    wanted = jobs_of(study)
    training = sum(job.part == "runs" for job in wanted)
    console.print(
        f"{training} training runs and {len(wanted) - training} sets of draws, in {options.out}"
    )
    if options.dry_run:
        return 0
    begin = time.perf_counter()
    try:
        tables = perform(
            study, options.out, jobs=options.jobs, scheduler=options.scheduler, console=console
        )
    except KeyboardInterrupt:
        kept = Store(options.out)
        done = sum(kept.has(job.part, job.key) for job in wanted)
        console.print(
            f"Interrupted: {done} of {len(wanted)} runs are kept in {options.out}; the same "
            "command continues."
        )
        return INTERRUPTED
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
    return 0
