"""Broyden's method in layers: parts, gradients, affine cells, options."""

import pytest
import torch

from fastdeq import AffineCell, BackendError, Broyden, DEQLayer, fixed_point

F64 = {"dtype": torch.float64}


def test_tuple_states_and_gradients():
    w = (0.9 * torch.linalg.qr(torch.randn(6, 6, **F64))[0]).requires_grad_()
    b = torch.randn(4, 6, requires_grad=True, **F64)

    def f(state):
        x, y = state
        return torch.tanh(y @ w.t()[:2] + b), x[:, :2] * 0.5

    start = (torch.zeros(4, 6, **F64), torch.zeros(4, 2, **F64))
    grads = []
    for solver in ("broyden", "picard"):
        options = {"solver": solver, "adjoint": solver, "tol": 1e-11, "max_iter": 2000}
        (x, y), solution = fixed_point(f, start, **options)
        assert solution.converged.all()
        grads.append(torch.autograd.grad((x**2).sum() + y.sum(), (w, b)))
    for mine, plain in zip(*grads, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("weight", ["dense", "orthogonal", "symmetric"])
def test_affine_cells_in_both_directions(weight):
    cell = AffineCell(4, 16, weight=weight, scale=0.9).double()
    x = torch.randn(6, 4, **F64)
    layer = DEQLayer(cell, solver=Broyden(8), adjoint="broyden", tol=1e-11, max_iter=500)
    z = layer(x)
    grads = torch.autograd.grad(z.square().sum(), list(cell.parameters()))
    plain = DEQLayer(cell, solver="picard", adjoint="gmres", tol=1e-11, max_iter=2000)
    expected = torch.autograd.grad(plain(x).square().sum(), list(cell.parameters()))
    assert layer.last_solution.converged.all()
    assert layer.last_adjoint_solution.converged.all()
    assert layer.last_solution.path == "fused"
    for mine, other in zip(grads, expected, strict=True):
        assert (mine - other).norm() <= 1e-8 * other.norm()


def test_an_explicit_engine_says_that_it_has_no_such_solver():
    layer = DEQLayer(AffineCell(3, 4, scale=0.9), solver="broyden", backend="cpp")
    with pytest.raises(BackendError, match="no solver 'broyden'"):
        layer(torch.randn(2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 0}, "memory must be an integer from 1"),
        ({"memory": 2.5}, "memory must be an integer"),
        ({"damping": 0.0}, r"damping must be in \(0, 1\]"),
        ({"safeguard": 0.5}, "safeguard must be >= 1"),
        ({"safeguard": float("nan")}, "safeguard must be >= 1"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Broyden(**options)
