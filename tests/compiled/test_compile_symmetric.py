"""The advance kernels of the symmetric solvers compile for sm_80 and sm_90 without spilling. No GPU
is needed, and none is used."""

from __future__ import annotations

import re

import pytest
from compile_cases import ARCHITECTURES, SHARED_LIMITS, compile_kernel, resources, why_no_triton

pytestmark = pytest.mark.skipif(bool(why_no_triton()), reason=why_no_triton() or "triton is here")

SIGNATURE = dict.fromkeys(
    ("points", "value", "pre", "slope", "sums", "numbers", "work"), "*fp32"
) | {"change": "*bf16", "flags": "*i32", "remaining": "*i32", "slot": "i64", "tol": "fp32"}
architectures = pytest.mark.parametrize("arch", ARCHITECTURES)


def compiled(module, kernel, arch, size, constants, **options):
    """As the launcher has it; rows are aligned where 16 divides ``size``."""
    block, warps = module.tile_of(size)
    signature = {name: kind for name, kind in SIGNATURE.items() if name in kernel.arg_names}
    divisible = [name for name, kind in signature.items() if kind.startswith("*")]
    divisible += ["size", "slot"] if size % 16 == 0 else []
    launch = {"num_warps": warps, "maxnreg": module.MAX_REGISTERS, **options}
    constants = {**constants, "BLOCK": block}
    return compile_kernel(kernel, arch, signature, constants, divisible, **launch)


def energy(arch, size, activation, ramp, **options):
    from fastdeq.kernels import energy
    from fastdeq.kernels.activations import INDEX

    constants = {"ACTIVATION": INDEX[activation], "RAMP": ramp}
    return compiled(energy, energy.advance_energy_kernel, arch, size, constants, **options)


def minres(arch, size, ramp):
    from fastdeq.kernels import minres

    return compiled(minres, minres.advance_minres_kernel, arch, size, {"RAMP": ramp})


def check(kernel, arch, folder):
    assert kernel.metadata.shared <= SHARED_LIMITS[arch]
    found = resources(kernel, folder)
    print(f"shared {kernel.metadata.shared}", found)
    assert found["STACK"] == found["LOCAL"] == 0
    # What one thread writes in a pass, the same one reads in the next: rows of float32 have one
    # layout in all passes, and no value changes hands.
    assert "ttg.convert_layout" not in kernel.asm["ttgir"]
    stores = re.findall(r"tt\.store .*tensor<\d+x!tt\.ptr<f32>, (#\w+)>", kernel.asm["ttgir"])
    assert len(stores) >= 10
    assert len(set(stores)) == 1


@architectures
@pytest.mark.parametrize(
    ("activation", "ramp"), [("tanh", False), ("tanh", True), ("softplus", True)]
)
def test_the_energy_kernel_fits_the_registers(activation, ramp, arch, tmp_path):
    check(energy(arch, 1024, activation, ramp), arch, tmp_path)


# sm_80 is the one that needed a limit to the registers.
@pytest.mark.parametrize(
    "activation", ["sigmoid", "elu", "hardtanh", "relu", "leaky_relu", "identity"]
)
def test_the_energy_kernel_of_every_monotone_activation(activation, tmp_path):
    check(energy(80, 1024, activation, True), 80, tmp_path)


@pytest.mark.parametrize(("size", "arch"), [(33, 80), (1001, 90)])
def test_the_energy_kernel_without_alignment(size, arch, tmp_path):
    check(energy(arch, size, "tanh", True), arch, tmp_path)


@pytest.mark.parametrize(
    ("size", "arch", "ramp"),
    [(4096, 80, True), (4096, 90, True), (33, 80, False), (1001, 90, True)],
)
def test_the_minres_kernel_fits_the_registers(size, ramp, arch, tmp_path):
    check(minres(arch, size, ramp), arch, tmp_path)


def test_a_spill_is_noticed(tmp_path):
    kernel = energy(80, 1024, "tanh", True, maxnreg=40)
    assert resources(kernel, tmp_path)["STACK"] > 0
