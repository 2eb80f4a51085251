"""Products of the library in the steps engine: every solver, against the kernel's own and float64.

The threshold is lowered, so that small problems have them.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from engine_cases import Adjoint, Forward, make_adjoint, make_forward
from engine_checks import check_distance
from fastdeq.kernels.steps import engine, library_product
from step_cases import FULL, LOW, PRODUCT, STOPPED, UNIT, Step, check
from triton_solves import MAKERS, Engine, call_for, check_slope, check_truth, name_of, plain

from fastdeq.solution import Status
from fastdeq.solvers import MINRES, Anderson, Energy, HeavyBall, Picard

NAN = math.nan
SYMMETRIC = (HeavyBall, Energy, MINRES)
SOLVES = [(make, solver) for solver in (Anderson(window=3), HeavyBall()) for make in MAKERS]
SOLVES += [(make_forward, Picard(damping=0.7)), (make_adjoint, Picard())]
SOLVES += [(make_forward, Energy(True)), (make_adjoint, MINRES(True))]


class Library:
    """Counts the products of the library, and changes them where ``wrong`` says how."""

    def __init__(self, monkeypatch, wrong=lambda product: None):
        self.full = self.low = 0
        originals = library_product.full_product, library_product.low_product

        def full_product(*arguments):
            self.full += 1
            originals[0](*arguments)
            wrong(arguments[-1])

        def low_product(*arguments):
            self.low += 1
            originals[1](*arguments)
            wrong(arguments[-1])

        monkeypatch.setattr(library_product, "FROM_SIZE", 1)
        monkeypatch.setattr(library_product, "full_product", full_product)
        monkeypatch.setattr(library_product, "low_product", low_product)


def problem(make, solver, size=37):
    case = make(3, size, torch.float32, rate=0.5)
    half = case.weight.double() / 2
    symmetric = (half + half.t()).float()
    return dataclasses.replace(case, weight=symmetric) if type(solver) in SYMMETRIC else case


def solve_with(device, case, call):
    return Engine(device)(case, call, **({"slope": True} if isinstance(case, Forward) else {}))


@pytest.mark.parametrize("precision", ["float32", "mixed"])
@pytest.mark.parametrize(("make", "solver"), SOLVES, ids=name_of)
def test_every_solver(make, solver, precision, device, monkeypatch):
    """It keeps its promises, and ends where the reference does."""
    case, call = problem(make, solver), call_for(solver, precision=precision)
    library = Library(monkeypatch)
    outputs = solve_with(device, case, call)
    expected = plain(case, dataclasses.replace(call, precision="float32"))
    assert (outputs.status == Status.CONVERGED).all()
    check_truth(case, call, outputs)
    check_distance(case, outputs, expected)
    low = precision == "mixed"
    # The schedule's full-precision products are the kernel's, but for the slope's at the end.
    assert (library.low > 0) == low
    assert library.full > 1 if not low else library.full == isinstance(case, Forward)
    if isinstance(case, Forward):
        check_slope(case, outputs)


@pytest.mark.parametrize(
    ("make", "solver"), [(make_forward, Energy()), (make_adjoint, MINRES())], ids=name_of
)
def test_without_low_precision_evaluations_the_library_makes_full_ones(
    make, solver, device, monkeypatch
):
    case, call = problem(make, solver), call_for(solver, precision="mixed")
    library = Library(monkeypatch)
    check_truth(case, call, solve_with(device, case, call))
    assert library.low == 0 < library.full


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("solver", [Picard(), Anderson(window=3), HeavyBall()], ids=str)
def test_both_ways_of_making_a_product_agree_within_rounding(solver, make, device, monkeypatch):
    """After five updates: a rounding of W z grows by |W| = 0.5 from one to the next, more where an
    acceleration extrapolates."""
    case, call = problem(make, solver), call_for(solver, tol=0.0, max_iter=5)
    own = solve_with(device, case, call)
    Library(monkeypatch)
    outputs = solve_with(device, case, call)
    assert torch.equal(outputs.iterations, own.iterations)
    room = 2 * case.rounding(own.value / case.scale(), UNIT) * case.scale().squeeze(1)
    room = room * (2 if isinstance(solver, Picard) else 8)
    assert ((outputs.value.double() - own.value.double()).norm(dim=1) <= room).all()


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("planted", ["scaled", "an entry", "an earlier product"])
def test_a_wrong_product_is_noticed(planted, make, device, monkeypatch):
    first = []

    def wrong(product):
        if planted == "scaled":
            product *= 1.01
        elif planted == "an entry":
            product[0, 5] += 0.1
        else:
            first.append(product.clone())
            product.copy_(first[0])

    case, call = make(3, 37, torch.float32, rate=0.5), call_for(Picard())
    Library(monkeypatch, wrong)
    with pytest.raises(AssertionError):
        check_truth(case, call, solve_with(device, case, call))


@pytest.mark.parametrize("activation", ["tanh", None], ids=["forward", "adjoint"])
@pytest.mark.parametrize("kind", [FULL, PRODUCT])
def test_a_step_takes_full_products_from_the_library(kind, activation, device):
    """What it has of rows that stopped is neither read nor written."""
    kinds = [kind, STOPPED, kind, kind, STOPPED] * 7
    step = Step(device, 35, 65, activation, requested=kinds)
    product = step.point @ step.weight.t()
    product[1::5] = NAN
    for rows in (step.point, step.samples.offset):
        rows[1::5] = NAN
    check(step.run(product=product), kinds)


def test_a_step_takes_low_products_from_the_library_and_makes_full_ones(device):
    """Tiles of 16 rows: one all LOW, one with a FULL row, one with a direction, one stopped."""
    kinds = [LOW, STOPPED] * 8 + [LOW] * 15 + [FULL] + [PRODUCT] * 15 + [STOPPED]
    step = Step(device, 48, 65, requested=kinds, schedule=True)
    product = step.samples.change.float() @ step.low_weight.float().t()
    product[1:16:2] = NAN
    product[16:] = NAN  # made, but not used
    evaluated = [LOW, STOPPED] * 8 + [FULL] * 16 + [PRODUCT] * 15 + [STOPPED]
    tile = engine.step.TILES[0]
    check(step.run(product=product, tile=tile), evaluated)


@pytest.mark.parametrize("precision", ["float32", "mixed"])
def test_bad_samples_leave_the_others_bitwise_alone(precision, device, monkeypatch):
    Library(monkeypatch)
    case = make_forward(4, 33, torch.float32, activation="relu", rate=0.3)
    call = call_for(Picard(), precision=precision)
    clean = solve_with(device, case, call)
    injection = case.injection.clone()
    injection[1, 3], injection[2, 0] = NAN, -math.inf
    outputs = solve_with(device, dataclasses.replace(case, injection=injection), call)
    for field in outputs._fields:
        assert torch.equal(getattr(outputs, field)[[0, 3]], getattr(clean, field)[[0, 3]]), field


def test_both_products_are_those_of_float64(device):
    rows, weight = torch.randn(5, 300, device=device), torch.randn(300, 300, device=device)
    product = torch.empty(5, 300, device=device)
    for make, to in (
        (library_product.full_product, torch.float32),
        (library_product.low_product, torch.bfloat16),
    ):
        a, b = rows.to(to), weight.to(to)
        with torch.autocast(device, torch.bfloat16):
            make(a, b, product)
        expected, scale = a.double() @ b.double().t(), a.double().abs() @ b.double().abs().t()
        assert ((product - expected).abs() <= 2 * 302 * UNIT * scale).all()
    # The bound tells float32 from a product of rounded factors.
    library_product.full_product(rows.bfloat16().float(), weight, product)
    expected, scale = (
        rows.double() @ weight.double().t(),
        rows.double().abs() @ weight.double().abs().t(),
    )
    assert ((product - expected).abs() > 2 * 302 * UNIT * scale).any()


def test_float32_is_not_left_to_tf32(device, monkeypatch):
    cuda = torch.device("cuda")
    assert library_product.keeps_float32(torch.device("cpu"))
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        assert library_product.keeps_float32(cuda)
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
        assert not library_product.keeps_float32(cuda)
        monkeypatch.delenv("NVIDIA_TF32_OVERRIDE")
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert not library_product.keeps_float32(cuda)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    library = Library(monkeypatch)
    monkeypatch.setattr(library_product, "keeps_float32", lambda device: False)
    case, call = make_adjoint(3, 37, torch.float32, rate=0.5), call_for(Picard())
    check_truth(case, call, solve_with(device, case, call))
    assert library.full == 0


def test_small_weights_have_no_products_of_the_library(device, monkeypatch):
    library = Library(monkeypatch)
    monkeypatch.setattr(library_product, "FROM_SIZE", 38)
    solve_with(device, Adjoint(*make_adjoint(2, 37, torch.float32).tensors()), call_for(Picard()))
    assert library.full == library.low == 0
