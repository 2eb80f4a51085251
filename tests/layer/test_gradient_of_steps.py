"""Phantom, truncated and unrolled gradients are those of the steps written out by hand."""

import pytest
import torch
from tracked_cases import by_hand, every_kind, gradients, problem, same, whole

from fastdeq import (
    Anderson,
    ConvergenceError,
    DEQLayer,
    Phantom,
    Picard,
    Status,
    Truncated,
    Unrolled,
    fixed_point,
)

METHODS = [Phantom(), Truncated(steps=3), Unrolled(), Unrolled(checkpoint=True)]
every_method = pytest.mark.parametrize("method", METHODS, ids=repr)


def solved(layer, x):
    z = layer(x)
    return z, layer.last_solution


@every_kind
@pytest.mark.parametrize("solver", ["auto", "picard", Anderson(window=2)], ids=str)
def test_phantom_steps_follow_the_solve(kind, solver):
    layer, cell, x = problem(kind, gradient=Phantom(steps=3, damping=0.7), solver=solver)
    z, solution = solved(layer, x)
    start = whole(solution.value).detach()
    expected = by_hand(cell, x, [3] * len(x), 0.7, start=start)
    assert not torch.equal(whole(z), start)
    same([whole(z)], [expected])
    same(gradients(z, cell, x), gradients(expected, cell, x))


@every_kind
@pytest.mark.parametrize("damping", [1.0, 0.6])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_unrolled_samples_stop_by_themselves(kind, damping, checkpoint):
    options = {"solver": Picard(damping=damping), "gradient": Unrolled(checkpoint=checkpoint)}
    layer, cell, x = problem(kind, **options)
    z, solution = solved(layer, x)
    counts = solution.iterations.tolist()
    assert len(set(counts)) > 1
    assert solution.converged.all()
    expected = by_hand(cell, x, counts, damping)
    same([whole(z), whole(solution.value)], [expected, expected.detach()])
    same(gradients(z, cell, x), gradients(expected, cell, x))


@every_kind
@pytest.mark.parametrize("steps", [1, 4, 1000])
def test_truncated_at_each_samples_own_end(kind, steps):
    layer, cell, x = problem(kind, solver=Picard(damping=0.9), gradient=Truncated(steps=steps))
    z, solution = solved(layer, x)
    counts = solution.iterations.tolist()
    assert len(set(counts)) > 1
    expected = by_hand(cell, x, counts, 0.9, tracked=steps)
    same([whole(z)], [expected])
    same(gradients(z, cell, x), gradients(expected, cell, x))


@every_kind
@pytest.mark.parametrize("method", [Unrolled(), Truncated(steps=2)], ids=repr)
def test_fixed_iterations(kind, method):
    solver = Picard(fixed_iterations=6)
    layer, cell, x = problem(kind, solver=solver, gradient=method, on_failure="ignore")
    z, solution = solved(layer, x)
    assert solution.iterations.tolist() == [6] * len(x)
    tracked = getattr(method, "steps", None)
    expected = by_hand(cell, x, [6] * len(x), tracked=tracked)
    same([whole(z)], [expected])
    same(gradients(z, cell, x), gradients(expected, cell, x))


@every_kind
def test_they_tend_to_the_implicit_gradient(kind):
    tight = {"tol": 1e-13, "max_iter": 300}
    layer, cell, x = problem(kind, **tight)
    expected = gradients(layer(x), cell, x)
    # |J| <= 0.5: 50 steps leave 2^-50 of what one step makes.
    for method in (Phantom(steps=50, damping=1.0), Truncated(steps=50), Unrolled()):
        other = DEQLayer(layer.cell, gradient=method, **tight)
        same(gradients(other(x), cell, x), expected, rtol=1e-10, atol=1e-10)


@every_kind
@every_method
def test_second_derivatives(kind, method):
    layer, _, x = problem(kind, gradient=method, tol=1e-3)
    # One evaluation point moves by 1e-6, so no count of steps changes.
    loss = lambda x: whole(layer(x)).square().sum(1)  # noqa: E731
    if isinstance(method, Unrolled):
        assert torch.autograd.gradgradcheck(loss, (x,), atol=1e-5)
    else:  # derivatives of a state that is held fixed are not seen by differences
        (grad,) = torch.autograd.grad(loss(x).sum(), x, create_graph=True)
        assert torch.autograd.grad(grad.square().sum(), x)[0].abs().sum() > 0


@every_kind
@every_method
def test_without_grad_mode_it_is_the_solve(kind, method):
    layer, cell, x = problem(kind, gradient=method)
    with torch.no_grad():
        z = whole(layer(x))
    assert not z.requires_grad
    assert torch.equal(z, whole(layer.last_solution.value))
    with torch.inference_mode():
        assert torch.equal(whole(layer(x)), z)
    plain = DEQLayer(layer.cell, gradient=method)
    for p in cell.parameters():
        p.requires_grad_(False)
    assert not whole(plain(x.detach())).requires_grad


