"""The passes of the energy solver over the rows of a sample, of which energy.py's kernel is made.
Algorithm, symbols and sources: fastdeq/solvers/energy.py; bytes and operations: energy.py.

Every sum is float64 in all its additions. The change of E needs that: next to a solution its terms
are 1e-7 of E's and cancel among themselves. So does the residual of conjugate gradients,

    |r - alpha y|^2 = |r|^2 - 2 alpha <r, y> + alpha^2 |y|^2,    y = d - h p,

which cancels where r falls much at once, and is good down to the rounding of r because products of
two float32 numbers are exact in float64. With it beta is known before the new r is, and a direction
takes two passes over the rows, not three.

A row may be read in one pass and written in the next: the same thread has the same entries in all
passes (tests/compiled/test_compile_steps.py looks), and a barrier is between two of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ... import constants
from ..activations import (
    HARDTANH,
    LEAKY_RELU,
    RELU,
    activate,
    activation_primitive,
    activation_slope,
)
from . import sample
from .judge import is_finite, only, replace
from .sample import row_at

ROWS = 7  # of the work buffer (ROWS, B, n); none is read before it is written
_A = tl.constexpr(0)
_Z = tl.constexpr(1)
_S = tl.constexpr(2)
_H = tl.constexpr(3)
_DA = tl.constexpr(4)
_R = tl.constexpr(5)
_D = tl.constexpr(6)

_SUFFICIENT_DECREASE = tl.constexpr(constants.SUFFICIENT_DECREASE)
_LEAST_CURVATURE = tl.constexpr(constants.LEAST_CURVATURE)
_ASSUMED_CURVATURE = tl.constexpr(constants.ASSUMED_CURVATURE)
_SMALL_STEP = tl.constexpr(constants.SMALL_STEP)


@triton.jit
def _along(a, t, da):
    """a + t da, rounded once wherever it is computed, because a trial is not stored."""
    return tl.fma(da, tl.zeros_like(da) + t, a)


@triton.jit
def _load(row, entry, inside):
    return tl.load(row + entry, mask=inside, other=0.0)


@triton.jit
def direction(row, work, product, target, most, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """One step of conjugate gradients. Writes the next point and returns whether it is a trial."""
    done_before = tl.load(row.flags + sample.DIRECTIONS)
    d_row = row_at(work, tl.where(done_before == 0, _R, _D))
    da_row = row_at(work, tl.where(done_before == 0, _S, _DA))
    length = tl.zeros((BLOCK,), tl.float64)
    curvature = tl.zeros((BLOCK,), tl.float64)
    square = tl.zeros((BLOCK,), tl.float64)
    inner = tl.zeros((BLOCK,), tl.float64)
    image_square = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, work.size, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < work.size
        d = _load(d_row, entry, inside)
        image = d - _load(row_at(work, _H), entry, inside) * _load(product, entry, inside)
        wide, image = d.to(tl.float64), image.to(tl.float64)
        r = _load(row_at(work, _R), entry, inside).to(tl.float64)
        length += wide * wide
        curvature += wide * image
        square += r * r
        inner += r * image
        image_square += image * image
    length, curvature, square = (
        tl.sum(length, axis=0),
        tl.sum(curvature, axis=0),
        tl.sum(square, axis=0),
    )
    flat = (curvature > length * _LEAST_CURVATURE) == 0  # true for NaN
    usable = is_finite(curvature)
    bent = tl.abs(tl.where(usable, curvature, 0.0))
    assumed = tl.maximum(bent, length * _ASSUMED_CURVATURE)
    alpha = (square / tl.where(flat, assumed, curvature)).to(tl.float32)
    wide = alpha.to(tl.float64)
    left = square - 2 * wide * tl.sum(inner, axis=0) + wide * wide * tl.sum(image_square, axis=0)
    left = tl.where(left < 0, 0.0, left)
    done = flat | (left <= tl.load(row.numbers + sample.ENOUGH)) | (done_before + 1 >= most)
    beta = (left / square).to(tl.float32)

    curved = tl.load(row.flags + sample.REJECTS + 1) + flat.to(tl.int32)
    tl.debug_barrier()
    tl.store(row.flags + sample.DIRECTIONS, done_before + 1)
    tl.store(row.flags + sample.REJECTS + 1, curved)
    for start in range(0, work.size, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < work.size
        p = _load(product, entry, only(inside, usable))
        da = _load(da_row, entry, inside) + tl.where(usable, alpha * p, 0.0)
        tl.store(row_at(work, _DA) + entry, da, mask=inside)
        if done:
            following = activate(_load(row_at(work, _A), entry, inside) + da, ACTIVATION)
        else:
            d = _load(d_row, entry, inside)
            h = _load(row_at(work, _H), entry, inside)
            r = _load(row_at(work, _R), entry, inside) - alpha * (d - h * p)
            d = r + beta * d
            tl.store(row_at(work, _R) + entry, r, mask=inside)
            tl.store(row_at(work, _D) + entry, d, mask=inside)
            following = h * d
        replace(target, entry, inside, following)
    return done


@triton.jit
def falls(work, t, point, pre, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Whether E at the trial, evaluated at ``point``, is low enough."""
    change = tl.zeros((BLOCK,), tl.float64)
    promised = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, work.size, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < work.size
        a = _load(row_at(work, _A), entry, inside)
        trial = _along(a, t, _load(row_at(work, _DA), entry, inside))
        da = trial - a
        slope, slope_there = activation_slope(a, ACTIVATION), activation_slope(trial, ACTIVATION)
        gap = activation_primitive(trial, ACTIVATION) - activation_primitive(a, ACTIVATION)
        z = _load(row_at(work, _Z), entry, inside)
        z_there = _load(point, entry, inside)
        kappa = 0.5 * da * (z + z_there) - gap
        if (ACTIVATION != RELU) & (ACTIVATION != LEAKY_RELU) & (ACTIVATION != HARDTANH):
            small = da * da * (slope_there - slope) / 12
            kappa = tl.where(tl.abs(da) < _SMALL_STEP, small, kappa)
        # On one linear piece, or one saturated side, this is rounding error alone.
        alike = (slope == slope_there) & ((trial > 0) == (a > 0))
        kappa = tl.where(alike, 0.0, kappa)
        s = _load(row_at(work, _S), entry, inside)
        both = s + (_load(pre, entry, inside) - trial)
        change += (kappa - 0.5 * both * (z_there - z)).to(tl.float64)
        promised += (slope * s * da).to(tl.float64)
    enough = tl.sum(promised, axis=0) * -_SUFFICIENT_DECREASE
    return tl.sum(change, axis=0) <= enough  # false for NaN


