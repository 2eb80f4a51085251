"""The energy solver in Triton: it takes the steps of the reference and keeps its promises."""

import pytest
import torch
from energy_cases import allowance
from energy_cases import energy as energy_of
from engine_cases import Call, Forward
from fastdeq.kernels.steps import energy_rows, sample
from symmetric_cases import relative_residual, symmetric_cell
from symmetric_solves import column, first_differences, run

from fastdeq.activations import ACTIVATIONS
from fastdeq.solution import Status
from fastdeq.solvers import Energy

UNIT = 2.0**-24
momentum = pytest.mark.parametrize("momentum", [False, True], ids=["descent", "momentum"])


def residual_is_true(case, outputs, tol, rows=slice(None)):
    """Asserts the tolerance in float64. Two roundings separate the residuals: that of the solver's
    evaluation, and that of tanh and its kin next to it."""
    noise = case.rounding(outputs.value, UNIT) / (outputs.value.double().norm(dim=1) + 1e-9)
    assert (relative_residual(case, outputs.value) <= tol * 1.001 + noise)[rows].all()


def both(case, call, device, monkeypatch, **options):
    outputs, seen = run(case, call, device, monkeypatch, **options)
    return outputs, case.reference(call), seen


# Where phi has a bounded range, E is bounded below at any scale.
PROBLEMS = [
    ("tanh", 0.9, 33, 2),
    ("tanh", 2.0, 33, 2),
    ("tanh", 4.0, 70, 1),
    ("softplus", 0.9, 70, 1),
    ("relu", 0.9, 33, 1),
    ("identity", 0.9, 8, 1),
]


@pytest.mark.parametrize(
    ("activation", "scale", "size", "batch", "momentum"),
    [(*p, False) for p in PROBLEMS] + [(*p, True) for p in (*PROBLEMS[:2], PROBLEMS[3])],
)
def test_takes_the_steps_of_the_reference(
    device, monkeypatch, activation, scale, size, batch, momentum
):
    """The same evaluations in the same order. A decision that is close may fall the other way;
    rounding has grown to that late in a solve, so its last fifth may differ."""
    case = symmetric_cell(batch, size, scale, torch.float32, activation)
    call = Call(Energy(momentum), 1e-5, 300)
    outputs, alike = first_differences(case, call, device, monkeypatch)
    assert (outputs.status == Status.CONVERGED).all()
    residual_is_true(case, outputs, call.tol)
    assert (alike >= 0.8 * outputs.iterations).all()


def test_another_step_is_noticed(device, monkeypatch):
    case = symmetric_cell(1, 33, 2.0, torch.float32)

    def tamper(k, steps):
        steps.samples.numbers[:, column("ENOUGH")] *= 0.25

    call = Call(Energy(), 1e-5, 40)
    outputs, alike = first_differences(case, call, device, monkeypatch, after=tamper)
    assert (alike < 0.5 * outputs.iterations).all()


def test_solves_with_the_step_kernel(device, monkeypatch):
    case = symmetric_cell(3, 33, 2.0, torch.float32)
    outputs, expected, _ = both(case, Call(Energy(True), 1e-5, 300), device, monkeypatch, step=None)
    assert (outputs.status == Status.CONVERGED).all()
    assert ((outputs.iterations - expected.iterations).abs() <= 0.2 * expected.iterations).all()
    residual_is_true(case, outputs, 1e-5)
    wrong = outputs._replace(value=outputs.value * 1.0001)
    with pytest.raises(AssertionError):
        residual_is_true(case, wrong, 1e-5)


