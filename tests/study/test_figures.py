"""What the pictures of the study are drawn from, and that each shows its families."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import study_tables

pytest.importorskip("matplotlib")

from matplotlib.colors import to_rgb

from fastdeq import theory
from fastdeq.study.report import predictions
from fastdeq.study.report.draws import QUANTITIES
from fastdeq.study.report.evaluation import Evaluation
from fastdeq.study.report.figures import curves, edges, maps, moments, spectra, traces
from fastdeq.study.report.style import FAMILY_STYLE, Missing, Picture, _ticks, band, new_figure

NOTHING = pd.DataFrame()


@pytest.fixture(scope="module")
def evaluation():
    runs = study_tables.training(solvers=("picard", "auto"), spread=0.5, details=True)
    return Evaluation(runs, study_tables.initial())


def pixels(figure):
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3] / 255


def shows(image, colour, least=40):
    near = np.abs(image - np.array(to_rgb(colour))).max(-1) < 0.03
    return near.sum() > least


KINDS = {
    "hero": edges.hero,
    "variance": edges.by_variance,
    "curves": lambda e: curves.curves(e, "spectral_radius"),
    "traces": traces.traces,
    "spectra": spectra.spectra,
    "moments": lambda e: moments.moments(e.initial),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_is_drawn(kind, evaluation):
    drawn = list(KINDS[kind](evaluation))[:2]
    assert drawn
    for picture in drawn:
        assert isinstance(picture, Picture)
        assert picture.caption.endswith(".")
        image = pixels(picture.figure)
        for family, (colour, _) in FAMILY_STYLE.items():
            assert shows(image, colour), (picture.name, family)


@pytest.mark.parametrize("kind", [*KINDS, "map", "gradient"])
def test_without_data_a_sentence_says_what_is_missing(kind):
    kinds = KINDS | {"map": maps.stability_maps, "gradient": edges.by_gradient}
    empty = Evaluation(NOTHING, NOTHING)
    drawn = list(kinds[kind](empty))
    assert all(isinstance(item, Missing) and item.reason.endswith(".") for item in drawn)
    assert drawn or kind == "variance"


def test_names_of_pictures_are_distinct(evaluation):
    names = [p.name for draw in KINDS.values() for p in draw(evaluation)]
    assert len(set(names)) == len(names)


def test_the_map_shows_shares(evaluation):
    (picture,) = maps.stability_maps(evaluation)
    axes = picture.figure.axes[0]
    labels = [t.get_text() for t in axes.get_yticklabels()]
    assert labels[:2] == ["dense, picard", "dense, auto"]
    assert len(labels) == 2 + 2 * 2 * 2
    table = axes.collections[0].get_array().reshape(len(labels), -1)
    # Dense: stable up to 1, and at the square root of 2 for the two of five seeds that are odd.
    assert list(table[0]) == [1, 1, 1, 1, 1, 0.4, 0, 0, 0, 0, 0]


def test_the_hero_marks_what_the_grid_cuts_off_and_what_is_empty():
    runs = study_tables.training({"dense": -9.0, "orthogonal": 9.0}, regimes=("initialised",))
    (picture,) = edges.hero(Evaluation(runs, NOTHING))
    axes = picture.figure.axes[0]
    markers = [line.get_marker() for line in axes.lines]
    assert "x" in markers
    assert "s" in markers
    assert len([t for t in axes.texts if getattr(t, "arrow_patch", None)]) == 1


def test_scales_for_the_traces_are_safe_at_the_edge_and_harsh():
    runs = Evaluation(study_tables.training(), NOTHING).judged
    assert traces.chosen_scales(runs) == pytest.approx([0.5, 2**0.5, 2 * 2**0.5])
    good = Evaluation(study_tables.training({"dense": 9.0}, scales=(0.5, 1, 2)), NOTHING).judged
    assert traces.chosen_scales(good) == pytest.approx([0.5, 1, 2])


def test_traces_of_different_length_are_aligned():
    runs = pd.DataFrame(
        {
            "trace_step": [[1, 3, 5], [1, 5, 9], None, [1, 2]],
            "trace_loss": [[3.0, 2.0, 1.0], [3.0, 1.0, 0.0], None, [1.0]],
        }
    )
    steps, values = traces.aligned(runs, "trace_loss")
    assert list(steps) == [1, 5, 9]
    np.testing.assert_allclose(values, [[3, 1, np.nan], [3, 1, 0]])


def test_eigenvalues_are_read_from_interleaved_parts():
    np.testing.assert_allclose(spectra.complex_values([1, 2, 3, 4]), [1 + 2j, 3 + 4j])
    for broken in (None, [], [1.0], [np.nan, 1.0]):
        assert spectra.complex_values(broken) is None


def test_an_exploded_spectrum_does_not_hide_the_unit_circle():
    runs = study_tables.training({"dense": 9.0}, scales=(2.0,), details=True)
    runs.at[0, "weight_after"] = [1e9, 0.0, 1.0, 0.0]
    (picture,) = spectra.spectra(Evaluation(runs, NOTHING))
    axes = picture.figure.axes[0]
    assert axes.get_xlim()[1] < 5
    assert "1 after training lie outside" in [t.get_text() for t in axes.texts]
    assert "1e+09" in axes.get_title()


@pytest.mark.parametrize("most", [2, 4, 7])
def test_ticks_leave_room_and_keep_powers_of_two(most):
    scales = [0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.2, 2.0, 4.0]
    ticks = _ticks(scales, most)
    assert 1.0 in ticks
    assert len(ticks) <= most + 1
    assert np.diff(np.log2(ticks)).min() >= 4 / most - 1e-9


# Predictions


def test_predictions_of_the_linear_model():
    assert predictions.predict("length", "dense", 0.5, "identity", 1.0) == pytest.approx(4 / 3)
    assert predictions.predict("moment_2", "dense", 0.5, "identity", 1.0) == pytest.approx(
        (4 / 3) ** 4
    )
    assert predictions.predict("radius", "symmetric", 1.5, "identity", 1.0) == 1.5
    assert predictions.predict("resolvent", "orthogonal", 0.5, "identity", 1.0) == 2
    for quantity, scale, activation in (
        ("length", 1.0, "identity"),
        ("resolvent", 0.5, "tanh"),
        ("resolvent", 1.0, "identity"),
        ("length", 0.5, "gelu"),
    ):
        assert predictions.predict(quantity, "dense", scale, activation, 1.0) is None


def test_mean_field_gives_lengths_relative_to_the_injection_and_nothing_where_unstable():
    found = theory.equilibrium("dense", "relu", 0.5, 2.0)
    values = {
        q: predictions.predict(q, "dense", 0.5, "relu", 2.0) for q in (*QUANTITIES, "adjoint")
    }
    assert values["length"] == found.length / 2
    assert values["moment_1"] == values["adjoint"] == found.adjoint_variance
    assert values["radius"] == found.jacobian_radius
    assert values["mean_square_slope"] == found.mean_square_slope
    assert values["moment_2"] is None
    # Beyond the edge at sqrt(2), and where no length is finite.
    for scale in (1.41425, 9.0):
        assert predictions.predict("length", "dense", scale, "relu", 2.0) is None


def test_another_theory_can_be_plugged_in(monkeypatch):
    monkeypatch.setitem(
        predictions.PREDICTORS, "tanh", lambda quantity, weight, scale, injection: 7 * injection
    )
    assert predictions.predict("length", "dense", 0.5, "tanh", 2.0) == 14
    drawn = {p.name: p for p in moments.moments(study_tables.initial())}
    assert "the limit of large d" in drawn["means_tanh"].caption


def test_a_band_of_losses_some_of_which_are_infinite_warns_of_nothing(recwarn):
    axes = new_figure("", 3.0).subplots()
    rows = [[1.0, np.inf], [2.0, np.inf], [3.0, 1.0], [4.0, np.inf], [np.inf, 2.0]]
    band(axes, [0.5, 1.0], rows, "dense")
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]
    assert axes.lines[0].get_ydata()[0] == 3.0
