"""The reversible gradient is that of autograd through the same coupled iteration."""

import dataclasses

import pytest
import torch
from tracked_cases import every_kind, gradients, problem, same, whole

from fastdeq import ConvergenceError, DEQLayer, Reversible, Status, fixed_point

BETAS = [0.3, 0.5, 0.8]


def coupled(cell, x, counts, beta):
    """``counts[i]`` updates of sample i by itself, y and z."""
    ends = []
    for i, count in enumerate(counts):
        y = z = x.new_zeros(1, cell.features)
        for _ in range(count):
            y = (1 - beta) * y + beta * cell(z, x[i : i + 1])
            z = (1 - beta) * z + beta * cell(y, x[i : i + 1])
        ends.append((y, z))
    return tuple(map(torch.cat, zip(*ends, strict=True)))


def grown(beta, count):
    """What the rounding of float64 has grown to after ``count`` inverted updates, |J| <= 0.8."""
    return 1e-15 * ((1 + 0.8 * beta) / (1 - beta)) ** (2 * count)


@every_kind
@pytest.mark.parametrize("beta", BETAS)
def test_few_updates_are_exact_to_rounding(kind, beta):
    options = {"tol": 0.01, "gradient": Reversible(beta=beta), "max_iter": 30}
    layer, cell, x = problem(kind, scale=0.8, **options)
    z = layer(x)
    solution = layer.last_solution
    counts = solution.iterations.tolist()
    assert len(set(counts)) > 1
    assert solution.converged.all()
    expected = coupled(cell, x, counts, beta)[1]
    same([whole(z), whole(solution.value)], [expected, expected.detach()])
    bound = 0.1 * grown(beta, max(counts))  # cotangents shrink meanwhile
    assert bound < 1e-5
    same(gradients(z, cell, x), gradients(expected, cell, x), rtol=bound, atol=bound)
    adjoint = layer.last_adjoint_solution
    assert adjoint.iterations.tolist() == counts
    assert adjoint.converged.all()
    assert (adjoint.residual < 1e-6).all()


@every_kind
def test_it_tends_to_the_implicit_gradient(kind):
    layer, cell, x = problem(kind, tol=1e-12, max_iter=300)
    expected = gradients(layer(x), cell, x)
    options = {"tol": 1e-9, "max_iter": 300, "adjoint_tol": 1e-3}
    other = DEQLayer(layer.cell, gradient="reversible", **options)
    found = gradients(other(x), cell, x)
    assert other.last_solution.converged.all()
    # Reconstructed states are lost where cotangents have shrunk to the reported residual.
    worst = float(other.last_adjoint_solution.residual.max())
    assert worst < 1e-3
    size = max(float(g.abs().max()) for g in expected)
    same(found, expected, rtol=0.0, atol=10 * worst * size + 1e-7)


def test_the_adjoints_residual_tells_of_lost_states():
    """|J| near 1: many updates, whose states cannot all be reconstructed."""
    options = {"tol": 1e-7, "adjoint_tol": 1e-12, "max_iter": 400, "on_failure": "ignore"}
    layer, cell, x = problem("general", scale=0.99, gradient=Reversible(beta=0.8), **options)
    z = layer(x)
    counts = layer.last_solution.iterations.tolist()
    assert max(counts) > 20 > min(counts)
    expected = gradients(coupled(cell, x, counts, 0.8)[1], cell, x)
    found = gradients(z, cell, x)
    adjoint = layer.last_adjoint_solution
    # One sample at a time: the gradient of x belongs to it.
    off = (found[0] - expected[0]).norm(dim=1) / expected[0].norm(dim=1)
    assert (off[adjoint.residual < 1e-8] < 1e-7).all()
    assert (adjoint.status[adjoint.residual > 1e-8] == Status.STAGNATED).all()
    assert (off <= 10 * adjoint.residual + 1e-7).all()
    assert (off < 0.1).all()
    layer.options = dataclasses.replace(layer.options, on_failure="raise")
    with pytest.raises(ConvergenceError, match=r"raise adjoint_tol .* smaller beta"):
        layer(x).sum().backward()


def kept(method, updates):
    """Numbers that a call in grad mode keeps for its backward pass."""
    options = {"tol": 0.0, "max_iter": updates, "on_failure": "ignore"}
    layer, _, x = problem("general", gradient=method, **options)
    layer(x)  # what is looked at once
    sizes = []

    def pack(t):
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    return sum(sizes)


def test_memory_does_not_grow_but_by_four_numbers_per_sample_and_update():
    batch, projections = 4, 4
    assert kept("reversible", 40) - kept("reversible", 10) == 30 * batch * projections
    assert kept("unrolled", 40) - kept("unrolled", 10) > 3 * 30 * batch * projections


