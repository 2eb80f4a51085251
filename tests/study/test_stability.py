"""Stable ranges of made-up studies: every edge, width and difference is known."""

from __future__ import annotations

import io

import numpy as np
import pytest
import study_tables
from rich.console import Console

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

from fastdeq.study.report.criteria import Criteria, judge
from fastdeq.study.report.stability import (
    differences,
    median_interval,
    seed_ranges,
    stable_ranges,
    summary,
)


def table(runs, **options):
    ranges = stable_ranges(seed_ranges(judge(runs), **options))
    return ranges.set_index(["regime", "weight"])


# Criteria


def judged_run(**changed):
    """One run that is stable but for the changes, beside an untouched one that sets the bar."""
    runs = study_tables.training({"dense": 0.0}, scales=(0.5,), seeds=(0, 1, 2))
    for name, value in changed.items():
        runs.loc[0, name] = value
    return judge(runs).iloc[0]


def test_a_good_run_is_stable():
    run = judged_run()
    assert run.learns
    assert run.solves
    assert run.clean
    assert run.stable


@pytest.mark.parametrize(
    ("changed", "failed"),
    [
        ({"test_accuracy": 0.9399}, "learns"),
        ({"test_accuracy": np.nan}, "learns"),
        ({"forward_converged": 0.89}, "solves"),
        ({"forward_converged": np.nan}, "solves"),
        ({"backward_converged": 0.89}, "solves"),
        ({"backward_converged": np.nan}, "solves"),
        ({"skipped": 1}, "clean"),
        ({"error": "RuntimeError: stopped"}, "clean"),
        ({"train_loss": np.inf}, "clean"),
        ({"test_loss": np.nan}, "clean"),
    ],
)
def test_one_flaw_is_enough(changed, failed):
    run = judged_run(**changed)
    assert not run.stable
    assert [n for n in ("learns", "solves", "clean") if not run[n]] == [failed]


def test_the_margin_is_meant_inclusively():
    assert judged_run(test_accuracy=0.97 - 0.03).learns


def test_a_phantom_gradient_has_no_backward_solves_to_judge():
    assert judged_run(backward_converged=np.nan, gradient="phantom", task="other").solves


def test_the_bar_is_the_best_median_of_any_family_and_not_the_best_run():
    runs = study_tables.training({"dense": 5.0, "orthogonal": 5.0}, scales=(0.5,))
    runs.loc[runs.weight == "orthogonal", "test_accuracy"] = 0.935
    assert (judge(runs).query("weight == 'orthogonal'").learns == False).all()  # noqa: E712
    runs.loc[:, "test_accuracy"] = 0.9
    runs.loc[0, "test_accuracy"] = 1.0
    assert judge(runs).reference.unique() == pytest.approx([0.9])


def test_the_bar_is_lower_where_the_data_of_a_seed_are_harder():
    runs = study_tables.training()
    fine = judge(runs).learns
    for shift in (-0.05, 0.02):
        other = runs.copy()
        other.loc[other.seed == 3, "test_accuracy"] += shift
        assert (judge(other).learns == fine).all()
    # One run alone is no harder seed.
    alone = runs.index[(runs.seed == 3) & (runs.scale == 0.5) & (runs.weight == "dense")][0]
    other.loc[alone, "test_accuracy"] -= 0.05
    assert (judge(other).learns != fine).sum() == 2  # in both regimes


def test_a_table_without_entry_scales_gets_them():
    runs = study_tables.training()
    assert (judge(runs.drop(columns="entry_scale")).entry_scale == judge(runs).entry_scale).all()


# Ranges


def test_edges_are_recovered_exactly():
    ranges = table(study_tables.training())
    for regime in ("initialised", "kept"):
        for weight, edge in study_tables.EDGES.items():
            row = ranges.loc[regime, weight]
            assert row.upper == pytest.approx(2**edge)
            assert row.lower == pytest.approx(0.25)
            assert row.width == pytest.approx(edge + 2)
            assert row.upper_low == row.upper_high == row.upper
            assert row.seeds == 5
            assert row.step == pytest.approx(0.5)
            assert row.at_bottom
            assert not row.at_top


def test_a_gap_ends_the_range_on_either_side():
    runs = study_tables.training({"dense": 3.0})
    for scale in (0.25 * 2**0.5, 2.0):
        runs.loc[np.isclose(runs.scale, scale), "test_accuracy"] = 0.5
    row = table(runs).loc["initialised", "dense"]
    assert (row.lower, row.upper) == pytest.approx((0.5, 2**0.5))
    assert not row.at_bottom
    assert not row.at_top


def test_learning_alone_goes_further_than_learning_and_solving():
    runs = study_tables.training({"dense": 1.0})
    runs.loc[runs.scale > 1.1, "forward_converged"] = 0.3
    assert table(runs).loc["initialised", "dense"].upper == pytest.approx(1)
    assert table(runs, criterion="learns").loc["initialised", "dense"].upper == pytest.approx(2)


def test_a_range_that_fills_the_grid_is_marked():
    row = table(study_tables.training({"dense": 9.0})).loc["initialised", "dense"]
    assert row.at_top
    assert row.upper == pytest.approx(8)


