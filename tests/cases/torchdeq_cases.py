"""Problems for torchdeq and ``fastdeq.compat.torchdeq`` side by side."""

import copy

import torch
from torch import nn


class Problem:
    """``tanh(z W^T + x)``, W of spectral radius about ``scale``; or two parts that see each other.

    The equilibrium's distance is at most ``|f(z) - z| / (1 - scale)``.
    """

    def __init__(self, batch=5, size=8, scale=0.6, parts=1, dtype=torch.float32):
        whole = size * parts
        self.parts, self.scale = parts, scale
        orthogonal = torch.linalg.qr(torch.randn(whole, whole, dtype=torch.float64))[0]
        self.weight = (scale * orthogonal).to(dtype).requires_grad_()
        self.x = torch.randn(batch, whole, dtype=dtype, requires_grad=True)
        start = torch.zeros(batch, size, dtype=dtype)
        self.start = start if parts == 1 else tuple(start.clone() for _ in range(parts))

    def __call__(self, *state):
        z = torch.cat(state, 1)
        value = torch.tanh(z @ self.weight.T + self.x)
        return value if self.parts == 1 else value.chunk(self.parts, 1)

    def gradients(self, states):
        """Of a loss on all states, in the weight and in x."""
        rows = [z if self.parts == 1 else torch.cat(list(z), 1) for z in states]
        loss = sum((k + 1) * (z * z.detach().cos()).sum() for k, z in enumerate(rows))
        return torch.autograd.grad(loss, (self.weight, self.x), retain_graph=True)

    def exact(self):
        """The equilibrium, rows in float64, and the gradients of ``gradients`` there."""
        other = copy.copy(self)
        other.weight = self.weight.detach().double().requires_grad_()
        other.x = self.x.detach().double().requires_grad_()
        other.parts = 1
        z = torch.zeros_like(other.x)
        with torch.no_grad():
            for _ in range(400):
                z = other(z)
        for _ in range(400):
            z = other(z)
        return z.detach(), other.gradients([z])


def rows(state):
    return state if isinstance(state, torch.Tensor) else torch.cat(list(state), 1)


class Net(nn.Module):
    """One of each kind of module that is normalised, and some that are not."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 7)
        self.conv = nn.Conv2d(3, 4, 3)
        self.transposed = nn.ConvTranspose1d(4, 6, 3)
        self.embedding = nn.Embedding(3, 4)
        self.block = nn.Sequential(nn.Conv1d(2, 3, 2), nn.LayerNorm(4))
