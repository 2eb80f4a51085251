"""What differs between families at the start: spread over draws, and theory over measurement."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from ..criteria import ACTIVATIONS, FAMILIES, ordered
from ..draws import FEWEST, QUANTITIES, statistics, values
from ..predictions import predict
from ..stability import number
from ..style import (
    Missing,
    Picture,
    family_legend,
    family_style,
    log_values,
    new_figure,
    plain,
    scale_axis,
)

_VIOLINS = 5  # scales in a panel
_BESIDE = 1.03  # from one family's markers to the next, so that none hides another's bars


def moments(initial: pd.DataFrame) -> Iterator[Picture | Missing]:
    """Distributions, their coefficient of variation, and a picture per activation of all means."""
    table = statistics(initial, "length") if len(initial) else pd.DataFrame()
    if table.empty:
        yield Missing(
            "There are no draws of initial weights, so that there are no pictures of their "
            "statistics."
        )
        return
    activations = ordered(table["activation"], ACTIVATIONS)
    families = ordered(table["weight"], FAMILIES)
    yield _distributions(initial, activations, families)
    yield _variation(table, activations, families)
    for activation in activations:
        yield _means(initial[initial["activation"] == activation], activation, families)


def _panels(title: str, count: int, height: float, **shared: Any) -> tuple[Any, Any, Any]:
    columns = min(count, 2)
    lines = -(-count // columns)
    figure = new_figure(title, 0.9 + height * lines)
    grid = figure.subplots(lines, columns, squeeze=False, **shared)
    for axes in list(grid.flat)[count:]:
        axes.set_visible(False)
    return figure, grid, list(grid.flat)[:count]


def _distributions(initial: pd.DataFrame, activations: list[str], families: list[str]) -> Picture:
    figure, grid, panels = _panels("|z*|² / |c|² over draws of W", len(activations), 2.7)
    for axes, activation in zip(panels, activations, strict=True):
        rows = initial[initial["activation"] == activation]
        rows = rows[[len(values(r, "length")) >= FEWEST for r in rows.itertuples()]]
        scales = _spread_out(sorted(rows["scale"].unique()))
        for row in rows.itertuples():
            if row.scale not in scales:
                continue
            place = scales.index(row.scale)
            place += (families.index(row.weight) - (len(families) - 1) / 2) * 0.27
            _violin(axes, place, np.log10(values(row, "length")), family_style(row.weight)[0])
        axes.set_xticks(range(len(scales)), [number(s) for s in scales])
        axes.grid(axis="x", visible=False)
        axes.set_title(activation)
        ticks = _round_values(*axes.get_ylim())
        axes.set_yticks(np.log10(ticks), [plain(t) for t in ticks])
    for axes in grid[:, 0]:
        axes.set_ylabel("|z*|² / |c|²")
    figure.supxlabel("weight scale (spectral radius of W)", fontsize="medium")
    family_legend(figure, families)
    return Picture(
        "lengths",
        "How long the equilibrium is, relative to the injection, over independent draws of W "
        f"({int(initial['draws'].max())} per cell). Shapes: density on a logarithmic axis; bars: "
        "middle half; dots: median. Families with equal means differ in their spread, which "
        "comes from higher moments of W.",
        figure,
    )


def _round_values(low: float, high: float) -> list[float]:
    """Values with one digit between powers of ten: few where there are many to choose from."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    choices: list[tuple[float, ...]] = [(1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 5, 6, 7, 8, 9)]
    for digits in choices:
        values = [d * 10.0**k for k in decades for d in digits]
        values = [v for v in values if low <= math.log10(v) <= high]
        if len(values) >= 3:
            break
    return values


def _violin(axes: Any, place: float, logs: np.ndarray, color: str) -> None:
    logs = logs[np.isfinite(logs)]
    if len(logs) > 1 and np.ptp(logs) > 1e-9:
        parts = axes.violinplot(logs, [place], widths=0.25, showextrema=False)
        for body in parts["bodies"]:
            body.set(facecolor=color, edgecolor=color, alpha=0.4)
    if len(logs):
        low, middle, high = np.quantile(logs, (0.25, 0.5, 0.75))
        axes.plot([place, place], [low, high], color=color, linewidth=2.4)
        axes.plot(place, middle, "o", color="white", markeredgecolor=color, markersize=3.5)


