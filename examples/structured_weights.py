"""Recurrent weights of your own: low rank, diagonal plus low rank, and blocks of other weights.

A weight is a module whose ``forward()`` returns W ``(d, d)``. It may say what it knows of W, and
the solvers follow it:

    tags            frozenset of "orthogonal" (W = s Q) and "symmetric", if W is so at all times
    norm_bound()    a number that the 2-norm of W never exceeds, or None

Trains a DEQ classifier on handwritten digits with each weight, a second or two per weight, and
looks at the Jacobian of the trained cell where the test digits settle.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeq import AffineCell, DEQLayer, Orthogonal, Symmetric
from fastdeq.diagnostics import spectral_radius
from fastdeq.study import Dataset, digits


class LowRank(nn.Module):
    """``W = s A B^T``, the columns of A and B ``(d, r)`` orthonormal: its norm is s."""

    def __init__(self, features: int, rank: int, scale: float):
        super().__init__()
        self.scale = scale
        self.left = nn.Parameter(torch.randn(features, rank))
        self.right = nn.Parameter(torch.randn(features, rank))

    def norm_bound(self) -> float:
        return self.scale

    def forward(self) -> Tensor:
        a, b = torch.linalg.qr(self.left)[0], torch.linalg.qr(self.right)[0]
        return self.scale * a @ b.t()


class DiagonalPlusLowRank(nn.Module):
    """``W = D + L``: D diagonal with entries below s/2, L of low rank and norm s/2."""

    def __init__(self, features: int, rank: int, scale: float):
        super().__init__()
        self.scale = scale
        self.diagonal = nn.Parameter(torch.randn(features))
        self.low_rank = LowRank(features, rank, scale / 2)

    def norm_bound(self) -> float:
        return self.scale

    def forward(self) -> Tensor:
        return torch.diag(self.scale / 2 * torch.tanh(self.diagonal)) + self.low_rank()


class BlockDiagonal(nn.Module):
    """Blocks that are weights themselves: it is what all of them are."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    @property
    def tags(self) -> frozenset[str]:
        shared = frozenset.intersection(*(block.tags for block in self.blocks))
        one_scale = len({block.norm_bound() for block in self.blocks}) == 1
        return shared if one_scale else shared - {"orthogonal"}  # W = s Q has one s

    def norm_bound(self) -> float | None:
        bounds = [block.norm_bound() for block in self.blocks]
        return None if None in bounds else max(bounds)

    def forward(self) -> Tensor:
        return torch.block_diag(*(block() for block in self.blocks))


FEATURES, SCALE, EPOCHS = 96, 0.9, 6


def train(weight: nn.Module, data: Dataset) -> tuple[DEQLayer, nn.Module]:
    """A DEQ classifier around ``weight``: its layer, and the layer with the head."""
    layer = DEQLayer(AffineCell(data.in_features, FEATURES, weight=weight))
    model = nn.Sequential(layer, nn.Linear(FEATURES, data.classes))
    # Adam moves every entry by the rate: a small one keeps an unbounded W where the map contracts.
    recurrent = {id(p) for p in weight.parameters()}
    rest = [p for p in model.parameters() if id(p) not in recurrent]
    groups = [{"params": rest}, {"params": list(weight.parameters()), "lr": 1e-3}]
    optimizer = torch.optim.Adam(groups, lr=3e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(data.x_train)).split(64):
            loss = F.cross_entropy(model(data.x_train[batch]), data.y_train[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return layer, model


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the products are too small to gain from a second one
    data = digits()
    weights = {
        "low rank": LowRank(FEATURES, 8, SCALE),
        "diagonal + low rank": DiagonalPlusLowRank(FEATURES, 8, SCALE),
        "orthogonal blocks": BlockDiagonal(*(Orthogonal(16, SCALE) for _ in range(6))),
        "symmetric blocks": BlockDiagonal(*(Symmetric(16, SCALE) for _ in range(6))),
    }
    print(f"{'weight':20} {'tag':10} {'parameters':>10} {'accuracy':>9} {'iterations':>10}  radius")
    for name, weight in weights.items():
        layer, model = train(weight, data)
        with torch.no_grad():
            right = (model(data.x_test).argmax(1) == data.y_test).float().mean()
        iterations = layer.last_solution.iterations.float().mean()
        found = spectral_radius(layer, data.x_test[:32])
        size = sum(p.numel() for p in weight.parameters())
        tag = ", ".join(getattr(weight, "tags", ())) or "-"
        print(
            f"{name:20} {tag:10} {size:10} {right:9.1%} {iterations:10.1f}"
            f"  {found.value.max():.3f} +- {found.accuracy.max():.0e}"
        )
    print("radius: the largest spectral radius of df/dz at the equilibria of 32 test digits")


if __name__ == "__main__":
    main()
