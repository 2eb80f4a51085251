"""What a map closes over: found where it may be, at the cost of no further evaluation."""

import pytest
import torch
from gradient_cases import TIGHT
from graph_cases import layers_above

from fastdeq import DEQLayer, fixed_point
from fastdeq.solve import closure

F64 = torch.float64


@pytest.fixture(autouse=True, params=["extension", "reference"])
def implementation(request, monkeypatch):
    if request.param == "reference":
        monkeypatch.setattr(closure, "outer_leaves", closure.reference_outer_leaves)
    elif closure.outer_leaves is closure.reference_outer_leaves:
        pytest.skip("no extension")


def leaf(*shape):
    return torch.randn(*shape, dtype=F64, requires_grad=True)


def found(f, z):
    """What is found, and what watching the operations of an evaluation finds."""
    evaluation = closure.evaluate(f, z)
    at = z.clone().requires_grad_()
    with closure.ClosureTracker() as tracker:
        f(at)
    watched = [t for t in tracker.tensors if t is not at]
    return set(map(id, evaluation.theta)), set(map(id, watched))


@pytest.fixture
def unwatched(monkeypatch):
    """Fails where the operations of an evaluation are watched."""

    def watch(self):
        raise AssertionError("watched")

    monkeypatch.setattr(closure.ClosureTracker, "__init__", watch)


class Counted(torch.nn.Module):
    """A cell that counts its evaluations, with so many blocks."""

    def __init__(self, blocks=2, width=4):
        super().__init__()
        self.blocks = torch.nn.ModuleList(
            torch.nn.Linear(width, width, dtype=F64) for _ in range(blocks)
        )
        with torch.no_grad():
            for block in self.blocks:
                block.weight.mul_(0.7)
        self.count = 0

    def forward(self, z, x):
        self.count += 1
        for block in self.blocks:
            z = torch.tanh(block(z) + x)
        return z


def evaluations(layer, *args):
    """In all, and those of the solve, which makes one for each iterate and one that verifies. Not
    of the first call, which looks at the samples' independence."""
    layer(*args)
    layer.cell.count = 0
    layer(*args).sum().backward()
    return layer.cell.count, int(layer.last_solution.iterations.max()) + 1


@pytest.mark.parametrize("above", [0, 3])
def test_one_evaluation_is_differentiated_and_none_is_watched(above, unwatched):
    layer = DEQLayer(Counted(), solver="picard")
    count, solve = evaluations(layer, layers_above(leaf(3, 4), above))
    assert count == solve + 1


def test_tensors_deep_inside_cost_one_more_evaluation(unwatched):
    layer = DEQLayer(Counted(), solver="picard")
    for block in layer.cell.blocks:
        weight = block.weight.detach() * torch.sin(leaf(1))
        del block.weight
        block.weight = weight
    count, solve = evaluations(layer, 2 * leaf(3, 4))
    assert count == solve + 2


def test_it_is_what_watching_finds():
    cell, held, idle = Counted(3), 2 * leaf(3, 4), 2 * leaf(3, 4)
    direct, box = leaf(4), [{"deep": 3 * leaf(4)}]
    function = lambda z: cell(z, held) + 0.1 * (direct + box[0]["deep"]) * z  # noqa: E731
    z = torch.randn(3, 4, dtype=F64)
    ours, watched = found(function, z)
    assert ours == watched
    assert len(ours) == 3 * 2 + 3
    ours, watched = found(lambda z: (cell(z, held), idle)[0], z)
    assert ours == watched
    assert id(idle) not in ours


@pytest.mark.parametrize("known", ["all", "one too few", "one too many"])
def test_tensors_beside_leaves_have_to_be_those_that_are_known(known):
    w, x, y, idle = leaf(4), 2 * leaf(3, 4), 3 * leaf(3, 4), 2 * leaf(1)
    given = {"all": [x, y], "one too few": [y], "one too many": [x, y, idle]}[known]
    at = closure.placed_above(torch.randn(3, 4, dtype=F64), given)
    leaves = closure.outer_leaves(torch.tanh(at * w + x * y + w), at, given)
    if known == "all":
        assert [id(t) for t in leaves] == [id(w)]
    else:
        assert leaves is None


