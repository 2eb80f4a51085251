"""Brings a contestant to the tolerance, in float64, before it is timed.

Its forward setting is the loosest at which the state's residual is reached; its adjoint setting the
loosest at which the adjoint's is, started at z*, so that no error of the state is taken for one of
the adjoint. At these settings the gradient must then be the one that belongs to its own state.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from contestants import Contestant, Counts
from entries import Entry, tolerances
from problems import Problem, Spec, problem_of

from fastdeq import ConvergenceError

_ALIKE = 8
_T = TypeVar("_T")


class NotReachedError(Exception):
    """A contestant cannot take part; the message says why."""


@dataclass
class Ready:
    """A contestant that was verified, and the call to time."""

    run: Callable[[], Any]
    iterations: Counts
    products: Counts  # counted in the mode "full" only
    facts: dict[str, Any]


@dataclass
class _Training:
    contestant: Contestant
    state: Any
    iterations: Counts
    facts: dict[str, Any]


def prepare(entry: Entry, spec: Spec, mode: str) -> Ready:
    """
    Raises:
        NotReachedError: something is missing, or no setting reaches the tolerance.
    """
    if entry.missing:
        raise NotReachedError(entry.missing)
    problem = problem_of(spec)
    if mode == "forward":
        setting = _inference_setting(entry, problem) if entry.verified else spec.tol
        contestant = entry.build(problem, setting, spec.tol)
        z = contestant.tensor(contestant.infer())
        facts = {"forward_setting": setting, "residual": problem.state_residual(z)}
        counts = contestant.iterations[0], None
        return Ready(contestant.infer, counts, (None, None), facts if entry.verified else {})
    trained = _training(entry, problem)
    if mode == "full":
        contestant = trained.contestant
        counts = contestant.count_products()
        return Ready(contestant.full, trained.iterations, counts, trained.facts)
    run = functools.partial(trained.contestant.gradients, trained.state)
    return Ready(run, (None, trained.iterations[1]), (None, None), trained.facts)


def remembered(find: Callable[[Entry, Problem], _T]) -> Callable[[Entry, Problem], _T]:
    """Calls ``find`` once per arguments, also where it raises."""

    @cache
    def found(entry: Entry, problem: Problem) -> _T | NotReachedError:
        try:
            return find(entry, problem)
        except NotReachedError as reason:
            return reason

    @functools.wraps(find)
    def setting(entry: Entry, problem: Problem) -> _T:
        result = found(entry, problem)
        if isinstance(result, NotReachedError):
            raise result
        return result

    return setting


@remembered
def _training(entry: Entry, problem: Problem) -> _Training:
    """A verified contestant for the backward and the full races."""
    if not entry.verified:
        contestant = entry.build(problem, problem.spec.tol, problem.spec.tol)
        state = contestant.attached()
        return _Training(contestant, state, contestant.iterations, {})
    forward, loosest = _training_setting(entry, problem), _adjoint_setting(entry, problem)
    # At its own state a solver may stop one iteration earlier than at z*.
    settings = tolerances(problem.spec)
    for adjoint in settings[settings.index(loosest) :]:
        trained = _trained(entry, problem, forward, adjoint)
        if trained.facts["adjoint_residual"] <= problem.allowed:
            return trained
    raise NotReachedError("its gradient has the adjoint residual at z* and not at its own state")


def _trained(entry: Entry, problem: Problem, forward: float, adjoint: float) -> _Training:
    contestant = entry.build(problem, forward, adjoint)
    state = contestant.attached()
    z = contestant.tensor(state)
    grad_weight, grad_x = map(_torch, contestant.gradients(state)[:2])
    error, bound = problem.weight_error(z, grad_weight, grad_x)
    if error > bound:
        raise NotReachedError(
            f"its dL/dW is off by {error:.2g} from what its dL/dx says, {bound:.2g} is allowed"
        )
    facts = {
        "residual": problem.state_residual(z),
        "adjoint_residual": problem.adjoint_residual(grad_x, z),
        "weight_gradient_error": error,
        "forward_setting": forward,
        "adjoint_setting": adjoint,
    }
    return _Training(contestant, state, contestant.iterations, facts)


@remembered
def _inference_setting(entry: Entry, problem: Problem) -> float:
    def residual(setting: float) -> float:
        contestant = entry.build(problem, setting, problem.spec.tol)
        return problem.state_residual(contestant.tensor(contestant.infer()))

    return loosest(entry.forward_settings(problem.spec), residual, problem.allowed)


@remembered
def _training_setting(entry: Entry, problem: Problem) -> float:
    def residual(setting: float) -> float:
        contestant = entry.build(problem, setting, problem.spec.tol)
        return problem.state_residual(contestant.tensor(contestant.attached()))

    if entry.build(problem, 1, problem.spec.tol).same_forward:
        return _inference_setting(entry, problem)
    return loosest(entry.forward_settings(problem.spec), residual, problem.allowed)


@remembered
def _adjoint_setting(entry: Entry, problem: Problem) -> float:
    forward = _training_setting(entry, problem)

    def residual(setting: float) -> float:
        contestant = entry.build(problem, forward, setting)
        grad_x = contestant.full(problem.solution.float())[1]
        return problem.adjoint_residual(_torch(grad_x))

    return loosest(tolerances(problem.spec), residual, problem.allowed)


def _torch(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    import numpy as np

    return torch.from_numpy(np.array(value))


def loosest(settings: Sequence[float], residual: Callable[[float], float], allowed: float) -> float:
    """The first of ``settings``, which run from loose to tight, whose residual is allowed."""
    best, failure, seen = float("inf"), "", []

    def reached(setting: float) -> bool:
        nonlocal best
        value = residual(setting)
        best = min(best, value)
        seen.append(value)
        return value <= allowed

    if isinstance(settings, range):  # numbers of iterations: many, and the residual falls
        index = bisect.bisect_left(settings, True, key=reached)
        if index < len(settings):
            return settings[index]
    else:
        for setting in settings:
            try:
                if reached(setting):
                    return setting
            except (torch.linalg.LinAlgError, ConvergenceError) as error:
                failure = f"; at {setting:g}: {error}"
                break
            # A tolerance of a tenth with the same result: it runs into its iteration limit.
            if len(seen) >= _ALIKE and len(set(seen[-_ALIKE:])) == 1:
                break
    raise NotReachedError(
        f"no setting reaches a residual of {allowed:.3g} in float64; the best was {best:.3g}"
        + failure
    )
