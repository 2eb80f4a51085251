"""What a solver is: a small immutable object with ``init`` and ``step``.

A solver sees rows ``(B, n)`` and never a device, a cell or autograd. ``loop.solve`` evaluates the
map at the points that the solver asks for, keeps the best verified iterate of every sample, and
stops samples one by one.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ..activations import Activation
from ..errors import check_options


@dataclass(frozen=True)
class Structure:
    """What is known of the map before it is evaluated.

    ``contraction`` bounds its Lipschitz constant in the 2-norm (None: unknown); ``tags`` are the
    tags of the weight ("orthogonal", "symmetric") and of the activation ("monotone"); ``affine``
    says that it is ``phi(W z + c)``, solved as one; ``bitwise_symmetric`` that W is symmetric to
    the last bit at all times, so that half of it will do.
    """

    contraction: float | None = None
    tags: frozenset[str] = frozenset()
    affine: bool = False
    bitwise_symmetric: bool = False


class AffineMap:
    """``phi(W z + c)``, or ``D (g + q W)`` of a symmetric W, for solvers that look inside.

    ``offset`` is c or g ``(B, n)``, ``pre`` the argument of the outer map at the last evaluation,
    and ``product`` what W added to it. The forward map has an ``activation``, the adjoint its
    ``slope`` D ``(B, n)``. It stands for an evaluation at zero until it is called.
    """

    def __init__(
        self,
        offset: Tensor,
        multiply: Callable[[Tensor], Tensor],
        *,
        activation: Activation | None = None,
        slope: Tensor | None = None,
    ):
        self.offset = self.pre = offset
        self.product = torch.zeros_like(offset)
        self.multiply = multiply
        self.activation = activation
        self.slope = slope

    def __call__(self, rows: Tensor) -> Tensor:
        self.product = self.multiply(rows)
        self.pre = self.offset + self.product
        return self.apply(self.pre)

    def apply(self, pre: Tensor) -> Tensor:
        """The outer map: phi, or multiplication by D."""
        if self.activation is not None:
            return self.activation.function(pre)
        assert self.slope is not None
        return self.slope * pre


class Problem(NamedTuple):
    """What a solver is told at the start: the relative and the absolute tolerance, the number of
    updates it will be asked for, the implementations of ``ops.anderson_mix`` and ``ops.gmres_step``
    to use, the map where it is an affine cell's, and what another solve handed on to begin with."""

    tol: float
    atol: float
    max_iter: int
    anderson_mix: Callable[..., Any]
    gmres_step: Callable[..., Any]
    affine: AffineMap | None = None
    begin: Any = None


class Step(NamedTuple):
    """A solver's answer to one evaluation.

    ``point`` is where to evaluate next, ``(B, n)``. ``iterate`` says for which samples that point
    is an iterate, whose residual counts, rather than a direction, ``(B,)`` bool, None for all.
    ``failed`` marks samples that the solver cannot continue, and ``stalled`` those that it sees no
    way to improve, ``(B,)`` bool, None for none.
    """

    point: Tensor
    iterate: Tensor | None
    failed: Tensor
    stalled: Tensor | None = None


class Solver(Protocol):
    """``name`` registers it; ``linear`` restricts it to affine maps (adjoints); ``needs`` are the
    tags without which it cannot be used; ``patience`` is how many iterates in a row may bring no
    progress; ``rejects`` names its counters. A solver that reads from the device as it
    goes has ``waits = True``."""

    name: ClassVar[str]
    linear: ClassVar[bool]
    needs: ClassVar[frozenset[str]]
    patience: ClassVar[int]
    rejects: ClassVar[tuple[str, ...]]

    def init(self, point: Tensor, problem: Problem) -> Any:
        """Fresh mutable state for a batch shaped like ``point``."""
        ...

    def step(self, state: Any, point: Tensor, value: Tensor, norm: Tensor, running: Tensor) -> Step:
        """Next point from ``value = f(point)`` and ``norm = |value - point|`` ``(B,)``.

        Samples outside ``running`` ``(B,)`` bool are frozen: what is returned for them is ignored,
        and counters must not count them.
        """
        ...

    def counters(self, state: Any) -> tuple[Tensor, ...]:
        """The counters named in ``rejects``, ``(B,)`` int32 each."""
        ...


class CheckedOptions:
    """Base of solver dataclasses: a misspelt option raises and lists the valid ones."""

    def __new__(cls, *_: object, **options: object) -> Any:
        builder = next(base for base in cls.__mro__ if "__init__" in vars(base))
        if "__dataclass_fields__" in vars(builder):  # not where a subclass has its own __init__
            valid = [field.name for field in dataclasses.fields(builder)]
            unknown = {name: value for name, value in options.items() if name not in valid}
            check_options(unknown, valid, cls.__name__)
        return super().__new__(cls)


def where_rows(rows: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a ``(B, n)`` for the samples ``rows`` ``(B,)`` bool, b for the others."""
    return torch.where(rows.unsqueeze(1), a, b)


def check_integer(owner: str, name: str, value: Any, low: int, high: int) -> int:
    """``value`` as an int; raises ValueError unless it is one in ``[low, high]``."""
    number = isinstance(value, numbers.Real)
    if not number or not low <= value <= high or value != int(value):
        raise ValueError(
            f"{owner}({name}={value!r}): {name} must be an integer from {low} to {high}."
        )
    return int(value)


def check_range(owner: str, name: str, value: float, low: float, high: float, text: str) -> None:
    """Raises ValueError unless ``low <= value <= high`` (NaN fails)."""
    number = isinstance(value, numbers.Real)
    if not number or not low <= value <= high:
        raise ValueError(f"{owner}({name}={value!r}): {name} must be {text}.")
