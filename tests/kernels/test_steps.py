"""The solvers' kernels on one evaluation at a time: what they decide, write, and leave alone."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import triton
import triton.language as tl
from fastdeq.kernels.steps import sample, schedule
from fastdeq.kernels.steps.judge import Evaluation
from fastdeq.kernels.steps.momentum import advance_heavy_ball
from fastdeq.kernels.steps.plain_steps import advance_plain
from steps_cases import (
    ADVANCES,
    FULL,
    LOW,
    OPTIONS,
    PLAIN,
    STATUSES,
    STOPPED,
    Case,
    advance,
    anderson,
    assert_equal,
    column,
    every_method,
    everything,
    options,
)

from fastdeq import constants
from fastdeq.solvers.heavy_ball import Momentum


@every_method
def test_a_stopped_sample_is_not_touched(method, device):
    slots, run = ADVANCES[method]
    case = Case(device, slots, [1.0, 1.0], kind=STOPPED)
    case.set(EVALUATED=FULL)
    before = everything(case)
    run(case, 5, OPTIONS)
    for now, then in zip(everything(case), before, strict=True):
        assert_equal(now, then)


# Norms of four samples whose best residual was 0.5, and what becomes of each; |value| is 1.
@every_method
@pytest.mark.parametrize(
    ("k", "idle", "expected"),
    [
        (5, 0, ["RUNNING", "RUNNING", "CONVERGED", "NONFINITE"]),
        (5, 2, ["RUNNING", "STAGNATED", "CONVERGED", "NONFINITE"]),
        (5, 1, ["RUNNING", "RUNNING", "CONVERGED", "NONFINITE"]),
        (50, 0, ["MAX_ITER", "MAX_ITER", "CONVERGED", "MAX_ITER"]),
        (0, 0, ["RUNNING", "RUNNING", "CONVERGED", "NONFINITE"]),
    ],
)
def test_when_a_sample_stops(method, k, idle, expected, device):
    case = Case(device, ADVANCES[method][0], [0.4, 0.6, 1e-5, math.nan])
    case.set(BEST=0.5, NORM=1.0, IDLE=idle, BEST_AT=(k + 1) % ADVANCES[method][0])
    case.set(STATUS=-1)
    advance(case, method, k)
    assert [STATUSES[name] for name in expected] == case.flag("STATUS")
    runs = [name == "RUNNING" for name in expected]
    assert [requested == FULL for requested in case.flag("REQUESTED")] == runs
    assert case.flag("ITERATIONS") == [0 if run else k for run in runs]
    assert case.samples.remaining.item() == sum(runs)
    assert case.flag("IDLE") == [0, idle + 1, 0, idle + 1]
    assert case.number("BEST") == pytest.approx([0.4, 0.5, 1e-5, 0.5])


def test_a_fixed_number_of_steps_has_no_stop_test(device):
    fixed = dataclasses.replace(PLAIN, fixed_iterations=8)
    case = Case(device, 3, [1e-6, 0.6, math.nan]).set(BEST=0.5, IDLE=7)
    advance(case, "plain", 5, fixed)
    assert case.flag("REQUESTED") == [FULL, FULL, STOPPED]
    assert case.flag("STATUS")[2] == STATUSES["NONFINITE"]
    case = Case(device, 3, [1e-6, 0.6, math.nan]).set(BEST=5e-5, MEETS=1)
    advance(case, "plain", 8, fixed)
    assert case.flag("STATUS") == [STATUSES["CONVERGED"]] * 3
    case = Case(device, 3, [math.nan]).set(BEST=5e-5, MEETS=1)
    advance(case, "plain", 5, fixed)
    assert case.flag("STATUS") == [STATUSES["CONVERGED"]]


@every_method
def test_the_residual_of_a_value_that_overflows_is_not_small(method, device):
    case = Case(device, ADVANCES[method][0], [1.0], scale=math.inf)
    case.set(BEST=0.5, NORM=1.0)
    advance(case, method, 4)
    assert case.number("BEST") == [0.5]
    assert case.flag("IDLE") == [1]


@every_method
@pytest.mark.parametrize("size", [1, 33, 1030])
def test_the_best_iterate_is_where_it_is_said_to_be(method, size, device):
    """Sample 0 has improved, sample 1 has its best iterate where the next one is written, and
    sample 2 had it saved before."""
    slots, run = ADVANCES[method]
    k, at = 7, 7 % slots
    target = (k + (2 if slots == 3 else 1)) % slots
    case = Case(device, slots, [0.4, 0.6, 0.6], size).set(BEST=0.5, NORM=1.0)
    rows = torch.stack([case.fill(slot) for slot in range(slots + 1)])
    case.samples.flags[:, column("BEST_AT")] = torch.tensor([target, target, slots]).to(device)
    case.value = torch.randn(3, size).to(device)
    run(case, k, OPTIONS)
    assert case.flag("BEST_AT") == [at, slots, slots]
    expected = torch.stack([rows[at, 0], rows[target, 1], rows[slots, 2]])
    found = torch.stack([case.samples.points[s, i] for i, s in enumerate(case.flag("BEST_AT"))])
    assert_equal(found, expected)


def test_a_plain_step_moves_nothing(device):
    case = Case(device, 3, [0.4]).set(BEST=0.5)
    case.fill(1)
    before = case.samples.points.clone()
    advance_plain(case.samples, 7, PLAIN)
    assert_equal(case.samples.points, before)


@pytest.mark.parametrize("size", [1, 33, 1030])
def test_a_damped_step(size, device):
    case = Case(device, 3, [0.4, 0.6], size)
    point, value = case.fill(2), case.fill(0)
    advance_plain(case.samples, 5, options(damping=0.3))
    torch.testing.assert_close(case.samples.points[0], point + 0.3 * (value - point))
    assert_equal(case.samples.points[2], point)


def test_heavy_ball_steps_follow_the_reference(device):
    """Twenty norms of any kind; the reference computes in float32 too, with another cube root."""
    norms = torch.rand(20, 4) * 0.8 ** torch.arange(20)[:, None]
    case = Case(device, 2, [1.0] * 4, size=5)
    point = torch.randn(4, 5)
    case.samples.points[0] = point.to(device)
    momentum = Momentum.start(point, 0.5)
    loose = options(tol=0.0, max_iter=100, patience=100)
    for k, norm in enumerate(norms):
        case.samples.sums.zero_()[:, 1, 0] = norm.to(device)
        case.samples.sums[:, 2, 1] = 1
        value = torch.randn(4, 5)
        case.value = value.to(device)
        following, slow = momentum.step(point, value, norm)
        advance_heavy_ball(case.samples, case.value, k, loose)
        torch.testing.assert_close(
            case.samples.points[(k + 1) % 2].cpu(), following, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            torch.tensor(case.number("RADIUS")), momentum.radius, rtol=1e-4, atol=0
        )
        assert [since >= 6 for since in case.flag("STEPS_SINCE_HALVED")] == slow.tolist()
        point = following
        case.samples.points[(k + 1) % 2] = following.to(device)
    assert (momentum.radius > 0.5).any()


@pytest.mark.parametrize(
    ("kind", "goal", "since", "learns"),
    [
        (FULL, 0.1, 0, True),
        (FULL, 0.1, 2, False),
        (LOW, 0.3, 2, True),
        (LOW, 0.4, 2, False),
    ],
)
def test_the_radius_is_learned_from_norms_that_rounding_leaves(kind, goal, since, learns, device):
    """From two full-precision evaluations in a row, or others clear of the goal."""
    case = Case(device, 2, [0.49], kind=kind, schedule=True).set(
        BEST=0.5, NORM=0.5, PREVIOUS_OMEGA=1.07
    )
    case.set(GOAL=goal, SINCE_FULL=since, NORM_1=0.6, NORM_2=0.6, LAST_FULL=0.9)
    advance(case, "heavy", 9)
    assert (case.number("RADIUS")[0] > 0.5) == learns


@triton.jit
def _schedule_kernel(x, out, count, k, max_iter):
    i = tl.program_id(0)
    x += 8 * i
    relative, before, goal, tol = tl.load(x), tl.load(x + 1), tl.load(x + 2), tl.load(x + 3)
    norm, previous = tl.load(x + 4), tl.load(x + 5)
    since, plain = tl.load(x + 6).to(tl.int32), tl.load(x + 7).to(tl.int32)
    due, lowest = schedule.next_goal(relative, before, goal, since, sample.LOW, plain, tol)
    unknown = 0.0
    seen = Evaluation(1, norm, previous, relative, tol, unknown, unknown, unknown)
    kind = schedule.next_kind(seen, plain, since, before, goal, sample.LOW, count, k, max_iter)
    tl.store(out + 3 * i, due)
    tl.store(out + 3 * i + 1, lowest.to(tl.float32))
    tl.store(out + 3 * i + 2, kind.to(tl.float32))


def schedule_in_python(x, count, k, max_iter):
    """The schedule of csrc/cpu with bfloat16 alone."""
    relative, before, goal, tol, norm, previous, since, plain = x
    vain = since > 0 and goal < math.inf and not relative <= constants.REQUIRED_GAIN * before
    drop = largest = constants.DROP_BFLOAT16 if plain else constants.DROP_ACCELERATED
    target = constants.TARGET_FRACTION * tol
    if target > 0 and relative > target:
        total = math.log(relative / target)
        drop = math.exp(total / math.ceil(total / math.log(largest)))
    rate = constants.UNKNOWN_RATE
    if plain:
        rate = norm / previous if previous < math.inf else constants.UNKNOWN_RATE
    elif since > 0:
        rate = (relative / before) ** (1 / since)
    in_time = since < constants.LONGEST_LOW_PRECISION
    on = rate <= constants.SLOWEST_RATE if plain else rate < 1 and in_time and count > 0
    low = on and k + 1 < max_iter and relative * rate > goal
    return relative / drop, FULL if vain else LOW, LOW if low else FULL


@pytest.mark.parametrize(("count", "k", "max_iter"), [(0, 4, 50), (3, 4, 50), (3, 49, 50)])
def test_the_schedule_decides_as_that_of_the_cpu(count, k, max_iter, device):
    x = torch.rand(40, 8)
    x[:, 1] *= 2
    x[:, 2] *= 0.3
    x[::7, 2] = math.inf
    x[:, 3] = torch.tensor([0.0, 1e-6, 1e-3, 0.3]).repeat(10)
    x[:, 6] = (30 * x[:, 6]).floor() * (x[:, 6] > 0.2)
    x[::5, 5] = math.inf
    x[:, 7] = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0]).repeat(8)
    out = torch.full((40, 3), math.nan, device=device)
    _schedule_kernel[(40,)](x.to(device), out, count, k, max_iter)
    expected = torch.tensor([schedule_in_python(row, count, k, max_iter) for row in x.tolist()])
    torch.testing.assert_close(out.cpu(), expected)
    assert max_iter <= k + 1 or {FULL, LOW} == set(expected[:, 2].int().tolist())


@every_method
def test_a_low_precision_evaluation_verifies_nothing(method, device):
    slots, _ = ADVANCES[method]
    case = Case(device, slots, [1e-5, 0.9], kind=LOW, schedule=True).set(BEST=0.5, IDLE=2, GOAL=0.1)
    case.set(LAST_FULL=0.5, NORM=1.0, BEST_AT=slots, SINCE_FULL=2)
    advance(case, method, 9)
    assert case.number("BEST") == [0.5, 0.5]
    assert case.flag("IDLE") == [2, 2]
    assert case.flag("BEST_AT") == [slots, slots]
    assert case.flag("SINCE_FULL") == [3, 3]
    assert case.flag("REQUESTED")[0] == FULL  # below the goal


@every_method
def test_low_precision_ends_where_full_precision_finds_little_gain(method, device):
    """Sample 0 requested full precision, sample 1 had it because another sample did."""
    case = Case(device, ADVANCES[method][0], [0.45, 0.45], schedule=True).set(BEST=0.5, NORM=0.5)
    case.set(LAST_FULL=0.5, GOAL=0.1, SINCE_FULL=2, COUNT=1)
    case.samples.flags[1, column("REQUESTED")] = LOW
    advance(case, method, 9)
    assert case.flag("LOWEST") == [FULL, LOW]
    assert case.flag("SINCE_FULL") == [0, 0]
    assert case.number("LAST_FULL") == pytest.approx([0.45, 0.45])


@every_method
@pytest.mark.parametrize("size", [1, 33, 1030])
def test_the_change_leads_to_the_next_point(method, size, device):
    slots, run = ADVANCES[method]
    k = 6
    case = Case(device, slots, [0.5, 0.5], size, schedule=True).set(
        BEST=0.9, NORM=1.0, LAST_FULL=0.9
    )
    case.set(GOAL=0.01, PLAIN=1)
    advance_from = [case.fill(slot) for slot in range(slots)][k % slots]
    case.value = torch.randn(2, size).to(device)
    if method == "anderson":
        anderson(case, k, options(accelerate_above=0.9))
    else:
        run(case, k, OPTIONS)
    assert case.flag("REQUESTED") == [LOW, LOW]
    following = case.samples.points[(k + 1) % slots]
    # A GPU rounds to nearest, the interpreter of Triton 3.9 cuts off: 8 bits are 2^-7.
    torch.testing.assert_close(
        case.samples.change.float(), following - advance_from, rtol=2**-7, atol=0
    )


@every_method
def test_a_low_precision_evaluation_that_is_not_finite_leads_back_to_the_best_point(method, device):
    slots, run = ADVANCES[method]
    k = 8
    case = Case(device, slots, [math.nan, math.inf], kind=LOW, schedule=True)
    case.set(BEST=0.5, GOAL=0.1, LAST_FULL=0.5, NORM=1.0, OMEGA=1.3)
    rows = torch.stack([case.fill(slot) for slot in range(slots + 1)])
    case.value.fill_(math.nan)
    case.samples.points[(k + 1) % slots, :, ::2] = math.nan if slots == 3 else 1.0
    rows[(k + 1) % slots] = case.samples.points[(k + 1) % slots]
    case.samples.flags[:, column("BEST_AT")] = torch.tensor([(k + 2) % slots, slots]).to(device)
    run(case, k, OPTIONS)
    assert case.flag("REQUESTED") == [FULL, FULL]
    assert case.flag("LOWEST") == [FULL, FULL]
    following = case.samples.points[(k + 1) % slots]
    assert_equal(following, torch.stack([rows[(k + 2) % slots, 0], rows[slots, 1]]))
    assert case.number("OMEGA") == [1.0 if method == "heavy" else pytest.approx(1.3)] * 2
