"""The solvers' kernels in steps/, and those that begin and end a solve, compile for sm_80 and sm_90
without spilling. No GPU is needed, and none is used."""

from __future__ import annotations

import re

import pytest
from compile_cases import (
    architectures,
    check_resources,
    compile_kernel,
    needs_triton,
    resources,
)

pytestmark = [pytest.mark.compiled, needs_triton]

FLOATS = ("points", "value", "sums", "numbers", "f_history", "g_history", "start_rows", "grad")
FLOATS += ("slope", "offset", "pre", "residual", "work")
POINTERS = dict.fromkeys(FLOATS, "*fp32")
POINTERS |= dict.fromkeys(("flags", "remaining", "iterations", "rejects"), "*i32")
POINTERS |= {"change": "*bf16", "gram": "*fp64", "status": "*i8"}
SCALARS = dict.fromkeys(
    ("tol", "atol", "damping", "undamped", "safeguard", "accelerate_above", "radius"), "fp32"
)
SCALARS |= dict.fromkeys(("regularization", "rank_tolerance", "max_weight"), "fp64")
ALIGNED = ("size", "slot_stride")


def compiled(kernel, arch, size, constants, *, missing=(), types=(), entries=8, **options):
    """As a launch has it, for rows of that length, aligned where 16 divides it; ``missing`` are
    None, ``entries`` those of a thread."""
    from fastdeq.kernels.steps.sample import rows_tile

    names = kernel.arg_names
    tile = rows_tile(size, entries)
    launch = {"num_warps": tile.pop("num_warps"), **options}
    constants = {**tile, **constants, **dict.fromkeys(missing)}
    signature = {**POINTERS, **SCALARS, "slot_stride": "i64", **dict(types)}
    signature = {k: v for k, v in signature.items() if k in names and k not in constants}
    divisible = [k for k, v in signature.items() if v.startswith("*")]
    divisible += [k for k in ALIGNED if k in names and size % 16 == 0]
    return compile_kernel(kernel, arch, signature, constants, divisible, **launch)


@architectures
@pytest.mark.parametrize("size", [1001, 4096])
@pytest.mark.parametrize("schedule", [False, True], ids=["full", "schedule"])
@pytest.mark.parametrize("method", ["plain", "damped", "heavy"])
def test_plain_and_heavy_ball_steps_fit_the_registers(method, schedule, size, arch, tmp_path):
    from fastdeq.kernels.steps.momentum import heavy_ball_kernel
    from fastdeq.kernels.steps.plain_steps import plain_kernel

    constants = {"SCHEDULE": schedule}
    if method != "heavy":
        constants |= {"DAMPED": method == "damped", "FIXED": method == "plain"}
    kernel = heavy_ball_kernel if method == "heavy" else plain_kernel
    check_resources(compiled(kernel, arch, size, constants), arch, tmp_path)


def anderson(arch, slots, size, *, damped, schedule, **options):
    from fastdeq.kernels.anderson_mix import tile_shape
    from fastdeq.kernels.steps.anderson_steps import REGISTERS, anderson_kernel

    columns, block, warps = tile_shape(slots, size)
    constants = {"DAMPED": damped, "SCHEDULE": schedule, "COLUMNS": columns, "BLOCK": block}
    launch = {"num_warps": warps, "maxnreg": REGISTERS[warps], **options}
    return compiled(anderson_kernel, arch, size, constants, **launch)


@pytest.mark.parametrize(
    ("slots", "size"), [(2, 64), (3, 1024), (6, 1024), (6, 1001), (11, 512), (33, 1024), (65, 4096)]
)
@architectures
@pytest.mark.parametrize(("damped", "schedule"), [(False, False), (True, True)])
def test_anderson_steps_fit_the_registers(slots, size, damped, schedule, arch, tmp_path):
    kernel = anderson(arch, slots, size, damped=damped, schedule=schedule)
    check_resources(kernel, arch, tmp_path)


def test_a_spill_is_noticed(tmp_path):
    kernel = anderson(90, 6, 1024, damped=True, schedule=True, maxnreg=32)
    assert resources(kernel, tmp_path)["STACK"] > 0
    kernel = energy(80, 1024, "tanh", True, maxnreg=40)
    assert resources(kernel, tmp_path)["STACK"] > 0


