"""MINRES in Triton: it takes the steps of the reference and ends where a direct solve does."""

import pytest
import torch
from engine_cases import Adjoint, Call
from fastdeq.kernels.steps import minres_rows, sample
from minres_cases import check_exact, slopes
from symmetric_cases import symmetric_weight
from symmetric_solves import column, first_differences, run

from fastdeq.solution import Status
from fastdeq.solvers import MINRES

momentum = pytest.mark.parametrize("momentum", [False, True], ids=["plain", "momentum"])


def problem(batch, size, radius, kind="positive"):
    w = symmetric_weight(size, radius, torch.float32)
    return Adjoint(w, slopes(kind, batch, size, torch.float32), torch.randn(batch, size))


def true_residual(case, outputs):
    value = outputs.value.double() / case.scale()
    f = case.step(value)
    return (f - value).norm(dim=1) / (f.norm(dim=1) + 1e-9)


# Spectral radius of W, size, slopes, samples. Beyond 1, I - hWh is indefinite.
PROBLEMS = [
    (0.95, 33, "positive", 2),
    (0.95, 8, "zeros and ones", 2),
    (2.0, 33, "some zeros", 2),
    (2.0, 70, "positive", 1),
]


@momentum
@pytest.mark.parametrize(("radius", "size", "kind", "batch"), PROBLEMS)
def test_takes_the_steps_of_the_reference(device, monkeypatch, radius, size, kind, batch, momentum):
    """The same evaluations in the same order. Lanczos vectors lose their orthogonality as rounding
    has it, so the last fifth may differ."""
    case = problem(batch, size, radius, kind)
    call = Call(MINRES(momentum), 1e-5, 300)
    outputs, alike = first_differences(case, call, device, monkeypatch)
    assert (outputs.status == Status.CONVERGED).all()
    check_exact(case, outputs, call.tol)
    assert (outputs.value[case.slope == 0] == 0).all()
    assert (alike >= 0.8 * outputs.iterations).all()


def test_solves_with_the_step_kernel(device, monkeypatch):
    case = problem(3, 33, 2.0, "some zeros")
    call = Call(MINRES(True), 1e-5, 300)
    outputs, _ = run(case, call, device, monkeypatch, step=None)
    expected = case.reference(call)
    assert (outputs.status == Status.CONVERGED).all()
    assert ((outputs.iterations - expected.iterations).abs() <= 0.2 * expected.iterations).all()
    check_exact(case, outputs, call.tol)
    wrong = outputs._replace(value=outputs.value * 1.01)
    with pytest.raises(AssertionError):
        check_exact(case, wrong, call.tol)


@momentum
@pytest.mark.parametrize("size", [1, 3])
def test_small_krylov_spaces_are_exhausted(device, monkeypatch, size, momentum):
    for kind in ("positive", "zeros and ones"):
        case = problem(2, size, 3.0, kind)
        outputs, seen = run(case, Call(MINRES(momentum), 1e-5, 60), device, monkeypatch)
        assert (outputs.status == Status.CONVERGED).all()
        check_exact(case, outputs, 1e-5)
        if not momentum:
            assert len(seen) <= size + 3


def test_a_space_that_ends_early_is_exhausted(device, monkeypatch):
    """Three distinct eigenvalues: the fourth Lanczos vector would be rounding alone."""
    q, _ = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64))
    values = torch.tensor([0.5, -1.0, -3.0], dtype=torch.float64).repeat(8)
    w = (q * values) @ q.t()
    case = Adjoint(((w + w.t()) / 2).float(), torch.ones(1, 24), torch.randn(1, 24))
    flags = []

    def watch(k, steps):
        flags.append(steps.samples.flags[0, column("EXHAUSTED")].item())

    outputs, _ = run(case, Call(MINRES(), 1e-6, 60), device, monkeypatch, after=watch)
    assert outputs.status == Status.CONVERGED
    assert outputs.iterations <= 12  # with a restart or two from the true residual
    check_exact(case, outputs, 1e-6)


@momentum
def test_rows_without_a_slope_or_with_a_bad_gradient(device, monkeypatch, momentum):
    case = problem(6, 12, 0.9, "some zeros")
    call = Call(MINRES(momentum), 1e-4, 40)
    good, _ = run(case, call, device, monkeypatch)
    grad, slope = case.grad.clone(), case.slope.clone()
    grad[0], grad[1, 3], grad[2, 4], slope[3] = 0.0, torch.nan, torch.inf, 0.0
    bad = Adjoint(case.weight, slope, grad)
    outputs, _ = run(bad, call, device, monkeypatch)
    assert (outputs.status[[0, 3, 4, 5]] == Status.CONVERGED).all()
    assert (outputs.status[[1, 2]] == Status.NONFINITE).all()
    assert (outputs.value[[0, 3]] == 0).all()
    assert outputs.value[[1, 2]].isnan().all()
    for name in ("value", "status", "iterations", "residual", "rejects"):
        assert torch.equal(getattr(outputs, name)[4:], getattr(good, name)[4:])


