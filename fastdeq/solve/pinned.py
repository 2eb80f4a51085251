"""A module with the tensors that ``torch.func.functional_call`` put in it.

They are there during the call alone. The gradient of a solve evaluates the cell later, and has to
see them again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

#: A module's dictionary of parameters or buffers, a name in it, and the tensor there.
Place = tuple[dict[str, Any], str, Tensor]


@dataclass(frozen=True, eq=False)
class Pinned:
    """``cell``, called with the tensors of ``places`` in their places."""

    cell: Callable[..., Any]
    places: tuple[Place, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._as_then():
            return self.cell(*args, **kwargs)

    @property
    def training(self) -> bool:
        """The cell's mode."""
        return bool(self.cell.training)  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def _as_then(self) -> Iterator[None]:
        before = [owner[name] for owner, name, _ in self.places]
        for owner, name, t in self.places:
            owner[name] = t
        try:
            yield
        finally:
            for (owner, name, _), t in zip(self.places, before, strict=True):
                owner[name] = t


def pinned(cell: Any) -> Any:
    """``cell``, or a :class:`Pinned` one where it is a module that has other tensors in the places
    of parameters; without grad mode nothing evaluates it later."""
    replaced = torch.is_grad_enabled() and isinstance(cell, nn.Module) and _is_replaced(cell)
    if not replaced:
        return cell
    places = [
        (owner, name, t)
        for module in cell.modules()
        for owner in (module._parameters, module._buffers)
        for name, t in owner.items()
        if t is not None
    ]
    return Pinned(cell, tuple(places))


def _is_replaced(module: nn.Module) -> bool:
    own = module.__dict__  # each call asks: without the lookups of nn.Module
    for t in own["_parameters"].values():
        if t is not None and type(t) is not nn.Parameter and not isinstance(t, nn.Parameter):
            return True
    parts = own["_modules"].values()
    return bool(parts) and any(part is not None and _is_replaced(part) for part in parts)
