"""Fair timing: everybody at the same verified residual, in turns, in one process.

First each contestant gets the loosest settings that reach the tolerance in float64, searched
outside any timed region. Then all of them run in rounds, in a new random order each round, so that
whatever else the machine does meanwhile meets everybody alike. Ratios are ratios of medians.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from contestants import ENTRIES, TOLERANCES, Entry
from problems import TOL, Problem

from fastdeq import ConvergenceError

MODES = ("forward", "backward", "full")
SECONDS = 5.0  # per size and mode
MIN_ROUNDS, MAX_ROUNDS = 3, 200

_problem = cache(Problem)


class NotReachedError(Exception):
    """A contestant cannot take part; the message says why."""


@dataclass
class Ready:
    """A contestant that was verified, and the call to time."""

    run: Callable[[], Any]
    iterations: str
    facts: dict[str, Any]


@dataclass
class Race:
    """Everybody on one problem in one mode."""

    size: tuple[int, int]
    mode: str
    ready: dict[str, Ready] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    medians: dict[str, float] = field(default_factory=dict)  # seconds
    rounds: int = 0

    @property
    def reference(self) -> str | None:
        """torchdeq's fastest solver here; None where it did not run."""
        names = [name for name in self.medians if name.startswith("torchdeq-")]
        return min(names, key=self.medians.__getitem__, default=None)

    def ratio(self, name: str) -> float | None:
        """Time relative to the reference: below 1 is faster."""
        return self.medians[name] / self.medians[self.reference] if self.reference else None


@cache
def race(size: tuple[int, int], mode: str, timed: bool = True) -> Race:
    """Verifies everybody and, where ``timed``, runs the rounds; once per size and mode."""
    result = Race(size, mode)
    for entry in ENTRIES:
        if mode not in entry.modes:
            continue
        try:
            result.ready[entry.name] = _prepare(entry, size, mode)
        except NotReachedError as reason:
            result.skipped[entry.name] = str(reason)
    if timed:
        _run_rounds(result)
    return result


def _run_rounds(result: Race) -> None:
    order = list(result.ready)
    times: dict[str, list[float]] = {name: [] for name in order}
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + SECONDS
    gc.collect()
    gc.disable()
    try:
        while result.rounds < MAX_ROUNDS:
            if result.rounds >= MIN_ROUNDS and time.perf_counter() > end:
                break
            shuffle(order)
            for name in order:
                run = result.ready[name].run
                run()  # not timed: brings the contestant's data back into the caches
                begin = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - begin)
            gc.collect(0)
            result.rounds += 1
    finally:
        gc.enable()
    result.medians = {name: statistics.median(values) for name, values in times.items()}


def _prepare(entry: Entry, size: tuple[int, int], mode: str) -> Ready:
    if entry.missing:
        raise NotReachedError(entry.missing)
    problem = _problem(*size)
    if mode == "forward":
        return _prepare_forward(entry, problem)
    forward, adjoint = _training_settings(entry, problem)
    contestant = entry.build(problem, forward, adjoint)
    z = contestant.attached()
    grads = contestant.gradients(z)
    error, bound = problem.gradient_error(*grads[:2]), problem.gradient_bound
    if not error.within(bound):
        raise NotReachedError(f"its gradient is off by {error}, where {bound} can be explained")
    facts = {
        "residual": problem.state_residual(z),
        "gradient_error_weight": error.weight,
        "gradient_error_x": error.x,
        "forward_setting": forward,
        "adjoint_setting": adjoint,
    }
    steps = contestant.iterations
    if mode == "backward":
        return Ready(lambda: contestant.gradients(z), str(steps[1]), facts)
    both = f"{steps[0]}+{steps[1]}"
    return Ready(lambda: contestant.gradients(contestant.attached()), both, facts)


def _prepare_forward(entry: Entry, problem: Problem) -> Ready:
    if not entry.forward_settings:
        contestant, facts = entry.build(problem, TOL, TOL), {}
        contestant.infer()
    else:
        setting = _loosest(
            entry.forward_settings,
            lambda s: problem.state_residual(entry.build(problem, s, TOL).infer()),
            problem.allowed,
        )
        contestant = entry.build(problem, setting, TOL)
        residual = problem.state_residual(contestant.infer())
        facts = {"residual": residual, "forward_setting": setting}
    return Ready(contestant.infer, str(contestant.iterations[0]), facts)


@cache
def _training_settings(entry: Entry, problem: Problem) -> tuple[float, float]:
    """The loosest settings at which the state with a graph, and the adjoint, reach TOL."""
    forward = _loosest(
        entry.forward_settings,
        lambda s: problem.state_residual(entry.build(problem, s, TOL).attached()),
        problem.allowed,
    )

    # The adjoint on its own: started at z*, so that no error of the state is taken for one of it.
    def adjoint_residual(setting: float) -> float:
        contestant = entry.build(problem, forward, setting)
        z = contestant.attached(problem.solution.float())
        return problem.adjoint_residual(contestant.gradients(z)[1])

    return forward, _loosest(TOLERANCES, adjoint_residual, problem.allowed)


def _loosest(settings: Any, residual: Callable[[float], float], allowed: float) -> float:
    """The first of ``settings``, which run from loose to tight, whose residual is allowed."""
    best, failure = float("inf"), ""
    for setting in settings:
        try:
            reached = residual(setting)
        except (torch.linalg.LinAlgError, ConvergenceError) as error:
            failure = f"; at {setting:g}: {error}"
            continue
        if reached <= allowed:
            return setting
        best = min(best, reached)
    raise NotReachedError(
        f"no setting down to {settings[-1]:g} reaches a residual of {allowed:.3g} in float64; "
        f"the best was {best:.3g}{failure}"
    )
