"""Why a solve went the way it did, in words."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..cells import AffineCell
from ..solution import Solution
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


def path_of(solution: Solution, refused: bool = False) -> str:
    """The path of a solve of a general map, from its counts."""
    path, batch = "general", len(solution.status)
    if refused:
        path += ", samples not told apart"
    elif (solution.sample_evaluations or 0) < batch * (solution.evaluations or 0):
        path += ", finished samples left out"
    return path
