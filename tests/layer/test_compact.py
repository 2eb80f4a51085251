"""``compact``: general cells are evaluated for the samples that are not finished."""

import itertools

import pytest
import torch
from compact_cases import Cell, assert_same, data, solved
from torch import nn

from fastdeq import GMRES, Anderson, DEQLayer, Picard, Status
from fastdeq.backends import extension
from fastdeq.solvers import Step

SOLVERS = [
    (Picard(), "neumann"),
    ("auto", "auto"),
    (Anderson(window=3), GMRES(restart=3)),
    (Picard(damping=0.8), "anderson"),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("solver", "adjoint"), SOLVERS, ids=str)
def test_finished_samples_are_left_out_in_both_directions(solver, adjoint, backend):
    if backend == "auto" and extension.module is None:
        pytest.skip(f"no compiled extension: {extension.why_missing}")
    cell, (x, gain) = Cell(), data(16, slow=[2, 11])
    options = {"solver": solver, "adjoint": adjoint, "backend": backend}
    expected = solved(cell, x, gain, **options)
    found = solved(cell, x, gain, compact=True, **options)
    assert_same(found, expected)
    for solution, before in zip(found[2:], expected[2:], strict=True):
        assert solution.converged.all()
        assert solution.path == "general, finished samples left out"
        assert before.path == "general"
        assert before.sample_evaluations == 16 * before.evaluations
        needed = int((solution.iterations + 1).sum())
        assert solution.sample_evaluations <= 2 * needed + 2 * 16
    torch.testing.assert_close(
        found[2].iterations.double(), expected[2].iterations.double(), atol=3, rtol=0.1
    )


def test_counts_are_those_of_the_calls():
    cell, (x, gain) = Cell(), data(12, slow=[5])
    layer = DEQLayer(cell, solver="picard", tol=1e-8, max_iter=800, compact=True)
    with torch.no_grad():
        layer(x, gain)
    solution = layer.last_solution
    assert len(cell.calls) == solution.evaluations
    assert sum(cell.calls) == solution.sample_evaluations
    assert cell.calls[-2:] == [1, 12]  # the last one confirms the result


def test_no_more_than_the_samples_need_by_halves():
    cell = Cell()
    x, _ = data(64)
    gain = torch.linspace(0.1, 0.97, 64, dtype=torch.float64).unsqueeze(1)
    layer = DEQLayer(cell, solver="picard", tol=1e-8, max_iter=2000, compact=True)
    with torch.no_grad():
        layer(x, gain)
    sizes = sorted(set(cell.calls), reverse=True)
    assert len(sizes) >= 5
    assert all(2 * after <= before for before, after in itertools.pairwise(sizes))
    # And a comparison of each part, and a confirmation of all.
    needed = 2 * int((layer.last_solution.iterations + 1).sum()) + 2 * 64
    assert sum(cell.calls) <= needed


def test_states_of_several_parts_in_another_dimension():
    """A tuple of (T, B, d)."""

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = []

        def forward(self, z, x, gain):
            a, b = z
            self.calls.append(a.shape[1])
            return torch.tanh(gain * b.flip(0) + x), gain * a.flip(2)

        def initial_state(self, x):
            return torch.zeros_like(x), torch.zeros_like(x)

    cell = Parts()
    x = torch.randn(3, 10, 4, dtype=torch.float64)
    gain = torch.full((1, 10, 1), 0.5, dtype=torch.float64)
    gain[0, 7] = 0.95
    found = []
    for compact in (False, True):
        layer = DEQLayer(cell, batch_dim=1, tol=1e-9, max_iter=500, compact=compact)
        leaf = x.clone().requires_grad_()
        a, b = layer(leaf, gain)
        found.append((a, b, *torch.autograd.grad((a * b).sum() + a.sum(), leaf)))
        assert layer.last_solution.converged.all()
    assert min(cell.calls) == 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-7)


def test_channels_last_goes_on_for_a_part():
    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            self.layouts = []

        def forward(self, z, x, gain):
            self.layouts.append(
                (len(z), z.is_contiguous(memory_format=torch.channels_last), x.stride(1) == 1)
            )
            return torch.tanh(gain * z.roll(1, 2) + x)

    cell = Conv()
    x = torch.randn(8, 3, 4, 5).to(memory_format=torch.channels_last)
    gain = torch.full((8, 1, 1, 1), 0.3)
    gain[:2] = 0.9
    with torch.no_grad():
        DEQLayer(cell, compact=True, max_iter=300)(x, gain)
    assert {n for n, *_ in cell.layouts} >= {8, 1}
    assert all(z and x for _, z, x in cell.layouts)


def test_a_bad_sample_and_one_that_never_ends_do_not_harm_the_others():
    cell, (x, gain) = Cell(), data(9, slow=[6])
    gain[2] = 40.0  # chaotic
    x[4] = torch.nan
    x[5, 0] = torch.inf
    options = {"tol": 1e-9, "max_iter": 300, "on_failure": "ignore"}
    results = []
    for compact in (False, True):
        layer = DEQLayer(cell, compact=compact, **options)
        with torch.no_grad():
            results.append((layer(x, gain), layer.last_solution))
    (z, plain), (found, solution) = results
    good = [0, 1, 3, 6, 7, 8]
    torch.testing.assert_close(found[good], z[good], atol=1e-7, rtol=1e-7)
    assert solution.status.tolist() == plain.status.tolist()
    assert solution.status[4] == Status.NONFINITE
    assert "left out" in solution.path


