"""Problems for the CPU engine, each with what bounds the rounding errors of its map.

u       rounding unit of the dtype that the solve runs in
f       the map: phi(W z + c), or D (g + q W) with g scaled to unit norm
L       its Lipschitz constant; the problems made here contract
rho     (B,) bound on the rounding error |f_computed(z) - f(z)|

A sum of d products errs by ``lambda sqrt(d) u sum |terms|`` with probability close to one (N.
Higham and T. Mary, SIAM J. Sci. Comput. 41 (2019) A2815), lambda = 2 here.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastdeq.activations import ACTIVATIONS
from fastdeq.solvers import SolveOptions, Solver, loop

SUM = 2.0  # lambda


class Outputs(NamedTuple):
    value: Tensor
    status: Tensor
    iterations: Tensor
    residual: Tensor
    rejects: Tensor
    value_slope: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """What both directions pass to the operator and to the plain PyTorch one."""

    solver: Solver
    tol: float = 1e-5
    max_iter: int = 100
    precision: str = "float32"
    atol: float = 0.0
    patience: int | None = None

    def options(self) -> SolveOptions:
        limits = {"tol": self.tol, "atol": self.atol, "max_iter": self.max_iter}
        return SolveOptions.of(
            self.solver, patience=self.patience, precision=self.precision, **limits
        )


@dataclass(frozen=True)
class Forward:
    weight: Tensor
    injection: Tensor
    activation: str = "tanh"
    start: Tensor | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        return self.weight, self.injection, *([] if self.start is None else [self.start])

    def arguments(
        self,
        call: Call,
        engine: str,
        slope: bool = True,
        bitwise_symmetric: bool = False,
        packed: Tensor | None = None,
    ) -> tuple:
        """Those of the operator ``solve_affine``."""
        first = self.weight, self.injection, self.start, self.activation
        return *first, slope, packed, bitwise_symmetric, engine, *call.options().arguments

    def run(self, call: Call, engine: str, slope: bool = True) -> Outputs:
        return Outputs(*torch.ops.fastdeq.solve_affine(*self.arguments(call, engine, slope)))

    def engine(self, call: Call, slope: bool = True) -> Outputs:
        return self.run(call, "cpp", slope)

    def reference(self, call: Call, slope: bool = True) -> Outputs:
        return self.run(call, "reference", slope)

    def double(self) -> Forward:
        start = None if self.start is None else self.start.double()
        return Forward(self.weight.double(), self.injection.double(), self.activation, start)

    def pre(self, z: Tensor) -> Tensor:
        """W z + c in float64."""
        return torch.addmm(self.injection.double(), z.double(), self.weight.double().t())

    def step(self, z: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation].function(self.pre(z))

    def sum_error(self, z: Tensor, unit: float) -> Tensor:
        """(B, d) bound on the rounding error of W z + c."""
        w, c = self.weight.double().abs(), self.injection.double().abs()
        return SUM * (w.shape[0] + 1) ** 0.5 * unit * torch.addmm(c, z.double().abs(), w.t())

    def rounding(self, z: Tensor, unit: float) -> Tensor:
        phi, pre, error = (
            ACTIVATIONS[self.activation].function,
            self.pre(z),
            self.sum_error(z, unit),
        )
        value = phi(pre)
        moved = torch.maximum((phi(pre + error) - value).abs(), (phi(pre - error) - value).abs())
        # Vector functions err by less than 4 u; gelu's 1 + erf cancels where p is negative.
        phi_error = pre.abs() if self.activation == "gelu" else value.abs()
        return (moved + 4 * unit * phi_error).norm(dim=1)

    def lipschitz(self) -> Tensor:
        norm = torch.linalg.matrix_norm(self.weight.double(), 2)
        return (norm * ACTIVATIONS[self.activation].lipschitz).expand(len(self.injection))

    def initial(self) -> Tensor:
        rows = torch.zeros_like(self.injection) if self.start is None else self.start
        return loop.finite_rows(rows.double())

    def scale(self) -> Tensor:
        return torch.ones(len(self.injection), 1, dtype=torch.float64)


@dataclass(frozen=True)
class Adjoint:
    weight: Tensor
    slope: Tensor
    grad: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.weight, self.slope, self.grad

    def arguments(
        self,
        call: Call,
        engine: str,
        packed: Tensor | None = None,
        bitwise_symmetric: bool = False,
    ) -> tuple:
        """Those of the operator ``solve_affine_adjoint``."""
        return *self.tensors(), packed, bitwise_symmetric, engine, *call.options().arguments

    def run(self, call: Call, engine: str) -> Outputs:
        return Outputs(*torch.ops.fastdeq.solve_affine_adjoint(*self.arguments(call, engine)))

    def engine(self, call: Call) -> Outputs:
        return self.run(call, "cpp")

    def reference(self, call: Call) -> Outputs:
        return self.run(call, "reference")

    def double(self) -> Adjoint:
        return Adjoint(*(t.double() for t in self.tensors()))

    def unit_grad(self) -> Tensor:
        return self.grad.double() / self.scale()

    def step(self, q: Tensor) -> Tensor:
        """At unit scale, as the residual is."""
        pre = torch.addmm(self.unit_grad(), q.double(), self.weight.double())
        return self.slope.double() * pre

    def rounding(self, q: Tensor, unit: float) -> Tensor:
        w, d = self.weight.double().abs(), self.slope.double().abs()
        terms = torch.addmm(self.unit_grad().abs(), q.double().abs(), w)
        error = (SUM * (w.shape[0] + 1) ** 0.5 + 4) * unit * d * terms  # 4: g scaled, D times
        return error.norm(dim=1)

    def lipschitz(self) -> Tensor:
        norm = torch.linalg.matrix_norm(self.weight.double(), 2)
        return norm * self.slope.double().abs().amax(1)

    def initial(self) -> Tensor:
        return torch.zeros_like(self.grad, dtype=torch.float64)

    def scale(self) -> Tensor:
        norm = self.grad.double().norm(dim=1, keepdim=True)
        return torch.where(norm > 0, norm, 1.0)


Case = Forward | Adjoint


def with_layout(t: Tensor, layout: str) -> Tensor:
    """t with other strides and the same entries; "expanded" keeps the first row only."""
    if layout == "transposed":
        return t.t().contiguous().t()
    if layout == "strided":
        wide = t.new_full((2 * t.shape[0] + 1, 3 * t.shape[1] + 1), torch.nan)
        return wide[: 2 * t.shape[0] : 2, : 3 * t.shape[1] : 3].copy_(t)
    if layout == "expanded":
        return t[:1].expand_as(t)
    return t.contiguous()


def make_weight(size: int, norm: float, layout: str = "contiguous") -> Tensor:
    """(d, d) float64 of the given 2-norm."""
    w = with_layout(torch.randn(size, size, dtype=torch.float64), layout)
    factor = norm / torch.linalg.matrix_norm(w, 2)
    return with_layout(w * factor, layout)


def make_forward(
    batch: int,
    size: int,
    dtype: torch.dtype,
    *,
    activation: str = "tanh",
    rate: float = 0.6,
    layout: str = "contiguous",
    rows: str = "contiguous",
    start: str = "none",
) -> Forward:
    """A problem with L = rate. start: "none", "zeros", "random", or "nan" for some rows of NaN."""
    weight = make_weight(size, rate / ACTIVATIONS[activation].lipschitz, layout)
    c = torch.randn(batch, size, dtype=torch.float64)
    z0 = None if start == "none" else torch.zeros(batch, size, dtype=dtype)
    if start in ("random", "nan"):
        z0 = torch.randn(batch, size).to(dtype)
    if start == "nan":
        z0[::2, -1] = torch.nan
    cast = _keeping_strides(weight, dtype)
    z0 = None if z0 is None else with_layout(z0, rows)
    return Forward(cast, with_layout(c.to(dtype), rows), activation, z0)


def make_adjoint(
    batch: int,
    size: int,
    dtype: torch.dtype,
    *,
    rate: float = 0.6,
    layout: str = "contiguous",
    rows: str = "contiguous",
) -> Adjoint:
    weight = _keeping_strides(make_weight(size, rate, layout), dtype)
    slope = torch.rand(batch, size).to(dtype)
    grad = torch.randn(batch, size).to(dtype)
    return Adjoint(weight, with_layout(slope, rows), with_layout(grad, rows))


def _keeping_strides(t: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == t.dtype:
        return t
    wide = torch.empty_strided(t.shape, t.stride(), dtype=dtype)
    if 0 in t.stride():
        return t[:1].to(dtype).expand_as(t)
    return wide.copy_(t)


def perturbed(case: Case, kind: str) -> Case:
    """The problem with a planted error."""
    if kind == "row":  # the last row of the weight is that before it
        weight = case.weight.clone()
        weight[-1] = weight[-2]
        return dataclasses.replace(case, weight=weight)
    if kind == "transposed":
        return dataclasses.replace(case, weight=case.weight.t())
    if kind == "activation":
        return dataclasses.replace(case, activation="hardtanh")
    return dataclasses.replace(case, slope=case.slope * 1.001)
