"""Gradients through steps, and limited adjoints, under ``torch.func``."""

import pytest
import torch
from torch.func import grad, jacfwd, vjp, vmap
from transform_cases import F64, close, input_for, layer_of

from fastdeq import Phantom, Truncated, Unrolled
from fastdeq.solve.affine_autograd import LinearSolve
from fastdeq.solve.spec import ignore


@pytest.mark.parametrize("kind", ["dense", "general"])
@pytest.mark.parametrize(
    "gradient",
    ["one_step", Phantom(steps=3, damping=0.7), Truncated(steps=4), Unrolled()],
    ids=repr,
)
def test_gradients_through_steps(kind, gradient):
    layer = layer_of(kind, gradient=gradient)
    x = input_for(layer, 1).requires_grad_()
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    close(grad(lambda x: layer(x).sum())(x.detach()), expected)
    close(jacfwd(lambda x: layer(x).sum())(x.detach()), expected)


def test_the_reversible_iteration_has_no_transforms():
    layer = layer_of("general", gradient="reversible")
    with pytest.raises(ValueError, match="unrolled"):
        grad(lambda x: layer(x).sum())(torch.ones(1, 5, dtype=F64))


@pytest.mark.parametrize("kind", ["dense", "general"])
def test_the_adjoint_is_limited(kind):
    layer = layer_of(kind, adjoint_limit=1.0)
    if kind == "general":  # I + J is larger than I
        layer.cell.linear.weight.data = 0.6 * torch.eye(5, dtype=F64)
    x = input_for(layer, 9).requires_grad_()
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    close(grad(lambda x: layer(x).sum())(x.detach()), expected)
    assert bool(layer.last_adjoint_solution.limited.any())
    z = layer(x)
    close(vmap(lambda g: torch.autograd.grad(z, x, g)[0])(torch.ones(1, *z.shape))[0], expected)


def test_a_linear_solve_in_every_mode():
    layer = layer_of("dense")
    layer(torch.ones(2, 3, dtype=F64))
    spec = layer._specs.adjoint
    weight = 0.5 * torch.linalg.qr(torch.randn(4, 4, dtype=F64))[0]
    tensors = (weight, torch.rand(3, 4, dtype=F64), torch.randn(3, 4, dtype=F64))
    for t in tensors:
        t.requires_grad_()

    def solve(*tensors):
        return LinearSolve.apply(spec, ignore, *tensors)

    weight, slope, g = (t.detach() for t in tensors)
    eye = torch.eye(4, dtype=F64)
    pairs = zip(slope, g, strict=True)
    each = [torch.linalg.solve(eye - d[:, None] * weight.t(), d * r) for d, r in pairs]
    q = torch.stack(each)
    close(solve(*tensors), q)
    how = {"check_batched_grad": True, "fast_mode": True}
    forward = {"check_forward_ad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(solve, tensors, **how, **forward)
    assert torch.autograd.gradgradcheck(solve, tensors, **how, check_fwd_over_rev=True)
    for i, dims in enumerate([(0, None, None), (None, 0, None), (None, None, 0)]):
        stacked = [torch.stack((t, 0.9 * t)) if j == i else t for j, t in enumerate(tensors)]
        rows = vmap(solve, dims)(*stacked)
        close(rows[1], solve(*[0.9 * t if j == i else t for j, t in enumerate(tensors)]))


@pytest.mark.parametrize("kind", ["dense", "general"])
def test_a_gradient_that_is_not_finite_leaves_as_nan(kind):
    layer = layer_of(kind, on_failure="ignore")
    x = input_for(layer)
    g = torch.ones(3, 5, dtype=F64)
    (expected,) = vjp(layer, x)[1](g)
    g[1, 0] = torch.inf
    (found,) = vjp(layer, x)[1](g)
    assert found[1].isnan().any()
    close(found[[0, 2]], expected[[0, 2]])
