"""One training run and what is reported of it; a sweep is a list of runs."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from ..errors import check_choice
from ..solution import Solution
from ..weights import WEIGHTS
from .classifier import DEQClassifier
from .data import Dataset


@dataclass(frozen=True)
class Config:
    """One run: SGD with Nesterov momentum and a cosine schedule, the same for every family.

    ``scale`` is the spectral radius of W at initialisation; with ``parametrized=False`` W has its
    structure at initialisation only. A gradient longer than ``max_gradient`` is shortened to it.

    Raises:
        ValueError: an unknown family, sizes below 1, or a scale or rate that is not positive.
    """

    weight: str
    scale: float
    parametrized: bool = True
    features: int = 128
    epochs: int = 8
    batch_size: int = 64
    learning_rate: float = 0.1
    momentum: float = 0.9
    max_gradient: float = 1.0
    tol: float = 1e-3
    max_iter: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self.weight, WEIGHTS, "weight")
        if min(self.features, self.epochs, self.batch_size) < 1:
            raise ValueError(f"features, epochs and batch_size must be >= 1, got {self}.")
        for name in ("scale", "learning_rate", "max_gradient"):
            if not 0 < getattr(self, name) < math.inf:
                value = getattr(self, name)
                raise ValueError(f"{name} must be positive and finite, got {value!r}.")

    def steps(self, samples: int) -> int:
        """Updates in a run on so many training samples."""
        return self.epochs * math.ceil(samples / self.batch_size)


@dataclass(frozen=True)
class Result:
    """What a run came to. Means and shares are over all samples of all training steps.

    Attributes:
        test_accuracy: share of test images classified correctly after training.
        loss: mean cross-entropy of the last epoch.
        forward_iterations, backward_iterations: mean per sample and solve.
        forward_converged, backward_converged: share of solves that met the tolerance.
        nonfinite: solves, forward or backward, that met NaN or infinity.
        skipped: updates left out because the gradient was not finite.
        structure_drift: largest error of the family's identity at the end of any epoch, relative:
            ``|W^T W / scale^2 - I|`` for orthogonal, ``|W - W^T| / max |W|`` for symmetric weights
            (largest entry); None for dense ones.
        seconds: wall time of training, evaluation excluded.
    """

    config: Config
    test_accuracy: float
    loss: float
    forward_iterations: float
    backward_iterations: float
    forward_converged: float
    backward_converged: float
    nonfinite: int
    skipped: int
    structure_drift: float | None
    seconds: float


class _Tally:
    """Sums over solves, kept on the device: reading them every step would synchronise it."""

    def __init__(self) -> None:
        self.samples = 0
        self.sums: Tensor | float = 0.0

    def add(self, solution: Solution) -> None:
        self.samples += len(solution.status)
        parts = (solution.iterations, solution.converged, solution.nonfinite)
        self.sums = self.sums + torch.stack([p.sum(dtype=torch.float64) for p in parts])

    def read(self) -> tuple[float, float, int]:
        """Mean iterations, share converged, number of non-finite solves."""
        if not self.samples:
            return math.nan, math.nan, 0
        iterations, converged, nonfinite = self.sums.tolist()
        return iterations / self.samples, converged / self.samples, int(nonfinite)


def train(dataset: Dataset, config: Config, on_step: Callable[[], None] | None = None) -> Result:
    """Trains one classifier; the global random state is left as it was.

    Args:
        dataset: of :func:`fastdeq.study.digits` or :func:`fastdeq.study.mnist`.
        config: the run.
        on_step: called after every update.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = DEQClassifier(
            dataset.in_features,
            config.features,
            dataset.classes,
            weight=config.weight,
            scale=config.scale,
            parametrized=config.parametrized,
            tol=config.tol,
            max_iter=config.max_iter,
            on_failure="ignore",  # the share that converged is part of the result
        )
        return _run(model, dataset, config, on_step or (lambda: None))


def _run(
    model: DEQClassifier, dataset: Dataset, config: Config, on_step: Callable[[], None]
) -> Result:
    optimizer = _optimizer(model, config)
    steps = config.steps(len(dataset.x_train))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    forward, backward = _Tally(), _Tally()
    skipped, drifts, losses = 0, [], []
    start = time.perf_counter()
    for _ in range(config.epochs):
        losses = []
        for batch in torch.randperm(len(dataset.x_train)).split(config.batch_size):
            loss = F.cross_entropy(model(dataset.x_train[batch]), dataset.y_train[batch])
            optimizer.zero_grad()
            loss.backward()
            length = nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient)
            # One update with NaN would end the run; a gradient scaler leaves it out as well.
            if bool(length.isfinite()):
                optimizer.step()
            else:
                skipped += 1
            schedule.step()
            forward.add(model.layer.last_solution)
            backward.add(model.layer.last_adjoint_solution)
            losses.append(loss.detach())
            on_step()
        drifts.append(structure_drift(model.layer.cell.recurrent_weight().detach(), config))
    seconds = time.perf_counter() - start

    forward_iterations, forward_converged, forward_nonfinite = forward.read()
    backward_iterations, backward_converged, backward_nonfinite = backward.read()
    return Result(
        config=config,
        test_accuracy=accuracy(model, dataset.x_test, dataset.y_test),
        loss=float(torch.stack(losses).mean()),
        forward_iterations=forward_iterations,
        backward_iterations=backward_iterations,
        forward_converged=forward_converged,
        backward_converged=backward_converged,
        nonfinite=forward_nonfinite + backward_nonfinite,
        skipped=skipped,
        structure_drift=None if drifts[0] is None else max(drifts),
        seconds=seconds,
    )


def _optimizer(model: DEQClassifier, config: Config) -> torch.optim.Optimizer:
    recurrent = model.layer.cell.weight.weight
    rest = [p for p in model.parameters() if p is not recurrent]
    rate = config.learning_rate
    if config.weight == "orthogonal" and config.parametrized:
        # The parameter has unit entries and its factor R is of size sqrt(d), so W = scale Q moves
        # scale^2 / d times as far as it would under a direct step of the same rate.
        rate *= config.features / config.scale**2
    groups = [{"params": rest}, {"params": [recurrent], "lr": rate}]
    return torch.optim.SGD(
        groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0
    )


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of rows of x ``(N, n)`` whose largest logit is at their label in y ``(N,)``."""
    return float((model(x).argmax(1) == y).float().mean())


def structure_drift(weight: Tensor, config: Config) -> float | None:
    """How far W ``(d, d)`` is from its family, see :class:`Result`."""
    if config.weight == "orthogonal":
        gram = weight.t() @ weight / config.scale**2
        return float((gram - torch.eye(len(weight)).to(gram)).abs().max())
    if config.weight == "symmetric":
        return float((weight - weight.t()).abs().max() / weight.abs().max())
    return None


def grid(weights: Iterable[str], scales: Iterable[float], **common: object) -> list[Config]:
    """A run for each family and scale, family by family; ``common`` as for :class:`Config`."""
    return [Config(w, s, **common) for w, s in itertools.product(weights, scales)]


def sweep(
    dataset: Dataset, configs: Sequence[Config], console: Console | None = None
) -> list[Result]:
    """Trains every run, with a progress bar where the console is a terminal."""
    console = console or Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description:22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    results = []
    with progress:
        total = sum(c.steps(len(dataset.x_train)) for c in configs)
        task = progress.add_task("", total=total)
        for config in configs:
            progress.update(task, description=f"{config.weight}, scale {config.scale:g}")
            results.append(train(dataset, config, lambda: progress.advance(task)))
    return results
