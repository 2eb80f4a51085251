"""The state machine of a sample in the CUDA engines against the driver that it follows, and its
narrow evaluations."""

import ctypes
import re
import shutil

import pytest
import torch
from cuda_persistent_emulation import COMPILER, load_harness

from fastdeq import driver, reference
from fastdeq.solution import Status
from fastdeq.solvers import Anderson, HeavyBall, Picard

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER[0]) is None, reason=f"no C++ compiler ({COMPILER[0]})"
)
PLAIN, HEAVY_BALL, MIX, TRUSTED, BEST = range(5)


@pytest.fixture(scope="module")
def pieces():
    return load_harness("pieces")


def pointer(t):
    return ctypes.c_void_p(t.data_ptr())


class _Options(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_int32) for n in ("max_iter", "fixed", "patience", "momentum", "window")),
        ("ramp", ctypes.c_int32),
        *((n, ctypes.c_double) for n in ("tol", "damping", "radius", "safeguard")),
        ("accelerate_above", ctypes.c_double),
    )


class _Record(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_int32) for n in ("step", "improved", "stop", "status", "narrow", "count")),
        *((n, ctypes.c_int32) for n in ("iterations", "idle")),
        ("rejects", ctypes.c_int32 * 3),
        *((n, ctypes.c_double) for n in ("omega", "best_residual")),
    )


def options_of(solver, tol, max_iter, ramp=False):
    fixed = getattr(solver, "fixed_iterations", 0)
    return _Options(
        max_iter=fixed or max_iter,
        fixed=fixed > 0,
        patience=solver.patience,
        momentum=solver.name == "heavy_ball",
        window=getattr(solver, "window", 0),
        ramp=ramp,
        tol=tol,
        damping=getattr(solver, "damping", 1.0),
        radius=getattr(solver, "radius", 0.5),
        safeguard=getattr(solver, "safeguard", 0.0),
        accelerate_above=getattr(solver, "accelerate_above", 0.0),
    )


def judge(pieces, options, norm, size, exact=None, dropped=None, rejected=None):
    count = len(norm)
    zeros, ones = torch.zeros(count, dtype=torch.int8), torch.ones(count, dtype=torch.int8)
    flags = [
        default if x is None else x.to(torch.int8)
        for x, default in ((exact, ones), (dropped, zeros), (rejected, zeros))
    ]
    numbers = [x.double().contiguous() for x in (norm, size)]
    records = (_Record * count)()
    made = pieces.judge_evaluations(
        ctypes.byref(options), count, *map(pointer, numbers + flags), records
    )
    return records[:made]


class Watched:
    """A solver of which each evaluation is noted down, with what became of it."""

    def __init__(self, solver):
        self.solver = solver
        self.norms, self.sizes, self.dropped, self.rejected = [], [], [], []
        self.counts, self.omegas = [], []

    def __getattr__(self, name):
        return getattr(self.solver, name)

    def watch(self, f):
        def watched(z):
            value = f(z)
            self.norms.append(torch.linalg.vector_norm(value - z, dim=1))
            self.sizes.append(torch.linalg.vector_norm(value, dim=1))
            return value

        return watched

    def mix(self, *arguments):
        z, dropped, rejected = reference.anderson_mix(*arguments)
        self.dropped.append(dropped)
        self.rejected.append(rejected)
        return z, dropped, rejected

    def step(self, state, point, value, norm, running):
        if isinstance(self.solver, Anderson):
            self.counts.append(state.count.clone())
        step = self.solver.step(state, point, value, norm, running)
        if isinstance(self.solver, HeavyBall):
            self.omegas.append(state.omega)
        return step


def contraction(rate, trap=torch.inf, jump=torch.nan, symmetric=True):
    w = torch.randn(12, 12, dtype=torch.float64)
    w = w + w.t() if symmetric else w
    w *= rate / torch.linalg.matrix_norm(w, 2)
    c = torch.randn(12, dtype=torch.float64)

    def f(z):
        value = torch.nn.functional.hardtanh(z @ w.t() + c) * 3
        return torch.where(z.norm(dim=1, keepdim=True) > trap, jump, value)

    return f


MAPS = {
    "contracts": lambda: contraction(0.2),
    "contracts slowly": lambda: contraction(0.32),
    "expands": lambda: contraction(1.5, symmetric=False),
    "turns NaN": lambda: contraction(0.3, trap=3.2),
    "jumps": lambda: contraction(0.32, trap=3.4, jump=-50.0),
}
SOLVERS = (
    Picard(),
    Picard(fixed_iterations=7),
    HeavyBall(),
    Anderson(),
    Anderson(window=2, safeguard=1.0, max_weight=1.5),
    Anderson(accelerate_above=0.6, rank_tolerance=1e-3),
)


