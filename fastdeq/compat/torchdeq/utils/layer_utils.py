"""A function of a state, or of several parts, as a map of what a solver iterates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ....solve.packing import Packing


@dataclass(eq=False)
class StateMap:
    """``z -> func(z)``; with several parts the solver's z is rows ``(B, n)`` of all of them, and
    ``func(*parts)`` is called.

    Args:
        func: takes a tensor and returns one like it, or takes each part and returns as many.
        z_init: the tensor, or a tuple or list of parts that begin with the same batch dimension.
    """

    func: Callable[..., Any]
    z_init: Any = field(repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.z_init, (Tensor, tuple, list)):
            raise TypeError(
                "the start must be a tensor, or a tuple or list of them, not "
                f"{type(self.z_init).__name__}."
            )
        #: Whether the samples of a batch are known to depend on each other.
        self.coupled = False
        #: How parts lie in rows; None where the state is one tensor.
        self.packing: Packing | None = None
        if not isinstance(self.z_init, Tensor):
            self.packing = Packing(tuple(self.z_init))
        self.z_init = None  # a start may hold a graph

    def of_state(self, state: Any) -> Any:
        """``func`` of a tensor, or of a tuple of parts."""
        return self.func(state) if self.packing is None else tuple(self.func(*state))

    def list2vec(self, z: Any) -> Any:
        """What a solver iterates, of a tensor or of parts."""
        return z if self.packing is None else self.packing.pack(tuple(z), "the function")

    def state_of(self, z: Tensor) -> Any:
        """The tensor, or a tuple of parts, of what a solver iterates."""
        return z if self.packing is None else self.packing.unpack(z)

    def vec2list(self, z: Tensor) -> Any:
        """The tensor, or the list of parts, of what a solver iterates."""
        state = self.state_of(z)
        return state if self.packing is None else list(state)

    def detach(self, z: Tensor) -> Tensor:
        """z without its graph."""
        return z.detach()

    def __call__(self, z: Tensor, tau: float = 1.0) -> Tensor:
        value: Tensor = self.list2vec(self.of_state(self.state_of(z)))
        return value if tau == 1.0 else z + tau * (value - z)

    def norm_diff(self, z_new: Tensor, z_old: Tensor, show_list: bool = False) -> Any:
        """The 1-norm of a difference; with ``show_list`` that of each part."""
        if not show_list or self.packing is None:
            return float((z_new - z_old).norm(p=1))
        pairs = zip(self.vec2list(z_new), self.vec2list(z_old), strict=True)
        return [float((new - old).norm(p=1)) for new, old in pairs]


def deq_decorator(
    func: Callable[..., Any], z_init: Any, no_stat: bool = True
) -> tuple[StateMap, Tensor]:
    """The map that a solver iterates, and its start; ``no_stat`` is not needed."""
    whole = StateMap(func, z_init)
    return whole, whole.list2vec(z_init)
