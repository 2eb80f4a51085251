"""The precision schedule: early iterations in low precision, of which nothing is reported."""

import dataclasses

import pytest
import torch
from engine_cases import Call, Forward, Outputs, make_adjoint, make_forward, make_weight
from engine_checks import EPS, check_distance, residual_noise, true_residual, unit_of

from fastdeq.activations import ACTIVATIONS
from fastdeq.backends import extension
from fastdeq.solution import Status
from fastdeq.solvers import Anderson, Picard

pytestmark = pytest.mark.skipif(
    extension.module is None, reason=f"no compiled extension: {extension.why_missing}"
)
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
SOLVERS = (Picard(), Picard(damping=0.8), Anderson(), Anderson(window=10, accelerate_above=0.7))
MAKERS = (make_forward, make_adjoint)


needs_low_precision = pytest.mark.skipif(
    "bfloat16 products" not in extension.build_info.get("engine", ""),
    reason="the CPU engine in use has no low-precision products",
)


def check_truth(case, call, outputs):
    """The reported residual is that of the returned value, by products in float32.

    Between the two lies the rounding of one evaluation of the map at the value. A product in
    bfloat16 has a unit 2^15 times that of float32, one in bytes a larger one yet.
    """
    difference, size, z = true_residual(case, outputs.value)
    true, error = difference / size, case.rounding(z, unit_of(case)) / size
    assert ((outputs.residual - true).abs() <= error).all(), (
        (outputs.residual - true).abs() / error
    ).max()
    converged = outputs.status == Status.CONVERGED
    assert (true <= call.tol + error)[converged].all()
    assert (outputs.residual <= call.tol)[converged].all()


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("size", [64, 256, 320])
def test_reported_residuals_are_true_and_cost_no_more_iterations(size, solver):
    for make, rate in ((make_forward, 0.9), (make_adjoint, 0.9), (make_forward, 0.6)):
        case = make(24, size, torch.float32, rate=rate)
        for tol in TOLERANCES:
            call = Call(solver, tol, 200)
            outputs = {}
            for precision in ("float32", "mixed", "auto"):
                outputs[precision] = case.engine(dataclasses.replace(call, precision=precision))
                check_truth(case, call, outputs[precision])
            full, mixed = outputs["float32"], outputs["mixed"]
            check_distance(case, mixed, full)
            # Below the rounding floor it is chance who converges.
            clear = residual_noise(case, call, full.value) < tol
            assert (mixed.status == Status.CONVERGED)[clear].all()
            if clear.any():
                more = (mixed.iterations - full.iterations)[clear].double().mean()
                assert more <= 2


@pytest.mark.parametrize("size", [1, 2, 3, 17, 65, 97, 130, 513])
def test_odd_sizes_and_starts(size):
    for solver in (SOLVERS[1], SOLVERS[3]):
        call = Call(solver, 1e-4, 100, "mixed")
        forward = make_forward(
            8, size, torch.float32, start="nan", layout="strided", rows="strided"
        )
        adjoint = make_adjoint(8, size, torch.float32, layout="transposed")
        for case in (forward, adjoint):
            outputs = case.engine(call)
            check_truth(case, call, outputs)
            check_distance(case, outputs, case.reference(call))
            assert (outputs.status == Status.CONVERGED).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    case = make_forward(12, 100, torch.float32, activation=activation, rate=0.8)
    for tol in (1e-2, 1e-4):
        call = Call(Anderson(accelerate_above=0.8), tol, 100, "mixed")
        check_truth(case, call, case.engine(call))
        check_distance(case, case.engine(call), case.reference(call))


def spoilt(kind, size):
    """A weight for which a common scale of a row, or one of a change, is too coarse."""
    weight = torch.randn(size, size)
    if kind == "outlier":
        weight[0, 1] = 20 * size**0.5
    elif kind == "rows":
        weight *= 10 ** (-6 * torch.rand(size, 1))
    elif kind == "columns":
        weight *= 10 ** (-6 * torch.rand(1, size))
    elif kind == "rank one":
        weight = weight[:1].t() @ weight[1:2]
    elif kind == "zeros":
        weight[::3] = 0
        weight[:, ::7] = 0
    return weight * (0.9 / torch.linalg.matrix_norm(weight, 2))


