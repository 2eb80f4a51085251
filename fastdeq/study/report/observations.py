"""What else the runs show: solvers and regimes compared, accuracies, convergence."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from .criteria import REGIMES, SETTING
from .evaluation import REGIME_WORDS, SOLVER_WORDS, Evaluation
from .findings import CONTRADICT, SUPPORT, Finding, Grid, compare, listed, octaves_of
from .stability import number

_PAIRS = (
    ("solver", "picard", "auto"),
    ("solver", "anderson", "auto"),
    ("solver", "picard", "anderson"),
    ("regime", "initialised", "kept"),
    ("gradient", "implicit", "phantom"),
)
_GRADIENT_WORDS = {"implicit": "implicit gradients", "phantom": "phantom gradients"}
_WORDS = SOLVER_WORDS | REGIME_WORDS | _GRADIENT_WORDS
_COLUMNS = [
    "compared", "weight", "regime", "settings", "median change", "smallest to largest", "wider",
    "narrower",
]  # fmt: skip


def pairs(evaluation: Evaluation) -> Iterator[Finding | Grid]:
    """Two solvers, regimes or gradients at a time: a sentence each, and a table of all."""
    rows = []
    for axis, first, second in _PAIRS:
        parts = []
        for family, regime, found in _groups(evaluation, axis, first, second):
            widths = found["width"]
            change, low, high = (
                octaves_of(float(w), plus=True)
                for w in (widths.median(), widths.min(), widths.max())
            )
            counts = [str(int((found["verdict"] == v).sum())) for v in (SUPPORT, CONTRADICT)]
            about = [f"{second} over {first}", family, regime or "both", str(len(found))]
            rows.append([*about, change, f"{low} to {high}", *counts])
            name = family if not regime or family == "dense" else f"{family} ({regime})"
            parts.append(f"{change} for {name}")
        if parts:
            yield Finding(
                f"Median change of the stable range with {_WORDS[second]} over {_WORDS[first]}: "
                f"{listed(parts)} weights."
            )
    yield Grid(
        "Changes of the stable range, and in how many settings they are decided", _COLUMNS, rows
    )


def _groups(
    evaluation: Evaluation, axis: str, first: str, second: str
) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Family, regime ("" where regimes are compared) and comparisons; dense runs once."""
    found = compare(evaluation, axis, first, second)
    for family in evaluation.values("weight"):
        rows = found[found["weight"] == family]
        if axis == "regime":
            if family != "dense" and len(rows):  # dense runs are the same in both
                yield family, "", rows
            continue
        for regime in REGIMES if family != "dense" else REGIMES[:1]:
            part = rows[rows["regime"] == regime]
            if len(part):
                yield family, regime, part


def learning(evaluation: Evaluation) -> Iterator[Finding]:
    """How much wider the range is in which runs learn, whether or not the solves converge."""
    both = evaluation.table().merge(
        evaluation.table("learns"), on=[*SETTING, "weight"], suffixes=("", "_learns")
    )
    more = (both["width_learns"] - both["width"]).groupby(both["weight"]).median()
    parts = [f"{octaves_of(float(more[f]))} for {f}" for f in evaluation.values("weight", both)]
    if parts:
        yield Finding(
            "If accuracy alone is asked for, converged or not, the range is wider by "
            f"{listed(parts)} weights (median over settings)."
        )


def accuracies(evaluation: Evaluation) -> Iterator[Finding]:
    """Median accuracies of the families over common scales: the best, and at the largest."""
    for shown in evaluation.tasks():
        runs = evaluation.select(**shown)
        for activation in evaluation.values("activation", runs):
            here = runs[runs["activation"] == activation]
            medians = here.groupby(["weight", "scale", "regime"])["test_accuracy"].median()
            table = medians.groupby(level=["weight", "scale"]).max().unstack("weight")
            common = table.dropna()
            if common.empty:
                continue
            last = common.index.max()
            families = evaluation.values("weight", here)
            best = [f"{f} {common[f].max():.1%}" for f in families]
            end = [f"{f} {common[f][last]:.1%}" for f in families]
            solver = SOLVER_WORDS.get(shown["solver"], shown["solver"])
            yield Finding(
                f"{shown['task'].capitalize()}, {activation}, {solver}: best median test accuracy "
                f"{listed(best)} over the scales that all were run at; at scale {number(last)} "
                f"{listed(end)} (the better regime of each family)."
            )


def convergence(evaluation: Evaluation, scales: list[float]) -> Iterator[Finding]:
    """Share of the forward solves that met the tolerance, in the main setting."""
    runs = evaluation.select(**evaluation.main)
    for scale in scales:
        share = runs[np.isclose(runs["scale"], scale)].groupby("weight")["forward_converged"]
        share = share.median().dropna()
        parts = [f"{f} {share[f]:.0%}" for f in evaluation.values("weight") if f in share]
        if parts:
            yield Finding(
                f"Forward solves in training that met the tolerance, at scale {number(scale)}: "
                f"{listed(parts)} (median over seeds)."
            )
