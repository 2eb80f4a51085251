"""The passes of MINRES over the rows of a sample, of which minres.py's kernel is made. Algorithm,
symbols and sources: fastdeq/solvers/minres.py; bytes and operations: minres.py.

Every sum is float64 in all its additions, of products that are exact in it. That lets the length
beta of u = a - alpha y - b y_old, with a = A y, be known before u is,

    beta^2 = |a|^2 + alpha^2 |y|^2 + b^2 |y_old|^2 - 2 alpha <a, y> - 2 b <a, y_old>
             + 2 alpha b <y, y_old>,

though it cancels: a Krylov space counts as exhausted where beta < 1e-6 |a|, so 12 of the 16 digits
may go. A direction takes two passes over the rows, not three.

Directions are counted from 0 in every Krylov space. y_j lies in one of two rows by the parity of j
and so does w_j, each where the vector two directions before was. No row is zeroed: what a first
direction would read as zero is masked.

A row may be read in one pass and written in the next: the same thread has the same entries in all
passes (tests/compiled/test_compile_steps.py looks), and a barrier is between two of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import constants
from . import sample
from .judge import RESIDUAL_EPS, Target, only, replace
from .sample import row_at

ROWS = 6  # of the work buffer (ROWS, B, n); none is read before it is written
_BASE = tl.constexpr(0)
_X = tl.constexpr(1)
_Y = tl.constexpr(2)
_W = tl.constexpr(4)

_LEAST_LENGTH = tl.constexpr(constants.KRYLOV_FLOOR * torch.finfo(torch.float32).eps)


@triton.jit
def _load(row, entry, inside):
    return tl.load(row + entry, mask=inside, other=0.0)


@triton.jit
def _root(slope, entry, inside):
    """h = D^1/2."""
    d = _load(slope, entry, inside)
    return tl.sqrt_rn(tl.where(d > 0, d, 0.0))


@triton.jit
def keep(work, slope, pre, BLOCK: tl.constexpr):
    """v_0 = h (g + q W) of the last evaluation."""
    for start in range(0, work.size, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < work.size
        base = _root(slope, entry, inside) * _load(pre, entry, inside)
        tl.store(row_at(work, _BASE) + entry, base, mask=inside)


@triton.jit
def iterate(work, slope, directions, target, BLOCK: tl.constexpr):
    """The next point q = h (v_0 + x), x being 0 before the first direction was evaluated."""
    for start in range(0, work.size, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < work.size
        v = _load(row_at(work, _BASE), entry, inside)
        v += _load(row_at(work, _X), entry, only(inside, directions > 0))
        following = _root(slope, entry, inside) * v
        replace(target, entry, inside, following)


@triton.jit
def begin(work, slope, directions, based, pre, BLOCK: tl.constexpr):
    """v_0 + x becomes v_0, where it is ``based`` and x not 0, and y_0 the residual there; returns
    its square."""
    square = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, work.size, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < work.size
        base = _load(row_at(work, _BASE), entry, only(inside, based))
        base += _load(row_at(work, _X), entry, only(inside, directions > 0))
        r = _root(slope, entry, inside) * _load(pre, entry, inside) - base
        wide = r.to(tl.float64)
        square += wide * wide
        tl.store(row_at(work, _BASE) + entry, base, mask=inside)
        tl.store(row_at(work, _Y) + entry, r, mask=inside)
    return tl.sum(square, axis=0)


@triton.jit
def aim_along(work, slope, directions, scale, target, BLOCK: tl.constexpr):
    """The next point h y; y is scaled before, as is due after ``begin``."""
    y_row = row_at(work, directions % 2 + _Y)
    for start in range(0, work.size, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < work.size
        y = _load(y_row, entry, inside) * scale
        tl.store(y_row + entry, y, mask=only(inside, scale != 1))
        replace(target, entry, inside, _root(slope, entry, inside) * y)


@triton.jit
def _lengths(y_row, old_row, slope, product, some, size, BLOCK: tl.constexpr):
    """|a|^2, |y|^2, |y_old|^2, <a, y>, <a, y_old>, <y, y_old>, with y_old = 0 unless ``some``."""
    aa = tl.zeros((BLOCK,), tl.float64)
    yy = tl.zeros((BLOCK,), tl.float64)
    oo = tl.zeros((BLOCK,), tl.float64)
    ay = tl.zeros((BLOCK,), tl.float64)
    ao = tl.zeros((BLOCK,), tl.float64)
    yo = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < size
        y = _load(y_row, entry, inside)
        image = y - _root(slope, entry, inside) * _load(product, entry, inside)
        y, image = y.to(tl.float64), image.to(tl.float64)
        old = _load(old_row, entry, only(inside, some)).to(tl.float64)
        aa += image * image
        yy += y * y
        oo += old * old
        ay += image * y
        ao += image * old
        yo += y * old
    return (
        tl.sum(aa, axis=0),
        tl.sum(yy, axis=0),
        tl.sum(oo, axis=0),
        tl.sum(ay, axis=0),
        tl.sum(ao, axis=0),
        tl.sum(yo, axis=0),
    )


@triton.jit
def direction(row, work, slope, product, target, last, tol, atol, BLOCK: tl.constexpr):
    """One Lanczos step; ``last``: the next evaluation is the last one. Writes the next point and
    returns whether it is an iterate to verify."""
    directions = tl.load(row.flags + sample.DIRECTIONS)
    old_beta = tl.load(row.numbers + sample.BETA).to(tl.float64)
    cosine = tl.load(row.numbers + sample.COSINE).to(tl.float64)
    sine = tl.load(row.numbers + sample.SINE).to(tl.float64)
    diagonal = tl.load(row.numbers + sample.DIAGONAL).to(tl.float64)
    corner = tl.load(row.numbers + sample.CORNER).to(tl.float64)
    phi = tl.load(row.numbers + sample.PHI).to(tl.float64)
    aim = tl.load(row.numbers + sample.AIM)
    y_row = row_at(work, directions % 2 + _Y)
    old_row = row_at(work, (directions + 1) % 2 + _Y)
    aa, yy, oo, ay, ao, yo = _lengths(
        y_row=y_row,
        old_row=old_row,
        slope=slope,
        product=product,
        some=directions > 0,
        size=work.size,
        BLOCK=BLOCK,
    )
    a = ay.to(tl.float32)
    alpha = a.to(tl.float64)
    square = aa + alpha * (alpha * yy - 2 * ay)
    square += old_beta * (old_beta * oo - 2 * ao + 2 * alpha * yo)
    beta = tl.sqrt(tl.where(square < 0, 0.0, square))
    upper = cosine * diagonal + sine * alpha
    middle = sine * diagonal - cosine * alpha
    length = tl.sqrt(middle * middle + beta * beta)
    usable = length > 0  # false for NaN
    safe = tl.where(usable, length, 1.0)
    next_cosine, next_sine = middle / safe, beta / safe
    next_phi = tl.where(usable, tl.abs(next_sine * phi), phi)
    exhausted = (usable & (beta > tl.sqrt(aa) * _LEAST_LENGTH)) == 0
    done = exhausted | last

    tl.debug_barrier()  # all threads have loaded what one of them stores
    tl.store(row.flags + sample.DIRECTIONS, directions + usable.to(tl.int32))
    tl.store(row.flags + sample.EXHAUSTED, exhausted.to(tl.int32))
    if usable:
        tl.store(row.numbers + sample.BETA, beta.to(tl.float32))
        tl.store(row.numbers + sample.CORNER, (sine * beta).to(tl.float32))
        tl.store(row.numbers + sample.DIAGONAL, (-cosine * beta).to(tl.float32))
        tl.store(row.numbers + sample.COSINE, next_cosine.to(tl.float32))
        tl.store(row.numbers + sample.SINE, next_sine.to(tl.float32))
        tl.store(row.numbers + sample.PHI, next_phi.to(tl.float32))
        b = old_beta.to(tl.float32)
        c0, c1 = (1 / length).to(tl.float32), (corner / length).to(tl.float32)
        c2, tau = (upper / length).to(tl.float32), (next_cosine * phi).to(tl.float32)
        scale = (1 / tl.where(beta > 0, beta, 1.0)).to(tl.float32)
        w_row = row_at(work, (directions + 1) % 2 + _W)
        w_old_row = row_at(work, directions % 2 + _W)
        sizes = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, work.size, BLOCK):
            entry = start + tl.arange(0, BLOCK)
            inside = entry < work.size
            y, h = _load(y_row, entry, inside), _root(slope, entry, inside)
            u = y - h * _load(product, entry, inside) - a * y
            u -= b * _load(old_row, entry, only(inside, directions > 0))
            w = c0 * y - c1 * _load(w_old_row, entry, only(inside, directions > 1))
            w -= c2 * _load(w_row, entry, only(inside, directions > 0))
            x = _load(row_at(work, _X), entry, only(inside, directions > 0)) + tau * w
            q = h * (_load(row_at(work, _BASE), entry, inside) + x)
            wide = q.to(tl.float64)
            sizes += wide * wide
            y = scale * u
            tl.store(old_row + entry, y, mask=inside)
            tl.store(w_old_row + entry, w, mask=inside)
            tl.store(row_at(work, _X) + entry, x, mask=inside)
            replace(target, entry, inside, tl.where(done, q, h * y))
        reach = tl.sqrt(tl.sum(sizes, axis=0)) + RESIDUAL_EPS
        met = (done == 0) & (next_phi <= aim * (atol + tol * reach))
    else:
        met = done
    if met:
        tl.debug_barrier()
        # Where a direction was written the best iterate has been kept.
        again = Target(target.row, target.saved, target.save & (usable == 0))
        iterate(work, slope, directions + usable.to(tl.int32), again, BLOCK)
    return done | met
