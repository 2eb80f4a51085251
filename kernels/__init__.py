"""Triton kernels, one file per operator: jit kernel first, then its launcher."""
