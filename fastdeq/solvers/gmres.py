"""Restarted GMRES for the adjoint, batched: one Krylov space per sample.

The map is affine, ``f(u) = b + J u``; the system is ``A u = b`` with ``A v = v - (f(v) - b)``. Each
evaluation is one product with J, so no product is spent on anything but the Krylov space and
one verification per cycle.

    V (B, m+1, n)  orthonormal basis
    H (B, m+1, m)  float64, upper Hessenberg, A V_m = V_{m+1} H
    beta = |r_0|   residual at the start of a cycle
    y              argmin |beta e_1 - H y|, and u = u_0 + V_m y

The residual norm inside a cycle costs O(m) per step: the left null vector l of H (l_0 = 1,
``l_{j+1} = -sum_i l_i H_ij / H_{j+1,j}``) gives ``|r_j| = beta / |l_{0..j}|``, because the residual
of the least-squares problem is the projection of beta e_1 on that vector.

Source: Y. Saad and M. Schultz, SIAM J. Sci. Stat. Comput. 7 (1986) 856.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..constants import PATIENCE_GMRES
from .base import CheckedOptions, Problem, Step, check_integer


@dataclass
class _State:
    basis: Tensor  # (B, m+1, n)
    hessenberg: Tensor  # (B, m+1, m) float64
    null: Tensor  # (B, m+1) float64, the left null vector
    beta: Tensor  # (B,) float64
    step: Tensor  # (B,) int64: columns done in this cycle; -1: the point is an iterate
    start: Tensor  # (B, n): u_0 of the cycle
    offset: Tensor  # (B, n): b, the value at zero, once the first step has seen it
    fresh: bool
    scale: Tensor  # (B, 1): |b|; directions are evaluated at this length, b being added to them
    tol: float
    atol: float
    updates_left: int
    used: int  # columns of the basis that any sample has used


@dataclass(frozen=True)
class GMRES(CheckedOptions):
    """Restarted GMRES; ``restart`` >= 1 is the largest dimension of the Krylov space.

    The first point must be zero, where the map's value is the right-hand side.
    """

    restart: int = 20

    name: ClassVar[str] = "gmres"
    linear: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()
    patience: ClassVar[int] = PATIENCE_GMRES
    waits: ClassVar[bool] = True
    rejects: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        restart = check_integer("GMRES", "restart", self.restart, 1, 10_000)
        object.__setattr__(self, "restart", restart)

    def init(self, point: Tensor, problem: Problem) -> _State:
        batch, size = point.shape
        wide = torch.float64
        return _State(
            basis=point.new_zeros(batch, self.restart + 1, size),
            hessenberg=point.new_zeros(batch, self.restart + 1, self.restart, dtype=wide),
            null=point.new_zeros(batch, self.restart + 1, dtype=wide),
            beta=point.new_zeros(batch, dtype=wide),
            step=torch.full((batch,), -1, device=point.device),
            start=point,
            offset=point,
            fresh=True,
            scale=point.new_ones(batch, 1),
            tol=problem.tol,
            atol=problem.atol,
            updates_left=problem.max_iter,
            used=0,
        )

    def step(
        self, state: _State, point: Tensor, value: Tensor, norm: Tensor, running: Tensor
    ) -> Step:
        if state.fresh:
            state.fresh, state.offset = False, value
            length = value.norm(dim=1, keepdim=True)
            state.scale = torch.where(length > 0, length, 1.0)
        opening = state.step < 0
        if not bool(opening.all()):
            self._extend(state, point, value)
        if bool(opening.any()):
            self._open(state, opening, point, value, norm)
        state.used = min(state.used + 1, self.restart)

        # The residual must meet the tolerance next to |f(u)|, unknown yet: |u_0| stands in for it,
        # and |b| in the first cycle, which starts from zero.
        size = state.start.norm(dim=1)
        goal = state.atol + state.tol * torch.where(size > 0, size, state.scale[:, 0]).double()
        # Where that was met before and did not do, as for a small part of a state, on from there.
        goal = torch.where(state.beta <= goal, 0.1 * state.beta, goal)
        estimate = state.beta / state.null.norm(dim=1)
        full = state.step >= self.restart
        state.updates_left -= 1
        last = state.updates_left == 0  # what comes back now must be an iterate: it is the result
        leaving = ~opening & (~(estimate > goal) | full | last) & running
        row = torch.arange(len(point), device=point.device)
        following = state.basis[row, state.step.clamp(max=self.restart)] * state.scale
        if bool(leaving.any()):
            following[leaving] = self._minimise(state, leaving)
            state.step = torch.where(leaving, -1, state.step)
        if last:
            following = torch.where(opening.unsqueeze(1), value, following)
        return Step(following, leaving | last, ~norm.isfinite())

    def _open(
        self, state: _State, opening: Tensor, point: Tensor, value: Tensor, norm: Tensor
    ) -> None:
        """Starts a cycle for the samples whose point was an iterate."""
        r, length = (value - point)[opening], norm[opening]
        state.basis[opening] = 0
        state.basis[opening, 0] = r / torch.where(length > 0, length, 1.0).unsqueeze(1)
        state.hessenberg[opening] = 0
        state.null[opening] = 0
        state.null[opening, 0] = 1
        state.beta[opening] = length.double()
        state.start = torch.where(opening.unsqueeze(1), point, state.start)
        state.step = torch.where(opening, 0, state.step)

    def _extend(self, state: _State, point: Tensor, value: Tensor) -> None:
        """Adds one Arnoldi column; ``_open`` overwrites it for samples that were at an iterate."""
        rows = torch.arange(len(point), device=point.device)
        at = state.step.clamp(min=0, max=self.restart - 1)
        basis = state.basis[:, : state.used + 1]  # columns beyond a sample's own step are zero
        w = (point - (value - state.offset)) / state.scale
        column = w.new_zeros(len(point), state.used + 1)
        for _ in range(2):  # classical Gram-Schmidt twice: orthogonal to machine precision
            projection = torch.bmm(basis, w.unsqueeze(2)).squeeze(2)
            w = w - torch.bmm(projection.unsqueeze(1), basis).squeeze(1)
            column = column + projection
        length = w.norm(dim=1)
        # A length at the rounding floor is an invariant subspace: the iterate is exact.
        floor = 10 * torch.finfo(w.dtype).eps * column.norm(dim=1)
        closed = length <= floor
        safe = torch.where(closed, 1.0, length)
        state.hessenberg[rows, : state.used + 1, at] = column.double()
        state.hessenberg[rows, at + 1, at] = torch.where(closed, 0.0, length).double()
        state.basis[rows, at + 1] = torch.where(closed, 0.0, 1.0).unsqueeze(1) * (w / safe[:, None])
        inner = (state.null[:, : state.used + 1] * column).sum(1)
        state.null[rows, at + 1] = torch.where(closed, torch.inf, -inner / safe)
        state.step = state.step + 1

    def _minimise(self, state: _State, leaving: Tensor) -> Tensor:
        """``u_0 + V y`` for the samples that leave their cycle, ``(L, n)``."""
        hessenberg, step = state.hessenberg[leaving], state.step[leaving]
        unused = torch.arange(self.restart, device=step.device) >= step.unsqueeze(1)
        # A unit subdiagonal in unused columns keeps the factor regular and their y at zero.
        index = torch.arange(self.restart, device=step.device)
        hessenberg[:, index + 1, index] += unused
        q, r = torch.linalg.qr(hessenberg)
        rhs = q[:, 0, :] * state.beta[leaving].unsqueeze(1)
        diagonal = r.diagonal(dim1=1, dim2=2)
        singular = diagonal.abs() <= 1e-14 * diagonal.abs().amax(1, keepdim=True)
        rhs = torch.where(singular, 0.0, rhs)
        r = r + torch.diag_embed(torch.where(singular, 1.0 - diagonal, 0.0))
        y = torch.linalg.solve_triangular(r, rhs.unsqueeze(2), upper=True).squeeze(2)
        y = torch.where(unused, 0.0, y).to(state.basis.dtype)
        basis = state.basis[leaving][:, : self.restart]
        return state.start[leaving] + torch.bmm(y.unsqueeze(1), basis).squeeze(1)

    def counters(self, state: _State) -> tuple[Tensor, ...]:
        return ()
