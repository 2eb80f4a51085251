"""Ranges on different grids are compared where both were run, and nowhere else."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import study_tables

pytest.importorskip("pandas")
pytest.importorskip("matplotlib")

from fastdeq.study.report.criteria import judge
from fastdeq.study.report.evaluation import Evaluation
from fastdeq.study.report.findings import CONTRADICT, EQUAL, UNDECIDED, compare
from fastdeq.study.report.stability import differences, seed_ranges, stable_ranges

COARSE = (0.5, 1.0, 2.0, 4.0)
FINE = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 8.0)


def grids(edges, **scales):
    """Runs of every family on its own grid."""
    tables = [
        study_tables.training({w: edges[w]}, scales=grid, regimes=("initialised",))
        for w, grid in scales.items()
    ]
    return pd.concat(tables, ignore_index=True)


def compared(runs, **options):
    evaluation = Evaluation(runs, pd.DataFrame())
    return compare(evaluation, "weight", "dense", "symmetric", **options).iloc[0]


@pytest.mark.parametrize("edge", [0.5, 1.5])
def test_a_scale_that_only_one_was_run_at_makes_no_range_broader(edge):
    """Both train up to the same scale; only one grid has a point between it and the next one."""
    runs = grids({"dense": edge, "symmetric": edge}, dense=COARSE, symmetric=FINE)
    assert compared(runs).verdict == EQUAL
    assert seed_ranges(judge(runs)).groupby("weight").upper.nunique().sum() == 2


def test_a_gap_that_only_one_grid_can_show_makes_no_range_narrower():
    runs = grids({"dense": 1.0, "symmetric": 1.0}, dense=COARSE, symmetric=FINE)
    runs.loc[np.isclose(runs.scale, 1.4), "test_accuracy"] = 0.5
    assert compared(runs).verdict == EQUAL
    runs.loc[np.isclose(runs.scale, 1.0) & (runs.weight == "symmetric"), "test_accuracy"] = 0.5
    assert compared(runs).verdict == CONTRADICT


def test_two_grids_without_a_stable_scale_do_not_differ():
    """Their steps differ, by which the widths of nothing would."""
    runs = grids({"dense": -9.0, "symmetric": -9.0}, dense=COARSE, symmetric=FINE)
    found = compared(runs)
    assert found.verdict == UNDECIDED
    assert (found.low, found.high) == (0, 0)
    assert "neither has a stable scale" in found.words


def test_the_common_end_is_that_of_the_shorter_grid():
    runs = grids({"dense": 9.0, "symmetric": 9.0}, dense=COARSE, symmetric=FINE)
    assert differences(judge(runs), "weight", "dense", "symmetric").unseen.all()
    assert "both reach the end of the grid" in compared(runs).words


def test_equal_variance_compares_equal_entry_scales():
    """Radii 0.5 to 8 of symmetric weights are entry scales 0.25 to 4."""
    runs = grids({"dense": 1.0, "symmetric": 1.0}, dense=COARSE, symmetric=FINE)
    found = compared(runs, convention="variance")
    # Common are 0.5, 1, 2 and 4, where dense ones reach 2 and symmetric ones 1.
    assert (found.width, found.verdict) == (-1, CONTRADICT)


def test_grids_with_nothing_in_common_are_not_compared():
    runs = grids({"dense": 1.0, "symmetric": 1.0}, dense=(0.5, 1.0), symmetric=(0.7, 1.4))
    assert differences(judge(runs), "weight", "dense", "symmetric").empty
    assert compare(Evaluation(runs, pd.DataFrame()), "weight", "dense", "symmetric").empty


@pytest.mark.parametrize(("empty", "none"), [(1, False), (2, True), (3, True)])
def test_half_of_the_seeds_without_a_range_is_none(empty, none):
    runs = study_tables.training({"dense": 1.0}, seeds=range(4), regimes=("initialised",))
    runs.loc[runs.seed < empty, "forward_converged"] = 0.0
    row = stable_ranges(seed_ranges(judge(runs))).iloc[0]
    assert row.none == none
    assert row["empty"] == empty
    if not none:  # edges of the seeds that have any
        assert (row.lower, row.upper) == pytest.approx((0.25, 2))
        assert row.at_bottom


def test_seeds_that_failed_raise_no_bar():
    """Else two lucky runs of a cell, whose others failed, would be its median."""
    runs = study_tables.training({"dense": 0.0, "orthogonal": 0.0}, regimes=("initialised",))
    cell = (runs.weight == "orthogonal") & (runs.scale == 4.0)
    runs.loc[cell, "test_accuracy"] = [np.nan, np.nan, np.nan, 0.99, 0.99]
    assert judge(runs).reference.max() == pytest.approx(0.97)
