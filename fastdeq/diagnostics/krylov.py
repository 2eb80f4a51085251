"""Batched Arnoldi process without restarts, and what its Hessenberg matrix says of the spectrum.

    A             the operator of a sample, (n, n), known by products only
    V (B, m, n)   orthonormal basis of the Krylov space of v_1, uniform on the unit sphere
    H (m, m)      float64, ``A V_m = V_m H + h v_{m+1} e_m^T``; h_1 .. h_m its subdiagonal, h_m = h
    theta, y      Ritz pair: ``H y = theta y``, ``|y| = 1``

Inside. ``|A V y - theta V y| = h |y_m|``, so theta is an eigenvalue of some A + E with that 2-norm
of E; where A is normal, an eigenvalue of A lies within it of theta (Bauer and Fike 1960).

Outside. ``v_{m+1} = p(A) v_1`` with ``p(t) = prod_i (t - theta_i) / prod_j h_j``. For a left
eigenvector u, ``|u| = 1``, ``1 >= |u^* v_{m+1}| = |p(lambda)| |u^* v_1|``: an eigenvalue lies where
``|p| <= 1 / |u^* v_1|``, whether A is normal or not. v_1 is drawn without knowledge of u. For a
real u, ``P(|u^* v_1| <= delta) <= delta sqrt(2 n / pi)``, as the density of one coordinate on the
sphere is at most ``sqrt(n / (2 pi))`` around 0; a complex u has, up to its phase, a real part of
norm 1/sqrt(2) or more, so sqrt(2) delta takes the place of delta.

When h = 0 the space is closed: it holds, with probability one, every eigenvalue.

Sources: W. Arnoldi, Quart. Appl. Math. 9 (1951) 17. The outside bound, for symmetric A: J. van
Dorsselaer, M. Hochstenbach and H. van der Vorst, SIAM J. Matrix Anal. Appl. 22 (2000) 837; random
starts: J. Kuczynski and H. Wozniakowski, SIAM J. Matrix Anal. Appl. 13 (1992) 1094.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# The ends [inside, outside] of what is certain of an extreme value, after the value itself.
Ends = tuple[Tensor, Tensor, Tensor]


class Projection(NamedTuple):
    """What is known of the operators of A samples after m products each, float64, on the CPU."""

    hessenberg: Tensor  # (A, m, m)
    last: Tensor  # (A,): h, 0 where the space is closed
    rounding: Tensor  # (A,): 2-norm of the part of E that rounding is charged with

    def log_level(self, log_reach: float) -> Tensor:
        """``log(prod_j h_j / delta)`` ``(A,)``, with ``log_reach = -log(delta)``."""
        inner = self.hessenberg.diagonal(-1, 1, 2).abs().log().sum(1)
        level: Tensor = inner + self.last.log() + log_reach
        return level


class Outcome(NamedTuple):
    """``numbers`` ``(B, k)`` float64, NaN for samples without any; ``products`` ``(B,)`` int32;
    ``settled`` ``(B,)`` bool."""

    numbers: Tensor
    products: Tensor
    settled: Tensor


Read = Callable[[Projection], tuple[Tensor, Tensor]]


def log_reach(size: int, risk: float, *, symmetric: bool) -> float:
    """``-log(delta)``: with probability ``1 - risk`` one given left eigenvector, real for a
    symmetric operator, has a component above delta in a random start of ``size`` entries."""
    return 0.5 * math.log((2 if symmetric else 4) * max(size, 1) / math.pi) - math.log(risk)


def start_vector(size: int, generator: torch.Generator | None) -> Tensor:
    """``(size,)`` float64, uniform on the unit sphere; the same one for every sample, so that a
    sample's result does not depend on the other samples."""
    if generator is None:  # not the global stream: looking at a model must not change its training
        generator = torch.Generator().manual_seed(0)
    v = torch.randn(size, generator=generator, device=generator.device, dtype=torch.float64)
    return v.div_(v.norm())


