"""Brings a contestant to the tolerance, in float64, before it is timed.

Its forward setting is the loosest at which the state's residual is reached; its adjoint setting the
loosest at which the adjoint's is, started at z*, so that no error of the state is taken for one of
the adjoint. At these settings the gradient must then be the one that belongs to its own state.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from contestants import Contestant, Counts
from entries import Entry, tolerances
from problems import Problem, Spec, problem_of

from fastdeq import ConvergenceError


class NotReachedError(Exception):
    """A contestant cannot take part; the message says why."""


@dataclass
class Ready:
    """A contestant that was verified, and the call to time."""

    run: Callable[[], Any]
    iterations: Counts
    products: Counts
    facts: dict[str, Any]


def prepare(entry: Entry, spec: Spec, mode: str) -> Ready:
    """
    Raises:
        NotReachedError: something is missing, or no setting reaches the tolerance.
    """
    if entry.missing:
        raise NotReachedError(entry.missing)
    problem = problem_of(spec)
    facts: dict[str, Any] = {}
    if not entry.verified:
        contestant = entry.build(problem, spec.tol, spec.tol)
    elif mode == "forward":
        setting = _inference_setting(entry, problem)
        contestant = entry.build(problem, setting, spec.tol)
        facts = {"forward_setting": setting}
        facts["residual"] = problem.state_residual(contestant.tensor(contestant.infer()))
    else:
        contestant, facts = _prepare_training(entry, problem)
    contestant.counting = True
    if mode == "forward":
        contestant.infer()
    state = None if mode == "forward" else contestant.attached()
    if state is not None:
        contestant.gradients(state)
    iterations, products = contestant.iterations, contestant.products
    contestant.counting = False
    if mode == "forward":
        return Ready(contestant.infer, _only(iterations, 0), _only(products, 0), facts)
    if mode == "full":
        return Ready(contestant.full, iterations, products, facts)
    state = contestant.attached()
    return Ready(
        lambda: contestant.gradients(state), _only(iterations, 1), _only(products, 1), facts
    )


def _only(counts: Counts, direction: int) -> Counts:
    return (counts[0], None) if direction == 0 else (None, counts[1])


def _prepare_training(entry: Entry, problem: Problem) -> tuple[Contestant, dict[str, Any]]:
    forward, adjoint = _training_setting(entry, problem), _adjoint_setting(entry, problem)
    contestant = entry.build(problem, forward, adjoint)
    state = contestant.attached()
    z = contestant.tensor(state)
    grad_weight, grad_x = map(_torch, contestant.gradients(state)[:2])
    residual = problem.adjoint_residual(grad_x, z)
    error, bound = problem.weight_error(z, grad_weight, grad_x)
    if residual > problem.allowed or error > bound:
        raise NotReachedError(
            f"its gradient is not that of its state: adjoint residual {residual:.2g} where "
            f"{problem.allowed:.2g} is allowed, dL/dW off by {error:.2g} where {bound:.2g} is"
        )
    return contestant, {
        "residual": problem.state_residual(z),
        "adjoint_residual": residual,
        "weight_gradient_error": error,
        "forward_setting": forward,
        "adjoint_setting": adjoint,
    }


@cache
def _inference_setting(entry: Entry, problem: Problem) -> float:
    def residual(setting: float) -> float:
        contestant = entry.build(problem, setting, problem.spec.tol)
        return problem.state_residual(contestant.tensor(contestant.infer()))

    return _loosest(entry.forward_settings(problem.spec), residual, problem.allowed)


@cache
def _training_setting(entry: Entry, problem: Problem) -> float:
    def residual(setting: float) -> float:
        contestant = entry.build(problem, setting, problem.spec.tol)
        return problem.state_residual(contestant.tensor(contestant.attached()))

    if entry.build(problem, 1, problem.spec.tol).same_forward:
        return _inference_setting(entry, problem)
    return _loosest(entry.forward_settings(problem.spec), residual, problem.allowed)


@cache
def _adjoint_setting(entry: Entry, problem: Problem) -> float:
    # A plain solve of the state, from z*: how it is solved does not matter here.
    forward = _training_setting(entry, problem)

    def residual(setting: float) -> float:
        contestant = entry.build(problem, forward, setting)
        state = contestant.attached(problem.solution.float())
        return problem.adjoint_residual(_torch(contestant.gradients(state)[1]))

    return _loosest(tolerances(problem.spec), residual, problem.allowed)


def _torch(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    import numpy as np

    return torch.from_numpy(np.array(value))


def _loosest(
    settings: Sequence[float], residual: Callable[[float], float], allowed: float
) -> float:
    """The first of ``settings``, which run from loose to tight, whose residual is allowed."""
    best, failure = float("inf"), ""

    def reached(setting: float) -> bool:
        nonlocal best, failure
        try:
            value = residual(setting)
        except (torch.linalg.LinAlgError, ConvergenceError) as error:
            failure = f"; at {setting:g}: {error}"
            return False
        best = min(best, value)
        return value <= allowed

    if isinstance(settings, range):  # numbers of iterations: many, and the residual falls
        index = bisect.bisect_left(settings, True, key=reached)
        if index < len(settings):
            return settings[index]
    else:
        for setting in settings:
            if reached(setting):
                return setting
    raise NotReachedError(
        f"no setting down to {settings[-1]:g} reaches a residual of {allowed:.3g} in float64; "
        f"the best was {best:.3g}{failure}"
    )
