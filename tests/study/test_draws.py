"""Statistics over draws against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import study_tables

pytest.importorskip("matplotlib")

from fastdeq.study.report.draws import agreement, spread, statistics, unsolved
from fastdeq.study.report.predictions import predict


def test_bars_hold_nine_tenths_of_the_draws():
    initial = study_tables.initial(families=("dense",), scales=(0.5,), activations=("tanh",))
    initial.at[0, "length"] = list(np.linspace(1.0, 2.0, 20))
    row = statistics(initial, "length").iloc[0]
    assert (row["mean"], row.low, row.high) == pytest.approx((1.5, 1.05, 1.95))


def test_the_interval_of_a_variation_does_not_depend_on_the_unit():
    initial = study_tables.initial(families=("dense",), scales=(0.5,), activations=("tanh",))
    first = statistics(initial, "length").iloc[0]
    initial.at[0, "length"] = [100 * v for v in initial.length[0]]
    second = statistics(initial, "length").iloc[0]
    for name in ("variation", "variation_low", "variation_high"):
        assert second[name] == pytest.approx(first[name])


def test_deviations_from_the_theory_are_relative():
    """Means of 1.1 and 0.8 times 1 / (1 - 0.5^2)."""
    initial = study_tables.initial(
        families=("dense", "orthogonal"), scales=(0.5,), activations=("identity",)
    )
    for i, factor in enumerate((1.1, 0.8)):
        initial.at[i, "length"] = [factor * 4 / 3] * 20
    text = next(f.text for f in agreement(initial) if "|z*|²" in f.text)
    assert "within 15.0% of the limit" in text
    assert "the largest deviation, 20%, is that of orthogonal weights" in text


def test_spreads_are_shown_where_all_families_have_one():
    initial = study_tables.initial(activations=("tanh",))
    initial = initial[(initial.weight == "symmetric") | (initial.scale < 1)]
    assert next(spread(initial)).text.startswith("Tanh, scale 0.9,")


def test_the_cell_with_the_fewest_equilibria_is_named():
    initial = study_tables.initial(families=("dense",), scales=(0.5, 0.7), activations=("tanh",))
    for i, lost in enumerate((2, 10)):
        initial.at[i, "solved"] = [j >= lost for j in range(20)]
    text = next(unsolved(initial)).text
    assert "In 2 of 2 cells" in text
    assert "at scale 0.7: 50%" in text


def test_there_is_no_prediction_where_the_mean_field_is_unstable():
    assert predict("length", "dense", 0.5, "tanh", 1.0) is not None
    assert predict("length", "dense", 2.5, "tanh", 1.0) is None
