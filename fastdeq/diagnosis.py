"""What is known of a layer on a batch: per-sample numbers, and a table of them for people."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .estimate import Estimate
from .solution import Solution, Status

_WIDTH = 79
_SHOWN = 8  # parameters in the table


@dataclass(frozen=True)
class ParameterGradient:
    """The gradient of one parameter.

    Attributes:
        name: as in ``cell.named_parameters()``.
        norm: Frobenius norm of the gradient.
        relative: that over the norm of the parameter; infinite for a parameter of zeros.
        two_norm: 2-norm as a matrix, of the square weights alone; NaN for others.
    """

    name: str
    norm: float
    relative: float
    two_norm: float = math.nan


@dataclass(frozen=True)
class Recommendation:
    """One change, for programs, with its reason for people.

    Attributes:
        change: what to change: "scale" (a factor for the square weights), "weight" (a dict of
            family and scale for :mod:`fastdeq.init` or :class:`fastdeq.AffineCell`),
            "learning_rate" (of the square weights; a dict by optimiser), "input" (samples, a list),
            or an option of :class:`fastdeq.DEQLayer`.
        value: what to change it to.
        why: the reason, in numbers.
    """

    change: str
    value: Any
    why: str

    def __str__(self) -> str:
        return f"{self.change} = {_shown(self.value)}: {self.why}"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items())
    if isinstance(value, list) and len(value) > 6:
        return f"[{', '.join(map(str, value[:6]))}, ...]"
    return f"{value:.2g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, eq=False, repr=False)
class Diagnosis:
    """How a layer solves a batch of B samples and is differentiated; printed it is a table.

    Compared and hashed by identity. S samples were probed for the spectrum of ``J = df/dz``.

    Attributes:
        name: of the cell.
        size: numbers in the state of a sample.
        tol: relative tolerance of the layer.
        max_iter: its iteration limit.
        forward: the :class:`fastdeq.Solution` of the forward solve, with its value.
        adjoint: that of the gradient's linear solve, without its value; None where the gradient
            needs none, or nothing has a gradient.
        contraction: ``(B,)``, at which plain steps reduced the residual at last, from the layer's
            own start; NaN where none was seen.
        rate: ``(B,)``, by which the layer's own solver reduced the residual per update, on average.
        probed: ``(S,)`` int64, the samples that ``radius`` and ``norm`` are of: spread over the
            order of iterations, the slowest first.
        radius: spectral radius of J at the state that was found, an :class:`Estimate` ``(S,)``.
        norm: 2-norm of J, an :class:`Estimate` ``(S,)``; NaN for cells without two derivatives.
        gradient_norm: ``(B,)``, ``|g|``, 2-norm of the gradient of the loss at the equilibrium.
        adjoint_norm: ``(B,)``, ``|u|`` of the adjoint ``u = g + J^T u``; NaN without one.
        parameters: gradients of the cell's parameters.
        recurrent: names of the square weights, whose scale and learning rate are spoken of.
        has_loss: whether the gradient is that of a loss that was given.
        notes: what could not be measured, and why.
        recommendations: what to change.
    """

    name: str
    size: int
    tol: float
    max_iter: int
    forward: Solution
    adjoint: Solution | None
    contraction: Tensor
    rate: Tensor
    probed: Tensor
    radius: Estimate
    norm: Estimate
    gradient_norm: Tensor
    adjoint_norm: Tensor
    parameters: tuple[ParameterGradient, ...]
    recurrent: tuple[str, ...]
    has_loss: bool
    notes: tuple[str, ...] = ()
    recommendations: tuple[Recommendation, ...] = field(default=())

    @property
    def predicted_iterations(self) -> Tensor:
        """``(S,)``: plain steps to the tolerance, ``log(tol) / log(radius)``; infinite from a
        radius of 1 on, and for a tolerance of 0."""
        return predicted(self.radius.value, self.tol)

    @property
    def amplification(self) -> Tensor:
        """``(B,)``: ``|u| / |g|``, at most ``1 / (1 - |J|)``; NaN where unknown."""
        return self.adjoint_norm / self.gradient_norm

    @property
    def distance(self) -> float:
        """``1 - radius`` at the worst sample, negative beyond the edge of stability; NaN where
        unknown."""
        return 1 - largest(self.radius.value)

    @property
    def growth(self) -> float:
        """The factor by which J may grow until its radius is 1, ``1 / radius``: to first order that
        of a weight's scale."""
        radius = largest(self.radius.value)
        return 1 / radius if radius != 0 else math.inf

    @property
    def stragglers(self) -> Tensor:
        """``(B,)`` bool: samples that did not converge, or took more than twice the median of
        those that did."""
        done, count = self.forward.converged, self.forward.iterations
        if not bool(done.any()):
            return ~done
        return ~done | (count > 2 * count[done].double().median())

    @property
    def straggler_share(self) -> float:
        """The share of :attr:`stragglers`; 0 of an empty batch."""
        found = self.stragglers
        return float(found.double().mean()) if found.numel() else 0.0

    @property
    def converged_share(self) -> float:
        """The share of samples that converged; 1 of an empty batch."""
        found = self.forward.converged
        return float(found.double().mean()) if found.numel() else 1.0

    def __repr__(self) -> str:
        return (
            f"Diagnosis({self.name}: {self.forward.status.numel()} samples, "
            f"{100 * self.converged_share:.0f}% converged, "
            f"spectral radius {_number(largest(self.radius.value))}, "
            f"{len(self.recommendations)} recommendations)"
        )

    def __str__(self) -> str:
        count = self.forward.status.numel()
        title = f"{self.name}: {count} samples of {self.size} numbers, tol={self.tol:g}"
        lines = [title[:_WIDTH], ""]
        lines += [f"  forward  {_statuses(self.forward)}"]
        lines += [f"  adjoint  {_statuses(self.adjoint) if self.adjoint else 'none'}", ""]
        lines += [f"  {'':<42}{'median':>10}{'worst':>10}"]
        for label, values in self._rows():
            lines.append(f"  {label:<42}{_median(values):>10}{_number(largest(values)):>10}")
        lines += ["", f"  {'1 - spectral radius':<42}{_number(self.distance):>20}"]
        lines += [f"  {'weights may grow by, to first order':<42}{_number(self.growth):>20}"]
        lines += [f"  {'stragglers':<42}{f'{100 * self.straggler_share:.0f}%':>20}"]
        if self.parameters:
            lines += ["", f"  {'gradient of':<42}{'norm':>10}{'relative':>10}{'2-norm':>10}"]
            for p in sorted(self.parameters, key=self._order)[:_SHOWN]:
                numbers = [_number(n) for n in (p.norm, p.relative, p.two_norm)]
                lines.append(
                    f"  {p.name[-41:]:<42}{numbers[0]:>10}{numbers[1]:>10}{numbers[2]:>10}"
                )
            if len(self.parameters) > _SHOWN:
                lines.append(f"  and {len(self.parameters) - _SHOWN} others")
        for note in self.notes:
            lines += ["", *textwrap.wrap(f"Note: {note}", _WIDTH)]
        return "\n".join([*lines, "", listed(self.recommendations)])

    def _order(self, p: ParameterGradient) -> tuple[bool, float]:
        return p.name not in self.recurrent, -p.norm

    def _rows(self) -> list[tuple[str, Tensor]]:
        probed = f"{len(self.probed)} samples"
        rows = [("iterations, forward", self.forward.iterations)]
        if self.adjoint is not None:
            rows.append(("iterations, adjoint", self.adjoint.iterations))
        return [
            *rows,
            (f"plain steps predicted ({probed})", self.predicted_iterations),
            ("contraction of plain steps, seen", self.contraction),
            ("residual per update of the solver", self.rate),
            (f"spectral radius of J ({probed})", self.radius.value),
            ("  its accuracy", self.radius.accuracy),
            (f"2-norm of J ({probed})", self.norm.value),
            ("  its accuracy", self.norm.accuracy),
            ("|g|, gradient at the equilibrium", self.gradient_norm),
            ("|u| / |g|, amplified by the adjoint", self.amplification),
        ]


