"""The compiled node of an affine solve against the one in Python, its reference."""

import gc
import threading
import weakref

import pytest
import torch
from gradient_cases import TIGHT, as_function, make_cell, parameters_of
from node_cases import NODES, is_compiled, use_node
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from fastdeq import AffineCell, Anderson, ConvergenceError, ConvergenceWarning, DEQLayer, Status


@pytest.fixture(params=NODES)
def node(request, monkeypatch):
    use_node(monkeypatch, request.param)
    return request.param


def layer_of(n=5, d=9, dtype=torch.float32, weight="dense", bias=True, **options):
    torch.manual_seed(d)
    cell = AffineCell(n, d, weight=weight, scale=0.7, dtype=dtype, bias=bias)
    return DEQLayer(cell, **options)


def results(layer, x, grad, z0=None):
    """Value, gradients and both solutions of one step."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    z = layer(x, z0=z0)
    z.backward(grad)
    solutions = layer.last_solution, layer.last_adjoint_solution
    parts = [(s.value, s.status, s.iterations, s.residual, *s.rejects.values()) for s in solutions]
    return z, x.grad, *(p.grad for p in layer.parameters()), *parts[0], *parts[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "d", "batch"), [(3, 1, 1), (5, 9, 4), (31, 64, 17), (70, 130, 33)])
@pytest.mark.parametrize("weight", ["dense", "orthogonal"])
@pytest.mark.parametrize("bias", [True, False])
def test_both_nodes_agree_to_the_last_bit(monkeypatch, dtype, n, d, batch, weight, bias):
    layer = layer_of(n, d, dtype, weight, bias)
    x, grad = torch.randn(batch, n, dtype=dtype), torch.randn(batch, d, dtype=dtype)
    found = {}
    for name in NODES:
        with monkeypatch.context() as patch:
            use_node(patch, name)
            found[name] = results(layer, x, grad)
            assert is_compiled(found[name][0]) == (name == "compiled")
    for ours, reference in zip(*found.values(), strict=True):
        assert torch.equal(ours, reference)


@pytest.mark.parametrize("start", [None, 0.1])
@pytest.mark.parametrize("layout", ["transposed", "slice of time", "expanded"])
def test_input_of_any_layout(monkeypatch, start, layout):
    layer = layer_of(6, 11)
    x = {
        "transposed": torch.randn(6, 8).t(),
        "slice of time": torch.randn(8, 3, 6)[:, 1],
        "expanded": torch.randn(1, 6).expand(8, 6),
    }[layout]
    z0 = None if start is None else torch.full((11, 8), start).t()
    grad, found = torch.randn(11, 8).t(), []
    for name in NODES:
        with monkeypatch.context() as patch:
            use_node(patch, name)
            found.append(results(layer, x, grad, z0))
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("adjoint", ["neumann", Anderson(window=2)], ids=str)
def test_first_and_second_derivatives(node, adjoint):
    cell = make_cell(weight="orthogonal", n=2, d=4)
    names, leaves = parameters_of(cell)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    run = as_function(DEQLayer(cell, adjoint=adjoint, **TIGHT), names)
    assert is_compiled(run(x, *leaves)) == (node == "compiled")
    assert gradcheck(run, (x, *leaves))
    assert gradgradcheck(run, (x, *leaves))


def test_second_derivatives_of_both_nodes_are_equal(monkeypatch):
    layer, found = layer_of(4, 7, torch.float64), []
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    for name in NODES:
        with monkeypatch.context() as patch:
            use_node(patch, name)
            (first,) = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
            second = torch.autograd.grad(first.pow(2).sum(), [x, *layer.parameters()])
            found.append((first, *second))
    for ours, reference in zip(*found, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("frozen", ["weight.weight", "injection.weight", "injection.bias", "all"])
def test_frozen_parameters_get_nothing_and_harm_nothing(node, frozen):
    layer = layer_of(4, 6)
    x = torch.randn(3, 4, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    for name, p in layer.cell.named_parameters():
        p.requires_grad_(frozen not in (name, "all"))
    layer(x).sum().backward()
    for t, g in zip([x, *layer.parameters()], expected, strict=True):
        assert torch.equal(t.grad, g) if t.requires_grad else t.grad is None
    # An input that was asked for alone.
    (gx,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(gx, expected[0])


def test_a_frozen_input_map_may_change_before_the_backward_pass(node):
    layer = layer_of(4, 6)
    z = layer(torch.randn(3, 4))  # x needs no gradient, so U is not needed either
    with torch.no_grad():
        layer.cell.injection.weight.zero_()
    z.sum().backward()
    z = layer(torch.randn(3, 4))
    with torch.no_grad():
        layer.cell.weight.weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_hooks_see_each_gradient_once(node):
    layer, seen = layer_of(4, 6), []
    x = torch.randn(3, 4, requires_grad=True)
    (plain,) = torch.autograd.grad(layer(x).sum(), x)
    z = layer(x)
    z.register_hook(lambda g: seen.append("z") or 3 * g)
    z.retain_grad()
    for name, p in layer.named_parameters():
        p.register_hook(lambda g, name=name: seen.append(name))
    z.sum().backward()
    assert sorted(seen) == sorted(["z", *dict(layer.named_parameters())])
    torch.testing.assert_close(x.grad, 3 * plain)
    torch.testing.assert_close(z.grad, torch.full_like(z, 3.0))


def test_backward_twice(node):
    layer = layer_of()
    x = torch.randn(4, 5, requires_grad=True)
    z = layer(x).sum()
    z.backward(retain_graph=True)
    first = x.grad.clone()
    z.backward()
    assert torch.equal(x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        z.backward()


def test_anomaly_mode_and_saved_tensor_hooks(node):
    layer, packed = layer_of(), []
    x = torch.randn(4, 5)
    layer(x).sum().backward()
    expected = layer.cell.weight.weight.grad.clone()
    layer.zero_grad()
    with (
        torch.autograd.detect_anomaly(check_nan=True),
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: packed.append(t.shape) or t.clone(), lambda t: t
        ),
    ):
        layer(x).sum().backward()
    assert packed
    assert torch.equal(layer.cell.weight.weight.grad, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(node, reentrant):
    layer = layer_of()
    x = torch.randn(4, 5, requires_grad=True)
    expected = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
    for t, g in zip([x, *layer.parameters()], expected, strict=True):
        assert torch.equal(t.grad, g)


def test_threads_share_a_layer(node):
    layer = layer_of(16, 48)
    x = torch.randn(8, 10, 16)
    expected = [torch.autograd.grad(layer(part).sum(), layer.cell.weight.weight)[0] for part in x]
    found = [None] * len(x)

    def work(i):
        for _ in range(5):
            (found[i],) = torch.autograd.grad(layer(x[i]).sum(), layer.cell.weight.weight)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(x))]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for ours, reference in zip(found, expected, strict=True):
        assert torch.equal(ours, reference)


def test_grad_mode_and_inference_mode(node):
    layer = layer_of()
    x = torch.randn(4, 5)
    z = layer(x)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            other = layer(x)
        assert not other.requires_grad
        assert torch.equal(other, z)
        assert other.is_inference() == isinstance(mode, torch.inference_mode)
    with torch.inference_mode():
        there = x.clone()
    with torch.no_grad():
        assert torch.equal(layer(there), z)


def test_autocast_is_left_to_python():
    layer = layer_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = layer(torch.randn(4, 5))
    assert not is_compiled(z)
    z.float().sum().backward()


def test_failures_of_the_backward_pass(node):
    options = {"adjoint_max_iter": 1, "adjoint_tol": 1e-9}
    x = torch.randn(3, 5)
    z = layer_of(on_failure="raise", **options)(x)  # the layer is gone by then
    with pytest.raises(ConvergenceError, match="adjoint") as caught:
        z.sum().backward()
    assert caught.value.solution.status.tolist() == [Status.MAX_ITER] * 3
    layer = layer_of(**options)
    with pytest.warns(ConvergenceWarning, match="adjoint solve: 3 of 3"):
        layer(x).sum().backward()
    layer(x).sum().backward()  # once
    layer_of(on_failure="ignore", **options)(x).sum().backward()


def test_graph_and_layer_free_each_other_without_the_garbage_collector(node):
    gc.disable()
    try:
        layer = layer_of()
        z = layer(torch.randn(4, 5))
        alive = weakref.ref(layer)
        layer.z = z  # a graph within the layer whose node knows what the layer reports
        z.sum().backward()
        del layer, z
        assert alive() is None
    finally:
        gc.enable()


def test_compiled_autograd_is_told_of_before_the_forward_pass(fresh_compiler):
    compiled_autograd = pytest.importorskip("torch._dynamo.compiled_autograd")
    layer = layer_of()
    x = torch.randn(4, 5)
    layer(x).sum().backward()
    expected = layer.cell.weight.weight.grad.clone()
    layer.zero_grad()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        layer(x).sum().backward()
    assert torch.equal(layer.cell.weight.weight.grad, expected)
    z = layer(x).sum()
    with (
        compiled_autograd._enable(torch.compile(backend="eager")),
        pytest.raises(RuntimeError, match="before the forward pass"),
    ):
        z.backward()
