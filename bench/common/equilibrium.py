"""Equilibria of ``z = phi(W z + c)`` in float64, by a method that none of the contestants uses.

Where phi(W .) is no contraction, damped iteration comes close and Newton's method finishes:

    (I - D W) s = f(z) - z,  D = phi'(W z + c);  z <- z + t s

with t halved until the residual falls; one LU factorisation per sample and step. For relu this is
the semismooth Newton method.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "identity": lambda t: t,
}
_CHUNK = 32  # samples whose Jacobians are held at once: 67 MB at d = 512
_ROUNDING = 1e-13


def equilibrium(w: Tensor, c: Tensor, activation: str, *, contraction: bool) -> Tensor:
    """z ``(B, d)`` for w ``(d, d)`` and c ``(B, d)``, float64.

    Raises:
        RuntimeError: a sample for which no equilibrium was found.
    """
    phi = PHI[activation]
    z = torch.zeros_like(c)
    for k in range(3000 if contraction else 500):
        value = phi(z @ w.t() + c)
        if k % 10 == 9 and _relative(value, z) < _ROUNDING:
            break
        z = value if contraction else (z + value) / 2
    if not contraction:
        # With two threads MKL's LU refuses some of these batches (torch 2.13: "DLASWP").
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        parts = zip(z.split(_CHUNK), c.split(_CHUNK), strict=True)
        z = torch.cat([_newton(w, *part, activation) for part in parts])
        torch.set_num_threads(threads)
    residual = _relative(phi(z @ w.t() + c), z)
    if not residual < 10 * _ROUNDING:
        raise RuntimeError(f"no equilibrium found in float64: relative residual {residual:.1e}")
    return z


def _slope(activation: str, value: Tensor) -> Tensor:
    if activation == "identity":
        return torch.ones_like(value)
    return 1 - value**2 if activation == "tanh" else (value > 0).to(value.dtype)


def _newton(w: Tensor, z: Tensor, c: Tensor, activation: str) -> Tensor:
    phi, identity = PHI[activation], torch.eye(len(w), dtype=w.dtype)

    def residual(point: Tensor) -> Tensor:
        return phi(point @ w.t() + c) - point

    for _ in range(50):
        r = residual(z)
        norm = r.norm(dim=1)
        if float((norm / (z + r).norm(dim=1)).max()) < _ROUNDING:
            break
        value = z + r
        slope = _slope(activation, value)
        step = torch.linalg.solve(identity - slope.unsqueeze(2) * w, r)
        length = torch.ones_like(norm)
        for _ in range(12):
            worse = ~(residual(z + length.unsqueeze(1) * step).norm(dim=1) < norm)
            if not bool(worse.any()):
                break
            length = torch.where(worse, length / 2, length)
        z = z + length.unsqueeze(1) * step
    return z


def _relative(value: Tensor, z: Tensor) -> float:
    return float(((value - z).norm(dim=1) / value.norm(dim=1)).max())
