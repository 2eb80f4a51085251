"""Eigenvalues of W and of the Jacobian in the complex plane, before and after training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.patches import Circle

from ..evaluation import REGIME_WORDS, Evaluation, where
from ..stability import number
from ..style import Missing, Picture, family_style, new_figure, under_title

_KINDS = {"weight": "W", "jacobian": "J = D W"}


def spectra(evaluation: Evaluation) -> Iterator[Picture | Missing]:
    """A picture for a safe and for a harsh scale of the main setting, per regime."""
    none = Missing("No run stored its spectra, so that there is no picture of eigenvalues.")
    runs = evaluation.judged
    if runs.empty or "weight_before" not in runs:
        yield none
        return
    stored = runs[[complex_values(v) is not None for v in runs["weight_before"]]]
    if stored.empty:
        yield none
        return
    for column in ("task", "gradient", "solver", "activation"):
        main = evaluation.main[column]
        options = evaluation.values(column, stored)
        stored = stored[stored[column] == (main if main in options else options[0])]
    for regime in evaluation.values("regime", stored):
        part = where(stored, regime=regime)
        for scale in _safe_and_harsh(part):
            yield _picture(evaluation, part[np.isclose(part["scale"], scale)], scale, regime)


def complex_values(interleaved: object) -> np.ndarray | None:
    """Eigenvalues from interleaved real and imaginary parts; None where there are none."""
    if not hasattr(interleaved, "__len__") or not len(interleaved) or len(interleaved) % 2:
        return None
    values = np.ascontiguousarray(interleaved, dtype=float).view(complex)
    return values if np.isfinite(values).all() else None


def _safe_and_harsh(runs: pd.DataFrame) -> list[float]:
    """The scales nearest 0.7 and 2.8 at which most families have spectra."""
    count = runs.groupby("scale")["weight"].nunique()
    scales = count.index[count == count.max()].to_numpy(float)
    return sorted({float(scales[np.abs(np.log2(scales) - t).argmin()]) for t in (-0.5, 1.5)})


def _picture(evaluation: Evaluation, runs: pd.DataFrame, scale: float, regime: str) -> Picture:
    families = evaluation.values("weight", runs)
    about = runs.iloc[0]
    figure = new_figure(
        f"Spectra at scale {number(scale)}, {about['task']}, {about['activation']}", 6.4
    )
    grid = figure.subplots(2, 3, squeeze=False)
    for i, (kind, words) in enumerate(_KINDS.items()):
        starts, shown = [], []
        for j, family in enumerate(families[:3]):
            run = runs[runs["weight"] == family].iloc[0]
            before, after = (complex_values(run.get(f"{kind}_{w}")) for w in ("before", "after"))
            starts.append(before)
            shown.append(after)
            _panel(grid[i, j], before, after, family)
            grid[i, j].set_title(f"{family}: {words}\n{_radii(before, after)}")
        reach = 1.12 * _reach(starts, shown)
        for j, axes in enumerate(grid[i, : len(shown)]):
            outside = int((np.abs(shown[j]) > reach).sum()) if shown[j] is not None else 0
            if outside:
                axes.text(
                    0.5, 0.02, f"{outside} after training lie outside", ha="center",
                    transform=axes.transAxes, fontsize="small", color=family_style(families[j])[0],
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
                )  # fmt: skip
            axes.set_xlim(-reach, reach)
            axes.set_ylim(-reach, reach)
            axes.set_aspect("equal")
    for axes in grid[:, len(families[:3]) :].flat:
        axes.set_visible(False)
    handles = [
        Line2D([], [], marker="o", linestyle="", color="0.6", markersize=5, label="before"),
        Line2D(
            [],
            [],
            marker="o",
            linestyle="",
            color="0.1",
            markersize=5,
            label="after training (colour)",
        ),
        Line2D([], [], color="0.3", linewidth=1, label="unit circle"),
    ]
    under_title(figure, handles)
    return Picture(
        f"spectra_{regime}_{number(scale).replace('.', '_')}",
        "Eigenvalues before (grey) and after training (colour) in the complex plane, of W and of "
        "the Jacobian at the equilibrium of one test sample "
        f"({REGIME_WORDS.get(regime, regime)}; seed {about['seed']}). Plain iteration converges "
        "near the equilibrium if all eigenvalues of J lie inside the unit circle.",
        figure,
    )


def _reach(before: list[np.ndarray | None], after: list[np.ndarray | None]) -> float:
    """Half the side of the panels: all before training, and what did not explode after it."""
    start = max([1.0, *(float(np.abs(v).max()) for v in before if v is not None)])
    end = max([1.0, *(float(np.abs(v).max()) for v in after if v is not None)])
    return max(start, min(end, 2 * start))


def _panel(axes: Any, before: np.ndarray | None, after: np.ndarray | None, family: str) -> None:
    axes.add_patch(Circle((0, 0), 1, fill=False, color="0.3", linewidth=1))
    color = family_style(family)[0]
    for values, style in (
        (before, {"color": "0.6", "s": 12}),
        (after, {"color": color, "s": 11}),
    ):
        if values is not None:
            axes.scatter(values.real, values.imag, linewidths=0, **style)


def _radius(values: np.ndarray) -> str:
    radius = float(np.abs(values).max())
    return f"{radius:.2f}" if radius < 1000 else f"{radius:.0e}"


def _radii(before: np.ndarray | None, after: np.ndarray | None) -> str:
    start, end = ("?" if v is None else _radius(v) for v in (before, after))
    return f"radius {start} → {end}"
