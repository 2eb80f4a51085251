"""The problem that all contestants solve, and what their answers are measured by, in float64.

    W, U (d, d)   recurrent weight, entries of variance scale^2/d; input weight, orthogonal
    b (d,)        bias;  x (B, d) input;  c = U x + b
    z* = tanh(W z* + c)                              D = 1 - z*^2,  J = D W
    q  = D (g + q W)                                 g = dL/dz* (B, d)
    dL/dW = q^T z*,  dL/dx = q U

U is orthogonal, so ``q = dL/dx U^T`` loses nothing: the adjoint solution of any contestant can be
read off its gradient, and its residual checked as the forward one is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

TOL = 1e-4  # relative residual, per sample, of both solves
SCALE = 0.9
SIZES = ((64, 32), (256, 64), (512, 128))  # d, B
_UNIT = torch.finfo(torch.float32).eps / 2
_CHUNK = 32  # samples whose Jacobians are held at once: 67 MB at d = 512
_CURVATURE = 4 / (3 * math.sqrt(3))  # the largest |tanh''|


@dataclass(frozen=True)
class GradientError:
    """Relative errors: of dL/dW in the Frobenius norm, of dL/dx per sample, the worst one."""

    weight: float
    x: float

    def within(self, bound: GradientError) -> bool:
        return self.weight <= bound.weight and self.x <= bound.x


class Problem:
    """One problem of width d for a batch, float32, the same for everybody and in every run."""

    def __init__(self, d: int, batch: int):
        # At d = 64 the spectral radius, hence the work, varies: the plain iteration takes 20 to 41
        # steps over 20 seeds. This one is in the middle at each of SIZES.
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.d, self.batch = d, batch
        self.weight = normal(d, d) * (SCALE / math.sqrt(d))
        self.input_weight = torch.linalg.qr(normal(d, d)).Q.contiguous()
        self.bias = 0.1 * normal(d)
        self.x, self.grad = normal(batch, d), normal(batch, d)

        self._w, self._u = self.weight.double(), self.input_weight.double()
        self._c = self.x.double() @ self._u.t() + self.bias.double()
        self._g = self.grad.double()

    @property
    def allowed(self) -> float:
        """The residual that counts as TOL.

        A sum of d products in float32, of random signs, is off by about ``unit sqrt(d/2)`` times
        their root mean square, so a product with a matrix M by about ``unit |M|_F / sqrt(2)``,
        relative to its input. A contestant that measures its residual in float32 sees TOL with
        this error from W and from U; 2 sqrt(2) standard errors are granted.
        """
        return TOL + 2 * _UNIT * float(self._w.norm() + self._u.norm())

    def state_residual(self, z: Tensor) -> float:
        """``|f(z) - z| / |f(z)|`` of the worst sample; infinite where z is not finite."""
        z = z.detach().double()
        return _worst_residual(torch.tanh(z @ self._w.t() + self._c), z)

    def adjoint_residual(self, grad_x: Tensor) -> float:
        """``|D (g + q W) - q| / |D (g + q W)|`` at z*, worst sample, for the q behind dL/dx."""
        q = grad_x.double() @ self._u.t()
        return _worst_residual(self._slope * (self._g + q @ self._w), q)

    def gradient_error(self, grad_weight: Tensor, grad_x: Tensor) -> GradientError:
        exact_weight, exact_x = self._q.t() @ self.solution, self._q @ self._u
        return GradientError(
            float((grad_weight.double() - exact_weight).norm() / exact_weight.norm()),
            float(((grad_x.double() - exact_x).norm(dim=1) / exact_x.norm(dim=1)).max()),
        )

    @cached_property
    def gradient_bound(self) -> GradientError:
        """The errors that residuals of ``allowed`` in both solves can cause, to first order.

        With ``k = |(I - J)^-1|`` per sample: ``|dz| <= k tol |z|``. The state's error changes D by
        ``tanh'' W dz``, so ``|dq| <= k (tol |q| + max|g + q W| max|tanh''| |W| |dz|)``. Then
        ``dL/dx`` is off by |dq|, U being orthogonal, and ``dL/dW = q^T z`` by at most
        ``|dq|_F |z|_2 + |q|_2 |dz|_F``, the matrices' norms over the batch.
        """
        z, q, k = self.solution, self._q, self._condition
        dz = k * self.allowed * z.norm(dim=1)
        incoming = (self._g + q @ self._w).abs().amax(dim=1)
        bend = incoming * _CURVATURE * torch.linalg.matrix_norm(self._w, 2) * dz
        dq = k * (self.allowed * q.norm(dim=1) + bend)
        weight = dq.norm() * torch.linalg.matrix_norm(z, 2)
        weight = weight + torch.linalg.matrix_norm(q, 2) * dz.norm()
        return GradientError(float(weight / (q.t() @ z).norm()), float((dq / q.norm(dim=1)).max()))

    @cached_property
    def solution(self) -> Tensor:
        """z* to the rounding of float64."""
        z = torch.zeros_like(self._c)
        for _ in range(1000):
            z = torch.tanh(z @ self._w.t() + self._c)
            if self.state_residual(z) < 1e-14:
                return z
        raise RuntimeError("the plain iteration does not converge on this problem")

    @property
    def _slope(self) -> Tensor:
        return 1 - self.solution**2

    @property
    def _q(self) -> Tensor:
        return self._adjoint[0]

    @property
    def _condition(self) -> Tensor:
        return self._adjoint[1]

    @cached_property
    def _adjoint(self) -> tuple[Tensor, Tensor]:
        """q = D u from ``(I - J)^T u = g``, one direct solve per sample, and ``|(I - J)^-1|``."""
        parts = [
            _direct_adjoint(self._w, slope, g)
            for slope, g in zip(self._slope.split(_CHUNK), self._g.split(_CHUNK), strict=True)
        ]
        qs, conditions = zip(*parts, strict=True)
        return torch.cat(qs), torch.cat(conditions)


def _direct_adjoint(w: Tensor, slope: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    transposed = torch.eye(len(w), dtype=w.dtype) - (slope.unsqueeze(2) * w).mT
    u = torch.linalg.solve(transposed, g)
    # Inverse power iteration on (I - J)(I - J)^T. It comes from below, to a few percent in so many
    # steps; the bound has more room than that.
    lu, pivots = torch.linalg.lu_factor(transposed)
    v = torch.nn.functional.normalize(g, dim=1).unsqueeze(2)
    growth = v.new_ones(len(v), 1, 1)
    for _ in range(10):
        v = torch.linalg.lu_solve(lu, pivots, v)
        v = torch.linalg.lu_solve(lu, pivots, v, adjoint=True)
        growth = v.norm(dim=1, keepdim=True)
        v = v / growth
    return slope * u, growth.flatten().sqrt()


def _worst_residual(value: Tensor, point: Tensor) -> float:
    relative = (value - point).norm(dim=1) / value.norm(dim=1)
    return float(relative.nan_to_num(nan=torch.inf).max())