def listed(recommendations: tuple[Recommendation, ...]) -> str:
    """The recommendations as numbered lines."""
    if not recommendations:
        return "Nothing to change."
    lines = ["To change:"]
    for i, r in enumerate(recommendations, 1):
        lines += textwrap.wrap(
            f"{i}. {r}", _WIDTH - 2, initial_indent="  ", subsequent_indent="     "
        )
    return "\n".join(lines)


def predicted(radius: Tensor, tol: float) -> Tensor:
    """Plain steps of that rate to the tolerance; 1 at least."""
    if tol >= 1:
        return torch.ones_like(radius)
    steps = (math.log(tol) if tol > 0 else -math.inf) / radius.log()
    steps = torch.where(radius < 1, steps.clamp(min=1.0), math.inf)
    return torch.where(radius.isnan(), math.nan, steps)


def largest(values: Tensor) -> float:
    """The largest that is not NaN; NaN where there is none."""
    known = values[~values.isnan()] if values.is_floating_point() else values
    return float(known.max()) if known.numel() else math.nan


def _median(values: Tensor) -> str:
    known = values.double()
    known = known[~known.isnan()]
    return _number(float(known.median()) if known.numel() else math.nan)


def _number(value: float) -> str:
    if math.isnan(value):
        return "-"
    if value == int(value) if math.isfinite(value) else False:
        return str(int(value)) if abs(value) < 1e6 else f"{value:.1e}"
    return f"{value:.3g}"


def _statuses(solution: Solution) -> str:
    status = solution.status
    counts = [f"{int((status == s).sum())} {s.name}" for s in Status if bool((status == s).any())]
    return ", ".join(counts) or "0 samples"
