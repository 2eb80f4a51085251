"""The settings of a study, and the runs they ask for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from ..activations import ActivationName
from ..conventions import CONVENTIONS, Convention, radius_of
from ..errors import check_choice
from ..weights import WEIGHTS, WeightName
from .config import (
    GRADIENTS,
    REGIMES,
    SOLVERS,
    TASKS,
    Config,
    OptimizerName,
    Regime,
    TaskName,
)
from .ensemble import Ensemble
from .text import check_windows
from .transformer import check_width

_METHOD_NAMES = [f"{s}/{g}" for s, g in itertools.product(SOLVERS, GRADIENTS)]
_CHOICES = {
    "tasks": TASKS,
    "weights": WEIGHTS,
    "conventions": CONVENTIONS,
    "regimes": REGIMES,
}

#: Half octaves, of which twice a scale is one again: that is how the conventions differ. Closer
#: around 1, where a linear cell ceases to have a stable equilibrium.
_GRID = (0.25, 0.5, 0.7, 0.9, 1.0, 1.2, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 16.0)
#: Gradients other than the implicit one with one solver: their bias hardly depends on it.
_METHODS = ("picard/implicit", "anderson/implicit", "auto/implicit", "auto/phantom")


@dataclass(frozen=True)
class Images:
    """How the classifiers of images are varied and trained.

    Args:
        scales: of the weights at initialisation, in each convention of the study.
        activations: of the cell.
        methods: solver and gradient, such as "auto/implicit": "auto", "picard" or "anderson", and
            "implicit" or "phantom".
        features: size of the state.
        epochs: passes over the training part.
        batch_size: images of an update.
        optimizer: "sgd" or "adam".
        learning_rate: at the start; it falls to zero like a cosine.
        max_gradient: longest gradient; longer ones are shortened to it.
        tol: of the solves.
        max_iter: most updates of a solve.
    """

    scales: list[float] = field(default_factory=lambda: list(_GRID))
    activations: list[ActivationName] = field(default_factory=lambda: ["identity", "tanh", "relu"])
    methods: list[str] = field(default_factory=lambda: list(_METHODS))
    features: int = 128
    epochs: int = 5
    batch_size: int = 64
    optimizer: OptimizerName = "sgd"
    learning_rate: float = 0.02
    max_gradient: float = math.inf
    tol: float = 1e-3
    max_iter: int = 50


@dataclass(frozen=True)
class Characters(Images):
    """The same for the transformer on characters.

    Args:
        scales: of the six square weights of the block at initialisation.
        activations: of the block's perceptron.
        methods: solver and gradient, such as "auto/implicit": "auto", "picard" or "anderson", and
            "implicit" or "phantom".
        features: width, a multiple of 4.
        epochs: passes over the training windows.
        batch_size: windows of an update.
        optimizer: "sgd" or "adam".
        learning_rate: at the start; it falls to zero like a cosine.
        max_gradient: longest gradient; longer ones are shortened to it.
        tol: of the solves.
        max_iter: most updates of a solve.
        context: characters of a window.
        windows: of the training part.
    """

    scales: list[float] = field(default_factory=lambda: [0.5, 1.0, 2.0, 4.0, 8.0])
    activations: list[ActivationName] = field(default_factory=lambda: ["gelu"])
    methods: list[str] = field(default_factory=lambda: ["auto/implicit", "auto/phantom"])
    features: int = 48
    epochs: int = 2
    batch_size: int = 32
    optimizer: OptimizerName = "adam"
    learning_rate: float = 1e-2
    context: int = 16
    windows: int = 2048


@dataclass(frozen=True)
class Initial:
    """Statistics of equilibria over draws of W, without any training.

    Args:
        scales: spectral radii of W; those below 1 for a linear cell.
        activations: of the cell; "identity" is the linear one.
        features: size d of the state.
        draws: of W, for each family, scale and activation.
        injection_variance: of the entries of the injection c.
    """

    scales: list[float] = field(default_factory=lambda: [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.2, 1.5])
    activations: list[ActivationName] = field(
        default_factory=lambda: ["identity", "tanh", "relu", "hardtanh"]
    )
    features: int = 256
    draws: int = 100
    injection_variance: float = 1.0


@dataclass(frozen=True)
class Study:
    """A study: every combination of what is listed is a run.

    Args:
        tasks: "digits" (scikit-learn's), "characters" (of the Python standard library) or "mnist".
        mnist: folder with the four IDX files of MNIST, or of a set in its form.
        weights: families, "dense", "orthogonal" or "symmetric".
        regimes: W is only "initialised" in its family, or "kept" there while it trains.
        conventions: what families of one scale have in common: the "spectral_radius", or the
            "variance" of entries, where a symmetric W has twice the radius.
        seeds: number of seeds, 0, 1, ...: of the split of the data, the weights and the order.
        images: of the classifiers of digits and of MNIST.
        characters: of the transformer.
        initial: of the statistics at initialisation.

    Raises:
        ValueError: an unknown name, with the valid ones; a value that is listed twice; no seed;
            MNIST without its folder; settings that do not fit a run.
    """

    tasks: list[TaskName] = field(default_factory=lambda: ["digits", "characters"])
    mnist: str | None = None
    weights: list[WeightName] = field(default_factory=lambda: ["dense", "orthogonal", "symmetric"])
    regimes: list[Regime] = field(default_factory=lambda: ["initialised", "kept"])
    conventions: list[Convention] = field(default_factory=lambda: ["spectral_radius", "variance"])
    seeds: int = 8
    images: Images = field(default_factory=Images)
    characters: Characters = field(default_factory=Characters)
    initial: Initial = field(default_factory=Initial)

    def __post_init__(self) -> None:
        for name, valid in _CHOICES.items():
            for given in getattr(self, name):
                check_choice(given, valid, name)
        for name, part in _parts(self):
            for given in getattr(part, "methods", []):
                check_choice(given, _METHOD_NAMES, "methods")
            for field_ in fields(part):
                _check_distinct(f"{name}{field_.name}", getattr(part, field_.name))
        if self.seeds < 1:
            raise ValueError(f"seeds must be >= 1, got {self.seeds}.")
        if "mnist" in self.tasks and self.mnist is None:
            raise ValueError('the task "mnist" needs mnist=<folder with the four IDX files>.')
        if "characters" in self.tasks:
            check_width(self.characters.features)
            check_windows(self.characters.context, self.characters.windows)
        list(self.runs())  # a setting that does not fit a run is said before the first one
        list(self.ensembles())

    def runs(self) -> Iterator[Config]:
        """The training runs, each once: dense weights have no structure to keep, and one radius may
        be asked for in both conventions. The first seed keeps spectra."""
        for seed, task in itertools.product(range(self.seeds), self.tasks):
            part = self.characters if task == "characters" else self.images
            for weight, regime in itertools.product(self.weights, self.regimes):
                kept = regime == "kept"
                if weight == "dense" and kept and len(self.regimes) > 1:
                    continue
                for scale, activation, method in itertools.product(
                    self._radii(weight, part.scales), part.activations, part.methods
                ):
                    solver, gradient = method.split("/")
                    yield Config(
                        weight,
                        scale,
                        parametrized=kept and weight != "dense",
                        features=part.features,
                        epochs=part.epochs,
                        batch_size=part.batch_size,
                        learning_rate=part.learning_rate,
                        max_gradient=part.max_gradient,
                        tol=part.tol,
                        max_iter=part.max_iter,
                        seed=seed,
                        task=task,
                        activation=activation,
                        solver=solver,
                        gradient=gradient,
                        optimizer=part.optimizer,
                        spectra=seed == 0 and task != "characters",
                    )

    def ensembles(self) -> Iterator[Ensemble]:
        """The statistics at initialisation."""
        part = self.initial
        for weight, scale, activation in itertools.product(
            self.weights, part.scales, part.activations
        ):
            if activation == "identity" and scale >= 1:  # I - W may have no inverse
                continue
            yield Ensemble(
                weight,
                scale,
                activation,
                features=part.features,
                draws=part.draws,
                injection_variance=part.injection_variance,
            )

    def _radii(self, weight: str, scales: list[float]) -> list[float]:
        return sorted({radius_of(weight, s, c) for s in scales for c in self.conventions})


def _parts(study: Study) -> list[tuple[str, Any]]:
    """The study and its parts, each with what stands before the names of its settings."""
    nested = ("images", "characters", "initial")
    return [("", study), *((f"{name}.", getattr(study, name)) for name in nested)]


def _check_distinct(name: str, values: Any) -> None:
    """Else the same run would be asked for twice, and counted twice."""
    twice = [v for i, v in enumerate(values) if v in values[:i]] if isinstance(values, list) else []
    if twice:
        raise ValueError(f"{name} lists {twice[0]!r} twice: each value makes its own runs.")


def quick() -> Study:
    """A small study of the same form, within three minutes on two cores."""
    return Study(
        seeds=3,
        images=Images(
            scales=[0.7, 1.4, 2.8, 5.6],
            activations=["tanh"],
            methods=["picard/implicit", "auto/implicit"],
            features=64,
            epochs=3,
        ),
        characters=Characters(
            scales=[0.7, 1.4, 2.8, 5.6],
            methods=["auto/implicit"],
            features=32,
            windows=1024,
        ),
        initial=Initial(
            scales=[0.5, 0.9], activations=["identity", "tanh"], features=128, draws=50
        ),
    )
