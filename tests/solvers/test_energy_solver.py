"""The energy solver: what it promises of E, where it converges, and both implementations alike.

E(z) = sum Phi*(z_i) - z^T W z / 2 - c^T z,   Phi*(z) = a z - Phi(a),   z = phi(a),   grad E = -s
"""

import math
from types import SimpleNamespace

import pytest
import torch
from energy_cases import allowance, energy
from engine_cases import Call, Forward
from symmetric_cases import (
    IMPLEMENTATIONS,
    MONOTONE,
    relative_residual,
    symmetric_cell,
    symmetric_weight,
)

from fastdeq import solvers
from fastdeq.activations import ACTIVATIONS
from fastdeq.backends import extension
from fastdeq.solution import Status
from fastdeq.solvers import Energy, loop
from fastdeq.solvers.base import AffineMap, Structure

BOUNDED = [name for name in MONOTONE if ACTIVATIONS[name].bounded]
UNBOUNDED = [name for name in MONOTONE if name not in BOUNDED]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
momentum = pytest.mark.parametrize("momentum", [False, True])


def descent(case, **options):
    """Iterates a (B, d) that the reference accepts, one tensor for each of its steps, with NaN
    for samples that made none, and its solution."""
    accepted = []

    class Recorder(Energy):
        def step(self, state, point, value, norm, running):
            accepted.append(None)
            self.__dict__["running"] = running
            return super().step(state, point, value, norm, running)

        def _begin(self, state, phi, rows, *args):
            here = (rows & self.running).unsqueeze(1)
            accepted.append(torch.where(here, state.a, torch.nan))
            super()._begin(state, phi, rows, *args)

    c, dtype = case.injection, case.weight.dtype
    solution = loop.solve(
        AffineMap(c, lambda z: z @ case.weight.t(), activation=ACTIVATIONS[case.activation]),
        torch.zeros_like(c),
        Recorder(**options),
        tol=1e-5 if dtype == torch.float32 else 1e-12,
        max_iter=400,
        anderson_mix=None,
    )
    return [a for a in accepted if a is not None], solution


def largest_rise(case, **options):
    """The largest of (rise of E) / (what rounding accounts for) over all steps and samples."""
    iterates, solution = descent(case, **options)
    last = torch.full_like(iterates[0], torch.nan, dtype=torch.float64)
    worst, steps = -math.inf, 0
    for a in iterates:
        a = a.double()
        both = last.isfinite().all(1) & a.isfinite().all(1)
        if both.any():
            rows = Forward(case.weight, case.injection[both], case.activation)
            before, rounding, s_old = energy(rows, last[both])
            after, rounding_after, s_new = energy(rows, a[both])
            room = allowance(rows, last[both], a[both], s_old, s_new) + rounding + rounding_after
            worst = max(worst, ((after - before) / room).max().item())
            steps += int(both.sum())
        last = torch.where(a.isfinite(), a, last)
    return worst, steps, solution


@dtypes
@pytest.mark.parametrize("scale", [0.9, 2.0, 4.0, 20.0, 100.0])
@pytest.mark.parametrize("activation", MONOTONE)
def test_the_energy_never_rises(activation, scale, dtype):
    if activation in UNBOUNDED and scale > 1:
        scale = 0.99  # beyond, E has no minimum
    case = symmetric_cell(16, 40, scale, dtype, activation)
    worst, steps, _ = largest_rise(case)
    assert worst <= 1
    assert steps >= 16


def test_the_check_sees_a_solver_that_accepts_every_trial(monkeypatch):
    case = symmetric_cell(16, 40, 8.0)
    assert largest_rise(case)[0] <= 1
    monkeypatch.setattr(Energy, "_energy_falls", lambda self, state, phi, z, pre: pre[:, 0] < 1e9)
    assert largest_rise(case)[0] > 1e6


@pytest.mark.parametrize(("activation", "size"), [("tanh", 8.9), ("tanh", 30.0), ("hardtanh", 8.9)])
def test_from_one_saturated_side_to_the_other(activation, size):
    """Equal slopes, zero or not, on no common linear piece: kappa is not zero but 0.4."""
    phi = ACTIVATIONS[activation]
    a, trial = torch.tensor([[-size]]), torch.tensor([[size - 0.4]])
    s = trial - a
    state = SimpleNamespace(a=a, z=phi.function(a), s=s, slope=phi.slope(a), trial=trial)
    for mean, falls in ((0.1, False), (0.3, True)):  # of s and s'
        # E(z') - E(z) = kappa - mean * (z' - z) with z' - z = 2 and kappa = 0.4
        pre = trial + (2 * mean - s)
        assert bool(Energy()._energy_falls(state, phi, phi.function(trial), pre)) == falls


