"""The packed form of the latest symmetric weight of a layer, shared by its solves."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Entry(NamedTuple):
    weight: Tensor  # kept, so that no other one is made at its address
    key: tuple[Any, ...]
    packed: Tensor


class PackedWeight:
    """``ops.pack_weight`` of the latest weight, for as long as that is the same and unchanged.

    That is told by its address and version, which a write to ``weight.data`` does not change. A
    lookup is one read and a miss one assignment of an immutable entry, so threads may share it.
    Copies and pickles are empty.
    """

    def __init__(self) -> None:
        self._entry: _Entry | None = None

    def of(self, weight: Tensor, precision: str) -> Tensor | None:
        """The packed form of weight ``(d, d)``, not to be written to; None where nothing is kept of
        it: under transforms, of tensor subclasses, and of inference tensors, which have no version.
        """
        if (
            type(weight) is not Tensor
            or weight.is_inference()
            or torch._C._are_functorch_transforms_active()
        ):
            return None
        if torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None:
            packed: Tensor = torch.ops.fastdeq.pack_weight(weight, precision)
            return packed
        version = weight._version
        layout = weight.dtype, weight.shape, weight.stride()
        key = weight.data_ptr(), version, layout, precision
        entry = self._entry
        if entry is not None and entry.key == key:
            return entry.packed
        self._entry = entry = None  # never two of them in memory
        with torch.inference_mode(False), torch.no_grad():
            packed = torch.ops.fastdeq.pack_weight(weight.detach(), precision)
            self._entry = _Entry(weight.detach(), key, packed)
        return packed

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        return PackedWeight()

    def __reduce__(self) -> tuple[type[PackedWeight], tuple[()]]:
        return PackedWeight, ()