def judged_as_driven(pieces, f, solver, tol, max_iter):
    """Compares all decisions on a batch of samples; the statuses and the counters of the driver."""
    watched = Watched(solver)
    start = torch.randn(20, 12, dtype=torch.float64)
    solution = driver.solve(
        watched.watch(f), start, watched, tol=tol, max_iter=max_iter, anderson_mix=watched.mix
    )
    rejects = torch.stack([*solution.rejects.values()], 1) if solution.rejects else None
    norms, sizes = torch.stack(watched.norms), torch.stack(watched.sizes)
    for i in range(len(start)):
        outcomes = [
            torch.stack(x)[:, i] if x else None for x in (watched.dropped, watched.rejected)
        ]
        padded = [
            None if x is None else torch.nn.functional.pad(x, (0, len(norms) - len(x)))
            for x in outcomes
        ]
        records = judge(
            pieces, options_of(solver, tol, max_iter), norms[:, i], sizes[:, i], None, *padded
        )
        last = records[-1]
        assert last.stop
        assert len(records) == solution.iterations[i] + 1
        assert last.status == solution.status[i]
        assert last.best_residual == pytest.approx(float(solution.residual[i]), rel=1e-12)
        if rejects is not None:
            assert list(last.rejects) == rejects[i].tolist()
        for record, count in zip(records, watched.counts, strict=False):
            if record.step == MIX:
                assert record.count == count[i]
        for record, omega in zip(records, watched.omegas, strict=False):
            assert record.step == HEAVY_BALL
            assert record.omega == pytest.approx(float(omega[i]), rel=1e-12)
    return solution.status, rejects


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_a_sample_is_judged_as_the_driver_judges_it(pieces, name, solver):
    for tol, max_iter in ((1e-8, 300), (1e-3, 3), (1e-3, 1), (0.0, 70)):
        judged_as_driven(pieces, MAPS[name](), solver, tol, max_iter)


def test_the_comparison_with_the_driver_meets_every_outcome(pieces):
    statuses, counters = set(), torch.zeros(3, dtype=torch.int64)
    for make in MAPS.values():
        for solver in SOLVERS:
            status, rejects = judged_as_driven(pieces, make(), solver, 1e-8, 300)
            statuses |= {*status.tolist()}
            if rejects is not None:
                counters += rejects.sum(0)
    assert statuses == {int(s) for s in Status}
    assert (counters > 0).all()


def contract(pieces, solver, rate, tol, max_iter=300, most=2000):
    exact, status = torch.zeros(most, dtype=torch.int8), ctypes.c_int32(-1)
    pieces.judge_contraction.argtypes = [
        ctypes.c_void_p,
        ctypes.c_double,
        ctypes.c_double,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
    ]
    made = pieces.judge_contraction(
        ctypes.byref(options_of(solver, tol, max_iter, ramp=True)),
        1.0,
        rate,
        most,
        pointer(exact),
        ctypes.byref(status),
    )
    return exact[:made].bool().tolist(), status.value


RAMPED = (Picard(), HeavyBall(), Anderson(), Anderson(accelerate_above=0.3))


@pytest.mark.parametrize("solver", RAMPED, ids=str)
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_a_ramped_sample_ends_with_an_exact_evaluation(pieces, solver, rate):
    for tol in (1e-3, 1e-6, 1e-9):
        exact, status = contract(pieces, solver, rate, tol)
        assert status == Status.CONVERGED
        assert exact[0]
        assert exact[-1]
        # The first evaluation at or below the tolerance, or one or two after it.
        needed = next(i for i in range(1000) if rate**i <= tol * (1 + 1e-8))
        assert needed <= len(exact) - 1 <= needed + 2
        if rate >= 0.5:
            assert exact.count(False) > exact.count(True)
    exact, status = contract(pieces, solver, 0.9, 1e-9, max_iter=20)
    assert status == Status.MAX_ITER
    assert len(exact) == 21
    assert exact[-1]


def test_an_accelerated_sample_is_anchored_now_and_then(pieces):
    exact, _ = contract(pieces, Anderson(), 0.99, 1e-6)
    runs = re.findall("n+", "".join("e" if e else "n" for e in exact))
    assert max(map(len, runs)) == 25


def ramped(pieces, norms, exact, solver=None, tol=1e-6):
    norm = torch.tensor(norms, dtype=torch.float64)
    options = options_of(solver or Picard(), tol, 300, ramp=True)
    return judge(pieces, options, norm, torch.ones(len(norms)), torch.tensor(exact))


def test_a_narrow_evaluation_is_never_the_best_iterate(pieces):
    records = ramped(pieces, [1.0, 0.3, 1e-9, 1e-9], [1, 0, 0, 1])
    assert [bool(r.improved) for r in records] == [True, False, False, True]
    assert not records[2].stop
    assert records[3].status == Status.CONVERGED


@pytest.mark.parametrize("solver", [Picard(), HeavyBall()], ids=str)
@pytest.mark.parametrize("overflown", [torch.inf, torch.nan])
def test_after_an_overflow_a_sample_goes_on_in_full_precision(pieces, solver, overflown):
    norms = [1.0, 0.5, overflown, 1.0, 0.4, 0.2, 0.1]
    records = ramped(pieces, norms, [1, 0, 0, 1, 1, 1, 1], solver)
    assert records[2].step == BEST
    assert records[0].narrow
    assert not any(r.narrow for r in records[2:])
    if isinstance(solver, HeavyBall):
        assert records[3].omega == 1  # so that the last change, which overflowed, does not enter
    exact = ramped(pieces, [1.0, overflown], [1, 1], solver)
    assert exact[-1].status == Status.NONFINITE


def test_a_sample_that_narrow_products_do_not_help_gets_no_more_of_them(pieces):
    norms = [1.0, 0.5, 0.2, 0.001, 0.9, 0.4, 0.2, 0.1, 0.05]
    records = ramped(pieces, norms, [1, 0, 0, 0, 1, 1, 1, 1, 1])
    assert records[0].narrow
    assert not any(r.narrow for r in records[4:])
    helped = ramped(pieces, [1.0, 0.5, 0.2, 0.003, 0.002, 0.001], [1, 0, 0, 0, 1, 0])
    assert helped[4].narrow
