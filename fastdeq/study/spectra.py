"""Eigenvalues of the recurrent weight and of the Jacobian at an equilibrium."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..cells import AffineCell
from .data import Dataset


@torch.no_grad()
def eigenvalues(model: Any, dataset: Dataset, when: str) -> dict[str, list[float]]:
    """Eigenvalues of W ``(d, d)`` and of ``J = D W`` at the state that the layer finds for the
    first test sample, as "weight_<when>" and "jacobian_<when>": real and imaginary parts in turn.
    Only for an :class:`fastdeq.AffineCell`; those of a matrix that is not finite are left out."""
    layer = model.layer
    cell = layer.cell
    if not isinstance(cell, AffineCell):
        return {}
    before = layer.last_solution
    x = dataset.x_test[:1]
    z = layer(x)
    layer.last_solution = before
    weight = cell.recurrent_weight().detach()
    slope = cell.phi.slope(z @ weight.t() + cell.inject(x)).squeeze(0)
    matrices = {"weight": weight, "jacobian": slope.unsqueeze(1) * weight}
    return {
        f"{name}_{when}": _flat(torch.linalg.eigvals(matrix.double()))
        for name, matrix in matrices.items()
        if bool(matrix.isfinite().all())
    }


def _flat(values: Tensor) -> list[float]:
    return torch.view_as_real(values).flatten().float().tolist()
