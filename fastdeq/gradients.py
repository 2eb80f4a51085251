"""How a solved state is differentiated, other than implicitly or by one step: by name, or as
objects that carry their options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from .errors import check_choice
from .solvers import Picard, Solver
from .solvers.base import CheckedOptions, check_integer, check_range

Gradient = Literal["implicit", "one_step", "phantom", "truncated", "unrolled", "reversible"]
GRADIENTS: tuple[Gradient, ...] = get_args(Gradient)

_MOST_STEPS = 10**6


@dataclass(frozen=True)
class Phantom(CheckedOptions):
    """Phantom gradient: ``steps`` damped steps ``z <- (1 - damping) z + damping f(z)`` from the
    end of a solve, which are differentiated and whose end is returned.

    For any solver. It tends to the implicit gradient as ``steps`` grows, and is biased by about
    ``rho^steps``, with rho the spectral radius of ``(1 - damping) I + damping J``.

    Args:
        steps: tracked applications of the map, 1 or more; torchdeq's ``grad``.
        damping: in (0, 1]; torchdeq's ``tau``.

    Source: Geng et al., "On Training Implicit Models", 2021, arXiv 2111.05177.
    """

    steps: int = 5
    damping: float = 0.5

    name: ClassVar[str] = "phantom"

    def __post_init__(self) -> None:
        steps = check_integer(type(self).__name__, "steps", self.steps, 1, _MOST_STEPS)
        object.__setattr__(self, "steps", steps)
        check_range(type(self).__name__, "damping", self.damping, 1e-12, 1.0, "in (0, 1]")


@dataclass(frozen=True)
class Truncated(CheckedOptions):
    """Truncated backpropagation: the gradient of the last ``steps`` steps of plain iteration.

    Each sample's state is detached so many updates before that sample's own end; a sample that
    made fewer is differentiated from its start. For ``solver="picard"``, with its damping, which is
    what "auto" means here.

    Args:
        steps: 1 or more.
    """

    steps: int = 5

    name: ClassVar[str] = "truncated"

    def __post_init__(self) -> None:
        steps = check_integer(type(self).__name__, "steps", self.steps, 1, _MOST_STEPS)
        object.__setattr__(self, "steps", steps)


@dataclass(frozen=True)
class Unrolled(CheckedOptions):
    """The gradient of every step of plain iteration; memory grows with their number.

    For ``solver="picard"``, with its damping and ``fixed_iterations``, which is what "auto" means
    here.

    Args:
        checkpoint: keep the state of each step alone and evaluate the map again in the backward
            pass, by ``torch.utils.checkpoint`` without reentrance.
    """

    checkpoint: bool = False

    name: ClassVar[str] = "unrolled"

    def __post_init__(self) -> None:
        if not isinstance(self.checkpoint, bool):
            raise ValueError(
                f"Unrolled(checkpoint={self.checkpoint!r}): checkpoint must be True or False."
            )


@dataclass(frozen=True)
class Reversible(CheckedOptions):
    """The exact gradient of a coupled iteration that can be run backwards, in memory that does not
    depend on the number of steps.

    From ``y = z = z0`` an update is ``y <- (1 - beta) y + beta f(z)``, then ``z <- (1 - beta) z +
    beta f(y)``: two evaluations. The backward pass inverts the updates, so it makes as many
    evaluations, and vector-Jacobian products. A solve of its own: ``solver`` stays at "auto".

    Args:
        beta: in (0, 1). Rounding, of float64, grows by up to ``(1 + beta |J|) / (1 - beta)`` in
            each half of an inverted update, so that the gradient of 10 updates is exact and that of
            50 may not be: the residual of the adjoint solution estimates its relative error.

    Source: "Reversible Deep Equilibrium Models", 2025, arXiv 2509.12917.
    """

    beta: float = 0.5

    name: ClassVar[str] = "reversible"

    def __post_init__(self) -> None:
        check_range(type(self).__name__, "beta", self.beta, 1e-3, 1 - 1e-3, "in [0.001, 0.999]")


#: A gradient as an object.
GradientMethod: TypeAlias = Phantom | Truncated | Unrolled | Reversible
_BY_NAME: dict[str, type[Any]] = {m.name: m for m in (Phantom, Truncated, Unrolled, Reversible)}
#: Those that differentiate the steps of plain iteration.
_OF_STEPS = (Truncated, Unrolled)


def named_gradient(given: Any) -> Any:
    """ "implicit" or "one_step" as they are, another name as an object, an object as it is.

    Raises:
        TypeError, ValueError: for anything else.
    """
    if isinstance(given, tuple(_BY_NAME.values())):
        return given
    if not isinstance(given, str):
        raise TypeError(
            f"gradient must be a name ({', '.join(map(repr, GRADIENTS))}) or an object such as "
            f"Phantom(steps=5), not {given!r}."
        )
    check_choice(given, GRADIENTS, "gradient")
    return _BY_NAME[given]() if given in _BY_NAME else given


def check_together(
    gradient: Any, solver: Any, precision: str, backend: str, compact: Any, limit: float | None
) -> tuple[Any, str]:
    """The solver and the precision that a gradient implies; raises ValueError where it is not
    defined for what was asked for."""
    if limit is not None and gradient != "implicit":
        name = gradient if isinstance(gradient, str) else gradient.name
        raise ValueError(
            'adjoint_limit limits the adjoint of gradient="implicit"; '
            f"gradient={name!r} solves none: leave adjoint_limit out."
        )
    if isinstance(gradient, _OF_STEPS):
        solver = Picard() if solver == "auto" else solver
        if not _is_plain(solver):
            instead = (
                f"Phantom(steps={gradient.steps}, damping=1.0) takes so many plain steps from the "
                "end of any solve"
                if isinstance(gradient, Truncated)
                else 'Phantom(steps=...) and "implicit" go with any solver'
            )
            raise ValueError(
                f"gradient={gradient!r} differentiates the steps of plain iteration: pass "
                f'solver="picard" (or Picard(damping=...)) or leave it at "auto", not {solver!r}. '
                f"{instead}."
            )
        if precision == "mixed":
            raise ValueError(
                f"gradient={gradient!r} repeats the steps in full precision; leave precision at "
                '"auto" or pass "float32".'
            )
        return solver, "float32"
    if isinstance(gradient, Reversible):
        wrong = [
            f"{name}={value!r}"
            for name, value, allowed in (
                ("solver", solver, ("auto",)),
                ("precision", precision, ("auto", "float32")),
                ("backend", backend, ("auto", "reference")),
                ("compact", compact, (False,)),
            )
            if value not in allowed
        ]
        if wrong:
            raise ValueError(
                f"gradient={gradient!r} is an iteration of its own, in plain PyTorch and for all "
                f"samples: leave {', '.join(wrong)} at the default."
            )
    return solver, precision


def _is_plain(solver: Solver | Any) -> bool:
    return type(solver) is Picard


__all__ = [
    "GRADIENTS",
    "Gradient",
    "GradientMethod",
    "Phantom",
    "Reversible",
    "Truncated",
    "Unrolled",
]
