"""What is kept of a symmetric weight: when it is shared, and that no change goes unnoticed."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch.nn.utils import parametrize

from fastdeq import AffineCell, DEQLayer
from fastdeq.weights import Symmetric, SymmetricMap

bounds = pytest.mark.parametrize("bound", [None, 0.4, 50.0], ids="bound {}".format)


def weight_of(size=12, bound=None, dtype=torch.float64):
    return Symmetric(size, 0.9, max_eigenvalue=bound, dtype=dtype)


def expected(weight):
    """As a parametrisation computes it, which keeps nothing."""
    return SymmetricMap(weight.map.max_eigenvalue)(weight.weight)


def address(t):
    return t.untyped_storage().data_ptr()


@bounds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_two_calls_share_one_buffer(bound, dtype):
    weight = weight_of(12, bound, dtype)
    with torch.no_grad():
        first = weight()
    second, third = weight(), weight()
    assert address(first) == address(second) == address(third)
    assert second is not third
    assert second.requires_grad
    assert not first.requires_grad
    torch.testing.assert_close(first, expected(weight))
    with torch.inference_mode():
        fourth = weight()
    assert address(fourth) == address(first)
    assert not fourth.is_inference()


CHANGES = {
    "a step": lambda a: torch.optim.SGD([a], 0.1).step(),
    "in place": lambda a: a.add_(torch.randn_like(a)),
    "an entry": lambda a: a.view(-1)[3].add_(0.5),
    "data": lambda a: a.data.view(-1)[-2].mul_(1.5),
    "other data": lambda a: setattr(a, "data", torch.randn_like(a)),
    "NumPy": lambda a: a.detach().numpy().__setitem__((0, 1), 7.0),
}


@bounds
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_matrix_is_seen(change, bound):
    weight = weight_of(9, bound)
    before = weight().detach().clone()
    weight.weight.grad = torch.randn(9, 9).double()
    with torch.no_grad():
        CHANGES[change](weight.weight)
    assert torch.equal(weight(), expected(weight))
    assert not torch.equal(weight(), before)
    weight.weight = torch.nn.Parameter(torch.randn(9, 9).double())
    assert torch.equal(weight(), expected(weight))


@bounds
def test_a_write_to_what_was_returned_reaches_no_later_call(bound):
    weight = weight_of(7, bound)
    right = expected(weight).detach()
    for write in (
        lambda w: w.mul_(2),
        lambda w: w.detach().zero_(),
        lambda w: w[0].copy_(w[1]),
    ):
        with torch.no_grad():
            write(weight())
            torch.testing.assert_close(weight(), right)
        torch.testing.assert_close(weight(), right)
    with torch.no_grad():
        weight().requires_grad_()
    with torch.no_grad():
        assert not weight().requires_grad


def test_a_graph_of_before_a_write_says_so():
    weight = weight_of(5)
    w = weight()
    y = (w @ torch.randn(5, 3, dtype=torch.float64, requires_grad=True)).sum()
    with torch.no_grad():
        weight().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@bounds
def test_gradients_of_both_orders_and_of_batches(bound):
    weight = weight_of(6, bound)
    fixed = torch.randn(6, 6, dtype=torch.float64)

    def derivatives(function):
        a = weight.weight
        w = function()
        loss = (w.sin() * fixed).sum()
        (first,) = torch.autograd.grad(loss, a, retain_graph=True)
        (again,) = torch.autograd.grad(loss, a, create_graph=True)
        (second,) = torch.autograd.grad(again.cos().sum(), a, retain_graph=True)
        batch = torch.stack([w.new_ones(6, 6), fixed])
        (rows,) = torch.autograd.grad(w, a, batch, is_grads_batched=True)
        return first, again, second, rows

    with torch.no_grad():
        weight()  # an entry without what a gradient needs
    pairs = zip(derivatives(weight), derivatives(lambda: expected(weight)), strict=True)
    for found, right in pairs:
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9)


def test_a_step_between_forward_and_backward_changes_no_gradient():
    for bound in (None, 0.4):
        weight = weight_of(6, bound)
        (right,) = torch.autograd.grad(expected(weight).sin().sum(), weight.weight)
        loss = weight().sin().sum()
        with torch.no_grad():
            weight.weight.add_(1.0)
        weight()
        loss.backward()
        torch.testing.assert_close(weight.weight.grad, right, rtol=1e-9, atol=1e-9)


def test_a_new_bound_is_seen():
    weight = weight_of(20, 5.0)
    assert torch.linalg.eigvalsh(weight().detach())[-1] > 0.3
    weight.map.max_eigenvalue = 0.3
    assert torch.linalg.eigvalsh(weight().detach())[-1] <= 0.3


def test_matrices_that_are_not_finite_are_never_kept():
    weight = weight_of(5)
    with torch.no_grad():
        weight.weight[1, 2] = torch.nan
        first, second = weight(), weight()
        assert address(first) != address(second)
        weight.weight[1, 2] = torch.inf
        assert torch.equal(weight(), expected(weight))


def test_the_map_itself_returns_new_tensors():
    module, a = SymmetricMap(), torch.randn(4, 4)
    first, second = module(a), module(a)
    assert address(first) != address(second)
    linear = torch.nn.Linear(4, 4)
    parametrize.register_parametrization(linear, "weight", SymmetricMap())
    with torch.no_grad():
        linear.weight.zero_()
        assert linear.weight.any()


def test_hooks_and_other_maps_are_called():
    weight = weight_of(4)
    kept = weight().detach().clone()
    handle = weight.map.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert torch.equal(weight(), 2 * kept)
    handle.remove()
    assert torch.equal(weight(), kept)

    class Third(SymmetricMap):
        def forward(self, raw):
            return super().forward(raw) / 3

    weight.map = Third()
    assert torch.equal(weight(), kept / 3)


def test_copies_and_pickles_take_nothing_with_them():
    weight = weight_of(30)
    weight()
    other = copy.deepcopy(weight)
    assert address(other()) != address(weight())
    assert len(pickle.dumps(weight)) < 2 * 30 * 30 * 8
    buffer = io.BytesIO()
    torch.save(weight, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(), weight())


def test_transforms_and_tracers_get_functions_of_the_matrix():
    weight = weight_of(5)
    weight()  # an entry is there
    call = lambda a: torch.func.functional_call(weight, {"weight": a}).square().sum()  # noqa: E731
    a = torch.randn(5, 5, dtype=torch.float64)
    right = (a + a.t()) * 1.0
    torch.testing.assert_close(torch.func.grad(call)(a), right)
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(call))(a[None])[0], right)
    tangent = torch.func.jvp(call, (a,), (torch.ones_like(a),))[1]
    torch.testing.assert_close(tangent, right.sum())
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda a: torch.func.functional_call(weight, {"weight": a}))(a)
    torch.testing.assert_close(graph(2 * a), a + a.t())
    weight.requires_grad_(False)
    with torch.no_grad():
        traced = torch.jit.trace(weight, (), check_trace=False)
        traced.weight.mul_(3)
        torch.testing.assert_close(traced(), expected(weight))


def test_threads_may_share_a_weight():
    weight, wrong = weight_of(40), []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(50):
            a = torch.randn(40, 40, dtype=torch.float64, generator=generator)
            w = torch.func.functional_call(weight, {"weight": a})
            if not torch.equal(w, (a + a.t()) / 2):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("weight", ["symmetric", "bounded"])
def test_training_is_what_it_is_without_the_cache(weight, monkeypatch):
    def trained():
        torch.manual_seed(3)
        family = "symmetric" if weight == "symmetric" else Symmetric(16, 1.5, max_eigenvalue=0.9)
        cell = AffineCell(4, 16, weight=family, scale=0.7 if weight == "symmetric" else None)
        layer = DEQLayer(cell, on_failure="ignore")
        optimiser = torch.optim.SGD(layer.parameters(), 0.05)
        x = torch.randn(8, 4)
        for _ in range(5):
            optimiser.zero_grad()
            (layer(x).square().mean() + layer(x + 1).mean()).backward()
            optimiser.step()
        return torch.cat([p.detach().flatten() for p in layer.parameters()])

    found = trained()
    monkeypatch.setattr(SymmetricMap, "shared", SymmetricMap.forward)
    torch.testing.assert_close(found, trained(), rtol=1e-5, atol=1e-6)


def test_a_matrix_that_changes_at_every_call_is_not_copied():
    weight = weight_of(8)
    for _ in range(3):
        with torch.no_grad():
            weight.weight.mul_(0.9)
        assert torch.equal(weight(), expected(weight))
        assert weight.map.cache._entry.copy is None
    assert address(weight()) == address(weight())
    assert torch.equal(weight.map.cache._entry.copy, weight.weight)
