"""Recurrent weights: the three families, maps to structured matrices, and the cache of factors."""

from .factor_cache import FactorCache, orthogonal_factor
from .families import TAGS, WEIGHTS, Dense, Orthogonal, Symmetric, make_weight
from .maps import OrthogonalMap, SymmetricMap

__all__ = [
    "TAGS",
    "WEIGHTS",
    "Dense",
    "FactorCache",
    "Orthogonal",
    "OrthogonalMap",
    "Symmetric",
    "SymmetricMap",
    "make_weight",
    "orthogonal_factor",
]