@momentum
def test_ends_on_a_verified_iterate_at_the_limit(device, monkeypatch, momentum):
    case = symmetric_cell(1, 33, 3.0, torch.float32)
    for updates in (1, 2, 5, 9):
        call = Call(Energy(momentum), 1e-6, updates)
        outputs, expected, _ = both(case, call, device, monkeypatch)
        assert torch.equal(outputs.iterations, expected.iterations)
        assert torch.equal(outputs.status, expected.status)
        assert torch.equal(outputs.rejects, expected.rejects)
        true = relative_residual(case, outputs.value).float()
        torch.testing.assert_close(outputs.residual, true, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(outputs.value, expected.value, rtol=0, atol=1e-4)
        slope = 1 - torch.tanh(case.pre(outputs.value)) ** 2
        torch.testing.assert_close(outputs.value_slope.double(), slope, rtol=0, atol=1e-5)


@momentum
def test_the_energy_never_rises(device, monkeypatch, momentum):
    """E in float64 at every a that a step begins from, within what the kernel's rounding allows."""
    case = symmetric_cell(2, 40, 4.0, torch.float32)
    row = energy_rows._A.value
    outputs, seen = run(case, Call(Energy(momentum), 1e-5, 50), device, monkeypatch, row=row)
    compared = 0
    for i in range(2):
        one = Forward(case.weight, case.injection[i : i + 1])
        last = None
        for k in range(1, int(outputs.iterations[i])):
            before, now = seen[k - 1].mode[i], seen[k].mode[i]
            if now != column("DIRECTION") or before == column("DIRECTION"):
                continue
            a = seen[k].rows[i : i + 1].double()
            e, rounding, s = energy_of(one, a)
            if last is not None:
                room = allowance(one, last[0], a, last[3], s) + rounding + last[2]
                assert (e - last[1] <= room).all(), k
                compared += 1
            last = a, e, rounding, s
    assert compared >= 6


def test_rejected_trials_and_negative_curvature_are_counted(device, monkeypatch):
    """As the reference counts, in float32 or in float64: decisions that are close differ in these
    two as well."""
    case = symmetric_cell(3, 24, 8.0, torch.float32)
    call = Call(Energy(most_directions=3), 1e-4, 20)
    outputs, expected, _ = both(case, call, device, monkeypatch)
    exact = case.double().reference(call)
    assert exact.rejects[:, 1].sum() > 0
    for i in range(3):
        counts = [outcome.rejects[i].tolist() for outcome in (expected, exact)]
        assert outputs.rejects[i].tolist() in counts


@momentum
def test_bad_samples_do_not_touch_the_others(device, monkeypatch, momentum):
    case = symmetric_cell(4, 20, 0.9, torch.float32)
    call = Call(Energy(momentum), 1e-4, 40)
    good, _ = run(case, call, device, monkeypatch)
    c = case.injection.clone()
    c[1, 3], c[3] = torch.nan, 1e30
    outputs, expected, _ = both(Forward(case.weight, c), call, device, monkeypatch)
    assert torch.equal(outputs.status, expected.status)
    assert outputs.status[1] == Status.NONFINITE
    assert outputs.value.isfinite().all()
    assert (outputs.value_slope[1] == 0).all()
    for name in ("value", "iterations", "residual", "rejects", "value_slope"):
        assert torch.equal(getattr(outputs, name)[[0, 2]], getattr(good, name)[[0, 2]])


def test_without_progress_a_sample_stagnates(device, monkeypatch):
    monkeypatch.setattr(Energy, "patience", 8)
    case = symmetric_cell(1, 16, 2.0, torch.float32)
    outputs, _ = run(case, Call(Energy(), 1e-12, 300), device, monkeypatch)
    if outputs.residual > 1e-12:  # by chance the numbers have an exact fixed point
        assert outputs.status == Status.STAGNATED
        assert outputs.iterations < 200
    # What is left is the rounding of an evaluation.
    assert outputs.residual <= case.rounding(outputs.value, UNIT) / outputs.value.norm()


@pytest.mark.parametrize(("floor", "most"), [(0, 30), (1, 3)])
def test_halvings_are_limited(device, monkeypatch, floor, most):
    """E is NaN here, which never falls. The ninth trial takes the plain step."""
    plain = []

    def tamper(k, steps):
        z, s, da = (steps.work[i.value] for i in (energy_rows._Z, energy_rows._S, energy_rows._DA))
        z.fill_(torch.nan)
        flags = steps.samples.flags
        flags[:, column("FLOOR")] = floor
        if flags[0, column("HALVINGS")] == 8:
            plain.append(torch.equal(s, da))

    case = symmetric_cell(1, 4, 0.9, torch.float32)
    outputs, seen = run(case, Call(Energy(), 1e-6, 100), device, monkeypatch, after=tamper)
    assert outputs.status == Status.STAGNATED
    assert outputs.rejects[0, 0] == most + 1
    assert len(seen) < 50
    assert plain == ([True] if most > 8 else [])


def test_a_start_is_respected(device, monkeypatch):
    case = symmetric_cell(2, 20, 3.0, torch.float32)
    call = Call(Energy(), 1e-4, 100)
    solved, _ = run(case, call, device, monkeypatch)
    start = solved.value.clone()
    start[1, 2] = torch.inf
    again, _ = run(Forward(case.weight, case.injection, "tanh", start), call, device, monkeypatch)
    assert again.iterations[0] == 0
    assert torch.equal(again.value[0], solved.value[0])
    assert again.status[1] == Status.CONVERGED  # from zero


def test_where_phi_is_flat_the_plain_step_is_taken(device, monkeypatch):
    case = symmetric_cell(1, 12, 0.5, torch.float32, "hardtanh")
    c = 9 * torch.sign(case.injection)
    start = torch.full_like(c, 0.3)
    case = Forward(case.weight, c, "hardtanh", start)
    outputs, seen = run(case, Call(Energy(), 1e-6, 20), device, monkeypatch)
    assert torch.equal(outputs.value, torch.sign(c))
    assert not any((one.mode == column("DIRECTION")).any() for one in seen)


def test_rows_of_more_than_one_piece(device, monkeypatch):
    """Their tail is short, and the sums go over all pieces."""
    case = symmetric_cell(1, 1030, 2.0, torch.float32)
    call = Call(Energy(), 1e-5, 7)
    outputs, alike = first_differences(case, call, device, monkeypatch)
    assert (alike == outputs.iterations).all()
    expected = case.reference(call)
    torch.testing.assert_close(outputs.value, expected.value, rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs.residual, expected.residual, rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [0.8, 3.0])
def test_momentum_with_low_precision(device, monkeypatch, scale):
    case = symmetric_cell(2, 40, scale, torch.float32)
    call = Call(Energy(True), 1e-5, 100, "mixed")
    outputs, seen = run(case, call, device, monkeypatch)
    assert (outputs.status == Status.CONVERGED).all()
    residual_is_true(case, outputs, call.tol)
    low = sum((one.evaluated == sample.LOW.value).sum() for one in seen)
    assert low >= (4 if scale < 1 else 1)
    ended = any((one.mode > column("MOMENTUM")).any() for one in seen)
    assert ended == (scale > 1)


def test_an_energy_without_a_lower_bound_ends_calmly(device, monkeypatch):
    case = symmetric_cell(2, 12, 4.0, torch.float32, "softplus")
    outputs, _ = run(case, Call(Energy(), 1e-5, 25), device, monkeypatch)
    assert outputs.value.isfinite().all()
    assert torch.equal(outputs.status == Status.CONVERGED, outputs.residual <= 1e-5)


def test_smooth_and_kinked_activations_are_told_apart():
    """As the reference does it; kappa of a kinked phi has no leading term."""
    kinked = {name for name, phi in ACTIVATIONS.items() if not phi.smooth}
    assert kinked == {"relu", "leaky_relu", "hardtanh"}
