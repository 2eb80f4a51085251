"""Rows to be scaled for an adjoint solve, and what is right about the result.

``scale(slope, grad)`` gives rows, norm and largest; ``restore(value, norm, largest)`` the solution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdeq.ops import solve_affine_adjoint

DTYPES = (torch.float32, torch.float64)
SIZES = (1, 2, 31, 32, 33, 70, 257, 300)


def make_rows(batch: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Slopes, some of them 0 as those of relu, and gradients of about 1."""
    slope = torch.rand(batch, size, dtype=dtype) * (torch.rand(batch, size) < 0.7)
    return slope, torch.randn(batch, size, dtype=dtype)


def awkward_rows(size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A row of every kind that needs care; the last six are not usable."""
    info = torch.finfo(dtype)
    slope, grad = make_rows(15, size, dtype)
    slope[:, -1] = 0.5
    grad[:, -1] = 1.0
    slope[0] = 0
    slope[1], grad[1] = 0, torch.nan  # a row of zeros in D gives zeros, whatever g is
    grad[2] = 0
    grad[3] *= info.tiny**0.75  # squares vanish
    grad[4] *= info.max**0.75  # squares overflow
    slope[5] *= info.tiny**0.75  # D g is far smaller than g
    slope[6] *= info.tiny  # D g is not normal, or vanishes
    slope[7], grad[7] = 1, info.max / 2  # the product of the factors overflows
    grad[8] *= info.tiny  # not normal
    grad[9, -1] = torch.nan
    grad[10, 0] = torch.inf
    grad[11, -1] = -torch.inf
    slope[12, :] = 1.0
    slope[12, 0], grad[12, 0] = 0, torch.nan  # where D is 0
    slope[12, -1] = 1.0 if size > 1 else 0.0  # of one entry: again a row of zeros
    slope[13, -1] = torch.nan
    slope[14, -1], grad[14, -1] = 4.0, info.max / 2  # D g overflows
    return slope, grad


def usable_rows(slope: Tensor, grad: Tensor) -> Tensor:
    """Which rows have a finite solution: (B, 1)."""
    dead = (slope == 0).all(1, keepdim=True)
    inner = torch.where(slope == 0, 0.0, grad)
    finite = grad.isfinite().all(1, keepdim=True)
    return dead | (finite & (slope * inner).isfinite().all(1, keepdim=True))


def check_scaled(slope: Tensor, grad: Tensor, rows: Tensor, norm: Tensor, largest: Tensor) -> None:
    """Against the reference and float64; a factor or an entry that is off by 8 eps is seen."""
    eps = torch.finfo(slope.dtype).eps
    usable = usable_rows(slope, grad)
    assert norm.shape == largest.shape == usable.shape
    assert torch.equal(norm.isnan(), ~usable)
    assert torch.equal(rows.isnan(), (~usable).expand_as(rows))

    # As solve_affine_adjoint has it, where it is finite.
    dead = (slope == 0).all(1, keepdim=True)
    g = torch.where((slope == 0) | dead | ~usable, 0.0, grad)
    d = torch.where(usable, slope, 0.0)
    expected = solve_affine_adjoint.unit_rows(d * g, least=1e-30 * g.abs().amax(1, keepdim=True))
    # The same products and maxima, each rounded once: equal.
    assert torch.equal(largest[usable], expected.largest[usable])
    # The reference sums in its own dtype: n eps. In float64 the sum is good to an eps of float32.
    torch.testing.assert_close(
        norm[usable], expected.norm[usable], rtol=(slope.shape[1] + 4) * eps, atol=0
    )
    wide = (d.double() * (g / expected.largest).double()).norm(dim=1, keepdim=True).clamp(min=1)
    bound = 4 * eps if slope.dtype == torch.float32 else (slope.shape[1] + 4) * eps
    assert ((norm.double() - wide).abs() <= bound * wide)[usable].all()
    # Two divisions, each rounded once; a GPU may round them by one bit more.
    exact = g / expected.largest / norm
    error = (rows - exact).abs() <= 2 * eps * exact.abs()
    assert (error | ~usable).all()
    image = (slope * rows).double().norm(dim=1, keepdim=True)
    assert ((image < 1 + 1e-3) | ~usable).all()


def check_restored(value: Tensor, norm: Tensor, largest: Tensor, restored: Tensor) -> None:
    expected = value * norm * largest
    assert restored.shape == expected.shape
    assert torch.equal(restored.isnan(), expected.isnan())
    assert torch.equal(restored.nan_to_num(), expected.nan_to_num())  # nothing is rounded otherwise
