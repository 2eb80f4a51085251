"""The predictions of ``fastdeq.theory`` beside what random draws give: a table.

Each measured number is a mean over draws of W (and of c, g). The last column is its deviation from
the prediction, after it the standard error of the measured mean.

    python examples/theory_check.py                      under a minute on one core
    python examples/theory_check.py --quick              a few seconds
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from fastdeq import ACTIVATIONS, Dense, Orthogonal, Symmetric, theory

FAMILIES = {"dense": Dense, "orthogonal": Orthogonal, "symmetric": Symmetric}
LINEAR_SCALE = 0.6
#: activation, scale, injection variance
NONLINEAR = (("tanh", 0.9, 0.3), ("relu", 0.9, 1.0), ("hardtanh", 0.8, 0.3))
PROBES = 32


def draw(family: str, features: int, scale: float) -> Tensor:
    return FAMILIES[family](features, scale, dtype=torch.float64)().detach()


def linear(family: str, d: int, slow: bool) -> Iterator[tuple[str, float, float]]:
    """(quantity, predicted, measured) of one draw of W."""
    s, m1 = LINEAR_SCALE, theory.variance(family, LINEAR_SCALE)
    eye = torch.eye(d, dtype=torch.float64)
    W = draw(family, d, s)
    R = torch.linalg.inv(eye - W)
    c, g = torch.randn(2, d, PROBES, dtype=torch.float64)
    z, u = R @ c, R.T @ g
    yield "|z|^2 / |c|^2", m1, float(z.square().sum() / c.square().sum())
    yield "|u|^2 / |g|^2", m1, float(u.square().sum() / g.square().sum())
    yield "m_2", theory.fourth_moment(family, s), float((R @ R.T).square().sum() / d)
    size = (u.square().sum(0) * z.square().sum(0)).mean() / d**2
    yield "|dL/dW|^2, any loss", theory.weight_gradient_moment(family, s), float(size)
    u = R.T @ z
    size = (u.square().sum(0) * z.square().sum(0)).mean() / d**2
    predicted = theory.weight_gradient_moment(family, s, of_length=True)
    yield "|dL/dW|^2, L = |z|^2/2", predicted, float(size)
    norm = float(torch.linalg.matrix_norm(R, 2))
    yield "|(I - W)^-1|", theory.resolvent_norm(family, s), norm
    if not slow:
        return
    R = eye.clone()
    for _ in range(12):  # the rest is below 0.6^24
        R = eye + draw(family, d, s) @ R
    yield "untied |z|^2 / |c|^2", theory.untied_variance(family, s), float(R.square().sum() / d)
    measured = float((R @ R.T).square().sum() / d)
    yield "untied m_2", theory.untied_fourth_moment(family, s), measured


def nonlinear(
    family: str, d: int, name: str, scale: float, injected: float, slow: bool
) -> Iterator[tuple[str, float, float]]:
    phi = ACTIVATIONS[name]
    predicted = theory.equilibrium(family, name, scale, injected)
    W = draw(family, d, scale)
    c = torch.randn(d, PROBES, dtype=torch.float64) * math.sqrt(injected)
    z = torch.zeros_like(c)
    while (step := phi.function(W @ z + c) - z).norm() > 1e-8 * (z.norm() + 1):
        z += step
    p = W @ z + c
    D = phi.slope(p)
    yield f"{name} |z|^2 / d", predicted.length, float(z.square().mean())
    yield f"{name} E p^2", predicted.preactivation_variance, float(p.square().mean())
    yield f"{name} E phi'^2", predicted.mean_square_slope, float(D.square().mean())
    g = torch.randn_like(z)
    u = g.clone()
    while (step := g + W.T @ (D * u) - u).norm() > 1e-8 * u.norm():
        u += step
    ratio = float(u.square().sum() / g.square().sum())
    yield f"{name} |u|^2 / |g|^2", predicted.adjoint_variance, ratio
    if slow:
        radius = float(torch.linalg.eigvals(D[:, 0, None] * W).abs().max())
        yield f"{name} radius of D W", predicted.jacobian_radius, radius


def main() -> None:
    parser = argparse.ArgumentParser(
        description="The predictions of fastdeq.theory beside what random draws give.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--features", type=int, default=1000, help="size d of the state")
    parser.add_argument("--draws", type=int, default=3, help="of W, for each family")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--quick", action="store_true", help="two draws of 200 features")
    options = parser.parse_args()
    if options.features < 50 or options.draws < 1:  # narrow states may not even settle
        parser.error("--features must be at least 50, --draws at least 1")
    torch.set_num_threads(1)  # a second one waits more than it helps where cores are shared
    torch.manual_seed(options.seed)
    d, draws = (200, 2) if options.quick else (options.features, options.draws)
    print(f"d = {d}, {draws} draws of W, {PROBES} vectors each; linear: s = {LINEAR_SCALE}")
    print(f"{'family':11} {'quantity':24} {'predicted':>9} {'measured':>9} {'deviation':>9}")
    largest = 0.0
    for family in FAMILIES:
        rows: dict[tuple[str, float], list[float]] = defaultdict(list)
        for index in range(draws):
            slow = index == 0  # eigenvalues and untied products: of one draw
            found = list(linear(family, d, slow))
            for name, scale, injected in NONLINEAR:
                found += nonlinear(family, d, name, scale, injected, slow)
            for quantity, predicted, value in found:
                rows[quantity, predicted].append(value)
        for (quantity, predicted), values in rows.items():
            measured = torch.tensor(values, dtype=torch.float64)
            mean = float(measured.mean())
            deviation = mean / predicted - 1
            error = "one draw"
            if len(values) > 1:
                error = f"+- {float(measured.std()) / math.sqrt(len(values)) / predicted:.2%}"
            largest = max(largest, abs(deviation))
            numbers = f"{predicted:9.4f} {mean:9.4f} {deviation:+8.2%} {error}"
            print(f"{family:11} {quantity:24} {numbers}")
    print(f"largest deviation: {largest:.2%}")


if __name__ == "__main__":
    main()
