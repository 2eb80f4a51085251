"""The results of a sweep as a table for people and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter
from rich.table import Table

from ..training import Result
from .style import FAMILY_STYLE

_MOSTLY = 0.9  # share of the solves of a point that must converge for a filled marker


def table(results: Sequence[Result]) -> Table:
    """One row per run, less than 80 columns wide; sections by family."""
    shown = Table(caption=_caption(results), caption_justify="left")
    shown.add_column("weight")
    for name in ("scale", "test\nacc", "iter\nfwd", "iter\nbwd", "conv\nfwd", "conv\nbwd", "sec"):
        shown.add_column(name, justify="right")
    previous = None
    for r in results:
        if previous not in (None, r.config.weight):
            shown.add_section()
        previous = r.config.weight
        shown.add_row(
            r.config.weight,
            f"{r.config.scale:g}",
            f"{r.test_accuracy:.1%}",
            f"{r.forward_iterations:.1f}",
            f"{r.backward_iterations:.1f}",
            f"{r.forward_converged:.0%}",
            f"{r.backward_converged:.0%}",
            f"{r.seconds:.1f}",
        )
    return shown


def _caption(results: Sequence[Result]) -> str:
    """What the columns leave out: structure kept, values lost."""
    lines = [
        "iter: mean iterations per sample and solve, in training",
        "conv: share of these solves that met the tolerance",
    ]
    drifts = [r.structure_drift for r in results if r.structure_drift is not None]
    if drifts:
        lines.append(f"largest error of orthogonality or symmetry: {max(drifts):.0e}")
    nonfinite, skipped = (sum(getattr(r, f) for r in results) for f in ("nonfinite", "skipped"))
    if nonfinite or skipped:
        lines.append(f"solves that met NaN or infinity: {nonfinite}; updates left out: {skipped}")
    return "\n".join(lines)


def figure(results: Sequence[Result], path: str | Path) -> Path:
    """Accuracy and iterations against the scale, a line per family, written to ``path``.

    The format follows the suffix (png, pdf, svg). Draws off screen; no global matplotlib state.

    Raises:
        ValueError: no results, or a suffix that matplotlib does not know.
    """
    if not results:
        raise ValueError("no results to draw.")
    drawn = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(drawn)
    left, right = drawn.subplots(1, 2)
    families = dict.fromkeys(r.config.weight for r in results)
    for family in families:
        rows = sorted((r for r in results if r.config.weight == family), key=_scale)
        _line(left, rows, "test_accuracy", "-", family)
        _line(right, rows, "forward_iterations", "-", f"{family}, forward")
        _line(right, rows, "backward_iterations", ":", f"{family}, backward")
    for axes in (left, right):
        _scale_axis(axes, sorted({_scale(r) for r in results}))
    left.set_ylabel("test accuracy")
    left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.set_ylabel("iterations per sample in training, mean")
    right.set_ylim(bottom=0)
    left.legend(loc="lower left", frameon=False)
    right.legend(loc="upper left", frameon=False, fontsize="small")
    drawn.supxlabel(
        f"weight scale at initialisation (spectral radius)\n"
        f"open markers: fewer than {_MOSTLY:.0%} of the solves converged",
        fontsize="medium",
    )
    drawn.savefig(path, dpi=150)
    return Path(path)


def _scale(result: Result) -> float:
    return result.config.scale


def _line(axes: Any, rows: Sequence[Result], field: str, style: str, label: str) -> None:
    color, marker = FAMILY_STYLE[rows[0].config.weight]
    scales = [_scale(r) for r in rows]
    values = [getattr(r, field) for r in rows]
    axes.plot(scales, values, style, color=color, linewidth=1.5)
    share = "backward_converged" if field.startswith("backward") else "forward_converged"
    for r, x, y in zip(rows, scales, values, strict=True):
        face = color if getattr(r, share) >= _MOSTLY else "white"
        axes.plot(x, y, marker, color=color, markerfacecolor=face, markersize=6)
    axes.plot([], [], style, color=color, marker=marker, markersize=6, label=label)


def _scale_axis(axes: Any, scales: Sequence[float]) -> None:
    """A logarithmic axis with the scales themselves as ticks, split at 1.

    Below 1 the map contracts at initialisation in the limit of large width, for slopes up to 1.
    """
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(scales))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{s:g}" for s in scales])
    low, high = scales[0] / 1.15, scales[-1] * 1.15
    axes.set_xlim(low, high)
    axes.grid(alpha=0.25)
    if low < 1:
        axes.text(0.01, 1.01, "safe", transform=axes.transAxes, ha="left", color="0.4")
    if high > 1:
        axes.text(0.99, 1.01, "harsh", transform=axes.transAxes, ha="right", color="0.4")
        axes.axvspan(max(1.0, low), high, color="0.5", alpha=0.1, linewidth=0)
