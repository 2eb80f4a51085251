"""The beginning and the end of a solve: scalars and first points, results and slopes.

Symbols: B samples of size n; D and g the slope and right-hand side of an adjoint.

    begin     sets the scalars of a sample and its first point: its row of the start where that is
              finite, otherwise 0. In an adjoint ``q = D (g + q W)`` scales g so that |D g| = 1, or
              less where |g| would leave the range of float32: a linear solve is homogeneous, its
              stop test is not. Nothing depends on g where D is 0; a row of zeros in D gives zeros.
              A row of g that is not finite ends at once and gives NaN: gradient scalers look for it
    end       writes value, status, iterations, residual and counters of a sample. Where the slope
              is asked for and the last evaluation was not of the best iterate, requests one more.
    slope     phi' of the pre-activation at the best iterate, 0 for a sample that is not finite

Tile layout: one program per sample, which walks its rows in pieces of BLOCK.

Bytes per sample: begin 4 n written, with a start 8 n read; adjoint 24 n read, mostly from a cache,
and 8 n written. end 4 n read, 4 n written. slope 4 n read, 4 n written.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ... import constants
from ..activations import activation_slope
from ..launch import Outputs, on_device
from . import sample
from .judge import NONFINITE, is_finite, only, stop
from .sample import Samples, rows_tile

_LEAST_SCALE = tl.constexpr(constants.LEAST_SCALE)


@triton.jit
def set_columns(row, mode, lowest, plain, radius, row_norm, largest):
    column = tl.arange(0, sample.FLAGS)
    flag = tl.where(column == sample.REQUESTED, sample.FULL, 0)
    flag = tl.where(column == sample.MODE, mode, flag)
    flag = tl.where(column == sample.LOWEST, lowest, flag)
    flag = tl.where(column == sample.PLAIN, plain, flag)
    tl.store(row.flags + column, flag)
    column = tl.arange(0, sample.NUMBERS)
    one = (column == sample.OMEGA) | (column == sample.PREVIOUS_OMEGA)
    number = tl.where(one, 1.0, 0.0)
    infinite = (column == sample.BEST) | (column == sample.NORM) | (column == sample.NORM_1)
    infinite = infinite | (column == sample.NORM_2) | (column == sample.NORM_TO_HALVE)
    infinite = infinite | (column == sample.LAST_FULL) | (column == sample.GOAL)
    infinite = infinite | (column == sample.TRUSTED_NORM) | (column == sample.RESTARTED_AT)
    infinite = infinite | (column == sample.LEAST_NORM) | (column == sample.HALF_NOW)
    infinite = infinite | (column == sample.HALF_BEFORE)
    number = tl.where(infinite, float("inf"), number)
    number = tl.where(column == sample.RADIUS, radius, number)
    number = tl.where(column == sample.ROW_NORM, row_norm, number)
    number = tl.where(column == sample.LARGEST, largest, number)
    tl.store(row.numbers + column, number)


@triton.jit
def _scale(grad_row, slope_row, size, BLOCK: tl.constexpr):
    """(whether g is usable, the norm that is left, and the largest entry of D g, taken out)."""
    alive = tl.zeros((BLOCK,), tl.int32)
    wrong = tl.zeros((BLOCK,), tl.int32)
    most = tl.zeros((BLOCK,), tl.float32)
    most_g = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = entry < size
        d = tl.load(slope_row + entry, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad_row + entry, mask=inside, other=0.0).to(tl.float32)
        image = tl.where(d != 0, tl.abs(d * g), 0.0)
        alive |= (d != 0).to(tl.int32)
        wrong |= ((is_finite(g) & is_finite(image)) == 0).to(tl.int32)
        most = tl.maximum(most, image)
        most_g = tl.maximum(most_g, tl.where(d != 0, tl.abs(g), 0.0))
    largest = tl.maximum(tl.max(most, axis=0), _LEAST_SCALE * tl.max(most_g, axis=0))
    alive_any = tl.max(alive, axis=0) != 0
    finite = (tl.max(wrong, axis=0) == 0) | (alive_any == 0)
    largest = tl.where(alive_any & finite & (largest > 0), largest, 1.0)
    # Twice: squares of entries below 1e-19 vanish in float32, and of entries above overflow.
    square = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = entry < size
        d = tl.load(slope_row + entry, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad_row + entry, mask=inside, other=0.0).to(tl.float32)
        scaled = d * tl.div_rn(tl.where(d != 0, g, 0.0), tl.zeros_like(g) + largest)
        square += scaled * scaled
    norm = tl.sqrt_rn(tl.sum(square, axis=0))
    return finite, tl.where(norm > 1, norm, 1.0), largest


@triton.jit
def begin_kernel(
    points,
    start_rows,  # None: zeros
    grad,  # None: not an adjoint
    slope,
    offset,  # written: g scaled
    numbers,
    flags,
    remaining,
    size,
    radius: tl.float32,
    MODE: tl.constexpr,
    LOWEST: tl.constexpr,
    PLAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    row = sample.row_of(i, flags, numbers, remaining)
    at = i * size
    norm = 1.0
    largest = 1.0
    finite = True
    if grad is not None:
        finite, norm, largest = _scale(grad + at, slope + at, size, BLOCK)
        first = tl.where(finite, 0.0, float("nan"))
        for start in range(0, size, BLOCK):
            entry = start + tl.arange(0, BLOCK).to(tl.int64)
            inside = entry < size
            d = tl.load(slope + at + entry, mask=inside, other=0.0).to(tl.float32)
            g = tl.load(grad + at + entry, mask=inside, other=0.0).to(tl.float32)
            zeros = tl.zeros_like(g)
            g = tl.div_rn(tl.div_rn(tl.where(d != 0, g, 0.0), zeros + largest), zeros + norm)
            tl.store(offset + at + entry, g, mask=inside)
            tl.store(points + at + entry, zeros + first, mask=inside)
    elif start_rows is not None:
        wrong = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, size, BLOCK):
            entry = start + tl.arange(0, BLOCK).to(tl.int64)
            z = tl.load(start_rows + at + entry, mask=entry < size, other=0.0).to(tl.float32)
            wrong |= (is_finite(z) == 0).to(tl.int32)
        usable = tl.max(wrong, axis=0) == 0
        for start in range(0, size, BLOCK):
            entry = start + tl.arange(0, BLOCK).to(tl.int64)
            inside = entry < size
            z = tl.load(start_rows + at + entry, mask=only(inside, usable), other=0.0)
            tl.store(points + at + entry, z.to(tl.float32), mask=inside)
    else:
        for start in range(0, size, BLOCK):
            entry = start + tl.arange(0, BLOCK).to(tl.int64)
            tl.store(points + at + entry, tl.zeros((BLOCK,), tl.float32), mask=entry < size)
    set_columns(
        row=row,
        mode=MODE,
        lowest=LOWEST,
        plain=PLAIN,
        radius=radius,
        row_norm=norm,
        largest=largest,
    )
    if finite == 0:
        tl.debug_barrier()  # the scalars have been set by other threads
        stop(row, NONFINITE, 0)


@triton.jit
def end_kernel(
    points,
    numbers,
    flags,
    value,
    status,
    iterations,
    residual,
    rejects,
    slot_stride,  # B n
    size,
    ADJOINT: tl.constexpr,
    WITH_SLOPE: tl.constexpr,
    SLOTS: tl.constexpr,
    COUNTERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    flags_row = flags + i * sample.FLAGS
    numbers_row = numbers + i * sample.NUMBERS
    ended = tl.load(flags_row + sample.STATUS)
    best_at = tl.load(flags_row + sample.BEST_AT)
    stale = (tl.load(flags_row + sample.IDLE) != 0) & (ended != NONFINITE)
    stale = stale if WITH_SLOPE else best_at < 0
    norm = tl.load(numbers_row + sample.ROW_NORM)
    largest = tl.load(numbers_row + sample.LARGEST)
    best_row = points + best_at.to(tl.int64) * slot_stride + i * size
    saved_row = points + (best_at * 0 + SLOTS).to(tl.int64) * slot_stride + i * size
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = entry < size
        z = tl.load(best_row + entry, mask=inside, other=0.0)
        tl.store(saved_row + entry, z, mask=only(inside, stale))
        if ADJOINT:  # a step at a time, as the product of the two may overflow
            z = z * norm * largest
        tl.store(value + i * size + entry, z.to(value.dtype.element_ty), mask=inside)
    tl.store(status + i, ended.to(tl.int8))
    tl.store(iterations + i, tl.load(flags_row + sample.ITERATIONS))
    tl.store(residual + i, tl.load(numbers_row + sample.BEST))
    counter = tl.arange(0, 4)
    counts = tl.load(flags_row + sample.REJECTS + counter, mask=counter < COUNTERS, other=0)
    tl.store(rejects + i * COUNTERS + counter, counts, mask=counter < COUNTERS)
    if stale:
        tl.store(flags_row + sample.REQUESTED, sample.FULL)


@triton.jit
def slope_kernel(pre, flags, slope, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    usable = tl.load(flags + i * sample.FLAGS + sample.STATUS) != NONFINITE
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = entry < size
        p = tl.load(pre + i * size + entry, mask=only(inside, usable), other=0.0)
        d = tl.where(usable, activation_slope(p, ACTIVATION), 0.0)
        tl.store(slope + i * size + entry, d, mask=inside)


def begin(
    samples: Samples,
    *,
    start: Tensor | None = None,
    grad: Tensor | None = None,
    mode: int = sample.STEPS.value,
    plain: bool = False,
    radius: float = constants.FIRST_RADIUS,
) -> None:
    """Sets every buffer of ``samples`` that the first evaluation reads, but an ``offset`` that is
    an injection. ``start`` and ``grad`` are ``(B, n)``, contiguous, of any floating dtype."""
    _, batch, size = samples.points.shape
    lowest = sample.FULL if samples.change is None else sample.LOW
    with on_device(samples.points):
        begin_kernel[(batch,)](
            points=samples.points,
            start_rows=start,
            grad=grad,
            slope=samples.slope,
            offset=samples.offset,
            numbers=samples.numbers,
            flags=samples.flags,
            remaining=samples.remaining,
            size=size,
            radius=radius,
            MODE=mode,
            LOWEST=lowest.value,
            PLAIN=int(plain),
            **rows_tile(size),
        )


def end(samples: Samples, outputs: Outputs, with_slope: bool) -> None:
    """Fills the outputs. With ``with_slope`` the samples whose ``pre`` is not that of the best
    iterate request one full-precision evaluation, at the last slot."""
    _, batch, size = samples.points.shape
    with on_device(samples.points):
        end_kernel[(batch,)](
            points=samples.points,
            numbers=samples.numbers,
            flags=samples.flags,
            **outputs._asdict(),
            slot_stride=batch * size,
            size=size,
            ADJOINT=samples.slope is not None,
            WITH_SLOPE=with_slope,
            SLOTS=samples.slots,
            COUNTERS=outputs.rejects.shape[1],
            **rows_tile(size),
        )


def slope_of(samples: Samples, activation: int, slope: Tensor) -> None:
    """phi' at the best iterates, once ``pre`` is theirs."""
    _, batch, size = samples.points.shape
    with on_device(slope):
        slope_kernel[(batch,)](
            pre=samples.pre,
            flags=samples.flags,
            slope=slope,
            size=size,
            ACTIVATION=activation,
            **rows_tile(size),
        )
