"""Keyword arguments of a diagnostic: its own options, and what goes to the cell."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from ..cells import AffineCell
from ..errors import check_options
from ..layer import DEQLayer
from ..solve.arguments import parameters_of

_Function = TypeVar("_Function", bound=Callable[..., Any])


def takes_keywords(owner: str) -> Callable[[_Function], _Function]:
    """Decorates ``function(cell, x, z, *, options, **keywords)``: a keyword that is neither an
    option nor an argument of the cell raises TypeError with the valid options."""

    def decorate(function: _Function) -> _Function:
        parameters = inspect.signature(function).parameters.values()
        valid = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        known = valid | {p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}

        @functools.wraps(function)
        def checked(*args: Any, **options: Any) -> Any:
            others = {name: value for name, value in options.items() if name not in known}
            if others:
                cell = args[0] if args else options.get("cell")
                check_options(_not_taken(cell, others), valid, owner)
            return function(*args, **options)

        return checked  # type: ignore[return-value]

    return decorate


def _not_taken(cell: Any, keywords: dict[str, Any]) -> dict[str, Any]:
    """Those that the cell has no parameter for."""
    cell = cell.cell if isinstance(cell, DEQLayer) else cell
    if isinstance(cell, AffineCell) and type(cell).forward is AffineCell.forward:
        return keywords
    parameters = parameters_of(cell)
    if not parameters or any(p.kind is p.VAR_KEYWORD for p in parameters):
        return {}  # the cell will say what it does not take
    # The first two are the state and x.
    names = {p.name for i, p in enumerate(parameters) if i > 1 or p.kind is p.KEYWORD_ONLY}
    return {name: value for name, value in keywords.items() if name not in names}
