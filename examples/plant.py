"""A recurrent equilibrium network that learns a plant from its input and output.

The plant is a mass on a spring that hardens, with viscous and dry friction; a force u moves it, and
its position y is measured with noise. In each time step the model solves an implicit layer:

    w = tanh(D w + C x + E u + b)        D = 0.8 Q, Q orthogonal: exactly one w, by a fused solve
    x' = A x + F w + G u,  y = H x       |A| < 1: with w between -1 and 1 no state runs away

RENs mostly take D strictly triangular, so that w follows neuron by neuron; a full D lets every
neuron see all others. Prints the fit on new inputs, twice as long as those it was trained on, next
to that of the model without w (a linear one), and how long a training step takes with
other ways to find w. Saves a picture.

Seen with the default options: a fit of 93.5 %, the linear model 58.9 %; 78 seconds of one core. A
training step with the loop over neurons took 4.9 times as long, with torchdeq 16.9 times.

    python examples/plant.py
    python examples/plant.py --quick

Source: Revay, Wang and Manchester, "Recurrent Equilibrium Networks: Flexible Dynamic Models with
Guaranteed Stability and Robustness", 2021, arXiv 2104.05942.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from fastdeq import AffineCell, DEQLayer, Orthogonal, OrthogonalMap

STEP, NOISE = 0.1, 0.01  # seconds; standard deviation of the measured position
Solve = Callable[[Tensor, Tensor | None], Tensor]  # (u, x) joined, the w before -> w


def acceleration(position: Tensor, velocity: Tensor, force: Tensor) -> Tensor:
    dry = 0.3 * torch.tanh(velocity / 0.05)
    return force - position - 2.0 * position**3 - 0.3 * velocity - dry


def simulate(force: Tensor, substeps: int = 4) -> Tensor:
    """Position ``(T, B)`` after each step of a force ``(T, B)`` held during it, from rest; RK4."""
    state = torch.zeros(2, force.shape[1], dtype=torch.float64)
    h, positions = STEP / substeps, []

    def slope(s: Tensor, u: Tensor) -> Tensor:
        return torch.stack([s[1], acceleration(s[0], s[1], u)])

    for u in force.double():
        for _ in range(substeps):
            k1 = slope(state, u)
            k2 = slope(state + h / 2 * k1, u)
            k3 = slope(state + h / 2 * k2, u)
            k4 = slope(state + h * k3, u)
            state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        positions.append(state[0])
    return torch.stack(positions).float()


def experiments(steps: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Forces that change at random times, and the positions measured: ``(T, B, 1)`` each."""
    levels = torch.empty(steps, count).uniform_(-2.5, 2.5, generator=generator)
    force = levels.clone()
    keep = torch.rand(steps, count, generator=generator) > 0.12
    for t in range(1, steps):
        force[t] = torch.where(keep[t], force[t - 1], levels[t])
    noise = NOISE * torch.randn(steps, count, generator=generator)
    return force[..., None], (simulate(force) + noise)[..., None]


class Model(nn.Module):
    """Position ``(T, B, 1)`` for forces ``(T, B, 1)``. Without neurons it is linear."""

    def __init__(self, states: int, neurons: int):
        super().__init__()
        self.states = states
        self.turn = nn.Linear(states, states, bias=False)
        nn.init.eye_(self.turn.weight)
        register_parametrization(self.turn, "weight", OrthogonalMap())
        self.decay = nn.Parameter(torch.full((states,), 3.0))
        self.drive = nn.Linear(neurons + 1, states)  # F and G
        nn.init.normal_(self.drive.weight, std=0.1)
        nn.init.zeros_(self.drive.bias)
        self.output = nn.Linear(states, 1)  # H
        self.layer = None
        if neurons:
            cell = AffineCell(states + 1, neurons, weight=Orthogonal(neurons, 0.8))
            self.layer = DEQLayer(cell, tol=1e-4)

    def forward(self, force: Tensor, solve: Solve | None = None) -> Tensor:
        solve = solve or self.equilibrium
        a = torch.sigmoid(self.decay)[:, None] * self.turn.weight  # its norm is below 1
        x, w, states = force.new_zeros(force.shape[1], self.states), None, []
        for known in force:
            if self.layer is not None:
                w = solve(torch.cat([known, x], dim=1), w)
                known = torch.cat([known, w], dim=1)
            x = F.linear(x, a) + self.drive(known)
            states.append(x)
        return self.output(torch.stack(states))

    def equilibrium(self, known: Tensor, before: Tensor | None) -> Tensor:
        return self.layer(known, z0=before)  # a good guess; as a start it gets no gradient


