"""Ranges of weight scales over which training is stable, their medians and their differences.

A range lives on the grid of the scales that were run: its edges are the first and the last stable
scale of an unbroken row. Where a seed has no stable scale at all, both edges are set so that the
width is minus one grid step, which puts it below every range that exists.

Two ranges are compared on the scales that were run for both: on a finer or longer grid a range can
end further out, and a gap be seen that the other grid cannot show.
"""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
from rich.table import Table
from rich.text import Text

from .criteria import CONVENTIONS, SETTING, Criteria, arranged, judge

_RESAMPLES = 2000
_KEYS = [*SETTING, "weight", "seed"]


def seed_ranges(
    judged: pd.DataFrame, criterion: str = "stable", convention: str = "spectral_radius"
) -> pd.DataFrame:
    """The range of each setting, family and seed.

    Args:
        judged: the runs as :func:`fastdeq.study.report.criteria.judge` returns them.
        criterion: the column that must be true: "stable" or "learns".
        convention: how scales are measured, "spectral_radius" or "variance" (of an entry).

    Returns:
        One row per setting, weight and seed: ``lower`` and ``upper`` (log2 of the scale),
        ``at_bottom`` and ``at_top`` (the edge is the end of the grid), ``top`` (of the grid, log2),
        ``step`` (of the grid, octaves), ``empty`` (no stable scale), ``width`` (octaves).
    """
    return _ranges(_points(judged, criterion, convention))


def _points(judged: pd.DataFrame, criterion: str, convention: str) -> pd.DataFrame:
    """A row per setting, weight, seed and ``log`` of the scale: ``good`` and ``accuracy``."""
    runs = judged.assign(log=np.log2(judged[CONVENTIONS[convention]].astype(float)).round(6))
    grouped = runs.groupby([*_KEYS, "log"], sort=True)
    return grouped.agg(good=(criterion, "all"), accuracy=("test_accuracy", "min")).reset_index()


def _ranges(points: pd.DataFrame) -> pd.DataFrame:
    """The ranges of points that are sorted by ``_KEYS`` and ``log``."""
    points = points.reset_index(drop=True)
    starts = np.flatnonzero(~points.duplicated(_KEYS))
    logs, good = points["log"].to_numpy(float), points["good"].to_numpy(bool)
    accuracy = points["accuracy"].to_numpy(float)
    columns = ["lower", "upper", "at_bottom", "at_top", "top", "step", "empty"]
    found = [
        _range(logs[i:j], good[i:j], accuracy[i:j])
        for i, j in itertools.pairwise([*starts, len(points)])
    ]
    ranges = points.loc[starts, _KEYS].reset_index(drop=True)
    ranges = ranges.join(pd.DataFrame(found, columns=columns))
    ranges["width"] = ranges["upper"] - ranges["lower"]
    return ranges


def _range(grid: np.ndarray, good: np.ndarray, accuracy: np.ndarray) -> dict[str, object]:
    step = float(np.median(np.diff(grid))) if len(grid) > 1 else 1.0
    about = {"top": grid[-1], "step": step, "empty": not good.any()}
    if not good.any():
        nothing = {"lower": grid[0], "upper": grid[0] - step}
        return about | nothing | {"at_bottom": False, "at_top": False}
    best = int(np.where(good, accuracy, -np.inf).argmax())
    bad = np.flatnonzero(~good)
    first = int(bad[bad < best].max(initial=-1)) + 1
    last = int(bad[bad > best].min(initial=len(grid))) - 1
    return about | {
        "lower": grid[first],
        "upper": grid[last],
        "at_bottom": first == 0,
        "at_top": last == len(grid) - 1,
    }


