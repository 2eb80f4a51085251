"""The kernels of the iteration of general maps compile for sm_80 and sm_90 without spilling. No GPU
is needed, and none is used."""

from __future__ import annotations

import re

import pytest
from compile_cases import (
    ARCHITECTURES,
    check_resources,
    compile_kernel,
    needs_triton,
    resources,
)

pytestmark = [pytest.mark.compiled, needs_triton]
architectures = pytest.mark.parametrize("arch", ARCHITECTURES)
INTEGERS = {"running": "*i1", "flags": "*i32", "places": "*i32"}
INTEGERS |= dict.fromkeys(("spans", "firsts", "addresses"), "*i64")
SCALARS = ("settings", "numbers", "norms", "products", "gram", "gamma")
INTEGERS |= dict.fromkeys(SCALARS, "*fp64")


def compiled(name, arch, solver, size, dtype="fp32", *, offset=False, many=False, **more):
    """One of the kernels as a launch has it, for rows of that length."""
    import torch
    from fastdeq.kernels.iteration import engine, kernels

    from fastdeq.solvers import SolveOptions

    options = SolveOptions.of(solver, tol=1e-4, max_iter=100)
    types = {field: INTEGERS.get(field, f"*{dtype}") for field in engine.Buffers._fields}
    kernel = getattr(kernels, name)
    tile = engine.tile_of(options, size)
    constants = engine.constants_of(options, offset, many)
    constants = {**constants, **({} if many else {"parts": 1}), "BLOCK": tile["BLOCK"]}
    if not constants["COLUMNS"] and name == "decide_kernel":
        tile = {"num_warps": 1}
    signature = {"buffers": engine.Buffers(**types)}
    signature, constants = (
        {k: v for k, v in given.items() if k in kernel.arg_names}
        for given in (signature, constants)
    )
    divisible = ["buffers", "length"] + ["size"] * (size % 16 == 0)
    launch = {**{k: v for k, v in tile.items() if k != "BLOCK"}, **more}
    return compile_kernel(
        kernel,
        arch,
        signature,
        constants,
        [k for k in divisible if k in kernel.arg_names],
        **launch,
    )
