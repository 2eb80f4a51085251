"""Neumann series for the adjoint: plain iteration of an affine map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .picard import Picard


@dataclass(frozen=True)
class Neumann(Picard):
    """Partial sums of ``u = sum_k (J^T)^k g``; converges when the spectral radius of J is below 1.

    ``damping`` in (0, 1] averages successive partial sums and helps with negative eigenvalues;
    ``fixed_iterations`` as in :class:`Picard`.
    """

    name: ClassVar[str] = "neumann"
    linear: ClassVar[bool] = True
