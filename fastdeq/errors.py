"""Errors at the public edge: misspelt names and options, and backends that cannot be had."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


class BackendError(RuntimeError):
    """An explicitly requested backend cannot run here; the message says why and what can."""


def _hint(given: object, valid: list[str]) -> str:
    near = difflib.get_close_matches(str(given), valid, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def check_choice(given: object, valid: Iterable[str], what: str) -> None:
    """Raises ValueError unless ``given`` is one of ``valid``."""
    names = list(valid)
    if given not in names:
        raise ValueError(
            f"unknown {what} {given!r}; valid choices: {', '.join(map(repr, names))}."
            + _hint(given, names)
        )


def check_options(unknown: Mapping[str, object], valid: Iterable[str], owner: str) -> None:
    """Raises TypeError for keyword arguments that ``owner`` does not know."""
    if unknown:
        names = sorted(valid)
        first = next(iter(unknown))
        raise TypeError(
            f"{owner} got unknown option{'s' * (len(unknown) > 1)} "
            f"{', '.join(map(repr, unknown))}; valid options: {', '.join(names)}."
            + _hint(first, names)
        )


def lists_options(owner: str) -> Callable[[_Function], _Function]:
    """Decorates a function with keyword-only options: an unknown one raises as ``check_options``
    does. Type checkers, ``help`` and ``inspect.signature`` see the function itself."""

    def decorate(function: _Function) -> _Function:
        parameters = inspect.signature(function).parameters.values()
        valid = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        positional = {p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
        known = valid | positional

        @functools.wraps(function)
        def checked(*args: Any, **options: Any) -> Any:
            if not options.keys() <= known:
                unknown = {name: v for name, v in options.items() if name not in known}
                check_options(unknown, valid, owner)
            return function(*args, **options)

        return checked  # type: ignore[return-value]

    return decorate
