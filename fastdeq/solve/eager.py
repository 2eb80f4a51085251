"""Evaluations that leave torch.compile alone, and functions that stay outside of its graphs."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])

_lock = threading.Lock()
_inside = 0  # how many evaluations run eagerly now, in all threads
_stance: Any = None  # what ends that


class Eagerly:
    """Within it, compiled functions run as they were written, and nothing is compiled.

    Many vector-Jacobian products walk through the differentiated evaluation of a cell, which a
    compiled backward pass refuses, and a graph compiled for training would serve that evaluation
    alone. What was compiled stays as it is, for the evaluations without a gradient.

    The compiler's stance is one for all threads. The first to come sets it, the last to leave
    restores what was there; meanwhile compiled functions of other threads run uncompiled.
    """

    _entered = False

    def __enter__(self) -> None:
        global _inside, _stance
        # Who has not imported the compiler has compiled nothing, and importing it takes a second.
        if "torch._dynamo" not in sys.modules or torch.compiler.is_compiling():
            return
        with _lock:
            if _inside == 0:
                try:
                    _stance = torch.compiler.set_stance("force_eager")
                except RuntimeError:  # within a compiled region, which settles what is compiled
                    return
            _inside += 1
        self._entered = True

    def __exit__(self, *error: object) -> None:
        global _inside, _stance
        if not self._entered:
            return
        with _lock:
            _inside -= 1
            if _inside == 0:
                _stance.__exit__(None, None, None)
                _stance = None


def outside_graphs(function: Function) -> Function:
    """``function``, which torch.compile calls and does not trace: its graph ends there."""
    # As torch.compiler.disable, but the compiler is imported at the first call.
    untraced = torch._disable_dynamo(function)  # type: ignore[attr-defined]

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return untraced(*args, **kwargs)
        return function(*args, **kwargs)

    return run  # type: ignore[return-value]
