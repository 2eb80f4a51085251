"""Gradients of a solved state for a diagnosis: taken without a trace in ``grad``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from ..cells import AffineCell
from ..diagnosis import ParameterGradient
from ..layer import DEQLayer
from ..solution import Solution
from ..solve.packing import Packing
from ..weights.square import Square
from .recurrent import two_norm
from .untouched import all_modules


class Gradients(NamedTuple):
    """Of a loss, as :class:`Diagnosis` has them."""

    adjoint: Solution | None
    gradient_norm: Tensor
    adjoint_norm: Tensor
    parameters: tuple[ParameterGradient, ...]


def backward(
    probe: DEQLayer,
    state: Any,
    packing: Packing,
    x: Any,
    loss: Callable[[Any], Tensor] | None,
    generator: torch.Generator | None,
    squares: list[Square],
) -> Gradients:
    """Those of ``loss`` at the state that ``probe`` has found; without one, of the mean over the
    samples of random directions of unit norm."""
    g = _gradient(state, packing, loss, generator)
    rows = packing.pack(g, "the gradient").detach()
    gradient_norm = torch.linalg.vector_norm(rows, dim=1)
    unknown = torch.full_like(gradient_norm, math.nan)
    named = _parameters(probe.cell)
    inputs: list[Tensor] = [p for _, p in named]
    if isinstance(x, Tensor) and x.requires_grad:
        inputs.append(x)
    parts, directions = tree_flatten(state)[0], tree_flatten(g)[0]
    pairs = [(p, d) for p, d in zip(parts, directions, strict=True) if p.requires_grad]
    if not pairs or not inputs:
        return Gradients(None, gradient_norm, unknown, ())
    grads = torch.autograd.grad(
        [p for p, _ in pairs], inputs, [d for _, d in pairs], allow_unused=True
    )
    adjoint = probe.last_adjoint_solution
    adjoint_norm = unknown
    if adjoint is not None and probe.options.gradient == "implicit":
        u = adjoint.value.detach()
        forward = probe.last_solution
        if isinstance(probe.cell, AffineCell) and forward is not None and forward.path == "fused":
            u = rows + u @ probe.cell.recurrent_weight().detach().to(u.dtype)  # of q = D u
        adjoint_norm = torch.linalg.vector_norm(u, dim=1)
        adjoint_norm = torch.where(forward.nonfinite, math.nan, adjoint_norm)  # type: ignore[union-attr]
    if adjoint is not None:
        adjoint = adjoint.with_value(None)
    chosen = {s.name for s in squares}
    found = tuple(
        _of(name, p, grad, name in chosen)
        for (name, p), grad in zip(named, grads[: len(named)], strict=True)
    )
    return Gradients(adjoint, gradient_norm, adjoint_norm, found)


def _gradient(
    state: Any,
    packing: Packing,
    loss: Callable[[Any], Tensor] | None,
    generator: torch.Generator | None,
) -> Any:
    """dL/dz, a structure like the state."""
    z = tree_map(lambda t: t.detach().clone().requires_grad_(), state)
    leaves, spec = tree_flatten(z)
    if loss is None:
        rows = packing.pack(z)
        if generator is None:
            generator = torch.Generator().manual_seed(0)
        v = torch.randn(rows.shape, generator=generator, device=generator.device).to(rows)
        v = v / torch.linalg.vector_norm(v, dim=1, keepdim=True).clamp(min=1e-30)
        value = (rows * v).sum() / max(len(rows), 1)
    else:
        value = loss(z)
        if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"loss(z) must be one real number as a tensor, got {got}.")
    if not value.requires_grad:
        return tree_unflatten([torch.zeros_like(t) for t in leaves], spec)
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    filled = [torch.zeros_like(t) if d is None else d for t, d in zip(leaves, grads, strict=True)]
    return tree_unflatten(filled, spec)


def _parameters(cell: Any) -> list[tuple[str, nn.Parameter]]:
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for module in all_modules(cell):
        for name, p in module.named_parameters():
            if p.requires_grad:
                found.setdefault(id(p), (name, p))
    return list(found.values())


def _of(name: str, p: Tensor, grad: Tensor | None, square: bool) -> ParameterGradient:
    grad = torch.zeros_like(p) if grad is None else grad
    norm = float(torch.linalg.vector_norm(grad.detach()))
    size = float(torch.linalg.vector_norm(p.detach()))
    relative = norm / size if size else (math.inf if norm else 0.0)
    return ParameterGradient(name, norm, relative, two_norm(grad) if square else math.nan)