def test_one_tensor_under_two_names():
    x = 2 * leaf(3, 4)
    pair = [x, {"again": x}]
    z, _ = fixed_point(lambda z: 0.5 * z + pair[0] + pair[1]["again"], x.detach(), **TIGHT)
    (g,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    torch.testing.assert_close(g, torch.full_like(x, 4.0), rtol=1e-9, atol=1e-11)


def test_a_tensor_that_appears_twice_or_in_place_is_found_once():
    x = 2 * leaf(3, 4)

    def f(z):
        h = z * x
        h.add_(x).mul_(0.2)
        h[:, :2] += x[:, 2:]
        return torch.tanh(h) + 0.1 * x

    ours, watched = found(f, torch.randn(3, 4, dtype=F64))
    assert ours == watched == {id(x)}


def test_views_of_a_base_that_was_changed_in_place():
    """Their nodes are made when somebody looks at them."""
    x = leaf(3, 4)
    base = 2 * x
    view = base[:, :2]
    base.mul_(0.5)
    f = lambda z: torch.tanh(0.3 * z) + torch.cat([view, view], 1)  # noqa: E731
    z, _ = fixed_point(f, torch.zeros(3, 4, dtype=F64), **TIGHT)
    (g,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    h = torch.zeros(3, 4, dtype=F64)
    for _ in range(60):
        h = torch.tanh(0.3 * h) + torch.cat([x[:, :2], x[:, :2]], 1)
    torch.testing.assert_close(g, torch.autograd.grad(h.sum(), x)[0], rtol=1e-9, atol=1e-11)


def test_a_layer_inside_a_cell_twice_differentiable():
    inner_weight, outer_weight, x = leaf(4, 4), leaf(4, 4), leaf(2, 4)

    def solve(solver, w, v, x):
        def inner(z):
            return solver(lambda y: torch.tanh(0.1 * y @ v + z), torch.zeros_like(z))

        return solver(lambda z: torch.tanh(0.1 * inner(z) @ w + x), torch.zeros_like(x))

    def implicit(f, z):
        return fixed_point(f, z, **TIGHT)[0]

    def iterated(f, z):
        for _ in range(40):
            z = f(z)
        return z

    leaves = [outer_weight, inner_weight, x]
    results = []
    for solver in (implicit, iterated):
        value = solve(solver, 2 * outer_weight, inner_weight, torch.sin(x)).pow(2).sum()
        first = torch.autograd.grad(value, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)
        results.append((*first, *second))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-7, atol=1e-9)


class OfAnEnergy(torch.nn.Module):
    """Descends on an energy, whose gradient it takes with respect to a leaf of its own."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4, dtype=F64)

    def forward(self, z, x):
        with torch.enable_grad():
            own = z.detach().requires_grad_()
            energy = (0.5 * own**2 - 0.1 * torch.cos(self.linear(own)) - x * own).sum()
            (slope,) = torch.autograd.grad(energy, own, create_graph=True)
        own_slope = slope + 0 * own.sum()
        return 0.5 * z - 0.1 * own_slope


def test_leaves_that_a_map_makes_itself_are_none_that_it_did_not_use_before():
    layer = DEQLayer(OfAnEnergy(), on_failure="ignore", max_iter=20)
    parameters = list(layer.parameters())
    z = layer(leaf(3, 4))
    first = torch.autograd.grad(z.sum(), parameters, create_graph=True, allow_unused=True)
    plain = torch.autograd.grad(layer(leaf(3, 4)).sum(), parameters, allow_unused=True)
    assert [g is None for g in first] == [g is None for g in plain]


def test_a_map_that_uses_other_tensors_for_other_states():
    """A start of zeros takes the first expert, the solution the second."""
    experts = [2 * leaf(4), 3 * leaf(4)]

    def f(z):
        chosen = experts[int(z.sum() > 1.0)]
        return 0.5 * z + 1 + 0.1 * torch.tanh(chosen)

    z, solution = fixed_point(f, torch.zeros(1, 4, dtype=F64), **TIGHT)
    first, second = torch.autograd.grad(z.sum(), experts, create_graph=True, allow_unused=True)
    assert first is None
    # z = 2 + 0.2 tanh(w), so dz/dw = 0.2 (1 - tanh^2).
    exact = 0.2 * (1 - torch.tanh(experts[1]) ** 2)
    torch.testing.assert_close(second, exact, rtol=1e-9, atol=1e-12)
    assert solution.iterations.max() > 1


def test_a_map_may_use_a_function_of_its_tensors_later():
    """At the backward pass it may compute anew what is made of what it used at the forward pass."""
    w, late = leaf(4), [False]
    z, _ = fixed_point(
        lambda z: 0.5 * z + (torch.sin(w) if late[0] else torch.sin(w) * 1),
        torch.zeros(1, 4, dtype=F64),
        **TIGHT,
    )
    late[0] = True
    (g,) = torch.autograd.grad(z.sum(), w, create_graph=True)
    torch.testing.assert_close(g, 2 * torch.cos(w), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2])
def test_weights_that_are_cached(order):
    linear = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(4, 4, dtype=F64))
    layer = DEQLayer(lambda z, x: torch.tanh(0.4 * linear(z) + x), **TIGHT)
    x, inputs = torch.randn(2, 4, dtype=F64), list(linear.parameters())

    def derivative():
        value = layer(x).pow(2).sum()
        for k in range(order):
            grads = torch.autograd.grad(value, inputs, create_graph=k + 1 < order)
            value = sum(g.pow(2).sum() for g in grads)
        return grads

    exact = derivative()
    with torch.nn.utils.parametrize.cached():
        ours = derivative()
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
