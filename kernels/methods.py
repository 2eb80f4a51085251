"""The solvers of solve_affine.py: for each the buffers of its own, and the kernel that follows an
evaluation. No numerics are here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import advance, advance_anderson, energy, minres, sample
from .anderson_mix import MAX_SLOTS
from .sample import Limits, Samples

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Method(Protocol):
    """A solver in this engine: ``advance`` follows evaluation k, whose value goes to ``value(k)``
    ``(B, n)`` and, with an entry in HISTORY, its residual to ``residual(k)``."""

    def value(self, k: int) -> Tensor: ...
    def residual(self, k: int) -> Tensor | None: ...
    def advance(self, k: int) -> None: ...


class Problem(NamedTuple):
    """What a method is made for."""

    samples: Samples
    limits: Limits
    options: Sequence[float]
    activation: int | None  # None: an adjoint

    def rows(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.samples.points.device)


class PlainSteps:
    def __init__(self, problem: Problem):
        self.samples, self.limits, self.options, _ = problem

    def value(self, k: int) -> Tensor:
        return self.samples.points[(k + 1) % advance.PLAIN_SLOTS]

    def residual(self, k: int) -> Tensor | None:
        return None

    def advance(self, k: int) -> None:
        advance.advance_plain(self.samples, k, self.limits, self.options[0])


class HeavyBallSteps:
    def __init__(self, problem: Problem):
        self.samples, self.limits, *_ = problem
        self.values = torch.empty_like(self.samples.points[0])

    def value(self, k: int) -> Tensor:
        return self.values

    def residual(self, k: int) -> Tensor | None:
        return None

    def advance(self, k: int) -> None:
        advance.advance_heavy_ball(self.samples, self.values, k, self.limits)


class AndersonSteps:
    def __init__(self, problem: Problem):
        self.samples, self.limits, options, _ = problem
        _, batch, size = self.samples.points.shape
        # More than max_iter entries are never used.
        slots = min(int(options[0]), self.limits.max_iter) + 1
        self.options = options[1:]
        self.history = advance_anderson.History(
            problem.rows(batch, slots, size),
            problem.rows(batch, slots, size),
            problem.rows(batch, slots, slots, dtype=torch.float64),
        )
        self.slots = slots

    def value(self, k: int) -> Tensor:
        return self.history.f[:, k % self.slots]

    def residual(self, k: int) -> Tensor | None:
        return self.history.g[:, k % self.slots]

    def advance(self, k: int) -> None:
        advance_anderson.advance_anderson(self.samples, self.history, k, self.limits, *self.options)


class Entry(NamedTuple):
    """How a solver is served: its method, its slots of points, whether it needs pre-activations,
    how its samples begin, and which of its options are not served."""

    make: Callable[[Problem], Method]
    slots: int
    keeps_pre: bool = False
    begin: Callable[[Sequence[float]], dict[str, Any]] = lambda options: {}
    why_not: Callable[[Sequence[float]], str] = lambda options: ""


def _why_no_anderson(options: Sequence[float]) -> str:
    if options[0] < MAX_SLOTS:
        return ""
    return f"its Anderson acceleration has a window of at most {MAX_SLOTS - 1}, not {options[0]:g}"


METHODS: dict[str, Entry] = {
    "picard": Entry(PlainSteps, advance.PLAIN_SLOTS),
    "neumann": Entry(PlainSteps, advance.PLAIN_SLOTS),
    "heavy_ball": Entry(
        HeavyBallSteps,
        advance.HEAVY_BALL_SLOTS,
        begin=lambda options: {"mode": sample.MOMENTUM.value, "radius": options[0]},
    ),
    "anderson": Entry(
        AndersonSteps,
        advance_anderson.SLOTS,
        begin=lambda options: {"plain": options[6] > 0},
        why_not=_why_no_anderson,
    ),
    "energy": Entry(energy.Descent, energy.SLOTS, True, energy.Descent.begin),
    "minres": Entry(minres.Minres, minres.SLOTS, True, minres.Minres.begin),
}


def why_not(solver: str, options: Sequence[float], dtype: torch.dtype) -> str:
    """Why a solve in ``dtype`` is not served; empty where it is."""
    if dtype not in _FLOATS:
        return f"it solves in float32, not in {dtype}"
    if solver not in METHODS:
        return f"it has no solver {solver!r}, only {', '.join(map(repr, METHODS))}"
    return METHODS[solver].why_not(options)
