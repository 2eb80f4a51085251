"""``trajectory``: states along one solve, each with its gradient."""

import pytest
import torch
from tracked_cases import by_hand, every_kind, gradients, problem, same, whole

from fastdeq import (
    Anderson,
    ConvergenceWarning,
    DEQLayer,
    Phantom,
    Picard,
    Reversible,
    Status,
    Truncated,
    Unrolled,
    trajectory,
)

AT = (1, 3, 7)


def iterates(cell, x, ends, damping=1.0):
    """After each of ``AT`` updates, samples that ended before at their ends."""
    return [by_hand(cell, x, [min(k, n) for n in ends], damping) for k in AT]


@every_kind
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_states_are_those_of_the_iteration(kind, backend):
    layer, cell, x = problem(kind, solver=Picard(damping=0.8), backend=backend)
    states = trajectory(layer, x, states=AT)
    ends = layer.last_solution.iterations.tolist()
    same(map(whole, states[:-1]), iterates(cell, x, ends, 0.8))
    assert [type(s) for s in states] == [type(layer(x))] * 4
    same([whole(states[-1])], [whole(layer(x))], rtol=1e-9, atol=1e-9)


@every_kind
def test_any_solver_and_samples_that_stop_early(kind):
    options = {"solver": Anderson(window=2), "tol": 1e-6}
    layer, _, x = problem(kind, **options)
    *states, last = trajectory(layer, x, states=(2, 5, 99))
    ends = layer.last_solution.iterations
    assert ends.min() > 2
    assert ends.max() < 99
    for state, count in zip(states, (2, 5), strict=False):
        stopped = ends <= count
        assert torch.equal(whole(state)[stopped], whole(last)[stopped])
        # The same solver, stopped there; residuals fall, so that it returns its last iterate.
        part = DEQLayer(layer.cell, **options, max_iter=count, on_failure="ignore")
        same([whole(state)], [whole(part(x))])
    assert torch.equal(whole(states[2]), whole(last))


@every_kind
def test_each_state_has_the_gradient_of_its_steps(kind):
    for method in (Unrolled(), Truncated(steps=2)):
        layer, cell, x = problem(kind, gradient=method)
        states = trajectory(layer, x, states=AT)
        ends = layer.last_solution.iterations.tolist()
        for count, state in zip((*AT, 10**6), states, strict=True):
            steps = [min(count, n) for n in ends]
            expected = by_hand(cell, x, steps, tracked=getattr(method, "steps", None))
            same([whole(state)], [expected])
            same(gradients(state, cell, x), gradients(expected, cell, x))


@every_kind
def test_phantom_and_one_step_start_at_each_state(kind):
    layer, cell, x = problem(kind, gradient=Phantom(steps=2, damping=0.5), solver="picard")
    states = trajectory(layer, x, states=AT)
    ends = layer.last_solution.iterations.tolist()
    for state, before in zip(states, iterates(cell, x, ends), strict=False):
        expected = by_hand(cell, x, [2] * len(x), 0.5, start=before.detach())
        same([whole(state)], [expected])
        same(gradients(state, cell, x), gradients(expected, cell, x))
    other = DEQLayer(layer.cell, gradient="one_step", solver="picard")
    for state, before in zip(
        trajectory(other, x, states=AT), iterates(cell, x, ends), strict=False
    ):
        same([whole(state)], [before])
        step = by_hand(cell, x, [1] * len(x), start=before.detach())
        found = torch.autograd.grad(whole(state).sum(), x, retain_graph=True)
        same(found, torch.autograd.grad(step.sum(), x))


