"""What the normalizations share: which weights, and the factor that they are multiplied by.

    w = v * min(clip_value, target / norm(v))      the minimum only with ``clip``

``target`` is a parameter ``<name>_g`` with ``learn_scale``, else the number ``target_norm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..utils.config import DEQConfig

#: Option of a normalization by the name that a command line has for it.
_CONFIGURED = {
    "norm_target_norm": "target_norm",
    "norm_clip": "clip",
    "norm_clip_value": "clip_value",
}


class Reparametrized:
    """A normalization of some weights of a module, which has the parameters it is made of.

    Args:
        names, dims: of the weights, and which dimension of each counts outputs.
        learn_scale: make the norm a parameter.
        target_norm: the norm, where it is not learned, and where it begins for a spectral norm.
        clip, clip_value: limit the factor, and to what.
    """

    #: Weight and output dimension by type of module.
    _target_modules: ClassVar[dict[type, tuple[Any, Any]]] = {}

    def __init__(
        self,
        names: Sequence[str],
        dims: Sequence[int],
        learn_scale: bool = True,
        target_norm: float = 1.0,
        clip: bool = False,
        clip_value: float = 1.0,
    ):
        if len(names) != len(dims):
            raise ValueError(f"names and dims must be as many as each other: {names}, {dims}.")
        self.names, self.dims = list(names), list(dims)
        self.learn_scale, self.target_norm = learn_scale, target_norm
        self.clip, self.clip_value = clip, clip_value

    @classmethod
    def configured(cls, config: DEQConfig, options: dict[str, Any]) -> dict[str, Any]:
        """``options``, where ``config`` does not say otherwise."""
        found = dict(options)
        if (fixed := config.get("norm_no_scale")) is not None:
            found["learn_scale"] = not fixed
        for name, option in _CONFIGURED.items():
            if (value := config.get(name)) is not None:
                found[option] = value
        return found

    @classmethod
    def apply(
        cls,
        module: nn.Module,
        deq_args: Any = None,
        names: Any = None,
        dims: Any = None,
        **options: Any,
    ) -> Any:
        """Normalises weights of ``module``; returns what recomputes and removes that.

        Args:
            module: has the weights as parameters.
            deq_args: options of a command line, which go before ``options``.
            names, dims: see the class; None: what is registered for the type of the module.
            options: those of the class.
        """
        if names is None or dims is None:
            names, dims = cls._target_modules[type(module)]
        names = [names] if isinstance(names, str) else names
        dims = [dims] if dims is None or isinstance(dims, int) else dims
        norm = cls(names, dims, **cls.configured(DEQConfig(deq_args), options))
        for name, dim in zip(norm.names, norm.dims, strict=True):
            norm.begin(module, name, dim)
        return norm

    def begin(self, module: nn.Module, name: str, dim: int) -> None:
        """Puts the parameters that the weight is made of into its place."""
        raise NotImplementedError

    def weight_of(self, module: nn.Module, name: str, dim: int, update: bool) -> Tensor:
        """The normalised weight; with ``update`` what is estimated of it is improved."""
        raise NotImplementedError

    def end(self, module: nn.Module, name: str) -> None:
        """Removes the parameters that the weight is made of."""
        raise NotImplementedError

    def scaled(self, module: nn.Module, name: str, weight: Tensor, norm: Tensor) -> Tensor:
        """``weight``, whose norm is ``norm``, times the factor."""
        target = getattr(module, f"{name}_g") if self.learn_scale else self.target_norm
        factor = target / norm
        return weight * (factor.clamp(max=self.clip_value) if self.clip else factor)

    def __call__(self, module: nn.Module) -> None:
        """Makes the weights from what the parameters are now."""
        for name, dim in zip(self.names, self.dims, strict=True):
            setattr(module, name, self.weight_of(module, name, dim, module.training))

    def remove(self, module: nn.Module) -> None:
        """Makes parameters of the weights again."""
        for name, dim in zip(self.names, self.dims, strict=True):
            with torch.no_grad():
                weight = self.weight_of(module, name, dim, False)
            delattr(module, name)
            self.end(module, name)
            if self.learn_scale:
                delattr(module, f"{name}_g")
            module.register_parameter(name, nn.Parameter(weight.detach()))


def linear_modules() -> dict[type, tuple[Any, Any]]:
    """Weight and output dimension of the linear modules of torch."""
    forward = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    return {**dict.fromkeys(forward, ("weight", 0)), **dict.fromkeys(transposed, ("weight", 1))}
