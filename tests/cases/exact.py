"""Equilibria and gradients of a tanh cell in float64, and bounds on what a layer may be off by.

The reference is plain iteration and the formulas of the implicit gradient: nothing of fastdeq. The
bounds are computed from the problem, per sample:

    S = |W| = 0.5, phi = tanh, |phi'| <= 1, |phi''| <= 0.77; e rounds an output, u a float32 number
    |z - z*| <= (tol |z| + |c error| + |product's rounding|) / (1 - S)
    |q - q*| <= (tol |q| + |D error| |g + q W| + |product's rounding|) / (1 - S),
    |D error| <= 0.77 (S |z - z*| + |c error|)

and from these, by the triangle inequality, dL/dx = q U and dL/dW = q^T z. A product with a matrix
M, summed in float32, is off by about ``u |M|_F / sqrt(2)`` times its input; four times that is
granted.
"""

from __future__ import annotations

import math

import torch

from fastdeq import AffineCell

S = 0.5
TOL = 1e-5


def make_cell(d, n=None, dtype=torch.float32, **options):
    """A tanh cell with |W| = S, on the CPU."""
    cell = AffineCell(n or d, d, activation="tanh", scale=1.0, dtype=torch.float64, **options)
    with torch.no_grad():
        cell.weight.weight.mul_(S / torch.linalg.matrix_norm(cell.weight.weight, 2))
    return cell.to(dtype)


class Exact:
    """Equilibrium and gradients of <g, z> in float64, from the numbers that the layer has."""

    def __init__(self, cell, x, g):
        names = ("weight.weight", "injection.weight", "injection.bias")
        self.w, self.u, b = (cell.get_parameter(n).detach().cpu().double() for n in names)
        self.x, self.g = x.detach().cpu().double(), g.detach().cpu().double()
        self.c = self.x @ self.u.t() + b
        self.b = b
        self.z, self.q = torch.zeros_like(self.c), torch.zeros_like(self.c)
        for _ in range(60):  # S^60 < 1e-18
            self.z = torch.tanh(self.z @ self.w.t() + self.c)
        slope = 1 - self.z**2
        for _ in range(60):
            self.q = slope * (self.g + self.q @ self.w)

    def bounds(self, tol, dtype, product=None):
        """Bounds on the errors of z and q, per sample; ``product`` is the dtype of ``U x``."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        u, e = torch.finfo(wide).eps / 2, torch.finfo(dtype).eps
        sums = 4 * u / math.sqrt(2)
        norm = lambda rows: rows.norm(dim=1)  # noqa: E731
        c_error = sums * self.u.norm() * norm(self.x) + 4 * u * norm(self.c)
        if product is not None:  # its inputs, the sum and the result are rounded
            half = torch.finfo(product).eps
            c_error += half * (self.u.norm() * norm(self.x) + self.b.norm() + norm(self.c))
        inside = (tol * norm(self.z) + c_error + sums * self.w.norm() * norm(self.z)) / (1 - S)
        # From outside: what tanh itself is off by.
        inside += 8 * u * norm(self.z)
        slope_error = 0.77 * (S * inside + c_error)
        incoming = norm(self.g + self.q @ self.w)
        q_error = tol * norm(self.q) + slope_error * incoming + sums * self.w.norm() * norm(self.q)
        q_error = q_error / (1 - S) + 8 * u * norm(self.q)
        return inside + e * norm(self.z), q_error + e * norm(self.q)

    def check(self, z, grad_x, grad_weight, *, tol=TOL, product=None, good=None):
        """Asserts the bounds; ``good`` says which samples are looked at."""
        good = slice(None) if good is None else good.cpu()
        e = torch.finfo(z.dtype).eps
        z_bound, q_bound = self.bounds(tol, z.dtype, product)
        z_error = (z.detach().cpu().double() - self.z).norm(dim=1)
        assert (z_error <= z_bound)[good].all(), f"z: {(z_error / z_bound)[good].max()}"
        x_error = (grad_x.cpu().double() - self.q @ self.u).norm(dim=1)
        x_bound = self.u.norm() * (q_bound + 2 * e * self.q.norm(dim=1))
        assert (x_error <= x_bound)[good].all(), f"dL/dx: {(x_error / x_bound)[good].max()}"
        expected = self.q[good].t() @ self.z[good]
        weight_error = (grad_weight.cpu().double() - expected).norm()
        bound = (q_bound * self.z.norm(dim=1) + z_bound * self.q.norm(dim=1))[good].sum()
        bound = bound + 4 * e * (self.q.norm(dim=1) * self.z.norm(dim=1))[good].sum()
        assert weight_error <= bound, f"dL/dW: {weight_error / bound}"
