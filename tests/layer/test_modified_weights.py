"""Solves with a weight to which something was attached: they are those of the W that is used."""

import pytest
import torch
from modified_weights import ATTACHED, lopsided

from fastdeq import AffineCell, DEQLayer, Neumann, Orthogonal, Picard, Symmetric

f64 = torch.float64
attached = pytest.mark.parametrize("how", ATTACHED)
families = pytest.mark.parametrize("family", [Orthogonal, Symmetric])


def solve_exactly(cell, x):
    """z* and the gradient of |z*|^2 with respect to x and the raw weight, by a dense solve."""
    w, c = cell.recurrent_weight(), cell.inject(x)
    z = torch.linalg.solve(torch.eye(len(w), dtype=w.dtype) - w, c.t()).t()
    grads = torch.autograd.grad(z.square().sum(), [x, cell.weight.weight])
    return z.detach(), grads


SOLVED = [name for name in ATTACHED if "backward" not in name]


@pytest.mark.parametrize(
    ("features", "batch", "backend"), [(33, 5, "auto"), (33, 5, "reference"), (530, 2, "auto")]
)
@pytest.mark.parametrize("how", SOLVED)
@families
def test_residuals_and_gradients_are_those_of_the_w_that_is_used(
    family, how, features, batch, backend
):
    cell = AffineCell(
        4, features, activation="identity", weight=family(features, 0.5, dtype=f64), dtype=f64
    )
    ATTACHED[how](cell.weight)
    layer = DEQLayer(cell, tol=1e-11, max_iter=400, backend=backend, on_failure="raise")
    x = torch.randn(batch, 4, dtype=f64, requires_grad=True)
    z = layer(x)
    true = (cell(z, x) - z).detach().norm(dim=1) / z.detach().norm(dim=1)
    assert (true < 1e-10).all()
    found = torch.autograd.grad(z.square().sum(), [x, cell.weight.weight])
    expected, grads = solve_exactly(cell, x)
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)
    for a, b in zip(found, grads, strict=True):
        assert (a - b).norm() <= 1e-8 * b.norm()


@pytest.mark.parametrize("how", SOLVED)
def test_no_certificate_of_a_weight_with_something_attached(how):
    cell = AffineCell(4, 12, activation="identity", weight="orthogonal", scale=0.6, dtype=f64)
    x = torch.randn(3, 4, dtype=f64)
    layer = DEQLayer(cell, solver="picard", tol=1e-4, max_iter=500)
    layer(x)
    assert layer.last_solution.error_bound is not None
    ATTACHED[how](cell.weight)
    layer(x)  # the same layer: decided anew at each call
    assert layer.last_solution.error_bound is None
    certified = Picard(fixed_iterations="certified")
    with pytest.raises(ValueError, match="certified"):
        DEQLayer(cell, solver=certified)(x)
    layer = DEQLayer(cell, adjoint=Neumann(fixed_iterations="certified"))
    with pytest.raises(ValueError, match="certified"):
        layer(x.clone().requires_grad_())


@attached
def test_no_energy_of_a_weight_with_something_attached(how):
    cell = AffineCell(4, 12, weight="symmetric", scale=0.6, dtype=f64)
    x = torch.randn(3, 4, dtype=f64, requires_grad=True)
    energy, minres = DEQLayer(cell, solver="energy"), DEQLayer(cell, adjoint="minres")
    energy(x)
    minres(x).sum().backward()
    ATTACHED[how](cell.weight)
    with pytest.raises(ValueError, match="not known to be symmetric"):
        energy(x)
    with pytest.raises(ValueError, match="not known to be symmetric"):
        minres(x)


@pytest.mark.parametrize("name", ["forward", "inject", "recurrent_weight"])
def test_a_method_patched_on_the_cell_is_used(name):
    cell = AffineCell(4, 4, weight="symmetric", scale=0.4, dtype=f64)
    method = getattr(cell, name)
    setattr(cell, name, lambda *a: 0.5 * method(*a))
    x = torch.randn(3, 4, dtype=f64)
    z = DEQLayer(cell, tol=1e-10, max_iter=300)(x)
    torch.testing.assert_close(cell(z, x), z, rtol=1e-8, atol=1e-8)


def test_a_compiled_layer_with_a_hook_on_its_weight(fresh_compiler):
    cell = AffineCell(4, 24, activation="identity", weight="symmetric", scale=0.5, dtype=f64)
    cell.weight.register_forward_hook(lambda m, i, o: lopsided(o))
    layer = DEQLayer(cell, tol=1e-11, max_iter=400)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 4, dtype=f64, requires_grad=True)
    z = compiled(x)
    found = torch.autograd.grad(z.square().sum(), [x, cell.weight.weight])
    expected, grads = solve_exactly(cell, x)
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)
    for a, b in zip(found, grads, strict=True):
        assert (a - b).norm() <= 1e-8 * b.norm()
