"""Runs as rows of a table, one after the other, over processes or over machines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import joblib
import torch

from .config import Config, TaskName
from .data import Dataset, digits, mnist
from .ensemble import Ensemble, measure
from .plan import Study
from .text import characters
from .trace import COLUMNS
from .training import Result, train

_METRICS = (
    *("test_accuracy", "test_loss", "train_loss", "forward_iterations", "backward_iterations"),
    *("forward_converged", "backward_converged", "seconds"),
)
_SPECTRA = ("weight_before", "weight_after", "jacobian_before", "jacobian_after")


@dataclass(frozen=True)
class Job:
    """A run, or statistics at initialisation, with where its data are: what a worker gets."""

    what: Config | Ensemble
    mnist: str | None
    context: int
    windows: int

    @property
    def part(self) -> str:
        return "runs" if isinstance(self.what, Config) else "initial"

    @property
    def key(self) -> str:
        """Of the settings and, of a text, its windows. MNIST is the same in any
        folder; a study's folder refuses other data of its form."""
        if isinstance(self.what, Config) and self.what.task == "characters":
            return f"{self.what.key}-{self.context}x{self.windows}"
        return self.what.key


def jobs_of(study: Study) -> list[Job]:
    """Everything that a study asks for, the first seed first."""
    text = study.characters
    what = [*study.ensembles(), *study.runs()]
    jobs = [Job(w, study.mnist, text.context, text.windows) for w in what]
    # Within a seed in an order of no meaning: rates and estimates settle early.
    return sorted(jobs, key=lambda job: (job.part == "runs", job.what.seed, job.key))


@cache
def dataset_of(
    task: TaskName, seed: int, mnist_folder: str | None, context: int, windows: int
) -> Dataset:
    """The data of a task, kept for the next run of this process."""
    if task == "digits":
        return digits(seed)
    if task == "mnist":
        assert mnist_folder is not None
        return mnist(mnist_folder)
    return characters(seed, context=context, windows=windows)


def run(job: Job) -> dict[str, Any]:
    """The row of a job, made with one thread. An exception is part of the row: one run that fails
    ends no other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if isinstance(job.what, Ensemble):
            return _initial_row(job, job.what)
        return _training_row(job, job.what)
    finally:
        torch.set_num_threads(threads)


def _initial_row(job: Job, ensemble: Ensemble) -> dict[str, Any]:
    row = {"key": job.key, **asdict(ensemble), "entry_scale": ensemble.entry_scale, "error": ""}
    try:
        return {**row, **measure(ensemble)}
    except (RuntimeError, ValueError, ArithmeticError) as error:
        return {**row, "error": _named(error)}


def _training_row(job: Job, config: Config) -> dict[str, Any]:
    row = {
        "key": job.key,
        **asdict(config),
        "entry_scale": config.entry_scale,
        "regime": config.regime,
        "error": "",
    }
    # A split has a seed; MNIST has its own.
    seed = 0 if config.task == "mnist" else config.seed
    dataset = dataset_of(config.task, seed, job.mnist, job.context, job.windows)
    try:
        return {**row, **_measured(train(dataset, config))}
    except (RuntimeError, ValueError, ArithmeticError) as error:
        missing = dict.fromkeys(_METRICS, math.nan) | dict.fromkeys(_SPECTRA)
        traces = {f"trace_{name}": [] for name in ("step", *COLUMNS)}
        counts = {"nonfinite": 0, "skipped": 0, "updates": 0, "structure_drift": math.nan}
        return {**row, **missing, **counts, **traces, "error": _named(error)}


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _measured(result: Result) -> dict[str, Any]:
    drift = result.structure_drift
    return {
        **{name: getattr(result, name) for name in _METRICS if name != "train_loss"},
        "train_loss": result.loss,
        "nonfinite": result.nonfinite,
        "skipped": result.skipped,
        "updates": result.updates,
        "structure_drift": math.nan if drift is None else drift,
        **{f"trace_{name}": values for name, values in result.trace.items()},
        **{name: result.spectra.get(name) for name in _SPECTRA},
    }


def run_all(
    jobs: Sequence[Job], workers: int = -1, scheduler: str | None = None
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Rows as they get ready, in any order.

    Args:
        jobs: what to run.
        workers: processes, -1: one for each core.
        scheduler: address of a dask scheduler, whose workers then do it (they need fastdeq and its
            study extra, and the same paths for data). None: processes of this machine.
    """
    with ExitStack() as stack:
        if scheduler is not None:
            for manager in _cluster(scheduler):
                stack.enter_context(manager)
        parallel = joblib.Parallel(
            n_jobs=workers, return_as="generator_unordered", batch_size=1, pre_dispatch="4*n_jobs"
        )
        yield from parallel(joblib.delayed(_paired)(job) for job in jobs)


def _paired(job: Job) -> tuple[Job, dict[str, Any]]:
    return job, run(job)


def _cluster(scheduler: str) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    try:
        from distributed import Client
    except ImportError as error:
        raise ImportError("scheduler= needs dask: pip install 'fastdeq[cluster]'") from error
    client = Client(scheduler)
    return client, joblib.parallel_config(backend="dask")
