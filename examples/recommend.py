"""A model that trains badly, what fastdeq.recommend says of it, and the model after the change.

The cell is gated, so it is none of fastdeq's own, and its weights are drawn too large. It trains
on handwritten digits as it is, then from a start that follows the recommendation: the family and
the scale go to ``fastdeq.init``, the learning rate of the square weights to the optimiser.

    python examples/recommend.py                         about 15 seconds on one core
    python examples/recommend.py --quick                 a few seconds
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import fastdeq
from fastdeq import DEQLayer
from fastdeq.diagnostics import Recommendations
from fastdeq.study import Dataset, digits

SQUARE = ("gate.weight", "mix.weight")


class GatedCell(nn.Module):
    """``f(z, x) = sigmoid(A z + b) tanh(W z + U x + c)``, z ``(B, d)`` and x ``(B, n)``."""

    def __init__(self, inputs: int, features: int):
        super().__init__()
        self.features = features
        self.gate = nn.Linear(features, features)
        self.mix = nn.Linear(features, features)
        self.inject = nn.Linear(inputs, features)

    def initial_state(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.features)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(z)) * torch.tanh(self.mix(z) + self.inject(x))


class Run:
    """A classifier with the state of a DEQ layer, and how its solves went in training."""

    def __init__(self, data: Dataset, features: int, seed: int):
        torch.manual_seed(seed)  # the same start for both runs, but for the square weights
        self.data = data
        self.layer = DEQLayer(
            GatedCell(data.in_features, features),
            tol=1e-3,
            max_iter=50,
            on_failure="ignore",
            on_solution=self.count,
        )
        self.head = nn.Linear(features, data.classes)
        self.converged = self.solved = 0

    def count(self, direction: str, solution: fastdeq.Solution) -> None:
        if direction == "forward":
            self.converged += int(solution.converged.sum())
            self.solved += solution.status.numel()

    def train(self, epochs: int, rate: float, square_rate: float, seed: int) -> None:
        named = dict(self.layer.cell.named_parameters())
        square = [named.pop(name) for name in SQUARE]
        rest = [*named.values(), *self.head.parameters()]
        optimizer = torch.optim.Adam(
            [{"params": square, "lr": square_rate}, {"params": rest, "lr": rate}]
        )
        order = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for batch in torch.randperm(len(self.data.x_train), generator=order).split(64):
                logits = self.head(self.layer(self.data.x_train[batch]))
                loss = nn.functional.cross_entropy(logits, self.data.y_train[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    @torch.no_grad()
    def accuracy(self) -> float:
        guesses = self.head(self.layer(self.data.x_test)).argmax(1)
        return 100 * float((guesses == self.data.y_test).float().mean())

    def report(self, name: str, epochs: int, rate: float, square_rate: float, seed: int) -> None:
        self.converged = self.solved = 0
        self.train(epochs, rate, square_rate, seed)
        share = 100 * self.converged / self.solved
        print(
            f"{name}: {self.accuracy():.1f}% of the test digits, {share:.0f}% of solves converged"
        )


def advice(run: Run) -> Recommendations:
    """What is recommended for a batch of training digits, and the loss at it."""
    x, y = run.data.x_train[:64], run.data.y_train[:64]
    return fastdeq.recommend(
        run.layer, x, loss=lambda z: nn.functional.cross_entropy(run.head(z), y), names=SQUARE
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="What fastdeq.recommend says about a model that trains badly.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--scale", type=float, default=6.0, help="of the weights that are too large"
    )
    parser.add_argument("--features", type=int, default=64, help="size of the state")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the training part")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of Adam")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights, the order")
    parser.add_argument("--quick", action="store_true", help="two epochs, a state of 32")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the products are too small to gain from a second one
    epochs, features = (2, 32) if args.quick else (args.epochs, args.features)
    data = digits(args.seed)

    def too_large() -> Run:
        run = Run(data, features, args.seed)
        fastdeq.init.dense_(run.layer.cell, args.scale, names=SQUARE)
        return run

    found = advice(too_large())
    print(found.diagnosis, end="\n\n")

    after = Run(data, features, args.seed)
    start = found.get("weight", {"family": "orthogonal", "scale": 0.9})
    fastdeq.init.initialize_(after.layer.cell, **start, names=SQUARE)
    again = advice(after)
    print(f"From {start['family']} weights at scale {start['scale']}:\n")
    print(again.diagnosis, end="\n\n")

    slower = min(again.get("learning_rate", {"adam": args.rate})["adam"], args.rate)
    for name, run, rate in (
        ("before", too_large(), args.rate),
        ("before, at the recommended rate", too_large(), slower),
        ("after", after, slower),
    ):
        run.report(name, epochs, args.rate, rate, args.seed)


if __name__ == "__main__":
    main()
