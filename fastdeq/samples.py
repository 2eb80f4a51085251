"""Which dimensions of a state count its samples, and tensors seen as one row per sample."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

#: The dimension that counts samples; several; None: all of the state is one sample.
BatchDim: TypeAlias = int | tuple[int, ...] | None
#: Whether finished samples are left out; or, for each argument of a cell after the state, the
#: dimension that counts samples, None for what they share.
Compact: TypeAlias = bool | tuple[int | None, ...]


def check_batch_dim(value: object) -> BatchDim:
    """``value`` as an int, a tuple of two ints or more, or None; raises ValueError for others."""
    several = isinstance(value, (tuple, list))
    given = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if value is None:
        return None
    if not given or not all(
        isinstance(d, numbers.Integral) and not isinstance(d, bool) for d in given
    ):
        raise ValueError(
            "batch_dim must be an int such as 0, a tuple of them such as (0, 1), or None for a "
            f"state that is one sample, got {value!r}."
        )
    dims = tuple(int(d) for d in given)
    if len(set(dims)) < len(dims):
        raise ValueError(f"batch_dim={value!r} names a dimension twice.")
    return dims if several and len(dims) > 1 else dims[0]


def check_compact(value: object, batch_dim: BatchDim) -> Compact:
    """``value`` as a bool or a tuple of ints and None; raises ValueError for others, and where
    there is no one batch dimension to leave samples out of."""
    if isinstance(value, (tuple, list)):
        entries = tuple(value)
        if not all(
            d is None or (isinstance(d, numbers.Integral) and not isinstance(d, bool))
            for d in entries
        ):
            raise ValueError(
                "compact must have for each argument of the cell after the state the dimension "
                f"that counts samples, or None for what they share, got {value!r}."
            )
        compact: Compact = tuple(None if d is None else int(d) for d in entries)
    elif isinstance(value, bool):
        compact = value
    else:
        raise ValueError(
            "compact must be True, False, or a tuple with an entry for each argument of the cell "
            f"after the state, such as (0, None), got {value!r}."
        )
    if compact is not False and not isinstance(batch_dim, int):
        raise ValueError(
            f"compact={value!r} leaves out finished samples, which takes one batch dimension; got "
            f"batch_dim={batch_dim!r}."
        )
    return compact


def resolve(batch_dim: BatchDim, parts: Sequence[Tensor]) -> tuple[int, ...]:
    """The batch dimensions of every part of a state, >= 0; () where the state is one sample, as one
    of numbers without dimensions is.

    Raises:
        ValueError: a part without them, or negative ones of parts with different numbers of
            dimensions, which would mean another dimension for each.
    """
    if batch_dim is None:
        return ()
    given = batch_dim if isinstance(batch_dim, tuple) else (batch_dim,)
    counts = [p.dim() for p in parts]
    if batch_dim == 0 and not any(counts):
        return ()
    if min(given) < 0 and len(set(counts)) > 1:
        raise ValueError(
            f"batch_dim={batch_dim} is ambiguous: the parts of the state have {counts} "
            "dimensions. Count from the front."
        )
    for part, count in zip(parts, counts, strict=True):
        if not all(-count <= d < count for d in given):
            scalar = (
                "it needs a leading batch dimension, (B, ...): state.unsqueeze(0) is one sample. "
                if count == 0
                else ""
            )
            raise ValueError(
                f"the state has shape {tuple(part.shape)}, without the dimension of "
                f"batch_dim={batch_dim}; {scalar}batch_dim=None takes all of the state as one "
                "sample."
            )
    dims = tuple(d % counts[0] for d in given)
    if len(set(dims)) < len(dims):
        raise ValueError(
            f"batch_dim={batch_dim} names a dimension twice in a state of {counts[0]} dimensions."
        )
    return dims


def batch_shape(t: Tensor, dims: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of the batch dimensions; () of a t that is one sample."""
    return tuple(t.shape[d] for d in dims)


def as_rows(t: Tensor, dims: tuple[int, ...]) -> Tensor:
    """t as ``(B, n)``, samples in row-major order of ``dims``; a copy where it has to be."""
    front = tuple(range(len(dims)))
    batch = math.prod(batch_shape(t, dims))
    if dims != front:
        t = t.movedim(dims, front)
    return t.reshape(batch, math.prod(t.shape[len(dims) :]))


def from_rows(rows: Tensor, shape: Sequence[int], dims: tuple[int, ...]) -> Tensor:
    """The tensor of ``shape`` that ``as_rows`` makes ``rows`` of; a view where it can be."""
    front = tuple(range(len(dims)))
    if dims == front:
        return rows.reshape(tuple(shape))
    rest = [size for d, size in enumerate(shape) if d not in dims]
    return rows.reshape([*(shape[d] for d in dims), *rest]).movedim(front, dims)


def spread(mask: Tensor, like: Tensor, dims: tuple[int, ...]) -> Tensor:
    """``mask`` ``(B,)``, one entry per sample, in a shape that broadcasts with ``like``."""
    sizes = [size if d in dims else 1 for d, size in enumerate(like.shape)]
    return from_rows(mask.unsqueeze(1), sizes, dims)


def take(t: Tensor, samples: Tensor, dim: int) -> Tensor:
    """The samples ``(b,)`` int64 of t along ``dim``, in t's order of memory."""
    order = memory_order(t) if dim == 0 else None
    if order is None:
        return t.index_select(dim, samples)
    return t.permute(order).index_select(0, samples).movedim(-1, 1)


#: Memory formats by the number of dimensions that they are for.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_order(t: Tensor) -> tuple[int, ...] | None:
    """The dimensions of t in the order of its memory, where that is channels_last; else None."""
    layout = CHANNELS_LAST.get(t.dim())
    if layout is None or t.is_contiguous() or not t.is_contiguous(memory_format=layout):
        return None
    return (0, *range(2, t.dim()), 1)


def refuse_distributed(t: Tensor, what: str) -> None:
    """Raises TypeError where t is a ``DTensor``: each process solves for samples of its own."""
    if type(t) is not Tensor and hasattr(t, "full_tensor"):
        raise TypeError(
            f"{what} of this solve is a DTensor. A process solves for its own samples: pass those, "
            "t.to_local() where the samples are distributed, or all of them, t.full_tensor()."
        )


def plain_tensor(t: Tensor) -> Tensor:
    """t itself, or the same values as a plain tensor where its class adds Python methods to one.

    A class that stores something else than values (fake, nested) is left alone.

    Raises:
        TypeError: a ``DTensor``.
    """
    kind = type(t)
    if kind is Tensor or kind is nn.Parameter:
        return t
    refuse_distributed(t, "a tensor")
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return t
    with torch._C.DisableTorchFunctionSubclass():
        return t.as_subclass(Tensor)
