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
class GMRESState:
    """``basis (B, m+1, n)``; float64: ``hessenberg (B, m+1, m)``, its left ``null`` vector
    ``(B, m+1)``, ``beta (B,)``; ``step (B,)`` int64, the columns done in this cycle, -1 where the
    point is an iterate; ``start (B, n)``, u_0 of the cycle; ``offset (B, n)``, b, and its length
    ``scale (B,)``, at which directions are evaluated, b being added to them."""

    basis: Tensor
    hessenberg: Tensor
    null: Tensor
    beta: Tensor
    step: Tensor
    start: Tensor
    offset: Tensor
    scale: Tensor
    used: int  # columns that any sample has used in this cycle or an earlier one
    fresh: bool
    updates_left: int


def gmres_step(
    basis: Tensor,
    hessenberg: Tensor,
    null: Tensor,
    beta: Tensor,
    step: Tensor,
    start: Tensor,
    offset: Tensor,
    scale: Tensor,
    point: Tensor,
    value: Tensor,
    norm: Tensor,
    running: Tensor,
    used: int,
    tol: float,
    atol: float,
    last: bool,
) -> tuple[Tensor, Tensor]:
    """The specification of ``ops.gmres_step``: takes in ``value = f(point)`` ``(B, n)``.

    ``norm`` ``(B,)`` is ``|value - point|``; samples outside ``running`` ``(B,)`` bool are ignored.
    Writes to the first six, the fields of :class:`GMRESState`; ``last`` says that what comes back
    must be an iterate.

    Returns:
        where to evaluate next ``(B, n)``; whether that is an iterate ``(B,)`` bool.
    """
    opening = step < 0
    if not bool(opening.all()):
        _extend(basis, hessenberg, null, step, offset, scale, point, value, used)
    if bool(opening.any()):
        _open(opening, basis, hessenberg, null, beta, step, start, point, value, norm)
    restart = hessenberg.shape[2]

    # The residual must meet the tolerance next to |f(u)|, unknown yet: |u_0| stands in for it,
    # and |b| in the first cycle, which starts from zero.
    size = start.norm(dim=1)
    goal = atol + tol * torch.where(size > 0, size, scale).double()
    # Where that was met before and did not do, as for a small part of a state, on from there.
    goal = torch.where(beta <= goal, 0.1 * beta, goal)
    estimate = beta / null.norm(dim=1)
    leaving = ~opening & (~(estimate > goal) | (step >= restart) | last) & running
    row = torch.arange(len(point), device=point.device)
    following = basis[row, step.clamp(max=restart)] * scale.unsqueeze(1)
    if bool(leaving.any()):
        following[leaving] = _minimise(
            basis[leaving], hessenberg[leaving], beta[leaving], step[leaving], start[leaving]
        )
        step[leaving] = -1
    if last:
        following = torch.where(opening.unsqueeze(1), value, following)
    return following, leaving | last


def _open(
    opening: Tensor,
    basis: Tensor,
    hessenberg: Tensor,
    null: Tensor,
    beta: Tensor,
    step: Tensor,
    start: Tensor,
    point: Tensor,
    value: Tensor,
    norm: Tensor,
) -> None:
    """Starts a cycle for the samples whose point was an iterate."""
    length = norm[opening]
    unit = (value - point)[opening] / torch.where(length > 0, length, 1.0).unsqueeze(1)
    for kept in (basis, hessenberg, null):
        kept[opening] = 0
    basis[opening, 0] = unit
    null[opening, 0] = 1
    beta[opening] = length.double()
    start[opening] = point[opening]
    step[opening] = 0


