"""Whole solves of small affine cells, one launch each: what whole_kernel.py is launched with.

No GPU has run it: the limits and tile shapes below are choices, made so that no register is
spilled, and not measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
from torch import Tensor

from ..solvers import SOLVERS
from .activations import INDEX
from .tile_choice import default_precision
from .whole_kernel import ANDERSON, HEAVY_BALL, PLAIN, whole_solve_kernel

_METHODS = {"picard": PLAIN, "neumann": PLAIN, "heavy_ball": HEAVY_BALL, "anderson": ANDERSON}
MOST = 128  # the largest n
MOST_WINDOW = 8  # where the small solve still fits the registers


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
    solver: str,
    options: Sequence[float],
    size: int,
    dtype: torch.dtype,
    shared_memory: int | None = None,
) -> str:
    """Why a solve in ``dtype`` is not served on a device with so many bytes of shared memory for a
    block; empty where it is."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it solves in float32, not in {dtype}"
    if solver not in _METHODS:
        return f"it has no solver {solver!r}, only {', '.join(map(repr, _METHODS))}"
    if solver == "anderson" and options[0] > MOST_WINDOW:
        return f"its Anderson window is at most {MOST_WINDOW}"
    if size > MOST:
        return f"its size is at most {MOST}"
    if shared_memory is not None and shared_bytes(size) > shared_memory:
        return f"size {size} needs {shared_bytes(size)} bytes of shared memory in a block"
    return ""


def _solve(
    weight: Tensor,
    offset: Tensor,
    slope: Tensor | None,
    start: Tensor | None,
    activation: int,
    solver: str,
    options: Sequence[float],
    tol: float,
    max_iter: int,
    with_slope: bool,
) -> tuple[Tensor, ...]:
    """``weight`` is M of ``rows @ M.T``."""
    batch, size = offset.shape
    kind, method = SOLVERS[solver], _METHODS[solver]
    fixed = int(options[1]) if method.value == PLAIN.value else 0
    window = int(options[0]) if solver == "anderson" else 0
    block, padded, chunk, warps = tile_shape(size, solver)
    damping = options[1] if solver == "anderson" else options[0]
    value = torch.empty_like(offset, memory_format=torch.contiguous_format)
    status = offset.new_empty(batch, dtype=torch.int8)
    iterations = offset.new_empty(batch, dtype=torch.int32)
    residual = offset.new_empty(batch, dtype=torch.float32)
    rejects = offset.new_empty(batch, len(kind.rejects), dtype=torch.int32)
    value_slope = offset.new_empty(offset.shape if with_slope else (0,), dtype=torch.float32)
    programs = triton.cdiv(batch, block)
    f = g = gram = weights = notes = None
    if window:
        rows = programs * block
        f = offset.new_empty((window + 1) * rows * padded, dtype=torch.float32)
        g = torch.empty_like(f)
        gram = offset.new_empty((window + 1) ** 2 * rows, dtype=torch.float64)
        weights = offset.new_empty(window * rows, dtype=torch.float32)
        notes = offset.new_empty(2 * rows, dtype=torch.int32)
    small = [float(o) for o in options[2:]] if window else [0.0] * 5
    # Triton launches on the current device, which need not be the one that holds the tensors.
    with torch.cuda.device_of(offset) if offset.is_cuda else nullcontext():
        whole_solve_kernel[(programs,)](
            weight,
            offset,
            slope,
            start,
            value,
            status,
            iterations,
            residual,
            rejects if window else None,
            value_slope if with_slope else None,
            *(f, g, gram, weights, notes),
            batch,
            size,
            weight.stride(1),
            weight.stride(0),
            fixed or max_iter,
            kind.patience,
            tol,
            float(damping),
            *small,
            SOLVER=method.value,
            ACTIVATION=activation,
            FIXED=fixed > 0,
            DAMPED=solver != "heavy_ball" and damping != 1,
            WINDOW=window,
            OLDER=triton.next_power_of_2(window + 1),
            BLOCK_M=block,
            SIZE=padded,
            CHUNK=chunk,
            PRECISION=default_precision(offset),
            num_warps=warps,
        )
    return value, status, iterations, residual, rejects, value_slope


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
    outputs = _solve(
        *(weight, injection.contiguous(), None, None if start is None else start.contiguous()),
        *(INDEX[activation], solver, solver_options, tol, max_iter, slope),
    )
    return *outputs, injection.new_empty(0, dtype=torch.uint8)


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
    outputs = _solve(
        *(weight.t(), grad.contiguous(), slope.contiguous(), None),
        *(-1, solver, solver_options, tol, max_iter, False),
    )
    return outputs[:5]
