"""What all contestants solve around a general cell, and what their answers are measured by.

    z* = f(z*, x)             r = f(z) - z
    u  = g + J^T u            g = dL/dz*, J = df/dz at the z that a contestant returned

The residuals are ``|r| / |f(z)|`` and ``|g + J^T u - u| / |g + J^T u|``, 2-norms over all of a
sample's state, of the worst sample, evaluated here, in float64. The adjoint solution u of any
contestant is the gradient of a tensor of zeros that is added to the value of the cell: everybody
sends u through one evaluation of it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from general_cells import State, build
from torch import Tensor, nn

TOL = 1e-3
# Of a float32 evaluation: one of these cells is off by some 1e-6, so 1e-5, 1 % of tol, is ample.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class GeneralSpec:
    """A cell of ``general_cells.CELLS``. ``threads``: 0 leaves torch's number."""

    kind: str
    shape: tuple[int, ...]
    tol: float = TOL
    threads: int = 0
    max_iter: int = 60

    hard = False

    @property
    def size(self) -> str:
        return "x".join(map(str, self.shape))


@cache
def general_problem_of(spec: GeneralSpec) -> GeneralProblem:
    return GeneralProblem(spec)


class GeneralProblem:
    """float32, the same for everybody and in every run."""

    def __init__(self, spec: GeneralSpec):
        parts = build(spec.kind, spec.shape)
        self.spec, self.allowed = spec, spec.tol + _ROUNDING
        self.cell, self.x, self.start = parts.cell, parts.x, parts.start
        generator = torch.Generator().manual_seed(2)
        self.grad = mapped(lambda p: torch.randn(p.shape, generator=generator), self.start)
        self._cell, self._x = copy.deepcopy(self.cell).double(), _double(self.x)
        self._g = rows(_double(self.grad))

    def state_residual(self, z: State) -> float:
        """``|f(z) - z| / |f(z)|`` of the worst sample; infinite where z is not finite."""
        return _residual(self._cell, self._x, z)

    def adjoint_residual(self, u: State, z: State) -> float:
        """Distance from u to ``g + J^T u``, relative, of the worst sample."""
        at = mapped(lambda part: part.requires_grad_(), _double(z))
        u = _double(u)
        products = torch.autograd.grad(tensors(self._cell(at, self._x)), tensors(at), tensors(u))
        return _relative(self._g + rows(products), rows(u))


def tensors(state: State) -> tuple[Tensor, ...]:
    return tuple(state) if isinstance(state, (tuple, list)) else (state,)


def mapped(function: Any, state: State) -> State:
    done = tuple(map(function, tensors(state)))
    return done if isinstance(state, (tuple, list)) else done[0]


def rows(state: State) -> Tensor:
    """``(B, n)``: all parts of each sample."""
    return torch.cat([part.flatten(1) for part in tensors(state)], 1)


def like(packed: Tensor, state: State) -> State:
    """Rows as a state of the shape of ``state``; views."""
    parts = tensors(state)
    split = packed.split([part[0].numel() for part in parts], 1)
    views = tuple(r.view(part.shape) for r, part in zip(split, parts, strict=True))
    return views if isinstance(state, (tuple, list)) else views[0]


def _double(state: State) -> State:
    return mapped(lambda part: part.detach().double(), state)


def relative_residual(cell: nn.Module, x: State, z: State) -> float:
    """``|f(z) - z| / |f(z)|`` in float64 of the worst sample; infinite where z is not finite."""
    return _residual(copy.deepcopy(cell).double(), _double(x), z)


def _residual(cell: nn.Module, x: State, z: State) -> float:
    with torch.no_grad():
        z = _double(z)
        return _relative(rows(cell(z, x)), rows(z))


def _relative(value: Tensor, z: Tensor) -> float:
    ratio = (value - z).norm(dim=1) / value.norm(dim=1)
    return float(ratio.nan_to_num(nan=torch.inf).max())


class Probed(nn.Module):
    """A cell with zeros added to its value, first among the parameters, whose gradient is u."""

    def __init__(self, problem: GeneralProblem):
        super().__init__()
        self.count = len(tensors(problem.start))
        for i, part in enumerate(tensors(problem.start)):
            self.register_parameter(f"probe{i}", nn.Parameter(torch.zeros_like(part)))
        self.cell = problem.cell

    def forward(self, z: State, x: State) -> State:
        probes = iter(self._parameters.values())
        return mapped(lambda part: part + next(probes), self.cell(z, x))


@dataclass
class Counts:
    """Evaluations of the cell and passes of a gradient through it, for the whole batch."""

    calls: int = 0  # without a graph
    graph_calls: int = 0
    products: int = 0  # J^T u
    other_passes: int = 0  # to x and the parameters alone

    @property
    def evaluations(self) -> int:
        return self.calls + self.graph_calls

    @property
    def passes(self) -> int:
        return self.products + self.other_passes


class Counted(nn.Module):
    """A cell that counts."""

    def __init__(self, cell: nn.Module):
        super().__init__()
        self.cell = cell
        self.counts = Counts()

    def forward(self, z: State, x: State) -> State:
        if not torch.is_grad_enabled():
            self.counts.calls += 1
            return self.cell(z, x)
        self.counts.graph_calls += 1
        first, *others = tensors(z)
        if first.requires_grad:
            first = first.view_as(first)
            first.register_hook(self._product)
            z = (first, *others) if isinstance(z, (tuple, list)) else first
        out = self.cell(z, x)
        tensors(out)[0].register_hook(self._pass)
        return mapped(lambda part: part.view_as(part), out)

    def _product(self, _: Tensor) -> None:
        self.counts.products += 1
        self.counts.other_passes -= 1

    def _pass(self, _: Tensor) -> None:
        self.counts.other_passes += 1
