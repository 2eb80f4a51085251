"""The passes of the energy solver over the rows of a sample: what energy.py's kernel is made of.
Algorithm, symbols and sources: fastdeq/solvers/energy.py; bytes and operations: energy.py.

Every sum is float64 in all its additions. The change of E needs that: next to a solution its terms
are 1e-7 of E's and cancel among themselves. So does the residual of conjugate gradients,

    |r - alpha y|^2 = |r|^2 - 2 alpha <r, y> + alpha^2 |y|^2,    y = d - h p,

which cancels where r falls much at once, and is good down to the rounding of r because products of
two float32 numbers are exact in float64. With it beta is known before the new r is, and a direction
takes two passes over the rows, not three.

A row may be read in one pass and written in the next: the same thread has the same entries in all
passes (tests/test_compile_symmetric.py looks), and a barrier is between two of them. No GPU has run
this.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import sample
from .activations import (
    HARDTANH,
    LEAKY_RELU,
    RELU,
    activate,
    activation_primitive,
    activation_slope,
)

ROWS = 7  # of the work buffer (ROWS, B, n); none is read before it is written
_A = tl.constexpr(0)
_Z = tl.constexpr(1)
_S = tl.constexpr(2)
_H = tl.constexpr(3)
_DA = tl.constexpr(4)
_R = tl.constexpr(5)
_D = tl.constexpr(6)

# As in fastdeq/solvers/energy.py.
_SUFFICIENT = tl.constexpr(1e-4)
_LEAST_CURVATURE = tl.constexpr(1e-6)
_ASSUMED_CURVATURE = tl.constexpr(0.3)
_SMALL_STEP = tl.constexpr(0.1)


@triton.jit
def _along(a, t, da):
    """a + t da, rounded once wherever it is computed, because a trial is not stored."""
    return tl.fma(da, tl.zeros_like(da) + t, a)


@triton.jit
def _load(row, entry, inside):
    return tl.load(row + entry, mask=inside, other=0.0)


@triton.jit
def direction(
    flags_row,
    numbers_row,
    work,
    plane,
    product,
    target,
    saved,
    save,
    size,
    most,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step of conjugate gradients. Writes the next point and returns whether it is a trial."""
    made = tl.load(flags_row + sample.DIRECTIONS)
    d_row = work + tl.where(made == 0, _R, _D) * plane
    da_row = work + tl.where(made == 0, _S, _DA) * plane
    length = tl.zeros((BLOCK,), tl.float64)
    curvature = tl.zeros((BLOCK,), tl.float64)
    square = tl.zeros((BLOCK,), tl.float64)
    inner = tl.zeros((BLOCK,), tl.float64)
    image_square = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < size
        d = _load(d_row, entry, inside)
        image = d - _load(work + plane * _H, entry, inside) * _load(product, entry, inside)
        wide, image = d.to(tl.float64), image.to(tl.float64)
        r = _load(work + plane * _R, entry, inside).to(tl.float64)
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
    usable = sample.is_finite(curvature)
    bent = tl.abs(tl.where(usable, curvature, 0.0))
    assumed = tl.maximum(bent, length * _ASSUMED_CURVATURE)
    alpha = (square / tl.where(flat, assumed, curvature)).to(tl.float32)
    wide = alpha.to(tl.float64)
    left = square - 2 * wide * tl.sum(inner, axis=0) + wide * wide * tl.sum(image_square, axis=0)
    left = tl.where(left < 0, 0.0, left)
    done = flat | (left <= tl.load(numbers_row + sample.ENOUGH)) | (made + 1 >= most)
    beta = (left / square).to(tl.float32)

    curved = tl.load(flags_row + sample.REJECTS + 1) + flat.to(tl.int32)
    tl.debug_barrier()
    tl.store(flags_row + sample.DIRECTIONS, made + 1)
    tl.store(flags_row + sample.REJECTS + 1, curved)
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < size
        p = _load(product, entry, sample.only(inside, usable))
        da = _load(da_row, entry, inside) + tl.where(usable, alpha * p, 0.0)
        tl.store(work + plane * _DA + entry, da, mask=inside)
        if done:
            following = activate(_load(work + plane * _A, entry, inside) + da, ACTIVATION)
        else:
            d = _load(d_row, entry, inside)
            h = _load(work + plane * _H, entry, inside)
            r = _load(work + plane * _R, entry, inside) - alpha * (d - h * p)
            d = r + beta * d
            tl.store(work + plane * _R + entry, r, mask=inside)
            tl.store(work + plane * _D + entry, d, mask=inside)
            following = h * d
        sample.replace(target, saved, entry, inside, save, following)
    return done


