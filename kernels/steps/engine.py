"""The solve of an affine cell as two launches per iteration; nothing waits for the device.

Symbols: B samples of size n; W the weight (n, n), c the injection, D the slope and g the right-hand
side of an adjoint; k the number of an evaluation.

    z = phi(W z + c)    or    q = D (g + q W)

    begin, evaluate, advance, evaluate, advance, ... end

Evaluation k reads ``points[k % P]`` and writes its value where the solver has it; the solver's
kernel judges it and writes the next point, see sample.py. Evaluation 0 at zero needs no product.
The device counts the samples that still run. The host copies that number to its own memory every
few iterations and looks whether the copy has arrived, but does not wait for it: launches after the
last sample has stopped find nothing to do. With a fixed number of iterations, and while a CUDA
graph is captured, it does not look.

The precision schedule: low-precision evaluations read a copy of W in bfloat16, made once. The last
evaluation of a sample is always in full precision. For large n the library computes the products
that every row may use, see library_product.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...solvers.solve_options import SolveOptions
from ..activations import INDEX
from ..launch import Outputs, empty_outputs, empty_slope, on_device, why_no_dtype
from . import affine_step as step
from . import begin_end, library_product, sample
from .affine_tile import sums_of
from .anderson_steps import AndersonSteps
from .energy import EnergySteps
from .minres import MinresSteps
from .momentum import HeavyBallSteps
from .plain_steps import PlainSteps
from .sample import Samples, Steps

SOLVER_STEPS: dict[str, type[Steps]] = {
    "picard": PlainSteps,
    "neumann": PlainSteps,
    "heavy_ball": HeavyBallSteps,
    "anderson": AndersonSteps,
    "energy": EnergySteps,
    "minres": MinresSteps,
}
SCHEDULE_FROM = 512  # the smallest n for which precision="auto" is "mixed"
LOOK_EVERY = 4  # iterations


def why_not(options: SolveOptions, dtype: torch.dtype) -> str:
    """Why a solve in ``dtype`` is not supported; empty where it is."""
    if options.solver not in SOLVER_STEPS:
        return f"it has no solver {options.solver!r}, only {', '.join(map(repr, SOLVER_STEPS))}"
    return why_no_dtype(dtype) or SOLVER_STEPS[options.solver].why_not(options)


class DelayedCount:
    """How many samples run, as far as that is known without waiting. To be used while their device
    is the current one."""

    def __init__(self, remaining: Tensor, options: SolveOptions):
        self.remaining = remaining
        capturing = remaining.is_cuda and torch.cuda.is_current_stream_capturing()
        self.looks = not options.fixed_iterations and not capturing
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
class Evaluations:
    """Evaluates points: ``weight`` is M of ``rows @ M.T``, float32."""

    samples: Samples
    weight: Tensor
    activation: int | None  # None: an adjoint
    low_weight: Tensor | None  # M in bfloat16, with the precision schedule
    product: Tensor | None  # (B, n): the library computes the products

    def at(
        self,
        point: Tensor,
        value: Tensor,
        residual: Tensor | None = None,
        *,
        at_zero: bool = False,
        schedule: bool = True,
    ) -> None:
        """``schedule``: rows may have requested low precision."""
        low_weight = self.low_weight if schedule else None
        product = None if at_zero else self.product
        if product is not None and low_weight is not None:
            library_product.low_product(self.samples.change, low_weight, product)
        elif product is not None:
            if library_product.keeps_float32(point.device):
                library_product.full_product(point, self.weight, product)
            else:
                product = None
        step.affine_step(
            self.samples,
            self.weight,
            low_weight,
            point,
            value,
            residual,
            self.activation,
            at_zero=at_zero,
            product=product,
        )


def _prepare(
    weight: Tensor,
    offset: Tensor,
    slope: Tensor | None,
    activation: int | None,
    options: SolveOptions,
    with_slope: bool,
) -> tuple[Evaluations, Steps]:
    """``weight`` is M of ``rows @ M.T``; the samples have not begun."""
    batch, size = offset.shape
    kind = SOLVER_STEPS[options.solver]
    schedule = options.precision == "mixed" or (
        options.precision == "auto" and size >= SCHEDULE_FROM
    )
    schedule = schedule and kind.has_low_precision(options)
    samples = Samples(
        points=offset.new_empty(kind.slots + 1, batch, size),
        pre=torch.empty_like(offset) if with_slope or schedule or kind.needs_pre else None,
        sums=offset.new_empty(batch, sums_of(size), 2),
        numbers=offset.new_empty(batch, sample.NUMBERS.value),
        flags=offset.new_empty(batch, sample.FLAGS.value, dtype=torch.int32),
        remaining=torch.full((1,), batch, dtype=torch.int32, device=offset.device),
        offset=offset,
        slope=slope,
        change=torch.empty_like(offset, dtype=torch.bfloat16) if schedule else None,
    )
    weight = weight.float()
    evaluations = Evaluations(
        samples=samples,
        weight=weight,
        activation=activation,
        low_weight=weight.bfloat16() if schedule else None,
        product=torch.empty_like(offset) if size >= library_product.FROM_SIZE else None,
    )
    return evaluations, kind(samples, options, activation)


def _iterate(evaluations: Evaluations, steps: Steps, *, at_zero: bool) -> None:
    samples, options = steps.samples, steps.options
    with on_device(samples.points):
        count = DelayedCount(samples.remaining, options)
        for k in range(options.updates + 1):
            point = samples.points[k % samples.slots]
            first = at_zero and k == 0
            evaluations.at(point, steps.value(k), steps.residual(k), at_zero=first)
            steps.advance(k)
            if count.all_stopped(k):
                break


def solve_affine(
    weight: Tensor,
    injection: Tensor,
    start: Tensor | None,
    activation: str,
    with_slope: bool,
    options: SolveOptions,
) -> tuple[Tensor, ...]:
    """``z = phi(z W^T + c)``, for what ``why_not`` has no objection to: value ``(B, n)``, status,
    iterations, residual, rejects and, ``with_slope``, phi' at the value, 0 for samples that ended
    NONFINITE."""
    offset = injection.float().contiguous()
    index = INDEX[activation]
    evaluations, steps = _prepare(weight, offset, None, index, options, with_slope)
    samples = steps.samples
    start = None if start is None else start.contiguous()
    begin_end.begin(samples, start=start, **steps.begins(options))
    _iterate(evaluations, steps, at_zero=start is None)
    outputs = empty_outputs(injection, options)
    slope = empty_slope(offset, with_slope)
    begin_end.end(samples, outputs, with_slope)
    if with_slope:
        with on_device(offset):
            evaluations.at(samples.points[-1], samples.points[0], schedule=False)
        begin_end.slope_of(samples, index, slope)
    return *outputs, slope


def solve_affine_adjoint(
    weight: Tensor, slope: Tensor, grad: Tensor, options: SolveOptions
) -> Outputs:
    """``q = D (g + q W)``, for what ``why_not`` has no objection to. A row of g that is not finite
    gives NaN, a row of zeros in D gives zeros."""
    grad = grad.contiguous()
    offset = torch.empty_like(grad, dtype=torch.float32)
    evaluations, steps = _prepare(
        weight.t(), offset, slope.float().contiguous(), None, options, False
    )
    begin_end.begin(steps.samples, grad=grad, **steps.begins(options))
    _iterate(evaluations, steps, at_zero=True)
    outputs = empty_outputs(grad, options)
    begin_end.end(steps.samples, outputs, with_slope=False)
    return outputs
