"""The structure of a state: a tensor, or any pytree of tensors (``torch.utils._pytree``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

_FLAT = (tuple, list)


class StateTree:
    """Takes states of the structure of ``example`` apart, and puts them together.

    A tensor, and a tuple or list of nothing but tensors, take no more than ``tuple()``. What a map
    returns for a tuple may be a list of as many, and the other way round.

    Raises:
        TypeError: an example with something else than tensors, or without any.
    """

    def __init__(self, example: Any):
        self._spec: TreeSpec | None = None
        self._kind: type | None = None  # of a flat sequence
        #: Whether the state is one tensor and no structure.
        self.is_tensor = isinstance(example, Tensor)
        self._count = 1
        if self.is_tensor:
            return
        parts = tensors_of(example)
        self._count = len(parts)
        if not parts or not all(isinstance(p, Tensor) for p in parts):
            raise TypeError(
                "the state must be a tensor or a structure of tensors (tuples, lists, dicts, named "
                f"tuples), not {described(example)}."
            )
        if _is_flat(example):
            self._kind = type(example)
        else:
            self._spec = tree_flatten(example)[1]

    def parts_of(self, state: Any, what: str) -> tuple[Tensor, ...]:
        """The tensors of a state that ``what`` returned.

        Raises:
            TypeError, ValueError: one of another structure, naming both.
        """
        parts: Any = None
        if isinstance(state, Tensor):
            parts = (state,) if self.is_tensor else None
        elif self._kind is not None:
            parts = tuple(state) if type(state) in _FLAT else None
        elif self._spec is not None:
            try:
                parts = tuple(self._spec.flatten_up_to(state))
            except ValueError:
                parts = None
        if parts is not None and all(isinstance(p, Tensor) for p in parts):
            return parts  # type: ignore[no-any-return]
        raise TypeError(
            f"{what} returned {described(state)} for a state {self.described()}; a state of "
            "tensors is needed, of the structure of the one that it was called with."
        )

    def of(self, parts: tuple[Any, ...]) -> Any:
        """The state that has these parts."""
        if self._spec is not None:
            return tree_unflatten(parts, self._spec)
        return parts[0] if self._kind is None else parts if self._kind is tuple else list(parts)

    def described(self) -> str:
        """The structure in words."""
        return repr(self.of((_Named("Tensor"),) * self._count))


def described(state: Any) -> str:
    """A state in words: tensors and other leaves by their types, in their structure."""

    def one(value: Any) -> Any:
        return _Named("Tensor" if isinstance(value, Tensor) else type(value).__name__)

    text = repr(tree_map(one, state))
    return text if len(text) <= 200 else text[:197] + "..."


def tensors_of(state: Any) -> tuple[Any, ...]:
    """The leaves of a state."""
    if isinstance(state, Tensor):
        return (state,)
    return tuple(state) if _is_flat(state) else tuple(tree_flatten(state)[0])


def _is_flat(state: Any) -> bool:
    return type(state) in _FLAT and all(isinstance(p, Tensor) for p in state)


class _Named(str):
    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)
