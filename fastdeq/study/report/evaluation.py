"""A study's tables with what is derived from them, each computed once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import pandas as pd

from .criteria import ORDER, SETTING, Criteria, judge, ordered
from .stability import differences, seed_ranges, stable_ranges

SOLVER_WORDS = {
    "picard": "plain iteration",
    "anderson": "Anderson acceleration",
    "auto": "fastdeq's own solver",
}
REGIME_WORDS = {
    "initialised": "structure only at the start",
    "kept": "structure kept in training",
}


class Evaluation:
    """The runs of a study, judged, and the draws of initial weights.

    Args:
        training, initial: tables of the study; either may be empty.
        criteria: thresholds; None: the defaults.
    """

    def __init__(
        self, training: pd.DataFrame, initial: pd.DataFrame, criteria: Criteria | None = None
    ):
        self.criteria = criteria or Criteria()
        self.judged = judge(training, self.criteria)
        self.initial = initial
        self._ranges: dict[tuple[str, str], pd.DataFrame] = {}
        self._tables: dict[tuple[str, str], pd.DataFrame] = {}
        self._differences: dict[tuple[str, ...], pd.DataFrame] = {}

    def ranges(
        self, criterion: str = "stable", convention: str = "spectral_radius"
    ) -> pd.DataFrame:
        """The range of each seed, see :func:`fastdeq.study.report.stability.seed_ranges`."""
        key = (criterion, convention)
        if key not in self._ranges:
            self._ranges[key] = seed_ranges(self.judged, *key)
        return self._ranges[key]

    def table(self, criterion: str = "stable", convention: str = "spectral_radius") -> pd.DataFrame:
        """Medians over seeds, see :func:`fastdeq.study.report.stability.stable_ranges`."""
        key = (criterion, convention)
        if key not in self._tables:
            self._tables[key] = stable_ranges(self.ranges(*key), self.criteria)
        return self._tables[key]

    def differences(
        self,
        axis: str,
        first: str,
        second: str,
        criterion: str = "stable",
        convention: str = "spectral_radius",
    ) -> pd.DataFrame:
        """Pairs of ranges, see :func:`fastdeq.study.report.stability.differences`."""
        key = (axis, first, second, criterion, convention)
        if key not in self._differences:
            self._differences[key] = differences(self.judged, *key)
        return self._differences[key]

    def values(self, column: str, runs: pd.DataFrame | None = None) -> list[str]:
        """What a column of the setting takes, in the order in which it is shown."""
        return ordered((self.judged if runs is None else runs)[column], ORDER[column])

    @cached_property
    def main(self) -> dict[str, str]:
        """The setting shown where a picture shows one: the first of each that was run."""
        runs, chosen = self.judged, {}
        for column in ("task", "gradient", "solver", "activation", "regime"):
            if runs.empty:
                break
            options = self.values(column, runs)
            preferred = "tanh" if column == "activation" else None
            chosen[column] = preferred if preferred in options else options[0]
            runs = runs[runs[column] == chosen[column]]
        return {column: chosen[column] for column in SETTING} if chosen else {}

    def combinations(self, table: pd.DataFrame, columns: Sequence[str]) -> list[tuple[str, ...]]:
        """The combinations of values that a table has, in the order in which they are shown."""
        present = set(table[list(columns)].itertuples(index=False, name=None))
        places = [self.values(c, table) for c in columns]
        return sorted(present, key=lambda k: [p.index(v) for p, v in zip(places, k, strict=True)])

    def select(self, **setting: str) -> pd.DataFrame:
        """The judged runs with these values."""
        return where(self.judged, **setting)

    def tasks(self) -> list[dict[str, str]]:
        """For each task, the gradient and the solver that its pictures show."""
        shown = []
        for task in self.values("task"):
            runs = self.select(task=task)
            gradient = self.values("gradient", runs)[0]
            runs = where(runs, gradient=gradient)
            solver = self.values("solver", runs)[0]
            shown.append({"task": task, "gradient": gradient, "solver": solver})
        return shown


def where(table: pd.DataFrame, **values: str) -> pd.DataFrame:
    """The rows with these values."""
    for column, value in values.items():
        table = table[table[column] == value]
    return table
