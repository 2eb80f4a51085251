"""Whether rows have numbers, or stand for others in a graph that is being recorded."""

from __future__ import annotations

import torch
from torch import Tensor


def is_traced(rows: Tensor) -> bool:
    """Whether rows stand for others in a graph that is being recorded."""
    if torch.compiler.is_compiling():
        return True
    if type(rows) is Tensor:
        return False
    from torch.fx.experimental.proxy_tensor import get_proxy_mode  # slow to import

    return get_proxy_mode() is not None


def has_no_numbers(rows: Tensor) -> bool:
    """Whether rows are fake or on the meta device. Not while a graph is recorded, which has to
    contain the iteration."""
    if type(rows) is Tensor or is_traced(rows):
        return rows.device.type == "meta"
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(rows, FakeTensor) or rows.device.type == "meta"
