"""How a cell is looked at: left as it was, of tensors that autograd may save, with attention that
is twice differentiable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from ..solve.checked_maps import modules_of


@contextmanager
def untouched(cell: Any, arguments: Any) -> Iterator[None]:
    """Autograd records, and nothing of ``cell`` or of the default generators is changed at the end.

    Evaluations see copies of the buffers, those of batch normalisation for instance, as a graph of
    the caller's may have saved the others, and writing to these would spoil it. They leave
    gradients and modes alone by themselves.
    """
    modules = all_modules(cell)
    leaves = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
    leaves += [p for module in modules for p in module.parameters()]
    devices = sorted({t.device.index for t in leaves if t.device.type == "cuda"})
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=devices),
    ):
        kept = {owner: dict(owner._buffers) for module in modules for owner in module.modules()}
        try:
            for owner, buffers in kept.items():
                owner._buffers.update({n: b.clone() for n, b in buffers.items() if b is not None})
            yield
        finally:
            for owner, buffers in kept.items():
                owner._buffers.clear()
                owner._buffers.update(buffers)


def differentiable_twice() -> AbstractContextManager[None]:
    """Attention by products and a softmax, as no fused kernel has a second derivative."""
    found: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return found


def all_modules(cell: Any) -> list[nn.Module]:
    """The cell, or what a function holds or names."""
    return [cell] if isinstance(cell, nn.Module) else modules_of(cell)


def usable(value: Any) -> Any:
    """``value`` with tensors that were made in inference mode replaced by copies: autograd may not
    save those."""

    def one(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf

    return tree_map(one, value)
