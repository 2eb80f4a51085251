"""``randomness="same"``: one mask for all evaluations of a solve and its gradient, and another for
the next; against the unrolled iteration with that mask."""

import pytest
import torch
from torch import nn

from fastdeq import ConvergenceWarning, DEQLayer, Picard, fixed_point

F64 = torch.float64
TIGHT = {"tol": 1e-11, "max_iter": 300, "randomness": "same"}


class Dropped(nn.Module):
    def __init__(self, p=0.3):
        super().__init__()
        w = torch.randn(6, 6, dtype=F64)
        self.w = nn.Parameter(0.5 * w / torch.linalg.matrix_norm(w, 2))
        self.drop = nn.Dropout(p)

    def forward(self, z, x):
        return torch.tanh(self.drop(z) @ self.w + x + 0.1 * torch.randn_like(x))


def unrolled(cell, x):
    """From the generator's state of now, with the numbers of one evaluation."""
    state, z = torch.get_rng_state(), torch.zeros_like(x)
    for _ in range(120):
        torch.set_rng_state(state)
        z = cell(z, x)
    return z


@pytest.mark.parametrize("adjoint", ["auto", "neumann", "gmres"])
@pytest.mark.parametrize("solver", ["auto", "picard"])
def test_values_and_gradients_are_those_of_the_unrolled_iteration(solver, adjoint):
    cell = Dropped()
    layer = DEQLayer(cell, solver=solver, adjoint=adjoint, **TIGHT)
    x = torch.randn(5, 6, dtype=F64, requires_grad=True)
    leaves = (x, cell.w)
    before = torch.get_rng_state()
    z = layer(x)
    assert layer.last_solution.converged.all()
    after = torch.get_rng_state()
    torch.rand(3)
    later = torch.get_rng_state()
    found = torch.autograd.grad(z.pow(2).sum(), leaves, create_graph=True)
    assert layer.last_adjoint_solution.converged.all()
    again = torch.autograd.grad(found[0].pow(2).sum(), leaves)
    assert torch.equal(torch.get_rng_state(), later)  # the backward pass moves nothing
    torch.set_rng_state(before)
    expected = unrolled(cell, x)
    assert torch.equal(torch.get_rng_state(), after)  # a solve moves it as one evaluation does
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)
    known = torch.autograd.grad(expected.pow(2).sum(), leaves, create_graph=True)
    for one, other in zip(found, known, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)
    for one, other in zip(again, torch.autograd.grad(known[0].pow(2).sum(), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


def test_gradcheck_in_first_and_second_order():
    cell = Dropped()
    x = torch.randn(2, 6, dtype=F64, requires_grad=True)

    def solved(x, w):
        torch.manual_seed(3)
        drop = lambda z: torch.tanh(cell.drop(z) @ w + x)  # noqa: E731
        return fixed_point(drop, torch.zeros_like(x), **{**TIGHT, "tol": 1e-13})[0]

    assert torch.autograd.gradcheck(solved, (x, cell.w))
    assert torch.autograd.gradgradcheck(solved, (x, cell.w), atol=1e-4)


def test_each_solve_draws_others_and_a_seed_gives_the_same():
    layer = DEQLayer(Dropped(), **TIGHT)
    x = torch.randn(5, 6, dtype=F64)
    first, second = layer(x), layer(x)
    assert not torch.allclose(first, second, rtol=1e-3)
    torch.manual_seed(5)
    one = layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), one)
    torch.manual_seed(5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), one)


def test_auxiliary_outputs_and_checkpoints_see_the_same_mask():
    cell = Dropped()

    def masked(z, x):
        mask = cell.drop(torch.ones_like(z))
        return torch.tanh((z * mask) @ cell.w + x), mask

    layer = DEQLayer(masked, has_aux=True, **TIGHT)
    x = torch.randn(5, 6, dtype=F64, requires_grad=True)
    z, mask = layer(x)
    torch.testing.assert_close(z, torch.tanh((z * mask) @ cell.w + x), rtol=1e-9, atol=1e-9)
    plain = DEQLayer(Dropped(), **TIGHT)
    state = torch.get_rng_state()
    (expected,) = torch.autograd.grad(plain(x).pow(2).sum(), x)
    torch.set_rng_state(state)
    y = torch.utils.checkpoint.checkpoint(plain, x, use_reentrant=False)
    torch.rand(3)  # between the passes
    torch.testing.assert_close(torch.autograd.grad(y.pow(2).sum(), x)[0], expected)


def test_an_error_of_the_cell_leaves_the_generator_as_it_was():
    calls = []

    def cell(z, x):
        calls.append(torch.rand(()))
        if len(calls) == 3:
            raise ArithmeticError
        return 0.9 * z + x + 0 * calls[-1]

    state = torch.get_rng_state()
    torch.rand(())
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    with pytest.raises(ArithmeticError):
        DEQLayer(cell, randomness="same")(torch.ones(2, 2))
    assert len({float(c) for c in calls}) == 1
    assert torch.equal(torch.get_rng_state(), after)


def test_by_default_each_evaluation_draws_anew():
    """Such a cell has no equilibrium; a solver with a fixed count takes it as it comes."""
    cell = Dropped()
    x = torch.randn(5, 6, dtype=F64)
    with pytest.warns(ConvergenceWarning, match='randomness="same" if the cell draws random'):
        DEQLayer(cell)(x)
    layer = DEQLayer(cell, solver=Picard(fixed_iterations=7), on_failure="ignore")
    layer(x)
    assert layer.last_solution.iterations.tolist() == [7] * 5


def test_what_it_may_be():
    with pytest.raises(ValueError, match=r"unknown randomness 'fixed'.*'different', 'same'"):
        DEQLayer(lambda z, x: z, randomness="fixed")
    assert "randomness='same'" in repr(DEQLayer(lambda z, x: z, randomness="same"))
