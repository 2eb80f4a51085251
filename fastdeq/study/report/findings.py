"""Sentences from the data: what was compared, by how much it differs, and whether that decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .criteria import SETTING, arranged
from .evaluation import REGIME_WORDS, SOLVER_WORDS, Evaluation, where
from .stability import median_interval, scales

SUPPORT, CONTRADICT, EQUAL, UNDECIDED = "supported", "contradicted", "no difference", "undecided"
VERDICTS = (SUPPORT, CONTRADICT, EQUAL, UNDECIDED)
_MEASURE = {"spectral_radius": "", "variance": " at equal entry variance"}


@dataclass(frozen=True)
class Grid:
    """A table for the page."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Finding:
    """A sentence and, where it is about a claim, its verdict."""

    text: str
    verdict: str = ""


def verdict(
    low: float, high: float, pairs: int, unseen: float, needed: int, empty: bool = False
) -> tuple[str, str]:
    """The decision on "broader", and the words for it.

    Args:
        low, high: interval of the difference in width, octaves.
        pairs, needed: seeds compared, and how many a decision takes.
        unseen: share of the pairs whose difference the grid cannot show.
        empty: whether what cannot be seen is so because neither side has a stable scale.
    """
    if pairs < needed:
        return UNDECIDED, f"the data cannot decide ({pairs} of {needed} seeds needed)"
    if low > 0:
        return SUPPORT, "the data support a broader range"
    if high < 0:
        return CONTRADICT, "the data contradict a broader range"
    if unseen > 0.5:
        reason = "neither has a stable scale" if empty else "both reach the end of the grid"
        return UNDECIDED, f"the data cannot decide ({reason})"
    if low == high == 0:
        return EQUAL, "the data show no difference at the resolution of the grid"
    return UNDECIDED, "the data cannot decide"


def compare(
    evaluation: Evaluation,
    axis: str,
    first: str,
    second: str,
    convention: str = "spectral_radius",
    criterion: str = "stable",
) -> pd.DataFrame:
    """All comparisons of ``second`` with ``first``, a row per setting that has both.

    Returns:
        The other keys, ``pairs``, ``width``, ``low``, ``high`` (octaves), ``verdict``, ``words``.
    """
    keys = [k for k in (*SETTING, "weight") if k != axis]
    found = evaluation.differences(axis, first, second, criterion, convention)
    criteria, rows = evaluation.criteria, []
    for key, group in found.groupby(keys, sort=False):
        width, low, high = median_interval(group["width"], criteria)
        unseen = float(group["unseen"].mean())
        empty = bool((group["empty_a"] & group["empty_b"]).mean() > 0.5)
        outcome, words = verdict(low, high, len(group), unseen, criteria.seeds, empty)
        rows.append(
            dict(zip(keys, key, strict=True))
            | {"pairs": len(group), "width": width, "low": low, "high": high}
            | {"verdict": outcome, "words": words}
        )
    columns = [*keys, "pairs", "width", "low", "high", "verdict", "words"]
    return arranged(pd.DataFrame(rows, columns=columns), keys)


def families(
    evaluation: Evaluation, convention: str = "spectral_radius", **setting: str
) -> Iterator[Finding]:
    """Orthogonal and symmetric weights against dense ones, a sentence per setting."""
    table = evaluation.table(convention=convention)
    for family in ("orthogonal", "symmetric"):
        found = where(compare(evaluation, "weight", "dense", family, convention), **setting)
        for row in found.itertuples():
            here = where(table, **{k: getattr(row, k) for k in SETTING})
            edge = {r.weight: scales(r) for r in here.itertuples()}
            yield Finding(
                f"{_setting(row)}: {family} weights train stably {_up_to(edge[family])}, "
                f"dense weights {_up_to(edge['dense'])}{_MEASURE[convention]}; "
                f"{_wider(row)}: {row.words}.",
                row.verdict,
            )


def comparisons(evaluation: Evaluation, convention: str = "spectral_radius") -> Grid:
    """Every comparison with dense weights, a row each."""
    table = evaluation.table(convention=convention)
    rows = []
    for family in ("orthogonal", "symmetric"):
        for row in compare(evaluation, "weight", "dense", family, convention).itertuples():
            here = where(table, **{k: getattr(row, k) for k in SETTING})
            edge = {r.weight: scales(r) for r in here.itertuples()}
            setting = [getattr(row, k) for k in SETTING]
            rows.append(
                [family, *setting, edge[family], edge["dense"], _interval(row), row.verdict]
            )
    title = f"All comparisons with dense weights{_MEASURE[convention]}"
    columns = ["weight", *SETTING, "up to", "dense up to", "wider by (octaves)", "“broader” is"]
    return Grid(title, columns, rows)


def _setting(row: object) -> str:
    parts = [row.task, row.activation, SOLVER_WORDS.get(row.solver, row.solver)]
    parts += [f"{row.gradient} gradient", REGIME_WORDS.get(row.regime, row.regime)]
    return ", ".join(parts).capitalize()


def _up_to(edge: str) -> str:
    if edge == "none":
        return "at no scale"
    return f"up to at least {edge[2:]}" if edge.startswith("≥") else f"up to {edge}"


def _wider(row: object) -> str:
    seeds = f"{row.pairs} seed" + ("s" if row.pairs > 1 else "")
    return f"the range is wider by {_interval(row)} octaves ({seeds})"


def _interval(row: object) -> str:
    interval = f" [{signed(row.low)}, {signed(row.high)}]" if row.pairs > 1 else ""
    return f"{signed(row.width)}{interval}"


def octaves_of(value: float, plus: bool = False) -> str:
    """A width or a difference in words: "0.5 octaves", with ``plus`` "+0.5 octaves"."""
    number = signed(value)
    number = f"+{number}" if plus and value > 0 else number
    return f"{number} octave" + ("" if abs(value) == 1 else "s")


def signed(value: float) -> str:
    """Two digits, with a minus sign of the width of a digit."""
    if np.isnan(value):
        return "an unknown number of"
    return f"{value:.2g}".replace("-", "−") if abs(value) > 1e-9 else "0"  # noqa: RUF001


def listed(parts: list[str]) -> str:
    """a, b and c."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" and {parts[-1]}"
