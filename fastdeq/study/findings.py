"""Sentences from the data: what was compared, by how much it differs, and whether that decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .criteria import SETTING
from .evaluation import REGIME_WORDS, SOLVER_WORDS, Evaluation, where
from .stability import differences, median_interval, scales

SUPPORT, CONTRADICT, EQUAL, UNDECIDED = "supported", "contradicted", "no difference", "undecided"
VERDICTS = (SUPPORT, CONTRADICT, EQUAL, UNDECIDED)
_MEASURE = {"spectral_radius": "", "variance": " at equal entry variance"}


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
    ranges = evaluation.ranges(criterion, convention)
    criteria, rows = evaluation.criteria, []
    for key, group in differences(ranges, axis, first, second).groupby(keys, sort=False):
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
    return pd.DataFrame(rows, columns=columns)


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


def tally(
    evaluation: Evaluation, convention: str = "spectral_radius", **setting: str
) -> Iterator[Finding]:
    """How often a family has a broader range than dense weights, over all settings."""
    for family in ("orthogonal", "symmetric"):
        found = where(compare(evaluation, "weight", "dense", family, convention), **setting)
        if found.empty:
            continue
        counts = found["verdict"].value_counts()
        shares = [f"{counts[v]} {v}" for v in VERDICTS if v in counts]
        many = f"{len(found)} settings" if len(found) > 1 else "the one setting"
        text = (
            f"{family.capitalize()} weights have a broader stable range than dense "
            f"ones{_MEASURE[convention]}: of {many} compared, {_listed(shares)}; median "
            f"difference {_octaves(float(found['width'].median()))}."
        )
        yield Finding(text, _overall(counts, len(found)))


def _overall(counts: pd.Series, settings: int) -> str:
    """A verdict for all settings: that of more than half of them, unless some say the opposite."""
    top = str(counts.idxmax())
    opposite = {SUPPORT: CONTRADICT, CONTRADICT: SUPPORT}.get(top)
    if 2 * counts.max() <= settings or (opposite in counts):
        return "mixed"
    return top


def pairs(evaluation: Evaluation, axis: str, first: str, second: str) -> Iterator[Finding]:
    """Two solvers, regimes, gradients or tasks, a sentence per family over its settings."""
    found = compare(evaluation, axis, first, second)
    words = SOLVER_WORDS | REGIME_WORDS
    for family in evaluation.values("weight"):
        rows = found[(found["weight"] == family)]
        if axis == "regime" and family == "dense":
            continue  # the same runs
        if axis == "solver" and family == "dense":
            rows = rows[rows["regime"] == "initialised"]
        for regime in [""] if axis == "regime" else evaluation.values("regime", rows):
            part = rows if axis == "regime" else rows[rows["regime"] == regime]
            if part.empty:
                continue
            wider, narrower = (int((part["verdict"] == v).sum()) for v in (SUPPORT, CONTRADICT))
            place = "" if not regime or family == "dense" else f" ({REGIME_WORDS[regime]})"
            many = f"{len(part)} settings" if len(part) > 1 else "one setting"
            yield Finding(
                f"{family.capitalize()} weights{place}: the range with "
                f"{words.get(second, second)} against {words.get(first, first)} is wider in "
                f"{wider} and narrower in {narrower} of {many}, by "
                f"{_octaves(float(part['width'].median()), signed=True)} in the median "
                f"({_octaves(float(part['width'].min()), signed=True)} to "
                f"{_octaves(float(part['width'].max()), signed=True)})."
            )


def learning(evaluation: Evaluation, **setting: str) -> Iterator[Finding]:
    """How much wider the range is in which runs learn, whether or not the solves converge."""
    both = evaluation.table().merge(
        evaluation.table("learns"), on=[*SETTING, "weight"], suffixes=("", "_learns")
    )
    both = where(both, **setting)
    for family in evaluation.values("weight", both):
        rows = both[both["weight"] == family]
        more = rows["width_learns"] - rows["width"]
        yield Finding(
            f"{family.capitalize()} weights: the range in which runs learn, converged or not, is "
            f"{_octaves(float(more.median()))} wider in the median than the range in which they "
            f"also solve (at most {_octaves(float(more.max()))})."
        )


def accuracies(evaluation: Evaluation) -> Iterator[Finding]:
    """The best median accuracy of each family, and that at the largest scale it was run at."""
    for shown in evaluation.tasks():
        runs = evaluation.select(**shown)
        medians = runs.groupby(["weight", "regime", "activation", "scale"])["test_accuracy"]
        medians = medians.median()
        for activation in evaluation.values("activation", runs):
            here = medians.xs(activation, level="activation").dropna()
            parts = []
            for family in evaluation.values("weight", runs):
                if family not in here.index.get_level_values("weight"):
                    continue
                of_family = here.xs(family, level="weight").groupby(level="scale").max()
                last = float(of_family.index.max())
                parts.append(
                    f"{family} {of_family.max():.1%} at best and {of_family[last]:.1%} at scale "
                    f"{last:.3g}"
                )
            if parts:
                yield Finding(
                    f"{shown['task']}, {activation}, {shown['solver']}, best regime of each "
                    f"family: median test accuracy {_listed(parts)}."
                )


def _setting(row: object) -> str:
    parts = [row.task, row.activation, SOLVER_WORDS.get(row.solver, row.solver)]
    parts += [f"{row.gradient} gradient", REGIME_WORDS.get(row.regime, row.regime)]
    return ", ".join(parts).capitalize()


def _up_to(edge: str) -> str:
    return "at no scale" if edge == "none" else f"up to {edge}"


def _wider(row: object) -> str:
    seeds = f"{row.pairs} seed{'s' if row.pairs > 1 else ''}"
    interval = f" [{_signed(row.low)}, {_signed(row.high)}]" if row.pairs > 1 else ""
    return f"the range is wider by {_signed(row.width)}{interval} octaves ({seeds})"


def _octaves(value: float, signed: bool = False) -> str:
    number = _signed(value)
    number = f"+{number}" if signed and value > 0 else number
    return f"{number} octave" + ("" if abs(value) == 1 else "s")


def _signed(value: float) -> str:
    if np.isnan(value):
        return "an unknown number of"
    return f"{value:.2g}".replace("-", "−") if abs(value) > 1e-9 else "0"  # noqa: RUF001


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" and {parts[-1]}"
