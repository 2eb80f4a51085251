"""Restarted GMRES for the adjoint, batched: one Krylov space per sample.

The map is affine, ``f(u) = b + J u``; the system is ``A u = b`` with ``A v = v - (f(v) - b)``. Each
evaluation is one product with J, so no product is spent on anything but the Krylov space and
one verification per cycle. What the space consists of is in arnoldi.py.

Source: Y. Saad and M. Schultz, SIAM J. Sci. Stat. Comput. 7 (1986) 856.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..constants import PATIENCE_GMRES
from .arnoldi import Arnoldi
from .base import CheckedOptions, Problem, Step, check_integer


@dataclass
class _State:
    space: Arnoldi  # of step -1: the point is an iterate
    offset: Tensor  # (B, n): b, the value at zero, once the first step has seen it
    scale: Tensor  # (B,): |b|; directions are evaluated at this length, b being added to them
    fresh: bool
    updates_left: int
    problem: Problem


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

    The first six and ``used`` are those of :class:`Arnoldi` and are written to; ``norm`` ``(B,)``
    is ``|value - point|``; samples outside ``running`` ``(B,)`` bool are ignored; ``last`` says
    that what comes back must be an iterate.

    Returns:
        where to evaluate next ``(B, n)``; whether that is an iterate ``(B,)`` bool.
    """
    space = Arnoldi(basis, hessenberg, null, beta, step, start, used)
    opening = step < 0
    if not bool(opening.all()):
        space.extend((point - (value - offset)) / scale.unsqueeze(1))
    if bool(opening.any()):
        space.open(opening, point, value - point, norm)

    # The residual must meet the tolerance next to |f(u)|, unknown yet: |u_0| stands in for it,
    # and |b| in the first cycle, which starts from zero.
    size = start.norm(dim=1)
    goal = atol + tol * torch.where(size > 0, size, scale).double()
    # Where that was met before and did not do, as for a small part of a state, on from there.
    goal = torch.where(beta <= goal, 0.1 * beta, goal)
    full = step >= space.dimension
    leaving = ~opening & (~(space.estimate() > goal) | full | last) & running
    following = space.vectors() * scale.unsqueeze(1)
    if bool(leaving.any()):
        following[leaving] = space.minimise(leaving)
        step[leaving] = -1
    if last:
        following = torch.where(opening.unsqueeze(1), value, following)
    return following, leaving | last


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
        return _State(
            space=Arnoldi.of(point, self.restart),
            offset=point,
            scale=point.new_ones(len(point)),
            fresh=True,
            updates_left=problem.max_iter,
            problem=problem,
        )

    def step(
        self, state: _State, point: Tensor, value: Tensor, norm: Tensor, running: Tensor
    ) -> Step:
        if state.fresh:
            length = value.norm(dim=1)
            state.fresh, state.offset = False, value
            state.scale = torch.where(length > 0, length, 1.0)
        state.updates_left -= 1
        space, problem = state.space, state.problem
        following, iterate = problem.gmres_step(
            space.basis,
            space.hessenberg,
            space.null,
            space.beta,
            space.step,
            space.start,
            state.offset,
            state.scale,
            point,
            value,
            norm,
            running,
            space.used,
            problem.tol,
            problem.atol,
            state.updates_left == 0,
        )
        space.used = min(space.used + 1, self.restart)
        return Step(following, iterate, ~norm.isfinite())

    def counters(self, state: _State) -> tuple[Tensor, ...]:
        return ()
