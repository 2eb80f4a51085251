"""Products of the backward pass stay inside the map, whatever precedes the layer."""

import functools
import threading

import pytest
import torch
from gradient_cases import TIGHT, unrolled
from graph_cases import layers_above, record_products
from torch.utils.checkpoint import checkpoint

from fastdeq import DEQLayer, fixed_point

F64 = torch.float64


class Cell(torch.nn.Module):
    """tanh(0.4 A z + x), with a submodule for hooks."""

    features = 5

    def __init__(self, checkpointed=False):
        super().__init__()
        self.linear = torch.nn.Linear(5, 5, dtype=F64)
        with torch.no_grad():
            self.linear.weight.mul_(0.8)
        self.checkpointed = checkpointed

    def forward(self, z, x):
        if self.checkpointed:
            return checkpoint(lambda z: torch.tanh(self.linear(z) + x), z, use_reentrant=False)
        return torch.tanh(self.linear(z) + x)


def leaf(*shape):
    return torch.randn(*(shape or (3, 5)), dtype=F64, requires_grad=True)


def layer_of_x(x):
    return DEQLayer(Cell(), **TIGHT)(x)


def layer_with_context(x):
    cell = Cell()

    def f(z, y, extra):
        return torch.tanh(cell.linear(z) + y["x"] + extra[0])

    y = {"x": x, "other": [torch.zeros(3)]}
    return DEQLayer(f, **TIGHT)(y, (2 * x, 1), z0=torch.zeros(3, 5, dtype=F64))


def layer_of_given_parameters(x):
    layer = DEQLayer(Cell(), **TIGHT)
    given = {name: p.detach() + x.mean() for name, p in layer.named_parameters()}
    return torch.func.functional_call(layer, given, (torch.ones(3, 5, dtype=F64),))


def closure(x):
    return fixed_point(lambda z: torch.tanh(0.3 * z.flip(1) + x), torch.zeros_like(x), **TIGHT)[0]


def argument_of_a_partial(x):
    f = functools.partial(lambda z, y, k: torch.tanh(k * z.flip(1) + y), y=x, k=0.3)
    return fixed_point(f, torch.zeros_like(x), **TIGHT)[0]


def output_of_many(x):
    first, second = (x * 1).split([2, 3], 1)
    f = lambda z: torch.tanh(0.3 * z + torch.cat([second, first], 1))  # noqa: E731
    return fixed_point(f, torch.zeros_like(x), **TIGHT)[0]


SOLVES = (
    layer_of_x,
    layer_with_context,
    layer_of_given_parameters,
    closure,
    argument_of_a_partial,
    output_of_many,
)


# Parameters that were given for one call are not there at another evaluation.
CASES = [(s, k) for s in SOLVES for k in (1, 2, 3) if k == 1 or s is not layer_of_given_parameters]


@pytest.mark.parametrize(("solve", "order"), CASES)
def test_a_product_visits_what_it_would_without_layers_above(solve, order, monkeypatch):
    """Of gradients, of gradients of gradients (``order``), and of those once more."""
    counts = {}
    x, seed = leaf(), torch.random.get_rng_state()
    for above in (1, 150):
        torch.random.set_rng_state(seed)
        with monkeypatch.context() as patch:
            value = solve(layers_above(x, above)).pow(2).sum()
            record = record_products(patch)
            for k in range(order):
                (g,) = torch.autograd.grad((value,), x, create_graph=k + 1 < order)
                value = g.pow(2).sum()
        counts[above] = max(record)
    assert 3 < counts[1] == counts[150]


def test_an_iterator_hides_a_tensor_and_the_gradient_is_right():
    """What is found by watching operations only."""

    def f(z, tensors):
        return torch.tanh(0.3 * z + next(tensors()))

    x = leaf()
    y = 2 * x
    box = iter([y] * 10_000)
    z, _ = fixed_point(lambda z: f(z, lambda: box), torch.zeros(3, 5, dtype=F64), **TIGHT)
    (ours,) = torch.autograd.grad(z.pow(2).sum(), x, create_graph=True)
    z = torch.zeros(3, 5, dtype=F64)
    for _ in range(60):
        z = torch.tanh(0.3 * z + 2 * x)
    (exact,) = torch.autograd.grad(z.pow(2).sum(), x, create_graph=True)
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)
    second = [torch.autograd.grad(g.pow(2).sum(), x)[0] for g in (ours, exact)]
    torch.testing.assert_close(*second, rtol=1e-8, atol=1e-10)


def gradients(solve, x, cell):
    return torch.autograd.grad(solve(x).pow(2).sum(), [x, *cell.parameters()])


@pytest.mark.parametrize("where", ["around", "inside", "both"])
def test_checkpoints(where):
    cell = Cell(checkpointed=where != "around")
    layer = DEQLayer(cell, **TIGHT)
    x = leaf()

    def solve(x):
        y = layers_above(x, 3)
        return layer(y) if where == "inside" else checkpoint(layer, y, use_reentrant=False)

    ours = gradients(solve, x, cell)
    exact = gradients(lambda x: unrolled(cell, layers_above(x, 3)), x, cell)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_graph_that_is_kept_gives_the_same_gradient_again(create_graph):
    cell, x = Cell(), leaf()
    layer = DEQLayer(cell, **TIGHT)
    value = layer(layers_above(x, 2)).pow(2).sum()
    inputs = [x, *cell.parameters()]
    one = torch.autograd.grad(value, inputs, retain_graph=True, create_graph=create_graph)
    two = torch.autograd.grad(value, inputs, retain_graph=True, create_graph=create_graph)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    value.backward()
    torch.testing.assert_close(x.grad, one[0])


