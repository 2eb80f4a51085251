"""Models and training steps that CUDA graphs record."""

from __future__ import annotations

import os

import torch
from torch import nn

from fastdeq import AffineCell, DEQLayer, Neumann, Picard

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FIXED = {"solver": Picard(fixed_iterations=14), "adjoint": Neumann(fixed_iterations=14)}
CERTIFIED = {
    "solver": Picard(fixed_iterations="certified"),
    "adjoint": Neumann(fixed_iterations="certified"),
}
IN, OUT, BATCH = 10, 3, 24
OPTIMISERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2, capturable=True),
}


class General(nn.Module):
    """A cell that is not fused."""

    def __init__(self, d):
        super().__init__()
        self.linear = nn.Linear(d, d)
        self.into = nn.Linear(IN, d)
        nn.init.orthogonal_(self.linear.weight, 0.5)

    def initial_state(self, x):
        return x.new_zeros(len(x), self.linear.out_features)

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + self.into(x))


class InTwo(nn.Module):
    """A cell whose state is split in two parts."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def initial_state(self, x):
        return self.cell.initial_state(x).tensor_split(2, 1)

    def forward(self, z, x):
        return self.cell(torch.cat(z, 1), x).tensor_split(2, 1)


def make_model(kind, d, options, device="cuda"):
    """A DEQ layer of a dense, orthogonal or general cell, and a linear one."""
    cell = General(d) if kind == "general" else AffineCell(IN, d, weight=kind, scale=0.5)
    return nn.Sequential(DEQLayer(cell, **options), nn.Linear(d, OUT)).to(device)


class Training:
    """One model, its optimiser, and inputs that stay in place."""

    def __init__(self, model, optimiser):
        self.model = model
        self.x = torch.randn(BATCH, IN, device=model[1].weight.device)
        self.y = torch.randn(BATCH, OUT, device=model[1].weight.device)
        self.loss = torch.zeros((), device=self.x.device)
        self.optimiser = optimiser(model.parameters())

    def load(self, x, y):
        self.x.copy_(x)
        self.y.copy_(y)

    def step(self):
        self.optimiser.zero_grad(set_to_none=True)
        loss = (self.model(self.x) - self.y).square().mean()
        loss.backward()
        self.optimiser.step()
        self.loss.copy_(loss.detach())
