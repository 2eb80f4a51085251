"""Cells that torch.compile has compiled stay so through training, and layers around cells are left
out of compiled graphs. The backend counts, and runs what it is given."""

import threading
import warnings

import pytest
import torch
from gradient_cases import TIGHT

from fastdeq import AffineCell, DEQLayer, fixed_point

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Counting:
    """A backend: how many graphs it compiled, how many of those run with a gradient, and runs."""

    def __init__(self):
        self.graphs = self.runs = self.with_grad = 0

    def __call__(self, module, inputs):
        self.graphs += 1

        def run(*args):
            self.runs += 1
            self.with_grad += torch.is_grad_enabled()
            return module(*args)

        return run


class Cell(torch.nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.linear = torch.nn.Linear(width, width, dtype=torch.float64)
        self.block = torch.nn.Sequential(self.linear, torch.nn.Tanh())
        with torch.no_grad():
            self.linear.weight.mul_(0.6)

    def forward(self, z, x):
        return self.block(z + x)


def compiled(cell, backend, part):
    if part == "cell":
        return torch.compile(cell, backend=backend)
    if part == "function":
        return torch.compile(lambda z, x: cell(z, x), backend=backend)
    cell.block = torch.compile(cell.block, backend=backend)
    return cell


def pair(part, backend, **options):
    """A layer around a cell of which a part is compiled, and one around the same as it was."""
    cell = Cell()
    eager = Cell()
    eager.load_state_dict(cell.state_dict())
    return DEQLayer(compiled(cell, backend, part), **options), DEQLayer(eager, **options), cell


@pytest.mark.parametrize("part", ["cell", "submodule", "function"])
@pytest.mark.parametrize("above", [False, True])
def test_it_is_compiled_once_and_runs_in_every_step(part, above):
    backend = Counting()
    layer, eager, cell = pair(part, backend, solver="picard", **TIGHT)
    runs = []
    for step in range(4):
        x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
        before = backend.runs
        results = []
        for one, owner in ((layer, cell), (eager, eager.cell)):
            x.grad = None
            owner.zero_grad()
            one((2 * x) if above else x).pow(2).sum().backward()
            results.append([x.grad, *(p.grad.clone() for p in owner.parameters())])
        for ours, exact in zip(*results, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-11)
        # All but the first of the solve, for the cell's own caches; none is differentiated.
        runs.append(backend.runs - before)
        assert runs[step] == layer.last_solution.iterations.max()
    assert backend.graphs == 1
    assert backend.with_grad == 0


def test_batches_of_many_sizes():
    backend = Counting()
    layer, eager, _ = pair("cell", backend, **TIGHT)
    for batch in (5, 3, 8, 5, 2, 8):
        x = torch.randn(batch, 6, dtype=torch.float64)
        ours, exact = layer(x).pow(2).sum(), eager(x).pow(2).sum()
        gradients = [
            torch.autograd.grad(v, list(m.parameters())) for v, m in ((ours, layer), (exact, eager))
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    # One for the first size, one for any.
    assert backend.graphs == 2
    assert backend.with_grad == 0


def test_derivatives_of_higher_order_and_graphs_that_are_kept():
    backend = Counting()
    layer, eager, _ = pair("cell", backend, **TIGHT)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for one in (layer, eager):
        value = one(x).pow(2).sum()
        torch.autograd.grad(value, x, retain_graph=True)
        (g,) = torch.autograd.grad(value, x, create_graph=True)
        results.append((g, *torch.autograd.grad(g.pow(2).sum(), [x, *one.parameters()])))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-8, atol=1e-10)
    assert backend.graphs == 1


def stance():
    return torch._dynamo.eval_frame._stance


@pytest.mark.parametrize("name", ["force_eager", "eager_on_recompile", "fail_on_recompile"])
def test_the_users_stance_is_restored(name):
    backend = Counting()
    layer, _, _ = pair("cell", backend)
    x = torch.randn(3, 6, dtype=torch.float64)
    layer(x).sum().backward()
    graphs = backend.graphs
    with torch.compiler.set_stance(name):
        theirs = stance()
        layer(x).sum().backward()
        assert stance() is theirs
    assert stance().stance == "default"
    assert backend.graphs == graphs


def test_the_stance_is_restored_where_a_cell_raises():
    backend = Counting()
    layer, _, _ = pair("cell", backend)
    with pytest.raises(RuntimeError):
        layer(torch.randn(3, 7, dtype=torch.float64), z0=torch.zeros(3, 6, dtype=torch.float64))
    assert stance().stance == "default"


def test_threads_leave_the_stance_as_it_was():
    backend = Counting()
    layers = [pair("cell", backend)[0] for _ in range(4)]
    x = torch.randn(3, 6, dtype=torch.float64)
    for layer in layers:
        layer(x).sum().backward()
    failures = []

    def train(layer):
        try:
            for _ in range(20):
                layer(x).sum().backward()
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=train, args=(layer,)) for layer in layers]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures
    assert stance().stance == "default"


class Model(torch.nn.Module):
    def __init__(self, solve):
        super().__init__()
        self.before = torch.nn.Linear(6, 6, dtype=torch.float64)
        self.solve = solve
        self.after = torch.nn.Linear(6, 2, dtype=torch.float64)

    def forward(self, x):
        return self.after(self.solve(torch.relu(self.before(x))))


@pytest.mark.parametrize("kind", ["layer", "fixed_point"])
def test_a_compiled_model_stops_at_a_layer_and_goes_on_behind_it(kind, caplog):
    cell, start = Cell(), torch.zeros(4, 6, dtype=torch.float64)
    solves = {
        "layer": DEQLayer(cell, **TIGHT),
        "fixed_point": lambda x: fixed_point(lambda z: cell(z, x), start, **TIGHT)[0],
    }
    model, backend = Model(solves[kind]), Counting()
    model.cell = cell
    x = torch.randn(4, 6, dtype=torch.float64)
    exact = torch.autograd.grad(model(x).pow(2).sum(), list(model.parameters()))
    run = torch.compile(model, backend=backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            ours = torch.autograd.grad(run(x).pow(2).sum(), list(model.parameters()))
            for a, b in zip(ours, exact, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    # What is before it and what is behind it.
    assert (backend.graphs, backend.runs) == (2, 6)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    assert not [w for w in caught if "Dynamo" in str(w.message)]


def test_a_cell_compiled_inside_a_compiled_model():
    inner, outer = Counting(), Counting()
    layer, _, cell = pair("cell", inner, **TIGHT)
    model = Model(layer)
    x = torch.randn(4, 6, dtype=torch.float64)
    run = torch.compile(model, backend=outer)
    for _ in range(3):
        run(x).pow(2).sum().backward()
    assert outer.graphs == 2
    assert inner.graphs == 1
    assert inner.with_grad == 0
    assert cell.linear.weight.grad.isfinite().all()


def test_an_affine_layer_is_one_graph():
    backend = Counting()
    model = Model(DEQLayer(AffineCell(6, 6, dtype=torch.float64)))
    torch.compile(model, backend=backend, fullgraph=True)(torch.randn(4, 6, dtype=torch.float64))
    assert backend.graphs == 1


def test_a_whole_graph_around_a_cell_is_refused_at_the_layer():
    model = torch.compile(Model(DEQLayer(Cell())), backend=Counting(), fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="_solve_general"):
        model(torch.randn(4, 6, dtype=torch.float64))
