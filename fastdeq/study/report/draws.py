"""Statistics over draws of the initial weights, from the table ``initial``."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from .criteria import ACTIVATIONS, arranged, ordered
from .findings import Finding, listed
from .predictions import predict

FEWEST = 5  # draws for a spread
QUANTITIES = {
    "length": "|z*|² / |c|²",
    "moment_1": "first moment, m₁",
    "moment_2": "second moment, m₂",
    "mean_square_slope": "mean of φ'(p)²",
    "radius": "spectral radius of J",
    "resolvent": "|(I − J)⁻¹|₂",  # noqa: RUF001
}


def values(row: object, quantity: str) -> np.ndarray:
    """The draws of a row whose equilibrium was found and whose value is finite."""
    sample = getattr(row, quantity, None)
    if not hasattr(sample, "__len__"):
        return np.empty(0)
    sample = np.asarray(sample, dtype=float)
    solved = getattr(row, "solved", None)
    if hasattr(solved, "__len__") and len(solved) == len(sample):
        sample = sample[np.asarray(solved, dtype=bool)]
    return sample[np.isfinite(sample)]


def statistics(initial: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """Mean, quantiles and coefficient of variation of a quantity, a row per cell of the table.

    Returns:
        ``activation``, ``weight``, ``scale``, ``draws`` (solved), ``mean``, ``low``, ``high`` (5 %
        and 95 %), ``variation`` with its bootstrap interval ``variation_low``,
        ``variation_high``, and ``predicted`` (NaN without a theory).
    """
    rows = []
    for row in initial.itertuples():
        sample = values(row, quantity)
        if not len(sample):
            continue
        low, high = np.quantile(sample, (0.05, 0.95))
        injection = float(getattr(row, "injection_variance", 1.0))
        expected = predict(quantity, row.weight, float(row.scale), row.activation, injection)
        variation = _variation(sample)
        rows.append(
            {"activation": row.activation, "weight": row.weight, "scale": float(row.scale)}
            | {"draws": len(sample), "mean": float(sample.mean()), "low": low, "high": high}
            | dict(
                zip(
                    ("variation", "variation_low", "variation_high"),
                    variation,
                    strict=True,
                )
            )
            | {"predicted": np.nan if expected is None else expected}
        )
    columns = ["activation", "weight", "scale", "draws", "mean", "low", "high", "variation"]
    columns += ["variation_low", "variation_high", "predicted"]
    table = pd.DataFrame(rows, columns=columns).sort_values("scale")
    return arranged(table, ["activation", "weight"])


def _variation(sample: np.ndarray, resamples: int = 500) -> tuple[float, float, float]:
    """Coefficient of variation and its 95 % percentile bootstrap interval."""
    mean = sample.mean()
    if len(sample) < FEWEST or mean == 0:
        return np.nan, np.nan, np.nan
    drawn = sample[np.random.default_rng(0).integers(len(sample), size=(resamples, len(sample)))]
    ratios = drawn.std(axis=1, ddof=1) / drawn.mean(axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return float(sample.std(ddof=1) / mean), float(low), float(high)


def spread(initial: pd.DataFrame) -> Iterator[Finding]:
    """How much the length of the equilibrium varies from one draw of the weights to the next."""
    table = statistics(initial, "length").dropna(subset=["variation"])
    for activation in _activations(table):
        here = table[table["activation"] == activation]
        counts = here.groupby("scale")["weight"].nunique()
        scale = float(counts.index[counts == counts.max()].max())
        rows = here[here["scale"] == scale]
        parts = [
            f"{r.weight} {r.variation:.2g} [{r.variation_low:.2g}, {r.variation_high:.2g}]"
            for r in rows.itertuples()
        ]
        yield Finding(
            f"{activation.capitalize()}, scale {scale:.3g}, coefficient of variation of "
            f"|z*|² / |c|² over draws of W: {listed(parts)}."
        )


def agreement(initial: pd.DataFrame) -> Iterator[Finding]:
    """How far measured means are from their predictions."""
    for quantity, words in QUANTITIES.items():
        table = statistics(initial, quantity).dropna(subset=["predicted"])
        for activation in _activations(table):
            here = table[table["activation"] == activation]
            off = (here["mean"] / here["predicted"] - 1).abs()
            worst = here.loc[off.idxmax()]
            yield Finding(
                f"{activation.capitalize()}, {words}: measured means are within "
                f"{off.median():.1%} of the limit of large d in the median over families and "
                f"scales; the largest deviation, {off.max():.0%}, is that of {worst['weight']} "
                f"weights at scale {worst['scale']:.3g}."
            )


def unsolved(initial: pd.DataFrame) -> Iterator[Finding]:
    """Where no equilibrium was found in some draws, which are left out of all statistics."""
    if "solved" not in initial:
        return
    shares = [
        (float(np.mean(np.asarray(r.solved, bool))), r)
        for r in initial.itertuples()
        if hasattr(r.solved, "__len__") and len(r.solved)
    ]
    missing = [(share, r) for share, r in shares if share < 1]
    if missing:
        share, row = min(missing, key=lambda pair: pair[0])
        yield Finding(
            f"In {len(missing)} of {len(shares)} cells some draws had no equilibrium that was "
            f"found; they are left out of these statistics. Fewest were found for {row.weight} "
            f"weights, {row.activation}, at scale {row.scale:.3g}: {share:.0%}."
        )


def _activations(table: pd.DataFrame) -> list[str]:
    return ordered(table["activation"], ACTIVATIONS)