@architectures
@pytest.mark.parametrize("size", [1001, 4096])
@pytest.mark.parametrize("given", ["start", "grad", "half grad"])
def test_the_beginning_fits_the_registers(given, size, arch, tmp_path):
    from fastdeq.kernels.steps.begin_end import begin_kernel

    constants = {"MODE": 0, "LOWEST": 2, "PLAIN": 1}
    missing = ("grad",) if given == "start" else ("start_rows",)
    types = {"grad": "*fp16"} if given == "half grad" else {}
    kernel = compiled(begin_kernel, arch, size, constants, missing=missing, types=types)
    check_resources(kernel, arch, tmp_path)


@architectures
@pytest.mark.parametrize("size", [1001, 4096])
@pytest.mark.parametrize(("adjoint", "dtype"), [(False, "fp32"), (True, "bf16")])
def test_the_end_fits_the_registers(adjoint, dtype, size, arch, tmp_path):
    from fastdeq.kernels.steps.begin_end import end_kernel, slope_kernel

    constants = {"ADJOINT": adjoint, "WITH_SLOPE": True, "SLOTS": 2, "COUNTERS": 3}
    kernel = compiled(end_kernel, arch, size, constants, types={"value": f"*{dtype}"})
    check_resources(kernel, arch, tmp_path)
    if not adjoint:
        kernel = compiled(slope_kernel, arch, size, {"ACTIVATION": 8})  # gelu
        check_resources(kernel, arch, tmp_path)


def test_numbers_that_decide_arrive_in_the_precision_they_are_used_in():
    """A Python float without an annotation would arrive as float32, and compile anew for 1.0."""
    from fastdeq.kernels.steps.anderson_steps import anderson_kernel
    from fastdeq.kernels.steps.plain_steps import plain_kernel
    from fastdeq.kernels.whole.kernel import whole_kernel

    for kernel in (plain_kernel, anderson_kernel, whole_kernel):
        types = {p.name: p.annotation_type for p in kernel.params if p.annotation_type}
        assert types == {name: SCALARS[name] for name in kernel.arg_names if name in SCALARS}


def energy(arch, size, activation, schedule, **options):
    from fastdeq.kernels.activations import INDEX
    from fastdeq.kernels.steps.energy import MAX_REGISTERS, energy_kernel

    constants = {"ACTIVATION": INDEX[activation], "SCHEDULE": schedule}
    launch = {"entries": 4, "maxnreg": MAX_REGISTERS, **options}
    return compiled(energy_kernel, arch, size, constants, **launch)


def minres(arch, size, schedule):
    from fastdeq.kernels.steps.minres import MAX_REGISTERS, minres_kernel

    launch = {"entries": 4, "maxnreg": MAX_REGISTERS}
    return compiled(minres_kernel, arch, size, {"SCHEDULE": schedule}, **launch)


def check_rows(kernel, arch, folder):
    check_resources(kernel, arch, folder)
    # What one thread writes in a pass, the same one reads in the next: rows of float32 have one
    # layout in all passes, and no value changes hands.
    assert "ttg.convert_layout" not in kernel.asm["ttgir"]
    stores = re.findall(r"tt\.store .*tensor<\d+x!tt\.ptr<f32>, (#\w+)>", kernel.asm["ttgir"])
    assert len(stores) >= 10
    assert len(set(stores)) == 1


@architectures
@pytest.mark.parametrize(
    ("activation", "schedule"), [("tanh", False), ("tanh", True), ("softplus", True)]
)
def test_the_energy_kernel_fits_the_registers(activation, schedule, arch, tmp_path):
    check_rows(energy(arch, 1024, activation, schedule), arch, tmp_path)


# sm_80 is the one that needed a limit to the registers.
@pytest.mark.parametrize(
    "activation", ["sigmoid", "elu", "hardtanh", "relu", "leaky_relu", "identity"]
)
def test_the_energy_kernel_of_every_monotone_activation(activation, tmp_path):
    check_rows(energy(80, 1024, activation, True), 80, tmp_path)


@pytest.mark.parametrize(("size", "arch"), [(33, 80), (1001, 90)])
def test_the_energy_kernel_without_alignment(size, arch, tmp_path):
    check_rows(energy(arch, size, "tanh", True), arch, tmp_path)


@pytest.mark.parametrize(
    ("size", "arch", "schedule"),
    [(4096, 80, True), (4096, 90, True), (33, 80, False), (1001, 90, True)],
)
def test_the_minres_kernel_fits_the_registers(size, schedule, arch, tmp_path):
    check_rows(minres(arch, size, schedule), arch, tmp_path)
