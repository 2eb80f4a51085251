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
    fresh: bool
    scale: Tensor  # (B, 1): |b|; directions are evaluated at this length, b being added to them
    tol: float
    atol: float
    updates_left: int


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
            fresh=True,
            scale=point.new_ones(len(point), 1),
            tol=problem.tol,
            atol=problem.atol,
            updates_left=problem.max_iter,
        )

    def step(
        self, state: _State, point: Tensor, value: Tensor, norm: Tensor, running: Tensor
    ) -> Step:
        if state.fresh:
            state.fresh, state.offset = False, value
            length = value.norm(dim=1, keepdim=True)
            state.scale = torch.where(length > 0, length, 1.0)
        space = state.space
        opening = space.step < 0
        if not bool(opening.all()):
            space.extend((point - (value - state.offset)) / state.scale)
        if bool(opening.any()):
            space.open(opening, point, value - point, norm)
        space.used = min(space.used + 1, self.restart)

        # The residual must meet the tolerance next to |f(u)|, unknown yet: |u_0| stands in for it,
        # and |b| in the first cycle, which starts from zero.
        size = space.start.norm(dim=1)
        goal = state.atol + state.tol * torch.where(size > 0, size, state.scale[:, 0]).double()
        # Where that was met before and did not do, as for a small part of a state, on from there.
        goal = torch.where(space.beta <= goal, 0.1 * space.beta, goal)
        full = space.step >= self.restart
        state.updates_left -= 1
        last = state.updates_left == 0  # what comes back now must be an iterate: it is the result
        leaving = ~opening & (~(space.estimate() > goal) | full | last) & running
        following = space.vectors() * state.scale
        if bool(leaving.any()):
            following[leaving] = space.minimise(leaving)
            space.step = torch.where(leaving, -1, space.step)
        if last:
            following = torch.where(opening.unsqueeze(1), value, following)
        return Step(following, leaving | last, ~norm.isfinite())

    def counters(self, state: _State) -> tuple[Tensor, ...]:
        return ()
