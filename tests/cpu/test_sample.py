"""The state machine of csrc/common/sample.h, which the CPU and CUDA engines share, against the loop
in Python that it follows; and its precision schedule."""

import ctypes
import re
import shutil

import pytest
import torch
from cuda_persistent_emulation import COMPILER, load_harness
from native_options import FIELDS, NativeOptions, native_options

from fastdeq import constants
from fastdeq.ops import anderson_mix
from fastdeq.solution import Status
from fastdeq.solvers import MINRES, Anderson, Energy, HeavyBall, Picard, loop

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER[0]) is None, reason=f"no C++ compiler ({COMPILER[0]})"
)
FULL, BFLOAT16, INT8 = range(3)
PLAIN, HEAVY_BALL, MIX, REFILL, TAKE_BACK, BEST, SWITCH = range(7)


@pytest.fixture(scope="module")
def pieces():
    return load_harness("pieces")


def pointer(t):
    return ctypes.c_void_p(t.data_ptr())


class _Record(ctypes.Structure):
    _fields_ = (
        *((n, ctypes.c_int32) for n in ("step", "improved", "stop", "status", "next", "count")),
        *((n, ctypes.c_int32) for n in ("iterations", "idle")),
        ("rejects", ctypes.c_int32 * 3),
        *((n, ctypes.c_double) for n in ("omega", "best_residual")),
    )


def test_the_options_are_laid_out_as_in_cpp(pieces):
    assert pieces.options_bytes() == ctypes.sizeof(NativeOptions)
    values = [1 if f.type == "bool" else i for i, f in enumerate(FIELDS, 2)]
    found = (ctypes.c_double * len(values))()
    pieces.echo_options(ctypes.byref(NativeOptions(*values)), found)
    assert list(found) == values


def judge(pieces, options, norm, size, low=None, dropped=None, rejected=None, lowest=FULL):
    count = len(norm)
    flags = [
        torch.zeros(count, dtype=torch.int8) if x is None else x.to(torch.int8)
        for x in (low, dropped, rejected)
    ]
    numbers = [x.double().contiguous() for x in (norm, size)]
    records = (_Record * count)()
    judged = pieces.judge_evaluations(
        ctypes.byref(options), lowest, count, *map(pointer, numbers + flags), records
    )
    return records[:judged]


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
        z, dropped, rejected = anderson_mix.reference(*arguments)
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
    Anderson(window=9, first_window=2),
)


def compare_with_the_loop(pieces, f, solver, tol, max_iter):
    """Compares all decisions on a batch of samples; the statuses and the counters of the loop."""
    watched = Watched(solver)
    start = torch.randn(20, 12, dtype=torch.float64)
    solution = loop.solve(
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
            pieces, native_options(solver, tol, max_iter), norms[:, i], sizes[:, i], None, *padded
        )
        last = records[-1]
        assert last.stop
        assert len(records) == solution.iterations[i] + 1
        assert last.status == solution.status[i]
        assert last.best_residual == pytest.approx(float(solution.residual[i]), rel=1e-12)
        if rejects is not None:
            assert list(last.rejects) == rejects[i].tolist()
        for record, count in zip(records, watched.counts, strict=False):
            if record.step in (MIX, REFILL):
                assert record.count == count[i]
        for record, omega in zip(records[:-1], watched.omegas, strict=False):
            assert record.step == HEAVY_BALL
            assert record.omega == pytest.approx(float(omega[i]), rel=1e-12)
    return solution.status, rejects


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_a_sample_is_judged_as_the_loop_judges_it(pieces, name, solver):
    for tol, max_iter in ((1e-8, 300), (1e-3, 3), (1e-3, 1), (0.0, 70)):
        compare_with_the_loop(pieces, MAPS[name](), solver, tol, max_iter)


def test_the_comparison_with_the_loop_meets_every_outcome(pieces):
    statuses, counters = set(), torch.zeros(3, dtype=torch.int64)
    for make in MAPS.values():
        for solver in SOLVERS:
            status, rejects = compare_with_the_loop(pieces, make(), solver, 1e-8, 300)
            statuses |= {*status.tolist()}
            if rejects is not None:
                counters += rejects.sum(0)
    assert statuses == {int(s) for s in Status}
    assert (counters > 0).all()


def contract(pieces, solver, rate, tol, lowest, max_iter=300, most=2000):
    """The products of each evaluation of a contraction, and how it ended."""
    products, status = torch.zeros(most, dtype=torch.int8), ctypes.c_int32(-1)
    judged = pieces.judge_contraction(
        ctypes.byref(native_options(solver, tol, max_iter)),
        lowest,
        ctypes.c_double(1.0),
        ctypes.c_double(rate),
        most,
        pointer(products),
        ctypes.byref(status),
    )
    return products[:judged].tolist(), status.value


SCHEDULED = (Picard(), HeavyBall(), Anderson(), Anderson(accelerate_above=0.3))