def _extend(
    basis: Tensor,
    hessenberg: Tensor,
    null: Tensor,
    step: Tensor,
    offset: Tensor,
    scale: Tensor,
    point: Tensor,
    value: Tensor,
    used: int,
) -> None:
    """Adds one Arnoldi column; ``_open`` overwrites it for samples that were at an iterate."""
    rows = torch.arange(len(point), device=point.device)
    at = step.clamp(min=0, max=hessenberg.shape[2] - 1)
    known = basis[:, : used + 1]  # columns beyond a sample's own step are zero
    w = (point - (value - offset)) / scale.unsqueeze(1)
    column = w.new_zeros(len(point), used + 1)
    for _ in range(2):  # classical Gram-Schmidt twice: orthogonal to machine precision
        projection = torch.bmm(known, w.unsqueeze(2)).squeeze(2)
        w = w - torch.bmm(projection.unsqueeze(1), known).squeeze(1)
        column = column + projection
    length = w.norm(dim=1)
    # A length at the rounding floor is an invariant subspace: the iterate is exact.
    floor = 10 * torch.finfo(w.dtype).eps * column.norm(dim=1)
    closed = length <= floor
    safe = torch.where(closed, 1.0, length)
    hessenberg[rows, : used + 1, at] = column.double()
    hessenberg[rows, at + 1, at] = torch.where(closed, 0.0, length).double()
    basis[rows, at + 1] = torch.where(closed, 0.0, 1.0).unsqueeze(1) * (w / safe[:, None])
    inner = (null[:, : used + 1] * column).sum(1)
    null[rows, at + 1] = torch.where(closed, torch.inf, -inner / safe)
    step += 1


def _minimise(
    basis: Tensor, hessenberg: Tensor, beta: Tensor, step: Tensor, start: Tensor
) -> Tensor:
    """``u_0 + V y`` ``(L, n)`` after ``step`` columns ``(L,)``; writes to ``hessenberg``."""
    index = torch.arange(hessenberg.shape[2], device=step.device)
    unused = index >= step.unsqueeze(1)
    # A unit subdiagonal in unused columns keeps the factor regular and their y at zero.
    hessenberg[:, index + 1, index] += unused
    q, r = torch.linalg.qr(hessenberg)
    rhs = q[:, 0, :] * beta.unsqueeze(1)
    diagonal = r.diagonal(dim1=1, dim2=2)
    singular = diagonal.abs() <= 1e-14 * diagonal.abs().amax(1, keepdim=True)
    rhs = torch.where(singular, 0.0, rhs)
    r = r + torch.diag_embed(torch.where(singular, 1.0 - diagonal, 0.0))
    y = torch.linalg.solve_triangular(r, rhs.unsqueeze(2), upper=True).squeeze(2)
    y = torch.where(unused, 0.0, y).to(basis.dtype)
    return start + torch.bmm(y.unsqueeze(1), basis[:, :-1]).squeeze(1)


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

    def init(self, point: Tensor, problem: Problem) -> tuple[GMRESState, Problem]:
        batch, size = point.shape
        wide = torch.float64
        state = GMRESState(
            basis=point.new_zeros(batch, self.restart + 1, size),
            hessenberg=point.new_zeros(batch, self.restart + 1, self.restart, dtype=wide),
            null=point.new_zeros(batch, self.restart + 1, dtype=wide),
            beta=point.new_zeros(batch, dtype=wide),
            step=torch.full((batch,), -1, device=point.device),
            start=point.clone(),
            offset=point,
            scale=point.new_ones(batch),
            used=0,
            fresh=True,
            updates_left=problem.max_iter,
        )
        return state, problem

    def step(
        self,
        state: tuple[GMRESState, Problem],
        point: Tensor,
        value: Tensor,
        norm: Tensor,
        running: Tensor,
    ) -> Step:
        own, problem = state
        if own.fresh:
            length = value.norm(dim=1)
            own.fresh, own.offset = False, value
            own.scale = torch.where(length > 0, length, 1.0)
        own.updates_left -= 1
        following, iterate = problem.gmres_step(
            own.basis,
            own.hessenberg,
            own.null,
            own.beta,
            own.step,
            own.start,
            own.offset,
            own.scale,
            point,
            value,
            norm,
            running,
            own.used,
            problem.tol,
            problem.atol,
            own.updates_left == 0,
        )
        own.used = min(own.used + 1, self.restart)
        return Step(following, iterate, ~norm.isfinite())

    def counters(self, state: tuple[GMRESState, Problem]) -> tuple[Tensor, ...]:
        return ()
