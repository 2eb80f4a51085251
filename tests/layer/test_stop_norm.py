"""Convergence by the largest entry of the residual."""

import pytest
import torch

from fastdeq import AffineCell, BackendError, DEQLayer, Picard, fixed_point


def spread(dtype=torch.float64):
    """Slopes from 0.5 to 0.9: the residual of the slowest entry is all that is left."""
    slopes = torch.linspace(0.5, 0.9, 50, dtype=dtype)
    return lambda z: slopes * z + 1


def ratio(f, z, ord):
    return torch.linalg.vector_norm(f(z) - z, ord, 1) / torch.linalg.vector_norm(f(z), ord, 1)


@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden", "heavy_ball"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_entry_meets_the_tolerance(solver, dtype):
    f, z0 = spread(dtype), torch.zeros(3, 50, dtype=dtype)
    z, solution = fixed_point(f, z0, solver=solver, tol=1e-4, stop_norm="max")
    assert solution.converged.all()
    found = ratio(f, z, torch.inf)
    assert (found <= 1e-4).all()
    # Both are differences of entries of size 10, rounded.
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(solution.residual, found, atol=rounding, rtol=1e-3)


def test_it_is_another_criterion():
    f, z0 = spread(), torch.zeros(1, 50, dtype=torch.float64)
    counts = {}
    for norm in ("2", "max"):
        z, solution = fixed_point(f, z0, solver=Picard(), tol=1e-4, stop_norm=norm)
        ord = 2 if norm == "2" else torch.inf
        previous = z - (f(z) - z) / torch.linspace(0.5, 0.9, 50, dtype=torch.float64)
        assert ratio(f, z, ord).item() <= 1e-4 < ratio(f, previous, ord).item()
        counts[norm] = int(solution.iterations)
    assert counts["2"] != counts["max"]


@pytest.mark.parametrize("weight", ["dense", "symmetric", "orthogonal"])
def test_affine_cells_and_gradients(weight):
    cell = AffineCell(3, 16, scale=0.8, weight=weight, dtype=torch.float64)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    layer = DEQLayer(cell, tol=1e-10, stop_norm="max", max_iter=300)
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    (expected,) = torch.autograd.grad(DEQLayer(cell, tol=1e-10)(x).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    assert layer.last_adjoint_solution.converged.all()


def test_parts_each_by_their_largest_entry():
    f, z0 = spread(), torch.zeros(2, 50, dtype=torch.float64)

    def both(state):
        a, b = state
        return f(a), 0.95 * b + 1e-3

    options = {"tol": 1e-5, "stop_norm": "max", "max_iter": 500}
    (a, b), solution = fixed_point(both, (z0, z0[:, :4]), **options)
    assert solution.converged.all()
    assert (ratio(f, a, torch.inf) <= 1e-5).all()
    assert (ratio(lambda b: 0.95 * b + 1e-3, b, torch.inf) <= 1e-5).all()


def test_what_does_not_go_with_it():
    with pytest.raises(ValueError, match="'2', 'max'"):
        DEQLayer(AffineCell(3, 4), stop_norm="inf")
    with pytest.raises(ValueError, match="compact"):
        DEQLayer(torch.nn.Identity(), stop_norm="max", compact=True)
    layer = DEQLayer(AffineCell(3, 4), stop_norm="max", backend="cpp")
    with pytest.raises(BackendError, match="plain PyTorch"):
        layer(torch.zeros(2, 3))
    with pytest.raises(BackendError, match="plain PyTorch"):
        fixed_point(torch.cos, torch.zeros(2, 3), stop_norm="max", backend="cpp")
