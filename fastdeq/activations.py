"""Elementwise activations with their slopes and the properties that solvers rely on.

Each slope is written in differentiable PyTorch operations, so that second derivatives of an
equilibrium exist. Default parameters are those of ``torch.nn.functional``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """``phi`` and ``phi'`` as functions of the pre-activation, with what is known of them.

    ``lipschitz`` is the smallest known bound on ``|phi'|``; ``monotone`` says ``phi' >= 0``
    everywhere; ``bounded`` says ``phi`` has a bounded range.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    lipschitz: float = 1.0
    monotone: bool = True
    bounded: bool = False

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


# Lipschitz bounds of gelu and silu: the maximum of phi' at phi'' = 0 (p = sqrt(2); p ~ 2.3994),
# rounded up in the fourth decimal.
_TABLE = (
    Activation("identity", lambda p: p, torch.ones_like),
    Activation("relu", torch.relu, lambda p: (p > 0).to(p.dtype)),
    Activation("leaky_relu", F.leaky_relu, lambda p: torch.where(p > 0, torch.ones_like(p), 0.01)),
    Activation("tanh", torch.tanh, lambda p: 1 - torch.tanh(p) ** 2, bounded=True),
    Activation("hardtanh", F.hardtanh, lambda p: (p.abs() < 1).to(p.dtype), bounded=True),
    Activation("sigmoid", torch.sigmoid, _sigmoid_slope, lipschitz=0.25, bounded=True),
    Activation("softplus", F.softplus, torch.sigmoid),
    Activation("elu", F.elu, lambda p: torch.where(p > 0, 1.0, torch.exp(p.clamp(max=0)))),
    Activation("gelu", F.gelu, _gelu_slope, lipschitz=1.1290, monotone=False),
    Activation("silu", F.silu, _silu_slope, lipschitz=1.0999, monotone=False),
)

ACTIVATIONS: dict[str, Activation] = {a.name: a for a in _TABLE}
