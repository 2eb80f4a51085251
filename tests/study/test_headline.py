"""The first lines of the report: every comparison is counted, and chance is named."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import study_tables

pytest.importorskip("matplotlib")

from fastdeq.study.report.criteria import Criteria
from fastdeq.study.report.evaluation import Evaluation
from fastdeq.study.report.findings import CONTRADICT, EQUAL, SUPPORT, UNDECIDED, Finding
from fastdeq.study.report.headline import by_chance, headline, overall


def lines(edges=study_tables.EDGES, **options):
    evaluation = Evaluation(study_tables.training(edges, **options), pd.DataFrame())
    *sentences, grid = headline(evaluation)
    assert all(isinstance(s, Finding) for s in sentences)
    return sentences, grid


def mixed_edges(activation, **_):
    broad = {"tanh": 1.0, "relu": -0.5, "hardtanh": 0.0}[activation]
    return {"dense": 0.0, "orthogonal": broad, "symmetric": 1.0}


def test_settings_are_counted_by_their_verdicts():
    (orthogonal, symmetric, by_variance, edges, chance), grid = lines(
        mixed_edges, activations=("tanh", "relu", "hardtanh")
    )
    assert (
        "at equal spectral radius: the stable range is broader in 2, narrower in 2, not different "
        "in 2 and undecided in 0 of 6 settings. The median change is 0 octaves." in orthogonal.text
    )
    assert orthogonal.verdict == "mixed"
    assert symmetric.verdict == SUPPORT
    assert "The median change is +1 octave." in symmetric.text
    # Radius 2 is entry scale 1, where dense weights end as well.
    assert by_variance.verdict == EQUAL
    assert "1 for dense, 0.71 to 2 for orthogonal and 2 for symmetric" in edges.text
    assert "Each of the 18 comparisons" in chance.text
    assert "5 of 5 seeds" in chance.text
    assert "6.2% of them, about 1," in chance.text
    assert [row[3:8] for row in grid.rows[:2]] == [["3", "1", "1", "1", "0"]] * 2
    assert [row[0] for row in grid.rows] == ["orthogonal"] * 2 + ["symmetric"] * 4
    assert all(len(row) == len(grid.columns) for row in grid.rows)
    assert grid.rows[0][-1] == "−0.5 to 1"  # noqa: RUF001


def test_a_few_seeds_promise_nothing_about_chance():
    sentences, _ = lines(seeds=range(4))
    assert not any("chance" in s.text for s in sentences)
    assert {s.verdict for s in sentences} == {UNDECIDED, ""}


def test_dense_weights_alone_have_edges_and_no_comparison():
    evaluation = Evaluation(study_tables.training({"dense": -9.0}), pd.DataFrame())
    (edges,) = headline(evaluation)
    assert "none for dense weights" in edges.text


@pytest.mark.parametrize(
    ("counts", "verdict"),
    [
        ((3, 0, 1, 1), SUPPORT),
        ((2, 0, 1, 1), "partly supported"),
        ((0, 3, 0, 0), CONTRADICT),
        ((0, 1, 9, 9), "partly contradicted"),
        ((1, 1, 9, 9), "mixed"),
        ((0, 0, 3, 2), EQUAL),
        ((0, 0, 2, 2), UNDECIDED),
    ],
)
def test_the_verdict_on_all_settings(counts, verdict):
    assert (
        overall(dict(zip((SUPPORT, CONTRADICT, EQUAL, UNDECIDED), counts, strict=True))) == verdict
    )


@pytest.mark.parametrize(("seeds", "agreeing"), [(5, 5), (6, 6), (8, 7), (1, 1)])
def test_what_chance_can_decide(seeds, agreeing):
    """Binomial tails, both sides: 2 of 32 for five seeds, 2 (1 + 8) of 256 for eight."""
    tail = sum(math.comb(seeds, k) for k in range(agreeing, seeds + 1))
    assert by_chance(seeds, Criteria()) == (agreeing, 2 * tail / 2**seeds)
