"""The problems that all contestants solve, and what their answers are measured by, in float64.

    W, U (d, d)   recurrent weight of one of the three families; input weight, orthogonal
    b (d,)        bias;  x (B, d) input;  c = U x + b
    z* = phi(W z* + c)                               D = phi'(W z* + c)
    q  = D (g + q W)                                 g = dL/dz* (B, d)
    dL/dW = q^T z*,  dL/dx = q U

U is orthogonal, so ``q = dL/dx U^T`` loses nothing: the adjoint solution of any contestant can be
read off its gradient, and its residual checked as the forward one is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from equilibrium import PHI, equilibrium
from torch import Tensor

TOL = 1e-4  # relative residual, per sample, of both solves
EASY = 0.9
_UNIT = torch.finfo(torch.float32).eps / 2
_REACH = 4  # a contestant's slopes may be taken this many tolerances away from its state


@dataclass(frozen=True)
class Spec:
    """What defines a problem. ``threads``: 0 leaves torch's number."""

    d: int
    batch: int
    activation: str = "tanh"
    scale: float = EASY
    tol: float = TOL
    inputs: str = "normal"  # or "small", "large", "straggler": large but for the first sample
    threads: int = 0
    weight: str = "dense"  # or "symmetric", "orthogonal"; everybody differentiates by W itself

    @property
    def hard(self) -> bool:
        """Whether plain iteration need not converge."""
        return self.scale > 1

    @property
    def size(self) -> str:
        return f"{self.d} x {self.batch}"

    @property
    def kind(self) -> str:
        structure = "" if self.weight == "dense" else f" {self.weight}"
        return f"{self.activation}{structure} {'hard' if self.hard else 'easy'}"

    @property
    def max_iter(self) -> int:
        """40 is torchdeq's default, and enough on the easy problems."""
        if self.hard or self.inputs in ("small", "straggler") or self.activation == "identity":
            return 600 if self.scale > 0.95 else 400
        return 40 if self.tol >= TOL else 80


@cache
def problem_of(spec: Spec) -> Problem:
    return Problem(spec)


class Problem:
    """float32, the same for everybody and in every run."""

    def __init__(self, spec: Spec):
        # At d = 64 the spectral radius, hence the work, varies: the plain iteration takes 20 to 41
        # steps over 20 seeds. This one is in the middle at 64, 256 and 512.
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        d, batch = spec.d, spec.batch
        self.spec, self.d, self.batch = spec, d, batch
        self.weight = _family(spec.weight, normal(d, d)) * spec.scale
        self.input_weight = torch.linalg.qr(normal(d, d)).Q.contiguous()
        self.bias = 0.1 * normal(d)
        self.x, self.grad = normal(batch, d), normal(batch, d)
        if spec.inputs != "normal":
            # Large inputs saturate tanh, small ones leave its slope at 1.
            self.bias.zero_()
            self.x *= 0.1 if spec.inputs == "small" else 1.5
        if spec.inputs == "straggler":
            self.x[0] *= 0.01

        self._w, self._u = self.weight.double(), self.input_weight.double()
        self._c = self.x.double() @ self._u.t() + self.bias.double()
        self._g = self.grad.double()

    @cached_property
    def allowed(self) -> float:
        """The residual that counts as the tolerance.

        A sum of d products in float32, of random signs, is off by about ``unit sqrt(d/2)`` times
        their root mean square, so a product with a matrix M by about ``unit |M|_F / sqrt(2)``,
        relative to its input. A contestant that measures its residual in float32 sees the
        tolerance with this error from W and from U; 2 sqrt(2) standard errors are granted.
        """
        return self.spec.tol + 2 * _UNIT * float(self._w.norm() + self._u.norm())

    def state_residual(self, z: Tensor) -> float:
        """``|f(z) - z| / |f(z)|`` of the worst sample; infinite where z is not finite."""
        z = z.detach().double()
        value = PHI[self.spec.activation](z @ self._w.t() + self._c)
        return _worst((value - z).norm(dim=1) / value.norm(dim=1))

    def adjoint_residual(self, grad_x: Tensor, z: Tensor | None = None) -> float:
        """Distance from q to ``D (g + q W)``, relative, of the worst sample; q from dL/dx.

        Without z, D is taken at z*, and the contestant must have been started there. With z, its
        own state, D may be any slope that phi has within the distance over which its slopes can
        have been taken from z: an entry of relu that close to the kink has no other.
        """
        q = grad_x.double() @ self._u.t()
        incoming = self._g + q @ self._w
        at, reach = (self.solution, 0.0) if z is None else (z.detach().double(), _REACH)
        pre = at @ self._w.t() + self._c
        distance = reach * self.spec.tol * at.norm(dim=1, keepdim=True) * self._w.norm(dim=1)
        low, high = _slopes(self.spec.activation, pre, distance)
        ends = torch.stack((low * incoming, high * incoming))
        nearest = q.clamp(ends.amin(0), ends.amax(0))
        return _worst((q - nearest).norm(dim=1) / nearest.norm(dim=1))

    def weight_error(self, z: Tensor, grad_weight: Tensor, grad_x: Tensor) -> tuple[float, float]:
        """``|dL/dW - q^T z| / |q^T z|`` in the Frobenius norm, and what it may be.

        A contestant may have taken a z that is ``_REACH`` tolerances away from the one it returned.
        """
        q, z = grad_x.double() @ self._u.t(), z.detach().double()
        product = q.t() @ z
        length = product.norm()
        away = _REACH * self.spec.tol * torch.linalg.matrix_norm(q, 2) * z.norm() / length
        error = (grad_weight.double() - product).norm() / length
        return _worst(error), self.allowed + float(away)

    @cached_property
    def solution(self) -> Tensor:
        """z* to the rounding of float64."""
        return equilibrium(
            self._w, self._c, self.spec.activation, contraction=self.spec.scale < 0.95
        )


def _family(name: str, gauss: Tensor) -> Tensor:
    """Of spectral radius 1 for large d, as ``fastdeq`` initialises it."""
    d = len(gauss)
    if name == "symmetric":
        return (gauss + gauss.t()) / math.sqrt(8 * d)
    if name == "orthogonal":
        q, r = torch.linalg.qr(gauss)
        return q * torch.sign(r.diagonal())
    return gauss / math.sqrt(d)


def _slopes(activation: str, pre: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest slope within ``distance`` of ``pre``."""
    if activation == "identity":
        return torch.ones_like(pre), torch.ones_like(pre)
    if activation == "relu":
        distance = distance + 16 * _UNIT * pre.norm(dim=1, keepdim=True)  # rounding of pre itself
        return (pre - distance > 0).double(), (pre + distance > 0).double()
    far, near = pre.abs() + distance, (pre.abs() - distance).clamp(min=0)
    return 1 - far.tanh() ** 2, 1 - near.tanh() ** 2


def _worst(values: Tensor) -> float:
    return float(values.nan_to_num(nan=torch.inf).max())
