"""Maps of rows with explicit arguments, and ways to solve them: what transforms work on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.func import vjp

from ..activations import ACTIVATIONS
from ..ops.solve_affine_adjoint import unit_rows
from ..ops.solve_common import expanded_zeros
from ..solvers import Structure
from .adjoint_limit import Held, limited
from .batched_gradients import stacked
from .spec import Report, SolveSpec, Specs, ignore, without_first

Folded = tuple["Rows", tuple[Tensor, ...]]


def pullback(f: Callable[..., Any], *at: Tensor) -> Callable[[Any], tuple[Tensor, ...]]:
    """Vector-Jacobian products of f."""
    return cast(Any, vjp(f, *at))[1]  # type: ignore[no-any-return]


def of_some(
    f: Callable[..., Any], at: Sequence[Tensor], moving: Sequence[int]
) -> Callable[..., Any]:
    """f as a function of its arguments in the places ``moving``; the others are those of ``at``."""

    def of_moving(*values: Tensor) -> Any:
        whole = list(at)
        for i, value in zip(moving, values, strict=True):
            whole[i] = value
        return f(*whole)

    return of_moving


def gradients_of(
    f: Callable[..., Any], at: Sequence[Tensor], cotangent: Tensor
) -> list[Tensor | None]:
    """Vector-Jacobian products of f for those of ``at`` that are real or complex numbers; None for
    others, as masks and indices are."""
    moving = [i for i, t in enumerate(at) if t.is_floating_point() or t.is_complex()]
    found: list[Tensor | None] = [None] * len(at)
    if moving:
        pulled = pullback(of_some(f, at, moving), *[at[i] for i in moving])(cotangent)
        for i, t in zip(moving, pulled, strict=True):
            found[i] = t
    return found


def pushforward(f: Callable[..., Tensor], *at: Tensor) -> Callable[..., Tensor]:
    """Jacobian-vector products of f, one factor for each argument.

    The product with the transpose is linear, so that its own transpose is the product: f needs no
    rules for forward mode, which does not nest, and it is evaluated once for many products.
    """
    value, pull = cast(Any, vjp(f, *at))
    back = pullback(pull, torch.zeros_like(value))
    return lambda *along: back(along)[0]


class Rows(Protocol):
    """``f(z, *theta)`` of rows ``(B, n)``; the others see plain tensors only."""

    def f(self, z: Tensor, *theta: Tensor) -> Tensor: ...

    def solve(self, start: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """z of ``z = f(z, *theta)``, and which samples ended NONFINITE ``(B,)`` bool."""
        ...

    def solve_linear(
        self, transpose: bool, g: Tensor, z: Tensor, theta: Sequence[Tensor]
    ) -> Tensor:
        """``u = g + A u`` with A the derivative of f to z, or its transpose."""
        ...

    def batched(
        self,
        count: int,
        randomness: str,
        dims: Sequence[int | None],
        theta: Sequence[Tensor],
    ) -> Folded:
        """The same for ``count`` times as many rows, theta being batched along ``dims``."""
        ...


@dataclass(frozen=True)
class GeneralRows:
    """Any map."""

    map: Callable[..., Tensor]
    forward: SolveSpec
    adjoint: SolveSpec
    report: Report
    report_adjoint: Report

    def f(self, z: Tensor, *theta: Tensor) -> Tensor:
        return self.map(z, *theta)

    def solve(self, start: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            solution = self.forward.iterate(lambda z: self.map(z, *theta), start.detach())
        self.report(solution)
        return solution.value.clone(), solution.nonfinite

    def solve_linear(
        self, transpose: bool, g: Tensor, z: Tensor, theta: Sequence[Tensor]
    ) -> Tensor:

        def of_state(state: Tensor) -> Tensor:
            return self.map(state, *theta)

        push = None if transpose else pushforward(of_state, z)
        pull = pullback(of_state, z) if transpose else None

        def product(u: Tensor) -> Tensor:
            if pull is not None:
                return pull(u)[0]
            assert push is not None
            return push(u)

        report = Held(self.report_adjoint)
        with torch.no_grad():
            unit = unit_rows(g)
            solution = self.adjoint.iterate(
                lambda u: unit.rows + product(u),
                expanded_zeros(unit.rows),
                lambda u: unit.rows.clone(),
            )
            solution = without_first(solution)
            u = unit.restore(solution.value.clone())
        if self.adjoint.limit is None:
            self.report_adjoint(solution.with_value(u.detach().clone()))
            return u
        report(solution)
        return limited(report, u, g, self.adjoint.limit)

    def batched(
        self,
        count: int,
        randomness: str,
        dims: Sequence[int | None],
        theta: Sequence[Tensor],
    ) -> Folded:
        dims = tuple(dims)

        def folded(z: Tensor, *theta: Tensor) -> Tensor:
            each = torch.vmap(self.map, (0, *dims), randomness=randomness)
            value: Tensor = each(z.unflatten(0, (count, -1)), *theta)
            return value.flatten(0, 1)

        return replace(self, map=folded), tuple(theta)


@dataclass(frozen=True)
class AffineRows:
    """``phi(z W^T + c)`` with ``theta = (W, c)``, by the fused operators."""

    activation: str
    specs: Specs
    report: Report
    report_adjoint: Report

    def f(self, z: Tensor, *theta: Tensor) -> Tensor:
        weight, c = theta
        return ACTIVATIONS[self.activation].function(torch.addmm(c, z, weight.t()))

    def solve(self, start: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        weight, c = (t.detach() for t in theta)
        spec = self.specs.forward
        outputs = spec.forward(weight, c, start.detach(), self.activation, False, None)
        solution = spec.solution(outputs, self.specs.structure.contraction)
        self.report(solution)
        return outputs[0].clone(), solution.nonfinite

    def solve_linear(
        self, transpose: bool, g: Tensor, z: Tensor, theta: Sequence[Tensor]
    ) -> Tensor:
        weight, c = theta
        slope = ACTIVATIONS[self.activation].slope(torch.addmm(c, z, weight.t()))
        spec = self.specs.adjoint
        if transpose and spec.limit is not None:
            report = Held(self.report_adjoint)
            q = replace(spec, limit=None).adjoint(weight, slope, g, None, report)
            return limited(report, g + q @ weight, g, spec.limit)
        if transpose:  # q = D u
            return g + spec.adjoint(weight, slope, g, None, self.report_adjoint) @ weight
        # v = h + D W v; with y = v - h: y = D (W h + W y)
        back = weight.t()
        return g + spec.adjoint(back, slope, g @ back, None, ignore)

    def batched(
        self,
        count: int,
        randomness: str,
        dims: Sequence[int | None],
        theta: Sequence[Tensor],
    ) -> Folded:
        (weight, c), (of_weight, of_c) = theta, dims
        if of_weight is None:
            return self, (weight, stacked(c, of_c, count).flatten(0, 1))
        structure = replace(self.specs.structure, affine=False, bitwise_symmetric=False)
        options = replace(self.specs.options, backend="auto", precision="auto")
        try:
            specs = Specs(options, structure)
            sides = specs.forward, specs.adjoint
        except ValueError:  # a solver for affine cells alone
            specs = Specs(replace(options, solver="auto", adjoint="auto"), Structure())
            sides = specs.forward, specs.adjoint
        each = GeneralRows(self.f, *sides, self.report, self.report_adjoint)
        return each.batched(count, randomness, dims, theta)