def test_second_derivatives_with_inputs_that_are_no_leaves():
    def run(x, w):
        y, half = torch.sin(x), 0.5 * w
        f = lambda z: torch.tanh(z @ half.T + y * w[0])  # noqa: E731
        z, _ = fixed_point(f, torch.zeros_like(x), **TIGHT)
        return z, z.sum(1)

    w = (0.5 * torch.randn(5, 5, dtype=F64)).requires_grad_()
    assert torch.autograd.gradcheck(run, (leaf(2, 5), w))
    assert torch.autograd.gradgradcheck(run, (leaf(2, 5), w))


def test_hooks_inside_and_above_see_the_gradient_of_an_unrolled_solve():
    cell, layer_input = Cell(), leaf()
    seen = []
    for solve in (DEQLayer(cell, **TIGHT), lambda x: unrolled(cell, x)):
        y = layers_above(layer_input, 2)
        y.retain_grad()
        calls = []
        handles = [
            y.register_hook(lambda g, calls=calls: calls.append("x")),
            cell.linear.weight.register_hook(lambda g, calls=calls: calls.append("weight")),
        ]
        cell.zero_grad()
        layer_input.grad = None
        solve(y).pow(2).sum().backward()
        for handle in handles:
            handle.remove()
        assert sorted(calls) == ["weight", "x"]
        seen.append((layer_input.grad, y.grad, cell.linear.weight.grad.clone()))
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_hooks_of_an_inner_module_change_the_products():
    """A full backward hook that halves what passes is half the Jacobian, for all derivatives."""
    cell, x = Cell(), leaf()
    cell.linear.register_full_backward_hook(lambda module, inputs, outputs: (0.5 * inputs[0],))
    ours = torch.autograd.grad(DEQLayer(cell, **TIGHT)(1 * x).sum(), x)
    exact = torch.autograd.grad(unrolled(cell, x).sum(), x)
    torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)


def test_a_tensor_that_the_map_holds_and_does_not_use_stays_unused():
    x, idle = leaf(), leaf()
    held, calls = 2 * idle, []
    held.register_hook(calls.append)
    layer = DEQLayer(lambda z, x, extra: torch.tanh(0.3 * z + x), **TIGHT)
    z = layer(3 * x, held)
    assert torch.autograd.grad(z.sum(), idle, retain_graph=True, allow_unused=True) == (None,)
    z.sum().backward()
    assert not calls
    assert idle.grad is None


def test_nothing_but_x_and_parameters_gets_a_gradient():
    """The state at which the map was evaluated is no leaf that one accumulates."""
    leaves = []

    def f(z, x):
        leaves.append(z)
        return torch.tanh(0.3 * z + x)

    x = leaf()
    DEQLayer(f, **TIGHT)(2 * x).sum().backward()
    at = [z for z in leaves if z.grad_fn is not None][-1]
    stack, accumulated = [at.grad_fn], []
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                accumulated += [node.variable] if hasattr(node, "variable") else []
                stack.append(node)
    assert [t for t in accumulated if t.grad is not None] == [x]


@pytest.mark.parametrize("needs", ["parameters", "x", "nothing"])
def test_only_what_requires_a_gradient_has_one(needs):
    cell, x = Cell(), torch.randn(2, 5, dtype=F64)
    cell.requires_grad_(needs == "parameters")
    x.requires_grad_(needs == "x")
    z = DEQLayer(cell, **TIGHT)(2 * x)
    assert z.requires_grad == (needs != "nothing")
    if z.requires_grad:
        z.sum().backward()
        exact = unrolled(cell, 2 * x).sum()
        inputs = [x] if needs == "x" else list(cell.parameters())
        for t, g in zip(inputs, torch.autograd.grad(exact, inputs), strict=True):
            torch.testing.assert_close(t.grad, g, rtol=1e-9, atol=1e-11)


def test_threads_that_count_nodes_by_themselves():
    """Graphs above and layers of different threads: sequence numbers of one mean nothing in
    another, where they may be greater, equal or smaller."""
    cell = Cell()
    layers = [DEQLayer(cell, **TIGHT) for _ in range(4)]
    leaves = [leaf() for _ in layers]
    above = [layers_above(x, 400) for x in leaves]  # high numbers, of this thread
    results, failures = [None] * 4, []

    def solve(k):
        try:
            for _ in range(3):
                layers_above(leaves[k], 120 * k)  # numbers up to those of the graph above
                z = layers[k](above[k])
                (g,) = torch.autograd.grad(
                    z.pow(2).sum(), leaves[k], create_graph=True, retain_graph=True
                )
                (second,) = torch.autograd.grad(g.pow(2).sum(), leaves[k], retain_graph=True)
                results[k] = (g, second)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=solve, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    for (g, second), x in zip(results, leaves, strict=True):
        value = unrolled(cell, layers_above(x, 400)).pow(2).sum()
        (exact,) = torch.autograd.grad(value, x, create_graph=True)
        torch.testing.assert_close(g, exact, rtol=1e-9, atol=1e-10)
        (exact,) = torch.autograd.grad(exact.pow(2).sum(), x)
        torch.testing.assert_close(second, exact, rtol=1e-8, atol=1e-9)
