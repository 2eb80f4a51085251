"""The GPU kernels compile for sm_80 and sm_90 without spilling; no GPU is needed, and none is used.

A spilled register turns arithmetic into memory traffic, so a spill is a failure here. Both parts
first show that they would see one.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
from compile_cases import (
    ARCHITECTURES,
    compile_kernel,
    find_nvcc,
    needs_nvcc,
    needs_triton,
    ptxas_spills,
    resources,
)
from paths import ROOT

CUDA_SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# What every block may use without asking the driver for more.
SHARED_LIMIT = 48 * 1024

pytestmark = pytest.mark.compiled


def compile_mix(arch, dtype, slots, size, *, damped=True, layout="aligned", **more):
    """The Triton anderson_mix compiled for one architecture, as its launcher would have it."""
    from fastdeq.kernels.anderson_mix import anderson_mix_kernel as kernel
    from fastdeq.kernels.anderson_mix import tile_shape

    columns, block, warps = tile_shape(slots, size)
    constants = {"DAMPED": damped, "COLUMNS": columns, "BLOCK": block}
    if layout != "strided":
        ones = ("f_stride_entry", "g_stride_entry", "gram_stride_column", "count_stride")
        constants |= dict.fromkeys(ones, 1)
    aligned = []
    pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
    if layout == "aligned":  # as a solver stores its history when 16 divides n
        aligned = ["size", "f_stride_place", "f_stride_batch", "g_stride_place", "g_stride_batch"]
        aligned += pointers
    signature = dict.fromkeys(pointers, f"*{dtype}")
    signature |= {"gram_ptr": "*fp64", "count_ptr": "*i32", "dropped_ptr": "*i32"}
    signature["rejected_ptr"] = "*i1"
    options = ("undamped", "regularization", "rank_tolerance", "max_weight")
    signature |= dict.fromkeys(options, "fp64")
    return compile_kernel(kernel, arch, signature, constants, aligned, num_warps=warps, **more)


@needs_triton
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize(
    "shape",
    [
        {"slots": 2, "size": 64},
        {"slots": 6, "size": 1024},
        {"slots": 6, "size": 1024, "damped": False},
        {"slots": 6, "size": 1001, "layout": "unaligned"},
        {"slots": 6, "size": 1001, "layout": "strided"},
        {"slots": 33, "size": 1024},
        {"slots": 33, "size": 1001, "layout": "strided"},
        {"slots": 65, "size": 4096},
    ],
    ids=lambda shape: "-".join(f"{key}={value}" for key, value in shape.items()),
)
def test_triton_anderson_mix_fits_the_registers(tmp_path, shape, dtype, arch):
    kernel = compile_mix(arch, dtype, **shape)
    assert kernel.asm["cubin"]
    assert kernel.metadata.shared <= SHARED_LIMIT
    found = resources(kernel, tmp_path)
    print(f"shared {kernel.metadata.shared}", found)
    assert found["STACK"] == found["LOCAL"] == 0


@needs_triton
def test_a_spilling_triton_kernel_is_noticed(tmp_path):
    kernel = compile_mix(90, "fp32", slots=6, size=1024, maxnreg=32)
    assert resources(kernel, tmp_path)["STACK"] > 0


@needs_triton
def test_options_of_the_triton_kernel_arrive_in_double_precision():
    from fastdeq.kernels.anderson_mix import anderson_mix_kernel

    types = {p.name: p.annotation_type for p in anderson_mix_kernel.params if p.annotation_type}
    names = ("undamped", "regularization", "rank_tolerance", "max_weight")
    assert types == dict.fromkeys(names, "fp64")


def test_a_spill_in_a_report_of_ptxas_is_noticed():
    line = "ptxas info    : Function properties for kernel\n    {} bytes stack frame, "
    line += "{} bytes spill stores, {} bytes spill loads\n"
    assert ptxas_spills(line.format(0, 0, 0)) == {"kernel": 0}
    assert ptxas_spills(line.format(8, 4, 12)) == {"kernel": 24}


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("source", CUDA_SOURCES, ids=lambda path: path.name)
def test_cuda_sources_fit_the_registers(tmp_path, source, arch):
    """``-cubin`` leaves the host compiler out, but nvcc still checks the host code's types."""
    include = Path(torch.__file__).parent / "include"
    command = [
        *(find_nvcc(), "-cubin", "-O3", "-std=c++20", "--expt-relaxed-constexpr"),
        # The headers of a torch without CUDA lack one generated file.
        "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE",
        *("-isystem", include, "-isystem", include / "torch/csrc/api/include"),
        *("-I", ROOT / "csrc", f"-gencode=arch=compute_{arch},code=sm_{arch}"),
        *("-Xptxas", "-v", source, "-o", tmp_path / "kernel.cubin"),
    ]
    result = subprocess.run(
        [str(part) for part in command], check=False, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr
    spills = ptxas_spills(result.stderr)
    print(re.findall(r"Used \d+ registers", result.stderr))
    assert spills, result.stderr
    assert not any(spills.values()), spills


LAUNCHES = """
#include "cuda/rows.cuh"
template <typename T>
void launch(T* t, cudaStream_t stream) {
  fastdeq::cuda::scale_rows<T>(t, t, 2, 3, t, t, t, stream);
  fastdeq::cuda::restore_rows<T>(t, t, t, 2, 3, t, stream);
}
void launches(cudaStream_t stream) {
  launch<float>(nullptr, stream);
  launch<double>(nullptr, stream);
}
"""


@needs_nvcc
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_row_kernels_fit_the_registers(tmp_path, arch):
    source = tmp_path / "rows.cu"
    source.write_text(LAUNCHES)
    command = [find_nvcc(), "-cubin", "-O3", "-std=c++20", "--expt-relaxed-constexpr"]
    command += ["-I", ROOT / "csrc", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    command += ["-Xptxas", "-v", source, "-o", tmp_path / "rows.cubin"]
    result = subprocess.run(
        [str(part) for part in command], check=False, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    spills = ptxas_spills(result.stderr)
    print(re.findall(r"Used \d+ registers", result.stderr))
    assert len(spills) == 4, result.stderr
    assert not any(spills.values()), spills
