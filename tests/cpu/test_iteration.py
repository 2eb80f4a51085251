"""The compiled iteration of general maps against its specification, the loop in Python."""

import random

import iteration_cases as cases
import pytest
import torch
from engine_cases import Call, make_adjoint, make_forward
from engine_checks import check_agreement
from iteration_cases import assert_same

from fastdeq import Anderson, HeavyBall, Neumann, Picard
from fastdeq.activations import ACTIVATIONS
from fastdeq.backends import extension
from fastdeq.solve import iteration

pytestmark = pytest.mark.skipif(
    extension.module is None, reason=f"no compiled extension: {extension.why_missing}"
)
SOLVERS = (
    Picard(),
    Picard(damping=0.7),
    Anderson(),
    Anderson(damping=0.7),
    Anderson(window=1),
    Anderson(window=140),  # above every size and every number of iterations
    Anderson(accelerate_above=0.5),
    Anderson(window=10, first_window=2),
    Anderson(window=4, first_window=1, accelerate_above=0.3),
    Anderson(accelerate_above=0.5, damping=0.7, window=3),
    Anderson(regularization=1e-6, rank_tolerance=1e-4, max_weight=2.0, safeguard=1.0),
)
TOL = {torch.float32: 1e-4, torch.bfloat16: 1e-4, torch.float64: 1e-9}


@pytest.mark.parametrize("batch", [1, 2, 5, 13, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 15, 16, 17, 33, 64, 65, 130])
def test_sizes_batches_and_dtypes(size, batch):
    choose = random.Random(1000 * size + batch)
    for make in (make_forward, make_adjoint):
        for _ in range(2):
            dtype, solver = choose.choice(list(TOL)), choose.choice(SOLVERS)
            options = {}
            if make is make_forward:
                options["activation"] = choose.choice(list(ACTIVATIONS))
                options["start"] = choose.choice(("zeros", "random", "nan"))
            elif isinstance(solver, Picard):
                solver = Neumann(solver.damping)
            case = make(batch, size, dtype, **options)
            call = Call(solver, tol=TOL[dtype], max_iter=90)
            actual = cases.run(case, call, "iteration")
            check_agreement(case, call, actual, cases.run(case, call, "reference"))


def problem(batch=5, size=70, rate=0.8, dtype=torch.float64):
    return cases.as_map(make_forward(batch, size, dtype, rate=rate, start="random"))


ALL = (*SOLVERS, HeavyBall())


@pytest.mark.parametrize("solver", ALL, ids=str)
@pytest.mark.parametrize("limits", [{"tol": 1e-5}, {"tol": 1e-3, "atol": 1e-2}, {"tol": 0.0}])
def test_step_by_step(solver, limits):
    """In float64 every decision is that of the loop: also at a limit that comes too early."""
    f, start = problem()
    if isinstance(solver, HeavyBall):
        w = torch.randn(70, 70, dtype=torch.float64)
        w = 0.9 * (w + w.t()) / torch.linalg.matrix_norm(w + w.t(), 2)
        f = lambda z: torch.tanh(z @ w + start)  # noqa: E731
    for max_iter in (1, 2, 7, 30):
        arguments = {"max_iter": max_iter, **limits}
        actual = cases.compiled(f, start, solver, **arguments)
        assert_same(actual, cases.by_loop(f, start, solver, **arguments))


@pytest.mark.parametrize("solver", [Picard(), Picard(damping=0.5), Anderson()], ids=str)
@pytest.mark.parametrize("sizes", [[70], [1, 69], [20, 31, 19]])
def test_each_part_has_to_meet_the_tolerance(solver, sizes):
    f, start = problem()
    scale = torch.cat([torch.full((n,), 10.0**-i) for i, n in enumerate(sizes)]).double()

    def scaled(z):
        return scale * f(z / scale)

    for limits in ({"tol": 1e-4}, {"tol": 1e-4, "atol": 1e-4}):
        actual = cases.compiled(scaled, start * scale, solver, parts=sizes, max_iter=60, **limits)
        expected = cases.by_loop(scaled, start * scale, solver, parts=sizes, max_iter=60, **limits)
        assert_same(actual, expected)


@pytest.mark.parametrize("count", [1, 3, 12])
def test_fixed_counts_are_kept(count):
    cases.check_a_fixed_count(cases.compiled, *problem(), count)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), HeavyBall()], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_sample_ends_alone_with_its_best_iterate(solver, bad):
    cases.check_bad_samples(cases.compiled, *problem(rate=0.5), solver, bad, tol=1e-8)


