"""Cells to be diagnosed: linear ones of known spectra, and others of every kind."""

import torch
from torch import nn

F64 = torch.float64


def symmetric_matrix(eigenvalues, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=F64))[0]
    return q @ torch.diag(torch.as_tensor(eigenvalues, dtype=F64)) @ q.T


class LinearCell(nn.Module):
    """``W z + x``."""

    def __init__(self, matrix):
        super().__init__()
        self.w = nn.Linear(*matrix.shape, bias=False, dtype=matrix.dtype)
        with torch.no_grad():
            self.w.weight.copy_(matrix)

    def forward(self, z, x):
        return self.w(z) + x


class MLP(nn.Module):
    """``V tanh(W z + x)``, with a gain for each sample."""

    def __init__(self, size=12, scale=0.7):
        super().__init__()
        self.first, self.second = nn.Linear(size, size), nn.Linear(size, size)
        for m in (self.first, self.second):
            nn.init.orthogonal_(m.weight, scale)

    def forward(self, z, x, gain=None):
        value = self.second(torch.tanh(self.first(z) + x))
        return value if gain is None else gain * value


class Attention(nn.Module):
    """A causal block on states ``(B, T, d)``; normalised, so that it settles."""

    def __init__(self, size=8):
        super().__init__()
        self.attend = nn.MultiheadAttention(size, 2, batch_first=True)
        self.norm = nn.LayerNorm(size)

    def forward(self, z, x, mask=None):
        return self.norm(x + 0.3 * self.attend(z, z, z, need_weights=False, attn_mask=mask)[0])


class Conv(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, z, x):
        return 0.5 * torch.tanh(self.mix(z)) + x


class Pair(nn.Module):
    """A state of two parts that feed each other."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 3), nn.Linear(3, 6)

    def initial_state(self, x):
        return {"fast": x.new_zeros(len(x), 3), "slow": x.new_zeros(len(x), 6)}

    def forward(self, z, x):
        fast = torch.tanh(0.5 * self.a(z["slow"]) + x[:, :3])
        return {"fast": fast, "slow": torch.tanh(0.5 * self.b(z["fast"]))}


class Normalised(nn.Module):
    """With everything that an evaluation changes: statistics and random numbers."""

    def __init__(self, size=6):
        super().__init__()
        self.w = nn.Linear(size, size)
        self.norm = nn.BatchNorm1d(size)
        self.drop = nn.Dropout(0.1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z, x):
        self.calls = self.calls + 1  # another tensor each time
        return self.drop(0.3 * torch.tanh(self.w(z))) + 0.1 * self.norm(x)
