"""The affine step compiles for sm_80 and sm_90 without spilling, with every
tile that a launch may choose. No GPU is needed, and none is used.

What needs most registers is compiled: the ramp, a history, pre-activations and gelu together.
"""

from __future__ import annotations

import pytest
from compile_cases import ARCHITECTURES, SHARED_LIMITS, compile_kernel, resources, why_no_triton

pytestmark = pytest.mark.skipif(bool(why_no_triton()), reason=why_no_triton() or "triton is here")

LARGE_BATCH, SMALL_BATCH = 1000, 32


def offered(precision):
    """(tile, aligned), of all sizes of batches."""
    if why_no_triton():
        return []
    from fastdeq.kernels.tile_choice import candidates

    found = {
        (tile, aligned): None
        for aligned in (True, False)
        for batch in (SMALL_BATCH, LARGE_BATCH)
        for tile in candidates(batch, aligned, precision)
    }
    return list(found)


def largest(precision):
    """The largest tile for aligned rows, and the largest for others."""
    return list({aligned: (tile, aligned) for tile, aligned in offered(precision)}.values())


def compile_step(
    arch, tile, precision, aligned, activation="gelu", *, ramp=True, more=None, **options
):
    """As a launch with contiguous tensors would have it; without ``activation`` an adjoint, whose
    M is a transpose."""
    from fastdeq.kernels.activations import INDEX
    from fastdeq.kernels.affine_step import affine_step_kernel

    blocks = dict(tile.config().kwargs)
    constants = {
        "ACTIVATION": INDEX[activation] if activation else -1,
        "AT_ZERO": False,
        "SLOPE_ONLY": False,
        "PRECISION": precision,
        "weight_stride_input" if activation else "weight_stride_output": 1,
        "narrow_stride_input" if activation else "narrow_stride_output": 1,
        **blocks,
    }
    if activation:
        constants["slope_ptr"] = None
    if not ramp:
        constants |= {"change_ptr": None, "narrow_ptr": None}
        constants |= {"narrow_stride_output": 0, "narrow_stride_input": 0}
    names = affine_step_kernel.arg_names
    divisible = [name for name in names if name.endswith("_ptr")]
    if aligned:
        divisible += ["size", *(name for name in names if "stride" in name)]
    return compile_kernel(
        affine_step_kernel,
        arch,
        {"change_ptr": "*bf16", "narrow_ptr": "*bf16", "flags_ptr": "*i32"},
        {**constants, **(more or {})},
        divisible,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **options,
    )


def check(kernel, arch, folder):
    assert kernel.asm["cubin"]
    assert kernel.metadata.shared <= SHARED_LIMITS[arch]
    found = resources(kernel, folder)
    print(f"shared {kernel.metadata.shared}", found)
    assert found["STACK"] == found["LOCAL"] == 0


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("tile", "aligned"), offered("tf32x3"))
def test_every_tile_fits_the_registers(tmp_path, arch, tile, aligned):
    check(compile_step(arch, tile, "tf32x3", aligned), arch, tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("tile", "aligned"), largest("ieee"))
def test_the_largest_tiles_fit_the_registers_without_tensor_cores(tmp_path, arch, tile, aligned):
    check(compile_step(arch, tile, "ieee", aligned), arch, tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("tile", "aligned"), largest("tf32x3"))
def test_an_adjoint_fits_the_registers(tmp_path, arch, tile, aligned):
    check(compile_step(arch, tile, "tf32x3", aligned, None), arch, tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("mode", ["AT_ZERO", "SLOPE_ONLY"])
def test_the_other_modes_fit_the_registers(tmp_path, arch, mode):
    for tile, aligned in largest("tf32x3"):
        kernel = compile_step(arch, tile, "tf32x3", aligned, ramp=False, more={mode: True})
        check(kernel, arch, tmp_path)
        multiplies = any(name in kernel.asm["ptx"] for name in ("mma.sync", "wgmma.mma"))
        assert multiplies == (mode == "SLOPE_ONLY")


def test_exact_and_narrow_products_are_made_by_tensor_cores():
    tile = offered("tf32x3")[0][0]
    of = {p: compile_step(80, tile, p, True).asm["ptx"] for p in ("tf32x3", "tf32", "ieee")}
    assert all("bf16.bf16" in ptx for ptx in of.values())
    # A product with plain tf32 would have a third of the instructions.
    assert of["tf32x3"].count("tf32.tf32") == 3 * of["tf32"].count("tf32.tf32") > 0
    assert "tf32" not in of["ieee"]


def test_arguments_that_are_one_compile():
    """Triton makes them constants."""
    tile = offered("tf32x3")[0][0]
    ones = ("batch", "size", "tiles", "value_stride", "g_stride")
    ones += ("weight_stride_output", "weight_stride_input")
    assert compile_step(80, tile, "ieee", False, ramp=False, more=dict.fromkeys(ones, 1))


def test_a_spilling_step_is_noticed(tmp_path):
    tile = offered("tf32x3")[0][0]
    kernel = compile_step(90, tile, "tf32x3", True, maxnreg=32)
    assert resources(kernel, tmp_path)["STACK"] > 0
