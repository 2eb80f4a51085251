"""The affine step compiles for sm_80 and sm_90 without spilling, with every
tile that a launch may choose. No GPU is needed, and none is used.

What needs most registers is compiled: the precision schedule, a history, pre-activations and gelu.
"""

from __future__ import annotations

import pytest
from compile_cases import (
    ARCHITECTURES,
    check_resources,
    compile_kernel,
    needs_triton,
    resources,
    why_no_triton,
)

pytestmark = [pytest.mark.compiled, needs_triton]

LARGE_BATCH, SMALL_BATCH = 1000, 32


def offered(precision, library=False):
    """(tile, aligned), of all sizes of batches."""
    if why_no_triton():
        return []
    from fastdeq.kernels.steps.tile_choice import candidates

    found = {
        (tile, aligned): None
        for aligned in (True, False)
        for batch in (SMALL_BATCH, LARGE_BATCH)
        for tile in candidates(batch, aligned, precision, library)
    }
    return list(found)


def largest(precision, library=False):
    """The largest tile for aligned rows, and the largest for others."""
    tiles = offered(precision, library)
    return list({aligned: (tile, aligned) for tile, aligned in tiles}.values())


def compile_step(
    arch,
    tile,
    precision,
    aligned,
    activation="gelu",
    *,
    schedule=True,
    library=False,
    more=None,
    **options,
):
    """As a launch with contiguous tensors would have it; without ``activation`` an adjoint, whose
    M is a transpose."""
    from fastdeq.kernels.activations import INDEX
    from fastdeq.kernels.steps.affine_step import affine_step_kernel

    blocks = dict(tile.config().kwargs)
    constants = {
        "ACTIVATION": INDEX[activation] if activation else -1,
        "AT_ZERO": False,
        "PRECISION": precision,
        "weight_stride_input" if activation else "weight_stride_output": 1,
        "low_stride_input" if activation else "low_stride_output": 1,
        **blocks,
    }
    if activation:
        constants["slope_ptr"] = None
    if not library:
        constants["product_ptr"] = None
    if not schedule:
        constants |= {"change_ptr": None, "low_ptr": None}
        constants |= {"low_stride_output": 0, "low_stride_input": 0}
    names = affine_step_kernel.arg_names
    divisible = [name for name in names if name.endswith("_ptr")]
    if aligned:
        divisible += ["size", *(name for name in names if "stride" in name)]
    return compile_kernel(
        affine_step_kernel,
        arch,
        {"change_ptr": "*bf16", "low_ptr": "*bf16", "flags_ptr": "*i32"},
        {**constants, **(more or {})},
        divisible,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **options,
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("tile", "aligned"), offered("tf32x3"))
def test_every_tile_fits_the_registers(tmp_path, arch, tile, aligned):
    check_resources(compile_step(arch, tile, "tf32x3", aligned), arch, tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("tile", "aligned"), largest("ieee"))
def test_the_largest_tiles_fit_the_registers_without_tensor_cores(tmp_path, arch, tile, aligned):
    check_resources(compile_step(arch, tile, "ieee", aligned), arch, tmp_path)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize(("tile", "aligned"), largest("tf32x3"))
def test_an_adjoint_fits_the_registers(tmp_path, arch, tile, aligned):
    check_resources(compile_step(arch, tile, "tf32x3", aligned, None), arch, tmp_path)


def multiplies(kernel):
    return any(name in kernel.asm["ptx"] for name in ("mma.sync", "wgmma.mma"))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_without_a_product_nothing_is_multiplied(tmp_path, arch):
    for tile, aligned in largest("tf32x3"):
        kernel = compile_step(arch, tile, "tf32x3", aligned, schedule=False, more={"AT_ZERO": True})
        check_resources(kernel, arch, tmp_path)
        assert not multiplies(kernel)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("schedule", [False, True])
def test_products_of_the_library_fit_the_registers(tmp_path, arch, schedule):
    """Without the schedule the kernel multiplies nothing, and a small tile is launched."""
    tiles = largest("tf32x3", library=True) if schedule else offered("tf32x3")[:1]
    for tile, aligned in tiles:
        kernel = compile_step(arch, tile, "tf32x3", aligned, schedule=schedule, library=True)
        check_resources(kernel, arch, tmp_path)
        assert multiplies(kernel) == schedule
        assert "bf16.bf16" not in kernel.asm["ptx"]


def test_tensor_cores_make_products_of_both_precisions():
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
    assert compile_step(80, tile, "ieee", False, schedule=False, more=dict.fromkeys(ones, 1))


def test_a_spilling_step_is_noticed(tmp_path):
    tile = offered("tf32x3")[0][0]
    kernel = compile_step(90, tile, "tf32x3", True, maxnreg=32)
    assert resources(kernel, tmp_path)["STACK"] > 0
