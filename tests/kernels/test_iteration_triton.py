"""The Triton kernels of the iteration of general maps against their specification, the loop in
Python, in float64."""

import iteration_cases as cases
import pytest
import torch
from fastdeq.kernels.iteration import engine, state
from iteration_cases import assert_same
from torch.utils._python_dispatch import TorchDispatchMode

from fastdeq import Anderson, HeavyBall, Neumann, Picard
from fastdeq.solvers import SolveOptions

SOLVERS = (
    Picard(),
    Picard(damping=0.7),
    Neumann(damping=0.9),
    HeavyBall(),
    HeavyBall(radius=0.3),
    Anderson(window=1),
    Anderson(damping=0.7, window=3),
    Anderson(window=10, first_window=2),
    Anderson(window=4, first_window=1, accelerate_above=0.5),
    Anderson(regularization=1e-6, rank_tolerance=1e-4, max_weight=2.0, safeguard=1.0),
    Anderson(window=32),  # above every size and every number of iterations
)
SOME = (Picard(damping=0.7), HeavyBall(), SOLVERS[8])


@pytest.fixture
def divided(monkeypatch):
    """Rows in chunks of a few entries, as if they were long: three launches to an iteration."""
    monkeypatch.setattr(state, "ONE_LAUNCH", 0)
    monkeypatch.setattr(state, "LEAST_CHUNK", 16)


every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=str)
some_solvers = pytest.mark.parametrize("solver", SOME, ids=str)


def check_against_the_loop(f, start, solver, **limits):
    """Returns the solution by the kernels."""
    actual = cases.by_triton(f, start, solver, **limits)
    assert_same(actual, cases.by_loop(f, start, solver, **limits))
    return actual


@every_solver
def test_every_decision_is_that_of_the_loop(solver, device):
    f, start = cases.contraction(device)
    found = check_against_the_loop(f, start, solver, tol=1e-5, max_iter=40)
    assert found.converged.all()
    check_against_the_loop(f, start, solver, tol=1e-3, atol=1e-2, max_iter=7)


@some_solvers
@pytest.mark.parametrize("max_iter", [1, 2])
def test_limits_that_come_early(solver, max_iter, device):
    f, start = cases.contraction(device, batch=2, size=1)
    check_against_the_loop(f, start, solver, tol=0.0, max_iter=max_iter)


@some_solvers
def test_long_rows_are_divided(solver, divided, device):
    """As those that a program walks from the sums to the step."""
    f, start = cases.contraction(device, size=53)
    check_against_the_loop(f, start, solver, tol=1e-5, max_iter=40)


def test_rows_that_are_long(device):
    """Sums come in another order, so that only rounding may differ."""
    scale = torch.linspace(0.1, 0.8, 2 * 5001, dtype=torch.float64, device=device).view(2, 5001)
    start = torch.randn(2, 5001, dtype=torch.float64, device=device)
    for solver in (Picard(), Anderson(window=3)):
        f = lambda z: torch.sin(scale * z) + 1  # noqa: E731
        check_against_the_loop(f, start, solver, tol=1e-3, max_iter=25)
        parts = [2048, 1, 2952]
        check_against_the_loop(f, start, solver, parts=parts, tol=1e-3, max_iter=8)


@pytest.mark.parametrize(
    ("solver", "sizes"),
    [(SOME[0], [1, 22]), (SOME[0], [20, 31, 2]), (SOME[2], [16, 32, 16])],
    ids=str,
)
def test_each_part_has_to_meet_the_tolerance(solver, sizes, divided, device):
    f, start = cases.contraction(device, batch=2, size=sum(sizes), rate=0.4)
    parts = [torch.full((n,), 10.0**-i) for i, n in enumerate(sizes)]
    scale = torch.cat(parts).to(start)
    scaled = lambda z: scale * f(z / scale)  # noqa: E731
    how = {"tol": 1e-3, "max_iter": 30}
    each = check_against_the_loop(scaled, start * scale, solver, parts=sizes, **how)
    check_against_the_loop(scaled, start * scale, solver, parts=sizes, atol=1e-4, **how)
    whole = cases.by_loop(scaled, start * scale, solver, **how)  # the parts make a difference
    assert not torch.allclose(each.residual, whole.residual, rtol=1e-3, atol=0)


