"""The square weights of a cell, as what a change of their scale or a step of training changes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ..cells import AffineCell
from ..weights.dense import Dense, Structured
from ..weights.square import Names, Square, find_squares
from .untouched import all_modules

_LARGEST = 1024  # of a matrix whose 2-norm is computed; its Frobenius norm, a bound, beyond


def recurrent_squares(cell: Any, names: Names = None) -> list[Square]:
    """Those of the cell by name, packed ones too; without names those of W of an
    :class:`fastdeq.AffineCell`, all of another cell, and packed ones where there are no others.

    Raises:
        ValueError: no square weight has such a name; the message lists what there is.
    """
    found: list[Square] = []
    why = "the cell has no module that is known"
    for module in all_modules(cell):
        chosen = names
        if chosen is None and isinstance(cell, AffineCell):
            chosen = "weight.*"
        for blocks in (False, True) if names is None else (True,):
            try:
                found += find_squares(module, chosen, blocks)
                break
            except ValueError as error:
                why = str(error)
    if names is not None and not found:
        raise ValueError(f"names={names!r} chooses no square weight: {why}")
    return [s for s in found if s.tensor.is_floating_point() and s.tensor.device.type != "meta"]


def values_of(square: Square) -> Tensor:
    """W itself, of a weight module of fastdeq as of any other weight."""
    if isinstance(square.owner, Structured):
        weight: Tensor = square.owner()
        return weight.detach()
    return square.tensor.detach()


def two_norm(t: Tensor) -> float:
    """The 2-norm of a weight as a matrix; its Frobenius norm, which bounds it, of a large one."""
    matrix = t.detach().flatten(1).float()
    if max(matrix.shape) > _LARGEST or not bool(matrix.isfinite().all()):
        return float(torch.linalg.vector_norm(matrix))
    return float(torch.linalg.matrix_norm(matrix, 2))


def root_mean_square_scale(squares: list[Square]) -> float:
    """``|W|_F / sqrt(d)``, the radius of dense and orthogonal weights; the geometric mean."""
    logs = []
    for s in squares:
        for view in s.views(values_of(s)):
            norm = float(torch.linalg.vector_norm(view.float()))
            logs.append(math.log(max(norm / math.sqrt(len(view)), 1e-30)))
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def are_orthogonal(squares: list[Square]) -> bool:
    """Whether each is a multiple of an orthogonal matrix, up to the rounding of bfloat16."""
    for s in squares:
        for view in s.views(values_of(s)):
            gram = view.float() @ view.float().t()
            mean = gram.diagonal().mean()
            distance = torch.linalg.matrix_norm(gram - mean * torch.eye(len(view)).to(gram))
            if not float(distance) <= 1e-2 * float(mean) * math.sqrt(len(view)):
                return False
    return bool(squares)


class Scaled:
    """A cell with its square weights times a factor, the cell left alone: ``(z, x, ...)``."""

    def __init__(self, cell: Any, squares: list[Square], factor: float):
        self._cell, self._factor = cell, factor
        self._parameters = {s.name: factor * s.tensor.detach() for s in squares}
        if hasattr(cell, "initial_state"):
            self.initial_state = cell.initial_state

    def __call__(self, z: Any, x: Any, *context: Any, **keywords: Any) -> Any:
        cell = self._cell
        if isinstance(cell, AffineCell):
            weight = cell.recurrent_weight()
            return cell.phi.function(self._factor * (z @ weight.t()) + cell.inject(x))
        return functional_call(cell, self._parameters, (z, x, *context), keywords)


def can_be_scaled(cell: Any, squares: list[Square]) -> bool:
    """Whether :class:`Scaled` is that cell: a module, whose weights are not computed."""
    if isinstance(cell, AffineCell):
        return cell.is_plain()
    plain = not any(s.parametrized or isinstance(s.owner, Structured) for s in squares)
    return isinstance(cell, torch.nn.Module) and bool(squares) and plain


@torch.no_grad()
def multiply(square: Square, factor: float) -> str | None:
    """Multiplies a weight in place; what stands in the way, or None."""
    owner = square.owner
    if square.parametrized:
        return f"{square.name} is parametrised"
    if isinstance(owner, Structured) and owner.parametrized and "orthogonal" in owner.tags:
        if getattr(owner, "max_scale", None) is not None:
            return f"{square.name} has a learned scale"
        owner.scale *= factor
        owner._reset_scale()  # type: ignore[operator]
        return None
    square.tensor.mul_(factor)
    if isinstance(owner, Dense):
        owner.scale *= factor
    return None