@triton.jit
def begin(work, t, moves, point, pre, target, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """A step from ``point`` = phi(a); ``moves``: a + t da takes the place of a. Writes the next
    point, h r, and returns |r|^2."""
    square = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, work.size, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < work.size
        a = _load(row_at(work, _A), entry, inside)
        a = _along(a, t, _load(row_at(work, _DA), entry, only(inside, moves)))
        s = _load(pre, entry, inside) - a
        h = tl.sqrt_rn(activation_slope(a, ACTIVATION))
        r = h * s
        wide = r.to(tl.float64)
        square += wide * wide
        tl.store(row_at(work, _A) + entry, a, mask=only(inside, moves))
        tl.store(row_at(work, _Z) + entry, _load(point, entry, inside), mask=inside)
        tl.store(row_at(work, _S) + entry, s, mask=inside)
        tl.store(row_at(work, _H) + entry, h, mask=inside)
        tl.store(row_at(work, _R) + entry, r, mask=inside)
        replace(target, entry, inside, h * r)
    return tl.sum(square, axis=0)


@triton.jit
def attempt(work, t, plain, bare, target, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """The next point phi(a + t da), or phi(a) if ``bare``; ``plain``: s takes the place of da."""
    from_row = row_at(work, tl.where(plain, _S, _DA))
    for start in range(0, work.size, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < work.size
        da = _load(from_row, entry, only(inside, bare == 0))
        tl.store(row_at(work, _DA) + entry, da, mask=only(inside, plain))
        a = _load(row_at(work, _A), entry, inside)
        following = activate(_along(a, t, da), ACTIVATION)
        replace(target, entry, inside, following)


@triton.jit
def keep(work, pre, BLOCK: tl.constexpr):
    """a is the pre-activation of the last evaluation."""
    for start in range(0, work.size, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < work.size
        tl.store(row_at(work, _A) + entry, _load(pre, entry, inside), mask=inside)
