"""Slow modes and badly scaled slopes, which low precision and scaled adjoints must not hide."""

import pytest
import torch
from engine_cases import Adjoint, Call, Forward

from fastdeq import AffineCell, DEQLayer
from fastdeq.backends import extension
from fastdeq.solvers import Anderson, Neumann

pytestmark = pytest.mark.skipif(
    extension.module is None, reason=f"no compiled extension: {extension.why_missing}"
)


@pytest.mark.parametrize("tol", [1e-4, 1e-5])
@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_a_slow_mode_of_any_amplitude_is_accelerated(precision, tol):
    """One eigenvalue is 0.995. Plain iteration takes 500 steps once it is what is left; when that
    is seen depends on its amplitude, here from 1e-6 to 1."""
    d = 64
    q = torch.linalg.qr(torch.randn(d, d)).Q
    eigenvalues = 0.4 * torch.rand(d)
    eigenvalues[0] = 0.995
    weight = q @ torch.diag(eigenvalues) @ q.T
    amplitudes = torch.logspace(-6, 0, 60)[:, None]
    c = torch.randn(60, d) @ (torch.eye(d) - torch.outer(q[:, 0], q[:, 0])) + amplitudes * q[:, 0]
    call = Call(Anderson(accelerate_above=0.9), tol, 500, precision)
    _, status, iterations, *_ = Forward(weight, c, "identity").engine(call)
    assert (status == 0).all()
    assert iterations.max() <= 60
    assert iterations.float().mean() <= 25


SATURATED = {"softplus": -90.0, "sigmoid": -90.0, "elu": -90.0, "silu": -100.0, "gelu": -13.5}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("activation", SATURATED)
def test_a_saturated_sample_does_not_spoil_the_gradient(activation, backend):
    """Its slopes are near the smallest numbers of float32: |g| / |D g| overflows."""
    cell = AffineCell(4, 16, scale=0.3, activation=activation)
    with torch.no_grad():
        cell.injection.weight.zero_()
        cell.injection.bias.zero_()
        cell.injection.weight[:, 0] = SATURATED[activation]
    x = torch.randn(5, 4)
    x[:, 0] = 0
    x[3, 0] = 1
    layer = DEQLayer(cell, backend=backend)
    layer(x).sum().backward()
    assert layer.last_adjoint_solution.converged.all()
    assert all(p.grad.isfinite().all() for p in cell.parameters())


@pytest.mark.parametrize("engine", ["cpp", "reference"])
def test_slopes_far_below_the_stop_test_still_give_a_gradient(engine):
    slope, grad = torch.full((2, 4), 1e-14), torch.randn(2, 4)
    call = Call(Neumann(), 1e-4, 50, "auto")
    q, status, *_ = Adjoint(0.5 * torch.eye(4), slope, grad).run(call, engine)
    assert (status == 0).all()
    torch.testing.assert_close(q, slope * grad)


@pytest.mark.parametrize("engine", ["cpp", "reference"])
def test_a_gradient_where_the_slope_is_zero_does_not_set_the_scale(engine):
    slope, grad = torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[1e-30, 1e10, 2e-30]])
    call = Call(Neumann(), 1e-4, 50, "auto")
    q, *_ = Adjoint(torch.zeros(3, 3), slope, grad).run(call, engine)
    torch.testing.assert_close(q, slope * grad, rtol=1e-4, atol=0)
