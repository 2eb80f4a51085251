"""What a layer is called with, as the arguments of its cell."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ..cells import AffineCell
from .pinned import Pinned

#: Stands for an x that was not given by position; for ``inspect.signature`` no default at all.
NOT_GIVEN: Any = inspect.Parameter.empty

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)


def check_cell(cell: Any, has_aux: bool) -> None:
    """Raises TypeError for what is no cell, and ValueError where ``has_aux`` is asked of an
    :class:`AffineCell`, which returns its state alone."""
    if not callable(cell) or isinstance(cell, type):
        raise TypeError(f"cell must be a module or function cell(z, x), not {cell!r}.")
    if has_aux is True and isinstance(cell, AffineCell) and cell.is_plain():
        raise ValueError(
            "has_aux=True, but an AffineCell returns its state alone: leave has_aux out, or wrap "
            "the cell in a module of your own that returns (state, aux)."
        )


def input_of(cell: Any, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any], str | None]:
    """x among ``keywords``, the others, and the name by which the cell takes x; None where that is
    by position.

    x has the name of the cell's parameter after the state, or is called x.

    Raises:
        TypeError: there is no x.
    """
    parameters = [] if isinstance(cell, AffineCell) else parameters_of(cell)[1:]
    kinds = {p.name: p.kind for p in parameters}
    # A cell without a second positional parameter takes x by name.
    second = next((p.name for p in parameters if p.kind in _POSITIONAL), None)
    named = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for name in (second, "x", *(named if second is None else ())):
        if name is not None and name in keywords:
            rest = {other: value for other, value in keywords.items() if other != name}
            last = kinds.get(name, parameters[-1].kind if parameters else None)
            by_name = second is None and last in _BY_NAME
            return keywords[name], rest, name if by_name else None
    raise TypeError(
        "the layer needs its input: layer(x, ...), or by name, "
        f"layer({second or next(iter(named), 'x')}=...)."
    )


def refuse_keywords(cell: Any, keywords: Mapping[str, Any]) -> None:
    """Raises TypeError where there are keyword arguments for an :class:`AffineCell`."""
    if keywords and isinstance(cell, AffineCell) and type(cell).forward is AffineCell.forward:
        raise TypeError(
            f"an AffineCell takes no keyword arguments, got {', '.join(map(repr, keywords))}: it "
            "is called as layer(x), or layer(x, z0=start). A cell with further arguments is a "
            "module of your own, cell(z, x, ...)."
        )


def in_order(cell: Any, names: Mapping[str, Any]) -> list[str]:
    """Names of keyword arguments in the order of the cell's parameters; of those that it has no
    parameters for in the order of the call, behind the others."""
    places = {p.name: i for i, p in enumerate(parameters_of(cell))}
    return sorted(names, key=lambda name: places.get(name, len(places)))


def parameters_of(cell: Any) -> list[inspect.Parameter]:
    """Those of the cell, the state first; none where they are not known."""
    cell = cell.cell if isinstance(cell, Pinned) else cell
    try:
        return list(inspect.signature(getattr(cell, "forward", cell)).parameters.values())
    except (TypeError, ValueError):
        return []
