"""Peaceman-Rachford splitting: forward solves of affine cells with ``I - W`` monotone.

With phi monotone of slope at most 1, phi is the resolvent of a monotone operator F, and
``z = phi(W z + c)`` says ``0 in (I - W) z - c + F(z)``. Where ``I - W`` is monotone too, that is
``x^T (I - W) x >= m |x|^2`` with m > 0, there is one solution, and alternating reflections find it,
however large W is (a large skew-symmetric part makes every method of plain steps diverge):

    v = 2 z - u,    y = (I + alpha (I - W))^-1 (v + alpha c),    u' = 2 y - v,    z' = phi(u')

A step costs a product with the inverse, made once for each solve (2 d^3 operations), and one with W
that verifies. For ``alpha = 1`` the second resolvent is phi itself; another alpha scales F, which
changes nothing for relu.

Sources: D. Peaceman and H. Rachford, J. SIAM 3 (1955) 28; E. Ryu and S. Boyd, Appl. Comput. Math.
15 (2016) 3; for equilibrium models E. Winston and J. Kolter, NeurIPS 2020.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..constants import PATIENCE
from .base import AffineMap, CheckedOptions, Problem, Step, check_range


@dataclass
class _State:
    map: AffineMap
    inverse: Tensor  # (d, d): rows times this are y
    u: Tensor  # (B, d)
    fresh: bool


@dataclass(frozen=True)
class PeacemanRachford(CheckedOptions):
    """Peaceman-Rachford splitting for an affine cell whose ``I - W`` is monotone.

    Args:
        alpha: step length of the splitting, in (0, 1e6]; other than 1 for relu alone.
    """

    alpha: float = 1.0

    name: ClassVar[str] = "peaceman_rachford"
    linear: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"monotone"})
    patience: ClassVar[int] = PATIENCE
    rejects: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_range("PeacemanRachford", "alpha", self.alpha, 1e-6, 1e6, "in [1e-6, 1e6]")

    def init(self, point: Tensor, problem: Problem) -> _State:
        affine = problem.affine
        assert affine is not None
        phi = affine.activation
        assert phi is not None
        if not phi.nonexpansive or (self.alpha != 1 and phi.name != "relu"):
            wanted = "of slope at most 1" if self.alpha == 1 else "relu where alpha is not 1"
            raise ValueError(
                f"{self!r} with activation={phi.name!r}: the activation must be {wanted}."
            )
        eye = torch.eye(point.shape[1], dtype=torch.float64, device=point.device)
        transposed = affine.multiply(eye.to(point.dtype)).double()  # rows of the identity: W^T
        # A singular matrix makes what is not finite, which ends the samples.
        inverse = torch.linalg.inv_ex((1 + self.alpha) * eye - self.alpha * transposed)[0]
        return _State(affine, inverse.to(point.dtype), point, fresh=True)

    def step(
        self, state: _State, point: Tensor, value: Tensor, norm: Tensor, running: Tensor
    ) -> Step:
        affine = state.map
        if state.fresh:  # z = phi(u) holds for the value of the start
            state.fresh, state.u = False, affine.pre
            return Step(value, None, ~norm.isfinite())
        reflected = 2 * point - state.u
        y = (reflected + self.alpha * affine.offset) @ state.inverse
        state.u = 2 * y - reflected
        return Step(affine.apply(state.u), None, ~norm.isfinite())

    def counters(self, state: _State) -> tuple[Tensor, ...]:
        return ()
