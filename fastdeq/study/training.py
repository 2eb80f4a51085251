"""One training run and what is reported of it; a sweep is a list of runs."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from .classifier import DEQClassifier
from .config import Config
from .data import Dataset
from .spectra import eigenvalues
from .trace import Tally, Trace
from .transformer import CharacterTransformer


@dataclass(frozen=True)
class Result:
    """What a run came to. Means and shares are over all samples of all training steps.

    Attributes:
        test_accuracy: share of test images classified correctly after training, or of characters.
        loss: mean cross-entropy of the last epoch, nats.
        forward_iterations, backward_iterations: mean per sample and solve.
        forward_converged, backward_converged: share of solves that met the tolerance.
        nonfinite: solves, forward or backward, that met NaN or infinity.
        skipped: updates left out because the gradient was not finite.
        structure_drift: largest error of the family's identity at the end of any epoch, relative:
            ``|W^T W / scale^2 - I|`` for orthogonal, ``|W - W^T| / max |W|`` for symmetric weights
            (largest entry); None for dense ones.
        seconds: wall time of training, evaluation excluded.
        test_loss: mean cross-entropy of the test part, nats.
        updates: steps of the optimiser, those left out included.
        trace: lists over the run, by the names of ``trace.COLUMNS`` and "step".
        spectra: eigenvalues "weight_before", "weight_after", "jacobian_before", "jacobian_after",
            each as real and imaginary parts in turn; empty where not asked for.
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
    test_loss: float
    updates: int
    trace: dict[str, list[Any]] = field(repr=False)
    spectra: dict[str, list[float]] = field(repr=False)


Model = DEQClassifier | CharacterTransformer


def model_of(config: Config, dataset: Dataset) -> Model:
    """The untrained model of a run, drawn from the global random state."""
    family = {
        "weight": config.weight,
        "scale": config.scale,
        "parametrized": config.parametrized,
        "activation": config.activation,
    }
    options = {**family, **config.solve_options}
    if config.task == "characters":
        context = dataset.x_train.shape[1]
        return CharacterTransformer(dataset.classes, config.features, context, **options)
    return DEQClassifier(dataset.in_features, config.features, dataset.classes, **options)


def train(dataset: Dataset, config: Config, on_step: Callable[[], None] | None = None) -> Result:
    """Trains one model; the global random state is left as it was.

    Args:
        dataset: of :func:`fastdeq.study.digits`, :func:`fastdeq.study.mnist` or
            :func:`fastdeq.study.characters`, for the task of ``config``.
        config: the run.
        on_step: called after every update.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return _run(model_of(config, dataset), dataset, config, on_step or (lambda: None))


def _run(model: Model, dataset: Dataset, config: Config, on_step: Callable[[], None]) -> Result:
    optimizer = _optimizer(model, config)
    steps = config.steps(len(dataset.x_train))
    rates = [group["lr"] for group in optimizer.param_groups]
    forward, backward, trace = Tally(), Tally(), Trace()
    step = 0
    skipped, drifts, losses = 0, [], []
    spectra = eigenvalues(model, dataset, "before") if config.spectra else {}
    start = time.perf_counter()
    for _ in range(config.epochs):
        losses = []
        for batch in torch.randperm(len(dataset.x_train)).split(config.batch_size):
            # Torch's own schedule warns where the first update is left out.
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            step += 1
            loss = _cross_entropy(model(dataset.x_train[batch]), dataset.y_train[batch])
            optimizer.zero_grad()
            loss.backward()
            length = nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient)
            # One update with NaN would end the run; a gradient scaler leaves it out as well.
            if bool(length.isfinite()):
                optimizer.step()
            else:
                skipped += 1
            adjoint = model.layer.last_adjoint_solution if config.gradient == "implicit" else None
            forward.add(model.layer.last_solution)
            backward.add(adjoint)
            trace.add(loss, model.layer.last_solution, adjoint, length)
            losses.append(loss.detach())
            on_step()
        drifts.append(_drift(model, config))
    seconds = time.perf_counter() - start
    if config.spectra:
        spectra |= eigenvalues(model, dataset, "after")

    forward_iterations, forward_converged, forward_nonfinite = forward.read()
    backward_iterations, backward_converged, backward_nonfinite = backward.read()
    test_accuracy, test_loss = evaluate(model, dataset.x_test, dataset.y_test)
    return Result(
        config=config,
        test_accuracy=test_accuracy,
        loss=float(torch.stack(losses).mean()),
        forward_iterations=forward_iterations,
        backward_iterations=backward_iterations,
        forward_converged=forward_converged,
        backward_converged=backward_converged,
        nonfinite=forward_nonfinite + backward_nonfinite,
        skipped=skipped,
        structure_drift=None if drifts[0] is None else max(drifts),
        seconds=seconds,
        test_loss=test_loss,
        updates=steps,
        trace=trace.binned(),
        spectra=spectra,
    )


def _optimizer(model: Model, config: Config) -> torch.optim.Optimizer:
    """One rate for all, in terms of W itself, also where W is computed from its parameter."""
    recurrent = [w.weight for w in model.recurrent_weights()]
    own = {id(p) for p in recurrent}
    rest = [p for p in model.parameters() if id(p) not in own]
    rate = config.learning_rate
    adam = config.optimizer == "adam"
    if config.weight == "orthogonal" and config.parametrized:
        # The parameter starts at Q, so W = scale Q moves scale^2 times as far as it would under a
        # direct step of the same rate, and scale times under one of Adam's, whose size is fixed.
        rate /= config.scale if adam else config.scale**2
    groups = [{"params": rest}, {"params": recurrent, "lr": rate}]
    if adam:
        return torch.optim.Adam(groups, lr=config.learning_rate)
    return torch.optim.SGD(
        groups, lr=config.learning_rate, momentum=config.momentum, nesterov=config.momentum > 0
    )


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, x: Tensor, y: Tensor, rows: int = 512) -> tuple[float, float]:
    """Share of labels y ``(N, ...)`` at the largest logit for x ``(N, ...)``, and mean
    cross-entropy in nats; so many rows at a time."""
    right, loss = 0.0, 0.0
    for inputs, labels in zip(x.split(rows), y.split(rows), strict=True):
        logits = model(inputs)
        right += float((logits.argmax(-1) == labels).float().mean()) * len(inputs)
        loss += float(_cross_entropy(logits, labels)) * len(inputs)
    return right / len(x), loss / len(x)


def _drift(model: Model, config: Config) -> float | None:
    drifts = [structure_drift(w().detach(), config) for w in model.recurrent_weights()]
    return None if drifts[0] is None else max(drifts)


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
