"""Newton's method with GMRES inside, for stubborn equations: each sample on its own.

    G(z) = f(z) - z   residual;  A = I - df/dz;  Newton step d: A d = G(z)
    eta               forcing: GMRES stops where |G - A d| <= eta |G|
    z + lambda d      trial, an iterate; lambda = 1, less where G does not fall enough

A product takes one evaluation: ``A v = v - (f(z + h v) - f(z)) / h`` with |v| = 1. Its error is
about ``h |f''| / 2 + eps |f| / h``, least near ``h = sqrt(eps) |z|``, where it is about sqrt(eps),
3e-4 in float32. That is enough for a direction, as every trial is evaluated. A cell that computes
in a lower precision than its state has needs a larger ``difference``.

eta follows the progress of the last step, ``0.9 (|G| / |G_-|)^2``, falls no faster than its own
square, and asks for no more than half of the tolerance (S. Eisenstat and H. Walker, SIAM J. Sci.
Comput. 17 (1996) 16, choice 2). lambda minimises the parabola through ``|G|^2``, its slope and the
trial's, within a tenth and a half of the lambda before. After MOST_TRIALS trials, or where a
difference is not finite, the plain step to f(z) is taken, whatever its residual. Trials may raise
the residual: of 32 samples of a tanh cell of 64 features and scale 2, 26 converge within 500
evaluations when they may by a factor of 10, and 16 when each has to lower it.

Source: D. Knoll and D. Keyes, J. Comput. Phys. 193 (2004) 357.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..constants import PATIENCE, SUFFICIENT_DECREASE
from .arnoldi import Arnoldi
from .base import CheckedOptions, Problem, Step, check_integer, check_range, where_rows

FIRST_FORCING = 0.3
FORCING_FACTOR = 0.9
MOST_TRIALS = 6


@dataclass
class _State:
    space: Arnoldi  # of step -1: the point is a trial
    point: Tensor  # (B, n): z, the last trial that was accepted
    value: Tensor  # (B, n): f(z)
    norm: Tensor  # (B,): |G(z)|
    width: Tensor  # (B, 1): h
    direction: Tensor  # (B, n): d
    length: Tensor  # (B,): lambda
    trials: Tensor  # (B,) int32: that were rejected
    forced: Tensor  # (B,) bool: the trial is a plain step, and accepted where it is finite
    forcing: Tensor  # (B,): eta
    backtracked: Tensor  # (B,) int32 counters
    plain: Tensor
    tol: float
    atol: float
    updates_left: int


@dataclass(frozen=True)
class NewtonKrylov(CheckedOptions):
    """Newton steps, each from a Krylov space of finite differences.

    Every difference and every trial is one evaluation, and counts as one iteration: allow some
    hundred. It pays for small tolerances where the slopes of f come near to 1 in many directions.

    Args:
        restart: largest dimension of the Krylov space, >= 1 (memory: ``restart`` + 6 states).
        difference: h relative to |z|, in [0, 1]; 0: the square root of the state's machine epsilon.
        safeguard: a step may raise the residual norm by this factor, >= 1, before it is shortened;
            1: it has to lower it.
    """

    restart: int = 20
    difference: float = 0.0
    safeguard: float = 10.0

    name: ClassVar[str] = "newton_krylov"
    linear: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    patience: ClassVar[int] = PATIENCE
    waits: ClassVar[bool] = True
    rejects: ClassVar[tuple[str, ...]] = ("backtracked", "plain")

    def __post_init__(self) -> None:
        restart = check_integer("NewtonKrylov", "restart", self.restart, 1, 10_000)
        object.__setattr__(self, "restart", restart)
        check_range("NewtonKrylov", "difference", self.difference, 0.0, 1.0, "in [0, 1]")
        check_range("NewtonKrylov", "safeguard", self.safeguard, 1.0, float("inf"), ">= 1")

    def init(self, point: Tensor, problem: Problem) -> _State:
        batch = point.shape[0]
        one = point.new_ones(batch)
        count = torch.zeros(batch, dtype=torch.int32, device=point.device)
        return _State(
            space=Arnoldi.of(point, min(self.restart, problem.max_iter)),
            point=point,
            value=point,
            norm=torch.full_like(one, torch.inf),
            width=one.unsqueeze(1),
            direction=point,
            length=one,
            trials=count,
            forced=~count.bool(),  # the start is accepted
            forcing=torch.full_like(one, FIRST_FORCING),
            backtracked=count.clone(),
            plain=count.clone(),
            tol=problem.tol,
            atol=problem.atol,
            updates_left=problem.max_iter,
        )

    def step(
        self, state: _State, point: Tensor, value: Tensor, norm: Tensor, running: Tensor
    ) -> Step:
        space, finite = state.space, norm.isfinite()
        # The loop's norm may be rounded in another way where another sample is not finite.
        norm = torch.linalg.vector_norm(value - point, dim=1, dtype=torch.float64).to(norm.dtype)
        trial = space.step < 0
        if not bool(trial.all()):
            slope = (value - state.value) / state.width
            space.extend(where_rows(finite, space.vectors() - slope, torch.zeros_like(point)))
        lower = 1 - SUFFICIENT_DECREASE * state.length
        allowed = lower if self.safeguard == 1 else torch.full_like(lower, self.safeguard)
        accepted = trial & finite & (state.forced | (norm <= allowed * state.norm))
        rejected = trial & ~accepted
        state.backtracked += rejected & running
        space.step = torch.where(trial, -1, space.step)
        if bool(accepted.any()):
            self._accept(state, accepted, point, value, norm)
        space.used = min(space.used + 1, space.dimension)

        state.updates_left -= 1
        last = state.updates_left == 0  # what comes back now must be an iterate: it is the result
        limit = state.atol + state.tol * torch.linalg.vector_norm(state.value, dim=1)
        goal = torch.maximum(state.forcing * state.norm, 0.5 * limit)
        done = ~(space.estimate() > goal) | (space.step >= space.dimension) | last
        solved = ~trial & finite & done & running
        following = state.point + state.width * space.vectors()
        failed = rejected & state.forced
        if bool((rejected | solved | (~trial & ~finite)).any()):
            if bool(solved.any()):
                newton = state.point.clone()
                newton[solved] = space.minimise(solved)
                state.direction = where_rows(solved, newton - state.point, state.direction)
            self._shorten(state, rejected, solved, norm)
            gives_up = (state.trials >= MOST_TRIALS) | ~state.direction.isfinite().all(1)
            gives_up = (gives_up & (rejected | solved)) | (~trial & ~finite)
            state.forced = gives_up
            state.plain += gives_up & running & ~failed
            next_trial = state.point + state.length.unsqueeze(1) * state.direction
            next_trial = where_rows(gives_up, state.value, next_trial)
            trial = rejected | solved | gives_up
            following = where_rows(trial, next_trial, following)
            space.step = torch.where(trial, -1, space.step)
        else:
            trial = torch.zeros_like(trial)
        if last:
            following = where_rows(accepted, value, following)
        return Step(following, trial | last, failed)

    def _accept(
        self, state: _State, accepted: Tensor, point: Tensor, value: Tensor, norm: Tensor
    ) -> None:
        """Makes an accepted trial the point of the next Newton step."""
        ratio = torch.where(state.norm.isfinite(), norm / state.norm, 1.0)
        own = FORCING_FACTOR * state.forcing.square()
        forcing = FORCING_FACTOR * ratio.square()
        forcing = torch.where(own > 0.1, torch.maximum(forcing, own), forcing)
        forcing = torch.where(state.norm.isfinite(), forcing.clamp(max=0.9), FIRST_FORCING)
        state.forcing = torch.where(accepted, forcing, state.forcing)
        state.point = where_rows(accepted, point, state.point)
        state.value = where_rows(accepted, value, state.value)
        state.norm = torch.where(accepted, norm, state.norm)
        state.trials = torch.where(accepted, 0, state.trials)
        state.forced = state.forced & ~accepted
        size = [torch.linalg.vector_norm(t, dim=1, keepdim=True) for t in (point, value)]
        size[0] = torch.maximum(*size)
        relative = self.difference or torch.finfo(point.dtype).eps ** 0.5
        width = relative * torch.where(size[0] > 0, size[0], 1.0)
        state.width = where_rows(accepted, width, state.width)
        state.space.open(accepted, point, value - point, norm)

    @staticmethod
    def _shorten(state: _State, rejected: Tensor, solved: Tensor, norm: Tensor) -> None:
        """lambda of the next trial: 1 where a step was just computed."""
        share = (norm / state.norm).square()
        length = state.length
        best = length.square() / (share - 1 + 2 * length)
        best = torch.where(best.isfinite(), best, 0.5 * length)
        best = torch.minimum(torch.maximum(best, 0.1 * length), 0.5 * length)
        state.length = torch.where(solved, 1.0, torch.where(rejected, best, length))
        state.trials = torch.where(solved, 0, state.trials + rejected)

    def counters(self, state: _State) -> tuple[Tensor, ...]:
        return state.backtracked, state.plain
