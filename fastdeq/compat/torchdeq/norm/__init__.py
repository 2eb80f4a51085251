"""Normalised weights of a model: weight norm, spectral norm, or a class of one's own.

A normalised weight is made once, by ``reset_norm`` at the beginning of a training step, and is the
same in all evaluations of a solve.
"""

from .base_norm import apply_norm, register_norm, register_norm_module, remove_norm, reset_norm
from .spectral_norm import SpectralNorm
from .weight_norm import WeightNorm

__all__ = [
    "SpectralNorm",
    "WeightNorm",
    "apply_norm",
    "register_norm",
    "register_norm_module",
    "remove_norm",
    "reset_norm",
]