def median_interval(values: object, criteria: Criteria | None = None) -> tuple[float, float, float]:
    """Median of a sample and the percentile bootstrap interval of the median.

    NaN is left out. Edges are grid points, so quantiles are values that a median takes, rounded
    outwards: the interval of five seeds is their whole span.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    sample = np.asarray(values, dtype=float)
    sample = sample[~np.isnan(sample)]
    if not len(sample):
        return np.nan, np.nan, np.nan
    tail = (1 - (criteria or Criteria()).confidence) / 2
    drawn = np.random.default_rng(0).integers(len(sample), size=(_RESAMPLES, len(sample)))
    medians = np.median(sample[drawn], axis=1)
    low = np.quantile(medians, tail, method="lower")
    high = np.quantile(medians, 1 - tail, method="higher")
    return float(np.median(sample)), float(low), float(high)


def stable_ranges(ranges: pd.DataFrame, criteria: Criteria | None = None) -> pd.DataFrame:
    """Medians over seeds of the ranges, a row per setting and family.

    Args:
        ranges: of :func:`seed_ranges`.
        criteria: the confidence of the intervals; None: the defaults.

    Returns:
        ``seeds``, ``empty`` (seeds without a stable scale), ``none`` (half of the seeds or more),
        and the scales themselves: ``lower`` (over the seeds that have one), ``upper`` with
        ``upper_low`` and ``upper_high``; ``width`` in octaves with ``width_low`` and
        ``width_high``; ``at_bottom``, ``at_top``: the median is the end of the grid; ``top``,
        ``step`` (of the grid).
    """
    rows = []
    for key, group in ranges.groupby([*SETTING, "weight"], sort=False):
        upper = median_interval(group["upper"], criteria)
        width = median_interval(group["width"], criteria)
        # At half of the seeds a median would lie between an edge and none.
        none = bool(group["empty"].mean() >= 0.5)
        there = group if none else group[~group["empty"].astype(bool)]
        rows.append(
            dict(zip([*SETTING, "weight"], key, strict=True))
            | {"seeds": len(group), "empty": int(group["empty"].sum()), "none": none}
            | {"lower": 2 ** float(there["lower"].median())}
            | {n: 2**v for n, v in zip(("upper", "upper_low", "upper_high"), upper, strict=True)}
            | dict(zip(("width", "width_low", "width_high"), width, strict=True))
            | {"at_bottom": bool(there["at_bottom"].mean() > 0.5)}
            | {"at_top": bool(group["at_top"].mean() > 0.5)}
            | {"top": 2 ** float(group["top"].min()), "step": float(group["step"].median())}
        )
    columns = [*SETTING, "weight", "seeds", "empty", "none", "lower", "upper", "upper_low"]
    columns += ["upper_high", "width", "width_low", "width_high", "at_bottom", "at_top", "top"]
    table = pd.DataFrame(rows, columns=[*columns, "step"])
    return arranged(table, [*SETTING, "weight"])


def differences(
    judged: pd.DataFrame,
    axis: str,
    first: str,
    second: str,
    criterion: str = "stable",
    convention: str = "spectral_radius",
) -> pd.DataFrame:
    """Seed by seed, how much wider the range of ``second`` is than that of ``first``, in octaves.

    Both ranges are found on the scales that both were run at; a pair without any is left out. Where
    one range reaches the largest of them and the other does not, the difference is a lower bound of
    its size.

    Args:
        judged: the runs as :func:`fastdeq.study.report.criteria.judge` returns them.
        axis: the column in which the two differ: "weight", or one of the setting.
        first, second: its two values.
        criterion, convention: as for :func:`seed_ranges`.

    Returns:
        One row per pair: the other keys, ``seed``, ``width`` and ``upper`` (second minus first),
        ``empty_a`` and ``empty_b`` (first, second without a stable scale), ``unseen`` (the
        difference cannot be seen: both reach the largest scale, or both are empty).
    """
    points = _points(judged[judged[axis].isin((first, second))], criterion, convention)
    keys = [k for k in _KEYS if k != axis]
    common = points.groupby([*keys, "log"])[axis].transform("nunique") == 2
    ranges = _ranges(points[common])
    a, b = (ranges[ranges[axis] == value].drop(columns=axis) for value in (first, second))
    pairs = a.merge(b, on=keys, suffixes=("_a", "_b"))
    result = pairs[[*keys, "empty_a", "empty_b"]].copy()
    for name in ("width", "upper"):
        # Equal edges differ by rounding errors, which must not decide.
        result[name] = (pairs[f"{name}_b"] - pairs[f"{name}_a"]).round(6) + 0.0
    both_end = pairs["at_top_a"].astype(bool) & pairs["at_top_b"].astype(bool)
    result["unseen"] = both_end | (pairs["empty_a"] & pairs["empty_b"])
    return result


def summary(training: pd.DataFrame, criteria: Criteria | None = None) -> Table:
    """The stable ranges of a study as a table for a terminal, less than 80 columns wide."""
    table = stable_ranges(seed_ranges(judge(training, criteria)), criteria)
    shown = Table(caption="largest stable scale and width in octaves: median over seeds [95 %]")
    shown.caption_justify = "left"
    for name in ("setting", "weight"):
        shown.add_column(name)
    for name in ("largest stable scale", "octaves", "seeds"):
        shown.add_column(name, justify="right")
    for setting, group in table.groupby(SETTING, sort=False):
        task, activation, solver, gradient, regime = setting
        head = f"{task} {activation}\n{regime}, {solver},\n{gradient}"
        for i, row in enumerate(group.itertuples()):
            line = head.split("\n")[i] if i < 3 else ""
            # Text: "[none, 1]" would be read as markup.
            cells = [Text(scales(row)), Text(octaves(row))]
            shown.add_row(line, row.weight, *cells, str(row.seeds))
        for line in head.split("\n")[len(group) :]:
            shown.add_row(line)
        shown.add_section()
    return shown


def scales(row: object) -> str:
    """Upper edge with its interval, ``>= 16`` where the grid ends there, "none" without a range."""
    if row.none:
        return "none"
    end = number(row.upper)
    end = f"≥ {end}" if row.at_top else end
    if row.seeds < 2:
        return end
    return f"{end} [{_edge(row, row.upper_low)}, {_edge(row, row.upper_high)}]"


def _edge(row: object, value: float) -> str:
    if value < row.lower * (1 - 1e-9) and row.empty:
        return "none"
    return f"≥ {number(value)}" if value >= row.top * (1 - 1e-9) else number(value)


def octaves(row: object) -> str:
    """Width with its interval; "≥" where an edge is an end of the grid."""
    if row.none:
        return "none"
    width = f"{row.width:.2g}" if row.width else "0"
    width = f"≥ {width}" if row.at_bottom or row.at_top else width
    if row.seeds < 2:
        return width
    low, high = (f"{max(v, 0):.2g}" for v in (row.width_low, row.width_high))
    return f"{width} [{low}, {high}]"


def number(value: float) -> str:
    """A scale with two digits: 0.25, 1.4, 16."""
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"
