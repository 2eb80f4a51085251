"""Weight normalization: the 2-norm of the weights of each output."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from .reparametrized import Reparametrized, linear_modules


def norm_except(weight: Tensor, dim: int | None) -> Tensor:
    """2-norms over all dimensions but ``dim``, which stay as dimensions of size 1; of all of the
    weight where it is None."""
    if dim is None:
        norm: Tensor = torch.linalg.vector_norm(weight)
    else:
        others = [d for d in range(weight.dim()) if d != dim % weight.dim()]
        norm = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return norm


class WeightNorm(Reparametrized):
    """Weight normalization, which begins where the weight is.

    Source: Salimans and Kingma, "Weight Normalization", 2016, arXiv 1602.07868.
    """

    _target_modules: ClassVar = linear_modules()

    def begin(self, module: nn.Module, name: str, dim: int) -> None:
        weight = module._parameters.pop(name)
        assert weight is not None
        if self.learn_scale:
            norm = norm_except(weight.detach(), dim)
            module.register_parameter(f"{name}_g", nn.Parameter(norm))
        module.register_parameter(f"{name}_v", weight)
        setattr(module, name, self.weight_of(module, name, dim, False))

    def weight_of(self, module: nn.Module, name: str, dim: int, update: bool) -> Tensor:
        weight = getattr(module, f"{name}_v")
        return self.scaled(module, name, weight, norm_except(weight, dim))

    def end(self, module: nn.Module, name: str) -> None:
        delattr(module, f"{name}_v")
