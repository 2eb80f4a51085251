"""Factors of matrices that were factorised before, and whether a matrix is still the same.

On the CPU the entries of a matrix are compared with a copy, which costs a fiftieth of the
factorisation and sees every kind of change. Elsewhere that would wait for the device: there a
matrix counts as unchanged while it is the same tensor at the same address and version, which sees
every in-place operation but not one on ``matrix.data``.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..cuda_stream import is_capturing
from .gram_schmidt import Factors


class Kept(NamedTuple):
    """Factors with what tells whether they are those of a matrix."""

    found: Factors
    copy: Tensor | None  # of the matrix, where entries are compared
    matrix: weakref.ref[Tensor]
    version: tuple[Any, ...]

    def holds_for(self, raw: Tensor) -> bool:
        """Whether ``raw`` is the matrix that was factorised, unchanged."""
        version = version_of(raw)
        if self.version[:3] != version[:3]:
            return False
        if self.copy is not None:
            # After an optimiser's step the version says so already.
            stepped = self.matrix() is raw and self.version[-1] != version[-1]
            return not stepped and torch.equal(self.copy, raw)
        return version[-1] is not None and self.version == version and self.matrix() is raw


def keep(raw: Tensor, found: Factors) -> Kept:
    """An entry for the factors of ``raw``."""
    copy = raw.detach().clone() if compares_entries(raw) else None
    return Kept(found, copy, weakref.ref(raw), version_of(raw))


def compares_entries(raw: Tensor) -> bool:
    return raw.device.type == "cpu"


def version_of(t: Tensor) -> tuple[Any, ...]:
    """Dtype, device, shape, address, stream and version: the same ones, the same tensor unchanged,
    but for writes to ``t.data``; with a version of None where that says nothing."""
    # With the stream: another would read without waiting. Inference tensors have no version.
    at = torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0
    unknown = t.is_inference() or _may_be_gathered(t)
    return t.dtype, t.device, t.shape, t.data_ptr(), at, None if unknown else t._version


def _may_be_gathered(t: Tensor) -> bool:
    """Whether t may be what ``fully_shard`` gathers anew for each call, perhaps to the same address
    and never with another version. Where entries are compared that is no matter."""
    return (
        not compares_entries(t)
        and "torch.distributed.fsdp" in sys.modules
        and torch.distributed.is_initialized()
    )


class FactorMemory:
    """The factors that an operator computed last, of any matrix, in any thread.

    An operator gets no object to keep them in. Entries are immutable and are replaced all at once,
    so threads need no lock; of two that add one at the same time, one is lost. The newest entry is
    kept whatever its size, older ones as long as all together take no more than ``most_bytes``.

    Off the CPU only parameters are looked up: a compiler may write another matrix to the memory
    of an intermediate one without a change of version. Once a factorisation on a device has been
    recorded in a CUDA graph, of which a replay may change the matrix without one too, nothing is
    looked up for that device until ``clear()``.
    """

    def __init__(self, most_bytes: int):
        self.most_bytes = most_bytes
        self._entries: tuple[Kept, ...] = ()
        self._recorded: frozenset[torch.device] = frozenset()

    def clear(self) -> None:
        """Forgets all factors, and any recording in a CUDA graph."""
        self._entries, self._recorded = (), frozenset()

    def factors(self, raw: Tensor, compute: Callable[[Tensor], Factors]) -> Factors:
        """``compute(raw)``, or what it was; not to be written to, nor to be handed out."""
        if is_capturing(raw.device):
            self._recorded |= {raw.device}
            self._entries = tuple(e for e in self._entries if e.version[1] != raw.device)
        known = type(raw) is nn.Parameter or (type(raw) is Tensor and compares_entries(raw))
        if not known or raw.device in self._recorded:
            return compute(raw)
        for entry in self._entries:
            if entry.holds_for(raw):
                return entry.found
        found = compute(raw)
        self._add(keep(raw, found))
        return found

    def _add(self, new: Kept) -> None:
        kept, size = [new], _bytes(new)
        for entry in self._entries:
            # What lay at the same address has changed, or is gone.
            size += _bytes(entry)
            if entry.version[:4] != new.version[:4] and size <= self.most_bytes:
                kept.append(entry)
        self._entries = tuple(kept)


def _bytes(entry: Kept) -> int:
    tensors = (*entry.found, entry.copy)
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
