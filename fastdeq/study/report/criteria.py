"""What makes a training run stable, judged run by run from the table of the study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ...conventions import RATIO
from ...weights import WEIGHTS
from ..config import GRADIENTS, REGIMES, SOLVERS, TASKS

FAMILIES = tuple(WEIGHTS)
ACTIVATIONS = ("identity", "tanh", "relu", "hardtanh", "gelu")
CONVENTIONS = {"spectral_radius": "scale", "variance": "entry_scale"}

# The order in which values of a column are shown; others follow.
ORDER = {
    "task": TASKS,
    "activation": ACTIVATIONS,
    "solver": tuple(SOLVERS),
    "gradient": tuple(GRADIENTS),
    "regime": REGIMES,
    "weight": FAMILIES,
}

# Runs that differ in these, the scale and the seed alone are compared with each other.
SETTING = ["task", "activation", "solver", "gradient", "regime"]
_REFERENCE = ["task", "activation", "solver", "gradient"]

_TEXT = {"key": "", "error": "", "task": "", "activation": "", "solver": "", "gradient": ""}
_NUMBERS = [
    "test_accuracy", "test_loss", "train_loss", "forward_iterations", "backward_iterations",
    "forward_converged", "backward_converged",
]  # fmt: skip
_COUNTS = ["nonfinite", "skipped", "updates"]
_FEWEST_CELLS = 5  # that tell a harder seed from a run that failed


@dataclass(frozen=True)
class Criteria:
    """When a run counts as stable, and when the data decide.

    Args:
        margin: how far below the best median accuracy of its setting a run may end, in (0, 1).
        converged: share of the solves of a run that must meet the tolerance, in (0, 1].
        seeds: pairs of runs needed for a verdict, >= 1.
        confidence: of the bootstrap intervals over seeds, in (0, 1).
    """

    margin: float = 0.03
    converged: float = 0.9
    seeds: int = 5
    confidence: float = 0.95

    def describe(self) -> list[str]:
        """The criteria in words, one sentence each."""
        return [
            f"A run learns if its test accuracy is at most {self.margin * 100:g} percentage points "
            "below the best median over seeds that any family reaches at any scale with the same "
            "task, activation, solver and gradient, on data as hard as those of its seed: seeds "
            "split the data differently, and the bar is moved by how far the seed's runs deviate, "
            "in the median, from the medians over seeds, and by no more than as many points.",
            f"A run is stable if it learns, if at least {self.converged:.0%} of its forward solves "
            "(and of its backward solves, where the gradient is implicit) met the tolerance in "
            "training, and if no update was left out, no loss was infinite or NaN and no error "
            "ended it.",
            "The range of a seed is the unbroken row of stable scales around its most accurate "
            "stable run. Edges are grid points, not interpolated: an upper edge is the largest "
            "scale seen to be stable. A range that reaches the end of the grid may go on beyond.",
            f"Brackets hold {self.confidence:.0%} bootstrap intervals of the median over seeds. "
            "Families are compared seed by seed. The data support a broader range if the interval "
            f"of the difference in width lies above 0, with at least {self.seeds} seeds; they "
            "contradict it if the interval lies below 0; they show no difference if it is exactly "
            "0; otherwise, they cannot decide.",
        ]


def complete(training: pd.DataFrame) -> pd.DataFrame:
    """A copy in which every column that the report reads exists; unknown values are NaN or ""."""
    runs = training.copy()
    for name in ("weight", "scale", "seed"):
        if name not in runs:
            runs[name] = pd.Series(dtype=object if name == "weight" else float)
    for name, default in _TEXT.items():
        runs[name] = runs[name].fillna(default) if name in runs else default
    runs["regime"] = runs["regime"].fillna("initialised") if "regime" in runs else "initialised"
    for name in _NUMBERS:
        runs[name] = runs[name].astype(float) if name in runs else np.nan
    for name in _COUNTS:
        runs[name] = runs[name].fillna(0).astype(int) if name in runs else 0
    if "entry_scale" not in runs:
        runs["entry_scale"] = runs["scale"].astype(float) / runs["weight"].map(RATIO).astype(float)
    return runs.reset_index(drop=True)


def judge(training: pd.DataFrame, criteria: Criteria | None = None) -> pd.DataFrame:
    """The runs with columns ``reference``, ``learns``, ``solves``, ``clean`` and ``stable``.

    Dense weights have no structure to keep: their runs appear in the regime "kept" as well, where
    other families have runs of that regime.

    Args:
        training: one row per run, see the documentation of the study's tables.
        criteria: thresholds; None: the defaults.

    Returns:
        A new table, with a row more for each dense run that counts in both regimes.
    """
    criteria = criteria or Criteria()
    runs = complete(training)
    if runs.empty:
        return runs.assign(reference=0.0, learns=False, solves=False, clean=False, stable=False)
    runs["reference"] = _reference(runs, criteria.margin)
    # The tolerance of a rounding error: a share of 450 samples is no exact decimal.
    runs["learns"] = runs["test_accuracy"] >= runs["reference"] - criteria.margin - 1e-9
    forward = runs["forward_converged"] >= criteria.converged
    backward = runs["backward_converged"] >= criteria.converged
    runs["solves"] = forward & (backward | (runs["gradient"] != "implicit"))
    finite = np.isfinite(runs[["test_loss", "train_loss"]]).all(axis=1)
    runs["clean"] = (runs["skipped"] == 0) & (runs["error"] == "") & finite
    runs["stable"] = runs["learns"] & runs["solves"] & runs["clean"]
    return _dense_in_both(runs)


def _reference(runs: pd.DataFrame, margin: float) -> pd.Series:
    """The accuracy that a run of each setting and seed is held against.

    It is the best median over seeds, and what is special of the seed, whose part of the data may be
    harder than others: the median of the seed's deviations from the medians of the cells that come
    near that best one. A median, so that neither one lucky run nor some that failed move it; and no
    more than the margin, so that a seed of which nearly all runs failed is not called a hard one.
    """
    # A run that failed counts as one that learned nothing, so that a lucky rest sets no bar.
    accuracy = runs["test_accuracy"].fillna(0.0)
    cells = [runs[name] for name in (*_REFERENCE, "regime", "weight", "scale")]
    median = accuracy.groupby(cells).transform("median")
    settings = [runs[name] for name in _REFERENCE]
    best = median.groupby(settings).transform("max")
    apart = (runs["test_accuracy"] - median).where(median >= best - margin)
    seeds = apart.groupby([*settings, runs["seed"]])
    of_seed = seeds.transform("median").where(seeds.transform("count") >= _FEWEST_CELLS, 0.0)
    return best + of_seed.clip(-margin, margin)


def _dense_in_both(runs: pd.DataFrame) -> pd.DataFrame:
    kept = runs.loc[runs["regime"] == "kept", _REFERENCE].drop_duplicates()
    dense = runs[(runs["weight"] == "dense") & (runs["regime"] != "kept")]
    again = dense.merge(kept, on=_REFERENCE).assign(regime="kept")
    return pd.concat([runs, again], ignore_index=True) if len(again) else runs


def arranged(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The rows in the order in which the report shows them."""
    places = {name: i for values in ORDER.values() for i, name in enumerate(values)}
    return table.sort_values(
        columns, key=lambda c: c.map(lambda v: (places.get(v, 99), str(v))), kind="stable"
    ).reset_index(drop=True)


def ordered(values: Any, order: tuple[str, ...] = ()) -> list[Any]:
    """The distinct values: those of ``order`` first, in its order, then the others, sorted."""
    present = set(values)
    return [v for v in order if v in present] + sorted(present - set(order))
