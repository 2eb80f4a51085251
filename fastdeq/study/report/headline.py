"""The result in a few sentences and a table: every comparison with dense weights is counted."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from .criteria import Criteria
from .evaluation import REGIME_WORDS, Evaluation
from .findings import (
    CONTRADICT,
    EQUAL,
    SUPPORT,
    UNDECIDED,
    Finding,
    Grid,
    compare,
    listed,
    octaves_of,
    signed,
)
from .stability import median_interval, number

# At equal spectral radius, orthogonal and dense weights have equal entry variance as well.
_COMPARED = (
    ("orthogonal", "spectral_radius"),
    ("symmetric", "spectral_radius"),
    ("symmetric", "variance"),
)
_EQUAL_WORDS = {"spectral_radius": "spectral radius", "variance": "entry variance"}


def headline(evaluation: Evaluation) -> Iterator[Finding | Grid]:
    """A sentence per family and measure, the edges, what chance can do, and the counts."""
    found = {
        (family, convention): compare(evaluation, "weight", "dense", family, convention)
        for family, convention in _COMPARED
    }
    found = {key: table for key, table in found.items() if len(table)}
    for (family, convention), table in found.items():
        yield _sentence(family, convention, table)
    yield from _edges(evaluation)
    comparisons = sum(map(len, found.values()))
    if comparisons:
        yield from _chance(evaluation, comparisons)
        yield _counts(evaluation, found)


def overall(counts: dict[str, int]) -> str:
    """A verdict on all settings: "mixed" where they contradict each other; "partly" supported or
    contradicted where half of them or fewer are."""
    settings = sum(counts.values())
    decided = [v for v in (SUPPORT, CONTRADICT) if counts[v]]
    if len(decided) == 2:
        return "mixed"
    if decided:
        return decided[0] if 2 * counts[decided[0]] > settings else f"partly {decided[0]}"
    return EQUAL if 2 * counts[EQUAL] > settings else UNDECIDED


def by_chance(seeds: int, criteria: Criteria) -> tuple[int, float]:
    """How many of so many seeds must agree for a verdict, and the probability that as many agree,
    on either side, if a difference is as likely to be positive as negative (a sign test)."""
    for agreeing in range(seeds // 2 + 1, seeds + 1):
        signs = np.repeat([-1.0, 1.0], [seeds - agreeing, agreeing])
        if median_interval(signs, criteria)[1] > 0:
            ways = sum(math.comb(seeds, k) for k in range(agreeing, seeds + 1))
            return agreeing, 2 * ways / 2**seeds
    raise AssertionError("seeds that all agree always decide")


def _verdicts(table: pd.DataFrame) -> dict[str, int]:
    return {v: int((table["verdict"] == v).sum()) for v in (SUPPORT, CONTRADICT, EQUAL, UNDECIDED)}


def _sentence(family: str, convention: str, table: pd.DataFrame) -> Finding:
    counts = _verdicts(table)
    change = octaves_of(float(table["width"].median()), plus=True)
    many = f"{len(table)} setting" + ("s" if len(table) > 1 else "")
    return Finding(
        f"{family.capitalize()} weights against dense ones at equal {_EQUAL_WORDS[convention]}: "
        f"the stable range is broader in {counts[SUPPORT]}, narrower in {counts[CONTRADICT]}, not "
        f"different in {counts[EQUAL]} and undecided in {counts[UNDECIDED]} of {many}. The median "
        f"change is {change}.",
        overall(counts),
    )


def _edges(evaluation: Evaluation) -> Iterator[Finding]:
    table = evaluation.table()
    parts = []
    for family in evaluation.values("weight"):
        upper = table.loc[(table["weight"] == family) & ~table["none"].astype(bool), "upper"]
        low, high = (
            (number(float(v)) for v in (upper.min(), upper.max())) if len(upper) else ("",) * 2
        )
        ends = low if low == high else f"{low} to {high}"
        parts.append(f"{ends or 'none'} for {family}")
    if parts:
        yield Finding(
            "The largest stable scale (spectral radius, median over seeds), from the least to the "
            f"most favourable setting: {listed(parts)} weights."
        )


def _chance(evaluation: Evaluation, comparisons: int) -> Iterator[Finding]:
    seeds = int(evaluation.judged["seed"].nunique())
    if seeds < evaluation.criteria.seeds:
        return
    agreeing, share = by_chance(seeds, evaluation.criteria)
    yield Finding(
        f"Each of the {comparisons} comparisons is decided by itself, where {agreeing} of {seeds} "
        f"seeds agree: if families did not differ at all, up to {share:.1%} of them, about "
        f"{share * comparisons:.0f}, would still be decided by chance. Settings share seeds and "
        "dense runs, so that such errors come together."
    )


def _counts(evaluation: Evaluation, found: dict[tuple[str, str], pd.DataFrame]) -> Grid:
    rows = []
    for (family, convention), table in found.items():
        for regime in evaluation.values("regime", table):
            part = table[table["regime"] == regime]
            change, low, high = (
                signed(float(w))
                for w in (part["width"].median(), part["width"].min(), part["width"].max())
            )
            about = [family, _EQUAL_WORDS[convention], REGIME_WORDS.get(regime, regime)]
            counts = map(str, (len(part), *_verdicts(part).values()))
            rows.append([*about, *counts, change, f"{low} to {high}"])
    columns = ["weights", "equal", "regime", "settings", "broader", "narrower", "no difference"]
    columns += ["undecided", "median change", "smallest to largest"]
    return Grid("Stable ranges against those of dense weights (changes in octaves)", columns, rows)
