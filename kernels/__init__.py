"""Triton kernels: engines for whole affine solves (steps/, whole/), anderson_mix, activations."""
