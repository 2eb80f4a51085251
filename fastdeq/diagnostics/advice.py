"""What to change in a layer, from what was measured. Each rule is one function with its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..diagnosis import Diagnosis, Recommendation, largest
from ..options import Options
from ..solution import Status
from ..solvers import Picard
from ..weights.square import Square
from .recurrent import are_orthogonal, root_mean_square_scale, two_norm, values_of

#: From this spectral radius on, training soon leaves the region where plain steps converge.
EDGE = 0.95
#: The radius that a change of scale aims at, and what is near enough.
TARGET, NEAR = 0.8, (0.6, 0.9)
_TRIALS = 5
_SHARE = 0.1  # of the distance to the edge that one step of training may take
_MOST_ITERATIONS = 1000

#: The spectral radius and the share of samples that converge with the square weights times a
#: factor, as measured.
Trial = Callable[[float], tuple[float, float]]


@dataclass(frozen=True)
class Subject:
    """What is advised on, beside its diagnosis.

    Attributes:
        options: of the layer.
        squares: its square weights.
        trial: None where the weights' scale cannot be tried.
        bad_input: ``(B,)`` bool, samples of x that are not finite.
        certified: whether the map contracts for certain, whatever training does.
        symmetric: whether an energy leads to equilibria at any scale.
        fused: whether it is an :class:`fastdeq.AffineCell` that is solved as one.
    """

    options: Options
    squares: list[Square]
    trial: Trial | None
    bad_input: Tensor
    certified: bool = False
    symmetric: bool = False
    fused: bool = False


def advise(d: Diagnosis, subject: Subject) -> tuple[Recommendation, ...]:
    """The recommendations for a diagnosis, the most urgent first."""
    found = list(_input(d, subject))
    scale, radius = _scale(d, subject)
    found += scale
    if not scale:
        found += [*_limits(d, subject), *_solver(d, subject), *_adjoint(d, subject)]
    found += [*_weight(d, subject, scale), *_compact(d, subject, scale)]
    return (*found, *_learning_rate(d, subject, scale, radius))


def _input(d: Diagnosis, subject: Subject) -> Iterator[Recommendation]:
    bad = torch.nonzero(subject.bad_input).flatten().tolist()
    if bad:
        why = f"{len(bad)} of {len(subject.bad_input)} samples of x have NaN or infinity"
        yield Recommendation("input", bad, why)


def _scale(d: Diagnosis, subject: Subject) -> tuple[list[Recommendation], float]:
    """A factor for the square weights, and the radius that it leads to; none, and the radius now,
    where the scale is fine."""
    radius = largest(d.radius.value)
    overflow = d.forward.nonfinite & ~subject.bad_input
    done = bool(d.forward.converged.all())
    if math.isnan(radius) and not bool(overflow.any()):
        return [], radius
    if not (radius >= EDGE or bool(overflow.any())) or (subject.symmetric and done):
        return [], radius
    seen = f"the spectral radius of J is {radius:.3g} at the worst of {len(d.probed)} samples"
    if bool(overflow.any()):
        seen = f"the state of {int(overflow.sum())} samples overflows"
    if not done:
        seen += f", and {100 * d.converged_share:.0f}% of all converge"
    if not subject.squares:
        why = f"{seen}; the cell has no square weights that are known, so scale J by itself"
        return [Recommendation("scale", TARGET / radius if radius > 0 else 0.5, why)], TARGET
    factor = TARGET / radius if math.isfinite(radius) and radius > 0 else 0.5
    which = _names(subject.squares)
    if subject.trial is None:
        why = f"{seen}; to first order it scales with {which}"
        return [Recommendation("scale", _rounded(factor), why)], TARGET
    factor, after, share = _tried(subject.trial, _rounded(factor))
    why = (
        f"{seen}; with {which} times {factor:.2g} it was measured as {after:.2g}, "
        f"and {100 * share:.0f}% of those samples converge"
    )
    return [Recommendation("scale", factor, why)], after


def _tried(trial: Trial, factor: float) -> tuple[float, float, float]:
    """The factor of some trials whose radius is nearest to the target among those that converge,
    with its radius and share."""
    best = (math.inf, factor, math.nan, 0.0)
    for _ in range(_TRIALS):
        radius, share = trial(factor)
        usable = math.isfinite(radius) and radius > 0
        cost = (1 - share) * 100 + (abs(math.log(radius / TARGET)) if usable else 100)
        best = min(best, (cost, factor, radius, share))
        if share == 1 and usable and NEAR[0] <= radius <= NEAR[1]:
            break
        step = TARGET / radius if usable else 0.5
        if share < 1:
            step = min(step, 0.8)
        factor = _rounded(factor * min(max(step, 0.25), 2.0))
    return best[1:]


def _weight(d: Diagnosis, s: Subject, scale: list[Recommendation]) -> Iterator[Recommendation]:
    """Orthogonal weights where J is far from normal, or the scale has to change anyway."""
    norm, radius = largest(d.norm.value), largest(d.radius.value)
    skewed = norm > 1 and norm > 1.5 * radius and radius >= TARGET
    if not s.squares or s.symmetric or s.certified or not (scale or skewed):
        return
    if are_orthogonal(s.squares):
        return
    factor = scale[0].value if scale else 1.0
    value = {"family": "orthogonal", "scale": _rounded(factor * root_mean_square_scale(s.squares))}
    if any(t.dim() == 2 and len(t) != t.shape[1] for t in (square.tensor for square in s.squares)):
        value["blocks"] = True
    why = "the same mean square of entries"
    if skewed:
        why = (
            f"|J| is {norm:.2g}, {norm / radius:.2g} times its radius, so that a step may take "
            f"away from the equilibrium before steps come closer; {why}"
        )
    if scale:
        why += (
            ", and the scale above; in docs/study.md keeping them orthogonal (fastdeq.init.keep_) "
            "widened the stable range of relu cells at one of two learning rates; their start "
            "alone widened none"
        )
    yield Recommendation("weight", value, why)


def _limits(d: Diagnosis, subject: Subject) -> Iterator[Recommendation]:
    """Iterations and tolerance."""
    status, residual = d.forward.status, d.forward.residual
    late = status == int(Status.MAX_ITER)
    if bool(late.any()):
        rate = d.rate[late]
        needed = largest(math.log(max(d.tol, 1e-16)) / rate[rate < 1].log())
        if bool((rate < 1).all()) and needed <= _MOST_ITERATIONS:
            limit = 10 * math.ceil(0.15 * needed)
            why = (
                f"{int(late.sum())} samples came to the limit of {d.max_iter}; at the rate of "
                f"{float(rate.max()):.3g} per update, the slowest takes about {needed:.0f}"
            )
            yield Recommendation("max_iter", max(limit, d.max_iter + 1), why)
        else:
            yield from _loosened(d, residual[late], f"{int(late.sum())} samples came to the limit")
    stuck = status == int(Status.STAGNATED)
    if bool(stuck.any()):
        yield from _loosened(d, residual[stuck], f"{int(stuck.sum())} samples stagnated")


def _loosened(d: Diagnosis, residual: Tensor, what: str) -> Iterator[Recommendation]:
    worst = largest(residual)
    if math.isfinite(worst) and d.tol < worst < 0.1:
        exponent = math.floor(math.log10(worst))
        tol = math.ceil(2 * worst / 10**exponent) * 10.0**exponent
        yield Recommendation("tol", tol, f"{what} at a residual of {worst:.1e}, tol is {d.tol:g}")


def _solver(d: Diagnosis, subject: Subject) -> Iterator[Recommendation]:
    options, steps = subject.options, largest(d.predicted_iterations)
    if isinstance(options.solver, Picard) and not options.solver.fixed_iterations and steps > 30:
        why = (
            f"plain steps at a radius of {largest(d.radius.value):.3g} take about {steps:.0f} to "
            f"tol={d.tol:g}; acceleration takes fewer"
        )
        plain = options.gradient == "implicit" or getattr(options.gradient, "name", "") == "phantom"
        if plain:
            yield Recommendation("solver", "anderson", why)


def _adjoint(d: Diagnosis, subject: Subject) -> Iterator[Recommendation]:
    if d.adjoint is None:
        return
    failed = ~d.adjoint.converged & d.forward.converged
    if bool(failed.any()):
        why = (
            f"the adjoint of {int(failed.sum())} samples did not converge, at worst to "
            f"{largest(d.adjoint.residual[failed]):.1e}"
        )
        if getattr(d.adjoint.solver, "name", "") == "gmres":
            now = subject.options.adjoint_limits()["max_iter"]
            yield Recommendation("adjoint_max_iter", 2 * now, why)
        else:
            yield Recommendation("adjoint", "gmres", why)
    most = largest(d.amplification)
    known = d.amplification[d.amplification.isfinite()]
    if most > 100 and subject.options.adjoint_limit is None:
        limit = max(10.0, 10 * float(known.double().median()))
        if limit < most:
            why = (
                f"the adjoint of a sample is {most:.3g} times its gradient: I - J is near singular"
            )
            yield Recommendation("adjoint_limit", _rounded(limit), why)


def _compact(d: Diagnosis, s: Subject, scale: list[Recommendation]) -> Iterator[Recommendation]:
    options, count = s.options, d.forward.iterations
    if scale or s.fused or len(count) < 8 or not isinstance(options.batch_dim, int):
        return
    plain = options.gradient == "implicit" and options.stop_norm == "2"
    if options.compact is not False or not plain:
        return
    median, most = float(count.double().median()), int(count.max())
    if median and most > 3 * median and d.straggler_share < 0.5:
        why = (
            f"{100 * d.straggler_share:.0f}% of the samples are stragglers: the slowest took "
            f"{most} iterations, the median is {median:.0f}"
        )
        yield Recommendation("compact", True, why)


def _learning_rate(
    d: Diagnosis, s: Subject, scale: list[Recommendation], radius: float
) -> Iterator[Recommendation]:
    """The rate at which one step changes the radius by a tenth of its distance to 1.

    To first order an eigenvalue of a normal J moves by at most ``|dJ|``, and a relative change of W
    is one of J: ``|d radius| <= radius |dW| / |W|``, 2-norms, summed over the weights. A step of
    Adam has entries of the rate, so ``|dW| <= rate sqrt(rows columns)``; of SGD, ``rate |dL/dW|``.
    """
    if not s.squares or s.certified or not 0 < radius < 1:
        return
    factor = scale[0].value if scale else 1.0
    share = _SHARE * (1 - radius) / radius / len(s.squares)
    sizes = [factor * two_norm(values_of(square)) for square in s.squares]
    entries = [math.sqrt(square.tensor.numel()) for square in s.squares]
    rates = {"adam": _rounded(share * min(n / m for n, m in zip(sizes, entries, strict=True)))}
    gradients = {p.name: p.two_norm for p in d.parameters}
    steps = [gradients.get(square.name, math.nan) for square in s.squares]
    if d.has_loss and all(step > 0 for step in steps) and not scale:
        rates["sgd"] = _rounded(share * min(n / g for n, g in zip(sizes, steps, strict=True)))
    if not all(math.isfinite(r) and r > 0 for r in rates.values()):
        return
    why = (
        f"rule of thumb for {_names(s.squares)}: a step then changes the radius, {radius:.2g}, by "
        f"a tenth of its distance to 1 at most"
    )
    yield Recommendation("learning_rate", rates, why)


def _names(squares: list[Square]) -> str:
    return ", ".join([s.name for s in squares[:3]] + ["..."] * (len(squares) > 3))


def _rounded(value: Any) -> float:
    """Two significant digits."""
    number = float(value)
    return float(f"{number:.2g}") if math.isfinite(number) else number
