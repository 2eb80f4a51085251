"""What a cell sees and returns is read where it lies; cells may write to it all the same."""

import pytest
import torch
from operation_cases import Calls
from torch import nn

from fastdeq import Anderson, DEQLayer, HeavyBall, Picard, fixed_point
from fastdeq.backends import extension

compiled = pytest.mark.skipif(
    extension.module is None, reason=f"no compiled extension: {extension.why_missing}"
)
SOLVERS = (Picard(), Anderson(), HeavyBall(), "auto")


@compiled
@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_two_views_are_all_that_runs_between_two_evaluations(solver):
    """The state out of the rows, and the rows out of what the cell returns."""
    start, c = torch.zeros(3, 2, 4), torch.randn(3, 2, 4)

    def calls(max_iter):
        with torch.no_grad(), Calls() as seen:
            fixed_point(
                lambda z: torch.cos(0.95 * z),
                start + c,
                solver=solver,
                tol=0.0,
                max_iter=max_iter,
                on_failure="ignore",
            )
        return seen.names

    few, many = calls(3), calls(13)
    added = list(many)
    for name in few:
        added.remove(name)
    views = ("view", "detach", "alias", "reshape", "aten.to.dtype")  # a copy is _to_copy
    assert len([n for n in added if "cos" in n]) == 10
    assert len([n for n in added if "mul" in n]) == 10
    rest = [n for n in added if "cos" not in n and "mul" not in n]
    room = [n for n in rest if "empty_like" in n]  # for entries of the history
    assert len(room) <= 12
    assert all(any(view in n for view in views) for n in rest if n not in room), rest
    assert len(rest) <= 60


class InPlace(nn.Module):
    """0.5 tanh(A z) + x, computed in z's memory, from a given call on."""

    def __init__(self, first):
        super().__init__()
        self.linear = nn.Linear(5, 5, dtype=torch.float64)
        self.first, self.calls = first, 0

    def forward(self, z, x):
        self.calls += 1
        value = 0.5 * torch.tanh(self.linear(z.clone())) + x
        return value if self.first is None or self.calls <= self.first else z.copy_(value)


@pytest.mark.parametrize("first", [0, 1, 4])
@pytest.mark.parametrize("solver", SOLVERS[:2], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_cell_may_write_to_its_argument(backend, solver, first):
    torch.manual_seed(1)
    writes = InPlace(first)
    x = torch.randn(4, 5, dtype=torch.float64)
    z0 = torch.randn(4, 5, dtype=torch.float64)
    begin = z0.clone()
    results = []
    for kind in (first, None):
        writes.first, writes.calls = kind, 0
        layer = DEQLayer(writes, solver=solver, tol=1e-9, backend=backend)
        with torch.no_grad():
            silent = layer(x, z0=z0)
        writes.calls = 0
        with torch.inference_mode():
            inferred = layer(x, z0=z0)
        writes.calls = 0
        own = x.clone().requires_grad_()
        z = layer(own, z0=z0)
        z.square().sum().backward()
        assert layer.last_solution.converged.all()
        assert torch.equal(z0, begin)
        results.append([silent, inferred, z.detach(), own.grad, writes.linear.weight.grad.clone()])
        writes.zero_grad()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-8)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), "auto"], ids=str)
def test_a_hook_may_keep_what_a_cell_saw(solver):
    cell = nn.Linear(6, 6, dtype=torch.float64)
    nn.init.orthogonal_(cell.weight, 0.7)
    kept, copies = [], []

    def keep(module, arguments, output):
        kept.extend([arguments[0], output])
        copies.extend([arguments[0].detach().clone(), output.detach().clone()])

    cell.register_forward_hook(keep)
    x = torch.randn(3, 6, dtype=torch.float64)
    layer = DEQLayer(lambda z, x: cell(z) + x, solver=solver, tol=1e-8)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            z = layer(x)
        if grad:
            z.sum().backward()
    assert len(kept) > 10
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_values_and_products_may_have_a_pending_negation(backend):
    """As the imaginary part of a conjugate has."""
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def cell(z, x):
        return torch.complex(x, -0.3 * torch.tanh(z) - x).conj().imag

    z = DEQLayer(cell, tol=1e-10, backend=backend)(x)
    (gradient,) = torch.autograd.grad(z.sum(), x)
    expected = torch.zeros_like(x)
    for _ in range(60):
        expected = 0.3 * torch.tanh(expected) + x
    (right,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(gradient, right, rtol=0, atol=1e-8)


def test_results_are_the_callers_own():
    """Neither the start, nor the layer's record, nor the cell's tensors share memory with z."""
    same = torch.zeros(3, 4)
    layer = DEQLayer(lambda z, x: torch.add(0.5 * z, x, out=same), tol=1e-6)
    x, z0 = torch.randn(3, 4), torch.randn(3, 4)
    with torch.no_grad():
        z = layer(x, z0=z0)
    solution = layer.last_solution.value.clone()
    own = {t.untyped_storage().data_ptr() for t in (z, z0, same, layer.last_solution.value)}
    assert len(own) == 4
    z.zero_()
    assert torch.equal(layer.last_solution.value, solution)
