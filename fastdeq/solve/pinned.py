"""A module with the tensors that it has now.

``torch.func.functional_call`` puts others in their places, during its call alone. The gradient of a
solve evaluates the cell later, and has to see those again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

#: A module's dictionary of parameters or buffers, a name in it, and the tensor there.
Place = tuple[dict[str, Any], str, Tensor]


class Pinned:
    """``cell``, called with the tensors that it had when this was made.

    ``made`` are those of them that have a ``grad_fn``.
    """

    def __init__(self, cell: Callable[..., Any]):
        self.cell = cell
        self._places: list[Place] = []
        _collect(cell, self._places, set())
        self.made = [t for _, _, t in self._places if t.grad_fn is not None]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._as_then():
            return self.cell(*args, **kwargs)

    @property
    def training(self) -> bool:
        """The cell's mode."""
        return bool(self.cell.training)  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def _as_then(self) -> Iterator[None]:
        others = [p for p in self._places if p[0].get(p[1]) is not p[2]]
        before = [owner.get(name) for owner, name, _ in others]
        for owner, name, t in others:
            owner[name] = t
        try:
            yield
        finally:
            for (owner, name, _), now in zip(others, before, strict=True):
                owner[name] = now


def pinned(cell: Any) -> Any:
    """``cell``, as a :class:`Pinned` one where it is a module in Python."""
    if isinstance(cell, nn.Module) and not isinstance(cell, torch.jit.ScriptModule):
        return Pinned(cell)
    return cell


def _collect(module: Any, places: list[Place], seen: set[int]) -> None:
    own = module.__dict__  # each call asks: without the lookups of nn.Module
    seen.add(id(module))
    for kind in ("_parameters", "_buffers"):
        owner = own.get(kind)
        if owner:
            places += [(owner, name, t) for name, t in owner.items() if t is not None]
    for part in (own.get("_modules") or {}).values():
        if part is not None and id(part) not in seen:
            _collect(part, places, seen)
