"""Loss, iterations and residual along training, for a safe scale, the edge and a harsh scale."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from ..evaluation import REGIME_WORDS, SOLVER_WORDS, Evaluation, where
from ..stability import number
from ..style import Missing, Picture, band, band_words, family_legend, new_figure

_ROWS = {
    "trace_loss": ("training loss (nats)", "linear"),
    "trace_forward_iterations": ("forward iterations", "linear"),
    "trace_forward_residual": ("forward residual", "log"),
}


def traces(evaluation: Evaluation) -> Iterator[Picture | Missing]:
    """A picture per task, at its first activation, with a column per scale."""
    runs = evaluation.judged
    if runs.empty or "trace_step" not in runs:
        yield Missing("No run has a trace, so that there is no picture along training.")
        return
    for shown in evaluation.tasks():
        runs = evaluation.select(**shown)
        activation = "tanh" if "tanh" in set(runs["activation"]) else runs["activation"].iloc[0]
        regime = evaluation.values("regime", runs)[0]
        runs = where(runs, activation=activation, regime=regime)
        runs = runs[[_length(steps) > 0 for steps in runs["trace_step"]]]
        if runs.empty:
            yield Missing(f"No run on {shown['task']} has a trace along training.")
            continue
        yield _picture(evaluation, runs, shown | {"activation": activation, "regime": regime})


def chosen_scales(runs: pd.DataFrame) -> list[float]:
    """Up to three scales: half of 1, the first at which a family stops being stable, the next."""
    scales = np.array(sorted(runs["scale"].unique()))
    share = runs.groupby(["weight", "scale"])["stable"].mean().groupby(level="scale").min()
    low = float(scales[np.abs(np.log2(scales) + 1).argmin()])
    unstable = [s for s in share.index[share < 0.5] if s > low]
    edge = float(unstable[0]) if unstable else float(scales[np.abs(np.log2(scales)).argmin()])
    beyond = [s for s in scales if s >= 2 * edge - 1e-9]
    harsh = float(beyond[0]) if beyond else float(scales[-1])
    return sorted({low, edge, harsh})


def _picture(evaluation: Evaluation, runs: pd.DataFrame, shown: dict[str, str]) -> Picture:
    scales = chosen_scales(runs)
    rows = {name: about for name, about in _ROWS.items() if name in runs}
    figure = new_figure(f"Along training, {shown['task']}", 0.9 + 1.95 * len(rows))
    grid = figure.subplots(len(rows), len(scales), sharex=True, sharey="row", squeeze=False)
    families = evaluation.values("weight", runs)
    tolerance = float(runs["tol"].max()) if "tol" in runs else np.nan
    # Saturated states have residuals down to 0: how far below the tolerance says nothing.
    floor = tolerance / 10 if np.isfinite(tolerance) else 1e-8
    for i, (name, (label, kind)) in enumerate(rows.items()):
        for j, scale in enumerate(scales):
            axes = grid[i, j]
            at = runs[np.isclose(runs["scale"], scale)]
            for family in families:
                x, values = aligned(at[at["weight"] == family], name)
                if len(values):
                    values = np.maximum(values, floor) if kind == "log" else values
                    band(axes, x, values, family, marker="", linewidth=1.6)
            if i == 0:
                axes.set_title(f"scale {number(scale)}")
        grid[i, 0].set_ylabel(label)
        grid[i, 0].set_yscale(kind)
    if "trace_forward_residual" in rows and np.isfinite(tolerance):
        for axes in grid[list(rows).index("trace_forward_residual")]:
            axes.axhline(tolerance, color="0.4", linestyle=":", linewidth=1.2)
    figure.supxlabel("training step", fontsize="medium")
    family_legend(figure, families)
    solver = SOLVER_WORDS.get(shown["solver"], shown["solver"])
    return Picture(
        f"traces_{shown['task']}",
        f"Loss, iterations per solve and relative residual along training ({shown['activation']}, "
        f"{solver}, {shown['gradient']} gradient, "
        f"{REGIME_WORDS.get(shown['regime'], shown['regime'])}). Dotted: the tolerance; smaller "
        "residuals than a tenth of it are drawn there. "
        f"{band_words(runs['seed'].nunique())}.",
        figure,
    )


def aligned(runs: pd.DataFrame, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and a row per run; those whose steps differ are interpolated to the longest run's.

    A run that ended early is unknown (NaN) beyond its last step.
    """
    pairs = [
        (np.asarray(s, float), np.asarray(v, float))
        for s, v in zip(runs["trace_step"], runs[name], strict=True)
        if _length(s) and _length(s) == _length(v)
    ]
    if not pairs:
        return np.empty(0), np.empty((0, 0))
    steps = max((s for s, _ in pairs), key=lambda s: s[-1])
    return steps, np.array([np.interp(steps, s, v, right=np.nan) for s, v in pairs])


def _length(values: object) -> int:
    return len(values) if hasattr(values, "__len__") else 0