@every_kind
@every_method
def test_a_sample_that_is_not_finite_harms_no_other(kind, method):
    layer, cell, x = problem(kind, gradient=method, on_failure="ignore")
    alone = x[1:].detach().requires_grad_()
    z_alone = layer(alone)
    bad = x.detach().clone()
    bad[0, 1] = torch.nan
    bad.requires_grad_()
    z = layer(bad)
    assert layer.last_solution.status[0] == Status.NONFINITE
    assert (whole(z)[0] == 0).all()
    same([whole(z)[1:]], [whole(z_alone)])
    loss, loss_alone = whole(z).square().sum(), whole(z_alone).square().sum()
    found = torch.autograd.grad(loss, [bad, *cell.parameters()])
    expected = torch.autograd.grad(loss_alone, [alone, *cell.parameters()])
    assert (found[0][0] == 0).all()
    same([found[0][1:], *found[1:]], expected)


@every_method
def test_a_sample_that_overflows_in_the_solve_has_no_gradient(method):
    layer, cell, x = problem("fused", gradient=method, on_failure="ignore", solver="picard")
    cell.activation = "relu"  # whose slope keeps the others out of the first dimension
    with torch.no_grad():
        cell.weight.weight.copy_(torch.diag(torch.tensor([1e200, 0.1, 0.1, 0.1], dtype=x.dtype)))
        cell.injection.weight.zero_()[0, 0] = 1.0
        cell.injection.bias.fill_(1.0)[0] = -1.0
    x = torch.zeros_like(x).detach()
    x[0, 0] = 1e100
    x.requires_grad_()
    z = layer(x)
    assert layer.last_solution.status.tolist() == [Status.NONFINITE, 0, 0, 0]
    grads = torch.autograd.grad(z.sum(), [x, *cell.parameters()])
    assert (grads[0][0] == 0).all()
    assert all(g.isfinite().all() for g in grads)


@every_method
def test_policies_and_what_is_returned_when_it_fails(method):
    options = {"gradient": method, "solver": "picard", "tol": 0.0, "max_iter": 4}
    layer, cell, x = problem("general", on_failure="raise", **options)
    with pytest.raises(ConvergenceError, match="did not converge"):
        layer(x)
    layer, cell, x = problem("general", on_failure="ignore", **options)
    z, solution = solved(layer, x)
    assert not solution.converged.any()
    if not isinstance(method, Phantom):
        tracked = getattr(method, "steps", None)
        expected = by_hand(cell, x, [4] * len(x), tracked=tracked)
        same(gradients(z, cell, x), gradients(expected, cell, x))


def test_functions_and_empty_batches():
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    z0 = torch.zeros(2, 1, dtype=torch.float64)
    for method in METHODS:
        z, s = fixed_point(lambda z: torch.cos(z) * theta, z0, gradient=method, tol=1e-12)
        (grad,) = torch.autograd.grad(z.sum(), theta)
        star = s.value.detach()
        exact = (star.cos() / (1 + theta * star.sin())).sum()
        bound = 0.2 if isinstance(method, Phantom) else 2e-3  # (1 - tau + tau |J|)^5, |J|^3
        assert abs(grad - exact) < bound, method
        layer, _, x = problem("general", gradient=method)
        assert layer(x[:0]).shape == (0, 4)
        layer, _, x = problem("fused", gradient=method)
        assert layer(x[:0]).shape == (0, 4)


def test_half_precision_runs_the_steps_in_float32():
    for dtype in (torch.bfloat16, torch.float16):
        layer, cell, x = problem("fused", gradient=Unrolled(), tol=1e-2)
        cell.to(dtype)
        x = x.detach().to(dtype).requires_grad_()
        z = layer(x)
        z.float().sum().backward()
        assert z.dtype == x.grad.dtype == cell.injection.weight.grad.dtype == dtype
        bound = 2 * torch.finfo(dtype).eps
        same([z.float()], [layer.last_solution.value.float()], rtol=bound, atol=bound)


def test_memory_of_checkpointed_steps():
    """Each step keeps its state, not what the map's operations keep."""

    def kept(method):
        layer, _, x = problem("general", gradient=method, solver=Picard(fixed_iterations=10))
        layer(x)  # what is looked at once
        sizes = []
        hooks = lambda t: sizes.append(t.numel()) or t, lambda t: t
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            layer(x)
        return sum(sizes)

    assert kept(Unrolled(checkpoint=True)) < 0.7 * kept(Unrolled())


@pytest.mark.parametrize("method", ["truncated", "unrolled"])
@pytest.mark.parametrize("solver", ["anderson", "heavy_ball", "energy"])
def test_other_solvers_are_refused(method, solver):
    with pytest.raises(ValueError, match=r"plain iteration.*picard"):
        problem("general", gradient=method, solver=solver)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Phantom(steps=0), "steps must be an integer from 1"),
        (lambda: Phantom(damping=0.0), r"damping must be in \(0, 1\]"),
        (lambda: Truncated(steps=2.5), "steps must be an integer"),
        (lambda: Unrolled(checkpoint=1), "True or False"),
        (lambda: problem("fused", gradient="phantm"), "Did you mean 'phantom'"),
        (lambda: problem("fused", gradient=Phantom), "a name .* or an object"),
        (lambda: problem("fused", gradient="unrolled", precision="mixed"), "full precision"),
    ],
)
def test_wrong_options(build, message):
    with pytest.raises((ValueError, TypeError), match=message):
        build()


def test_names_stand_for_the_defaults():
    for method in (Phantom(), Truncated(), Unrolled()):
        layer, _, _ = problem("fused", gradient=method.name)
        assert layer.options.gradient == method
        assert repr(method) in repr(layer)
