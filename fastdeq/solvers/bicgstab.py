"""BiCGStab for the adjoint, batched: short recurrences, so that memory does not grow.

The map is affine, ``f(u) = b + J u``; the system is ``A u = b`` with ``A d = d - (f(d) - b)``.

    r      residual b - A u, by recurrence      w      a fixed vector, the shadow of the first r
    p      direction, v = A p                   rho    w^T r
    alpha  rho / w^T v;  u += alpha p, r -= alpha v                      first half
    omega  t^T r / t^T t, t = A r;  u += omega r, r -= omega t           second half
    beta   (rho_+ / rho) (alpha / omega);  p = r + beta (p - omega v)

Each half takes one product. Nothing but an iterate's evaluation is believed: a sample returns to
the u of least recurrent residual, and to its true residual, once that residual meets the tolerance;
where a denominator vanishes (breakdown: w^T v, rho or omega); or where the recurrence has brought
nothing for PATIENCE products. Unless that is the end it starts again from there, with another
shadow: the same one would break down once more.

Source: H. van der Vorst, SIAM J. Sci. Stat. Comput. 13 (1992) 631.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..constants import PATIENCE, PATIENCE_GMRES
from .base import CheckedOptions, Problem, Step, where_rows

_OPENING, _FIRST, _SECOND = 0, 1, 2

#: Part of a tolerance that was met by recurrence and did not do, as for a small part of a state.
TIGHTEN = 0.1


@dataclass
class _State:
    phase: Tensor  # (B,): what was evaluated: an iterate, p, or r after the first half
    offset: Tensor  # (B, n): b, once the first step has seen it
    scale: Tensor  # (B,): |b|; directions are evaluated at this length, b being added to them
    length: Tensor  # (B,): of the direction that was evaluated
    u: Tensor  # (B, n)
    r: Tensor
    shadow: Tensor  # w
    p: Tensor
    v: Tensor
    rho: Tensor  # (B,) float64
    alpha: Tensor
    best: Tensor  # (B, n): the u of least residual by recurrence
    best_norm: Tensor  # (B,) float64: that residual
    idle: Tensor  # (B,) int32: products since
    goal: Tensor  # (B,) float64: factor of the tolerance
    met: Tensor  # (B,) bool: the current iterate met it
    restarts: Tensor  # (B,) int32, the first start included
    fresh: bool
    tol: float
    atol: float
    updates_left: int


@dataclass(frozen=True)
class BiCGStab(CheckedOptions):
    """BiCGStab: seven vectors of memory for each sample, where GMRES has as many as its restart.

    The first point must be zero, where the map's value is the right-hand side.
    """

    name: ClassVar[str] = "bicgstab"
    linear: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()
    patience: ClassVar[int] = PATIENCE_GMRES
    rejects: ClassVar[tuple[str, ...]] = ("restarts",)

    def init(self, point: Tensor, problem: Problem) -> _State:
        batch = point.shape[0]
        count = torch.zeros(batch, dtype=torch.int32, device=point.device)
        one = point.new_ones(batch, dtype=torch.float64)
        return _State(
            phase=count,
            offset=point,
            scale=one,
            length=one,
            u=point,
            r=point,
            shadow=point,
            p=point,
            v=point,
            rho=one,
            alpha=one,
            best=point,
            best_norm=one,
            idle=count,
            goal=one,
            met=count.bool(),
            restarts=count,
            fresh=True,
            tol=problem.tol,
            atol=problem.atol,
            updates_left=problem.max_iter,
        )

    def step(
        self, state: _State, point: Tensor, value: Tensor, norm: Tensor, running: Tensor
    ) -> Step:
        if state.fresh:
            state.fresh, state.offset = False, value
            length = _norm(value)
            state.scale = torch.where(length > 0, length, 1.0)
        opening, first = state.phase == _OPENING, state.phase == _FIRST
        second = state.phase == _SECOND
        back = (state.length / state.scale).to(point.dtype).unsqueeze(1)
        product = (point - (value - state.offset)) * back
        broken = self._advance(state, product, first, second)
        self._open(state, opening, point, value, norm, running)

        size = torch.where(first | second, _norm(state.r), norm.double())
        better = opening | (size < state.best_norm)  # false for NaN
        state.best = where_rows(better, state.u, state.best)
        state.best_norm = torch.where(better, size, state.best_norm)
        state.idle = torch.where(better, 0, state.idle + 1)

        # |f(u)| is next to |u| where the residual is small.
        limit = state.goal * (state.atol + state.tol * _norm(state.best))
        met = ~opening & (state.best_norm <= limit)
        state.updates_left -= 1
        last = state.updates_left == 0  # what comes back now must be an iterate: it is the result
        direction = where_rows(first, state.r, state.p)
        state.length = _norm(direction)
        broken = broken | ~((state.length > 0) & state.length.isfinite())
        leaving = ~opening & (broken | met | (state.idle >= PATIENCE) | last)
        state.met = leaving & met
        state.phase = torch.where(first, _SECOND, _FIRST)
        state.phase = torch.where(leaving, _OPENING, state.phase)
        unit = (state.scale / state.length).to(point.dtype).unsqueeze(1) * direction
        following = where_rows(leaving, state.best, unit)
        if last:
            following = where_rows(opening, value, following)
        return Step(following, leaving | last, ~norm.isfinite())

    def _open(
        self,
        state: _State,
        opening: Tensor,
        point: Tensor,
        value: Tensor,
        norm: Tensor,
        running: Tensor,
    ) -> None:
        """Starts from the samples' point, an iterate, with its true residual."""
        r = value - point
        # w = r at first; then r plus a vector of length |r| / 2 at most: w^T r is far from zero.
        index = torch.arange(1, point.shape[1] + 1, device=point.device, dtype=point.dtype)
        wave = torch.cos(index * state.restarts.unsqueeze(1)) * (state.restarts > 0).unsqueeze(1)
        shadow = r + (0.5 * norm / max(point.shape[1], 1) ** 0.5).unsqueeze(1) * wave
        state.u = where_rows(opening, point, state.u)
        state.r = where_rows(opening, r, state.r)
        state.p = where_rows(opening, r, state.p)
        state.shadow = where_rows(opening, shadow, state.shadow)
        state.rho = torch.where(opening, _dot(state.shadow, r), state.rho)
        state.goal = torch.where(opening & state.met, TIGHTEN * state.goal, state.goal)
        state.restarts = state.restarts + (opening & running)

    def _advance(self, state: _State, product: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Makes the half step of which ``product`` is v or t; returns which break down."""
        tiny = torch.finfo(product.dtype).eps
        length, shadow = _norm(product), _norm(state.shadow)
        sigma = _dot(state.shadow, product)
        state.alpha = torch.where(first, state.rho / sigma, state.alpha)
        broken = first & ~(sigma.abs() > tiny * shadow * length)
        state.v = where_rows(first, product, state.v)

        inner = _dot(product, state.r)
        broken = broken | (second & ~(inner.abs() > tiny * length * _norm(state.r)))
        omega = inner / length.square()
        factor = torch.where(first, state.alpha, omega).to(product.dtype).unsqueeze(1)
        along = where_rows(first, state.p, state.r)
        half = first | second
        state.u = where_rows(half, state.u + factor * along, state.u)
        state.r = where_rows(half, state.r - factor * product, state.r)

        rho = _dot(state.shadow, state.r)
        broken = broken | (second & ~(rho.abs() > tiny * shadow * _norm(state.r)))
        beta = (rho / state.rho * (state.alpha / omega)).to(product.dtype).unsqueeze(1)
        state.p = where_rows(second, state.r + beta * (state.p - factor * state.v), state.p)
        state.rho = torch.where(second, rho, state.rho)
        return broken

    def counters(self, state: _State) -> tuple[Tensor, ...]:
        return ((state.restarts - 1).clamp(min=0),)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products ``(B,)`` of rows, in float64."""
    return (a.double() * b.double()).sum(1)


def _norm(rows: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
    return length
