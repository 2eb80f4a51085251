"""What one training run is made of."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from ..activations import ACTIVATIONS
from ..conventions import in_convention
from ..errors import check_choice
from ..gradients import Phantom
from ..options import Options
from ..weights import WEIGHTS

TaskName = Literal["digits", "mnist", "characters"]
OptimizerName = Literal["sgd", "adam"]
Regime = Literal["initialised", "kept"]
TASKS: tuple[TaskName, ...] = get_args(TaskName)
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
REGIMES: tuple[Regime, ...] = get_args(Regime)
#: Gradients of the study: exact at the equilibrium, or of five damped steps from it.
GRADIENTS: dict[str, Any] = {"implicit": "implicit", "phantom": Phantom(steps=5, damping=0.5)}
#: Solvers of the study, of both directions: plain iteration, Anderson acceleration, and what
#: fastdeq chooses by the structure that W is certain to have.
SOLVERS: dict[str, dict[str, str]] = {
    "picard": {"solver": "picard", "adjoint": "neumann"},
    "anderson": {"solver": "anderson", "adjoint": "anderson"},
    "auto": {"solver": "auto", "adjoint": "auto"},
}
_FORMAT = 1


@dataclass(frozen=True)
class Config:
    """One run: a cosine schedule from ``learning_rate`` to zero, the same for every family.

    ``scale`` is the spectral radius of W at initialisation; with ``parametrized=False`` W has its
    structure at initialisation only. A gradient longer than ``max_gradient`` is shortened to it;
    infinity: none is. ``optimizer`` is "sgd" (with Nesterov ``momentum``) or "adam". ``spectra``
    says whether eigenvalues are kept, of W and of the Jacobian.

    Raises:
        ValueError: an unknown name, sizes below 1, a scale or rate that is not positive, or options
            of the solve that :class:`fastdeq.DEQLayer` refuses.
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
    task: TaskName = "digits"
    activation: str = "tanh"
    solver: str = "auto"
    gradient: str = "implicit"
    optimizer: OptimizerName = "sgd"
    spectra: bool = False

    def __post_init__(self) -> None:
        check_choice(self.weight, WEIGHTS, "weight")
        check_choice(self.task, TASKS, "task")
        check_choice(self.activation, ACTIVATIONS, "activation")
        check_choice(self.solver, SOLVERS, "solver")
        check_choice(self.gradient, GRADIENTS, "gradient")
        check_choice(self.optimizer, OPTIMIZERS, "optimizer")
        if min(self.features, self.epochs, self.batch_size) < 1:
            raise ValueError(f"features, epochs and batch_size must be >= 1, got {self}.")
        for name in ("scale", "learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                value = getattr(self, name)
                raise ValueError(f"{name} must be positive and finite, got {value!r}.")
        if not self.max_gradient > 0:
            raise ValueError(f"max_gradient must be positive, got {self.max_gradient!r}.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum!r}.")
        Options(**self.solve_options)
        as_floats(self)

    @property
    def solve_options(self) -> dict[str, Any]:
        """Options of the run's :class:`fastdeq.DEQLayer`."""
        return {
            **SOLVERS[self.solver],
            "gradient": GRADIENTS[self.gradient],
            "tol": self.tol,
            "max_iter": self.max_iter,
            "on_failure": "ignore",  # the share that converged is part of the result
        }

    def steps(self, samples: int) -> int:
        """Updates in a run on so many training samples."""
        return self.epochs * math.ceil(samples / self.batch_size)

    @property
    def regime(self) -> Regime:
        """Whether W is only "initialised" in its family, or "kept" there by parametrisation."""
        return "kept" if self.parametrized and self.weight != "dense" else "initialised"

    @property
    def entry_scale(self) -> float:
        """``sqrt(d)`` times the standard deviation of an entry of W: half the radius of a symmetric
        W, and the radius of the others."""
        return in_convention(self.weight, self.scale, "variance")

    @property
    def key(self) -> str:
        """A name for the run, the same for the same settings on any machine."""
        return key_of(_FORMAT, self)


def key_of(form: int, settings: Any) -> str:
    """A hash of the fields of a dataclass, and of ``form``: it changes when the same settings would
    come to other numbers."""
    text = json.dumps([form, asdict(settings)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def as_floats(settings: Any) -> None:
    """Whole numbers in fields of real ones become floats: 1 and 1.0 are one setting, of one key."""
    for field in fields(settings):
        if field.type == "float":
            object.__setattr__(settings, field.name, float(getattr(settings, field.name)))
