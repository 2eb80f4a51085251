"""``adjoint_limit``: adjoints of samples next to a singular ``I - J`` are scaled down, the others
are left alone."""

import pytest
import torch
from tracked_cases import KINDS, every_kind, gradients, problem, same, whole

from fastdeq import AffineCell, DEQLayer, Status, fixed_point

NEAR = 0.999  # 1 / (1 - NEAR) = 1000
TIGHT = {"tol": 1e-12, "max_iter": 60}


def linear(kind, **options):
    """``z = diag(NEAR, 0.1, 0.1, 0.1) z + x``, with the adjoint ``g / (1 - diag)``."""
    cell = AffineCell(4, 4, activation="identity", dtype=torch.float64)
    with torch.no_grad():
        cell.weight.weight.copy_(torch.diag(torch.tensor([NEAR, 0.1, 0.1, 0.1])))
        cell.injection.weight.copy_(torch.eye(4))
        cell.injection.bias.zero_()
    return DEQLayer(KINDS[kind](cell), **(TIGHT | options)), cell


def x_and_g():
    x = torch.randn(3, 4, dtype=torch.float64).requires_grad_()
    g = torch.tensor([[2.0, 0, 0, 0], [0, 3, 1, 0], [0, 0, 0, 0]], dtype=torch.float64)
    return x, g


@every_kind
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("adjoint", ["auto", "gmres", "anderson"])
def test_what_exceeds_it_is_scaled_down(kind, create_graph, adjoint):
    layer, cell = linear(kind, adjoint_limit=10.0, adjoint=adjoint)
    x, g = x_and_g()
    z = whole(layer(x))
    inputs = [x, cell.weight.weight]
    found = torch.autograd.grad((z * g).sum(), inputs, create_graph=create_graph)
    u = torch.stack([10 * g[0], g[1] / 0.9, g[2]])
    same(found, [u, u.t() @ z], rtol=1e-8, atol=1e-8)
    solution = layer.last_adjoint_solution
    assert solution.limited.tolist() == [True, False, False]
    assert solution.converged.all()
    same([whole(solution.value)], [u], rtol=1e-8, atol=1e-8)
    assert "1 limited" in repr(solution)


@every_kind
def test_one_that_nothing_exceeds_changes_no_bit(kind):
    results = []
    for limit in (None, 1e6):
        layer, cell, x = problem(kind, adjoint_limit=limit, keep_solutions=3)
        results.append(gradients(layer(x), cell, x))
        (adjoint,) = layer.solutions["adjoint"]
        assert (adjoint.limited is None) == (limit is None)
        assert limit is None or not adjoint.limited.any()
    for a, b in zip(*results, strict=True):
        if kind == "fused":  # with None the compiled node, which adds in another order
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)
        else:
            assert torch.equal(a, b)


@every_kind
def test_an_adjoint_that_does_not_converge_is_limited_too(kind):
    layer, _ = linear(kind, adjoint_limit=5.0, adjoint="neumann", on_failure="ignore")
    x, g = x_and_g()
    (found,) = torch.autograd.grad((whole(layer(x)) * g).sum(), x)
    adjoint = layer.last_adjoint_solution
    assert adjoint.status.tolist() == [Status.MAX_ITER, 0, 0]  # 60 g after 60 steps
    assert adjoint.limited.tolist() == [True, False, False]
    # An affine cell has ``u = g + q W``, one step of 60 beyond what was found.
    same([found[0]], [5 * g[0]], rtol=0.02, atol=0.0)


@every_kind
def test_second_derivatives_of_samples_that_are_not_limited(kind):
    layer, _, x = problem(kind, scale=0.9, adjoint_limit=1.2, **TIGHT)

    def gradient(x):
        z = whole(layer(x))
        return torch.autograd.grad(z.sin().sum(), x, create_graph=True)[0]

    second = torch.autograd.grad(gradient(x).square().sum(), x)[0]
    limited = layer.last_adjoint_solution.limited
    assert second.isfinite().all()
    gradient(x)
    limited = limited | layer.last_adjoint_solution.limited
    assert limited.any()
    assert not limited.all()
    free = x[~limited].detach().requires_grad_()
    assert torch.autograd.gradcheck(gradient, (free,), atol=1e-6)
    same([second[~limited]], torch.autograd.grad(gradient(free).square().sum(), free))


@every_kind
def test_bad_samples_and_gradients_that_are_not_finite(kind):
    layer, _ = linear(kind, adjoint_limit=10.0, on_failure="ignore")
    x, g = x_and_g()
    bad = x.detach().clone()
    bad[0, 0] = torch.nan
    bad.requires_grad_()
    (found,) = torch.autograd.grad((whole(layer(bad)) * g).sum(), bad)
    same([found], [torch.stack([0 * g[0], g[1] / 0.9, g[2]])], rtol=1e-8, atol=1e-8)
    g[1, 1] = torch.inf
    (found,) = torch.autograd.grad(whole(layer(x)), x, g) if kind != "pair" else (None,)
    if found is not None:
        assert found[1].isnan().any()
        same([found[0]], [10 * g[0]])


def test_functions_and_float32():
    theta = torch.tensor([NEAR], requires_grad=True)
    seen = []
    z, _ = fixed_point(
        lambda z: theta * z + 1,
        torch.full((2, 1), 1000.0),
        adjoint_limit=2.0,
        on_solution=lambda direction, s: seen.append((direction, s.limited)),
    )
    (grad,) = torch.autograd.grad(z.sum(), theta)
    assert [d for d, _ in seen] == ["forward", "adjoint"]
    assert seen[0][1] is None
    assert seen[1][1].tolist() == [True, True]
    torch.testing.assert_close(grad, 2.0 * z.sum().detach().reshape(1))


def test_the_compiled_node_serves_layers_without_a_limit():
    x = torch.randn(2, 3)
    for limit in (None, 10.0):
        layer = DEQLayer(AffineCell(3, 8), adjoint_limit=limit)
        node = layer(x).grad_fn
        assert (type(node).__name__ == "AffineFixedPointBackward") == (limit is not None)


@pytest.mark.parametrize("limit", [0.5, 0, -1, float("nan"), float("inf"), "10", True])
def test_wrong_limits(limit):
    with pytest.raises(ValueError, match="adjoint_limit must be a finite number >= 1"):
        problem("fused", adjoint_limit=limit)


@pytest.mark.parametrize("gradient", ["one_step", "phantom", "reversible"])
def test_gradients_without_an_adjoint_are_refused(gradient):
    with pytest.raises(ValueError, match="leave adjoint_limit out"):
        problem("fused", adjoint_limit=10.0, gradient=gradient)
