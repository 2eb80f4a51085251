"""Accuracy and loss against the weight scale, with bands over seeds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import PercentFormatter

from ..criteria import CONVENTIONS
from ..evaluation import REGIME_WORDS, SOLVER_WORDS, Evaluation, where
from ..style import (
    SCALE_LABEL,
    Missing,
    Picture,
    band,
    band_words,
    family_legend,
    new_figure,
    scale_axis,
)

_METRICS = {"test_accuracy": "test accuracy", "test_loss": "final test loss"}
_LARGEST_LOSS = 100.0  # nats, 40 times that of a guess
_NAMES = {"test_accuracy": "accuracy", "test_loss": "loss"}


def curves(evaluation: Evaluation, convention: str) -> Iterator[Picture | Missing]:
    """A picture per task and metric, with a panel per activation and regime."""
    if evaluation.judged.empty:
        yield Missing("There are no training runs, so that there are no curves of accuracy.")
        return
    for shown in evaluation.tasks():
        for metric in _METRICS:
            if convention == "spectral_radius" or metric == "test_accuracy":
                yield _picture(evaluation, shown, metric, convention)


def _picture(
    evaluation: Evaluation, shown: dict[str, str], metric: str, convention: str
) -> Picture | Missing:
    runs = evaluation.select(**shown)
    task = shown["task"]
    words = _METRICS[metric]
    if not np.isfinite(runs[metric]).any():
        return Missing(f"No run on {task} has a finite {words}.")
    activations = evaluation.values("activation", runs)
    regimes = evaluation.values("regime", runs)
    # With one activation the regimes stand side by side.
    flip = len(activations) == 1
    rows, columns = (activations, regimes) if flip else (regimes, activations)
    figure = new_figure(f"{words.capitalize()} after training, {task}", 0.9 + 2.5 * len(rows))
    grid = figure.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            activation, regime = (row, column) if flip else (column, row)
            axes = grid[i, j]
            axes.set_title(f"{activation}, {regime}")
            part = where(runs, activation=activation, regime=regime)
            _panel(axes, part, metric, convention, evaluation)
            scale_axis(axes, runs[CONVENTIONS[convention]], convention)
        grid[i, 0].set_ylabel(words + (" (nats)" if metric == "test_loss" else ""))
    exploded = False
    if metric == "test_accuracy":
        grid[0, 0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        grid[0, 0].set_ylim(top=min(1.02, runs[metric].max() + 0.03))
    else:
        grid[0, 0].set_yscale("log")
        # Runs that explode would press all others into a line.
        exploded = bool((runs[metric] > _LARGEST_LOSS).any())
        if exploded:
            grid[0, 0].set_ylim(0.7 * runs[metric].min(), _LARGEST_LOSS)
    figure.supxlabel(SCALE_LABEL[convention], fontsize="medium")
    family_legend(figure, evaluation.values("weight", runs))
    words_of_regimes = "; ".join(f"{r}: {REGIME_WORDS.get(r, r)}" for r in regimes)
    variance = "_variance" if convention == "variance" else ""
    return Picture(
        f"{_NAMES[metric]}_{task}{variance}",
        f"{words.capitalize()} with {SOLVER_WORDS.get(shown['solver'], shown['solver'])} and the "
        f"{shown['gradient']} gradient ({words_of_regimes}). "
        f"{band_words(runs['seed'].nunique())}. Dense weights have no structure to keep: the same "
        "runs stand in both regimes."
        + f" Losses above {_LARGEST_LOSS:g} nats lie beyond the top."
        * exploded,
        figure,
    )


def _panel(
    axes: Any, runs: pd.DataFrame, metric: str, convention: str, evaluation: Evaluation
) -> None:
    if runs.empty:
        axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", color="0.6")
        return
    for family in evaluation.values("weight", runs):
        table = runs[runs["weight"] == family].pivot_table(
            index="seed", columns=CONVENTIONS[convention], values=metric
        )
        band(axes, table.columns.to_numpy(float), table.to_numpy(), family)
