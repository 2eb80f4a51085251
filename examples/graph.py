"""An implicit graph network that classifies handwritten digits from five labels of each.

The nodes are scikit-learn's 1797 digits, each joined to its nearest neighbours. Their states
``(nodes, features)`` depend on each other, so all of them are one sample (``batch_dim=None``):

    Z = relu(A Z W^T + X U^T + b)        A = D^-1/2 (adjacency) D^-1/2, |A| <= 1

W = 0.98 Q with Q orthogonal keeps the map a contraction whatever it learns, and information from k
neighbours away counts up to 0.98^k. Prints the accuracy on the nodes without a label, for several
draws of labels, next to models that do not see the graph and to label spreading, which sees
nothing else and is an equilibrium too. Saves a picture.

Seen with the default options: logistic regression 84.0 %, MLP 85.1 %, this network 90.0 %, label
spreading 93.1 % of the nodes without a label; about 40 seconds of one core.

    python examples/graph.py
    python examples/graph.py --quick

Source: Gu et al., "Implicit Graph Neural Networks", NeurIPS 2020, arXiv 2009.06211.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeq import DEQLayer, Orthogonal, fixed_point
from fastdeq.study import digits

CLASSES = 10


def neighbour_graph(x: Tensor, neighbours: int) -> Tensor:
    """Sparse A ``(N, N)``: i and j are joined where one is among the other's nearest. Its
    eigenvalues lie in [-1, 1]."""
    nearest = torch.cdist(x, x).topk(neighbours + 1, largest=False).indices[:, 1:]
    joined = torch.zeros(len(x), len(x)).scatter_(1, nearest, 1.0)
    joined = torch.maximum(joined, joined.t())
    scale = joined.sum(1).rsqrt()
    return (scale[:, None] * joined * scale).to_sparse()


class Propagation(nn.Module):
    """Z ``(N, features)``, x ``(N, features)``: one step of all nodes."""

    def __init__(self, adjacency: Tensor, features: int, scale: float = 0.98):
        super().__init__()
        self.register_buffer("adjacency", adjacency)
        self.weight = Orthogonal(features, scale)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.relu(torch.sparse.mm(self.adjacency, z @ self.weight().t()) + x)


class GraphNetwork(nn.Module):
    """Logits ``(N, 10)`` of all nodes for their pixels ``(N, 64)``."""

    def __init__(self, adjacency: Tensor, pixels: int, features: int):
        super().__init__()
        self.inject = nn.Linear(pixels, features)
        self.layer = DEQLayer(Propagation(adjacency, features), batch_dim=None, tol=1e-4)
        self.head = nn.Linear(features, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        injected = self.inject(F.dropout(x, 0.5, self.training))  # outside of the solve
        return self.head(F.dropout(self.layer(injected), 0.5, self.training))


def few_labels(y: Tensor, each: int, generator: torch.Generator) -> Tensor:
    """Indices of ``each`` random nodes of every class."""
    order = torch.randperm(len(y), generator=generator)
    return torch.cat([order[y[order] == c][:each] for c in range(CLASSES)])


def train(model: nn.Module, x: Tensor, y: Tensor, known: Tensor, steps: int) -> Tensor:
    """Logits of all nodes after training on the known ones."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(steps):
        loss = F.cross_entropy(model(x)[known], y[known])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return model(x)


def spread_labels(adjacency: Tensor, y: Tensor, known: Tensor, keep: float = 0.9) -> Tensor:
    """Label spreading (Zhou et al., 2004), ``F = keep A F + (1 - keep) Y``: linear."""
    start = torch.zeros(len(y), CLASSES)
    start[known, y[known]] = 1.0
    spread, _ = fixed_point(
        lambda f: keep * torch.sparse.mm(adjacency, f) + (1 - keep) * start,
        start,
        batch_dim=None,
        tol=1e-4,
    )
    return spread


def picture(path: Path, accuracies: dict[str, list[float]], each: int) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit("The picture needs matplotlib: pip install 'fastdeq[study]'") from None
    figure, axes = plt.subplots(figsize=(6, 2.5))
    for row, values in enumerate(accuracies.values()):
        axes.plot(values, [row] * len(values), "o", alpha=0.6)
        axes.plot([sum(values) / len(values)], [row], "k|", markersize=20)
    axes.set_yticks(range(len(accuracies)), list(accuracies))
    axes.set(xlabel=f"accuracy without a label, {each} labels per class", ylim=(-0.5, row + 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="An implicit graph network with few labels.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--labels", type=int, default=5, help="of each class")
    parser.add_argument("--neighbours", type=int, default=8, help="of each node")
    parser.add_argument("--features", type=int, default=32, help="of a node's state")
    parser.add_argument("--steps", type=int, default=120, help="of training")
    parser.add_argument("--draws", type=int, default=5, help="of the labels")
    parser.add_argument("--seed", type=int, default=0, help="of labels and weights")
    parser.add_argument("--out", type=Path, default="graph.png", help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="40 steps, one draw: some seconds")
    args = parser.parse_args()
    if not args.out.parent.is_dir():
        parser.error(f"--out: there is no folder {args.out.parent}")
    steps, draws = (40, 1) if args.quick else (args.steps, args.draws)
    torch.set_num_threads(1)  # the products are too small to gain from a second one
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    data = digits()
    x, y = torch.cat([data.x_train, data.x_test]), torch.cat([data.y_train, data.y_test])
    adjacency = neighbour_graph(x, args.neighbours)
    source, target = adjacency.indices()
    alike = (y[source] == y[target]).float().mean()
    print(f"{len(x)} nodes, {len(source) // 2} edges, {alike:.1%} of them within a class")

    accuracies: dict[str, list[float]] = {}
    begin = time.perf_counter()
    for _ in range(draws):
        known = few_labels(y, args.labels, generator)
        unknown = torch.ones(len(y), dtype=torch.bool)
        unknown[known] = False
        network = GraphNetwork(adjacency, x.shape[1], args.features)
        mlp = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10))
        logits = {
            "logistic regression": train(nn.Linear(x.shape[1], CLASSES), x, y, known, steps),
            "MLP": train(mlp, x, y, known, steps),
            "label spreading": spread_labels(adjacency, y, known),
            "implicit graph network": train(network, x, y, known, steps),
        }
        for name, found in logits.items():
            right = (found.argmax(1) == y)[unknown].float().mean()
            accuracies.setdefault(name, []).append(float(right))
    for name, values in accuracies.items():
        mean = sum(values) / len(values)
        print(f"{name:24} {mean:6.1%}   {min(values):.1%} to {max(values):.1%}")
    layer = network.layer
    print(f"forward: {layer.last_solution.summary()}")
    print(f"adjoint: {layer.last_adjoint_solution.summary()}")
    print(f"{draws} draws of {args.labels} labels per class, {time.perf_counter() - begin:.0f} s")
    picture(args.out, accuracies, args.labels)
    print(f"Picture saved as {args.out}")


if __name__ == "__main__":
    main()
