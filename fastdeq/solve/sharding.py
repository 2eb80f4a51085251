"""Cells that exchange something with other processes whenever they are evaluated.

Each process solves its own samples and stops when these have finished, so that processes evaluate
their cells, and the products of the adjoint, a different number of times. A cell that waits for all
of them in each evaluation would wait for ever.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch.distributed
from torch import nn


def distributed_now() -> bool:
    """Whether there may be other processes."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def refuse_sharded(modules: Iterable[Any]) -> None:
    """Raises RuntimeError where one of these, or a part of it, is gathered or synchronised by
    itself; what is around all of the solve is no matter."""
    if not distributed_now():
        return
    for module in modules:
        if not isinstance(module, nn.Module):
            continue
        for name, part in module.named_modules():
            why = _why(part)
            if why is not None:
                which = repr(name) if name else "the cell itself"
                raise RuntimeError(
                    f"{why[0]} ({which} in {type(module).__name__}) in each evaluation. Processes "
                    "evaluate a cell until their own samples have finished, a different number of "
                    f"times, so they would wait for each other for ever. {why[1]}"
                )


def _why(part: nn.Module) -> tuple[str, str] | None:
    """What is exchanged in each call of a module, and what to do instead."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: nothing is of its classes
    if fsdp is not None and isinstance(part, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)):
        name = "fully_shard" if isinstance(part, fsdp.FSDPModule) else "FullyShardedDataParallel"
        return (
            f"{name} gathers the parameters of a part of the cell",
            f"Shard the layer as a whole, {name}(layer) or a module around it, and nothing in its "
            "cell: the parameters are then gathered once for each solve.",
        )
    replica: Any = part
    replicated = isinstance(part, nn.parallel.DistributedDataParallel)
    if (
        replicated
        and replica.broadcast_buffers
        and next(replica.module.buffers(), None) is not None
    ):
        return (
            "DistributedDataParallel sends the buffers of a part of the cell",
            "Wrap the layer, or a module around it, instead of its cell; or pass "
            "broadcast_buffers=False.",
        )
    return None
