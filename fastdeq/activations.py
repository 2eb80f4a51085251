"""Elementwise activations with their slopes and the properties that solvers rely on.

Each slope is written in differentiable PyTorch operations, so that second derivatives of an
equilibrium exist. Default parameters are those of ``torch.nn.functional``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ActivationName = Literal[
    "identity",
    "relu",
    "leaky_relu",
    "tanh",
    "hardtanh",
    "sigmoid",
    "softplus",
    "elu",
    "gelu",
    "silu",
]


@dataclass(frozen=True)
class Activation:
    """``phi`` and ``phi'`` as functions of the pre-activation, with what is known of them.

    ``lipschitz`` is the smallest known bound on ``|phi'|``; ``monotone`` says ``phi' >= 0``
    everywhere; ``bounded`` says ``phi`` has a bounded range. ``primitive`` is an antiderivative of
    a monotone phi, convex, of which the energy of a symmetric cell is made; ``smooth`` says that
    phi has a slope everywhere.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    lipschitz: float = 1.0
    monotone: bool = True
    bounded: bool = False
    primitive: Callable[[Tensor], Tensor] | None = None
    smooth: bool = True

    @property
    def nonexpansive(self) -> bool:
        return self.lipschitz <= 1.0


def _sigmoid_slope(p: Tensor) -> Tensor:
    s = torch.sigmoid(p)
    return s * (1 - s)


def _gelu_slope(p: Tensor) -> Tensor:
    cdf = 0.5 * (1 + torch.erf(p / math.sqrt(2)))
    return cdf + p * torch.exp(-0.5 * p * p) / math.sqrt(2 * math.pi)


def _silu_slope(p: Tensor) -> Tensor:
    s = torch.sigmoid(p)
    return s * (1 + p * (1 - s))


def _log_cosh(p: Tensor) -> Tensor:
    a = p.abs()
    return a + torch.log1p(torch.exp(-2 * a)) - math.log(2)


def _hardtanh_primitive(p: Tensor) -> Tensor:
    a = p.abs()
    return torch.where(a < 1, 0.5 * p * p, a - 0.5)


# Coefficients B_n / (n + 1)! of the dilogarithm's series in u = log(1 + e^p), for n = 2, 4, ... 12.
_DILOGARITHM = (
    1 / 36,
    -1 / 3600,
    1 / 211680,
    -1 / 10886400,
    1 / 526901760,
    -4.0647616451442256e-11,
)


def _softplus_primitive(p: Tensor) -> Tensor:
    """``-Li2(-e^p)``: its series in ``u = log(1 + e^p) <= log 2`` for p <= 0, and reflection.

    Source: L. Lewin, Polylogarithms and Associated Functions, 1981, sections 1.1 and 1.3.
    """
    u = torch.log1p(torch.exp(-p.abs()))
    square = u * u
    odd = torch.zeros_like(u)
    for coefficient in reversed(_DILOGARITHM):
        odd = odd * square + coefficient
    below = u + square / 4 + u * square * odd
    return torch.where(p > 0, 0.5 * p * p + math.pi**2 / 6 - below, below)


# Lipschitz bounds of gelu and silu: the maximum of phi' at phi'' = 0 (p = sqrt(2); p ~ 2.3994),
# rounded up in the fourth decimal.
_TABLE = (
    Activation("identity", lambda p: p, torch.ones_like, primitive=lambda p: 0.5 * p * p),
    Activation(
        "relu",
        torch.relu,
        lambda p: (p > 0).to(p.dtype),
        primitive=lambda p: 0.5 * torch.relu(p) * p,
        smooth=False,
    ),
    Activation(
        "leaky_relu",
        F.leaky_relu,
        lambda p: torch.where(p > 0, torch.ones_like(p), 0.01),
        primitive=lambda p: 0.5 * F.leaky_relu(p) * p,
        smooth=False,
    ),
    Activation(
        "tanh", torch.tanh, lambda p: 1 - torch.tanh(p) ** 2, bounded=True, primitive=_log_cosh
    ),
    Activation(
        "hardtanh",
        F.hardtanh,
        lambda p: (p.abs() < 1).to(p.dtype),
        bounded=True,
        primitive=_hardtanh_primitive,
        smooth=False,
    ),
    Activation(
        "sigmoid",
        torch.sigmoid,
        _sigmoid_slope,
        lipschitz=0.25,
        bounded=True,
        primitive=lambda p: -F.logsigmoid(-p),  # softplus, exact for all p
    ),
    Activation("softplus", F.softplus, torch.sigmoid, primitive=_softplus_primitive),
    Activation(
        "elu",
        F.elu,
        lambda p: torch.where(p > 0, 1.0, torch.exp(p.clamp(max=0))),
        primitive=lambda p: torch.where(p > 0, 0.5 * p * p, torch.expm1(p.clamp(max=0)) - p),
    ),
    Activation("gelu", F.gelu, _gelu_slope, lipschitz=1.1290, monotone=False),
    Activation("silu", F.silu, _silu_slope, lipschitz=1.0999, monotone=False),
)

ACTIVATIONS: dict[str, Activation] = {a.name: a for a in _TABLE}