@every_kind
def test_implicit_gradients_are_those_of_an_equilibrium_there(kind):
    layer, cell, x = problem(kind, solver="picard", adjoint_tol=1e-13, adjoint_max_iter=300)
    layer = DEQLayer(layer.cell, solver="picard", adjoint_tol=1e-12, keep_solutions=9)
    states = trajectory(layer, x, states=AT)
    loss = sum(whole(s).square().sum() for s in states)
    found = torch.autograd.grad(loss, x)[0]
    expected = torch.zeros_like(x)
    w, u = cell.recurrent_weight(), cell.injection.weight
    for state in states:
        z = whole(state).detach()
        d = 1 - (z @ w.t() + cell.injection(x)).tanh().square()
        jacobian = d.unsqueeze(2) * w
        v = torch.linalg.solve(torch.eye(4) - jacobian.mT, 2 * z)
        expected = expected + (v * d) @ u
    same([found], [expected], rtol=1e-9, atol=1e-9)
    assert len(layer.solutions["adjoint"]) == len(states)


@every_kind
def test_bad_samples_and_no_grad_mode(kind):
    layer, cell, x = problem(kind, on_failure="ignore", solver="picard")
    bad = x.detach().clone()
    bad[0, 0] = torch.nan
    bad.requires_grad_()
    states = trajectory(layer, bad, states=AT)
    assert layer.last_solution.status[0] == Status.NONFINITE
    loss = sum(whole(s).square().sum() for s in states)
    assert all((whole(s)[0] == 0).all() for s in states)
    grads = torch.autograd.grad(loss, [bad, *cell.parameters()])
    assert (grads[0][0] == 0).all()
    assert all(g.isfinite().all() for g in grads)
    with torch.no_grad():
        again = trajectory(layer, x, states=AT)
    assert not any(whole(s).requires_grad for s in again)
    same([whole(s)[1:] for s in again], [whole(s)[1:] for s in states])
    with torch.no_grad():
        for state in again:
            whole(state).zero_()  # they share no memory
    assert whole(layer(x)).abs().sum() > 0


def test_a_cell_that_writes_to_its_argument_at_times():
    """The solve begins again with copies of the points, and so do the counts."""
    x, calls = torch.randn(3, 4, dtype=torch.float64), []

    def cell(z, x):
        calls.append(z)
        return z.mul_(0.5).add_(x) if len(calls) == 3 else 0.5 * z + x

    layer = DEQLayer(cell, solver=Picard(), tol=1e-8)
    found = trajectory(layer, x, states=AT)
    same(found[:-1], [2 * x * (1 - 0.5**k) for k in AT])


def test_numbers_of_states_and_starts():
    layer, cell, x = problem("general", solver=Picard(fixed_iterations=9), tol=0.5)
    states = trajectory(layer, x, states=3)
    same(map(whole, states), [by_hand(cell, x, [n] * 4) for n in (3, 6, 9)])
    assert len(trajectory(layer, x, states=1)) == 1
    z0 = torch.ones(4, 4, dtype=x.dtype)
    (first, _) = trajectory(layer, x, states=[1], z0=z0)
    same([first], [cell(z0, x)])
    writes = DEQLayer(lambda z, x: z.mul_(0.5).add_(x), solver="picard", tol=1e-3)
    first, second, _ = trajectory(writes, x, states=(1, 2))
    same([first, second], [x, 1.5 * x])


def test_failures_are_reported_once():
    layer, _, x = problem("general", tol=1e-14, max_iter=3)
    with pytest.warns(ConvergenceWarning, match="did not converge"):
        trajectory(layer, x, states=AT)


@pytest.mark.parametrize("states", [(), (0, 1), (3, 2), (2, 2), 0, True, "3", (1.5,), None])
def test_wrong_states(states):
    layer, _, x = problem("general")
    with pytest.raises(ValueError, match="states must be ascending"):
        trajectory(layer, x, states=states)


def test_what_it_does_not_go_with():
    for options in ({"compact": True}, {"precision": "mixed"}, {"gradient": Reversible()}):
        layer, _, x = problem("general", **options)
        with pytest.raises(ValueError, match=f"no states along a solve with {next(iter(options))}"):
            trajectory(layer, x, states=AT)
    with pytest.raises(TypeError, match="layer must be a DEQLayer"):
        trajectory(layer.cell, x, states=AT)
