"""Normalizations by name, and all the weights of a model at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ....errors import check_choice
from ..utils.config import DEQConfig
from .spectral_norm import SpectralNorm
from .weight_norm import WeightNorm

_norms: dict[str, Any] = {"weight_norm": WeightNorm, "spectral_norm": SpectralNorm}
_NONE = "none"


def register_norm(norm_type: str, norm_class: Any) -> None:
    """Makes ``norm_class`` known as ``norm_type``. It has ``_target_modules``, a class method
    ``apply(module, deq_args=..., **options)`` that returns an instance, and its instances are
    called with a module and have ``remove(module)``, as ``reparametrized.Reparametrized`` does."""
    _norms[norm_type] = norm_class


def register_norm_module(
    module_class: type, norm_type: str, names: Any = "weight", dims: Any = 0
) -> None:
    """Lets a normalization find weights in modules of the type ``module_class``: their ``names``,
    and which dimension of each counts outputs."""
    check_choice(norm_type, _norms, "norm_type")
    _norms[norm_type]._target_modules[module_class] = (names, dims)


def apply_norm(
    model: nn.Module,
    norm_type: str = "weight_norm",
    prefix_filter_out: str | Sequence[str] | None = None,
    filter_out: str | Sequence[str] | None = None,
    args: Any = None,
    **norm_kwargs: Any,
) -> None:
    """Normalises the weights of all linear modules and convolutions of a model.

    Args:
        model: changed in place.
        norm_type: "weight_norm", "spectral_norm", "none", or one that was registered.
        prefix_filter_out: modules whose name begins with one of these are left alone.
        filter_out: those whose name contains one of these.
        args: options of a command line, which go before ``norm_type`` and ``norm_kwargs``.
        norm_kwargs: learn_scale, target_norm, clip, clip_value; n_power_iterations and eps of a
            spectral norm; or the names of the command line.

    Raises:
        ValueError, TypeError: an unknown normalization or option.
    """
    config = DEQConfig(args)
    options = {}
    for name, value in norm_kwargs.items():
        if name.startswith(("norm_", "sn_")):
            config.update(**{name: value})
        else:
            options[name] = value
    norm_type = config.get("norm_type", norm_type)
    if norm_type == _NONE:
        return
    check_choice(norm_type, (*_norms, _NONE), "norm_type")
    norm = _norms[norm_type]
    prefixes, parts = _names(prefix_filter_out), _names(filter_out)
    for name, module in model.named_modules():
        if name.startswith(prefixes) or any(part in name for part in parts):
            continue
        if type(module) in norm._target_modules:
            made = norm.apply(module, deq_args=config, **options)
            module._deq_norm = made


def _names(given: str | Sequence[str] | None) -> tuple[str, ...]:
    if given is None:
        return ()
    return (given,) if isinstance(given, str) else tuple(given)


def reset_norm(model: nn.Module) -> None:
    """Makes the normalised weights of a model from what its parameters are now."""
    for module in model.modules():
        norm = getattr(module, "_deq_norm", None)
        if norm is not None:
            norm(module)


def remove_norm(model: nn.Module) -> None:
    """Makes parameters of the normalised weights of a model again."""
    for module in model.modules():
        norm = getattr(module, "_deq_norm", None)
        if norm is not None:
            norm.remove(module)
            del module._deq_norm
