"""Counts of products and certificates for ``test_bench_structure.py``."""

from __future__ import annotations

from functools import cache

import torch
from equilibrium import equilibrium
from torch import Tensor

from fastdeq import (
    GMRES,
    MINRES,
    AffineCell,
    Anderson,
    DEQLayer,
    Energy,
    HeavyBall,
    Neumann,
    Orthogonal,
    Picard,
    Solution,
    Symmetric,
)

RADII = (0.9, 0.99, 1.2, 2.0, 4.0, 8.0)
SCALES = (0.5, 0.9, 0.99)
FEATURES, BATCH, TOL, MOST = 256, 64, 1e-5, 3000

FORWARDS = ("damped", "anderson(5)", "heavy ball", "energy", "auto")
ADJOINTS = ("neumann", "anderson(5)", "gmres", "heavy ball", "minres", "auto", "minres/anderson")


@cache
def _cell(radius: float) -> tuple[AffineCell, Tensor]:
    torch.manual_seed(0)
    cell = AffineCell(FEATURES, FEATURES, weight=Symmetric(FEATURES, radius, parametrized=False))
    cell.weight.tags = frozenset({"symmetric"})
    return cell, torch.randn(BATCH, FEATURES)


def _solver(name: str, radius: float) -> object:
    cell, _ = _cell(radius)
    least = float(torch.linalg.eigvalsh(cell.recurrent_weight().detach())[0])
    return {
        "damped": Picard(damping=min(1.0, 2 / (1 + abs(least))) * 0.95),
        "anderson(5)": Anderson(),
        "heavy ball": HeavyBall(),
        "energy": Energy(),
        "neumann": Neumann(),
        "gmres": GMRES(),
        "minres": MINRES(),
        "auto": "auto",
    }[name]


def _solve(radius: float, solver: object, adjoint: object) -> tuple[Solution, Solution]:
    cell, x = _cell(radius)
    layer = DEQLayer(
        cell, solver=solver, adjoint=adjoint, tol=TOL, max_iter=MOST, on_failure="ignore"
    )
    layer(x).sum().backward()
    forward, backward = layer.last_solution, layer.last_adjoint_solution
    assert forward is not None
    assert backward is not None
    _verify(cell, x, forward)
    return forward, backward


@torch.no_grad()
def _verify(cell: AffineCell, x: Tensor, solution: Solution) -> None:
    """The residual of what is said to have converged, in float64."""
    w, z = cell.recurrent_weight().double(), solution.value.double()
    c = cell.injection.double()(x.double())
    cell.injection.float()
    value = torch.tanh(z @ w.t() + c)
    residual = (value - z).norm(dim=1) / value.norm(dim=1)
    rounding = 4e-7 * float(w.norm())
    assert (residual[solution.converged] <= TOL + rounding).all(), residual.max()


def _shown(solution: Solution) -> str:
    count = solution.iterations.double()
    failed = int((~solution.converged).sum())
    return f"{float(count.mean()):.0f}/{int(count.max())}" + (f" ({failed})" if failed else "")


@cache
def _forward(radius: float, name: str) -> Solution:
    return _solve(radius, _solver(name, radius), "auto")[0]


@cache
def _adjoint(radius: float, name: str) -> Solution:
    return _solve(radius, Energy(), _solver(name, radius))[1]


def counts(direction: str, radius: float) -> list[str]:
    """A row of the table: mean and worst count of products by each method."""
    if direction == "forward":
        return [_shown(_forward(radius, name)) for name in FORWARDS]
    shown = [_shown(_adjoint(radius, name)) for name in ADJOINTS[:-1]]
    means = [_adjoint(radius, n).iterations.double().mean() for n in ("minres", "anderson(5)")]
    return [*shown, f"{float(means[0] / means[1]):.2f}"]


def certificate(scale: float) -> list[str]:
    """What a solve without a stop test does, what its bound says, and what is true."""
    torch.manual_seed(0)
    cell, x = AffineCell(FEATURES, FEATURES, weight=Orthogonal(FEATURES, scale)), None
    x = torch.randn(BATCH, FEATURES)
    layer = DEQLayer(cell, solver=Picard(fixed_iterations="certified"))
    with torch.no_grad():
        layer(x)
        fixed = layer.last_solution
        free = DEQLayer(cell)
        free(x)
        w, c = cell.recurrent_weight().double(), cell.inject(x).double()
        exact = equilibrium(w, c, "tanh", contraction=True)
    assert fixed is not None
    assert free.last_solution is not None
    error = (fixed.value.double() - exact).norm(dim=1)
    bound = fixed.error_bound
    assert bound is not None
    assert fixed.converged.all()
    assert (error <= bound).all()
    return [
        str(int(fixed.iterations.max())),
        f"{float(fixed.residual.max()):.1e}",
        f"{float(error.max()):.1e}",
        f"{float(bound.max()):.1e}",
        _shown(free.last_solution),
    ]
