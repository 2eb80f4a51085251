"""Whole solves of small affine cells, one launch each: what kernel.py is launched with.

The limits and tile shapes are choices, made so that no register is spilled in the loop, and not
measurements.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...solvers.solve_options import SolveOptions
from ..activations import INDEX
from ..launch import (
    Outputs,
    empty_outputs,
    empty_slope,
    limits,
    on_device,
    product_precision,
    why_no_dtype,
    window_of,
)
from .kernel import ANDERSON, HEAVY_BALL, PLAIN, whole_kernel

KERNEL_SOLVERS = {
    "picard": PLAIN,
    "neumann": PLAIN,
    "heavy_ball": HEAVY_BALL,
    "anderson": ANDERSON,
}
MOST = 128  # the largest n
MOST_WINDOW = 8


def tile_shape(size: int, solver: str) -> tuple[int, int, int, int]:
    """(BLOCK_M, SIZE, CHUNK, number of warps)."""
    padded = max(16, triton.next_power_of_2(size))
    warps = min(8, padded // 8)
    if solver == "anderson":
        warps = 4 if padded == 16 else 8
    return 16, padded, 8, warps


def shared_bytes(size: int) -> int:
    """Of a program: W and the points, each in two parts for "tf32x3"."""
    block, padded, _chunk, _warps = tile_shape(size, "picard")
    return 8 * padded * (padded + block)


def why_not(
    options: SolveOptions, size: int, dtype: torch.dtype, shared_memory: int | None = None
) -> str:
    """Why a solve in ``dtype`` is not supported on a device with so many bytes of shared memory for
    a block; empty where it is."""
    if options.solver not in KERNEL_SOLVERS:
        return f"it has no solver {options.solver!r}, only {', '.join(map(repr, KERNEL_SOLVERS))}"
    if options.precision == "mixed":
        return "it has no low-precision products"
    if window_of(options) > MOST_WINDOW:
        return f"its Anderson window is at most {MOST_WINDOW}"
    if size > MOST:
        return f"its size is at most {MOST}"
    if shared_memory is not None and shared_bytes(size) > shared_memory:
        return f"size {size} needs {shared_bytes(size)} bytes of shared memory in a block"
    return why_no_dtype(dtype)


def _solve(
    weight: Tensor,
    offset: Tensor,
    *,
    slope: Tensor | None = None,
    start: Tensor | None = None,
    activation: int = -1,
    with_slope: bool = False,
    options: SolveOptions,
) -> tuple[Outputs, Tensor]:
    """``weight`` is M of ``rows @ M.T``."""
    batch, size = offset.shape
    window = window_of(options)
    block, padded, chunk, warps = tile_shape(size, options.solver)
    outputs = empty_outputs(offset, options)
    value_slope = empty_slope(offset, with_slope)
    programs = triton.cdiv(batch, block)
    history = gram = None
    if window:
        rows, capacity = programs * block, window + 1
        history = offset.new_empty(2 * capacity * rows * padded, dtype=torch.float32)
        gram = offset.new_empty(rows * capacity * capacity, dtype=torch.float64)
    with on_device(offset):
        whole_kernel[(programs,)](
            w_ptr=weight,
            offset_ptr=offset,
            slope_ptr=slope,
            start_ptr=start,
            value_ptr=outputs.value,
            status_ptr=outputs.status,
            iterations_ptr=outputs.iterations,
            residual_ptr=outputs.residual,
            rejects_ptr=outputs.rejects if window else None,
            value_slope_ptr=value_slope if with_slope else None,
            history_ptr=history,
            gram_ptr=gram,
            batch=batch,
            size=size,
            w_stride_input=weight.stride(1),
            w_stride_output=weight.stride(0),
            **limits(options),
            damping=options.damping,
            radius=options.radius,
            regularization=options.regularization,
            rank_tolerance=options.rank_tolerance,
            max_weight=options.max_weight,
            safeguard=options.safeguard,
            accelerate_above=options.accelerate_above,
            SOLVER=KERNEL_SOLVERS[options.solver].value,
            ACTIVATION=activation,
            FIXED=options.fixed_iterations > 0,
            DAMPED=options.damping != 1,
            WINDOW=window,
            COLUMNS=triton.next_power_of_2(max(window, 1)),
            BLOCK_M=block,
            SIZE=padded,
            CHUNK=chunk,
            PRECISION=product_precision(offset),
            num_warps=warps,
        )
    return outputs, value_slope


def solve_affine(
    weight: Tensor,
    injection: Tensor,
    start: Tensor | None,
    activation: str,
    with_slope: bool,
    options: SolveOptions,
) -> tuple[Tensor, ...]:
    """``z = phi(z W^T + c)``, for what ``why_not`` has no objection to: as in steps/engine.py."""
    outputs, slope = _solve(
        weight,
        injection.contiguous(),
        start=None if start is None else start.contiguous(),
        activation=INDEX[activation],
        with_slope=with_slope,
        options=options,
    )
    return *outputs, slope


def solve_affine_adjoint(
    weight: Tensor, slope: Tensor, grad: Tensor, options: SolveOptions
) -> Outputs:
    """``q = D (g + q W)``, for what ``why_not`` has no objection to: as in steps/engine.py."""
    outputs, _ = _solve(weight.t(), grad.contiguous(), slope=slope.contiguous(), options=options)
    return outputs
