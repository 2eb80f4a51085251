"""Errors and warnings at the public edge: misspelt names and options, missing backends."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class BackendError(RuntimeError):
    """An explicitly requested backend cannot run here; the message says why and what can."""


class ExtensionWarning(UserWarning):
    """The compiled extension is missing, so solves on the CPU are slow; the message says why."""


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
