"""Gradients through steps, and limited adjoints, under ``torch.func``."""

import pytest
import torch
from torch.func import grad, jacfwd, vmap
from transform_cases import F64, close, input_for, layer_of

from fastdeq import Phantom, Truncated, Unrolled


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
