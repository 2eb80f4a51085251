"""The whole solve of an affine cell as two launches per iteration; nothing waits for the device.

Symbols: B samples of size n; W the weight (n, n), c the injection, D the slope and g the right-hand
side of an adjoint; k the number of an evaluation.

    z = phi(W z + c)    or    q = D (g + q W)

    begin, evaluate, advance, evaluate, advance, ... unload

Evaluation k reads ``points[k % P]`` and writes its value where the method wants it; the advance
kernel judges it and writes the next point, see sample.py. Evaluation 0 at zero needs no product.
The device counts the samples that still run. The host copies that number to its own memory every
few iterations and looks whether the copy has arrived, but does not wait for it: launches after the
last sample has stopped find nothing to do. With a fixed number of iterations, and while a CUDA
graph is captured, it does not look.

The ramp: narrow evaluations read a copy of W in bfloat16, made once. The last evaluation of a
sample is always exact.

Compared with fastdeq/affine.py and with float64 by Triton's interpreter on a CPU. No GPU has run
this: the limits below are choices, not measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..solvers import SOLVERS, Picard
from . import affine_step as step
from . import load, sample
from .activations import INDEX
from .advance import on_device
from .methods import METHODS, Entry, Method, Problem, why_not
from .sample import Limits, Samples

__all__ = ["METHODS", "Entry", "solve_affine", "solve_affine_adjoint", "why_not"]

NARROW_FROM = 512  # the smallest n for which precision="auto" is "mixed"
LOOK_EVERY = 4  # iterations


class _Watch:
    """Whether samples still run, as far as that is known without waiting. To be used while their
    device is the current one."""

    def __init__(self, remaining: Tensor, fixed: bool):
        self.remaining = remaining
        capturing = remaining.is_cuda and torch.cuda.is_current_stream_capturing()
        self.looks = not fixed and not capturing
        self.arrived: torch.cuda.Event | None = None
        if self.looks and remaining.is_cuda:
            self.seen = torch.empty(1, dtype=torch.int32, pin_memory=True)

    def all_stopped(self, k: int) -> bool:
        if not self.looks:
            return False
        if not self.remaining.is_cuda:
            return int(self.remaining) == 0
        if self.arrived is not None and self.arrived.query():
            if int(self.seen) == 0:
                return True
            self.arrived = None
        if self.arrived is None and k % LOOK_EVERY == LOOK_EVERY - 1:
            self.seen.copy_(self.remaining, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()
        return False


@dataclass(frozen=True)
class _Solve:
    """What the forward solve and the adjoint have in common. ``weight`` is M of ``rows @ M.T``."""

    weight: Tensor
    samples: Samples
    activation: int | None
    narrow: Tensor | None  # M in bfloat16, with the ramp

    def evaluate(
        self, point: Tensor, value: Tensor, residual: Tensor | None = None, *, at_zero: bool = False
    ) -> None:
        samples, activation = self.samples, self.activation
        step.affine_step(
            samples, self.weight, self.narrow, point, value, residual, activation, at_zero
        )

    def run(self, method: Method, limits: Limits, at_zero: bool) -> None:
        samples = self.samples
        with on_device(samples.points):
            watch = _Watch(samples.remaining, limits.fixed)
            for k in range(limits.max_iter + 1):
                point = samples.points[k % samples.slots]
                at_start = at_zero and k == 0
                self.evaluate(point, method.value(k), method.residual(k), at_zero=at_start)
                method.advance(k)
                if watch.all_stopped(k):
                    break


def _outputs(like: Tensor, solver: str) -> tuple[Tensor, ...]:
    batch = len(like)
    return (
        torch.empty_like(like, memory_format=torch.contiguous_format),
        like.new_empty(batch, dtype=torch.int8),
        like.new_empty(batch, dtype=torch.int32),
        like.new_empty(batch, dtype=torch.float32),
        like.new_empty(batch, len(SOLVERS[solver].rejects), dtype=torch.int32),
    )


def _prepare(
    weight: Tensor,
    offset: Tensor,
    slope: Tensor | None,
    activation: int | None,
    solver: str,
    precision: str,
    keeps_pre: bool,
) -> _Solve:
    if precision not in ("auto", "float32", "mixed"):
        raise RuntimeError(f"precision must be 'auto', 'float32' or 'mixed', got {precision!r}")
    batch, size = offset.shape
    entry = METHODS[solver]
    ramp = precision == "mixed" or (precision == "auto" and size >= NARROW_FROM)
    keeps_pre = keeps_pre or ramp or entry.keeps_pre
    samples = Samples(
        points=offset.new_empty(entry.slots + 1, batch, size),
        pre=torch.empty_like(offset) if keeps_pre else None,
        sums=offset.new_empty(batch, step.sums_of(size), 2),
        numbers=offset.new_empty(batch, sample.NUMBERS.value),
        flags=offset.new_empty(batch, sample.FLAGS.value, dtype=torch.int32),
        remaining=torch.full((1,), batch, dtype=torch.int32, device=offset.device),
        offset=offset,
        slope=slope,
        change=torch.empty_like(offset, dtype=torch.bfloat16) if ramp else None,
    )
    weight = weight.float()
    narrow = weight.bfloat16() if ramp else None
    return _Solve(weight, samples, activation, narrow)


def _limits(solver: str, options: Sequence[float], tol: float, max_iter: int) -> Limits:
    kind = SOLVERS[solver]
    fixed = int(options[1]) if issubclass(kind, Picard) else 0
    return Limits(tol, fixed or max_iter, kind.patience, fixed > 0)


def solve_affine(
    weight: Tensor,
    injection: Tensor,
    start: Tensor | None,
    activation: str,
    solver: str,
    solver_options: Sequence[float],
    tol: float,
    max_iter: int,
    precision: str = "auto",
    slope: bool = False,
    symmetric: bool = False,
) -> tuple[Tensor, ...]:
    """As ``fastdeq.affine.solve_affine``, for what ``why_not`` has no objection to."""
    index = INDEX[activation]
    offset = injection.float().contiguous()
    solve = _prepare(weight, offset, None, index, solver, precision, slope)
    samples, entry = solve.samples, METHODS[solver]
    limits = _limits(solver, solver_options, tol, max_iter)
    start = None if start is None else start.contiguous()
    load.begin(samples, start=start, **entry.begin(solver_options))
    method = entry.make(Problem(samples, limits, solver_options, index))
    solve.run(method, limits, at_zero=start is None)
    outputs = _outputs(injection, solver)
    load.unload(samples, outputs, again=slope)
    value_slope = torch.empty_like(offset) if slope else offset.new_empty(0)
    if slope:
        solve.evaluate(samples.points[-1], samples.points[0])
        load.slope_of(samples, index, value_slope)
    return *outputs, value_slope, injection.new_empty(0, dtype=torch.uint8)


def solve_affine_adjoint(
    weight: Tensor,
    slope: Tensor,
    grad: Tensor,
    solver: str,
    solver_options: Sequence[float],
    tol: float,
    max_iter: int,
    precision: str = "auto",
    symmetric: bool = False,
    packed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """As ``fastdeq.affine.solve_affine_adjoint``, for what ``why_not`` has no objection to."""
    grad = grad.contiguous()
    d = slope.float().contiguous()
    offset = torch.empty_like(grad, dtype=torch.float32)
    solve = _prepare(weight.t(), offset, d, None, solver, precision, False)
    samples, entry = solve.samples, METHODS[solver]
    limits = _limits(solver, solver_options, tol, max_iter)
    load.begin(samples, grad=grad, **entry.begin(solver_options))
    method = entry.make(Problem(samples, limits, solver_options, None))
    solve.run(method, limits, at_zero=True)
    outputs = _outputs(grad, solver)
    load.unload(samples, outputs, again=False)
    return outputs
