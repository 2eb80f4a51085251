"""The operators, one file each: schema, reference, fake, autograd and registrations.

The PyTorch dispatcher is the table. An operator is registered for every device in Python, under
``CompositeExplicitAutograd``; C++ for CPU tensors (csrc/cpu) and CUDA C++ for CUDA tensors
(csrc/cuda) join under their own keys when the extension is loaded.

    solve_affine, solve_affine_adjoint                    whole solves of an affine cell
    anderson_mix                                          one step of Anderson acceleration
    gmres_step                                            one step of restarted GMRES
    pack_weight                                           W as the CPU engine reads it
    symmetric_part                                        (A + A^T) / 2
    orthogonal_factor, orthogonal_factor_backward         Q R, and its gradient

Two are defined in C++, and are there only with the extension:

    cholesky_qr2 (csrc/cholesky_qr.cpp)                   Q R in products, for GPUs
    engine_activation (csrc/cpu/solve_affine.cpp)         phi of the CPU engine, for its tests
"""

from . import (
    anderson_mix,
    gmres_step,
    orthogonal_factor,
    pack_weight,
    solve_affine,
    solve_affine_adjoint,
    symmetric_part,
)

__all__ = [
    "anderson_mix",
    "gmres_step",
    "orthogonal_factor",
    "pack_weight",
    "solve_affine",
    "solve_affine_adjoint",
    "symmetric_part",
]