def train(model: Model, data: tuple[Tensor, Tensor], steps: int, batch: int = 32) -> list[float]:
    """Adam on the squared error of the simulation, never of one step ahead; the losses."""
    force, position = data
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(force.shape[1], (batch,))
        loss = F.mse_loss(model(force[:, chosen]), position[:, chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def fit(model: Model, data: tuple[Tensor, Tensor]) -> tuple[float, Tensor]:
    """``1 - |y - y_model| / |y - mean y|``, the mean over experiments, and y_model."""
    force, position = data
    with torch.no_grad():
        predicted = model(force)
    spread = (position - position.mean(0)).norm(dim=0)
    return float((1 - (position - predicted).norm(dim=0) / spread).mean()), predicted


def triangular(cell: AffineCell) -> Solve:
    """w neuron by neuron, for D strictly lower triangular, as RENs are mostly written."""
    units = torch.eye(cell.features)

    def solve(known: Tensor, before: Tensor | None) -> Tensor:
        d, c = cell.recurrent_weight(), cell.inject(known)
        w = torch.zeros_like(c)
        for i in range(cell.features):
            # The zeros of w do what those of D would.
            w = w + units[i] * torch.tanh(F.linear(w, d[i : i + 1]) + c[:, i : i + 1])
        return w

    return solve


def torchdeq_solve(cell: AffineCell, tol: float) -> Solve:
    """The same equilibrium by torchdeq, with its implicit gradient."""
    from torchdeq import get_deq

    options = {"f_tol": tol, "b_tol": tol, "f_max_iter": 100, "b_max_iter": 100}
    deq = get_deq(f_solver="fixed_point_iter", b_solver="fixed_point_iter", ift=True, **options)

    def solve(known: Tensor, before: Tensor | None) -> Tensor:
        d, c = cell.recurrent_weight(), cell.inject(known)
        start = torch.zeros_like(c) if before is None else before.detach()
        return deq(lambda w: torch.tanh(F.linear(w, d) + c), start)[0][-1]

    return solve


def race(model: Model, data: tuple[Tensor, Tensor], rounds: int) -> dict[str, float]:
    """How many times as long as fastdeq others take for a training step: medians of rounds in which
    each has its turn."""
    cell, (force, position) = model.layer.cell, data
    solves: dict[str, Solve | None] = {"fastdeq": None, "triangular loop": triangular(cell)}
    if importlib.util.find_spec("torchdeq"):
        solves["torchdeq"] = torchdeq_solve(cell, model.layer.options.tol)
    seconds: dict[str, list[float]] = {name: [] for name in solves}
    for _ in range(rounds + 1):  # the first is a warm-up
        for name, solve in solves.items():
            start = time.perf_counter()
            F.mse_loss(model(force, solve), position).backward()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return {name: median[name] / median["fastdeq"] for name in solves if name != "fastdeq"}


def picture(path: Path, data: tuple[Tensor, Tensor], predictions: dict[str, Tensor]) -> None:
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit("The picture needs matplotlib: pip install 'fastdeq[study]'") from None
    times = STEP * torch.arange(len(data[0]))
    figure, axes = plt.subplots(2, sharex=True, figsize=(7, 4), height_ratios=(1, 2.5))
    axes[0].step(times, data[0][:, 0, 0], "k", linewidth=1)
    axes[0].set_ylabel("force")
    axes[1].plot(times, data[1][:, 0, 0], "k.", markersize=2, label="measured")
    for name, predicted in predictions.items():
        axes[1].plot(times, predicted[:, 0, 0], linewidth=1, label=name)
    axes[1].set(xlabel="seconds", ylabel="position")
    axes[1].legend(loc="upper right", ncols=3, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Learns a plant with a recurrent equilibrium network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--neurons", type=int, default=32, help="size of w")
    parser.add_argument("--states", type=int, default=4, help="size of x")
    parser.add_argument("--steps", type=int, default=800, help="of training")
    parser.add_argument("--seed", type=int, default=0, help="of the data and the weights")
    parser.add_argument("--rounds", type=int, default=7, help="of the timing; 0: none")
    parser.add_argument("--out", type=Path, default="plant.png", help="where the picture goes")
    parser.add_argument("--quick", action="store_true", help="15 steps, one round: some seconds")
    args = parser.parse_args()
    steps, rounds = (15, 1) if args.quick else (args.steps, args.rounds)
    if not args.out.parent.is_dir():
        parser.error(f"--out: there is no folder {args.out.parent}")
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # the products are too small to gain from a second one
    generator = torch.Generator().manual_seed(args.seed)
    data = experiments(120, 256, generator)
    test = experiments(240, 64, generator)

    predictions = {}
    for name, neurons in (("linear", 0), ("equilibrium network", args.neurons)):
        model = Model(args.states, neurons)
        begin = time.perf_counter()
        losses = train(model, data, steps)
        share, predictions[name] = fit(model, test)
        print(
            f"{name}: fit {share:.1%} on {test[0].shape[1]} new experiments, loss at the end "
            f"{losses[-1]:.1e} (noise {NOISE**2:.0e}), {time.perf_counter() - begin:.0f} s"
        )
    layer = model.layer
    print(f"last step of the test: {layer.last_solution.summary()}")
    print(f"no w is further than {layer.last_solution.error_bound.max():.1e} from its equilibrium")
    picture(args.out, test, predictions)
    print(f"Picture saved as {args.out}")
    if rounds:
        batch = data[0][:, :32], data[1][:, :32]
        for name, ratio in race(model, batch, rounds).items():
            print(f"a training step with {name}: {ratio:.1f} times as long as with fastdeq")


if __name__ == "__main__":
    main()