@pytest.mark.parametrize("kind", ["outlier", "rows", "columns", "rank one", "zeros"])
def test_weights_and_changes_that_round_badly(kind):
    weight, c = spoilt(kind, 96), torch.randn(12, 96)
    c[::2, 5] *= 1000
    for case in (Forward(weight, c), Forward(weight, c, "identity")):
        for solver in (Picard(), Anderson(accelerate_above=0.7)):
            call = Call(solver, 1e-4, 200, "mixed")
            outputs = case.engine(call)
            check_truth(case, call, outputs)
            assert (outputs.status == Status.CONVERGED).all()
            full = case.engine(dataclasses.replace(call, precision="float32"))
            more = (outputs.iterations - full.iterations).double().mean()
            assert more <= 3


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("activation", ["tanh", "relu", "softplus"])
def test_solves_that_do_not_contract_are_reported_truly_too(solver, activation):
    """Some samples converge, some do not, and some give low precision up."""
    for norm in (1.5, 3.0):
        weight = make_weight(128, norm).float()
        case = Forward(weight, torch.randn(30, 128), activation)
        for max_iter in (2, 3, 17, 60):
            call = Call(solver, 1e-4, max_iter, "mixed")
            outputs = case.engine(call)
            check_truth(case, call, outputs)
            assert (outputs.iterations <= max_iter).all()
            unfinished = outputs.status == Status.MAX_ITER
            assert (outputs.iterations[unfinished] == max_iter).all()
            assert (outputs.residual[unfinished] > call.tol).all()


def bfloat16(t):
    return t.bfloat16().float()


def schedule_without_a_last_product(case, call):
    """Picard iteration whose every product but the first is in bfloat16, the verdict included."""
    forward = isinstance(case, Forward)
    weight = bfloat16(case.weight.t() if forward else case.weight)
    rows = case.injection if forward else case.unit_grad().float()

    def values(pre):
        return ACTIVATIONS[case.activation].function(pre) if forward else case.slope * pre

    pre, point = rows.clone(), torch.zeros_like(rows)
    best, residual = point, torch.full((len(rows),), torch.inf)
    for _ in range(call.max_iter + 1):
        value = values(pre)
        relative = (value - point).norm(dim=1) / (value.norm(dim=1) + EPS)
        improved = (relative < residual) & (residual > call.tol)
        best = torch.where(improved[:, None], point, best)
        residual = torch.where(improved, relative, residual)
        pre = pre + bfloat16(value - point) @ weight
        point = value
    status = torch.where(residual <= call.tol, 0, 1).to(torch.int8)
    value = (best * case.scale()).float()
    return Outputs(value, status, status.int(), residual, status)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("size", [64, 256, 320])
def test_the_check_sees_a_residual_by_way_of_bfloat16(size, make):
    case = make(24, size, torch.float32, rate=0.6)
    for tol in TOLERANCES:
        call = Call(Picard(), tol, 60)
        planted = schedule_without_a_last_product(case, call)
        assert (planted.status == Status.CONVERGED).all()
        with pytest.raises(AssertionError):
            check_truth(case, call, planted)


@needs_low_precision
@pytest.mark.parametrize("make", MAKERS)
def test_mixed_is_not_float32_under_another_name(make):
    for size, automatic in ((8, "float32"), (512, "mixed")):
        case = make(7, size, torch.float32)
        values = {
            precision: case.engine(Call(Picard(), 1e-4, 60, precision)).value
            for precision in ("float32", "mixed", "auto")
        }
        assert not torch.equal(values["float32"], values["mixed"])
        assert torch.equal(values["auto"], values[automatic])


@pytest.mark.parametrize("make", MAKERS)
def test_a_float64_solve_has_no_schedule(make):
    case = make(7, 128, torch.float64)
    results = [case.engine(Call(Anderson(), 1e-9, 60, p)) for p in ("float32", "mixed", "auto")]
    for outputs in results[1:]:
        for a, e in zip(outputs[:5], results[0][:5], strict=True):
            assert torch.equal(a, e)


@needs_low_precision
@pytest.mark.parametrize("size", [192, 320, 512])
def test_what_rounding_a_change_leaves_is_made_up_for(size):
    """A residual falls up to 150-fold between two evaluations in full precision. Were the point to
    move by the change and the product to take the rounded one, their difference would stay, and
    samples would need a step more."""
    case = Forward(0.9 * torch.randn(size, size) / size**0.5, torch.randn(48, size))
    mixed, full = (case.engine(Call(Picard(), 1e-4, 200, p)) for p in ("mixed", "float32"))
    assert (mixed.status == Status.CONVERGED).all()
    more = mixed.iterations.double().mean() - full.iterations.double().mean()
    assert more < 0.7
