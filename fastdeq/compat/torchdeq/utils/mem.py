"""Evaluations whose activations are made again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint


def mem_gc(func: Callable[..., Any], in_args: tuple[Any, ...] | None = None) -> Any:
    """``func(*in_args)``, keeping only the arguments for the backward pass, which evaluates again
    (``torch.utils.checkpoint`` without reentrance, so that it can be differentiated twice).

    Args:
        func: a module or function.
        in_args: its arguments; None: none.
    """
    return checkpoint(func, *(in_args or ()), use_reentrant=False)