def test_a_cell_that_writes_to_its_argument():
    class InPlace(Cell):
        def forward(self, z, x, gain):
            self.calls.append(len(z))
            return z.matmul(self.a.t()).mul_(gain).add_(x).tanh_() + z.mul_(0)

    cell, (x, gain) = InPlace(), data(10, slow=[3])
    with torch.no_grad():
        found = DEQLayer(cell, tol=1e-9, max_iter=500, compact=True)(x, gain)
        expected = DEQLayer(Cell(), tol=1e-9, max_iter=500)(x, gain)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-7)
    assert min(cell.calls) == 1


def test_second_derivatives():
    cell, (x, gain) = Cell(), data(5, slow=[1])
    values = []
    for compact in (False, True):
        leaf = x.clone().requires_grad_()
        z = DEQLayer(cell, tol=1e-12, max_iter=2000, compact=compact)(leaf, gain)
        (grad,) = torch.autograd.grad(z.pow(3).sum(), leaf, create_graph=True)
        values.append(torch.autograd.grad(grad.square().sum(), leaf)[0])
    torch.testing.assert_close(*values, atol=1e-7, rtol=1e-7)


def test_under_autocast_parts_agree_to_its_rounding():
    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(64, 64)
            nn.init.orthogonal_(self.a.weight)
            self.calls = []

        def forward(self, z, x, gain):
            self.calls.append(len(z))
            return gain * self.a(z).float() + x

    cell, x = Linear(), torch.randn(32, 64)
    gain = torch.full((32, 1), 0.3)
    gain[9] = 0.9
    layer = DEQLayer(cell, tol=1e-2, compact=True)
    with torch.autocast("cpu", torch.bfloat16):
        z = layer(x.requires_grad_(), gain)
    z.sum().backward()
    assert "left out" in layer.last_solution.path
    assert "left out" in layer.last_adjoint_solution.path


def test_the_representation_names_it():
    assert "compact=(0, None)" in repr(DEQLayer(Cell(), compact=(0, None)))
    assert "compact" not in repr(DEQLayer(Cell()))


def test_a_compiled_cell_is_compiled_a_few_times_whatever_the_sizes():
    """Once for the first batch, once for any batch, and once for a single sample."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    cell = Cell()
    x, _ = data(48)
    gain = torch.linspace(0.1, 0.97, 48, dtype=torch.float64).unsqueeze(1)
    compiled = torch.compile(Plain(cell.a), backend=backend)
    layer = DEQLayer(compiled, solver="picard", tol=1e-8, max_iter=2000, compact=True)
    torch._dynamo.reset()
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        z = layer(leaf, gain)
        assert "left out" in layer.last_solution.path
        z.sum().backward()
    assert len(graphs) <= 3
    expected = DEQLayer(cell, solver="picard", tol=1e-8, max_iter=2000)(x, gain)
    torch.testing.assert_close(z, expected, atol=1e-6, rtol=1e-6)


class Plain(nn.Module):
    """As :class:`Cell`, without a count."""

    def __init__(self, a):
        super().__init__()
        self.a = a

    def forward(self, z, x, gain):
        return torch.tanh(gain * (z @ self.a.t()) + x)


def test_a_cell_that_cannot_take_one_sample_alone():
    class Several(Cell):
        def forward(self, z, x, gain):
            if len(z) < 2:
                raise RuntimeError("two samples or more")
            return super().forward(z, x, gain)

    cell = Several()
    x, _ = data(32)
    gain = torch.linspace(0.1, 0.95, 32, dtype=torch.float64).unsqueeze(1)
    options = {"tol": 1e-9, "max_iter": 900}
    with torch.no_grad():
        found = DEQLayer(cell, compact=True, **options)(x, gain)
        expected = DEQLayer(cell, **options)(x, gain)
    assert min(cell.calls) < 32
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_fixed_counts_leave_nothing_out(backend):
    cell, (x, gain) = Cell(), data(8)
    solver = Picard(fixed_iterations=9)
    layer = DEQLayer(cell, solver=solver, compact=True, on_failure="ignore", backend=backend)
    with torch.no_grad():
        layer(x, gain)
    assert cell.calls == [8] * 10


def test_a_solver_of_ones_own_may_keep_values():
    """The mean with the value before, which has to be as it was."""

    class Averaging:
        name, linear, needs, patience, rejects = "own", False, frozenset(), 50, ()

        def init(self, point, problem):
            return {"before": point}

        def step(self, state, point, value, norm, running):
            following = 0.8 * value + 0.2 * state["before"]
            state["before"] = value
            return Step(following, None, ~norm.isfinite())

        def counters(self, state):
            return ()

    cell, (x, gain) = Cell(), data(16, slow=[2, 11])
    solutions = []
    for compact in (False, True):
        layer = DEQLayer(cell, solver=Averaging(), compact=compact, tol=1e-8, max_iter=900)
        with torch.no_grad():
            layer(x, gain)
        solutions.append(layer.last_solution)
    assert "left out" in solutions[1].path
    assert solutions[1].iterations.tolist() == solutions[0].iterations.tolist()


def test_on_the_meta_device():
    with torch.device("meta"):
        cell = nn.Linear(4, 4)
    x = torch.empty(8, 4, device="meta")
    layer = DEQLayer(lambda z, x: torch.tanh(cell(z) + x), compact=True)
    assert layer(x).shape == (8, 4)
    with torch.no_grad():
        assert layer(x).shape == (8, 4)
