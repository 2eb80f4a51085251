"""Samples at one evaluation, for tests of the advance kernels.

Buffers start as NaN, so that a row that is read without having been written is seen.
"""

from __future__ import annotations

import math

import pytest
import torch
from fastdeq.kernels import sample
from fastdeq.kernels.advance import advance_heavy_ball, advance_plain
from fastdeq.kernels.advance_anderson import History, advance_anderson
from fastdeq.kernels.sample import Limits, Samples

EXACT, NARROW, STOPPED = (c.value for c in (sample.EXACT, sample.NARROW, sample.STOPPED))
STATUSES = {
    name: getattr(sample, name).value
    for name in ("CONVERGED", "MAX_ITER", "STAGNATED", "NONFINITE", "RUNNING")
}
LIMITS = Limits(tol=1e-4, max_iter=50, patience=3)
OPTIONS = {  # of Anderson acceleration, in the order of its fields
    "damping": 1.0,
    "regularization": 1e-12,
    "rank_tolerance": 1e-10,
    "max_weight": 1e8,
    "safeguard": 2.0,
    "accelerate_above": 0.0,
}
INFINITE = ("BEST", "NORM", "NORM_1", "NORM_2", "MARK", "ANCHOR", "GOAL", "TRUSTED_NORM")


def column(name: str) -> int:
    return getattr(sample, name).value


class Case:
    """B samples at an evaluation of ``kind``, with the residual norms and sizes it found."""

    def __init__(self, device, slots, norm, size=33, *, scale=1.0, kind=EXACT, ramp=False, tiles=3):
        norm = torch.tensor(norm, dtype=torch.float32)
        batch = len(norm)
        nan = {"fill_value": math.nan, "device": device}
        sums = torch.rand(batch, tiles, 2)  # how a sum is spread over tiles does not matter
        sums /= sums.sum(1, keepdim=True)
        sums[:, :, 0] *= norm[:, None] ** 2
        sums[:, :, 1] *= scale**2
        change = torch.full((batch, size), dtype=torch.bfloat16, **nan) if ramp else None
        self.samples = Samples(
            points=torch.full((slots + 1, batch, size), **nan),
            pre=None,
            sums=sums.to(device),
            numbers=torch.zeros(batch, sample.NUMBERS.value, device=device),
            flags=torch.zeros(batch, sample.FLAGS.value, dtype=torch.int32, device=device),
            remaining=torch.tensor([batch], dtype=torch.int32, device=device),
            offset=torch.empty(0),
            change=change,
        )
        self.value = torch.full((batch, size), **nan)
        self.set(WANTED=kind, MADE=kind, NARROWEST=NARROW if ramp else EXACT)
        self.set(**dict.fromkeys(INFINITE, math.inf), OMEGA=1.0, LED=1.0, RADIUS=0.5)

    def set(self, **columns) -> Case:
        for name, x in columns.items():
            of = self.samples.numbers if isinstance(x, float) else self.samples.flags
            of[:, column(name)] = x
        return self

    def flag(self, name: str) -> list[int]:
        return self.samples.flags[:, column(name)].tolist()

    def number(self, name: str) -> list[float]:
        return self.samples.numbers[:, column(name)].tolist()

    def fill(self, slot: int) -> torch.Tensor:
        rows = torch.randn(self.samples.points.shape[1:])
        self.samples.points[slot] = rows.to(self.samples.points.device)
        return self.samples.points[slot].clone()


def everything(case: Case) -> list[torch.Tensor]:
    s = case.samples
    return [t.clone() for t in (s.points, s.numbers, s.flags, s.sums, s.remaining, case.value)]


def assert_equal(actual, expected) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


ADVANCES = {
    "plain": (3, lambda case, k, limits: advance_plain(case.samples, k, limits)),
    "damped": (3, lambda case, k, limits: advance_plain(case.samples, k, limits, 0.7)),
    "heavy": (2, lambda case, k, limits: advance_heavy_ball(case.samples, case.value, k, limits)),
    "anderson": (2, lambda case, k, limits: anderson(case, k, limits)),
}
every_method = pytest.mark.parametrize("method", ADVANCES)


def anderson(case: Case, k: int, limits: Limits = LIMITS, window: int = 3, **options) -> History:
    batch, size = case.value.shape
    history = getattr(case, "history", None)
    if history is None:
        rows = case.value.new_full((2, batch, window + 1, size), math.nan)
        gram = rows.new_full((batch, window + 1, window + 1), math.nan, dtype=torch.float64)
        history = case.history = History(rows[0], rows[1], gram)
    history.f[:, k % (window + 1)] = case.value
    advance_anderson(case.samples, history, k, limits, **{**OPTIONS, **options})
    return history


def advance(case: Case, method: str, k: int, limits: Limits = LIMITS) -> None:
    """One advance of whole rows: random ones where an evaluation has left some."""
    slots, run = ADVANCES[method]
    case.fill(k % slots)
    if slots == 3 or k > 0:
        case.fill((k + 1) % slots)
    case.value = torch.randn(case.value.shape).to(case.value.device)
    run(case, k, limits)
