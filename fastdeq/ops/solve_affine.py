"""``fastdeq::solve_affine``: the solve of an affine cell, ``z = phi(z W^T + c)``, as one operator.

The engine is an argument. In C++ there are "cpp" (csrc/cpu/solve_affine.cpp, CPU tensors) and
"persistent" (csrc/cuda/persistent.cu, CUDA tensors), which pass every other one on to this file:
"whole" and "steps" (kernels/), and "reference", what all of them are tested against.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
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
    "fastdeq::solve_affine",
    "(Tensor weight, Tensor injection, Tensor? start, str activation, bool with_slope, "
    f"Tensor? packed, bool bitwise_symmetric, str engine, {SCHEMA}) -> (Tensor value, "
    "Tensor status, Tensor iterations, Tensor residual, Tensor rejects, Tensor slope)",
)


def solve_affine(
    weight: Tensor,
    injection: Tensor,
    start: Tensor | None,
    activation: str,
    with_slope: bool,
    packed: Tensor | None,
    bitwise_symmetric: bool,
    engine: str,
    *options: Any,
) -> Outputs:
    """Solves ``z = phi(z W^T + c)``: weight ``(d, d)``, injection and start ``(B, d)``.

    Without a start it starts from zeros. ``packed`` is what ``pack_weight`` returned for a weight
    that is ``bitwise_symmetric``; an engine that has no use for it does without. ``options`` are
    the fields of ``SolveOptions``.

    Returns:
        What ``solve_common`` lists; with ``with_slope`` ``phi'(z W^T + c)`` ``(B, d)`` at the
        value, 0 for samples that ended NONFINITE, else an empty tensor.
    """
    how = SolveOptions(*options)
    dtype = working_dtype(weight, injection, start)
    chosen = resolve_engine(engine, how, dtype, injection)
    if chosen == "reference":
        return reference(weight, injection, start, activation, with_slope, how)
    if chosen in TRITON_ENGINES:
        implementation = triton_engine(chosen, "solve_affine")
        return implementation(weight, injection, start, activation, with_slope, how)
    if chosen == engine:
        raise not_here(engine, injection)
    again = torch.ops.fastdeq.solve_affine.default
    fixed = (weight, injection, start, activation, with_slope, packed, bitwise_symmetric)
    return again(*fixed, chosen, *options)  # type: ignore[no-any-return]


def reference(
    weight: Tensor,
    injection: Tensor,
    start: Tensor | None,
    activation: str,
    with_slope: bool,
    options: SolveOptions,
) -> Outputs:
    """The solve in plain PyTorch: the loop around one product with W. Input narrower than float32
    is solved in float32."""
    dtype = working_dtype(weight, injection, start)
    w, c = weight.to(dtype), injection.to(dtype)
    phi, kind = ACTIVATIONS[activation], solver_class(options.solver)
    with torch.autocast(weight.device.type, enabled=False):
        solution = solve(
            AffineMap(c, lambda z: z @ w.t(), activation=phi),
            torch.zeros_like(c) if start is None else start.to(dtype),
            kind(**options.solver_arguments(kind)),
            tol=options.tol,
            max_iter=options.max_iter,
            atol=options.atol,
            patience=options.patience,
            stop_norm=options.stop_norm,
            min_iter=options.min_iter,
            anderson_mix=anderson_mix.reference,
            # W 0 = 0: no product for the evaluation at zero.
            start_value=phi.function(c) if start is None else None,
        )
        slope = c.new_empty(0)
        if with_slope:
            slope = phi.slope(torch.addmm(c, solution.value, w.t()))
            slope = torch.where(solution.nonfinite.unsqueeze(1), 0.0, slope)
    return *as_outputs(solution, injection.dtype), slope


torch.library.impl("fastdeq::solve_affine", "CompositeExplicitAutograd", solve_affine)


@torch.library.register_fake("fastdeq::solve_affine")
def _fake(
    weight: Tensor,
    injection: Tensor,
    start: Tensor | None,
    activation: str,
    with_slope: bool,
    packed: Tensor | None,
    bitwise_symmetric: bool,
    engine: str,
    *options: Any,
) -> Outputs:
    how = SolveOptions(*options)
    dtype = working_dtype(weight, injection, start)
    return (
        *fake_outputs(injection, dtype, how.solver),
        injection.new_empty(injection.shape if with_slope else (0,), dtype=dtype),
    )
