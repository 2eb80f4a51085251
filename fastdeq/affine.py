"""The whole solve of an affine cell as one operator, in plain PyTorch.

Forward  ``z = phi(W z + c)``;  adjoint  ``q = D (g + q W)`` with ``D = phi'(W z* + c)``. Both are
the driver's loop around one product with W; input narrower than float32 is solved in float32. Every
device has this form, and it is what a faster one is tested against.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import driver, extension, ops
from .activations import ACTIVATIONS
from .choices import check_choice
from .solution import Solution
from .solvers import SOLVERS, Solver
from .solvers.base import AffineMap

Outputs = tuple[Tensor, ...]


def encode(solver: Solver) -> tuple[str, list[float]]:
    """A registered solver as an operator's arguments: its name and its options in order."""
    fields = dataclasses.fields(solver)  # type: ignore[arg-type]
    return solver.name, [float(getattr(solver, f.name)) for f in fields]


def _solver(name: str, options: Sequence[float]) -> Solver:
    check_choice(name, SOLVERS, "solver")
    return SOLVERS[name](*options)


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype a solve runs in: float64 where any input has it, otherwise float32."""
    wide = any(t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


class UnitRows(NamedTuple):
    """Rows of unit norm ``(B, n)`` and what they were multiplied by."""

    rows: Tensor
    norm: Tensor  # (B, 1)
    largest: Tensor  # (B, 1)

    def restore(self, rows: Tensor) -> Tensor:
        """Rows in the scale of the original ones; a step at a time, as the norm may overflow."""
        return rows * self.norm * self.largest


def unit_rows(grad: Tensor, least: Tensor | None = None) -> UnitRows:
    """Scales rows ``(B, n)`` to unit norm; a row of zeros stays as it is.

    No row is divided by less than ``least`` ``(B, 1)``: then its norm stays below 1.

    A linear solve is homogeneous, its stop test is not: next to ``base.RESIDUAL_EPS`` a small
    gradient (the mean over a large batch, say) would pass for a solved one.
    """
    # Twice: squares of entries below 1e-19 vanish in float32, and of entries above overflow.
    largest = grad.abs().amax(1, keepdim=True) if grad.shape[1] else grad.new_ones(len(grad), 1)
    if least is not None:
        largest = torch.maximum(largest, least)
    largest = torch.where(largest > 0, largest, 1.0)
    scaled = grad / largest
    norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    norm = torch.where(norm > 0, norm, 1.0) if least is None else norm.clamp(min=1.0)
    return UnitRows(scaled / norm, norm, largest)


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
    *,
    anderson_mix: Callable[..., Any] | None = None,
) -> Outputs:
    """Solves ``z = phi(z W^T + c)``: weight ``(d, d)``, injection and start ``(B, d)``.

    With ``slope`` the last output but one is ``phi'(z W^T + c)`` ``(B, d)`` at the value, 0 for
    samples that ended NONFINITE. The last one is what a faster form has prepared of a weight that
    is said to be ``symmetric``, for its adjoint: bytes, here none.
    """
    dtype = working_dtype(weight, injection, *([] if start is None else [start]))
    w, c = weight.to(dtype), injection.to(dtype)
    with torch.autocast(weight.device.type, enabled=False):
        solution = driver.solve(
            AffineMap(c, lambda z: z @ w.t(), activation=ACTIVATIONS[activation]),
            torch.zeros_like(c) if start is None else start.to(dtype),
            _solver(solver, solver_options),
            tol=tol,
            max_iter=max_iter,
            anderson_mix=anderson_mix or torch.ops.fastdeq.anderson_mix,
            # W 0 = 0: no product for the evaluation at zero.
            start_value=ACTIVATIONS[activation].function(c) if start is None else None,
        )
        value_slope = c.new_empty(0)
        if slope:
            pre = torch.addmm(c, solution.value, w.t())
            value_slope = ACTIVATIONS[activation].slope(pre)
            value_slope = torch.where(solution.nonfinite.unsqueeze(1), 0.0, value_slope)
    packed = injection.new_empty(0, dtype=torch.uint8)
    return *_outputs(solution, injection.dtype), value_slope, packed


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
    *,
    anderson_mix: Callable[..., Any] | None = None,
) -> Outputs:
    """Solves ``q = D (g + q W)``: weight ``(d, d)``, slope D and grad g ``(B, d)``.

    A row of g that is not finite gives NaN: gradient scalers look for it. A row of zeros in D gives
    zeros, whatever g is.
    """
    dtype = working_dtype(weight, slope, grad)
    w, d = weight.to(dtype), slope.to(dtype)
    grad = torch.where(d.any(1, keepdim=True), grad, 0.0)
    # Rows with |D g| = 1, so that the solution is about as large, or less where |g| would leave the
    # range of the dtype. Nothing depends on g where D is 0; what is not finite is seen below.
    g = torch.where(d == 0, 0.0, grad.to(dtype))
    unit = unit_rows(d * g, least=1e-30 * g.abs().amax(1, keepdim=True) if g.shape[1] else None)
    g = g / unit.largest / unit.norm
    with torch.autocast(weight.device.type, enabled=False):
        solution = driver.solve(
            AffineMap(g, lambda q: q @ w, slope=d),
            torch.zeros_like(g),
            _solver(solver, solver_options),
            tol=tol,
            max_iter=max_iter,
            anderson_mix=anderson_mix or torch.ops.fastdeq.anderson_mix,
            start_value=d * g,
        )
    value = torch.where(
        grad.isfinite().all(1, keepdim=True), unit.restore(solution.value), torch.nan
    )
    return _outputs(solution.with_value(value), grad.dtype)


BODIES: dict[str, Callable[..., Outputs]] = {
    "solve_affine": solve_affine,
    "solve_affine_adjoint": solve_affine_adjoint,
}
for _name, _body in BODIES.items():
    for _suffix in ("", "_reference"):
        torch.library.impl(f"fastdeq::{_name}{_suffix}", "CompositeExplicitAutograd")(_body)


def _outputs(solution: Solution, dtype: torch.dtype) -> Outputs:
    counters = list(solution.rejects.values())
    rejects = (
        torch.stack(counters, 1)
        if counters
        else solution.iterations.new_empty(len(solution.iterations), 0)
    )
    # An operator's outputs must not alias its inputs or each other.
    value = solution.value.to(dtype, copy=True, memory_format=torch.contiguous_format)
    return value, solution.status, solution.iterations, solution.residual, rejects


def _fake(value: Tensor, solver: str, *inputs: Tensor) -> Outputs:
    batch = value.shape[0]
    return (
        torch.empty_like(value, memory_format=torch.contiguous_format),
        value.new_empty(batch, dtype=torch.int8),
        value.new_empty(batch, dtype=torch.int32),
        value.new_empty(batch, dtype=working_dtype(*inputs)),
        value.new_empty(batch, len(SOLVERS[solver].rejects), dtype=torch.int32),
    )


def _solve_affine_fake(
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
) -> Outputs:
    outputs = _fake(injection, solver, *(t for t in (weight, injection, start) if t is not None))
    shape = injection.shape if slope else (0,)
    value_slope = injection.new_empty(shape, dtype=outputs[3].dtype)
    return *outputs, value_slope, injection.new_empty(0, dtype=torch.uint8)


def _solve_affine_engine_fake(
    weight: Tensor, injection: Tensor, *args: Any, symmetric: bool = False
) -> Outputs:
    outputs = _solve_affine_fake(weight, injection, *args)
    symmetric = symmetric or (len(args) > 8 and args[8])
    if not symmetric or extension.why_missing or injection.device.type != "cpu":
        return outputs
    size = injection.shape[1]
    room = 64 + (size + 63) // 64 * 64 * (8 * size + 64)  # csrc/cpu/packed_weight.h
    return *outputs[:-1], injection.new_empty(room, dtype=torch.uint8)


def _solve_affine_adjoint_fake(
    weight: Tensor, slope: Tensor, grad: Tensor, solver: str, *_: Any
) -> Outputs:
    return _fake(grad, solver, weight, slope, grad)


torch.library.register_fake("fastdeq::solve_affine")(_solve_affine_engine_fake)
torch.library.register_fake("fastdeq::solve_affine_adjoint")(_solve_affine_adjoint_fake)
for _suffix in ops.FORMS:
    torch.library.register_fake(f"fastdeq::solve_affine{_suffix}")(_solve_affine_fake)
    torch.library.register_fake(f"fastdeq::solve_affine_adjoint{_suffix}")(
        _solve_affine_adjoint_fake
    )
