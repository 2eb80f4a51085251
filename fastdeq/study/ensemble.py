"""Statistics of the equilibrium over draws of W, at initialisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..activations import ACTIVATIONS, Activation
from ..conventions import in_convention
from ..errors import check_choice
from ..functional import fixed_point
from ..weights import WEIGHTS
from .config import as_floats, key_of

_FORMAT = 1
_STEPS, _TOL = 2000, 1e-10  # of the solve for one draw
_RADII = 20  # draws whose Jacobian's eigenvalues are computed: they cost as much as all the rest


@dataclass(frozen=True)
class Ensemble:
    """Draws of W of one family, scale and activation, for one injection c each.

    Raises:
        ValueError: an unknown name; a size, scale or variance that is not positive.
    """

    weight: str
    scale: float
    activation: str = "identity"
    features: int = 256
    draws: int = 100
    injection_variance: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self.weight, WEIGHTS, "weight")
        check_choice(self.activation, ACTIVATIONS, "activation")
        if min(self.features, self.draws) < 1:
            raise ValueError(f"features and draws must be >= 1, got {self}.")
        for name in ("scale", "injection_variance"):
            if not 0 < getattr(self, name) < math.inf:
                value = getattr(self, name)
                raise ValueError(f"{name} must be positive and finite, got {value!r}.")
        as_floats(self)

    @property
    def entry_scale(self) -> float:
        return in_convention(self.weight, self.scale, "variance")

    @property
    def key(self) -> str:
        return key_of(_FORMAT, self)


def measure(ensemble: Ensemble) -> dict[str, list[Any]]:
    """Lists over the draws, in float64. With J = D W at the equilibrium and R = ``(I - J)^-1``:

    length ``|z*|^2 / |c|^2``; adjoint ``|R^T g|^2 / |g|^2`` for a random g; resolvent ``|R|``, the
    2-norm; moment_1 ``|R|_F^2 / d`` and moment_2 ``|R R^T|_F^2 / d``; mean_square_slope, of phi';
    radius, the largest modulus of an eigenvalue of J (the first twenty draws); solved, whether the
    equilibrium was found: the others are NaN where it was not. The global random state is left as
    it was.
    """
    phi = ACTIVATIONS[ensemble.activation]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(ensemble.seed)
        rows = [_draw(ensemble, phi, with_radius=i < _RADII) for i in range(ensemble.draws)]
    return {name: [row[name] for row in rows] for name in rows[0]}


def _draw(ensemble: Ensemble, phi: Activation, with_radius: bool) -> dict[str, Any]:
    d = ensemble.features
    w = WEIGHTS[ensemble.weight](d, ensemble.scale, dtype=torch.float64)().clone()
    c = math.sqrt(ensemble.injection_variance) * torch.randn(d, dtype=torch.float64)
    g = torch.randn(d, dtype=torch.float64)
    z, solved = _equilibrium(w, c, phi)
    missing = dict.fromkeys(
        ("length", "adjoint", "resolvent", "moment_1", "moment_2", "mean_square_slope", "radius"),
        math.nan,
    )
    if not solved:
        return {**missing, "solved": False}
    slope = phi.slope(w @ z + c)
    jacobian = slope.unsqueeze(1) * w
    resolvent = torch.linalg.inv(torch.eye(d, dtype=torch.float64) - jacobian)
    squares = torch.linalg.svdvals(resolvent).square()
    return {
        "length": float(z.square().sum() / c.square().sum()),
        "adjoint": float((resolvent.t() @ g).square().sum() / g.square().sum()),
        "resolvent": math.sqrt(float(squares[0])),
        "moment_1": float(squares.mean()),
        "moment_2": float(squares.square().mean()),
        "mean_square_slope": float(slope.square().mean()),
        "radius": float(torch.linalg.eigvals(jacobian).abs().max()) if with_radius else math.nan,
        "solved": True,
    }


def _equilibrium(w: Tensor, c: Tensor, phi: Activation) -> tuple[Tensor, bool]:
    """z = phi(W z + c), ``(d,)``: directly where it is linear, else by plain iteration."""
    if phi.name == "identity":
        z = torch.linalg.solve(torch.eye(len(c), dtype=c.dtype) - w, c)
        return z, bool(z.isfinite().all())
    z, solution = fixed_point(
        lambda z: phi.function(w @ z + c),
        torch.zeros_like(c),
        batch_dim=None,
        solver="picard",
        tol=_TOL,
        max_iter=_STEPS,
        patience=_STEPS,
        on_failure="ignore",
    )
    return z, bool(solution.converged)
