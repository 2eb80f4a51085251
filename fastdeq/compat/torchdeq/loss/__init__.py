"""Losses on states along a solve, and the size of a Jacobian."""

from .correction import fp_correction, register_weight_func
from .jacobian import jac_reg, power_method

__all__ = ["fp_correction", "jac_reg", "power_method", "register_weight_func"]
