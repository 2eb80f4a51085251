"""``fastdeq::symmetric_part``: ``(A + A^T) / 2`` of a square matrix, exactly symmetric.

For CPU tensors it is in C++ (csrc/cpu/symmetric_part.cpp). It is its own gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

torch.library.define("fastdeq::symmetric_part", "(Tensor a) -> Tensor")


def reference(a: Tensor) -> Tensor:
    """In plain PyTorch, for every dtype and under every transform."""
    if a.dim() != 2 or a.shape[0] != a.shape[1]:
        raise ValueError(f"a square matrix is needed, got {tuple(a.shape)}.")
    return ((a + a.t()) / 2).contiguous()


torch.library.impl("fastdeq::symmetric_part", "CompositeExplicitAutograd", reference)


@torch.library.register_fake("fastdeq::symmetric_part")
def _fake(a: Tensor) -> Tensor:
    return torch.empty_like(a, memory_format=torch.contiguous_format)


def _backward(ctx: Any, grad: Tensor) -> Tensor:
    part: Tensor = torch.ops.fastdeq.symmetric_part(grad)
    return part


torch.library.register_autograd("fastdeq::symmetric_part", _backward)
