"""The size of a Jacobian ``J = df/dz``, from a value and the state that it was made of."""

from __future__ import annotations

import torch
from torch import Tensor


def jac_reg(f0: Tensor, z0: Tensor, vecs: int = 1, create_graph: bool = True) -> Tensor:
    """Estimate of ``|J|_F^2 / n``, n the number of entries of z0, by ``vecs`` normal probes.

    Args:
        f0: ``f(z0)``, with its graph.
        z0: requires grad.
        vecs: probes, 1 or more.
        create_graph: whether the estimate can be differentiated, as a term of a loss is.

    Source: Bai, Koltun and Kolter, "Stabilizing Equilibrium Models by Jacobian Regularization",
    2021, arXiv 2106.14342.
    """
    if vecs < 1:
        raise ValueError(f"vecs must be 1 or more, got {vecs!r}.")
    total = z0.new_zeros(())
    for _ in range(vecs):
        probe = torch.randn_like(z0)
        (product,) = torch.autograd.grad(
            f0, z0, probe, retain_graph=True, create_graph=create_graph
        )
        total = total + product.square().sum()
    return total / vecs / z0.numel()


def power_method(f0: Tensor, z0: Tensor, n_iters: int = 100) -> tuple[Tensor, Tensor]:
    """A vector that J^T stretches most in the long run, and the spectral radius, per sample.

    The radius is the geometric mean of the growth in the later half of the products, which it
    tends to for complex eigenvalues too.

    Args:
        f0: ``f(z0)``, with its graph, which is freed.
        z0: ``(B, ...)``, requires grad.
        n_iters: products, 1 or more.

    Returns:
        The vector, shaped like z0, and the radius ``(B,)``.
    """
    if n_iters < 1:
        raise ValueError(f"n_iters must be 1 or more, got {n_iters!r}.")
    vector = torch.randn_like(z0).detach()
    batch = len(z0) if z0.dim() else 1
    growth = []
    size = vector.reshape(batch, -1).norm(dim=1)
    for i in range(n_iters):
        keep = i < n_iters - 1
        (product,) = torch.autograd.grad(f0, z0, vector, retain_graph=keep, allow_unused=True)
        rows = torch.zeros_like(vector) if product is None else product
        rows = rows.reshape(batch, -1)
        length = rows.norm(dim=1)
        growth.append(length / size)
        # A vector that J^T makes zero of stays zero, and so does the growth.
        rows = torch.where((length > 0).unsqueeze(1), rows / length.unsqueeze(1), 0.0)
        vector, size = rows.reshape(z0.shape), torch.ones_like(length)
    later = torch.stack(growth[n_iters // 2 :])
    return vector, later.log().mean(0).exp()
