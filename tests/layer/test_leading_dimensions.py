"""Leading dimensions of an affine cell's input, against the solve of the same vectors as rows."""

import math

import pytest
import torch
from layer_cases import affine

from fastdeq import AffineCell, DEQLayer, Picard
from fastdeq.diagnostics import spectral_radius

F64 = torch.float64
LEADING = [(), (3,), (2, 3), (2, 1, 2), (0, 3)]


class Mine(Picard):
    """A solver that no operator knows, so that the cell is solved as a general map."""


def variants():
    """A layer for each way that an affine cell is solved."""
    yield "fused", {}, lambda cell: cell
    yield "own solver", {"solver": Mine()}, lambda cell: cell
    yield "one step", {"gradient": "one_step"}, lambda cell: cell
    yield "watched", {"keep_solutions": 2}, lambda cell: cell
    yield "hook", {}, lambda cell: (cell.register_forward_hook(lambda *a: None), cell)[1]
    hook = lambda *a: None  # noqa: E731
    yield "hook of U", {}, lambda cell: (cell.injection.register_forward_hook(hook), cell)[1]


VARIANTS = {name: (options, change) for name, options, change in variants()}


@pytest.mark.parametrize("leading", LEADING, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_equal_to_the_solve_of_rows(name, leading):
    options, change = VARIANTS[name]
    cell = change(AffineCell(4, 5, scale=0.5, dtype=F64))
    layer = DEQLayer(cell, tol=1e-10, max_iter=300, **options)
    x = torch.randn(*leading, 4, dtype=F64, requires_grad=True)
    z0 = torch.randn(*leading, 5, dtype=F64)
    batch = math.prod(leading)
    rows = x.detach().reshape(batch, 4).requires_grad_()
    leaves = list(cell.parameters())
    for given, start in ((None, None), (z0, z0.reshape(batch, 5))):
        z = layer(x, z0=given)
        found = layer.last_solution
        assert z.shape == (*leading, 5)
        assert found.value.shape == z.shape
        assert found.status.shape == (batch,)
        assert found.batch_dim == (0 if len(leading) == 1 else tuple(range(len(leading))) or None)
        expected = layer(rows, z0=start)
        known = layer.last_solution
        torch.testing.assert_close(z, expected.reshape(z.shape), rtol=0, atol=0)
        torch.testing.assert_close(found.residual, known.residual, rtol=0, atol=0)
        assert found.path == known.path
        grads = torch.autograd.grad(z.pow(2).sum(), [x, *leaves])
        others = torch.autograd.grad(expected.pow(2).sum(), [rows, *leaves])
        torch.testing.assert_close(grads[0].reshape(rows.shape), others[0], rtol=1e-9, atol=1e-12)
        for one, other in zip(grads[1:], others[1:], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        if name != "one step":
            assert layer.last_adjoint_solution.status.shape == (batch,)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), z.detach(), rtol=1e-8, atol=1e-8)
        assert layer.last_solution.value.shape == z.shape


@pytest.mark.parametrize("leading", [(), (2, 2)], ids=str)
def test_gradients_of_second_order(leading):
    layer = DEQLayer(AffineCell(2, 3, scale=0.5, dtype=F64), tol=1e-13, max_iter=300)
    x = torch.randn(*leading, 2, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x, atol=1e-4)


@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_a_step_of_the_cell_takes_the_same_shapes(leading):
    cell = AffineCell(4, 5, scale=0.5)
    z, x = torch.randn(*leading, 5), torch.randn(*leading, 4)
    batch = math.prod(leading)
    rows = cell(z.reshape(batch, 5), x.reshape(batch, 4))
    torch.testing.assert_close(cell(z, x), rows.reshape(z.shape))
    assert cell.initial_state(x).shape == z.shape


def test_a_vector_that_is_not_finite_is_set_aside_alone():
    layer = DEQLayer(AffineCell(4, 5, scale=0.5), on_failure="ignore", keep_solutions=3)
    x = torch.randn(2, 3, 4)
    good = layer(x)
    bad = x.clone()
    bad[1, 0, 2] = math.inf
    z = layer(bad)
    assert layer.last_solution.nonfinite.tolist() == [False] * 3 + [True] + [False] * 2
    assert z[1, 0].abs().sum() == 0
    torch.testing.assert_close(z[0], good[0])
    assert [s.status.shape for s in layer.solutions["forward"]] == [(6,)] * 2


def test_certificates_and_diagnostics():
    cell = AffineCell(4, 5, weight="orthogonal", scale=0.8, dtype=F64)
    layer = DEQLayer(cell, tol=1e-3)
    x = torch.randn(2, 3, 4, dtype=F64)
    layer(x)
    assert layer.last_solution.error_bound.shape == (6,)
    layer(x[0, 0])
    assert layer.last_solution.error_bound.shape == (1,)
    found = spectral_radius(layer, x).value
    torch.testing.assert_close(found, spectral_radius(layer, x.view(6, 4)).value)
    assert spectral_radius(cell, x[0, 0]).value.shape == (1,)


def test_shapes_that_do_not_fit():
    layer = DEQLayer(affine())
    n = layer.cell.in_features
    for x in (torch.zeros(n + 1), torch.zeros(2, 3, n + 1), torch.zeros(())):
        with pytest.raises(ValueError, match=rf"shape .* needs \(\.\.\., {n}\)"):
            layer(x)
    with pytest.raises(ValueError, match=r"z0 is \(6, 6\); it must have shape \(2, 3, 6\)"):
        layer(torch.zeros(2, 3, n), z0=torch.zeros(6, 6))
    with pytest.raises(ValueError, match=r"batch_dim=1.*each vector is a sample"):
        DEQLayer(affine(), batch_dim=1)(torch.zeros(2, 3, n))


def test_another_injection_judges_its_own_input():
    cell = AffineCell(4, 5)
    cell.injection = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    layer = DEQLayer(cell)
    assert layer(torch.randn(2, 3, 4)).shape == (2, 5)


def test_leading_dimensions_in_a_compiled_program(fresh_compiler):
    layer = DEQLayer(AffineCell(4, 5))
    whole = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for shape in ((4,), (2, 3, 4)):
        x = torch.randn(shape, requires_grad=True)
        z = whole(x)
        torch.testing.assert_close(z, layer(x))
        (found,) = torch.autograd.grad(z.sum(), x)
        torch.testing.assert_close(found, torch.autograd.grad(layer(x).sum(), x)[0])


def test_under_vmap_a_vector_or_more_is_an_example():
    layer = DEQLayer(AffineCell(4, 5, scale=0.5, dtype=F64), tol=1e-10, max_iter=300)
    x = torch.randn(2, 3, 6, 4, dtype=F64)
    expected = layer(x)
    for example in (x[0, 0], x[0], x):
        z = torch.func.vmap(layer)(example)
        torch.testing.assert_close(z, expected.flatten()[: z.numel()].view(z.shape))
