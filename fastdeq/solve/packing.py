"""States of any shape as rows ``(B, n)``, one per sample."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..samples import (
    CHANNELS_LAST,
    BatchDim,
    as_rows,
    batch_shape,
    from_rows,
    memory_order,
    refuse_distributed,
    resolve,
)
from .state_tree import StateTree, tensors_of

_WIDE = frozenset((torch.float64, torch.complex128))
#: Dtypes whose numbers are those of the rows.
_NOT_CONVERTED = _WIDE | {torch.float32, torch.complex64}


class ArgumentWrittenError(Exception):
    """The map changed its argument in place."""


class Packing:
    """Packs states like an example into rows, and unpacks rows into such states.

    Both without copies where the state is one tensor in the dtype of its rows whose first
    dimensions count samples, unless ``copies`` is set, as it must be for a map that changes its
    argument in place or returns the same memory each time to somebody who keeps it.

    The example is a tensor or a pytree of them, floating point or complex, on one device, whose
    dimensions ``batch_dim`` have the same sizes; B is their product, and 1 where ``batch_dim`` is
    None or the state is of numbers without dimensions. Rows are float64 where a part is, else
    float32; a complex part is there as pairs of real numbers, and 2-norms are the same. A part has
    the memory format of the example: it is contiguous, or in channels_last.

    Raises:
        TypeError, ValueError: an example of another kind, with what it was.
    """

    def __init__(self, example: Any, batch_dim: BatchDim = 0):
        self._tree = StateTree(example)
        parts = tensors_of(example)
        self._pairs = [1 if p.is_floating_point() else 2 for p in parts]
        for p, numbers in zip(parts, self._pairs, strict=True):
            refuse_distributed(p, "the state")
            if numbers == 2 and not p.is_complex():
                raise TypeError(
                    f"the state has dtype {p.dtype}; it must be floating point or complex."
                )
        self.dims = resolve(batch_dim, parts)
        first = batch_shape(parts[0], self.dims), parts[0].device
        if any((batch_shape(p, self.dims), p.device) != first for p in parts[1:]):
            seen = "; ".join(f"{tuple(p.shape)} on {p.device}" for p in parts)
            raise ValueError(
                f"the parts of the state differ in batch size or device: {seen}, where "
                f"batch_dim={batch_dim} counts samples (None: all of the state is one)."
            )
        self.shapes = [p.shape for p in parts]
        self.batch = math.prod(batch_shape(parts[0], self.dims))
        self.ndims = tuple(p.dim() for p in parts)
        self.dtypes = [p.dtype for p in parts]
        rest = [[n for d, n in enumerate(s) if d not in self.dims] for s in self.shapes]
        self.sizes = [math.prod(s) * n for s, n in zip(rest, self._pairs, strict=True)]
        #: Sizes of the parts in a row, where there are several.
        self.parts = self.sizes if len(self.sizes) > 1 else None
        self.device = parts[0].device
        wide = not _WIDE.isdisjoint(self.dtypes)
        self.dtype = torch.float64 if wide else torch.float32
        self.copies = False
        ordered = self.dims in ((), (0,))
        self._orders = [
            memory_order(p) if ordered and numbers == 1 else None
            for p, numbers in zip(parts, self._pairs, strict=True)
        ]
        self._formats = [
            torch.contiguous_format if order is None else CHANNELS_LAST[p.dim()]
            for p, order in zip(parts, self._orders, strict=True)
        ]
        #: Whether the first dimensions count samples, so that rows can be seen as states.
        self.is_leading = self.dims == tuple(range(len(self.dims)))
        self._are_views = len(parts) == 1 and self.is_leading and self.dtypes[0] in _NOT_CONVERTED
        # One tensor whose memory is that of its rows; and, where it is not its rows, their shape.
        self._is_one = (
            self._are_views
            and self._tree.is_tensor
            and self._orders[0] is None
            and self._pairs[0] == 1
        )
        self._is_rows = self._is_one and self.ndims == (2,) and self.dims == (0,)
        self._rows_shape = (math.prod(batch_shape(parts[0], self.dims)), self.sizes[0])

    def pack(self, state: Any, what: str = "the cell") -> Tensor:
        """Rows ``(B, n)``; raises unless ``state`` matches the example in shapes and device."""
        if (  # the usual case, for which the rest would take long where states are small
            self._is_one
            and type(state) is Tensor
            and not self.copies
            and state.shape == self.shapes[0]
            and state.dtype == self.dtype
            and state.device == self.device
        ):
            if not self._is_rows:
                return state.reshape(self._rows_shape)
            # The map may return a tensor that it holds, and what is differentiated is of its own.
            return state.view_as(state) if torch.is_grad_enabled() else state
        rows = [
            r if r.dtype == self.dtype else r.to(self.dtype) for r in self.parts_of(state, what)
        ]
        return rows[0] if len(rows) == 1 and not self.copies else torch.cat(rows, 1)

    def parts_of(self, state: Any, what: str = "the cell") -> list[Tensor]:
        """The rows ``(B, n_p)`` of each part, in its own dtype; views where they can be. Raises as
        :meth:`pack`."""
        parts = self._tree.parts_of(state, what)
        if [p.shape for p in parts] != self.shapes:
            got = [tuple(p.shape) for p in parts]
            raise ValueError(
                f"{what} returned shapes {got} for a state of shapes "
                f"{[tuple(s) for s in self.shapes]}; they must be equal. "
                "Pass z0 of the right shape, or define initial_state(x) on the cell."
            )
        for p in parts:
            if not (p.is_floating_point() or p.is_complex()):
                raise TypeError(
                    f"{what} returned {p.dtype} for a state in {self.dtype}; it must be floating "
                    "point or complex: numbers between are lost, and there is no gradient."
                )
        if any(p.device != self.device for p in parts):
            raise ValueError(f"{what} returned a state on another device than {self.device}.")
        return [self._rows_of(p, i) for i, p in enumerate(parts)]

    def unpack(self, rows: Tensor) -> Any:
        """The state that ``rows`` ``(B, n)`` hold, in the example's shapes and dtypes."""
        if self._is_one and not self.copies:
            return rows if self._is_rows else rows.reshape(self.shapes[0])
        if self._are_views and not self.copies:
            whole = self._part_of(rows, 0)
            return self._tree.of((whole,))
        split = rows.split(self.sizes, 1)
        parts = tuple(
            self._part_of(p, i).to(self.dtypes[i], copy=True, memory_format=self._formats[i])
            for i, p in enumerate(split)
        )
        return self._tree.of(parts)

    def for_samples(self, count: int) -> Packing:
        """The same for so many samples, where one dimension counts them."""
        (dim,) = self.dims
        other = copy.copy(self)
        other.batch = count
        other.shapes = [torch.Size((*s[:dim], count, *s[dim + 1 :])) for s in self.shapes]
        other._rows_shape = (count, self.sizes[0])
        return other

    def state_of(self, rows: list[Tensor]) -> Any:
        """The state whose parts are ``rows``, ``(B, n_p)`` contiguous: views, but for parts that
        have another dtype than rows. For dimensions that :attr:`is_leading`."""
        parts = tuple(
            self._part_of(r, i).to(self.dtypes[i], memory_format=torch.preserve_format)
            for i, r in enumerate(rows)
        )
        return self._tree.of(parts)

    def _rows_of(self, part: Tensor, i: int) -> Tensor:
        order = self._orders[i]
        if order is not None:  # in the order in which its entries lie in memory
            part = part.permute(order)
        if self._pairs[i] == 2:
            part = part if part.is_complex() else part.to(self.dtypes[i])
            if self.parts is None:
                part = torch.view_as_real(part.resolve_conj())
            else:  # the gradient of a view would need pairs at even places of a row
                part = torch.stack((part.real, part.imag), -1)
        elif part.is_complex():
            raise TypeError(
                f"the cell returned {part.dtype} for a state in {self.dtypes[i]}; it takes a start "
                "that is complex."
            )
        return as_rows(part, self.dims)

    def _part_of(self, rows: Tensor, i: int) -> Tensor:
        order, shape = self._orders[i], self.shapes[i]
        if self._pairs[i] == 2:
            return _seen_as_complex(from_rows(rows, (*shape, 2), self.dims))
        if order is None:
            return from_rows(rows, shape, self.dims)
        part = from_rows(rows, [shape[d] for d in order], self.dims)
        return part.movedim(-1, 1)

    def rowwise(self, f: Callable[[Any], Any]) -> RowMap:
        """``f`` on states as a map of rows."""
        return RowMap(self, f)


