"""``fastdeq::solve_affine_adjoint``: the adjoint of an affine cell, ``q = D (g + q W)``, as one
operator. Engines as in solve_affine.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..constants import LEAST_SCALE
from ..solution import may_look
from ..solvers import SolveOptions
from ..solvers.base import AffineMap
from ..solvers.loop import solve
from ..solvers.solve_options import SCHEMA
from . import anderson_mix
from .solve_common import (
    TRITON_ENGINES,
    Outputs,
    as_outputs,
    fake_outputs,
    not_here,
    resolve_engine,
    solver_class,
    triton_engine,
    working_dtype,
)

torch.library.define(
    "fastdeq::solve_affine_adjoint",
    "(Tensor weight, Tensor slope, Tensor grad, Tensor? packed, bool bitwise_symmetric, "
    f"str engine, {SCHEMA}) -> (Tensor value, Tensor status, Tensor iterations, Tensor residual, "
    "Tensor rejects)",
)


def solve_affine_adjoint(
    weight: Tensor,
    slope: Tensor,
    grad: Tensor,
    packed: Tensor | None,
    bitwise_symmetric: bool,
    engine: str,
    *options: Any,
) -> Outputs:
    """Solves ``q = D (g + q W)``: weight ``(d, d)``, slope D and grad g ``(B, d)``.

    A row of g that is not finite gives NaN: gradient scalers look for it. A row of zeros in D gives
    zeros, whatever g is. ``packed`` and ``options`` as in solve_affine.py.
    """
    how = SolveOptions(*options)
    dtype = working_dtype(weight, slope, grad)
    chosen = resolve_engine(engine, how, dtype, grad)
    if chosen == "reference":
        return reference(weight, slope, grad, how)
    if chosen in TRITON_ENGINES:
        return triton_engine(chosen, "solve_affine_adjoint")(weight, slope, grad, how)
    if chosen == engine:
        raise not_here(engine, grad)
    again = torch.ops.fastdeq.solve_affine_adjoint.default
    fixed = (weight, slope, grad, packed, bitwise_symmetric)
    return again(*fixed, chosen, *options)  # type: ignore[no-any-return]


class UnitRows(NamedTuple):
    """Rows of unit norm ``(B, n)`` and what they were multiplied by."""

    rows: Tensor
    norm: Tensor  # (B, 1)
    largest: Tensor  # (B, 1)

    def factors(self) -> Tensor | None:
        """``(B,)``: what the original rows were multiplied by; None unless it is known, without
        waiting for a device, that these are finite numbers above 0, as for rows that are finite and
        of no extreme size."""
        if self.norm.device.type != "cpu" or not may_look(self.norm):
            return None
        factors = (1 / self.norm / self.largest)[:, 0]
        usable = bool((factors.isfinite() & (factors > 0)).all())
        return factors if usable else None

    def restore(self, rows: Tensor) -> Tensor:
        """Rows in the scale of the original ones; a step at a time, as the norm may overflow."""
        restored = rows * self.norm
        return restored * self.largest if restored.requires_grad else restored.mul_(self.largest)


def unit_rows(grad: Tensor, least: Tensor | None = None) -> UnitRows:
    """Scales rows ``(B, n)`` to unit norm; a row of zeros stays as it is.

    No row is divided by less than ``least`` ``(B, 1)``: then its norm stays below 1.

    A linear solve is homogeneous, its stop test is not: next to ``RESIDUAL_EPS`` a small gradient
    (the mean over a large batch, say) would pass for a solved one.
    """
    # Twice: squares of entries below 1e-19 vanish in float32, and of entries above overflow.
    largest = grad.abs().amax(1, keepdim=True) if grad.shape[1] else grad.new_ones(len(grad), 1)
    if least is not None:
        largest = torch.maximum(largest, least)
    largest = torch.where(largest == 0, 1.0, largest)  # NaN stays: such rows have no scale
    scaled = grad / largest
    norm = torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    norm = torch.where(norm > 0, norm, 1.0) if least is None else norm.clamp(min=1.0)
    unit = scaled / norm if scaled.requires_grad else scaled.div_(norm)
    return UnitRows(unit, norm, largest)


def as_they_are(grad: Tensor) -> UnitRows:
    """Rows that are not scaled: those of other processes, in an equation that they solve together,
    would be scaled differently. For counts that no residual ends."""
    one = torch.where(grad.isfinite().all(1, keepdim=True), 1.0, torch.nan).to(grad.dtype)
    return UnitRows(grad, one, torch.ones_like(one))


def reference(weight: Tensor, slope: Tensor, grad: Tensor, options: SolveOptions) -> Outputs:
    """The solve in plain PyTorch: the loop around one product with W."""
    dtype = working_dtype(weight, slope, grad)
    w, d = weight.to(dtype), slope.to(dtype)
    grad = torch.where(d.any(1, keepdim=True), grad, 0.0)
    # Rows with |D g| = 1, so that the solution is about as large, or less where |g| would leave the
    # range of the dtype. Nothing depends on g where D is 0; what is not finite is seen below.
    g = torch.where(d == 0, 0.0, grad.to(dtype))
    least = LEAST_SCALE * g.abs().amax(1, keepdim=True) if g.shape[1] else None
    unit = unit_rows(d * g, least)
    g = g / unit.largest / unit.norm
    kind = solver_class(options.solver)
    with torch.autocast(weight.device.type, enabled=False):
        solution = solve(
            AffineMap(g, lambda q: q @ w, slope=d),
            torch.zeros_like(g),
            kind(**options.solver_arguments(kind)),
            tol=options.tol,
            max_iter=options.max_iter,
            atol=options.atol,
            patience=options.patience,
            stop_norm=options.stop_norm,
            min_iter=options.min_iter,
            anderson_mix=anderson_mix.reference,
            start_value=d * g,
        )
    finite = grad.isfinite().all(1, keepdim=True)
    value = torch.where(finite, unit.restore(solution.value), torch.nan)
    return as_outputs(solution.with_value(value), grad.dtype)


torch.library.impl(
    "fastdeq::solve_affine_adjoint", "CompositeExplicitAutograd", solve_affine_adjoint
)


@torch.library.register_fake("fastdeq::solve_affine_adjoint")
def _fake(
    weight: Tensor,
    slope: Tensor,
    grad: Tensor,
    packed: Tensor | None,
    bitwise_symmetric: bool,
    engine: str,
    *options: Any,
) -> Outputs:
    how = SolveOptions(*options)
    return fake_outputs(grad, working_dtype(weight, slope, grad), how.solver)
