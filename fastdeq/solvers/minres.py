"""MINRES for the adjoint of a cell with symmetric weights and a monotone activation.

``q = D (g + q W)`` with ``D >= 0`` and ``h = D^1/2`` becomes, for ``q = h v``, symmetric:

    A v = h g,      A = I - h W h

Lanczos vectors y_j span the Krylov space of A, and the residual norm in v is the least in that
space, whether A is definite or not; where D is 0, q is exactly 0. One product with W per direction.

    A y_j = beta_{j-1} y_{j-1} + alpha_j y_j + beta_j y_{j+1}
    phi     estimate of the residual norm in v

When the estimate meets the tolerance, an evaluation at ``q = h (v_0 + x)`` verifies it. If that
fails, the goal is lowered; if the estimate has drifted from the truth by more than a factor of
``DRIFT``, or the Krylov space is exhausted, the iteration starts anew from there with the true
residual ``h (g + q W) - v``.

Source: C. Paige and M. Saunders, SIAM J. Numer. Anal. 12 (1975) 617.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..constants import (
    DRIFT,
    ESTIMATE_FRACTION,
    FIRST_RADIUS,
    KRYLOV_FLOOR,
    MOST_VAIN_RESTARTS,
    PATIENCE_MINRES,
    RESIDUAL_EPS,
)
from .base import AffineMap, CheckedOptions, Problem, Step, check_integer, where_rows
from .heavy_ball import Momentum

_MOMENTUM, _OPEN, _DIRECTION, _VERIFY = 0, 1, 2, 3


@dataclass
class _State:
    map: AffineMap
    momentum: Momentum
    mode: Tensor  # (B,) int8
    lowest: Tensor  # (B,): lowest relative residual under momentum
    h: Tensor  # (B, n)
    base: Tensor  # v_0; under momentum h (g + q W) at the best iterate
    x: Tensor
    y: Tensor  # Lanczos vector, and the one before
    y_old: Tensor
    w: Tensor  # search direction, and the one before
    w_old: Tensor
    beta: Tensor  # (B,)
    cosine: Tensor  # (B,): of the last rotation
    sine: Tensor
    diagonal: Tensor  # (B,): entries of the tridiagonal matrix, rotated once
    corner: Tensor  # (B,)
    phi: Tensor  # (B,): residual estimate
    aim: Tensor  # (B,): part of the tolerance to reach before the next verification
    exhausted: Tensor  # (B,) bool
    restart: Tensor  # (B,) int32 counter
    restarted_at: Tensor  # (B,): residual norm at the last restart that halved it
    vain: Tensor  # (B,) int32: restarts since
    tol: float
    atol: float
    updates_left: int


@dataclass(frozen=True)
class MINRES(CheckedOptions):
    """Minimal residuals on the symmetrised adjoint of a symmetric cell.

    Args:
        momentum: begin with heavy-ball steps, which are cheaper where the map contracts; MINRES
            goes on from a sample's best iterate after the first six of them that do not halve
            its residual.
    """

    momentum: bool = False

    name: ClassVar[str] = "minres"
    linear: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"symmetric", "monotone"})
    patience: ClassVar[int] = PATIENCE_MINRES
    waits: ClassVar[bool] = True
    rejects: ClassVar[tuple[str, ...]] = ("restart",)

    def __post_init__(self) -> None:
        momentum = check_integer("MINRES", "momentum", self.momentum, 0, 1)  # a switch
        object.__setattr__(self, "momentum", bool(momentum))

    def init(self, point: Tensor, problem: Problem) -> _State:
        assert problem.affine is not None
        assert problem.affine.slope is not None
        h = problem.affine.slope.clamp(min=0).sqrt()
        rows, zeros = torch.zeros_like(point), point.new_zeros(len(point))
        counter = torch.zeros(len(point), dtype=torch.int32, device=point.device)
        return _State(
            map=problem.affine,
            momentum=Momentum.start(point, FIRST_RADIUS),
            mode=torch.full_like(counter, _MOMENTUM if self.momentum else _OPEN, dtype=torch.int8),
            lowest=torch.full_like(zeros, torch.inf),
            h=h,
            **dict.fromkeys(("base", "x", "y", "y_old", "w", "w_old"), rows),
            **dict.fromkeys(("beta", "cosine", "sine", "diagonal", "corner", "phi"), zeros),
            aim=torch.full_like(zeros, ESTIMATE_FRACTION),
            exhausted=counter.bool(),
            restart=counter.clone(),
            restarted_at=torch.full_like(zeros, torch.inf),
            vain=counter,
            tol=problem.tol,
            atol=problem.atol,
            updates_left=problem.max_iter,
        )

    def step(
        self, state: _State, point: Tensor, value: Tensor, norm: Tensor, running: Tensor
    ) -> Step:
        mode, finite = state.mode, norm.isfinite()
        state.updates_left -= 1
        following = point
        open_next = torch.zeros_like(finite)
        failed = (mode != _DIRECTION) & ~finite

        heavy = mode == _MOMENTUM
        if bool(heavy.any()):
            relative = norm / (torch.linalg.vector_norm(value, dim=1) + RESIDUAL_EPS)
            lower = heavy & (relative < state.lowest)
            state.base = where_rows(lower, state.h * state.map.pre, state.base)
            state.lowest = torch.where(lower, relative, state.lowest)
            stepped, slow = state.momentum.step(point, value, norm)
            following = where_rows(heavy, stepped, point)
            open_next = heavy & (slow | ~finite) & state.lowest.isfinite()
            failed = failed & ~open_next
            following = where_rows(open_next, state.h * state.base, following)

        verify = mode == _VERIFY
        gained = norm < 0.5 * state.restarted_at
        anew = (mode == _OPEN) | (verify & (state.exhausted | ~(norm <= DRIFT * state.phi)))
        state.restart += verify & anew & running
        state.vain = torch.where(verify & anew, torch.where(gained, 0, state.vain + 1), state.vain)
        state.restarted_at = torch.where(verify & anew & gained, norm, state.restarted_at)
        # Where the estimate is sound, on towards a lower goal.
        size = torch.linalg.vector_norm(value, dim=1)
        lower = ((state.atol + state.tol * size) / norm).clamp(max=1.0) * ESTIMATE_FRACTION
        state.aim = torch.where(verify & ~anew, state.aim * lower, state.aim)
        if bool(anew.any()):
            self._begin(state, anew)
        ready = self._lanczos(state, mode == _DIRECTION)

        directs = anew | verify | ((mode == _DIRECTION) & ~ready)
        # The last update is to be an iterate.
        ready = ready | (directs & (state.updates_left <= 0))
        following = where_rows(directs, state.h * state.y, following)
        following = where_rows(ready, state.h * (state.base + state.x), following)
        following = where_rows(ready & anew, value, following)  # no update left but the plain step
        for rows, next_mode in ((open_next, _OPEN), (directs, _DIRECTION), (ready, _VERIFY)):
            state.mode = torch.where(rows, next_mode, state.mode)
        # A residual of zero that does not meet the tolerance is one below the smallest number.
        stalled = anew & ((state.phi == 0) | (state.vain > MOST_VAIN_RESTARTS))
        return Step(following, state.mode != _DIRECTION, failed, stalled)

    def _begin(self, state: _State, rows: Tensor) -> None:
        """A Krylov space of its own for the samples ``rows``, from the iterate just evaluated."""
        base = state.base + state.x
        r = state.h * state.map.pre - base
        # Where the evaluation was at zero there is no base yet.
        length = torch.linalg.vector_norm(r, dim=1)
        y = r / torch.where(length > 0, length, 1.0).unsqueeze(1)
        state.base, state.y = where_rows(rows, base, state.base), where_rows(rows, y, state.y)
        for name in ("x", "y_old", "w", "w_old"):
            setattr(state, name, where_rows(rows, torch.zeros_like(r), getattr(state, name)))
        for name, start in (("beta", 0.0), ("sine", 0.0), ("diagonal", 0.0), ("corner", 0.0)):
            setattr(state, name, torch.where(rows, start, getattr(state, name)))
        state.cosine = torch.where(rows, -1.0, state.cosine)
        state.phi = torch.where(rows, length, state.phi)
        state.aim = torch.where(rows, ESTIMATE_FRACTION, state.aim)
        state.exhausted = state.exhausted & ~rows

    def _lanczos(self, state: _State, rows: Tensor) -> Tensor:
        """One direction for the samples ``rows``; returns those that are to be verified."""
        if not bool(rows.any()):
            return rows
        image = state.y - state.h * state.map.product
        alpha = (state.y * image).double().sum(1).to(image.dtype)
        u = image - alpha.unsqueeze(1) * state.y - state.beta.unsqueeze(1) * state.y_old
        beta = torch.linalg.vector_norm(u, dim=1)

        upper = state.cosine * state.diagonal + state.sine * alpha
        middle = state.sine * state.diagonal - state.cosine * alpha
        length = torch.hypot(middle, beta)
        singular = ~(length > 0)  # true for NaN
        safe = torch.where(singular, 1.0, length)
        w = (
            state.y - state.corner.unsqueeze(1) * state.w_old - upper.unsqueeze(1) * state.w
        ) / safe.unsqueeze(1)
        corner, diagonal = state.sine * beta, -state.cosine * beta
        cosine, sine = middle / safe, beta / safe
        x = state.x + (cosine * state.phi).unsqueeze(1) * w
        phi = (sine * state.phi).abs()

        goes_on = rows & ~singular
        next_y = u / torch.where(beta > 0, beta, 1.0).unsqueeze(1)
        for name, new in (("w_old", state.w), ("w", w), ("x", x), ("y_old", state.y)):
            setattr(state, name, where_rows(goes_on, new, getattr(state, name)))
        state.y = where_rows(goes_on, next_y, state.y)
        for name, number in (
            ("beta", beta),
            ("corner", corner),
            ("diagonal", diagonal),
            ("cosine", cosine),
            ("sine", sine),
            ("phi", phi),
        ):
            setattr(state, name, torch.where(goes_on, number, getattr(state, name)))
        floor = KRYLOV_FLOOR * torch.finfo(image.dtype).eps
        spent = ~(beta > floor * torch.linalg.vector_norm(image, dim=1))
        state.exhausted = state.exhausted | (rows & (singular | spent))
        size = torch.linalg.vector_norm(state.h * (state.base + state.x), dim=1)
        met = state.phi <= state.aim * (state.atol + state.tol * (size + RESIDUAL_EPS))
        done: Tensor = rows & (met | state.exhausted)
        return done

    def counters(self, state: _State) -> tuple[Tensor, ...]:
        return (state.restart,)
