"""A cell that is looked at and left as it was: buffers and the state of random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..solve.checked_maps import modules_of


@contextmanager
def untouched(cell: Any, arguments: Any) -> Iterator[None]:
    """Autograd records, and nothing of ``cell`` or of the default generators is changed at the end.

    Buffers get their values back, those of batch normalisation for instance, and only where these
    differ: a graph of the caller's may have saved them. Evaluations leave gradients, hooks' handles
    and modes alone.
    """
    kept = [
        (owner, dict(owner._buffers), _values(owner))
        for module in all_modules(cell)
        for owner in module.modules()
    ]
    leaves = [t for t in tree_leaves(arguments) if isinstance(t, Tensor)]
    leaves += [p for module in all_modules(cell) for p in module.parameters()]
    devices = sorted({t.device.index for t in leaves if t.device.type == "cuda"})
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=devices),
    ):
        try:
            yield
        finally:
            _put_back(kept)


@torch.no_grad()
def _put_back(kept: list[tuple[nn.Module, dict[str, Any], dict[str, Tensor]]]) -> None:
    for owner, buffers, values in kept:
        for name, value in values.items():
            if not _same(buffers[name], value):
                buffers[name].copy_(value)
        if owner._buffers.keys() != buffers.keys() or any(
            owner._buffers[name] is not b for name, b in buffers.items()
        ):
            owner._buffers.clear()
            owner._buffers.update(buffers)


def _values(owner: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers that have values."""
    found = owner._buffers.items()
    return {name: b.clone() for name, b in found if b is not None and b.device.type != "meta"}


def _same(a: Tensor, b: Tensor) -> bool:
    if a.is_floating_point() or a.is_complex():
        return bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all())
    return torch.equal(a, b)


def all_modules(cell: Any) -> list[nn.Module]:
    """The cell, or what a function holds or names."""
    return [cell] if isinstance(cell, nn.Module) else modules_of(cell)
