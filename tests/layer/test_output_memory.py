"""The memory of the output is the caller's: what is recorded and what is saved is elsewhere."""

import pytest
import torch
from layer_cases import Residual, affine
from node_cases import NODES, use_node
from torch import nn

from fastdeq import DEQLayer, fixed_point

KINDS = ["dense", "orthogonal", "symmetric", "general", "one_step"]


def layer_of(kind, dtype):
    cell = Residual() if kind == "general" else affine(weight="dense")
    if kind in ("orthogonal", "symmetric"):
        cell = affine(weight=kind)
    gradient = "one_step" if kind == "one_step" else "implicit"
    return DEQLayer(cell.to(dtype), gradient=gradient)


def successors():
    return [
        pytest.param(lambda z: z.relu_(), id="relu"),
        pytest.param(lambda z: nn.functional.dropout(z, 0.5, inplace=True), id="dropout"),
        pytest.param(lambda z: z[:, 1:].mul_(3.0), id="view"),
    ]


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("write", successors())
@pytest.mark.parametrize("grad", [True, False])
def test_writing_to_the_output_leaves_the_record_alone(monkeypatch, node, kind, dtype, write, grad):
    use_node(monkeypatch, node)
    layer = layer_of(kind, dtype)
    if kind == "general" and dtype == torch.bfloat16:
        pytest.skip("needs a looser tolerance")
    x = torch.randn(7, 6, dtype=dtype)
    with torch.set_grad_enabled(grad):
        z = layer(x)
        before = z.detach().clone()
        write(z)
    assert not torch.equal(z, before)
    assert torch.equal(layer.last_solution.value, before)


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_through_a_layer_that_writes_to_the_output(monkeypatch, node, kind, dtype):
    use_node(monkeypatch, node)
    layer = layer_of(kind, dtype)
    x = torch.randn(7, 6, dtype=dtype, requires_grad=True)
    found = []
    for inplace in (False, True):
        layer.zero_grad()
        x.grad = None
        nn.functional.relu(layer(x), inplace=inplace).pow(2).sum().backward()
        found.append([x.grad, *(p.grad.clone() for p in layer.parameters())])
    for plain, written in zip(*found, strict=True):
        assert torch.equal(plain, written)


def test_second_derivatives_after_writing_to_the_output():
    layer = layer_of("dense", torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    found = []
    for inplace in (False, True):
        z = nn.functional.softplus(layer(x)) if not inplace else layer(x)
        if inplace:
            z.copy_(nn.functional.softplus(z.clone()))
        (first,) = torch.autograd.grad(z.sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.pow(2).sum(), [x, *layer.parameters()]))
    for plain, written in zip(*found, strict=True):
        torch.testing.assert_close(plain, written, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("grad", [True, False])
def test_writing_to_the_result_of_fixed_point(grad):
    c = torch.randn(4, 3, requires_grad=grad)
    z, solution = fixed_point(lambda z: 0.5 * torch.tanh(z) + c, torch.zeros(4, 3))
    before = z.detach().clone()
    z.mul_(2.0)
    assert torch.equal(solution.value, before)
    if grad:
        z.sum().backward()
        assert c.grad.isfinite().all()


def test_writing_to_the_record_is_seen_by_the_backward_pass(monkeypatch):
    for node in NODES:
        with monkeypatch.context() as patch:
            use_node(patch, node)
            layer = layer_of("dense", torch.float32)
            z = layer(torch.randn(4, 6))
            layer.last_solution.value.zero_()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                z.sum().backward()
