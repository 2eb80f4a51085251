"""Broyden's "good" method with a limited memory, each sample on its own.

    g = f(z) - z   residual, whose root is sought
    H              approximation of the inverse Jacobian of g, H = -tau I + sum_i u_i v_i^T
    s = z - z_-    the last step, y = g - g_- the change of the residual that it made, both over |s|
    v = H^T s,     u = (s - H y) / (v^T y),     z_+ = z - H_+ g

With H = -I the step is the plain one. The first pair makes ``tau = 1 / max(1, |s^T y|)``: where
plain steps overshoot, as those of an f with slopes far below -1 do, steps along other directions
are shorter. A step takes the products of H with g and y, and of its transpose with s: 6 m n
multiply-adds, in four reads of the memory. A full memory is emptied but for the pair that is added:
on tanh cells, linear programs and ill-conditioned linear maps that converges more often and sooner
than replacing the oldest pair, without which the others say something else than they did.

A step that raises the residual too much is taken back, and what it showed of the Jacobian is kept:
the next step from the same point is another one. Forgetting everything instead, as Anderson
acceleration does, takes up to twice the iterations.

The update multiplies the determinant of the Jacobian by ``gamma = v^T y``. Where that is
near zero y is replaced by ``theta y + (1 - theta) H^{-1} s``, which makes it LEAST_RATIO, as M.
Powell's damping does; s - H y is multiplied by theta then. Keeping its sign instead makes no
difference where there is one, and lets rounding turn a step round where there is none.

Sources: C. Broyden, Math. Comp. 19 (1965) 577; C. Kelley, Iterative Methods for Linear and
Nonlinear Equations, SIAM 1995, chapter 7; damping as in J. Zhang, B. O'Donoghue and S. Boyd, SIAM
J. Optim. 30 (2020) 3170; for equilibrium models S. Bai, J. Kolter and V. Koltun, NeurIPS 2019; its
inverse for the adjoint Z. Ramzi et al., "SHINE", ICLR 2022.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..constants import PATIENCE
from .base import CheckedOptions, Problem, Step, check_integer, check_range, where_rows

#: The least factor, in magnitude, by which an update may change the determinant.
LEAST_RATIO = 0.1


class Inverse(NamedTuple):
    """H: pairs u and v ``(B, m, n)``, newest first, of which ``counts`` ``(B,)`` int32 are in use,
    and tau ``(B,)``."""

    left: Tensor
    right: Tensor
    counts: Tensor
    scale: Tensor

    def transposed(self) -> Inverse:
        return self._replace(left=self.right, right=self.left)


@dataclass
class _State:
    left: Tensor  # (B, m, n): u_i
    right: Tensor  # (B, m, n): v_i
    count: Tensor  # (B,) int32: pairs in use, the most recent ones
    slot: int
    filled: int  # slots that hold pairs of any sample, at most
    fresh: bool
    begun: bool  # with the inverse of another solve
    scale: Tensor  # (B,): tau
    point: Tensor  # (B, n): the last point that was not taken back
    residual: Tensor  # (B, n): g there
    norm: Tensor  # (B,): |g| there
    quasi: Tensor  # (B,) bool: the current point came from a step with a memory
    safeguard: Tensor  # (B,) int32 counters
    damped: Tensor


def _used(state: _State) -> Tensor:
    """Which pairs are in use ``(B, 1, m)``."""
    pairs = state.left.shape[1]
    age = (state.slot - 1 - torch.arange(pairs, device=state.left.device)) % pairs
    return (age < state.count.unsqueeze(1)).unsqueeze(1)


def _times(used: Tensor, scale: Tensor, first: Tensor, second: Tensor, rows: Tensor) -> Tensor:
    """H, or its transpose, times k rows ``(B, k, n)`` of each sample; pairs outside ``used``
    ``(B, 1, m)`` do not count, whatever finite numbers they hold.

    In this layout both products run along rows: columns ``(B, n, k)`` take ten times as long.
    """
    weights = torch.where(used, torch.bmm(rows, first.transpose(1, 2)), 0.0)
    return torch.baddbmm(scale[:, None, None] * rows, weights, second, beta=-1)


@dataclass(frozen=True)
class Broyden(CheckedOptions):
    """Broyden's method, as DEQ papers use it, with a bounded memory.

    Args:
        memory: pairs of vectors kept for each sample, >= 1 (2 ``memory`` states). When it is full
            all but the newest are dropped.
        damping: the part of each step that is made, in (0, 1].
        safeguard: a step may raise the residual norm by this factor, >= 1, before it is taken
            back; what it showed is kept.
        reuse: of an adjoint whose forward solver is Broyden's method too: begin with the inverse
            that the forward solve ended with, transposed (SHINE). One update, by
            ``adjoint_max_iter=1``, applies it and no more. Up to ``memory`` pairs of the forward
            solve stay in memory until the backward pass. For general cells; an
            :class:`~fastdeq.AffineCell` is called as one.
    """

    memory: int = 20
    damping: float = 1.0
    safeguard: float = 10.0
    reuse: bool = False

    name: ClassVar[str] = "broyden"
    linear: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    patience: ClassVar[int] = PATIENCE
    rejects: ClassVar[tuple[str, ...]] = ("safeguard", "damped")

    def __post_init__(self) -> None:
        memory = check_integer("Broyden", "memory", self.memory, 1, 10_000)
        object.__setattr__(self, "memory", memory)
        check_range("Broyden", "damping", self.damping, 1e-12, 1.0, "in (0, 1]")
        check_range("Broyden", "safeguard", self.safeguard, 1.0, float("inf"), ">= 1")
        if not isinstance(self.reuse, bool):
            raise ValueError(f"Broyden(reuse={self.reuse!r}): reuse must be True or False.")

    def kept(self, state: _State) -> Inverse:
        """H in the end, its pairs in memory of their own. No number is read from the device, so
        samples that use fewer pairs than others, or that dropped some, have the rest too."""

        def newest_first(rows: Tensor) -> Tensor:
            since, before = rows[:, : state.slot], rows[:, state.slot : state.filled]
            return torch.cat((since.flip(1), before.flip(1)), 1)

        left, right = newest_first(state.left), newest_first(state.right)
        return Inverse(left, right, state.count, state.scale)

    def init(self, point: Tensor, problem: Problem) -> _State:
        batch, size = point.shape
        begun: Inverse | None = problem.begin
        reused = 0 if begun is None else begun.left.shape[1]
        pairs = min(self.memory, problem.max_iter) + reused
        zeros = torch.zeros(batch, dtype=torch.int32, device=point.device)
        left, right = point.new_zeros(batch, pairs, size), point.new_zeros(batch, pairs, size)
        count, scale = zeros, point.new_ones(batch)
        if begun is not None:  # the oldest first
            left[:, :reused], right[:, :reused] = begun.left.flip(1), begun.right.flip(1)
            count, scale = begun.counts.clone(), begun.scale
        return _State(
            left=left,
            right=right,
            count=count,
            slot=reused % pairs,
            filled=reused,
            fresh=True,
            begun=begun is not None,
            scale=scale,
            point=point,
            residual=point,
            norm=point.new_full((batch,), torch.inf),
            quasi=zeros.bool(),
            safeguard=zeros.clone(),
            damped=zeros.clone(),
        )

    def step(
        self, state: _State, point: Tensor, value: Tensor, norm: Tensor, running: Tensor
    ) -> Step:
        finite = norm.isfinite()
        g = value - point
        # NaN compares false: "not (norm <= limit)" takes a non-finite step back as well.
        back = state.quasi & ~(norm <= self.safeguard * state.norm)
        state.safeguard += back & running
        state.count = torch.where(back & ~finite, 0, state.count)
        s, y = point - state.point, g - state.residual
        state.point = where_rows(back, state.point, point)
        state.residual = where_rows(back, state.residual, g)
        state.norm = torch.where(back, state.norm, norm)
        direction = -state.residual
        if state.fresh and state.begun:
            rows = state.residual.unsqueeze(1)
            direction = _times(_used(state), state.scale, state.right, state.left, rows).squeeze(1)
        if not state.fresh:
            direction = self._update(state, s, y, state.residual, finite, running)
        state.fresh = False
        following = state.point - self.damping * direction
        if self.damping == 1.0:  # the plain step to the last bit
            plain = where_rows(back, state.point + state.residual, value)
            following = where_rows(state.count > 0, following, plain)
        state.quasi = state.count > 0
        return Step(following, None, ~finite & ~back)

    def _update(
        self, state: _State, s: Tensor, y: Tensor, g: Tensor, learn: Tensor, running: Tensor
    ) -> Tensor:
        """Adds the pair of s and y where a sample may ``learn``; returns H g."""
        pairs = state.left.shape[1]
        state.count = torch.where(state.count < pairs, state.count, 0)
        used = _used(state)
        # Divided by |s|, squares stay within the dtype's range; s = 0 makes NaN, which is not kept.
        length = torch.linalg.vector_norm(s, dim=1, keepdim=True, dtype=torch.float64).to(s.dtype)
        s, y = s / length, y / length
        # An empty memory begins with steps no longer than the plain one along s may be.
        scale = (s * y).sum(1).abs().clamp(min=1).reciprocal()
        scale = state.scale = torch.where(state.count > 0, state.scale, scale)
        left, right = state.left, state.right
        hg, hy = _times(used, scale, right, left, torch.stack((g, y), 1)).unbind(1)
        v = _times(used, scale, left, right, s.unsqueeze(1)).squeeze(1)
        gamma = (v * y).sum(1)
        small = gamma.abs() < LEAST_RATIO
        theta = torch.where(small, (1 - LEAST_RATIO) / (1 - gamma), 1.0)
        u = (theta / torch.where(small, LEAST_RATIO, gamma)).unsqueeze(1) * (s - hy)
        learn = learn & u.isfinite().all(1) & v.isfinite().all(1)
        state.damped += learn & small & running
        u, v = where_rows(learn, u, torch.zeros_like(u)), where_rows(learn, v, torch.zeros_like(v))
        state.left[:, state.slot], state.right[:, state.slot] = u, v
        state.slot, state.filled = (state.slot + 1) % pairs, min(state.filled + 1, pairs)
        grows = learn | (state.count > 0)
        state.count = torch.where(grows, state.count + 1, 0)
        return hg + (v * g).sum(1, keepdim=True) * u

    def counters(self, state: _State) -> tuple[Tensor, ...]:
        return state.safeguard, state.damped
