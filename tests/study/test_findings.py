"""Verdicts and sentences from made-up studies, for every outcome."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import study_tables

pytest.importorskip("matplotlib")

from fastdeq.study.report import draws, findings, observations
from fastdeq.study.report.evaluation import Evaluation
from fastdeq.study.report.findings import CONTRADICT, EQUAL, SUPPORT, UNDECIDED, compare, verdict

NOTHING = pd.DataFrame()


def evaluate(edges=study_tables.EDGES, **options):
    return Evaluation(study_tables.training(edges, **options), NOTHING)


def main_findings(evaluation, convention="spectral_radius"):
    """Family -> sentence, of the main setting."""
    found = list(findings.families(evaluation, convention, **evaluation.main))
    return {f.text.split(": ")[1].split()[0]: f for f in found}


@pytest.mark.parametrize(
    ("low", "high", "pairs", "unseen", "expected"),
    [
        (0.5, 1.0, 5, 0.0, SUPPORT),
        (0.5, 1.0, 4, 0.0, UNDECIDED),
        (-1.0, -0.5, 5, 0.0, CONTRADICT),
        (0.0, 1.0, 5, 0.0, UNDECIDED),
        (-0.5, 0.5, 9, 0.0, UNDECIDED),
        (0.0, 0.0, 5, 0.0, EQUAL),
        (0.0, 0.0, 5, 1.0, UNDECIDED),
        (0.5, 1.0, 5, 0.6, SUPPORT),
        (np.nan, np.nan, 0, np.nan, UNDECIDED),
    ],
)
def test_the_rule_of_decision(low, high, pairs, unseen, expected):
    assert verdict(low, high, pairs, unseen, needed=5)[0] == expected


def test_a_broader_range_is_supported_and_the_numbers_are_in_the_sentence():
    found = main_findings(evaluate(spread=0.5))
    assert found["orthogonal"].verdict == SUPPORT
    text = found["orthogonal"].text
    assert "Digits, tanh, plain iteration, implicit gradient, structure only at the start" in text
    assert "train stably up to 2 [2, 2.8], dense weights up to 1 [1, 1.4]" in text
    assert "wider by 1 [1, 1] octaves (5 seeds): the data support a broader range" in text


def test_a_narrower_range_contradicts():
    found = main_findings(evaluate({"dense": 1.0, "orthogonal": 0.5, "symmetric": 1.0}))
    assert found["orthogonal"].verdict == CONTRADICT
    assert "wider by −0.5 [−0.5, −0.5]" in found["orthogonal"].text  # noqa: RUF001
    assert found["symmetric"].verdict == EQUAL


def test_symmetric_weights_lose_at_equal_variance_what_the_convention_gave_them():
    """Upper edges 1 and 2 in spectral radius are 1 and 1 in entry scale."""
    evaluation = evaluate({"dense": 0.0, "symmetric": 1.0})
    assert main_findings(evaluation)["symmetric"].verdict == SUPPORT
    by_variance = main_findings(evaluation, "variance")["symmetric"]
    assert by_variance.verdict == EQUAL
    assert "at equal entry variance" in by_variance.text


def test_seeds_that_disagree_decide_nothing():
    def edges(**_):
        return {"dense": 0.0, "orthogonal": 0.0}

    runs = study_tables.training(edges)
    best = (runs.weight == "orthogonal") & (runs.seed == 0) & (runs.scale < 2)
    runs.loc[best, ["test_accuracy", "forward_converged", "backward_converged"]] = [0.97, 1, 1]
    runs.loc[best, ["test_loss", "train_loss"]] = 0.1
    found = main_findings(Evaluation(runs, NOTHING))["orthogonal"]
    assert found.verdict == UNDECIDED
    assert "wider by 0 [0, 0.5]" in found.text


@pytest.mark.parametrize("seeds", [1, 4])
def test_too_few_seeds_decide_nothing(seeds):
    found = main_findings(evaluate(seeds=range(seeds)))
    assert {f.verdict for f in found.values()} == {UNDECIDED}
    assert f"({seeds} of 5 seeds needed)" in found["orthogonal"].text
    assert ("[" in found["orthogonal"].text) == (seeds > 1)


def test_ranges_beyond_the_grid_decide_nothing_between_them():
    found = main_findings(evaluate({"dense": 9.0, "orthogonal": 9.0, "symmetric": 9.0}))
    assert found["symmetric"].verdict == UNDECIDED
    assert "both reach the end of the grid" in found["symmetric"].text
    assert "up to at least 8" in found["symmetric"].text


def test_no_stable_scale_on_either_side():
    found = main_findings(evaluate({"dense": -9.0, "orthogonal": -9.0, "symmetric": 3.0}))
    assert "neither has a stable scale" in found["orthogonal"].text
    assert found["orthogonal"].text.count("at no scale") == 2
    assert found["symmetric"].verdict == SUPPORT


def test_the_table_has_every_comparison():
    evaluation = evaluate(activations=("tanh", "relu", "hardtanh"))
    grid = findings.comparisons(evaluation)
    assert len(grid.rows) == 12
    assert all(len(row) == len(grid.columns) for row in grid.rows)


def test_solvers_and_regimes_are_compared():
    def edges(solver, regime, **_):
        gain = (solver == "auto") + 0.5 * (regime == "kept")
        return {"dense": 0.0, "orthogonal": gain, "symmetric": gain}

    evaluation = evaluate(edges, solvers=("picard", "auto"))
    sentences = [f for f in observations.pairs(evaluation) if isinstance(f, findings.Finding)]
    assert len(sentences) == 2
    assert "+1 octave for orthogonal (kept)" in sentences[0].text
    assert "0 octaves for dense" in sentences[0].text
    assert "+0.5 octaves for orthogonal and +0.5 octaves for symmetric" in sentences[1].text
    found = compare(evaluation, "solver", "picard", "auto")
    assert found.set_index(["weight", "regime"]).verdict["orthogonal", "kept"] == SUPPORT


def test_the_gain_of_asking_for_accuracy_alone():
    runs = study_tables.training({"dense": 1.0}, regimes=("initialised",))
    runs.loc[runs.scale > 1.1, "forward_converged"] = 0.3
    (found,) = observations.learning(Evaluation(runs, NOTHING))
    assert "1 octave for dense" in found.text


def test_accuracies_name_the_best_and_the_largest_common_scale():
    runs = study_tables.training({"dense": 0.0, "orthogonal": 9.0})
    runs = runs[(runs.weight == "dense") | (runs.scale < 5)]
    (found,) = observations.accuracies(Evaluation(runs, NOTHING))
    assert "best median test accuracy dense 97.0% and orthogonal 97.0%" in found.text
    assert "at scale 4 dense 60.0% and orthogonal 96.4%" in found.text


# Draws of initial weights


def test_the_coefficient_of_variation_is_that_of_the_sample():
    initial = study_tables.initial(activations=("tanh",))
    table = draws.statistics(initial, "length").set_index(["weight", "scale"])
    sample = np.array(initial.query("weight == 'dense' and scale == 0.9").length.item())
    row = table.loc["dense", 0.9]
    assert row.variation == pytest.approx(sample.std(ddof=1) / sample.mean())
    assert row.variation_low < row.variation < row.variation_high
    text = next(draws.spread(initial)).text
    assert text.index("dense") < text.index("orthogonal") < text.index("symmetric")
    assert text.startswith("Tanh, scale 1.4")


def test_draws_without_an_equilibrium_are_left_out():
    initial = study_tables.initial(families=("dense",), scales=(0.5,), activations=("tanh",))
    solved = [i != 3 for i in range(20)]
    initial.at[0, "length"] = [9e9 if i == 3 else 2.0 for i in range(20)]
    initial.at[0, "solved"] = solved
    assert draws.statistics(initial, "length")["mean"].item() == 2
    assert "95%" in next(draws.unsolved(initial)).text


def test_measured_means_are_held_against_the_theory():
    initial = study_tables.initial(
        families=("orthogonal",), scales=(0.5,), activations=("identity", "gelu")
    )
    table = draws.statistics(initial, "length").set_index("activation")
    assert table.predicted["identity"] == pytest.approx(4 / 3)
    assert np.isnan(table.predicted["gelu"])
    assert any("Identity, |z*|²" in f.text for f in draws.agreement(initial))


def test_a_draw_that_failed_is_no_statistic():
    initial = study_tables.initial(families=("dense",), scales=(0.5,), activations=("tanh",))
    initial.at[0, "length"] = None
    assert draws.statistics(initial, "length").empty
    assert list(draws.spread(initial)) == []