def _seen_as_complex(pairs: Tensor) -> Tensor:
    """``(..., 2)`` real as complex; a view where pairs lie together in memory."""
    starts = (*pairs.stride()[:-1], pairs.storage_offset())
    if pairs.stride(-1) != 1 or any(n % 2 for n in starts):
        pairs = pairs.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(pairs)


@dataclass(frozen=True, eq=False)
class RowMap:
    """A map f of states as a map of rows ``(B, n)``; of their parts too where it `takes_parts`.

    A dataclass, so that what f closes over is found through it (``held.held_tensors``).

    Raises:
        ArgumentWrittenError: f wrote to the state, unless its packing ``copies``.
    """

    packing: Packing
    f: Callable[[Any], Any]

    def __call__(self, rows: Tensor) -> Tensor:
        packing = self.packing
        if packing.copies:
            return packing.pack(self.f(packing.unpack(rows)))
        version = rows._version
        value = packing.pack(self.f(packing.unpack(rows)))
        if rows._version != version:
            raise ArgumentWrittenError
        return value

    @property
    def takes_parts(self) -> bool:
        """Whether f can see the parts of a state where they lie."""
        return self.packing.is_leading and not self.packing.copies

    def of_parts(self, rows: list[Tensor]) -> list[Tensor]:
        """f of a state whose parts are ``rows``, ``(B, n_p)`` contiguous each, as such parts, of
        any dtype and with any distance from row to row."""
        versions = [r._version for r in rows]
        value = self.packing.parts_of(self.f(self.packing.state_of(rows)))
        if [r._version for r in rows] != versions:
            raise ArgumentWrittenError
        return value
