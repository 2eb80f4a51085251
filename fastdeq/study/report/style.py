"""Colours, sizes and axes that the pictures of the study share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

# Colours that readers with red-green blindness tell apart (Okabe and Ito), a marker for print.
FAMILY_STYLE = {
    "dense": ("#D55E00", "o"),
    "orthogonal": ("#0072B2", "s"),
    "symmetric": ("#009E73", "^"),
}
_OTHER = ("#666666", "D")
WIDTH = 8.6  # inches
DPI = 110
_FARTHEST = 1e30

SETTINGS = {
    "font.size": 10.0,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.5",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.9",
    "xtick.color": "0.25",
    "ytick.color": "0.25",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.0,
    "figure.titlesize": 12.5,
    "figure.titleweight": "bold",
}

SCALE_LABEL = {
    "spectral_radius": "weight scale at the start (spectral radius of W)",
    "variance": "entry scale at the start, √(d · variance of an entry of W)",
}


@dataclass(frozen=True)
class Picture:
    """A drawn figure with its file name, without suffix, and its caption."""

    name: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Missing:
    """Why a picture could not be drawn, as a sentence."""

    reason: str


def new_figure(title: str, height: float, legend: bool = True) -> Figure:
    """An empty figure off screen, as wide as the page, with a line for a legend."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    figure.suptitle(title + "\n" * legend, linespacing=1.7)
    return figure


def family_style(family: str) -> tuple[str, str]:
    """Colour and marker."""
    return FAMILY_STYLE.get(family, _OTHER)


def under_title(figure: Figure, handles: Sequence[Line2D]) -> None:
    """A legend for all panels, in the line that :func:`new_figure` leaves free."""
    place = (0.5, 1 - 0.25 / figure.get_figheight())
    legend = figure.legend(
        handles=handles, loc="upper center", bbox_to_anchor=place, ncols=len(handles)
    )
    legend.set_in_layout(False)


def family_legend(figure: Figure, families: Iterable[str], extra: Sequence[Line2D] = ()) -> None:
    """The families under the title."""
    handles = [
        Line2D([], [], color=family_style(f)[0], marker=family_style(f)[1], label=f)
        for f in families
    ]
    handles += extra
    under_title(figure, handles)


def scale_axis(axes: Any, scales: Iterable[float], convention: str = "spectral_radius") -> None:
    """A logarithmic axis with some of the scales as ticks; spectral radii above 1 are shaded.

    There plain iteration diverges where all slopes are 1.
    """
    scales = sorted(set(scales))
    axes.set_xscale("log", base=2)
    inches = axes.get_position().width * axes.figure.get_figwidth()
    ticks = _ticks(scales, max(2, int(inches / 0.34)))
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{s:g}" for s in ticks])
    low, high = scales[0] / 1.2, scales[-1] * 1.3
    axes.set_xlim(low, high)
    if low < 1 < high and convention == "spectral_radius":
        axes.axvspan(1, high, color="0.5", alpha=0.08, linewidth=0, zorder=0)


def _ticks(scales: Sequence[float], most: int) -> list[float]:
    """Scales that leave room for their labels, powers of two before the others."""
    logs = {s: float(np.log2(s)) for s in scales}
    apart = (logs[scales[-1]] - logs[scales[0]]) / most
    kept: list[float] = []
    for s in sorted(scales, key=lambda s: (abs(logs[s] - round(logs[s])) > 1e-3, abs(logs[s]))):
        if all(abs(logs[s] - logs[k]) >= apart for k in kept):
            kept.append(s)
    return sorted(kept)


def log_values(axes: Any) -> None:
    """A logarithmic y axis with few, plain labels; a linear one where the values are close."""
    low, high = axes.dataLim.intervaly
    low = low if low > 0 else axes.dataLim.minposy
    if not 0 < low < high < np.inf or high < 2.5 * low:
        return
    axes.set_yscale("log")
    decades = np.log10(high / low)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2 else (1,), numticks=8))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def plain(value: float) -> str:
    """A label without trailing zeros; powers of ten from 10,000 on and below 0.001."""
    if value > 0 and not 1e-3 <= value < 1e4:
        return f"10$^{{{np.log10(value):.2g}}}$"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def band(axes: Any, x: Any, rows: Any, family: str, **style: Any) -> None:
    """Median line of ``rows`` (runs x points); band of quartiles, or of all below five runs."""
    rows = np.asarray(rows, dtype=float)
    known = np.isfinite(rows).any(axis=0)
    if not known.any():
        return
    x, rows = np.asarray(x, float)[known], rows[:, known]
    ends = (25, 75) if len(rows) >= 5 else (0, 100)
    rows = np.clip(rows, -_FARTHEST, _FARTHEST)  # between an infinite loss and another is no number
    low, middle, high = np.nanpercentile(rows, (ends[0], 50, ends[1]), axis=0)
    color, marker = family_style(family)
    style = {"marker": marker} | style
    axes.plot(x, middle, color=color, **style)
    axes.fill_between(x, low, high, color=color, alpha=0.16, linewidth=0)


def band_words(seeds: int) -> str:
    """What the bands of :func:`band` show."""
    if seeds < 2:
        return "One seed"
    spread = "quartiles" if seeds >= 5 else "smallest to largest"
    return f"Lines: median over {seeds} seeds; bands: {spread}"
