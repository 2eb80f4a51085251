"""Why an affine cell is not solved as one, in words."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..cells import AffineCell
from .spec import Specs


def why_general(cell: Any, context: tuple[Any, ...], registered: bool, specs: Specs) -> str:
    """Why an :class:`AffineCell`, or one inside of ``cell``, is not solved by the fused operators,
    which are many times faster; "" for other cells."""
    if isinstance(cell, AffineCell):
        if context:
            return "not fused: the AffineCell has further arguments"
        if not registered:
            return "not fused: a solver class of one's own"
        hooked = cell._forward_hooks or cell._forward_pre_hooks
        if hooked or cell._backward_hooks or cell._backward_pre_hooks:
            return "not fused: the AffineCell has hooks"
        return "not fused: the AffineCell has overridden methods"
    if specs.wrapped is None:  # looked for once: a module may have many parts
        specs.wrapped = isinstance(cell, nn.Module) and any(
            isinstance(part, AffineCell) for part in cell.modules()
        )
    return f"not fused: an AffineCell inside a {type(cell).__name__}" if specs.wrapped else ""
