"""Errors and warnings at the public edge: misspelt names and options, calls that do not fit,
backends that cannot be had, and the line of the user's code that a warning is about."""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


class BackendError(RuntimeError):
    """An explicitly requested backend cannot run here; the message says why and what can."""


class CoupledSamplesError(ValueError):
    """Samples of a state that is solved sample by sample depend on each other; the message says
    which, and what to pass as ``batch_dim``."""


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


def explain_call(
    cell: Callable[..., Any],
    context: tuple[Any, ...],
    keywords: Mapping[str, Any],
    error: TypeError,
) -> None:
    """Raises TypeError from ``error`` where ``cell(z, x, *context, **keywords)`` does not fit the
    signature of the cell, a module or a function; returns where it does, or where there is no
    signature."""
    try:
        signature = inspect.signature(getattr(cell, "forward", cell))
    except (TypeError, ValueError):
        return
    if _fits(signature, 2 + len(context), keywords):
        return
    name = getattr(cell, "__name__", type(cell).__name__)
    given = [*(f"context[{i}]" for i in range(len(context))), *(f"{key}=..." for key in keywords)]
    called = ", ".join(["z", "x", *given])
    message = f"the layer calls {name}({called}), which does not fit {name}{signature}."
    if (context or keywords) and _fits(signature, 2, {}):
        message += " What follows x goes to the cell; a start is given by keyword: layer(x, z0=...)"
    raise TypeError(message) from error


def _fits(signature: inspect.Signature, count: int, keywords: Mapping[str, Any]) -> bool:
    try:
        signature.bind(*[None] * count, **keywords)
    except TypeError:
        return False
    return True


def _is_library(frame: FrameType) -> bool:
    module = frame.f_globals.get("__name__") or ""
    # A traced torch.fx module runs code that torch has written.
    generated = frame.f_code.co_filename.startswith("<eval_with_key>")
    return generated or module.partition(".")[0] in ("fastdeq", "torch")


def _caller(frame: FrameType | None) -> FrameType | None:
    """The innermost frame, from ``frame`` outwards, that neither fastdeq nor torch runs."""
    while frame is not None and _is_library(frame):
        frame = frame.f_back
    return frame


def _starts_of_backward() -> list[FrameType]:
    """Frames, in any thread, in which autograd's engine was entered."""
    found = []
    for frame in sys._current_frames().values():
        inner: FrameType | None = frame
        while inner is not None and inner.f_code.co_name != "_engine_run_backward":
            inner = inner.f_back
        if inner is not None:
            found.append(inner)
    return found


def warn_caller(message: str, category: type[Warning]) -> None:
    """Warns at the innermost line of the stack that is neither fastdeq's nor torch's.

    Autograd runs the nodes of a CUDA device in a thread of its own, whose stack has no such line.
    There it is the line that started the backward pass, if only one is running.
    """
    here = sys._getframe(1)
    frame = _caller(here)
    if frame is None:
        starts = _starts_of_backward()
        frame = (_caller(starts[0]) if len(starts) == 1 else None) or here
    variables = frame.f_globals
    warnings.warn_explicit(
        message,
        category,
        frame.f_code.co_filename,
        frame.f_lineno,
        variables.get("__name__"),
        variables.setdefault("__warningregistry__", {}),
    )
