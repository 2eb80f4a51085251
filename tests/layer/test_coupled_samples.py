"""Layers around cells whose samples depend on each other: the right value, or an error."""

import copy
import pickle

import pytest
import torch
from coupled_cases import F64, TIGHT, Counted, contraction, coupled_graphs, graph
from layer_cases import Residual, affine
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils import checkpoint

from fastdeq import CoupledSamplesError, DEQLayer, fixed_point, solution
from fastdeq.solve.coupling import separating_sets


class Convolution(nn.Module):
    """On the nodes of a graph, (nodes, features)."""

    def __init__(self, a, features):
        super().__init__()
        self.register_buffer("a", a)
        self.weight = nn.Parameter(contraction(features, 0.9).to(a.dtype))

    def forward(self, z, x):
        return torch.tanh(self.a @ z @ self.weight + x)


class Normalised(nn.Module):
    def __init__(self, n=4):
        super().__init__()
        self.linear, self.norm = nn.Linear(n, n), nn.BatchNorm1d(n)

    def forward(self, z, x):
        return torch.tanh(0.4 * self.norm(self.linear(z)) + x)


class OverSamples(nn.Module):
    """Attention over the first dimension: unbatched for (L, d), samples second for (L, B, d)."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1, dtype=F64)

    def forward(self, z, x):
        return 0.3 * self.attention(z, z, z, need_weights=False)[0] + x


class Watched(nn.Module):
    """Independent samples; counts the calls of the cell and the products with its Jacobian."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls, self.products = nn.Linear(4, 4), 0, []

    def forward(self, z, x):
        self.calls += 1
        return 0.4 * torch.tanh(self.linear(Counted.apply(z, self.products))) + x


def unrolled(cell, x, steps=300):
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = cell(z, x)
    return z


@pytest.mark.parametrize("name", coupled_graphs())
def test_graphs(name):
    nodes, edges = coupled_graphs()[name]
    cell = Convolution(graph(nodes, *edges), 3)
    x = torch.randn(nodes, 3, dtype=F64, requires_grad=True)
    with pytest.raises(CoupledSamplesError, match="sample"):
        DEQLayer(cell, on_failure="ignore")(x)
    layer = DEQLayer(cell, batch_dim=None, **TIGHT)
    found = []
    for solve in (layer, lambda x: unrolled(cell, x)):
        z = solve(x)
        found.append((z, *torch.autograd.grad(z.pow(2).sum(), [x, cell.weight])))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert layer.last_solution.status.shape == (1,)


def test_attention_over_the_first_dimension():
    cell = OverSamples()
    layer, x = DEQLayer(cell, **TIGHT), torch.randn(6, 4, dtype=F64)
    with pytest.raises(CoupledSamplesError):
        layer(x)
    whole = DEQLayer(cell, batch_dim=None, **TIGHT)(x)
    torch.testing.assert_close(whole, unrolled(cell, x))
    both = torch.stack([x, 2 * x, x + 1], 1)
    with pytest.raises(CoupledSamplesError):
        layer(both)
    second = DEQLayer(cell, batch_dim=1, **TIGHT)
    z = second(both)
    torch.testing.assert_close(z[:, 0], whole)
    assert second.last_solution.status.tolist() == [0, 0, 0]
    # The other layout of the same module: unbatched input couples, and is looked at on its own.
    first = nn.MultiheadAttention(4, 1, dtype=F64, batch_first=True)
    flexible = DEQLayer(
        lambda z, x: 0.3 * first(z, z, z, need_weights=False)[0] + x, on_failure="ignore"
    )
    flexible(both)
    with pytest.raises(CoupledSamplesError):
        flexible(x)


@pytest.mark.parametrize("gradient", ["implicit", "one_step"])
def test_batch_normalisation(gradient):
    layer = DEQLayer(Normalised(), gradient=gradient, on_failure="ignore")
    x = torch.randn(8, 4)
    for _ in range(2):  # and again: what raised is not remembered
        with pytest.raises(CoupledSamplesError, match="eval mode"):
            layer(x)
    layer.eval()
    layer(x).sum().backward()
    layer.train()
    with torch.no_grad():
        layer(x)
    with pytest.raises(CoupledSamplesError):
        layer(x)
    layer.cell.norm.eval()  # frozen, the rest in training mode
    layer(x)
    layer.cell.norm = nn.BatchNorm1d(4)
    with pytest.raises(CoupledSamplesError):
        layer(x)


