"""Maps that Anderson acceleration solves slowly with a short history, and faster with a longer one:
a function f and a start for a seed. All are float64 and have four samples."""

import torch

BATCH = 4
OPTIONS = {"dtype": torch.float64}


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def rotation(n, seed, scale=0.99):
    """``z -> scale z R^T + c`` with a random orthogonal R of n dimensions."""
    g = _generator(seed)
    q, r = torch.linalg.qr(torch.randn(n, n, generator=g, **OPTIONS))
    weight = scale * q * r.diagonal().sign()
    c = torch.randn(BATCH, n, generator=g, **OPTIONS)
    return lambda z: z @ weight.t() + c, torch.zeros_like(c)


def diffusion(n, seed, step=1000.0):
    """Jacobi iteration of ``(1 + 4 t) u - t (neighbours of u) = b`` on n x n points: one implicit
    step t of the heat equation, with zeros around."""
    b = torch.randn(BATCH, 1, n, n, generator=_generator(seed), **OPTIONS)
    neighbours = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0]], **OPTIONS).view(1, 1, 3, 3)

    def f(u):
        return (b + step * torch.conv2d(u, neighbours, padding=1)) / (1 + 4 * step)

    return f, torch.zeros_like(b)


def nonnegative_least_squares(rows, n, seed, noise=0.1):
    """Projected gradient steps for ``min |A z - b|, z >= 0`` with a Gaussian A ``(rows, n)``."""
    g = _generator(seed)
    a = torch.randn(rows, n, generator=g, **OPTIONS)
    z = torch.rand(BATCH, n, generator=g, **OPTIONS)
    b = z @ a.t() + noise * torch.randn(BATCH, rows, generator=g, **OPTIONS)
    step = torch.linalg.matrix_norm(a, 2) ** -2
    return lambda z: torch.relu(z - step * (z @ a.t() - b) @ a), torch.zeros_like(z)
