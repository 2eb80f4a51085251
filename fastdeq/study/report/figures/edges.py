"""Ranges of stable scales with their intervals, a row per setting: the result in one picture."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ..criteria import CONVENTIONS
from ..evaluation import Evaluation, where
from ..style import (
    SCALE_LABEL,
    Missing,
    Picture,
    family_legend,
    family_style,
    new_figure,
    scale_axis,
)

_ROW = 0.56  # inches per row


def hero(evaluation: Evaluation) -> Iterator[Picture | Missing]:
    """The first picture of the report: all activations and tasks with the main gradient."""
    table = evaluation.table()
    if table.empty:
        yield Missing("There are no training runs, so that no range of stable scales is known.")
        return
    gradient = evaluation.main["gradient"]
    table = table[table["gradient"] == gradient]
    figure = draw(evaluation, table, ("solver", "regime"), "spectral_radius")
    yield Picture(
        "ranges",
        "Scales at which training is stable (learns and solves). Light bars: median range; "
        "markers: its upper edge with the 95 % interval over seeds, which begins at the left where "
        "some seeds have no stable scale. A bar that starts at the left or ends in an arrow "
        "reaches the end of the grid; scales far above all edges are not shown. Shaded: spectral "
        "radius above 1. picard: plain iteration; anderson: Anderson acceleration; auto: fastdeq's "
        "own choice, which uses the structure where it is kept. initialised: W has the structure "
        "only at the start; kept: it keeps it in training (dense weights have none to keep).",
        figure,
    )


def by_variance(evaluation: Evaluation) -> Iterator[Picture | Missing]:
    """The same, with scales measured by the variance of an entry."""
    table = evaluation.table(convention="variance")
    if table.empty:
        return
    table = table[table["gradient"] == evaluation.main["gradient"]]
    yield Picture(
        "ranges_variance",
        "The same ranges with weights of equal entry variance side by side. At equal variance, "
        "symmetric weights have twice the spectral radius of the others. The grids of the "
        "families may begin and end at different entry scales.",
        draw(
            evaluation, table, ("solver", "regime"), "variance", "Stable ranges at equal variance"
        ),
    )


def by_gradient(evaluation: Evaluation) -> Iterator[Picture | Missing]:
    """Rows for the gradients, where there is more than one."""
    table = evaluation.table()
    gradients = evaluation.values("gradient")
    if len(gradients) < 2:
        yield Missing("All runs have the same kind of gradient, so that there is no comparison.")
        return
    # Settings that were run with every gradient.
    keys = ["task", "activation", "solver", "regime", "weight"]
    complete = table.groupby(keys)["gradient"].transform("nunique") == len(gradients)
    if not complete.any():
        yield Missing("No setting was run with more than one kind of gradient.")
        return
    yield Picture(
        "ranges_gradient",
        "Ranges with implicit and phantom gradients, for settings that were run with both. A "
        "phantom gradient needs no backward solve that could fail.",
        draw(
            evaluation,
            table[complete],
            ("solver", "regime", "gradient"),
            "spectral_radius",
            "Stable ranges by gradient",
        ),
    )


def draw(
    evaluation: Evaluation,
    table: pd.DataFrame,
    rows: tuple[str, ...],
    convention: str,
    title: str = "Where training is stable",
) -> Figure:
    """A panel per task and activation; a row per value of ``rows``, a bar per family."""
    panels = [
        (task, activation)
        for task in evaluation.values("task", table)
        for activation in evaluation.values(
            "activation", table[table["task"] == task]
        )
    ]  # fmt: skip
    keys = evaluation.combinations(table, rows)
    families = evaluation.values("weight", table)
    scales = evaluation.judged[CONVENTIONS[convention]]
    # Without the scales far above all edges, where nothing is drawn.
    scales = scales[scales <= 4.01 * max(float(table["upper_high"].max()), float(scales.min()))]
    columns = min(len(panels), 4)
    lines = -(-len(panels) // columns)
    figure = new_figure(title, 1.3 + lines * (0.7 + _ROW * len(keys)))
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axes, (task, activation) in zip(grid.flat, panels, strict=False):
        shown = table[(table["task"] == task) & (table["activation"] == activation)]
        axes.set_title(f"{task}, {activation}")
        scale_axis(axes, scales, convention)
        axes.grid(axis="y", visible=False)
        for y, key in enumerate(keys):
            row = where(shown, **dict(zip(rows, key, strict=True)))
            if y:
                axes.axhline(y - 0.5, color="0.8", linewidth=0.8, zorder=0)
            if row.empty:
                axes.text(
                    0.5, y, "not run", transform=axes.get_yaxis_transform(), color="0.6",
                    ha="center", va="center", fontsize="small",
                )  # fmt: skip
            for item in row.itertuples():
                offset = (families.index(item.weight) - (len(families) - 1) / 2) * 0.24
                _range_bar(axes, item, y + offset, scales.min())
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    first = grid[0, 0]
    first.set_yticks(range(len(keys)), [", ".join(key) for key in keys])
    first.set_ylim(len(keys) - 0.5, -0.5)
    figure.supxlabel(SCALE_LABEL[convention], fontsize="medium")
    none = Line2D([], [], color="0.4", marker="x", linestyle="", label="no stable scale")
    extra = [none] if table["none"].any() else []
    family_legend(figure, families, extra)
    return figure


def _range_bar(axes: Any, row: Any, y: float, smallest: float) -> None:
    color, marker = family_style(row.weight)
    if row.none:
        axes.plot(smallest, y, "x", color=color, markersize=6, markeredgewidth=1.8)
        return
    axes.plot(
        [row.lower, row.upper], [y, y], color=color, alpha=0.28, linewidth=6,
        solid_capstyle="butt",
    )  # fmt: skip
    low = max(row.upper_low, smallest)
    axes.plot([low, row.upper_high], [y, y], color=color, linewidth=1.6)
    axes.plot(row.upper, y, marker, color=color, markersize=6)
    if row.at_top:
        axes.annotate(
            "", (row.upper * 1.3, y), (row.upper, y), annotation_clip=False,
            arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.6},
        )  # fmt: skip
