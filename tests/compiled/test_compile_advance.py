"""The advance kernels, and those that begin and end a solve, compile for sm_80 and sm_90 without
spilling. No GPU is needed, and none is used."""

from __future__ import annotations

import pytest
from compile_cases import ARCHITECTURES, SHARED_LIMITS, compile_kernel, resources, why_no_triton

pytestmark = pytest.mark.skipif(bool(why_no_triton()), reason=why_no_triton() or "triton is here")

POINTERS = {
    "points": "*fp32",
    "value": "*fp32",
    "change": "*bf16",
    "sums": "*fp32",
    "numbers": "*fp32",
    "flags": "*i32",
    "remaining": "*i32",
    "f_history": "*fp32",
    "g_history": "*fp32",
    "gram": "*fp64",
    "start_rows": "*fp32",
    "grad": "*fp32",
    "slope": "*fp32",
    "offset": "*fp32",
    "pre": "*fp32",
    "status": "*i8",
    "iterations": "*i32",
    "residual": "*fp32",
    "rejects": "*i32",
}
SCALARS = dict.fromkeys(("tol", "damping", "undamped", "safeguard", "accelerate_above"), "fp32")
SCALARS |= dict.fromkeys(("regularization", "rank_tolerance", "max_weight"), "fp64")
SCALARS |= {"radius": "fp32", "slot": "i64"}
ALIGNED = ("size", "slot")


def compiled(kernel, arch, constants, *, size, warps, missing=(), types=(), **options):
    """``size``: rows of that length, all aligned where 16 divides it; ``missing`` are None."""
    names = set(kernel.arg_names)
    constants = {**constants, **dict.fromkeys(missing)}
    signature = {**POINTERS, **SCALARS, **dict(types)}
    signature = {k: v for k, v in signature.items() if k in names and k not in constants}
    divisible = [k for k, v in signature.items() if v.startswith("*")]
    divisible += [k for k in ALIGNED if k in names and size % 16 == 0]
    return compile_kernel(kernel, arch, signature, constants, divisible, num_warps=warps, **options)


def check(kernel, arch, folder):
    assert kernel.asm["cubin"]
    assert kernel.metadata.shared <= SHARED_LIMITS[arch]
    found = resources(kernel, folder)
    print(f"shared {kernel.metadata.shared}", found)
    assert found["STACK"] == found["LOCAL"] == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("size", [1001, 4096])
@pytest.mark.parametrize("ramp", [False, True], ids=["exact", "ramp"])
@pytest.mark.parametrize("form", ["plain", "damped", "heavy"])
def test_plain_and_heavy_ball_steps_fit_the_registers(form, ramp, size, arch, tmp_path):
    from fastdeq.kernels.advance import advance_kernel, block_of

    block, warps = block_of(size)
    heavy = form == "heavy"
    constants = {
        "HEAVY": heavy,
        "DAMPED": form == "damped",
        "RAMP": ramp,
        "FIXED": form == "plain",
        "SLOTS": 2 if heavy else 3,
        "BLOCK": block,
    }
    check(compiled(advance_kernel, arch, constants, size=size, warps=warps), arch, tmp_path)


def anderson(arch, slots, size, *, damped, ramp, **options):
    from fastdeq.kernels.advance_anderson import REGISTERS, advance_anderson_kernel
    from fastdeq.kernels.anderson_mix import tile_shape

    columns, block, warps = tile_shape(slots, size)
    constants = {"DAMPED": damped, "RAMP": ramp, "COLUMNS": columns, "BLOCK": block}
    kernel = advance_anderson_kernel
    options = {"maxnreg": REGISTERS[warps], **options}
    return compiled(kernel, arch, constants, size=size, warps=warps, **options)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(
    ("slots", "size"), [(2, 64), (3, 1024), (6, 1024), (6, 1001), (11, 512), (33, 1024), (65, 4096)]
)
@pytest.mark.parametrize(("damped", "ramp"), [(False, False), (True, True)])
def test_anderson_steps_fit_the_registers(slots, size, damped, ramp, arch, tmp_path):
    check(anderson(arch, slots, size, damped=damped, ramp=ramp), arch, tmp_path)


def test_a_spill_is_noticed(tmp_path):
    kernel = anderson(90, 6, 1024, damped=True, ramp=True, maxnreg=32)
    assert resources(kernel, tmp_path)["STACK"] > 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("size", [1001, 4096])
@pytest.mark.parametrize("given", ["start", "grad", "half grad"])
def test_the_beginning_fits_the_registers(given, size, arch, tmp_path):
    from fastdeq.kernels.advance import block_of
    from fastdeq.kernels.load import begin_kernel

    block, warps = block_of(size)
    constants = {"MODE": 0, "NARROWEST": 2, "PLAIN": 1, "BLOCK": block}
    missing = ("grad",) if given == "start" else ("start_rows",)
    types = {"grad": "*fp16"} if given == "half grad" else {}
    kernel = compiled(
        begin_kernel, arch, constants, size=size, warps=warps, missing=missing, types=types
    )
    check(kernel, arch, tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("size", [1001, 4096])
@pytest.mark.parametrize(("adjoint", "dtype"), [(False, "fp32"), (True, "bf16")])
def test_the_end_fits_the_registers(adjoint, dtype, size, arch, tmp_path):
    from fastdeq.kernels.advance import block_of
    from fastdeq.kernels.load import slope_kernel, unload_kernel

    block, warps = block_of(size)
    constants = {"ADJOINT": adjoint, "AGAIN": True, "SLOTS": 2, "COUNTERS": 3, "BLOCK": block}
    types = {"value": f"*{dtype}"}
    kernel = compiled(unload_kernel, arch, constants, size=size, warps=warps, types=types)
    check(kernel, arch, tmp_path)
    constants = {"ACTIVATION": 8, "BLOCK": block}  # gelu
    check(compiled(slope_kernel, arch, constants, size=size, warps=warps), arch, tmp_path)


def test_numbers_that_decide_arrive_in_the_precision_they_are_used_in():
    """A Python float without an annotation would arrive as float32, and compile anew for 1.0."""
    from fastdeq.kernels.advance import advance_kernel
    from fastdeq.kernels.advance_anderson import advance_anderson_kernel

    for kernel in (advance_kernel, advance_anderson_kernel):
        types = {p.name: p.annotation_type for p in kernel.params if p.annotation_type}
        assert types == {name: SCALARS[name] for name in kernel.arg_names if name in types}
        assert set(types) == set(kernel.arg_names) & set(SCALARS) - {"slot"}
