"""Anderson acceleration, with each sample on its own and never a singular solve.

    window w    past differences used; the ring buffer has m = w + 1 slots
    g = f(z)-z  residual
    gamma       argmin |g_k - sum gamma_i (g_k - g_i)|, from ops.anderson_mix; type I: see there

A step is taken back when the residual it leads to is too large or not finite: the sample returns to
the last point it trusted, takes the plain step from there, and goes on with plain steps until a
fresh history is full: the few differences after a step taken back say little of a map that is only
piecewise smooth. The reasons for which a step is rejected, shortened or taken back have a counter
each.

Sources: D. G. Anderson, J. ACM 12 (1965) 547; H. Walker and P. Ni, SIAM J. Numer. Anal. 49 (2011)
1715; safeguard in the manner of J. Zhang, B. O'Donoghue and S. Boyd, SIAM J. Optim. 30 (2020) 3170.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..constants import GROW_AFTER, GROW_EVERY, PATIENCE
from ..errors import check_choice
from .anderson_type_one import mix_type_one
from .base import CheckedOptions, Problem, Step, check_integer, check_range

KINDS = ("II", "I")


@dataclass
class _State:
    mix: Callable[..., tuple[Tensor, Tensor, Tensor]]
    f_history: Tensor  # (B, m, n)
    g_history: Tensor  # (B, m, n)
    gram: Tensor  # (B, m, m) float64
    count: Tensor  # (B,) int32: valid entries before the newest
    slot: int
    steps: int
    trusted_value: Tensor  # (B, n): f at the last point that was not taken back
    trusted_norm: Tensor  # (B,): its residual norm
    accelerated: Tensor  # (B,) bool: the current point came from a mixing step
    plain: Tensor  # (B,) bool: no acceleration yet
    refills: Tensor  # (B,) bool: plain steps until the history is full again
    previous_norm: Tensor  # (B,): residual norm one step before
    safeguard: Tensor  # (B,) int32 counters
    weight_cap: Tensor
    rank_cut: Tensor


@dataclass(frozen=True)
class Anderson(CheckedOptions):
    """Anderson acceleration.

    Args:
        window: past differences used, >= 1 (memory: 2 (window + 1) states).
        damping: beta in (0, 1].
        regularization: ridge on the unit-norm columns, >= 0; shrinks towards the plain step.
        rank_tolerance: pivots at or below it, relative to a unit column, drop the column, >= 0.
        max_weight: largest 1-norm of gamma; beyond it the sample takes the plain step.
        safeguard: a step may raise the residual norm by this factor, >= 1, before it is taken back;
            then plain steps follow until the history is full again.
        accelerate_above: a sample takes plain steps, and keeps no history, for as long as each
            reduces its residual norm to this fraction of the one before or less, in [0, 1]; after
            the first that does not it is accelerated to the end. 0: accelerated at once.
        first_window: past differences used in the first 12 updates; then one more every third
            update, up to ``window``: easy problems pay for a short history and hard ones get a long
            one. 0: ``window`` from the start.
        kind: "II", whose coefficients make the residual least; or "I", those of the multi-secant
            method of Broyden's "good" family, in plain PyTorch alone.
    """

    window: int = 5
    damping: float = 1.0
    regularization: float = 1e-12
    rank_tolerance: float = 1e-10
    max_weight: float = 1e8
    safeguard: float = 2.0
    accelerate_above: float = 0.0
    first_window: int = 0
    kind: str = "II"

    name: ClassVar[str] = "anderson"
    linear: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    patience: ClassVar[int] = PATIENCE
    rejects: ClassVar[tuple[str, ...]] = ("safeguard", "weight_cap", "rank_cut")

    def __post_init__(self) -> None:
        check_choice(self.kind, KINDS, "kind")
        inf = float("inf")
        window = check_integer("Anderson", "window", self.window, 1, 1000)
        object.__setattr__(self, "window", window)
        first = check_integer("Anderson", "first_window", self.first_window, 0, 1000)
        object.__setattr__(self, "first_window", first)
        check_range("Anderson", "damping", self.damping, 1e-12, 1.0, "in (0, 1]")
        check_range("Anderson", "regularization", self.regularization, 0.0, inf, ">= 0")
        check_range("Anderson", "rank_tolerance", self.rank_tolerance, 0.0, inf, ">= 0")
        check_range("Anderson", "max_weight", self.max_weight, 0.0, inf, ">= 0")
        check_range("Anderson", "safeguard", self.safeguard, 1.0, inf, ">= 1")
        check_range("Anderson", "accelerate_above", self.accelerate_above, 0.0, 1.0, "in [0, 1]")

    def init(self, point: Tensor, problem: Problem) -> _State:
        batch, size = point.shape
        slots = self.window + 1
        zeros = torch.zeros(batch, dtype=torch.int32, device=point.device)
        return _State(
            mix=problem.anderson_mix if self.kind == "II" else mix_type_one,
            f_history=point.new_zeros(batch, slots, size),
            g_history=point.new_zeros(batch, slots, size),
            gram=point.new_zeros(batch, slots, slots, dtype=torch.float64),
            count=zeros.clone(),
            slot=0,
            steps=0,
            trusted_value=point,
            trusted_norm=point.new_full((batch,), torch.inf),
            accelerated=zeros.bool(),
            plain=torch.full_like(zeros, self.accelerate_above > 0, dtype=torch.bool),
            refills=zeros.bool(),
            previous_norm=point.new_full((batch,), torch.inf),
            safeguard=zeros.clone(),
            weight_cap=zeros.clone(),
            rank_cut=zeros.clone(),
        )

    def step(
        self, state: _State, point: Tensor, value: Tensor, norm: Tensor, running: Tensor
    ) -> Step:
        finite = norm.isfinite()
        # NaN compares false: "not (norm <= limit)" takes a non-finite step back as well.
        back = state.accelerated & ~(norm <= self.safeguard * state.trusted_norm)
        state.plain &= norm <= self.accelerate_above * state.previous_norm
        state.previous_norm = norm
        column = back.unsqueeze(1)
        state.f_history[:, state.slot] = value
        state.g_history[:, state.slot] = value - point
        mixed, dropped, rejected = state.mix(
            state.f_history,
            state.g_history,
            state.gram,
            state.count,
            state.slot,
            self.damping,
            self.regularization,
            self.rank_tolerance,
            self.max_weight,
        )
        # The plain step from the trusted point stands in for a step taken back.
        held = back | state.refills
        state.trusted_value = torch.where(column, state.trusted_value, value)
        state.trusted_norm = torch.where(back, state.trusted_norm, norm)
        plain = state.trusted_value
        if self.damping != 1.0:
            damped = point + self.damping * (value - point)
            plain = torch.where(column, state.trusted_value, damped)
        following = torch.where(held.unsqueeze(1), plain, mixed)

        state.safeguard += back & running
        mixes = running & finite & ~held
        state.weight_cap += rejected & mixes
        state.rank_cut += (dropped > 0) & mixes
        state.accelerated = ~held & ~rejected & (state.count > 0)
        # The history restarts after a step taken back; its newest entry is not counted either.
        forget = back | state.plain
        most = self._most_differences(state.steps)
        state.count = torch.where(forget, 0, (state.count + 1).clamp(max=most))
        state.refills = held & (state.count < most)
        state.steps += 1
        state.slot = (state.slot + 1) % (self.window + 1)
        return Step(following, None, ~finite & ~back)

    def _most_differences(self, steps: int) -> int:
        """Those that the evaluation after so many steps may use."""
        if self.first_window == 0:
            return self.window
        return min(self.window, self.first_window + max(0, steps - GROW_AFTER) // GROW_EVERY)

    def counters(self, state: _State) -> tuple[Tensor, ...]:
        return state.safeguard, state.weight_cap, state.rank_cut
