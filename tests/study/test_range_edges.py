"""Corners of the ranges that other tables do not reach."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import study_tables

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

from fastdeq.study.report.criteria import judge
from fastdeq.study.report.evaluation import Evaluation
from fastdeq.study.report.findings import Grid, compare
from fastdeq.study.report.observations import convergence, learning, pairs
from fastdeq.study.report.stability import differences, seed_ranges, stable_ranges

ONE_REGIME = {"regimes": ("initialised",)}


def only_range(runs):
    return stable_ranges(seed_ranges(judge(runs))).iloc[0]


def test_runs_that_learn_nothing_move_no_bar():
    """Six of eleven scales fail; that they fail less badly for one seed makes it no easier one."""
    runs = study_tables.training({"dense": 0.0}, **ONE_REGIME)
    runs.loc[(runs.seed == 3) & (runs.scale > 1), "test_accuracy"] += 0.02
    assert judge(runs).query("seed == 3").reference.unique() == pytest.approx([0.97])


def test_a_range_is_around_a_stable_run_and_not_around_a_more_accurate_one_that_is_not():
    runs = study_tables.training({"dense": 0.0}, **ONE_REGIME)
    # A run that does not solve, but ends within the margin above all others.
    runs.loc[runs.scale == 8, "test_accuracy"] = 0.98
    row = only_range(runs)
    assert (row.lower, row.upper) == pytest.approx((0.25, 1))


def test_a_range_that_begins_after_the_first_scale_is_not_cut_off():
    runs = study_tables.training({"dense": 0.0}, **ONE_REGIME)
    runs.loc[runs.scale == 0.25, "test_accuracy"] = 0.5
    row = only_range(runs)
    assert not row.at_bottom
    assert row.lower == pytest.approx(0.25 * 2**0.5)


def test_a_difference_is_seen_where_one_side_alone_reaches_the_end():
    runs = study_tables.training({"dense": 0.0, "orthogonal": 9.0}, **ONE_REGIME)
    assert not differences(judge(runs), "weight", "dense", "orthogonal").unseen.any()


def test_one_empty_side_is_no_reason_to_see_nothing():
    runs = study_tables.training({"dense": -9.0, "orthogonal": 9.0}, **ONE_REGIME)
    found = compare(Evaluation(runs, pd.DataFrame()), "weight", "dense", "orthogonal").iloc[0]
    assert "broader" in found.words


def test_a_scale_is_stable_if_all_of_its_runs_are():
    runs = study_tables.training({"dense": 0.0}, **ONE_REGIME)
    again = runs[runs.scale == 1.0].assign(forward_converged=0.5, key="again")
    assert only_range(pd.concat([runs, again])).upper == pytest.approx(2**-0.5)


# Observations


def gains(solver, **_):
    return {"dense": 0.0, "orthogonal": 1.0 if solver == "auto" else 0.0, "symmetric": 0.0}


def test_the_table_of_pairs_counts_wider_and_narrower_in_their_columns():
    runs = study_tables.training(gains, solvers=("picard", "auto"), **ONE_REGIME)
    (grid,) = [g for g in pairs(Evaluation(runs, pd.DataFrame())) if isinstance(g, Grid)]
    rows = {row[1]: dict(zip(grid.columns, row, strict=True)) for row in grid.rows}
    assert (rows["orthogonal"]["wider"], rows["orthogonal"]["narrower"]) == ("1", "0")
    assert (rows["dense"]["wider"], rows["dense"]["narrower"]) == ("0", "0")


def test_convergence_is_the_median_over_seeds():
    runs = study_tables.training({"dense": 9.0}, **ONE_REGIME)
    runs.loc[runs.scale == 1.0, "forward_converged"] = [0.1, 0.2, 0.3, 0.4, 1.0]
    (found,) = convergence(Evaluation(runs, pd.DataFrame()), [1.0])
    assert "dense 30%" in found.text


def test_the_gain_of_accuracy_alone_is_the_median_over_settings():
    runs = study_tables.training({"dense": 1.0}, activations=("tanh", "relu", "gelu"), **ONE_REGIME)
    hard = (runs.activation == "gelu") & (runs.scale > 1.1)
    runs.loc[hard, "forward_converged"] = 0.3
    (found,) = learning(Evaluation(runs, pd.DataFrame()))
    assert "0 octaves for dense" in found.text
    assert np.isfinite(runs.test_accuracy).all()
