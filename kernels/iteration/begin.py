"""The beginning of an iteration of a general map: scalars of the samples, and settings. Columns:
state.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import constants
from ...solvers.solve_options import SolveOptions
from ..launch import limits, on_device
from ..steps import sample
from ..steps.begin_end import set_columns
from . import state


@triton.jit
def wide(x):
    """A number as float64: in the interpreter one that is not yet a tensor would be rounded."""
    return tl.full((), x, tl.float64)


@triton.jit(do_not_specialize=["max_iter", "patience"])
def begin_kernel(
    settings,
    flags,
    numbers,
    max_iter,
    patience,
    tol: tl.float64,
    atol: tl.float64,
    floor: tl.float64,
    largest: tl.float64,
    damping: tl.float64,
    radius: tl.float64,
    regularization: tl.float64,
    rank_tolerance: tl.float64,
    max_weight: tl.float64,
    safeguard: tl.float64,
    accelerate_above: tl.float64,
    PLAIN: tl.constexpr,  # no acceleration yet
):
    """Sets the columns of a sample, and the settings."""
    i = tl.program_id(0).to(tl.int64)
    row = sample.row_of(i, flags, numbers, numbers)
    set_columns(
        row=row,
        mode=sample.STEPS,
        lowest=sample.FULL,
        plain=PLAIN,
        radius=wide(radius),
        row_norm=1.0,
        largest=1.0,
    )
    tl.debug_barrier()  # other threads have set these
    column = tl.arange(0, state.TREND_SPAN)
    tl.store(
        row.numbers + state.LATEST + column, tl.full((state.TREND_SPAN,), float("inf"), tl.float64)
    )
    tl.store(row.numbers + state.MIDDLE, float("inf"))
    if i == 0:
        tl.store(settings + state.MAX_ITER, max_iter)
        tl.store(settings + state.MOST_IDLE, patience)
        tl.store(settings + state.TOL, wide(tol))
        tl.store(settings + state.ATOL, wide(atol))
        tl.store(settings + state.FLOOR, wide(floor))
        tl.store(settings + state.LARGEST, wide(largest))
        tl.store(settings + state.DAMPING, wide(damping))
        tl.store(settings + state.REGULARIZATION, wide(regularization))
        tl.store(settings + state.RANK_TOLERANCE, wide(rank_tolerance))
        tl.store(settings + state.MAX_WEIGHT, wide(max_weight))
        tl.store(settings + state.SAFEGUARD, wide(safeguard))
        tl.store(settings + state.ACCELERATE_ABOVE, wide(accelerate_above))


def begin(
    settings: Tensor, flags: Tensor, numbers: Tensor, options: SolveOptions, dtype: torch.dtype
) -> None:
    """Sets what the first evaluation needs; ``dtype`` is that of the state."""
    dtype_limits = torch.finfo(dtype)
    with on_device(settings):
        begin_kernel[(len(flags),)](
            settings=settings,
            flags=flags,
            numbers=numbers,
            **limits(options),
            floor=constants.ROUNDING_FLOOR * dtype_limits.eps,
            largest=dtype_limits.max**constants.SIZE_EXPONENT,
            damping=options.damping,
            radius=options.radius,
            regularization=options.regularization,
            rank_tolerance=options.rank_tolerance,
            max_weight=options.max_weight,
            safeguard=options.safeguard,
            accelerate_above=options.accelerate_above,
            PLAIN=int(options.accelerate_above > 0),
            num_warps=1,
        )
