"""Spectral normalization: the largest singular value, estimated by a power iteration."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..utils.config import DEQConfig
from .reparametrized import Reparametrized, linear_modules


def as_matrix(weight: Tensor, dim: int) -> Tensor:
    """``(outputs, everything else)``."""
    return weight.movedim(dim, 0).flatten(1)


class SpectralNorm(Reparametrized):
    """Spectral normalization.

    The estimate is improved at each ``reset_norm`` in training mode. Until the first one the weight
    is not normalised.

    Args:
        n_power_iterations: of each improvement, 1 or more.
        eps: least norm of a vector in it.

    Source: Miyato et al., "Spectral Normalization", 2018, arXiv 1802.05957.
    """

    _target_modules: ClassVar = linear_modules()

    def __init__(
        self, names: Any, dims: Any, *, n_power_iterations: int = 1, eps: float = 1e-12, **rest: Any
    ):
        super().__init__(names, dims, **rest)
        if n_power_iterations < 1:
            raise ValueError(f"n_power_iterations must be 1 or more, got {n_power_iterations!r}.")
        self.n_power_iterations, self.eps = n_power_iterations, eps

    @classmethod
    def configured(cls, config: DEQConfig, options: dict[str, Any]) -> dict[str, Any]:
        found = super().configured(config, options)
        if (iterations := config.get("sn_n_power_iters")) is not None:
            found["n_power_iterations"] = iterations
        return found

    def begin(self, module: nn.Module, name: str, dim: int) -> None:
        weight = module._parameters.pop(name)
        assert weight is not None
        for suffix, size in zip("uv", as_matrix(weight, dim).shape, strict=True):
            vector = F.normalize(weight.detach().new_empty(size).normal_(), dim=0, eps=self.eps)
            module.register_buffer(f"{name}_{suffix}", vector)
        module.register_parameter(f"{name}_orig", weight)
        setattr(module, name, weight.detach())
        if self.learn_scale:
            shape = [n if d == dim % weight.dim() else 1 for d, n in enumerate(weight.shape)]
            norm = weight.detach().new_full(shape, self.target_norm)
            module.register_parameter(f"{name}_g", nn.Parameter(norm))

    def weight_of(self, module: nn.Module, name: str, dim: int, update: bool) -> Tensor:
        weight = getattr(module, f"{name}_orig")
        matrix = as_matrix(weight, dim)
        u, v = getattr(module, f"{name}_u"), getattr(module, f"{name}_v")
        if update:
            with torch.no_grad():
                for _ in range(self.n_power_iterations):
                    v.copy_(F.normalize(matrix.T @ u, dim=0, eps=self.eps))
                    u.copy_(F.normalize(matrix @ v, dim=0, eps=self.eps))
        # Copies: the next reset may come before the backward pass of this one.
        return self.scaled(module, name, weight, u.clone() @ (matrix @ v.clone()))

    def end(self, module: nn.Module, name: str) -> None:
        for suffix in ("u", "v", "orig"):
            delattr(module, f"{name}_{suffix}")
