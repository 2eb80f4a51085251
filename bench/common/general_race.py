"""Races around general cells: who takes part, at which settings, and what is timed.

As in ``verify.py`` each contestant gets the loosest settings that reach the tolerance, by an
evaluation in float64 that is not its own. Its calls of the cell and its products are counted, and
the same calls are timed alone in the same rounds, one kind at a time: what is left of its time is
its overhead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from entries import Entry, tolerances
from general_contestants import (
    Bare,
    GeneralContestant,
    GeneralFastDEQ,
    GeneralTorchDEQ,
    Tutorial,
    count,
)
from general_problem import (
    Counts,
    GeneralProblem,
    GeneralSpec,
    Probed,
    general_problem_of,
)
from interleave import Race, run_rounds, threads_of
from loops import PLAIN
from verify import NotReachedError, loosest, remembered

from fastdeq import ConvergenceError

SECONDS = 5.0  # per race, half of it for warm-up runs


def _torchdeq(name: str, solver: str, **options: Any) -> Entry:
    build = partial(GeneralTorchDEQ, solver=solver, **options)
    stops = solver != "simple_fixed_point_iter"
    return Entry(f"torchdeq-{name}", build, ("torchdeq",), stops=stops)


AUTO = Entry("fastdeq-auto", GeneralFastDEQ)
BARE = "bare-calls"
ENTRIES = (
    AUTO,
    Entry("fastdeq-plain", partial(GeneralFastDEQ, **PLAIN)),
    _torchdeq("fixed-point", "fixed_point_iter"),
    _torchdeq("anderson", "anderson"),
    _torchdeq("anderson-tuned", "anderson", tuned_window=3),
    # It allocates and clears max_iter states, and needs fewer than the others.
    _torchdeq("broyden", "broyden", max_iter=25),
    _torchdeq("simple", "simple_fixed_point_iter"),
    Entry("tutorial-anderson", Tutorial),
)
NAMES = (*(entry.name for entry in ENTRIES), BARE)

Settings = tuple[float, float]


@remembered
def _inference(entry: Entry, problem: GeneralProblem) -> tuple[float, float]:
    """The forward setting without a graph, and the residual there."""
    return _forward(entry, problem, lambda contestant: contestant.infer())


@remembered
def _training(entry: Entry, problem: GeneralProblem) -> tuple[Settings, float, float]:
    """Settings of both solves, and the two residuals there."""
    f_setting, _ = _forward(entry, problem, lambda contestant: contestant.attached())
    seen: dict[float, tuple[float, float]] = {}

    def residual(b_setting: float) -> float:
        cell = Probed(problem)
        contestant = entry.build(problem, f_setting, b_setting, cell)
        z = contestant.attached()
        u = contestant.gradients(z)[: cell.count]
        seen[b_setting] = problem.state_residual(z), problem.adjoint_residual(u, z)
        return seen[b_setting][1]

    b_setting = loosest(tolerances(problem.spec), residual, problem.allowed)
    return (f_setting, b_setting), *seen[b_setting]


def _forward(
    entry: Entry, problem: GeneralProblem, solve: Callable[[GeneralContestant], Any]
) -> tuple[float, float]:
    seen = {}

    def residual(setting: float) -> float:
        seen[setting] = problem.state_residual(
            solve(entry.build(problem, setting, problem.spec.tol))
        )
        return seen[setting]

    setting = loosest(entry.forward_settings(problem.spec), residual, problem.allowed)
    return setting, seen[setting]


def _prepare(entry: Entry, problem: GeneralProblem, mode: str, result: Race) -> Counts:
    """Puts a verified contestant into the race; what it does in one run.

    Raises:
        NotReachedError: something is missing, or no setting reaches the tolerance.
    """
    if entry.missing:
        raise NotReachedError(entry.missing)
    if mode == "forward":
        f_setting, residual = _inference(entry, problem)
        b_setting = problem.spec.tol
        facts = {"residual": residual, "forward_setting": f_setting}
    else:
        (f_setting, b_setting), residual, adjoint = _training(entry, problem)
        facts = {"residual": residual, "adjoint_residual": adjoint}
        facts |= {"forward_setting": f_setting, "adjoint_setting": b_setting}
    build = partial(entry.build, problem, f_setting, b_setting)
    contestant = build()
    if mode == "backward":
        run: Callable[[], Any] = partial(contestant.gradients, contestant.attached())
    else:
        run = contestant.infer if mode == "forward" else contestant.full
    counts = count(build, problem, mode)
    result.runs[entry.name], result.facts[entry.name] = run, facts
    result.facts[entry.name] |= {"counts": dataclasses.asdict(counts)}
    result.iterations[entry.name] = None, None
    result.products[entry.name] = counts.evaluations, counts.passes
    return counts


def _bare_counts(counts: dict[str, Counts]) -> Counts:
    """Those of fastdeq's "auto", or of whoever ran first."""
    return counts.get(AUTO.name) or next(iter(counts.values()), Counts())


@cache
def general_race(spec: GeneralSpec, mode: str, timed: bool = True, seconds: float = SECONDS) -> Any:
    """A ``Race``, whose facts have each contestant's bare calls (ms) and overhead (us); once."""
    result = Race(spec, mode)  # type: ignore[arg-type]
    problem = general_problem_of(spec)
    counts: dict[str, Counts] = {}
    with threads_of(spec):  # type: ignore[arg-type]
        for entry in ENTRIES:
            try:
                counts[entry.name] = _prepare(entry, problem, mode, result)
            except (NotReachedError, ConvergenceError, torch.linalg.LinAlgError) as reason:
                result.skipped[entry.name] = str(reason)
        bare = Bare(problem, spec.tol, spec.tol, counts=_bare_counts(counts))
        result.runs[BARE], result.facts[BARE] = bare.run, {}
        result.iterations[BARE] = None, None
        result.products[BARE] = bare.counts.evaluations, bare.counts.passes
        if timed:
            steps = _steps(bare, counts)
            result.runs |= {kind: partial(_repeat, step) for kind, step in steps.items()}
            run_rounds(result, seconds)
            _split(result, counts, tuple(steps))
    return result


_REPEATS = 8


def _repeat(step: Callable[[], Any]) -> None:
    for _ in range(_REPEATS):
        step()


def _steps(bare: Bare, counts: dict[str, Counts]) -> dict[str, Callable[[], Any]]:
    """The single steps that anybody takes, by the name of their count."""
    steps = {
        "calls": bare.call,
        "graph_calls": bare.call_with_graph,
        "products": bare.product,
        "other_passes": bare.other_pass,
    }
    taken = {kind for kind in steps for c in counts.values() if getattr(c, kind)}
    return {kind: step for kind, step in steps.items() if kind in taken}


def _split(result: Race, counts: dict[str, Counts], kinds: tuple[str, ...]) -> None:
    """Takes the single steps out of the race, and what they cost out of everybody's time."""
    cost = {kind: result.medians.pop(kind) / _REPEATS for kind in kinds}
    for kind in kinds:
        del result.runs[kind]
    result.facts[BARE] |= {f"{kind}_us": 1e6 * seconds for kind, seconds in cost.items()}
    for name in filter(result.medians.__contains__, counts):
        c = counts[name]
        alone = sum(getattr(c, kind) * cost[kind] for kind in kinds)
        overhead = (result.medians[name] - alone) / max(c.evaluations + c.passes, 1)
        result.facts[name] |= {"bare_ms": 1e3 * alone, "overhead_us": 1e6 * overhead}
