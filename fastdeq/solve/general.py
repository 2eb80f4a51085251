"""The path of any cell: its state as rows ``(B, n)``, solved by the loop in Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError
from ..ops.solve_common import working_dtype
from ..solution import Solution
from ..solvers.loop import finite_rows
from . import autograd
from .eager import Eagerly
from .spec import Report, Specs


class Packing:
    """Packs states like an example into rows, and unpacks rows into such states.

    The example is a tensor ``(B, ...)`` or a tuple of them with one B, floating point, on one
    device. Rows are float64 where a part is, else float32.

    Raises:
        TypeError, ValueError: an example of another kind, with what it was.
    """

    def __init__(self, example: Any):
        self.is_tuple = isinstance(example, (tuple, list))
        parts = tuple(example) if self.is_tuple else (example,)
        if not parts or not all(isinstance(p, Tensor) for p in parts):
            kinds = ", ".join(type(p).__name__ for p in parts)
            raise TypeError(f"the state must be a tensor or a tuple of tensors, not ({kinds}).")
        for p in parts:
            if not p.is_floating_point():
                raise TypeError(f"the state has dtype {p.dtype}; it must be real floating point.")
            if p.dim() == 0:
                raise ValueError(
                    "the state has shape (); it needs a leading batch dimension, (B, ...): "
                    "state.unsqueeze(0) is one sample."
                )
        if len({(p.shape[0], p.device) for p in parts}) > 1:
            seen = "; ".join(f"{tuple(p.shape)} on {p.device}" for p in parts)
            raise ValueError(f"the parts of the state differ in batch size or device: {seen}.")
        self.shapes = [p.shape for p in parts]
        self.dtypes = [p.dtype for p in parts]
        self.sizes = [math.prod(s[1:]) for s in self.shapes]
        #: Sizes of the parts in a row, where there are several.
        self.parts = self.sizes if len(self.sizes) > 1 else None
        self.device = parts[0].device
        self.dtype = working_dtype(*parts)

    def pack(self, state: Any, what: str = "the cell") -> Tensor:
        """Rows ``(B, n)``; raises unless ``state`` matches the example in shapes and device."""
        parts = tuple(state) if isinstance(state, (tuple, list)) else (state,)
        if not all(isinstance(p, Tensor) for p in parts):
            kinds = ", ".join(type(p).__name__ for p in parts)
            raise TypeError(f"{what} returned ({kinds}); a state of tensors is needed.")
        if [p.shape for p in parts] != self.shapes:
            got = [tuple(p.shape) for p in parts]
            raise ValueError(
                f"{what} returned shapes {got} for a state of shapes "
                f"{[tuple(s) for s in self.shapes]}; they must be equal. "
                "Pass z0 of the right shape, or define initial_state(x) on the cell."
            )
        if any(p.device != self.device for p in parts):
            raise ValueError(f"{what} returned a state on another device than {self.device}.")
        rows = [p.reshape(len(p), n).to(self.dtype) for p, n in zip(parts, self.sizes, strict=True)]
        return torch.cat(rows, 1)

    def unpack(self, rows: Tensor) -> Any:
        """The state that ``rows`` ``(B, n)`` hold, in the example's shapes and dtypes.

        A copy: a cell may change its argument in place, which must not change the solver's point.
        """
        split = rows.split(self.sizes, 1)
        parts = tuple(
            p.reshape(s).to(d, copy=True)
            for p, s, d in zip(split, self.shapes, self.dtypes, strict=True)
        )
        return parts if self.is_tuple else parts[0]

    def rowwise(self, f: Callable[[Any], Any]) -> Callable[[Tensor], Tensor]:
        """``f`` on states as a map of rows."""
        return lambda rows: self.pack(f(self.unpack(rows)))


def solve_map(
    f: Callable[[Any], Any], z0: Any, specs: Specs, report: Report
) -> tuple[Any, Solution]:
    """``z = f(z)`` for f on states like ``z0``. ``report`` receives the adjoint's solution.

    Raises:
        BackendError: a backend or precision that cannot be had.
    """
    if specs.options.precision == "mixed":
        raise BackendError(
            "precision='mixed' is not available: only the solve of an AffineCell has it, without "
            "hooks, further arguments and solvers of one's own. Use precision='auto'."
        )
    packing = Packing(z0)
    rows = packing.rowwise(f)
    with torch.no_grad():
        start = finite_rows(packing.pack(z0))
    # The first evaluation is made under autograd: what the cell caches then (as in
    # torch.nn.utils.parametrize.cached) keeps its graph for the evaluation that is differentiated.
    start_value = None
    if torch.is_grad_enabled() and len(start):
        with Eagerly():
            start_value = rows(start).detach()
    with torch.no_grad():
        solution = replace(specs.forward, parts=packing.parts).iterate(rows, start, start_value)
    z = solution.value
    if torch.is_grad_enabled():
        failed = solution.nonfinite.unsqueeze(1)
        if specs.options.gradient == "implicit":
            again = autograd.rerun_autocast(rows, z.device.type)
            adjoint = replace(specs.adjoint, parts=packing.parts)
            attached = autograd.attach(adjoint, report, again, z)
        else:
            attached = autograd.one_step(rows, z)
        z = torch.where(failed, z, attached)
    value = packing.unpack(solution.value)
    contraction = specs.structure.contraction
    return packing.unpack(z), replace(solution, value=value, contraction=contraction)
