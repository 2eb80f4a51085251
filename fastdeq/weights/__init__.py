"""Recurrent weights: the three families, what a weight states of W, maps to structured matrices,
and the cache of factors."""

from .attached import is_modified
from .dense import Dense
from .factor_cache import FactorCache, orthogonal_factor
from .families import DEFAULT_SCALE, WEIGHTS, WeightName, make_weight
from .maps import OrthogonalMap, SymmetricMap
from .orthogonal import Orthogonal
from .statements import TAGS, Statement, Tag, stated
from .symmetric import Symmetric

__all__ = [
    "DEFAULT_SCALE",
    "TAGS",
    "WEIGHTS",
    "Dense",
    "FactorCache",
    "Orthogonal",
    "OrthogonalMap",
    "Statement",
    "Symmetric",
    "SymmetricMap",
    "Tag",
    "WeightName",
    "is_modified",
    "make_weight",
    "orthogonal_factor",
    "stated",
]