def at_the_limit(case, call, device, monkeypatch, **options):
    """Whether a solve that ends at its limit is where the reference is."""
    outputs, seen = run(case, call, device, monkeypatch, **options)
    expected = case.reference(call)
    assert torch.equal(outputs.iterations, expected.iterations)
    assert torch.equal(outputs.status, expected.status)
    assert seen[-1].evaluated == sample.FULL.value
    true = true_residual(case, outputs).float()
    torch.testing.assert_close(outputs.residual, true, rtol=1e-3, atol=1e-6)
    return torch.allclose(outputs.value, expected.value, rtol=1e-3, atol=1e-4)


@momentum
def test_ends_on_a_verified_iterate_at_the_limit(device, monkeypatch, momentum):
    case = problem(1, 33, 2.0)
    for updates in (1, 2, 5, 10):
        assert at_the_limit(case, Call(MINRES(momentum), 1e-6, updates), device, monkeypatch)


@pytest.mark.parametrize("name", ["BETA", "CORNER", "PHI", "_W", "_X", "_Y"])
def test_another_step_is_noticed(device, monkeypatch, name):
    case = problem(1, 33, 2.0)

    def tamper(k, steps):
        if k == 4 and name.startswith("_"):
            steps.work[getattr(minres_rows, name).value] *= 0.8
        elif k == 4:
            steps.samples.numbers[:, column(name)] *= 0.8

    assert not at_the_limit(case, Call(MINRES(), 1e-6, 8), device, monkeypatch, after=tamper)


def test_a_drifted_estimate_starts_anew(device, monkeypatch):
    """x is changed behind the back of the recurrence."""
    case = problem(1, 33, 2.0)

    def tamper(k, steps):
        if k == 6:
            steps.work[minres_rows._X.value] += 0.3

    call = Call(MINRES(), 1e-5, 200)
    outputs, _ = run(case, call, device, monkeypatch, after=tamper)
    assert outputs.status == Status.CONVERGED
    assert outputs.rejects >= 1
    check_exact(case, outputs, call.tol)


def test_restarts_that_gain_nothing_end_stagnated(device, monkeypatch):
    case = problem(1, 12, 2.0)
    call = Call(MINRES(), 1e-9, 300)
    outputs, _ = run(case, call, device, monkeypatch)
    expected = case.reference(call)
    assert torch.equal(outputs.status, expected.status)
    assert (outputs.status == Status.STAGNATED).all()
    noise = case.rounding(outputs.value / case.scale(), 2.0**-24)
    size = (outputs.value / case.scale()).norm(dim=1)
    assert (outputs.residual <= 2 * noise / size).all()


def test_a_weight_with_nan_ends_nonfinite(device, monkeypatch):
    case = problem(2, 8, 0.9)
    case.weight[2, 3] = case.weight[3, 2] = torch.nan
    for use_momentum in (False, True):
        outputs, _ = run(case, Call(MINRES(use_momentum), 1e-5, 20), device, monkeypatch)
        assert (outputs.status == Status.NONFINITE).all()
        assert outputs.value.isfinite().all()


def test_rows_of_more_than_one_piece(device, monkeypatch):
    """Their tail is short, and the sums go over all pieces."""
    case = problem(1, 1030, 0.9, "some zeros")
    call = Call(MINRES(), 1e-5, 40)
    outputs, alike = first_differences(case, call, device, monkeypatch)
    assert (alike == outputs.iterations).all()
    check_exact(case, outputs, call.tol)


@pytest.mark.parametrize("radius", [0.8, 3.0])
def test_momentum_with_low_precision(device, monkeypatch, radius):
    case = problem(1, 40, radius)
    call = Call(MINRES(True), 1e-5, 150, "mixed")
    outputs, seen = run(case, call, device, monkeypatch)
    assert (outputs.status == Status.CONVERGED).all()
    check_exact(case, outputs, call.tol)
    low = sum((one.evaluated == sample.LOW.value).sum() for one in seen)
    assert low >= (4 if radius < 1 else 1)
    ended = any((one.mode > column("MOMENTUM")).any() for one in seen)
    assert ended == (radius > 1)
