"""Adjoint systems with slopes of several kinds, and what a solution must satisfy."""

import torch


def slopes(kind, batch, size, dtype=torch.float64):
    d = torch.rand(batch, size, dtype=torch.float64)
    if kind == "zeros and ones":
        d = (d > 0.4).double()
    elif kind == "some zeros":
        d = torch.where(d > 0.4, d, 0.0)
    elif kind == "all ones":
        d = torch.ones_like(d)
    return d.to(dtype)


def exact(case):
    """(B, d): q = D (g + q W) by torch.linalg.solve in float64, and the norms of (I - D W)^-1."""
    w, d, g = (t.double() for t in case.tensors())
    matrix = torch.eye(len(w), dtype=w.dtype) - d.unsqueeze(2) * w  # W is symmetric
    inverse = torch.linalg.inv(matrix)
    return torch.linalg.solve(matrix, d * g), torch.linalg.matrix_norm(inverse, 2)


def check_exact(case, outputs, tol):
    """|q - q*| <= |(I - D W)^-1| (tol |f(q)| + rounding of an evaluation)."""
    q, inverse = exact(case)
    unit = torch.finfo(case.grad.dtype).eps / 2
    noise = case.rounding(outputs.value / case.scale(), unit) * case.scale().squeeze(1)
    size = outputs.value.double().norm(dim=1)
    bound = inverse * (1.01 * tol * size + 1e-9 * case.scale().squeeze(1) * tol + noise)
    assert ((outputs.value.double() - q).norm(dim=1) <= bound).all()
