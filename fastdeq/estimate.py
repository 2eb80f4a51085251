"""What a diagnostic of a Jacobian returns, and the options they share."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, repr=False)
class Estimate:
    """What was found for a batch of B samples; tensors are float32, or float64 for such states.

    Attributes:
        value: ``(B,)``, the estimate; NaN for samples whose state or Jacobian is not finite.
        accuracy: ``(B,)``, how far it may be off, as the function that made it explains.
        upper: ``(B,)``, what the true number does not exceed, but for the stated risk.
        products: ``(B,)`` int32, products with J or its transpose that were made for the sample.
        converged: ``(B,)`` bool, whether ``accuracy <= tol * value``, or is at the rounding floor,
            where further products bring nothing.
    """

    value: Tensor
    accuracy: Tensor
    upper: Tensor
    products: Tensor
    converged: Tensor

    def __repr__(self) -> str:
        if self.value.numel() == 0:
            return "Estimate(0 samples)"
        known = self.value[self.value.isfinite()]
        span = f"{float(known.min()):.4g} to {float(known.max()):.4g}" if len(known) else "unknown"
        accuracy = self.accuracy[self.accuracy.isfinite()]
        worst = f"; worst accuracy {float(accuracy.max()):.1e}" if len(accuracy) else ""
        return (
            f"Estimate({len(self.value)} samples, {int(self.converged.sum())} converged: {span}"
            f"{worst}; at most {int(self.products.max())} products)"
        )


def check_numbers(tol: object, max_products: object, risk: object, generator: object) -> None:
    """Raises TypeError or ValueError for options out of range, with what is allowed."""
    if not isinstance(tol, numbers.Real) or not 0 <= tol < math.inf:  # type: ignore[operator]
        raise ValueError(f"tol must be a finite number >= 0 such as 1e-2, got {tol!r}.")
    integral = isinstance(max_products, numbers.Integral) and not isinstance(max_products, bool)
    if not integral or max_products < 1:  # type: ignore[operator]
        raise ValueError(f"max_products must be an integer >= 1, got {max_products!r}.")
    if not isinstance(risk, numbers.Real) or not 0 < risk < 1:  # type: ignore[operator]
        raise ValueError(f"risk must be a probability in (0, 1) such as 1e-3, got {risk!r}.")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, not {generator!r}.")
