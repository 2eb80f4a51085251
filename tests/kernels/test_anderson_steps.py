"""The kernel of Anderson acceleration on one evaluation at a time."""

from __future__ import annotations

import math

import pytest
import torch
from fastdeq.kernels.steps.anderson_steps import History
from steps_cases import (
    FULL,
    LOW,
    OPTIONS,
    Case,
    anderson,
    assert_equal,
    column,
    options,
)

from fastdeq.ops import anderson_mix


def fill_history(case: Case, k: int, window: int, count: int) -> None:
    """Entries of the ``count`` evaluations before k, NaN elsewhere; point and value of k."""
    batch, size = case.value.shape
    anderson_rows = torch.full((2, batch, window + 1, size), math.nan)
    for age in range(1, count + 1):
        anderson_rows[:, :, (k - age) % (window + 1)] = torch.randn(2, batch, size)
    f, g = (rows.to(case.value.device) for rows in anderson_rows)
    gram = torch.einsum("bmn,bpn->bmp", g.double(), g.double())
    case.history = History(f, g, gram)
    point = case.fill(k % 2)
    case.value = torch.randn(batch, size).to(case.value.device)
    f[:, k % (window + 1)] = case.value
    g[:, k % (window + 1)] = case.value - point
    case.set(COUNT=count, HISTORY=1, NORM=1.0, BEST=0.5)


@pytest.mark.parametrize("damping", [1.0, 0.6])
@pytest.mark.parametrize(
    ("window", "count", "size"),
    [(1, 0, 1), (1, 1, 5), (3, 2, 33), (3, 3, 300), (5, 5, 1), (9, 9, 40), (64, 64, 70)],
)
def test_a_mixing_step_is_that_of_the_reference(window, count, size, damping, device):
    k = 2 * window + 1
    case = Case(device, 2, [0.4, 0.4], size)
    fill_history(case, k, window, count)
    rows = (t.clone() for t in (case.history.f, case.history.g, case.history.gram))
    counts = torch.full((2,), count, dtype=torch.int32, device=device)
    arguments = (damping, OPTIONS.regularization, OPTIONS.rank_tolerance, OPTIONS.max_weight)
    z, dropped, rejected = anderson_mix.reference(*rows, counts, k % (window + 1), *arguments)
    anderson(case, k, options(max_iter=1000, window=window, damping=damping))
    # The weights come from float64 sums in another order, the mix from c + 1 float32 terms.
    torch.testing.assert_close(case.samples.points[(k + 1) % 2], z, rtol=1e-4, atol=1e-4)
    assert case.flag("COUNT") == [min(count + 1, window)] * 2
    assert case.flag("ACCELERATED") == [int(count > 0)] * 2
    assert case.samples.flags[:, column("REJECTS") + 2].tolist() == (dropped > 0).int().tolist()
    assert case.number("TRUSTED_NORM") == pytest.approx([0.4, 0.4])
    assert not rejected.any()


def test_the_comparison_notices_a_weight_of_the_wrong_entry(device):
    case = Case(device, 2, [0.4, 0.4], 33)
    fill_history(case, 7, 3, 3)
    rows = [t.clone() for t in (case.history.f, case.history.g, case.history.gram)]
    rows[0][:, [0, 1]] = rows[0][:, [1, 0]]
    counts = torch.full((2,), 3, dtype=torch.int32, device=device)
    z, *_ = anderson_mix.reference(*rows, counts, 3, 1.0, 1e-12, 1e-10, 1e8)
    anderson(case, 7)
    assert not torch.allclose(case.samples.points[0], z, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("norm", [0.9, math.inf, math.nan])
def test_a_step_that_is_too_bad_is_taken_back(norm, device):
    """The plain step from the point before: its value. The history starts anew."""
    k = 9
    case = Case(device, 2, [norm, 0.4], 33)
    fill_history(case, k, 3, 2)
    case.set(ACCELERATED=1, TRUSTED_NORM=0.44)
    anderson(case, k)
    assert_equal(case.samples.points[(k + 1) % 2, 0], case.history.f[0, (k - 1) % 4])
    assert case.flag("REJECTS") == [1, 0]
    assert case.flag("ACCELERATED") == [0, 1]
    assert case.flag("COUNT") == [0, 3]
    assert case.flag("REQUESTED") == [FULL, FULL]
    assert case.number("TRUSTED_NORM") == pytest.approx([0.44, 0.4])


def test_weights_above_the_cap_give_the_plain_step(device):
    case = Case(device, 2, [0.4, 0.4], 33)
    fill_history(case, 9, 3, 3)
    anderson(case, 9, options(max_weight=1e-3))
    assert_equal(case.samples.points[0], case.value)
    assert case.samples.flags[:, column("REJECTS") + 1].tolist() == [1, 1]
    assert case.flag("ACCELERATED") == [0, 0]
    assert case.flag("COUNT") == [3, 3]


def test_plain_steps_until_the_residual_falls_too_slowly(device):
    """Sample 0 goes on with plain steps; sample 1 begins a history with this very evaluation."""
    k = 6
    case = Case(device, 2, [0.5, 0.8], 33).set(NORM=1.0, BEST=1.0, PLAIN=1)
    point = case.fill(k % 2)
    case.value = torch.randn(2, 33).to(device)
    history = anderson(case, k, options(accelerate_above=0.7, damping=0.8))
    assert case.flag("PLAIN") == [1, 0]
    assert case.flag("HISTORY") == [0, 1]
    assert case.flag("COUNT") == [0, 1]
    g = case.value - point
    torch.testing.assert_close(case.samples.points[(k + 1) % 2], point + 0.8 * g)
    slot = k % 4
    assert history.g[0].isnan().all()
    assert_equal(history.g[1, slot], g[1])
    square = g[1].double().square().sum()
    torch.testing.assert_close(history.gram[1, slot, slot], square, rtol=1e-12, atol=0)


def test_after_low_precision_the_history_begins_with_full_precision(device):
    k = 6
    case = Case(device, 2, [0.5, 0.8], 33, kind=LOW, schedule=True)
    case.set(NORM=1.0, BEST=1.0, PLAIN=1, GOAL=0.01, LAST_FULL=1.0, SINCE_FULL=1)
    case.fill(k % 2)
    case.value = torch.randn(2, 33).to(device)
    anderson(case, k, options(accelerate_above=0.7))
    assert case.flag("PLAIN") == [1, 0]
    assert case.flag("HISTORY") == [0, 1]
    assert case.flag("COUNT") == [0, 0]
    assert case.flag("REQUESTED") == [LOW, FULL]
    assert case.number("GOAL")[1] == math.inf
    assert_equal(case.samples.points[(k + 1) % 2], case.value)
