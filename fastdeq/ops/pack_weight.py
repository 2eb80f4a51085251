"""``fastdeq::pack_weight``: a weight in the order in which the CPU engine reads it, as bytes.

For CPU tensors it is in C++ (csrc/cpu/pack_weight.cpp); elsewhere there is nothing to prepare, and
no byte is returned. A symmetric weight is packed once for its solves in both directions, which take
the buffer as ``packed`` where its precision, dtype and size are theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import extension
from ..constants import TRIANGLE_BATCH, TRIANGLE_SIZE

torch.library.define("fastdeq::pack_weight", "(Tensor weight, str precision) -> Tensor")


def reads_triangle(batch: int, size: int, precision: str) -> bool:
    """Whether the CPU engine reads a symmetric weight where it lies, so that none is packed."""
    # The batch last: it may be symbolic, and so may be the result.
    return size >= TRIANGLE_SIZE and precision != "mixed" and batch <= TRIANGLE_BATCH


def _nothing(weight: Tensor, precision: str) -> Tensor:
    return weight.new_empty(0, dtype=torch.uint8)


torch.library.impl("fastdeq::pack_weight", "CompositeExplicitAutograd", _nothing)


@torch.library.register_fake("fastdeq::pack_weight")
def _fake(weight: Tensor, precision: str) -> Tensor:
    if extension.module is None or weight.device.type != "cpu":
        return _nothing(weight, precision)
    size = weight.shape[0]
    # packed_bytes in csrc/cpu/packed_weight.h
    return weight.new_empty(64 + (size + 63) // 64 * 64 * (8 * size + 64), dtype=torch.uint8)