@pytest.mark.parametrize("count", [1, 6])
def test_fixed_counts_are_kept(count, device):
    f, start = cases.contraction(device, batch=2, size=9)
    cases.check_a_fixed_count(cases.by_triton, f, start, count)


@some_solvers
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_sample_ends_alone_with_its_best_iterate(solver, bad, device):
    f, start = cases.contraction(device, rate=0.5)
    cases.check_bad_samples(cases.by_triton, f, start, solver, bad, tol=1e-6)


def test_rows_of_the_start_that_are_not_finite_are_zeros(device):
    f, start = cases.contraction(device, batch=3, size=6, rate=0.5)
    start[1, 2] = torch.nan
    check_against_the_loop(f, start, Picard(), tol=1e-4, max_iter=40)


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("solver", [Picard(), Anderson(window=2)], ids=str)
def test_a_sample_that_has_stopped_keeps_its_point(solver, keeps, device):
    """Also where the next point is in other memory, as somebody holds the last one."""
    f, start = cases.contraction(device, batch=3, size=7, rate=0.7)
    start[1] = cases.by_loop(f, start, Picard(), tol=1e-12, max_iter=200).value[1]
    seen, kept = [], []

    def watched(z):
        seen.append(z[1].tolist())
        if keeps:
            kept.append(z)
        return f(z)

    found = check_against_the_loop(watched, start, solver, tol=1e-5, max_iter=40)
    assert found.iterations[1] == 0
    assert min(found.iterations[0], found.iterations[2]) > 3
    assert seen == [start[1].tolist()] * len(seen)


@pytest.mark.parametrize("solver", [Picard(), HeavyBall(), Anderson(window=2)], ids=str)
def test_samples_that_do_not_converge(solver, device):
    """One diverges, one goes round in a circle, one has norms that do not fall."""
    angle = torch.tensor(0.7, dtype=torch.float64)
    turn = torch.stack(
        [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
    )
    turn = turn.to(device)
    factor = torch.tensor([[1e40], [1.0], [0.999]], dtype=torch.float64, device=device)
    f = lambda z: factor * (z @ turn)  # noqa: E731
    start = torch.ones(3, 2, dtype=torch.float64, device=device)
    for patience in (4, None):
        limits = {"tol": 1e-6, "max_iter": 55, "patience": patience}
        actual = cases.by_triton(f, start, solver, **limits)
        expected = cases.by_loop(f, start, solver, **limits)
        assert actual.status.tolist() == expected.status.tolist()
        assert actual.iterations.tolist() == expected.iterations.tolist()
        torch.testing.assert_close(actual.residual, expected.residual)
        for b in (0, 2):  # on a circle rounding decides which iterate is the best
            torch.testing.assert_close(actual.value[b], expected.value[b])


class Operations(TorchDispatchMode):
    """Counts the operations of PyTorch that touch numbers."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("long", [False, True])
def test_what_runs_between_two_evaluations(long, device, request, monkeypatch):
    """One launch or three, and no operation of PyTorch."""
    if long:
        request.getfixturevalue("divided")
    launches = []  # counted alone: the interpreter's own are operations of PyTorch
    monkeypatch.setattr(engine, "_launch", lambda kernel, *_: launches.append(kernel))
    f, start = cases.contraction(device)
    options = SolveOptions.of(Picard(fixed_iterations=3), tol=1e-3, max_iter=3)
    own = engine.Iteration(start, options, [start.shape[1]])
    values = [f(own.point()) for _ in range(3)]
    with Operations() as seen:
        for value in values:
            own.point()
            assert own.advance(value)
    assert len(launches) == (9 if long else 3)
    assert seen.names == []


def test_a_planted_error_is_noticed(monkeypatch, device):
    f, start = cases.contraction(device)
    solver, limits = Anderson(window=3), {"tol": 1e-6, "max_iter": 40}
    expected = cases.by_loop(f, start, solver, **limits)
    reserve = state.History.reserve

    def wrong(history, needed):  # values and residuals of two evaluations change places
        reserve(history, needed)
        if needed == 3:
            history.addresses[:2] = history.addresses[:2].flip(0)

    monkeypatch.setattr(state.History, "reserve", wrong)
    actual = cases.by_triton(f, start, solver, **limits)
    with pytest.raises(AssertionError):
        assert_same(actual, expected)