def _spread_out(scales: list[float]) -> list[float]:
    """At most ``_VIOLINS`` of the scales, evenly spread, with both ends."""
    if len(scales) <= _VIOLINS:
        return scales
    picked = np.linspace(0, len(scales) - 1, _VIOLINS).round().astype(int)
    return [scales[i] for i in picked]


def _variation(table: pd.DataFrame, activations: list[str], families: list[str]) -> Picture:
    figure, grid, panels = _panels(
        "Coefficient of variation of |z*|² / |c|²", len(activations), 2.3, sharey=True
    )
    for axes, activation in zip(panels, activations, strict=True):
        here = table[table["activation"] == activation]
        for family in families:
            rows = here[here["weight"] == family]
            color, marker = family_style(family)
            axes.plot(rows["scale"], rows["variation"], color=color, marker=marker)
            axes.fill_between(
                rows["scale"], rows["variation_low"], rows["variation_high"], color=color,
                alpha=0.16, linewidth=0,
            )  # fmt: skip
        axes.set_title(activation)
        scale_axis(axes, here["scale"])
    log_values(grid[0, 0])
    for axes in grid[:, 0]:
        axes.set_ylabel("std / mean over draws")
    figure.supxlabel("weight scale (spectral radius of W)", fontsize="medium")
    family_legend(figure, families)
    return Picture(
        "variation",
        "How much one draw of the weights differs from the next: standard deviation over mean of "
        "|z*|² / |c|². Bands: 95 % bootstrap intervals over draws. A large value means that the "
        "same scale can be harmless in one run and harmful in the next.",
        figure,
    )


def _means(initial: pd.DataFrame, activation: str, families: list[str]) -> Picture | Missing:
    tables = {q: statistics(initial, q) for q in QUANTITIES}
    tables = {q: t for q, t in tables.items() if not t.empty}
    if activation == "identity":
        tables.pop("mean_square_slope", None)  # 1 by definition
    if not tables:
        return Missing(f"No draw with {activation} has finite statistics.")
    columns = min(3, len(tables))
    lines = -(-len(tables) // columns)
    figure = new_figure(f"Theory over measurement, {activation}", 0.9 + 2.45 * lines)
    grid = figure.subplots(lines, columns, squeeze=False)
    drawn = False
    for axes, (quantity, table) in zip(grid.flat, tables.items(), strict=False):
        for family in families:
            rows = table[table["weight"] == family]
            color, marker = family_style(family)
            bars = np.abs(np.array([rows["mean"] - rows["low"], rows["high"] - rows["mean"]]))
            beside = _BESIDE ** (families.index(family) - (len(families) - 1) / 2)
            axes.errorbar(
                rows["scale"] * beside, rows["mean"], bars, color=color, marker=marker,
                linestyle="", elinewidth=1, alpha=0.9,
            )  # fmt: skip
            drawn |= _curve(axes, quantity, family, activation, initial, 3 * table["high"].max())
        axes.set_title(QUANTITIES[quantity])
        scale_axis(axes, table["scale"])
        log_values(axes)
    for axes in list(grid.flat)[len(tables) :]:
        axes.set_visible(False)
    figure.supxlabel("weight scale (spectral radius of W)", fontsize="medium")
    line = Line2D([], [], color="0.3", label="theory, large d")
    family_legend(figure, families, [line] if drawn else [])
    about = "Lines: the limit of large d (fastdeq.theory). " if drawn else ""
    return Picture(
        f"means_{activation}",
        f"Measured means over draws of W with {activation} (d = {int(initial['features'].max())}; "
        "bars: 5 % to 95 % of the draws; families stand side by side, at the same scales). "
        f"{about}m_p is the mean of the p-th power of the squared "
        "singular values of (I − J)⁻¹, which also stretch the gradient.",  # noqa: RUF001
        figure,
    )


def _curve(
    axes: Any, quantity: str, family: str, activation: str, initial: pd.DataFrame, most: float
) -> bool:
    """The prediction over the scales, up to ``most`` where it diverges; whether there is one."""
    scales = np.geomspace(initial["scale"].min(), initial["scale"].max(), 40)
    injection = float(initial["injection_variance"].iloc[0])
    curve = [predict(quantity, family, float(s), activation, injection) for s in scales]
    known = [(s, v) for s, v in zip(scales, curve, strict=True) if v is not None and v <= most]
    if not known:
        return False
    axes.plot(*zip(*known, strict=True), color=family_style(family)[0], linewidth=1.2, alpha=0.8)
    return True