@pytest.mark.parametrize("gradient", ["implicit", "one_step"])
def test_it_is_looked_at_once(gradient):
    cell = Watched()
    layer = DEQLayer(cell, gradient=gradient, solver="picard", tol=1e-5)

    def counts(batch, features=4):
        cell.calls = 0
        cell.products.clear()
        layer(torch.ones(batch, features))
        return cell.calls, len(cell.products)

    assert counts(1)[1] == 0
    first, later = counts(9), counts(9)
    assert first[1] == len(separating_sets(9))
    assert later[1] == 0
    assert first[0] - later[0] == 1
    assert counts(30)[1] == 0
    with torch.no_grad():
        assert counts(9)[1] == 0
    layer.cell = cell = Watched()
    assert counts(9)[1] > 0
    assert counts(9)[1] == 0
    layer.options = DEQLayer(cell, batch_dim=(0,), solver="picard", gradient=gradient).options
    assert counts(9)[1] == 0
    layer.options = DEQLayer(cell, batch_dim=-2, solver="picard", gradient=gradient).options
    assert counts(9)[1] > 0


@pytest.mark.parametrize("gradient", ["implicit", "one_step"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_within_a_checkpoint(gradient, reentrant):
    """Which evaluates the layer again, and wants to see the same tensors saved."""
    layer, x = DEQLayer(Watched(), gradient=gradient), torch.randn(5, 4, requires_grad=True)
    found = []
    for _ in range(2):
        z = checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
        found.append(z.detach())
        z.sum().backward()
    assert len(layer._checked._keys) == 1
    torch.testing.assert_close(*found)
    coupled = DEQLayer(Normalised(), gradient=gradient, on_failure="ignore")
    with pytest.raises(CoupledSamplesError):
        checkpoint.checkpoint(coupled, x, use_reentrant=reentrant).sum().backward()


def test_a_first_call_that_says_nothing():
    """Where relu is flat no sample depends on any, itself included."""
    a = graph(5, (0, 1), (1, 0), (2, 3)).float()
    layer = DEQLayer(lambda z, x: torch.relu(a @ z + x), on_failure="ignore")
    layer(torch.zeros(5, 3))
    with pytest.raises(CoupledSamplesError):
        layer(torch.ones(5, 3))


def test_copies_look_again():
    layer = DEQLayer(Watched())
    layer(torch.ones(5, 4))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for expected in (True, False):
            twin.cell.products.clear()
            twin(torch.ones(5, 4))
            assert bool(twin.cell.products) == expected


def test_replicas_know_what_their_layer_knows():
    """As ``nn.DataParallel`` makes them: anew at each call, around copies of the cell."""
    layer = DEQLayer(Watched())

    def replica():
        made = layer._replicate_for_data_parallel()
        made.cell = copy.copy(layer.cell)
        made.cell.products = []
        return made

    one = replica()
    one(torch.ones(5, 4))
    assert one.cell.products
    two = replica()
    two(torch.ones(5, 4))
    assert not two.cell.products
    layer.cell.products.clear()
    layer(torch.ones(5, 4))
    assert not layer.cell.products


def test_shapes_without_numbers():
    with FakeTensorMode():
        assert DEQLayer(Normalised())(torch.zeros(4, 4)).shape == (4, 4)
    with torch.device("meta"):
        layer = DEQLayer(Normalised(), gradient="one_step")
        assert layer(torch.zeros(4, 4)).shape == (4, 4)


def test_not_while_a_cuda_graph_is_recorded(monkeypatch):
    layer = DEQLayer(Watched())
    with monkeypatch.context() as patch:
        patch.setattr(solution, "is_capturing", lambda device: True)
        layer(torch.ones(5, 4))
        assert not layer.cell.products
    layer(torch.ones(5, 4))
    assert layer.cell.products


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_layers(fresh_compiler, backend):
    layer = DEQLayer(Residual(4))
    x = torch.randn(5, 4)
    expected = layer(x)
    torch.testing.assert_close(torch.compile(layer, backend=backend)(x), expected)


def test_a_layer_within_a_cell():
    inner = DEQLayer(affine(4, 4))
    outer = DEQLayer(lambda z, x: 0.3 * inner(z) + x)
    outer(torch.randn(5, 4)).sum().backward()
    norm = nn.BatchNorm1d(4)
    with pytest.raises(CoupledSamplesError):
        DEQLayer(lambda z, x: 0.3 * norm(inner(z)) + x, on_failure="ignore")(torch.randn(5, 4))


def test_failed_solves_are_looked_at_before_they_are_judged():
    a = 3 * graph(4, (0, 1), (1, 2), (2, 0))
    with pytest.raises(CoupledSamplesError):
        fixed_point(lambda z: a @ z + 1, torch.zeros(4, 2, dtype=F64), on_failure="raise")
