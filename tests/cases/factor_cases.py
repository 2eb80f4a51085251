"""What a QR factor must satisfy, and matrices of a given condition number."""

import torch


def orthogonality_error(q):
    q = q.double()
    return (q.T @ q - torch.eye(q.shape[1], dtype=q.dtype)).abs().max().item()


def with_condition(m, n, condition, dtype=torch.float32):
    u = torch.linalg.qr(torch.randn(m, n, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    exponents = torch.linspace(0, 1, n, dtype=torch.float64)
    return ((u * float(condition) ** -exponents) @ v.T).to(dtype)


def check_factors(a, q, r):
    scale = torch.linalg.matrix_norm(a.double(), 2).item()
    eps = torch.finfo(a.dtype).eps
    assert (q.double() @ r.double() - a.double()).abs().max() < 16 * eps * scale
    assert torch.equal(r, r.triu())
    assert (r.diagonal() > 0).all()
