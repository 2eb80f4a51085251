"""What a layer shows of its solves: paths, counts, past solutions, a callback."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fastdeq import (
    AffineCell,
    Anderson,
    ConvergenceError,
    DEQLayer,
    Solution,
    fixed_point,
)
from fastdeq.backends import extension


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 5)
        self.calls = 0

    def forward(self, z, x):
        self.calls += 1
        return torch.tanh(0.5 * self.a(z) + x)


def affine(**options):
    return AffineCell(3, 5, scale=0.5, **options)


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = affine()

    def forward(self, z, x):
        return self.inner(z, x)

    def initial_state(self, x):
        return self.inner.initial_state(x)


class Overridden(AffineCell):
    def forward(self, z, x):
        return super().forward(z, x)


class OwnSolver(Anderson):
    pass


def hooked():
    cell = affine()
    cell.register_forward_hook(lambda *_: None)
    return cell


@pytest.mark.parametrize(
    ("make", "options", "context", "path"),
    [
        (affine, {}, (), "fused"),
        (Cell, {}, (), "general"),
        (lambda: Overridden(3, 5, scale=0.5), {}, (), "overridden methods"),
        (hooked, {}, (), "has hooks"),
        (Wrapper, {}, (), "inside a Wrapper"),
        (affine, {"solver": OwnSolver()}, (), "a solver class of one's own"),
    ],
)
def test_the_path_and_why(make, options, context, path):
    cell = make()
    layer = DEQLayer(cell, **options)
    x = torch.randn(4, 3 if not isinstance(cell, Cell) else 5)
    for _ in range(2):
        z = layer(x, *context)
        z.sum().backward()
        assert path in layer.last_solution.path
        assert layer.last_solution.path.startswith("fused" if path == "fused" else "general")
        assert path.startswith("fused") == (layer.last_adjoint_solution.path == "fused")


def test_a_further_argument():
    layer = DEQLayer(affine())
    layer.cell.forward = lambda z, x, more: torch.tanh(0.5 * z + more)
    layer(torch.randn(2, 3), torch.randn(2, 5))
    assert "further arguments" in layer.last_solution.path


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_evaluations_and_products_are_counted(backend):
    cell = Cell()
    layer = DEQLayer(cell, solver="picard", adjoint="neumann", backend=backend)
    with torch.no_grad():
        layer(torch.randn(6, 5))
    solution = layer.last_solution
    assert solution.evaluations == cell.calls == int(solution.iterations.max()) + 1
    assert solution.sample_evaluations == 6 * cell.calls
    z = layer(torch.randn(6, 5))
    z.sum().backward()
    adjoint = layer.last_adjoint_solution
    assert adjoint.evaluations == int(adjoint.iterations.max())
    assert adjoint.sample_evaluations == 6 * adjoint.evaluations


CELLS = [("general", Cell, 5), ("fused", affine, 3)]


@pytest.mark.parametrize(("path", "make", "size"), CELLS, ids=["general", "fused"])
def test_the_latest_solutions_are_kept_without_their_values(path, make, size):
    layer = DEQLayer(make(), keep_solutions=3)
    for batch in (1, 2, 3, 4, 5):
        layer(torch.randn(batch, size)).sum().backward()
    for direction in ("forward", "adjoint"):
        kept = layer.solutions[direction]
        assert [len(s.status) for s in kept] == [3, 4, 5]
        assert all(s.value is None and s.converged.all() for s in kept)
        assert all(s.path.startswith(path) for s in kept)
    assert layer.last_solution.value.shape[0] == 5
    assert layer.last_adjoint_solution.value is not None


@pytest.mark.parametrize(("path", "make", "size"), CELLS, ids=["general", "fused"])
def test_a_callback_hears_every_solve(path, make, size):
    heard = []
    layer = DEQLayer(make(), on_solution=lambda direction, s: heard.append((direction, s)))
    state = 0
    for _ in range(3):  # a recurrence
        state = layer(torch.randn(2, size)) + state
    state.sum().backward()
    assert [direction for direction, _ in heard] == ["forward"] * 3 + ["adjoint"] * 3
    assert all(isinstance(s, Solution) and s.value.shape[0] == 2 for _, s in heard)
    assert layer.solutions == {"forward": [], "adjoint": []}


def test_it_hears_of_failures_before_they_raise():
    heard = []
    layer = DEQLayer(
        Cell(),
        max_iter=1,
        on_failure="raise",
        on_solution=lambda direction, s: heard.append(direction),
    )
    with pytest.raises(ConvergenceError):
        layer(torch.randn(2, 5))
    assert heard == ["forward"]


def test_what_it_raises_reaches_the_caller():
    def stop(direction, solution):
        raise KeyError(direction)

    layer = DEQLayer(Cell(), on_solution=stop)
    with pytest.raises(KeyError, match="forward"):
        layer(torch.randn(2, 5))


def test_fixed_point_passes_its_solutions_on_too():
    heard = []
    c = torch.randn(3, 4, requires_grad=True)
    z, solution = fixed_point(
        lambda z: 0.5 * torch.cos(z) + c,
        torch.zeros(3, 4),
        on_solution=lambda direction, s: heard.append((direction, s)),
    )
    z.sum().backward()
    assert [direction for direction, _ in heard] == ["forward", "adjoint"]
    assert heard[0][1] is solution
    assert heard[1][1].converged.all()


def _hear(direction, solution):
    pass


def test_copies_keep_the_options_and_forget_the_solutions():
    layer = DEQLayer(Cell(), keep_solutions=2, on_solution=_hear)
    layer(torch.randn(2, 5))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.solutions == {"forward": [], "adjoint": []}
        assert other.last_solution is None
        other(torch.randn(2, 5))
        assert len(other.solutions["forward"]) == 1
        assert other.on_solution is _hear
    assert len(layer.solutions["forward"]) == 1


@pytest.mark.skipif(extension.module is None, reason="no compiled extension")
def test_a_compiled_layer_is_not_listened_to():
    heard = []
    layer = DEQLayer(affine(), on_solution=lambda *_: heard.append(1))
    x = torch.randn(4, 3)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    assert len(heard) == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep_solutions": -1}, ValueError, "integer >= 0"),
        ({"keep_solutions": True}, ValueError, "integer >= 0"),
        ({"keep_solutions": 1.5}, ValueError, "integer >= 0"),
        ({"on_solution": 3}, TypeError, "function of a direction"),
    ],
)
def test_options_that_do_not_fit(options, error, message):
    with pytest.raises(error, match=message):
        DEQLayer(Cell(), **options)