@triton.jit
def falls(work, plane, t, point, pre, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """Whether E at the trial, evaluated at ``point``, is low enough."""
    change = tl.zeros((BLOCK,), tl.float64)
    promised = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < size
        a = _load(work + plane * _A, entry, inside)
        trial = _along(a, t, _load(work + plane * _DA, entry, inside))
        da = trial - a
        slope, slope_there = activation_slope(a, ACTIVATION), activation_slope(trial, ACTIVATION)
        gap = activation_primitive(trial, ACTIVATION) - activation_primitive(a, ACTIVATION)
        z = _load(work + plane * _Z, entry, inside)
        z_there = _load(point, entry, inside)
        kappa = 0.5 * da * (z + z_there) - gap
        if (ACTIVATION != RELU) & (ACTIVATION != LEAKY_RELU) & (ACTIVATION != HARDTANH):
            small = da * da * (slope_there - slope) / 12
            kappa = tl.where(tl.abs(da) < _SMALL_STEP, small, kappa)
        # On one linear piece, or one saturated side, this is rounding error alone.
        alike = (slope == slope_there) & ((trial > 0) == (a > 0))
        kappa = tl.where(alike, 0.0, kappa)
        s = _load(work + plane * _S, entry, inside)
        both = s + (_load(pre, entry, inside) - trial)
        change += (kappa - 0.5 * both * (z_there - z)).to(tl.float64)
        promised += (slope * s * da).to(tl.float64)
    return tl.sum(change, axis=0) <= tl.sum(promised, axis=0) * -_SUFFICIENT  # false for NaN


@triton.jit
def begin(
    work,
    plane,
    t,
    moves,
    point,
    pre,
    target,
    saved,
    save,
    size,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A step from ``point`` = phi(a); ``moves``: a + t da takes the place of a. Writes the next
    point, h r, and returns |r|^2."""
    square = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < size
        a = _load(work + plane * _A, entry, inside)
        a = _along(a, t, _load(work + plane * _DA, entry, sample.only(inside, moves)))
        s = _load(pre, entry, inside) - a
        h = tl.sqrt_rn(activation_slope(a, ACTIVATION))
        r = h * s
        wide = r.to(tl.float64)
        square += wide * wide
        tl.store(work + plane * _A + entry, a, mask=sample.only(inside, moves))
        tl.store(work + plane * _Z + entry, _load(point, entry, inside), mask=inside)
        tl.store(work + plane * _S + entry, s, mask=inside)
        tl.store(work + plane * _H + entry, h, mask=inside)
        tl.store(work + plane * _R + entry, r, mask=inside)
        sample.replace(target, saved, entry, inside, save, h * r)
    return tl.sum(square, axis=0)


@triton.jit
def attempt(
    work,
    plane,
    t,
    plain,
    bare,
    target,
    saved,
    save,
    size,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The next point phi(a + t da), or phi(a) if ``bare``; ``plain``: s takes the place of da."""
    from_row = work + tl.where(plain, _S, _DA) * plane
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < size
        da = _load(from_row, entry, sample.only(inside, bare == 0))
        tl.store(work + plane * _DA + entry, da, mask=sample.only(inside, plain))
        a = _load(work + plane * _A, entry, inside)
        following = activate(_along(a, t, da), ACTIVATION)
        sample.replace(target, saved, entry, inside, save, following)


@triton.jit
def keep(work, plane, pre, size, BLOCK: tl.constexpr):
    """a is the pre-activation of the evaluation just made."""
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < size
        tl.store(work + plane * _A + entry, _load(pre, entry, inside), mask=inside)
