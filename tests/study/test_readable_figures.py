"""Pictures that stay readable: ticks apart, and no axis stretched by runs that exploded."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import study_tables

pytest.importorskip("matplotlib")

from fastdeq.study.report.evaluation import Evaluation
from fastdeq.study.report.figures import curves, edges, maps
from fastdeq.study.report.figures.moments import _round_values

MANY = tuple(2.0 ** (k / 4) for k in range(-8, 21))  # 0.25 to 32


def evaluation(**options):
    return Evaluation(study_tables.training(**options), pd.DataFrame())


def overlaps(figure, axes):
    figure.canvas.draw()
    boxes = [t.get_window_extent() for t in axes.get_xticklabels() if t.get_text()]
    boxes = sorted(boxes, key=lambda b: b.x0)
    return [a for a, b in itertools.pairwise(boxes) if a.x1 > b.x0]


@pytest.mark.parametrize("scales", [(0.25, 0.5, 0.7, 1.0), MANY[::2]], ids=["few", "many"])
def test_scales_below_a_map_do_not_touch(scales):
    activations = ("identity", "tanh", "relu")
    (picture,) = maps.stability_maps(evaluation(scales=scales, activations=activations))
    for axes in picture.figure.axes[:3]:
        assert not overlaps(picture.figure, axes)


def test_scales_far_above_all_edges_are_left_out():
    """Edges end at 4; the next two octaves are shown, and the grid's end at 32 is not."""
    (picture,) = edges.hero(evaluation(scales=MANY))
    low, high = picture.figure.axes[0].get_xlim()
    assert low < 0.25
    assert 16 < high < 32
    (whole,) = edges.hero(evaluation(edges={"dense": 9.0}, scales=MANY))
    assert whole.figure.axes[0].get_xlim()[1] > 32


def test_a_loss_that_explodes_does_not_flatten_the_others():
    runs = study_tables.training()
    finite = next(p for p in curves.curves(Evaluation(runs, pd.DataFrame()), "spectral_radius")
                  if p.name.startswith("loss"))  # fmt: skip
    assert "beyond the top" not in finite.caption
    runs.loc[runs.scale > 4, "test_loss"] = 1e30
    picture = next(p for p in curves.curves(Evaluation(runs, pd.DataFrame()), "spectral_radius")
                   if p.name.startswith("loss"))  # fmt: skip
    low, high = picture.figure.axes[0].get_ylim()
    assert low < 0.1 < 1.5 < high == 100
    assert "above 100 nats lie beyond the top" in picture.caption


@pytest.mark.parametrize(
    ("low", "high", "values"),
    [(0.33, 0.69, [0.4, 0.5, 0.6]), (0.31, 23, [1, 3, 10]), (1, 9000, [1, 10, 100, 1000])],
)
def test_round_values(low, high, values):
    assert _round_values(np.log10(low), np.log10(high)) == pytest.approx(values)