@pytest.mark.parametrize("lowest", [BFLOAT16, INT8])
@pytest.mark.parametrize("solver", SCHEDULED, ids=str)
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_a_schedule_ends_with_an_evaluation_in_full_precision(pieces, solver, rate, lowest):
    for tol in (1e-3, 1e-6, 1e-9):
        products, status = contract(pieces, solver, rate, tol, lowest)
        assert status == Status.CONVERGED
        assert products[0] == FULL
        assert products[-1] == FULL
        # The first evaluation at or below the tolerance, or one or two after it.
        needed = next(i for i in range(1000) if rate**i <= tol * (1 + 1e-8))
        assert needed <= len(products) - 1 <= needed + 2
        if rate >= 0.5:
            assert len(products) > 2 * products.count(FULL)
        accelerated = isinstance(solver, Anderson) and (
            solver.accelerate_above == 0 or rate > solver.accelerate_above
        )
        plainly = products[: products.index(FULL, 1)]
        if lowest == INT8 and rate == 0.9:
            assert (INT8 in plainly) == (not accelerated or solver.accelerate_above > 0)
            assert (BFLOAT16 in products) == accelerated
    products, status = contract(pieces, solver, 0.9, 1e-9, lowest, max_iter=20)
    assert status == Status.MAX_ITER
    assert len(products) == 21
    assert products[-1] == FULL


def test_an_accelerated_sample_is_evaluated_in_full_precision_now_and_then(pieces):
    products, _ = contract(pieces, Anderson(), 0.99, 1e-6, INT8)
    runs = re.findall("1+", "".join(map(str, products)))
    assert max(map(len, runs)) == constants.LONGEST_LOW_PRECISION


def scheduled(pieces, norms, low, solver=None, tol=1e-6, lowest=BFLOAT16):
    norm = torch.tensor(norms, dtype=torch.float64)
    options = native_options(solver or Picard(), tol, 300)
    return judge(pieces, options, norm, torch.ones(len(norms)), torch.tensor(low), lowest=lowest)


def test_a_low_precision_evaluation_is_never_the_best_iterate(pieces):
    records = scheduled(pieces, [1.0, 0.3, 1e-9, 1e-9], [0, 1, 1, 0])
    assert [bool(r.improved) for r in records] == [True, False, False, True]
    assert not records[2].stop
    assert records[3].status == Status.CONVERGED


@pytest.mark.parametrize("lowest", [BFLOAT16, INT8])
@pytest.mark.parametrize("solver", [Picard(), HeavyBall()], ids=str)
@pytest.mark.parametrize("overflown", [torch.inf, torch.nan])
def test_after_an_overflow_a_sample_goes_on_in_full_precision(pieces, solver, overflown, lowest):
    norms = [1.0, 0.5, overflown, 1.0, 0.4, 0.2, 0.1]
    records = scheduled(pieces, norms, [0, 1, 1, 0, 0, 0, 0], solver, lowest=lowest)
    assert records[2].step == BEST
    assert records[0].next == lowest
    assert not any(r.next for r in records[2:])
    if isinstance(solver, HeavyBall):
        assert records[3].omega == 1  # so that the last change, which overflowed, does not enter
    full = scheduled(pieces, [1.0, overflown], [0, 0], solver)
    assert full[-1].status == Status.NONFINITE


@pytest.mark.parametrize("lowest", [BFLOAT16, INT8])
def test_a_sample_that_low_precision_does_not_help_gets_no_more_of_it(pieces, lowest):
    norms = [1.0, 0.5, 0.2, 0.001, 0.9, 0.4, 0.2, 0.1, 0.05]
    records = scheduled(pieces, norms, [0, 1, 1, 1, 0, 0, 0, 0, 0], lowest=lowest)
    assert records[0].next == lowest
    assert not any(r.next for r in records[4:])
    helped = scheduled(
        pieces, [1.0, 0.5, 0.2, 0.04, 0.008, 0.002], [0, 1, 1, 1, 0, 1], lowest=lowest
    )
    assert helped[4].next == lowest


def test_a_sample_for_which_8_bits_are_too_coarse_goes_on_in_bfloat16(pieces):
    """0.005 is expected of the evaluation in full precision; it comes out four times that."""
    norms = [1.0, 0.4, 0.1, 0.022, 0.02, 0.008]
    records = scheduled(pieces, norms, [0, 1, 1, 1, 0, 0], lowest=INT8)
    assert [r.next for r in records[:4]] == [INT8] * 3 + [FULL]
    assert records[4].next == BFLOAT16
    as_expected = scheduled(pieces, [*norms[:4], 0.0055], [0, 1, 1, 1, 0], lowest=INT8)
    assert as_expected[4].next == INT8


@pytest.mark.parametrize("solver", [Energy(momentum=True), MINRES(momentum=True)], ids=str)
def test_heavy_ball_steps_that_get_nowhere_give_way_to_the_solver(pieces, solver):
    options = native_options(solver, 1e-6, 300)
    size = torch.ones(20)
    halving = judge(pieces, options, 0.5 ** torch.arange(20.0), size)
    assert all(r.step == HEAVY_BALL for r in halving)
    stuck = judge(pieces, options, size, size)
    assert [r.step for r in stuck].index(SWITCH) == constants.HALVE_WITHIN
    overflown = judge(pieces, options, torch.tensor([1.0, torch.nan]), torch.ones(2))
    assert overflown[1].step == SWITCH
    assert not overflown[1].stop
    low = judge(pieces, options, size, size, (torch.arange(20) > 0).int(), lowest=BFLOAT16)
    assert [r.step for r in low].index(SWITCH) == constants.HALVE_WITHIN
