"""Samples at one evaluation, for tests of the solvers' kernels in steps/.

Buffers start as NaN, so that a row that is read without having been written is seen.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from fastdeq.kernels.steps import judge, sample
from fastdeq.kernels.steps.anderson_steps import History, advance_anderson
from fastdeq.kernels.steps.momentum import advance_heavy_ball
from fastdeq.kernels.steps.plain_steps import advance_plain
from fastdeq.kernels.steps.sample import Samples

from fastdeq.solvers import Anderson, Picard
from fastdeq.solvers.solve_options import SolveOptions

FULL, LOW, STOPPED = (c.value for c in (sample.FULL, sample.LOW, sample.STOPPED))
STATUSES = {
    name: getattr(judge, name).value
    for name in ("CONVERGED", "MAX_ITER", "STAGNATED", "NONFINITE", "RUNNING")
}
OPTIONS = dataclasses.replace(
    SolveOptions.of(Anderson(window=3, rank_tolerance=1e-10), tol=1e-4, max_iter=50), patience=3
)
PLAIN = dataclasses.replace(SolveOptions.of(Picard(), tol=1e-4, max_iter=50), patience=3)
INFINITE = (
    "BEST",
    "NORM",
    "NORM_1",
    "NORM_2",
    "NORM_TO_HALVE",
    "LAST_FULL",
    "GOAL",
    "TRUSTED_NORM",
    "LEAST_NORM",
    "HALF_NOW",
    "HALF_BEFORE",
)


def options(**changes) -> SolveOptions:
    return dataclasses.replace(OPTIONS, **changes)


def column(name: str) -> int:
    return getattr(sample, name).value


class Case:
    """B samples at an evaluation of ``kind``, with the residual norms and sizes it found."""

    def __init__(
        self, device, slots, norm, size=33, *, scale=1.0, kind=FULL, schedule=False, tiles=3
    ):
        norm = torch.tensor(norm, dtype=torch.float32)
        batch = len(norm)
        nan = {"fill_value": math.nan, "device": device}
        sums = torch.rand(batch, tiles, 2)  # how a sum is spread over tiles does not matter
        sums /= sums.sum(1, keepdim=True)
        sums = sums.sqrt()  # norms of tiles
        sums[:, :, 0] *= norm[:, None]
        sums[:, :, 1] *= scale
        change = torch.full((batch, size), dtype=torch.bfloat16, **nan) if schedule else None
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
        self.set(REQUESTED=kind, EVALUATED=kind, LOWEST=LOW if schedule else FULL)
        self.set(**dict.fromkeys(INFINITE, math.inf), OMEGA=1.0, PREVIOUS_OMEGA=1.0, RADIUS=0.5)

    def set(self, **columns) -> Case:
        """Of a best residual follow, for values of norm 1, the norms that patience compares."""
        if columns.get("BEST", math.inf) < math.inf:
            best = columns["BEST"]
            columns = {"LEAST_NORM": best, "HALF_NOW": best, "HALF_BEFORE": best} | columns
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


def anderson(case: Case, k: int, options: SolveOptions = OPTIONS) -> History:
    batch, size = case.value.shape
    history = getattr(case, "history", None)
    slots = options.window + 1
    if history is None:
        rows = case.value.new_full((2, batch, slots, size), math.nan)
        gram = rows.new_full((batch, slots, slots), math.nan, dtype=torch.float64)
        history = case.history = History(rows[0], rows[1], gram)
    history.f[:, k % slots] = case.value
    advance_anderson(case.samples, history, k, options)
    return history


def _damped(case: Case, k: int, options: SolveOptions) -> None:
    advance_plain(case.samples, k, dataclasses.replace(options, damping=0.7))


# By method: slots of points, and what follows evaluation k.
ADVANCES = {
    "plain": (3, lambda case, k, options: advance_plain(case.samples, k, options)),
    "damped": (3, _damped),
    "heavy": (2, lambda case, k, options: advance_heavy_ball(case.samples, case.value, k, options)),
    "anderson": (2, anderson),
}
every_method = pytest.mark.parametrize("method", ADVANCES)


def advance(case: Case, method: str, k: int, options: SolveOptions = OPTIONS) -> None:
    """What follows an evaluation of whole rows: random ones where it has left some."""
    slots, run = ADVANCES[method]
    case.fill(k % slots)
    if slots == 3 or k > 0:
        case.fill((k + 1) % slots)
    case.value = torch.randn(case.value.shape).to(case.value.device)
    run(case, k, options)
