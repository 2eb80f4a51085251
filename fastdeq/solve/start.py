"""Whether a start that was passed suits the input: what to say where a solve from it fails."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..samples import BatchDim, batch_shape, resolve

#: What a cell, or the solve, raises for a start that does not fit; their subclasses mean other
#: things (a failed solve, coupled samples, no memory).
EXPLAINED = (RuntimeError, TypeError, ValueError, IndexError)


def other_shapes(z0: Any, default: Any) -> str | None:
    """What is wrong with z0 beside ``default``, the cell's own start for the same input: the
    number of its parts or their shapes; None where they are the same."""
    if _shapes(z0) == _shapes(default):
        return None
    return (
        f"z0 is {_described(z0)}, and for this x the cell starts from {_described(default)}. Pass "
        "z0 with these shapes (of a start for another batch, the samples of this one), or leave "
        "it out."
    )


def unlike_input(z0: Any, x: Any, batch_dim: BatchDim, error: Exception) -> str | None:
    """How z0 differs from the tensor x in what a cell often needs to be the same: the number of
    samples, the dtype, the device; None where it does not. ``error`` was raised with them."""
    parts = _parts(z0)
    if not isinstance(x, Tensor) or not all(isinstance(p, Tensor) for p in parts):
        return None
    advice = []
    samples = _samples(x, batch_dim)
    if samples is not None and any(_samples(p, batch_dim) != samples for p in parts):
        advice.append(f"for a batch {samples} like that of x (batch_dim={batch_dim})")
    if x.is_floating_point() and any(p.dtype != x.dtype for p in parts):
        advice.append(f"in {x.dtype}")
    if any(p.device != x.device for p in parts):
        advice.append(f"on {x.device}")
    if not advice:
        return None
    return (
        f"z0 is {_described(z0)}, and x {_described(x)}; the cell could not use them together "
        f"({error}). Pass z0 {', '.join(advice)}, or leave it out."
    )


def _parts(state: Any) -> tuple[Any, ...]:
    return tuple(state) if isinstance(state, (tuple, list)) else (state,)


def _shapes(state: Any) -> list[Any]:
    return [getattr(p, "shape", None) for p in _parts(state)]


def _samples(t: Tensor, batch_dim: BatchDim) -> tuple[int, ...] | None:
    try:
        dims = resolve(batch_dim, [t])
    except ValueError:
        return None
    return batch_shape(t, dims)


def _described(state: Any) -> str:
    def one(part: Any) -> str:
        if not isinstance(part, Tensor):
            return type(part).__name__
        return f"{tuple(part.shape)} {part.dtype} on {part.device}"

    parts = [one(p) for p in _parts(state)]
    return parts[0] if not isinstance(state, (tuple, list)) else f"({'; '.join(parts)})"