def arnoldi(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    excluded: Tensor,
    eps: float,
    read: Read,
    max_products: int,
) -> Outcome:
    """Enlarges each sample's Krylov space until ``read`` is settled, it closes, or the limit.

    Args:
        product: rows ``(B, n)`` to the operators' rows ``(B, n)``; a sample that is excluded or
            done gets zeros.
        start: ``(n,)`` of norm 1, in the dtype and on the device of the rows.
        excluded: ``(B,)`` bool, samples that get NaN.
        eps: unit of the rounding of ``product``, relative to the norm of the operator.
        read: numbers ``(A, k)`` and settled ``(A,)`` of a :class:`Projection` of A samples.
        max_products: most products of a sample.
    """
    batch, size = len(excluded), len(start)
    limit = min(max_products, size)
    running, bad = ~excluded, excluded.clone()
    basis = start.new_zeros(batch, min(limit, 16), size)
    basis[:, 0] = start * running.unsqueeze(1)
    hessenberg = start.new_zeros(batch, limit + 1, limit, dtype=torch.float64)
    largest = start.new_zeros(batch, dtype=torch.float64)  # column of H, at most |A|
    numbers: Tensor | None = None
    products = torch.zeros(batch, dtype=torch.int32, device=start.device)
    settled = torch.zeros_like(bad)
    check = 4
    for m in range(1, limit + 1):
        w = product(basis[:, m - 1])
        finite = w.isfinite().all(1)
        bad, running = bad | (running & ~finite), running & finite
        w = torch.where(running.unsqueeze(1), w, 0.0)
        column = w.new_zeros(batch, m)
        for _ in range(2):  # classical Gram-Schmidt twice: orthogonal to machine precision
            projection = torch.bmm(basis[:, :m], w.unsqueeze(2)).squeeze(2)
            w = w - torch.bmm(projection.unsqueeze(1), basis[:, :m]).squeeze(1)
            column = column + projection
        length = torch.linalg.vector_norm(w, dim=1, dtype=torch.float64)
        largest = torch.maximum(largest, torch.hypot(column.double().norm(dim=1), length))
        closed = (length <= 10 * eps * largest) | (m == size)
        length = torch.where(closed, 0.0, length)
        hessenberg[:, :m, m - 1] = column.double()
        hessenberg[:, m, m - 1] = length

        due = running & (closed | (m in (check, limit)))
        if bool(due.any()):
            at = torch.nonzero(due).flatten()
            found, enough = read(_project(hessenberg[at, : m + 1, :m], eps))
            if numbers is None:
                numbers = found.new_full((batch, found.shape[1]), torch.nan).to(start.device)
            numbers[at], settled[at] = found.to(start.device), enough.to(start.device)
            products[at] = m
            running = running & ~(due & (settled | closed))
        if m == limit or not bool(running.any()):
            break
        if m == check:
            check = math.ceil(1.5 * m)
        if m == basis.shape[1]:  # memory follows what is needed, not the limit
            more = basis.new_zeros(batch, min(m, limit - m), size)
            basis = torch.cat([basis, more], 1)
        safe = torch.where(running, length, 1.0).to(w.dtype).unsqueeze(1)
        basis[:, m] = torch.where(running.unsqueeze(1), w / safe, 0.0)
    if numbers is None:
        numbers = start.new_full((batch, 3), torch.nan, dtype=torch.float64)
    numbers = torch.where(bad.unsqueeze(1), torch.nan, numbers)
    return Outcome(numbers, products, settled & ~bad)


def _project(columns: Tensor, eps: float) -> Projection:
    """From columns ``(A, m+1, m)``. Each is off by a few eps of its length, which bounds the 2-norm
    of all by a few eps of the Frobenius norm."""
    columns = columns.cpu()
    rounding = 4 * eps * torch.linalg.matrix_norm(columns)
    return Projection(columns[:, :-1], columns[:, -1, -1], rounding)


def modulus_ends(projection: Projection, log_reach: float) -> Ends:
    """The largest Ritz modulus, and the ends of where the spectral radius of a normal operator is;
    the outer end holds for any. ``(A,)`` each."""
    theta, y = torch.linalg.eig(projection.hessenberg)
    residual = projection.last.unsqueeze(1) * y[:, -1].abs()
    modulus = theta.abs()
    inside = (modulus - residual).amax(1) - projection.rounding
    outside = _outermost(theta, projection.log_level(log_reach)) + projection.rounding
    return modulus.amax(1), inside, outside


def largest_ends(projection: Projection, log_reach: float) -> Ends:
    """The largest Ritz value of a symmetric operator, and the ends of where its largest eigenvalue
    is. ``(A,)`` each."""
    h = projection.hessenberg
    theta = torch.linalg.eigvalsh((h + h.transpose(1, 2)) / 2)
    value = theta[:, -1]
    gap = value.unsqueeze(1) - theta

    def log_p(step: Tensor) -> Tensor:
        logs: Tensor = (gap + step.unsqueeze(1)).log()
        return logs.sum(1)

    outside = value + _largest_step(log_p, projection.log_level(log_reach), theta.shape[1])
    return value, value - projection.rounding, outside + projection.rounding


_SECTORS = 128


def _outermost(theta: Tensor, level: Tensor) -> Tensor:
    """The largest modulus at which ``sum_i log|t - theta_i| <= level``, or a little more, ``(A,)``.

    The operator is real, so the upper half plane is enough. In each sector of it every factor is
    taken at the angle nearest to its theta, so no point in between is overlooked.
    """
    modulus, angle = theta.abs().unsqueeze(1), theta.angle().unsqueeze(1)
    edges = torch.linspace(0, math.pi, _SECTORS + 1, dtype=modulus.dtype).view(1, -1, 1)
    turn = (angle - edges).abs()
    turn = torch.minimum(turn, 2 * math.pi - turn)
    nearest = torch.minimum(turn[:, :-1], turn[:, 1:])
    nearest = torch.where((edges[:, :-1] <= angle) & (angle <= edges[:, 1:]), 0.0, nearest)
    chord = (
        4 * modulus * (nearest / 2).sin().square()
    )  # |r e^(ia) - theta|^2 = (r-|theta|)^2 + r chord
    value = modulus.amax((1, 2))
    gap = value.view(-1, 1, 1) - modulus

    def log_p(step: Tensor) -> Tensor:
        step = step.view(-1, 1, 1)
        squares = (gap + step).square() + (value.view(-1, 1, 1) + step) * chord
        return (0.5 * squares.log()).sum(2).amin(1)

    return value + _largest_step(log_p, level, theta.shape[1])


def _largest_step(log_p: Callable[[Tensor], Tensor], level: Tensor, degree: int) -> Tensor:
    """The step at which the growing function ``log_p(step) >= degree log(step)`` passes ``level``,
    from above, within one percent, ``(A,)``; 0 where level is -inf."""
    most = (level / degree).exp()
    high, low = torch.zeros_like(most), torch.full_like(most, -30.0)  # log(step / most)
    for _ in range(12):
        middle = (high + low) / 2
        passed = log_p(most * middle.exp()) >= level
        high, low = torch.where(passed, middle, high), torch.where(passed, low, middle)
    return most * high.exp()