@pytest.mark.parametrize("solver", [Picard(), Anderson(damping=0.8), HeavyBall()], ids=str)
@pytest.mark.parametrize(("batch", "sizes"), [(1, [90_001]), (3, [40_000, 33_333]), (2, [262_144])])
def test_long_rows_are_divided_among_threads(solver, batch, sizes):
    """Sums come in another order, so that only rounding may differ."""
    scale = torch.rand(batch, sum(sizes), dtype=torch.float64) * 0.8

    def f(z):
        return torch.sin(scale * z) + 1

    start = torch.randn(batch, sum(sizes), dtype=torch.float64)
    parts = sizes if len(sizes) > 1 else None
    threads = torch.get_num_threads()
    solutions = []
    for count in (1, 4):
        torch.set_num_threads(count)
        try:
            solutions.append(cases.compiled(f, start, solver, parts=parts, tol=1e-6, max_iter=40))
        finally:
            torch.set_num_threads(threads)
    assert_same(*solutions)
    assert_same(solutions[1], cases.by_loop(f, start, solver, parts=parts, tol=1e-6, max_iter=40))


def test_what_a_map_keeps_or_returns_stays_as_it_was():
    """Points that somebody holds are not written to; the value may be the point itself, a view of
    it, or the same memory at every call."""
    w = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0] * 0.7
    kept, copies = [], []

    def keeps(z):
        kept.append(z)
        copies.append(z.clone())
        return z @ w + 1

    start = torch.randn(4, 6, dtype=torch.float64)
    for solver in (Picard(), Anderson()):
        kept.clear(), copies.clear()
        solution = cases.compiled(keeps, start, solver, tol=1e-6, max_iter=60)
        assert solution.converged.all()
        assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))

    same = torch.empty_like(start)

    def reuses(z):
        return torch.add(z @ w, 1, out=same)

    actual = cases.compiled(reuses, start, Anderson(), tol=1e-6, max_iter=60)
    assert_same(actual, cases.by_loop(reuses, start, Anderson(), tol=1e-6, max_iter=60))

    identity = cases.compiled(lambda z: z.view(4, 6), start, Picard(), tol=1e-6, max_iter=5)
    assert identity.iterations.tolist() == [0] * 4
    mirrored = cases.compiled(lambda z: z[:, :3].repeat(1, 2), start, Picard(), tol=0.1, max_iter=5)
    assert torch.equal(mirrored.value, start[:, :3].repeat(1, 2))
    assert torch.equal(start, copies[0])  # the caller's start


def test_values_of_any_layout_and_dtype():
    f, start = problem(batch=4, size=6)
    expected = cases.compiled(f, start, Anderson(), tol=1e-6, max_iter=60)
    layouts = (
        lambda v: v.t().contiguous().t(),
        lambda v: torch.stack([v, v], 2)[:, :, 0],
        lambda v: torch.nn.Parameter(v),
    )
    for layout in layouts:
        actual = cases.compiled(
            lambda z, g=layout: g(f(z)), start, Anderson(), tol=1e-6, max_iter=60
        )
        assert torch.equal(actual.value, expected.value)
    rounded = cases.compiled(lambda z: f(z).float(), start, Anderson(), tol=1e-4, max_iter=60)
    assert rounded.converged.all()
    assert rounded.value.dtype == torch.float64
    with pytest.raises(RuntimeError, match="must be"):
        cases.compiled(lambda z: f(z)[:2], start, Anderson(), tol=1e-6, max_iter=60)


def test_the_first_evaluation_may_be_made_in_another_way():
    f, start = problem()
    calls = []

    def counted(z):
        calls.append(0)
        return f(z)

    known = cases.compiled(counted, start, Picard(), first=f, tol=1e-6, max_iter=60)
    with_value = len(calls)
    calls.clear()
    assert_same(known, cases.compiled(counted, start, Picard(), tol=1e-6, max_iter=60), tol=0)
    assert len(calls) == with_value + 1 == int(known.iterations.max()) + 1


def test_trend_of_the_residuals():
    """As the loop in Python has it, for samples that came to the limit."""
    from fastdeq.solve.trend import Traced

    w = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0]
    factor = torch.tensor([0.99, 1.0]).double().repeat_interleave(3).unsqueeze(1)

    def f(z):
        return factor * (z @ w) + torch.ones(40, dtype=torch.float64) * (factor < 1)

    start = torch.randn(6, 40, dtype=torch.float64)
    for max_iter in (20, 41):
        solver = Anderson(window=2)
        actual = cases.compiled(f, start, solver, tol=1e-12, max_iter=max_iter)
        traced = Traced(solver, max_iter)
        cases.by_loop(f, start, traced, tol=1e-12, max_iter=max_iter)
        assert actual.trend.fell().tolist() == traced.fell().tolist()


def test_what_is_not_compiled():
    class Mine(Anderson):
        pass

    start = torch.zeros(2, 3)
    assert iteration.is_compiled(Anderson(), "cpp", start)
    assert not iteration.is_compiled(Anderson(), "reference", start)
    assert not iteration.is_compiled(Mine(), "auto", start)
    assert not iteration.is_compiled(Anderson(), "auto", start.to(torch.bfloat16))
    assert not iteration.is_compiled(Anderson(), "auto", start[:0])
    assert not iteration.is_compiled(Anderson(), "auto", start.to("meta"))
