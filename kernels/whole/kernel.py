"""The whole solve of a small affine cell in one launch, forward and adjoint.

Symbols: B samples of size n, SIZE the next power of two (16 at least); M = BLOCK_M samples in a
tile; W (n, n) the weight, c the injection, D the slope and g the right-hand side of an adjoint; w
the window of Anderson acceleration.

    ``z = phi(z W^T + c)``  or  ``q = D (g + q W)``

Tile layout: one program for M samples. W, the points, the offset and the best points are tiles on
chip from the first iteration to the last; W is the second factor of the product, in shared memory.
A program iterates until each of its samples has stopped, whatever the others do. Histories and Gram
matrices of Anderson acceleration are in a scratch of the program's own, written and read again at
once, and only once a sample of the tile is past its plain steps: see anderson.py. The rows of an
adjoint are scaled to unit norm here, and the results restored.

Bytes: ``4 n^2`` for W per program, from the second-level cache but for the first; per sample
``4 n`` each for the offset, D, the start, the value, the slope. With a history an iteration writes
``8 n`` bytes of a sample to scratch and at most ``4 n (2 w + 2)`` back. Operations: ``2 n^2`` per
sample and iteration, and some 50 n for phi; float32 products by fused multiply-adds ("ieee") or as
three of tensor cores ("tf32x3"), see steps/affine_step.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ... import constants
from ..activations import activate, activation_slope
from ..steps.affine_tile import row_norm
from ..steps.judge import (
    CONVERGED,
    FLOOR,
    LARGEST_SIZE,
    NONFINITE,
    RESIDUAL_EPS,
    RUNNING,
    Best,
    end,
    is_finite,
    judge,
    out_of_patience,
    tolerance_at,
)
from ..steps.momentum import learn
from .anderson import anderson_step

PLAIN = tl.constexpr(0)
HEAVY_BALL = tl.constexpr(1)
ANDERSON = tl.constexpr(2)

# The loop goes on for an iteration, or for the product that the slope needs.
ITERATE = tl.constexpr(2)
_LEAST_SCALE = tl.constexpr(constants.LEAST_SCALE)


@triton.jit
def unit_rows(slope, grad):
    """g of rows with |D g| = 1, or less where |g| would leave the range of float32, and the two
    factors of the result, NaN where the row is not finite: fastdeq/ops/solve_affine_adjoint.py."""
    dead = tl.max((slope != 0).to(tl.int32), axis=1) == 0  # NaN is no zero
    grad = tl.where(dead[:, None], 0.0, grad)
    nan_unless_finite = tl.sum(tl.where(is_finite(grad), 0.0, float("nan")), axis=1)
    # Nothing depends on g where D is 0.
    g = tl.where(slope == 0, 0.0, grad)
    image = slope * g
    largest = tl.maximum(tl.max(tl.abs(image), axis=1), _LEAST_SCALE * tl.max(tl.abs(g), axis=1))
    largest = tl.where(largest > 0, largest, 1.0)
    # Twice: squares of entries below 1e-19 vanish in float32, and of entries above overflow.
    norm = row_norm(image / largest[:, None])
    norm = tl.where(norm < 1, 1.0, norm)  # NaN where the image is not finite
    g = g / largest[:, None] / norm[:, None]
    return g, norm + nan_unless_finite, largest


# Specialised on these, the kernel would be compiled anew for many values of them. The options are
# annotated because a plain Python float arrives as float32.
@triton.jit(do_not_specialize=["batch", "max_iter", "patience"])
def whole_kernel(
    w_ptr,
    offset_ptr,
    slope_ptr,
    start_ptr,
    value_ptr,
    status_ptr,
    iterations_ptr,
    residual_ptr,
    rejects_ptr,
    value_slope_ptr,
    history_ptr,  # (w + 1, M, SIZE) of f and as much of g, for each program
    gram_ptr,
    batch,
    size,
    w_stride_input,
    w_stride_output,
    max_iter,
    patience,
    tol: tl.float32,
    atol: tl.float32,
    damping: tl.float32,
    radius: tl.float32,  # heavy ball: of the spectrum, at first
    regularization: tl.float64,
    rank_tolerance: tl.float64,
    max_weight: tl.float64,
    safeguard: tl.float32,
    accelerate_above: tl.float32,
    SOLVER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FIXED: tl.constexpr,
    DAMPED: tl.constexpr,
    WINDOW: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = sample < batch
    column = tl.arange(0, SIZE)
    inside = column < size
    entry = sample[:, None] * size + column[None, :]
    mask = exists[:, None] & inside[None, :]
    w_at = column.to(tl.int64)[:, None] * w_stride_input
    w_at += column.to(tl.int64)[None, :] * w_stride_output
    w_mask = inside[:, None] & inside[None, :]
    w = tl.load(w_ptr + w_at, mask=w_mask, other=0.0).to(tl.float32)
    offset = tl.load(offset_ptr + entry, mask=mask, other=0.0).to(tl.float32)
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + entry, mask=mask, other=0.0).to(tl.float32)
        offset = unit_rows(slope, offset)[0]
    point = tl.zeros((BLOCK_M, SIZE), tl.float32)
    if start_ptr is not None:
        start = tl.load(start_ptr + entry, mask=mask, other=0.0).to(tl.float32)
        sound = tl.min(is_finite(start).to(tl.int32), axis=1) != 0
        point = tl.where(sound[:, None], start, point)

    best = point
    infinite = tl.full((BLOCK_M,), float("inf"), tl.float32)
    iterations = tl.zeros((BLOCK_M,), tl.int32)
    verified = Best(
        residual=infinite,
        least_norm=infinite,
        meets=iterations > 0,
        idle=iterations,
        half_now=infinite,
        half_before=infinite,
    )
    status = tl.where(exists, RUNNING, CONVERGED)
    if SOLVER == HEAVY_BALL:
        radius = tl.zeros((BLOCK_M,), tl.float32) + radius
        omega = tl.zeros((BLOCK_M,), tl.float32) + 1.0
        previous_omega = omega
        norm_1, norm_2, norm_3 = infinite, infinite, infinite
        previous = point
    if SOLVER == ANDERSON:
        tile = tl.program_id(0).to(tl.int64)
        history_ptr += tile * (2 * (WINDOW + 1) * BLOCK_M * SIZE)
        gram_ptr += tile * (BLOCK_M * (WINDOW + 1) * (WINDOW + 1))
        newest = 0
        count = iterations
        plain = exists & (accelerate_above > 0)
        accelerated = count > 0
        refills = accelerated
        trusted_norm = infinite
        taken_back, capped, cut = count, count, count

    k = 0
    going = ITERATE
    pre = offset
    while going != 0:
        product = tl.dot(point, w, input_precision=PRECISION)
        if start_ptr is None:
            product = tl.where(k > 0, product, 0.0)  # W 0 = 0, whatever is in W
        pre = offset + product
        if slope_ptr is None:
            value = activate(pre, ACTIVATION)
        else:
            value = slope * pre
        value = tl.where(inside[None, :], value, 0.0)

        norm = row_norm(value - point)
        size_norm = row_norm(value)
        # Next to infinity every residual would be small.
        running = status == RUNNING
        sound = running & (size_norm < LARGEST_SIZE)
        relative = tl.where(sound, norm / (size_norm + RESIDUAL_EPS), float("nan"))
        limit = tolerance_at(tol, atol, norm, relative)
        improved, verified, judged = judge(verified, norm, relative, k, limit, max_iter, FIXED)
        best = tl.where(improved[:, None], point, best)
        status = tl.where(running, judged, status)
        running = status == RUNNING

        failed = running & (is_finite(norm) == 0)
        if SOLVER == ANDERSON:
            # NaN compares false: "not (norm <= limit)" takes a step back that is not finite too.
            back = accelerated & ((norm <= safeguard * trusted_norm) == 0)
            failed = failed & (back == 0)
            plain = plain & (norm <= accelerate_above * trusted_norm)
            trusted_norm = tl.where(back, trusted_norm, norm)
            if DAMPED:
                following = value - (1.0 - damping) * (value - point)
            else:
                following = value
            accelerated = accelerated & (count < 0)
            if tl.max((running & (plain == 0)).to(tl.int32), axis=0) != 0:
                following, dropped, rejected = anderson_step(
                    f_history=history_ptr,
                    g_history=history_ptr + (WINDOW + 1) * BLOCK_M * SIZE,
                    gram=gram_ptr,
                    newest=newest,
                    size=size,
                    value=value,
                    point=point,
                    count=count,
                    back=back,
                    refills=refills,
                    undamped=1.0 - damping,
                    regularization=regularization,
                    rank_tolerance=rank_tolerance,
                    max_weight=max_weight,
                    DAMPED=DAMPED,
                    WINDOW=WINDOW,
                    COLUMNS=COLUMNS,
                    CHUNK=CHUNK,
                )
                mixes = running & is_finite(norm) & ((back | refills) == 0)
                taken_back += (running & back).to(tl.int32)
                capped += (mixes & rejected).to(tl.int32)
                cut += (mixes & dropped).to(tl.int32)
                accelerated = ((back | refills | rejected) == 0) & (count > 0)
                count = tl.where(back | plain, 0, tl.minimum(count + 1, WINDOW))
                refills = back | (refills & (count < WINDOW))
            newest = tl.where(newest == WINDOW, 0, newest + 1)
        elif SOLVER == HEAVY_BALL:
            following = previous + omega[:, None] * (value - previous)
            previous = point
            radius, previous_omega, omega, _, _, _ = learn(
                norm=norm,
                previous=norm_1,
                norm_1=norm_2,
                norm_2=norm_3,
                radius=radius,
                previous_omega=previous_omega,
                omega=omega,
                norm_to_halve=norm,
                steps_since_halved=iterations,
                k=k,
                trusted=running,
            )
            norm_3 = norm_2
            norm_2 = norm_1
            norm_1 = norm
        elif DAMPED:
            following = point + damping * (value - point)
        else:
            following = value

        stalls, verified = out_of_patience(verified, k, patience, FLOOR, FIXED)
        status = end(status, failed, stalls, verified.meets)
        # Of a sample that has stopped the point is not frozen: nothing of it is read any more.
        point = following
        on = (status == RUNNING).to(tl.int32)
        iterations += on
        k += 1
        more = tl.max(on, axis=0) != 0
        if value_slope_ptr is None:
            going = more.to(tl.int32)
        else:
            # One more product, at the best points, for the slope.
            going = tl.where(more, ITERATE, going - 1)
            point = tl.where(more, point, best)

    # Computed anew, as are the factors of the rows: kept over the loop, addresses and factors would
    # take registers. The compiler does not know that k is positive.
    sample += tl.minimum(k, 0)
    entry = sample[:, None] * size + column[None, :]
    exists = sample < batch
    mask = exists[:, None] & inside[None, :]
    tl.store(status_ptr + sample, status.to(tl.int8), mask=exists)
    tl.store(iterations_ptr + sample, iterations, mask=exists)
    tl.store(residual_ptr + sample, verified.residual, mask=exists)
    if SOLVER == ANDERSON:
        tl.store(rejects_ptr + 3 * sample, taken_back, mask=exists)
        tl.store(rejects_ptr + 3 * sample + 1, capped, mask=exists)
        tl.store(rejects_ptr + 3 * sample + 2, cut, mask=exists)
    if value_slope_ptr is not None:
        # Here, as a store within the loop would keep the compiler from leaving W in shared memory.
        value_slope = activation_slope(pre, ACTIVATION)
        value_slope = tl.where((status == NONFINITE)[:, None], 0.0, value_slope)
        tl.store(value_slope_ptr + entry, value_slope, mask=mask)
    if slope_ptr is not None:
        grad = tl.load(offset_ptr + entry, mask=mask, other=0.0).to(tl.float32)
        slope = tl.load(slope_ptr + entry, mask=mask, other=0.0).to(tl.float32)
        _g, norm_factor, largest = unit_rows(slope, grad)
        # A step at a time, as the product of the two may overflow.
        best = best * norm_factor[:, None] * largest[:, None]
    tl.store(value_ptr + entry, best, mask=mask)