def test_no_stable_scale_is_narrower_than_one():
    ranges = seed_ranges(judge(study_tables.training({"dense": -9.0, "orthogonal": -2.0})))
    assert ranges.query("weight == 'dense'").width.unique() == pytest.approx([-0.5])
    assert ranges.query("weight == 'orthogonal'").width.unique() == [0]
    row = table(study_tables.training({"dense": -9.0, "orthogonal": -2.0}))
    assert row.loc["initialised", "dense"].none
    assert not row.loc["initialised", "orthogonal"].none


def test_equal_variance_halves_the_scales_of_symmetric_weights_alone():
    runs = study_tables.training()
    by_radius, by_variance = table(runs), table(runs, convention="variance")
    for weight, factor in {"dense": 1, "orthogonal": 1, "symmetric": 0.5}.items():
        a, b = (t.loc["initialised", weight] for t in (by_radius, by_variance))
        assert (b.lower, b.upper) == pytest.approx((factor * a.lower, factor * a.upper))
        assert b.width == pytest.approx(a.width)


def test_dense_counts_in_both_regimes_only_where_others_are_kept():
    assert list(table(study_tables.training(regimes=["initialised"])).index) == [
        ("initialised", w) for w in study_tables.EDGES
    ]
    assert ("kept", "dense") in table(study_tables.training()).index


# Uncertainty


def test_the_interval_of_five_values_is_their_span():
    assert median_interval([3, 1, 2, 5, 4]) == (3, 1, 5)
    assert median_interval([2.0]) == (2, 2, 2)
    assert median_interval([1.0, np.nan, 1.0]) == (1, 1, 1)
    assert np.isnan(median_interval([np.nan])).all()


def test_the_interval_covers_the_median_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    samples = rng.standard_normal((300, 9))
    intervals = np.array([median_interval(s) for s in samples])
    covered = ((intervals[:, 1] <= 0) & (intervals[:, 2] >= 0)).mean()
    # Standard error 0.013 at 95 %; the bootstrap of a median is known to be a little off.
    assert 0.89 < covered < 1


def test_differences_are_paired_by_seed():
    runs = study_tables.training(spread=0.5)
    found = differences(judge(runs), "weight", "dense", "orthogonal")
    assert len(found) == 10
    # Unpaired the seeds would spread by half an octave; in pairs they agree.
    assert found.width.to_numpy() == pytest.approx(np.ones(10))
    back = differences(judge(runs), "weight", "orthogonal", "dense")
    assert back.width.to_numpy() == pytest.approx(-np.ones(10))
    assert not found.unseen.any()


def test_missing_seeds_leave_no_pair():
    runs = study_tables.training()
    runs = runs[~((runs.weight == "dense") & (runs.seed > 1))]
    found = differences(judge(runs), "weight", "dense", "symmetric")
    assert sorted(found.seed.unique()) == [0, 1]


def test_grids_of_other_length_are_compared_where_both_reach():
    """Entry scales of symmetric weights end an octave earlier: that is not a narrower range."""
    runs = study_tables.training({"dense": 9.0, "symmetric": 9.0})
    found = differences(judge(runs), "weight", "dense", "symmetric", convention="variance")
    assert found.upper.to_numpy() == pytest.approx(np.zeros(10))
    assert found.width.to_numpy() == pytest.approx(np.zeros(10))
    assert found.unseen.all()


def test_solvers_are_compared_within_a_family():
    runs = study_tables.training(
        lambda solver, **_: {"dense": 0.0, "orthogonal": 2.0 if solver == "auto" else 1.0},
        solvers=("picard", "auto"),
    )
    found = differences(judge(runs), "solver", "picard", "auto")
    by_weight = found.groupby("weight").upper.median()
    assert by_weight.to_dict() == pytest.approx({"dense": 0, "orthogonal": 1})


# The printed table


def printed(runs, criteria=None):
    out = io.StringIO()
    Console(file=out, width=80).print(summary(runs, criteria))
    return out.getvalue()


def test_summary_fits_a_terminal_and_shows_the_edges():
    text = printed(study_tables.training(spread=0.5))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "1 [1, 1.4]" in text
    assert "digits tanh" in text


def test_summary_marks_the_ends_of_the_grid_and_empty_ranges():
    text = printed(study_tables.training({"dense": -9.0, "orthogonal": 9.0}))
    assert "none" in text
    assert "≥ 8 [≥ 8, ≥ 8]" in text


def test_summary_shows_that_some_seeds_have_no_range():
    """Brackets with words in them are markup to rich."""
    runs = study_tables.training({"dense": 0.0}, regimes=("initialised",))
    runs.loc[runs.seed == 0, "test_accuracy"] = 0.5
    assert "1 [none, 1]" in printed(runs)


def test_summary_of_one_seed_has_no_interval():
    assert "[1" not in printed(study_tables.training(seeds=[3]))


def test_summary_of_nothing():
    assert printed(study_tables.training().iloc[:0])


def test_criteria_are_parameters():
    strict = Criteria(margin=0.001)
    runs = study_tables.training({"dense": 9.0})
    row = stable_ranges(seed_ranges(judge(runs, strict)), strict).iloc[0]
    # 0.002 of accuracy per octave away from 0.5: half an octave is as far as it goes.
    assert (row.lower, row.upper) == pytest.approx((2**-1.5, 2**-0.5))
    assert "0.1 percentage points" in strict.describe()[0]
