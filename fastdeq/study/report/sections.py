"""The order of the report: what each section says and shows."""

from __future__ import annotations

from collections.abc import Iterator

from . import draws, findings, headline, observations
from .criteria import SETTING
from .evaluation import Evaluation
from .figures import curves, edges, maps, moments, spectra, traces
from .findings import Finding, Grid
from .style import Missing, Picture

Item = Finding | Grid | Picture | Missing
Part = tuple[str, str, str, Iterator[Item]]


def build(evaluation: Evaluation) -> Iterator[Part]:
    """Title, anchor, introduction and contents; the first is the headline."""
    yield "Findings", "findings", "", _headline(evaluation)
    yield (
        "Where training is stable",
        "ranges",
        "The share of stable seeds in every cell, and each comparison of a structured family with "
        "dense weights. Sentences are about the first solver and regime of the study and tanh, "
        "whatever their outcome; the table has all.",
        _ranges(evaluation),
    )
    yield (
        "Accuracy and loss against the scale",
        "curves",
        "The same runs before any threshold is applied.",
        _accuracy(evaluation),
    )
    yield (
        "Equal variance of the entries",
        "variance",
        "Spectral radius is one way to call two weight matrices equally large. Another is equal "
        "variance of their entries; there, symmetric weights have twice the spectral radius.",
        _variance(evaluation),
    )
    yield (
        "Solvers, regimes, gradients",
        "settings",
        "What a range owes to the solver, to keeping the structure in training, and to the kind "
        "of gradient.",
        _settings(evaluation),
    )
    yield (
        "Along training",
        "traces",
        "How hard the solves become while the weights change.",
        _traces(evaluation),
    )
    yield (
        "Spectra",
        "spectra",
        "What training does to the eigenvalues of W and of the Jacobian.",
        spectra.spectra(evaluation),
    )
    yield (
        "Statistics of the initial weights",
        "initial",
        "Before training: how much the equilibrium depends on the draw of W. Dense and orthogonal "
        "weights of equal scale agree in the variance of their entries and differ in higher "
        "moments; symmetric ones of equal spectral radius have a quarter of that variance.",
        _initial(evaluation),
    )


def _headline(evaluation: Evaluation) -> Iterator[Item]:
    if len(evaluation.judged):
        yield from headline.headline(evaluation)
    yield from edges.hero(evaluation)


def _ranges(evaluation: Evaluation) -> Iterator[Item]:
    if len(evaluation.judged):
        yield from findings.families(evaluation, **evaluation.main)
    yield from observations.learning(evaluation)
    yield from maps.stability_maps(evaluation)
    yield findings.comparisons(evaluation)


def _accuracy(evaluation: Evaluation) -> Iterator[Item]:
    yield from observations.accuracies(evaluation)
    yield from curves.curves(evaluation, "spectral_radius")


def _variance(evaluation: Evaluation) -> Iterator[Item]:
    if len(evaluation.judged):
        yield from findings.families(evaluation, "variance", **evaluation.main)
    yield from edges.by_variance(evaluation)
    yield from curves.curves(evaluation, "variance")
    yield findings.comparisons(evaluation, "variance")


def _settings(evaluation: Evaluation) -> Iterator[Item]:
    yield from observations.pairs(evaluation)
    yield from edges.by_gradient(evaluation)


def _traces(evaluation: Evaluation) -> Iterator[Item]:
    if len(evaluation.judged):
        shown = evaluation.select(**evaluation.main)
        yield from observations.convergence(evaluation, traces.chosen_scales(shown))
    yield from traces.traces(evaluation)


def _initial(evaluation: Evaluation) -> Iterator[Item]:
    if len(evaluation.initial):
        yield from draws.spread(evaluation.initial)
        yield from draws.agreement(evaluation.initial)
        yield from draws.unsolved(evaluation.initial)
    yield from moments.moments(evaluation.initial)


def scope(evaluation: Evaluation) -> str:
    """What was run, in one sentence."""
    runs = evaluation.judged
    if runs.empty:
        return "This study has no training runs."
    distinct = runs.drop_duplicates(["key", *SETTING, "weight", "scale", "seed"])
    many = len(distinct[(distinct["weight"] != "dense") | (distinct["regime"] != "kept")])
    parts = [
        f"{many} training runs",
        f"weights {_list(evaluation, 'weight')}",
        f"{runs['scale'].nunique()} scales from {runs['scale'].min():.3g} to "
        f"{runs['scale'].max():.3g}",
        f"{runs['seed'].nunique()} seeds",
        f"tasks {_list(evaluation, 'task')}",
        f"activations {_list(evaluation, 'activation')}",
        f"solvers {_list(evaluation, 'solver')}",
        f"gradients {_list(evaluation, 'gradient')}",
    ]
    return "; ".join(parts) + "."


def _list(evaluation: Evaluation, column: str) -> str:
    return ", ".join(evaluation.values(column))


def limitations(evaluation: Evaluation) -> list[str]:
    """What this study cannot say."""
    runs, table = evaluation.judged, evaluation.table()
    if runs.empty:
        return []
    seeds, needed = runs["seed"].nunique(), evaluation.criteria.seeds
    features = sorted(runs["features"].dropna().unique()) if "features" in runs else []
    optimizers = sorted(runs["optimizer"].dropna().unique()) if "optimizer" in runs else []
    step = findings.octaves_of(float(table["step"].median()))
    limits = [
        f"Edges are known to one step of the grid of scales, {step}. A smaller difference does not "
        "show.",
        "Ranges that reach the smallest or the largest scale are cut off by the grid: their true "
        f"width is larger. Of {len(table)} median ranges, {int(table['at_bottom'].sum())} begin at "
        f"the smallest scale and {int(table['at_top'].sum())} end at the largest.",
        "Each comparison has its own interval; none is corrected for the number of comparisons.",
        "Models are small and training is short"
        + (f" ({_numbers(features)} features)" if features else "")
        + ", with one learning rate per task"
        + (f" and {' or '.join(map(str, optimizers))}" if optimizers else "")
        + ". A rate tuned for each scale could move the edges.",
        "The threshold on accuracy is relative to the best family of the same setting; another "
        "margin moves the edges.",
    ]
    if seeds < needed:
        limits.insert(
            0,
            f"There are {seeds} seeds where a verdict takes {needed}: no comparison is decided.",
        )
    if runs["error"].ne("").any():
        failed = int(runs["error"].ne("").sum())
        limits.append(f"{failed} runs ended with an error; they count as unstable.")
    return limits


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{v:g}" for v in values)