@every_kind
def test_float32(kind):
    layer, cell, x = problem(kind, gradient="reversible", tol=1e-3)
    expected = gradients(layer(x), cell, x)
    layer.float()
    single = x.detach().float().requires_grad_()
    z = layer(single)
    found = gradients(z, cell, single)
    assert whole(z).dtype == torch.float32
    # Both are within tol / (1 - |J|) of the equilibrium, and may stop one update apart.
    same([g.double() for g in found], expected, rtol=0.02, atol=0.02)


@every_kind
def test_a_sample_that_is_not_finite_harms_no_other(kind):
    layer, cell, x = problem(kind, gradient="reversible", on_failure="ignore")
    alone = x[1:].detach().requires_grad_()
    bad = x.detach().clone()
    bad[0, 1] = torch.nan
    bad.requires_grad_()
    z_alone = layer(alone)
    z = layer(bad)
    assert layer.last_solution.status.tolist() == [Status.NONFINITE, 0, 0, 0]
    assert (whole(z)[0] == 0).all()
    same([whole(z)[1:]], [whole(z_alone)])
    found = torch.autograd.grad(whole(z).square().sum(), [bad, *cell.parameters()])
    expected = torch.autograd.grad(whole(z_alone).square().sum(), [alone, *cell.parameters()])
    assert (found[0][0] == 0).all()
    same([found[0][1:], *found[1:]], expected)


def test_a_map_that_overflows_for_one_sample():
    theta = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    z0 = torch.tensor([[1.0], [1e200]], dtype=torch.float64)
    options = {"gradient": "reversible", "on_failure": "ignore", "tol": 1e-3}
    z, solution = fixed_point(lambda z: torch.where(z > 1e100, z * z, theta * z + 1), z0, **options)
    assert solution.status.tolist() == [Status.CONVERGED, Status.NONFINITE]
    assert z.isfinite().all()
    (grad,) = torch.autograd.grad(z[0].sum(), theta)
    assert abs(grad - 4) < 0.1  # d/dt 1 / (1 - t)


@every_kind
def test_without_grad_mode_and_without_parameters(kind):
    layer, cell, x = problem(kind, gradient="reversible")
    z = whole(layer(x)).detach()
    with torch.no_grad():
        assert torch.equal(whole(layer(x)), z)
    cell.requires_grad_(False)
    assert not whole(layer(x.detach())).requires_grad
    (grad,) = torch.autograd.grad(whole(layer(x)).sum(), x)
    assert grad.abs().sum() > 0
    assert whole(layer(x[:0])).shape == (0, 4)


def test_policies():
    options = {"gradient": "reversible", "tol": 1e-14, "max_iter": 3}
    layer, cell, x = problem("general", on_failure="raise", **options)
    with pytest.raises(ConvergenceError, match="raise max_iter or tol, take another beta") as error:
        layer(x)
    assert error.value.solution.iterations.tolist() == [3] * len(x)
    layer, cell, x = problem("general", on_failure="ignore", **options)
    z = layer(x)
    expected = coupled(cell, x, [3] * len(x), 0.5)[1]
    same(gradients(z, cell, x), gradients(expected, cell, x))


def test_hooks_run_once_and_second_derivatives_are_refused():
    layer, cell, x = problem("general", gradient="reversible")
    calls = []
    cell.injection.weight.register_hook(lambda g: calls.append(g))
    z = layer(x)
    z.sum().backward(retain_graph=True)
    assert len(calls) == 1
    assert torch.equal(calls[0], cell.injection.weight.grad)
    (grad,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "options", [{"solver": "picard"}, {"backend": "cpp"}, {"compact": True}, {"precision": "mixed"}]
)
def test_what_it_does_not_go_with(options):
    with pytest.raises(ValueError, match=f"leave {next(iter(options))}="):
        problem("general", gradient="reversible", **options)
    with pytest.raises(ValueError, match="beta must be in"):
        Reversible(beta=1.0)


def test_lost_states_do_not_overflow():
    theta = torch.tensor(-0.9, dtype=torch.float64, requires_grad=True)
    z0 = torch.zeros(1, 1, dtype=torch.float64)
    options = {"gradient": "reversible", "on_failure": "ignore", "tol": 0.0, "max_iter": 1000}
    adjoint = []
    z, _ = fixed_point(
        lambda z: theta * z + 1, z0, on_solution=lambda _, s: adjoint.append(s), **options
    )
    (grad,) = torch.autograd.grad(z.sum(), theta)
    off = abs(grad - 1 / (1 - theta) ** 2)
    assert adjoint[0].iterations[0] == adjoint[1].iterations[0] == 1000
    assert off < adjoint[1].residual[0] < 0.3  # the estimate
    assert off < 0.01