@pytest.mark.parametrize("activation", MONOTONE)
def test_primitives_are_integrals(activation):
    phi = ACTIVATIONS[activation]
    # Gauss's rule of four points on intervals of 1/64, whose ends hold the kinks.
    nodes, weights = (
        [0.3399810435848563, 0.8611363115940526],
        [0.6521451548625461, 0.34785484513745],
    )
    edges = torch.arange(-30 * 64, 30 * 64 + 1, dtype=torch.float64) / 64
    middle = (edges[1:] + edges[:-1]) / 2
    integral = sum(
        w * (phi.function(middle - x / 128) + phi.function(middle + x / 128))
        for x, w in zip(nodes, weights, strict=True)
    )
    expected = torch.cumsum(integral / 128, 0)
    actual = phi.primitive(edges)[1:] - phi.primitive(edges)[0]
    bound = 1e-13 * (1 + phi.primitive(edges[:1]).abs() + expected.abs())
    # PyTorch's softplus, of which they are made, is the identity from 20 on, 2e-9 off.
    bound += {"sigmoid": 3e-9, "softplus": 3e-8}.get(activation, 0.0)
    assert ((actual - expected).abs() <= bound).all()


@pytest.mark.parametrize("solver", ["energy", "auto"])
@pytest.mark.parametrize("scale", [0.9, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_products_at_scales_where_damped_steps_need_a_thousand(implementation, scale, solver):
    case = symmetric_cell(64, 256, scale, torch.float32)
    structure = Structure(None, frozenset({"symmetric", "monotone"}), affine=True)
    chosen = solvers.resolve(solver, structure, 1e-5, adjoint=False)
    outputs = getattr(case, implementation)(Call(chosen, 1e-5, 600))
    assert (outputs.status == Status.CONVERGED).all()
    assert outputs.iterations.max() <= (30 if scale < 1 else 300)
    noise = case.rounding(outputs.value, 2**-24) / outputs.value.double().norm(dim=1)
    assert (relative_residual(case, outputs.value) <= 1e-5 + noise).all()


@dtypes
@momentum
@pytest.mark.parametrize("size", [1, 5, 33])
@pytest.mark.parametrize("activation", MONOTONE)
def test_every_monotone_activation(activation, size, momentum, dtype):
    tol = {torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    scales = (0.5, 3.0, 20.0) if activation in BOUNDED else (0.5, 0.95)
    for scale in scales:
        for implementation in IMPLEMENTATIONS:
            case = symmetric_cell(9, size, scale, dtype, activation)
            outputs = getattr(case, implementation)(Call(Energy(momentum), tol, 1000))
            assert (outputs.status == Status.CONVERGED).all(), (scale, implementation, outputs)
            noise = case.rounding(outputs.value, torch.finfo(dtype).eps / 2)
            bound = tol + noise / (case.step(outputs.value).norm(dim=1) + 1e-9)
            assert (relative_residual(case, outputs.value) <= bound).all()
            pre = case.pre(outputs.value)
            slope = ACTIVATIONS[activation].slope(pre)
            if ACTIVATIONS[activation].smooth:
                torch.testing.assert_close(outputs.value_slope.double(), slope, rtol=0, atol=1e-4)


@pytest.mark.parametrize("activation", MONOTONE)
@momentum
def test_the_engine_takes_the_steps_of_the_reference(momentum, activation):
    """In float64, where only rounding differs: the same trials, accepted and rejected."""
    scale = 4.0 if activation in BOUNDED else 0.97
    scale = 30.0 if activation == "sigmoid" else scale
    case = symmetric_cell(12, 24, scale, torch.float64, activation)
    for updates in (1, 2, 3, 4, 5, 7, 9, 12, 16, 20):
        call = Call(Energy(momentum), 1e-13, updates)
        actual, expected = case.engine(call), case.reference(call)
        for name in ("status", "iterations", "rejects"):
            assert torch.equal(getattr(actual, name), getattr(expected, name)), (updates, name)
        torch.testing.assert_close(actual.value, expected.value, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("activation", UNBOUNDED)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@momentum
def test_an_energy_without_a_lower_bound_ends_calmly(momentum, implementation, activation):
    for scale in (1.5, 4.0):
        case = symmetric_cell(6, 20, scale, torch.float32, activation)
        outputs = getattr(case, implementation)(Call(Energy(momentum), 1e-5, 500))
        assert outputs.value.isfinite().all()
        met = outputs.residual <= 1e-5
        assert torch.equal(met, outputs.status == Status.CONVERGED)
        assert (relative_residual(case, outputs.value)[met] <= 2e-5).all()


@pytest.mark.parametrize("activation", MONOTONE)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@momentum
def test_bad_samples_do_not_harm_the_others(momentum, implementation, activation):
    case = symmetric_cell(8, 30, 0.9, torch.float64, activation)
    call = Call(Energy(momentum), 1e-9, 300)
    good = getattr(case, implementation)(call)
    c = case.injection.clone()
    c[1], c[3, 4], c[5], c[6, 2] = torch.nan, torch.inf, 1e30, -1e30
    outputs = getattr(Forward(case.weight, c, activation), implementation)(call)
    assert outputs.value.isfinite().all()
    assert outputs.status[1] == Status.NONFINITE
    others = [0, 2, 4, 7]
    assert (outputs.status[others] == Status.CONVERGED).all()
    assert torch.equal(outputs.iterations[others], good.iterations[others])
    torch.testing.assert_close(outputs.value[others], good.value[others], rtol=1e-12, atol=1e-12)
    if activation in BOUNDED:
        assert (outputs.status[[5, 6]] == Status.CONVERGED).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@momentum
def test_a_start_is_respected(momentum, implementation):
    case = symmetric_cell(8, 30, 3.0)
    call = Call(Energy(momentum), 1e-10, 500)
    solved = getattr(case, implementation)(call)
    again = getattr(Forward(case.weight, case.injection, "tanh", solved.value), implementation)(
        call
    )
    assert (again.iterations == 0).all()
    assert torch.equal(again.value, solved.value)
    near = solved.value + 1e-4 * torch.randn_like(solved.value)
    third = getattr(Forward(case.weight, case.injection, "tanh", near), implementation)(call)
    assert (third.status == Status.CONVERGED).all()
    assert third.iterations.float().mean() < solved.iterations.float().mean()


@dtypes
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@momentum
def test_few_updates_and_no_tolerance(momentum, implementation, dtype):
    case = symmetric_cell(8, 30, 3.0, dtype)
    for updates in (1, 2, 3):
        outputs = getattr(case, implementation)(Call(Energy(momentum), 1e-9, updates))
        assert (outputs.status == Status.MAX_ITER).all()
        assert (outputs.iterations == updates).all()
        assert outputs.residual.isfinite().all()
    outputs = getattr(case, implementation)(Call(Energy(momentum), 0.0, 1000))
    stuck = (outputs.status == Status.STAGNATED) | (outputs.iterations == 1000)
    assert (stuck | (outputs.residual == 0)).all()
    noise = case.rounding(outputs.value, torch.finfo(dtype).eps / 2)
    assert (
        relative_residual(case, outputs.value) <= 10 * noise / outputs.value.double().norm(dim=1)
    ).all()


@pytest.mark.skipif(not extension.has_low_precision, reason="no low-precision products here")
@momentum
def test_mixed_precision_is_verified(momentum):
    for scale in (0.9, 2.0, 4.0):
        case = symmetric_cell(40, 100, scale, torch.float32)
        outputs = case.engine(Call(Energy(momentum), 1e-5, 600, "mixed"))
        assert (outputs.status == Status.CONVERGED).all()
        noise = case.rounding(outputs.value, 2**-24) / outputs.value.double().norm(dim=1)
        assert (relative_residual(case, outputs.value) <= 1e-5 + noise).all()


def test_a_symmetric_weight_is_symmetric():
    w = symmetric_weight(30, 2.0, torch.float32)
    assert torch.equal(w, w.t())
    assert torch.linalg.eigvalsh(w.double()).abs().max().item() == pytest.approx(2.0, rel=1e-5)
