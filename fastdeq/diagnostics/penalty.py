"""The size of the Jacobian at a solved state, as a term of a loss."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from ..layer import DEQLayer
from ..samples import BatchDim
from ..solve.cell_map import CellMap
from ..solve.leading import leading_of
from ..solve.nonfinite import finite_samples, samples_of
from ..solve.packing import Packing
from .keywords import takes_keywords


@takes_keywords("jacobian_penalty")
def jacobian_penalty(
    cell: Any,
    x: Any,
    z: Any,
    *,
    context: tuple[Any, ...] = (),
    probes: int = 1,
    generator: torch.Generator | None = None,
    **keywords: Any,
) -> Tensor:
    """Estimate of ``|J|_F^2 / n`` per sample, ``J = df/dz`` at z with n entries, to be added to a
    loss: ``loss + 0.1 * jacobian_penalty(layer, x, z).mean()``. torchdeq's ``jac_reg`` is its mean.

    Each probe is one vector-Jacobian product with random signs v, and ``E |J^T v|^2 = |J|_F^2``.
    It differentiates the cell twice. A gradient that z carries is followed, which takes another
    adjoint solve; pass ``z.detach()`` for the penalty at a fixed state, as torchdeq has it. A
    sample that is not finite counts zero.

    Args:
        cell: a cell ``cell(z, x)`` or a :class:`fastdeq.DEQLayer` around one, whose ``batch_dim``
            is taken.
        x: what the cell takes, ``(B, ...)``; each vector is a sample of an affine cell.
        z: the states, a tensor ``(B, ...)`` or a tuple of them.
        context: further arguments of a general cell.
        probes: number of probes, >= 1; the variance falls as one over it.
        generator: of the signs, on the device of z; None: the global one.
        keywords: of the cell, by name; one that is called like an option here goes in ``context``.

    Returns:
        ``(B,)`` in float32 or float64, differentiable where grad mode is on.

    Raises:
        TypeError, ValueError: options or states that do not fit, with what does.

    Source: Bai, Koltun and Kolter, "Stabilizing Equilibrium Models by Jacobian Regularization",
    2021, arXiv 2106.14342; M. F. Hutchinson, 1989.
    """
    integral = isinstance(probes, numbers.Integral) and not isinstance(probes, bool)
    if not integral or probes < 1:
        raise ValueError(f"probes must be an integer >= 1, got {probes!r}.")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, not {generator!r}.")
    batch_dim: BatchDim = 0
    has_aux = False
    if isinstance(cell, DEQLayer):
        batch_dim, has_aux = cell.options.batch_dim, cell.options.has_aux
        cell = cell.cell
    elif not callable(cell) or isinstance(cell, type):
        raise TypeError(f"cell must be a module or function cell(z, x), not {cell!r}.")
    if (leading := leading_of(cell, x)) is not None:
        x, z, batch_dim = leading.rows(x), leading.start(z, "z"), 0
    packing = Packing(z, batch_dim)
    packing.copies = True  # z is the caller's
    dims = samples_of(x, z, batch_dim)
    finite = None
    if dims is not None:
        x, finite = finite_samples(x, dims)
    f = CellMap(cell, (x, *context), keywords, has_aux)
    create = torch.is_grad_enabled()
    with torch.enable_grad():
        rows = packing.pack(z, "z")
        known = rows.detach().isfinite().all(1)
        finite = known if finite is None else finite & known
        at = torch.where(finite.unsqueeze(1), rows, 0.0)
        if not (create and at.requires_grad):
            at = at.detach().requires_grad_()
        value = packing.pack(f(packing.unpack(at)))
        total = at.new_zeros(len(at))
        if value.requires_grad:
            for _ in range(probes):
                total = total + _square(value, at, generator, create)
    penalty = torch.where(finite, total / (probes * max(at.shape[1], 1)), 0.0)
    return penalty if create else penalty.detach()


def _square(value: Tensor, at: Tensor, generator: torch.Generator | None, create: bool) -> Tensor:
    """``|J^T v|^2`` per sample, of random signs v."""
    signs = torch.empty_like(value.detach()).bernoulli_(0.5, generator=generator)
    (found,) = torch.autograd.grad(
        value, at, 2 * signs - 1, retain_graph=True, create_graph=create, allow_unused=True
    )
    return at.new_zeros(len(at)) if found is None else found.square().sum(1)
