"""Whether a start that was passed suits the input: what to say where a solve from it fails."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from ..ops.solve_common import expanded_zeros
from ..samples import BatchDim, batch_shape, resolve
from ..solvers.picard import CERTIFIED
from .state_tree import tensors_of

#: What a cell, or the solve, raises for a start that does not fit; their subclasses mean other
#: things (a failed solve, coupled samples, no memory).
EXPLAINED = (RuntimeError, TypeError, ValueError, IndexError)

_ABOUT_SHAPES = re.compile(r"shape|size|dimension|channels", re.IGNORECASE)


def start_for(cell: Any, x: Any) -> Any:
    """Where a solve begins unless z0 is given: the cell's ``initial_state(x)``, or zeros like x.

    Raises:
        TypeError: an x that is no tensor, without ``initial_state``.
    """
    if hasattr(cell, "initial_state"):
        return cell.initial_state(x)
    if isinstance(x, Tensor):
        plain = type(x) is Tensor and x.is_contiguous() and not torch.compiler.is_compiling()
        return expanded_zeros(x.detach()) if plain else torch.zeros_like(x)
    raise TypeError(
        f"no start for the solve: x is a {type(x).__name__}, so pass z0=..., or define "
        "initial_state(x) on the cell."
    )


def check_start(solver: Any) -> None:
    """Raises ValueError where ``solver`` begins at zero and nowhere else."""
    if getattr(solver, "fixed_iterations", 0) == CERTIFIED:
        raise ValueError(
            'fixed_iterations="certified" counts from a start at zero; leave out z0, or give '
            "the number of iterations."
        )


def refuse_batch_dim(batch_dim: BatchDim) -> None:
    """Raises ValueError for a dimension that is not that of an affine cell's samples."""
    raise ValueError(
        f"batch_dim={batch_dim}, but the state of an AffineCell is (B, features), or "
        "(..., features): each vector is a sample, so leave batch_dim at 0. A cell whose vectors "
        "depend on each other is a module of your own."
    )


def explain_start(
    cell: Any, z0: Any, x: Any, batch_dim: BatchDim, error: Exception | None = None
) -> None:
    """Raises ValueError where z0 has other shapes than the cell's own start for x, or where there
    is no such start, ``error`` was raised, and z0 and x do not go together.

    Without z0 it raises an error like ``error`` that names the start, where that was zeros like x
    and shapes did not fit.
    """
    if z0 is None:
        if error is not None and _is_about_default(cell, x, error):
            raise type(error)(
                f"{error}. The start was zeros like x, {_described(x)}: if the state has another "
                "shape, pass z0=... or define initial_state(x) on the cell."
            ) from error
        return
    wrong = None
    if hasattr(cell, "initial_state"):
        with torch.no_grad():
            wrong = other_shapes(z0, cell.initial_state(x))
    if wrong is None and error is not None:
        wrong = unlike_input(z0, x, batch_dim, error)
    if wrong is not None:
        raise ValueError(wrong) from error


def _is_about_default(cell: Any, x: Any, error: Exception) -> bool:
    if hasattr(cell, "initial_state") or not isinstance(x, Tensor):
        return False
    said = str(error)
    return "initial_state(x)" not in said and bool(_ABOUT_SHAPES.search(said))


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
    parts = tensors_of(z0)
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


def _shapes(state: Any) -> list[Any]:
    return [getattr(p, "shape", None) for p in tensors_of(state)]


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

    parts = [one(p) for p in tensors_of(state)]
    return parts[0] if isinstance(state, Tensor) else f"({'; '.join(parts)})"
