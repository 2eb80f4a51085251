"""Training with general cells: `python bench/cpu/general_training.py --steps 200`.

Two models (``bench/common/general_models.py``), fastdeq against torchdeq's implicit gradient, both
at a relative tolerance of 1e-3 in both directions and torchdeq's limit of 40 iterations. (The ridge
of its Anderson is absolute, 1e-4, which gradients of a mean loss lie below: its adjoint can come to
the limit on easy problems.) Everybody starts from the same weights, sees the same batches, and
takes its steps in turns with the others, in a new order each time. Printed are

    ms/step          median time of a step: loss, gradient and Adam
    s to loss        time of all steps until the held-out loss, looked at every ``--every`` steps
                     and outside the time, is at or below the task's target; "-" where it never was
    held-out loss    after the last step
    evaluations      of the cell, and passes of a gradient through it, in a step after the last one
    worst residual   ``|f(z) - z| / |f(z)|`` on held-out data after the last step, the worst sample,
                     in float64: larger than 1e-3 where the solver came to its limit
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "common"))

import torch
from contestants import torchdeq_options
from general_cells import State
from general_models import TASKS, Solve, Task
from general_problem import Counted, relative_residual
from loops import PLAIN
from torch import nn

from fastdeq import DEQLayer

TOL, MAX_ITER = 1e-3, 40


def _fastdeq(cell: nn.Module, **options: Any) -> Solve:
    common = {"tol": TOL, "max_iter": MAX_ITER, "on_failure": "ignore"}
    layer = DEQLayer(cell, **common, **options)
    return lambda x, z0: layer(x, z0=z0)


def _torchdeq(cell: nn.Module, solver: str) -> Solve:
    import torchdeq

    deq = torchdeq.get_deq(**torchdeq_options(solver, TOL, TOL, MAX_ITER))

    def solve(x: State, z0: State) -> State:
        deq.train(torch.is_grad_enabled())
        if isinstance(z0, tuple):
            z, _ = deq(lambda *parts: cell(parts, x), z0)
        else:
            z, _ = deq(lambda part: cell(part, x), z0)
        return z[-1]

    return solve


CONTESTANTS: dict[str, Callable[[nn.Module], Solve]] = {
    "fastdeq-auto": _fastdeq,
    "fastdeq-plain": lambda cell: _fastdeq(cell, **PLAIN),
    "torchdeq-fixed-point": lambda cell: _torchdeq(cell, "fixed_point_iter"),
    "torchdeq-anderson": lambda cell: _torchdeq(cell, "anderson"),
}


@dataclass
class Run:
    """One contestant's training."""

    step_seconds: list[float] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)  # steps taken, held-out loss
    evaluations: int = 0
    passes: int = 0
    residual: float = float("nan")

    def seconds_to(self, target: float) -> float | None:
        """Of training, until the held-out loss was first seen at or below ``target``."""
        for steps, loss in self.losses:
            if loss <= target:
                return sum(self.step_seconds[:steps])
        return None

    @property
    def median_ms(self) -> float:
        return 1e3 * statistics.median(self.step_seconds)


class _Training:
    def __init__(self, name: str, model: Any, task: Task):
        self.build, self.model, self.task = CONTESTANTS[name], copy.deepcopy(model), task
        self.solve = self.build(self.model.cell)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=task.learning_rate)
        self.run = Run()

    def step(self, batch: Any) -> None:
        begin = time.perf_counter()
        self.optimizer.zero_grad()
        self.model.loss(self.solve, *batch).backward()
        self.optimizer.step()
        self.model.constrain()
        self.run.step_seconds.append(time.perf_counter() - begin)

    def look(self) -> None:
        with torch.no_grad():
            loss = self.model.loss(self.solve, *self.task.held_out)
        self.run.losses.append((len(self.run.step_seconds), float(loss)))

    def finish(self, batch: Any) -> Run:
        """Counts a step that changes nothing, and measures the equilibria of held-out data."""
        counted = Counted(self.model.cell)
        self.model.loss(self.build(counted), *batch).backward()
        self.run.evaluations, self.run.passes = counted.counts.evaluations, counted.counts.passes
        seen: list[State] = []

        def keep(x: State, z0: State) -> State:
            seen.extend((x, self.solve(x, z0)))
            return seen[1]

        with torch.no_grad():
            self.model.loss(keep, *self.task.held_out)
        self.run.residual = relative_residual(self.model.cell, *seen)
        return self.run


def train(task: Task, steps: int, every: int) -> dict[str, Run]:
    """Everybody's training, in turns."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = task.model()
    trainings = {name: _Training(name, model, task) for name in CONTESTANTS}
    generator, shuffle = torch.Generator().manual_seed(0), random.Random(0).shuffle
    order = list(trainings.values())
    for step in range(1, steps + 1):
        batch = task.batch(generator)
        shuffle(order)
        for training in order:
            training.step(batch)
        if step % every == 0 or step == steps:
            for training in order:
                training.look()
    batch = task.batch(generator)
    return {name: training.finish(batch) for name, training in trainings.items()}


def show(name: str, runs: dict[str, Run], target: float) -> None:
    print(f"\n{name}: held-out loss {target:g} is the target")
    titles = ("ms/step", f"s to {target:g}", "held-out loss", "evaluations", "worst residual")
    print(f"{'':22}" + "".join(f"{title:>16}" for title in titles))
    for contestant, run in runs.items():
        seconds = run.seconds_to(target)
        cells = (
            f"{run.median_ms:.1f}",
            "-" if seconds is None else f"{seconds:.1f}",
            f"{run.losses[-1][1]:.3f}",
            f"{run.evaluations}+{run.passes}",
            f"{run.residual:.1e}",
        )
        print(f"{contestant:22}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=10, help="steps between looks at the loss")
    parser.add_argument("--task", choices=TASKS, action="append", help="default: all")
    parser.add_argument("--small", action="store_true", help="tiny models, to see that it runs")
    parser.add_argument("--json", type=Path, help="write every step's time and every loss")
    options = parser.parse_args()
    if min(options.steps, options.every) < 1:
        parser.error("--steps and --every must be at least 1")
    found = {}
    for name in options.task or TASKS:
        task = TASKS[name](small=options.small)
        runs = train(task, options.steps, options.every)
        show(name, runs, task.target)
        found[name] = {contestant: asdict(run) for contestant, run in runs.items()}
    if options.json:
        content = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        options.json.write_text(json.dumps(content | {"tasks": found}) + "\n")


if __name__ == "__main__":
    main()
