"""Share of stable seeds at every scale, a row per family, regime and solver."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.ticker import PercentFormatter

from ..criteria import FAMILIES
from ..evaluation import Evaluation, where
from ..stability import number
from ..style import SCALE_LABEL, Missing, Picture, family_style, new_figure

_ROW = 0.235  # inches per row
_PANELS = 3  # side by side


def stability_maps(evaluation: Evaluation) -> Iterator[Picture | Missing]:
    """A map per task and gradient, a panel per activation."""
    if evaluation.judged.empty:
        yield Missing("There are no training runs, so that there is no map of stability.")
        return
    for task in evaluation.values("task"):
        for gradient in evaluation.values("gradient", evaluation.select(task=task)):
            yield _map(evaluation, task, gradient)


def _map(evaluation: Evaluation, task: str, gradient: str) -> Picture:
    runs = evaluation.select(task=task, gradient=gradient)
    # Dense runs that count in both regimes are one row here.
    runs = runs[(runs["weight"] != "dense") | (runs["regime"] != "kept")]
    rows = evaluation.combinations(runs, ("weight", "solver", "regime"))
    scales = sorted(runs["scale"].unique())
    activations = evaluation.values("activation", runs)
    columns = min(len(activations), _PANELS)
    lines = -(-len(activations) // columns)
    figure = new_figure(
        f"Share of stable seeds, {task}, {gradient} gradient",
        1.0 + lines * (0.5 + _ROW * len(rows)),
        legend=False,
    )
    grid = figure.subplots(lines, columns, sharey=True, sharex=True, squeeze=False)
    palette = colormaps["YlGnBu"].with_extremes(bad="0.88")
    for axes, activation in zip(grid.flat, activations, strict=False):
        part = where(runs, activation=activation)
        shares = part.groupby(["weight", "solver", "regime", "scale"])["stable"].mean()
        table = np.array([[shares.get((*row, s), np.nan) for s in scales] for row in rows])
        image = axes.pcolormesh(
            np.arange(len(scales) + 1), np.arange(len(rows) + 1), table, cmap=palette, vmin=0,
            vmax=1, edgecolors="white", linewidth=0.8,
        )  # fmt: skip
        axes.set_title(activation)
        _axis(axes, scales)
    for axes in list(grid.flat)[len(activations) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_yticks(np.arange(len(rows)) + 0.5)
        labels = axes.set_yticklabels(_labels(rows), fontsize="small")
        for label, row in zip(labels, rows, strict=True):
            label.set_color(family_style(row[0])[0])
    grid[0, 0].set_ylim(len(rows), 0)
    bar = figure.colorbar(image, ax=grid, fraction=0.03, pad=0.01)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    bar.outline.set_visible(False)
    figure.supxlabel(SCALE_LABEL["spectral_radius"], fontsize="medium")
    return Picture(
        f"map_{task}_{gradient}",
        f"How many of the seeds (up to {runs['seed'].nunique()}) are stable: they learn, they "
        "solve, and no update was lost. Grey: not run. The dotted line marks spectral radius 1.",
        figure,
    )


def _labels(rows: list[tuple[str, ...]]) -> list[str]:
    """Dense weights are one regime alone, which needs no name."""
    return [
        f"{weight}, {solver}" + (f", {regime}" if weight in FAMILIES[1:] else "")
        for weight, solver, regime in rows
    ]


def _axis(axes: Any, scales: list[float]) -> None:
    axes.grid(visible=False)
    axes.tick_params(length=0)
    upright = len(scales) > 7  # side by side the labels would touch
    axes.set_xticks(
        np.arange(len(scales)) + 0.5, [number(s) for s in scales],
        fontsize="x-small" if upright else "small", rotation=90 if upright else 0,
    )  # fmt: skip
    # Between the last scale that is at most 1 and the next.
    below = int(np.sum(np.asarray(scales) <= 1 + 1e-9))
    if 0 < below < len(scales):
        axes.axvline(below, color="0.2", linestyle=":", linewidth=1.4)
