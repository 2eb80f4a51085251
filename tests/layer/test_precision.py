"""The option ``precision``: what "mixed" insists on, and that nothing else notices it."""

import pytest
import torch

from fastdeq import AffineCell, BackendError, DEQLayer
from fastdeq.backends import extension

needs_low_precision = pytest.mark.skipif(
    not extension.has_low_precision, reason="this machine has no 8-bit and bfloat16 products"
)


@needs_low_precision
@pytest.mark.parametrize(
    ("reason", "options"),
    [
        ("no low-precision products", {"backend": "reference"}),
        ("no solver 'gmres'", {"adjoint": "gmres"}),
        ("float64", {"dtype": torch.float64}),
    ],
)
def test_mixed_raises_where_it_cannot_be_had(reason, options):
    dtype = options.pop("dtype", torch.float32)
    layer = DEQLayer(AffineCell(4, 8, scale=0.5, dtype=dtype), precision="mixed", **options)
    with pytest.raises(BackendError, match=reason):
        layer(torch.randn(3, 4, dtype=dtype))


def test_unknown_precision_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'auto', 'float32', 'mixed'"):
        DEQLayer(AffineCell(4, 8, scale=0.5), precision="bfloat16")


@needs_low_precision
@pytest.mark.parametrize("weight", ["dense", "orthogonal", "symmetric"])
def test_gradients_agree_to_the_tolerance(weight):
    """|z - z*| <= tol |z| / (1 - L) and likewise for the adjoint: L = 0.6 gives 2.5 tol each, and
    the slope at z, which both share, turns the first into about as much again."""
    cell = AffineCell(16, 128, weight=weight, scale=0.6)
    x = torch.randn(20, 16)
    grads = {}
    for precision in ("float32", "mixed"):
        layer = DEQLayer(cell, precision=precision, tol=1e-5)
        z = layer(x)
        grads[precision] = torch.autograd.grad(z.square().sum(), list(cell.parameters()))
        assert layer.last_solution.converged.all()
        assert layer.last_adjoint_solution.converged.all()
    for exact, mixed in zip(grads["float32"], grads["mixed"], strict=True):
        assert (exact - mixed).norm() <= 1e-4 * exact.norm()
