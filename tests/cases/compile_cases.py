"""Compiles Triton kernels for an architecture without a GPU, and reads what they occupy."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

ARCHITECTURES = [80, 90]
architectures = pytest.mark.parametrize("arch", ARCHITECTURES)
# What one block may use at most, where the driver is asked for it.
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024}


def why_no_triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 replaces the compiler"
    return ""


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=f"{home}/bin") if home else None)


needs_triton = pytest.mark.skipif(bool(why_no_triton()), reason=why_no_triton() or "triton is here")
needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")


def compile_kernel(
    kernel: Any,
    arch: int,
    signature: Mapping[str, Any],
    constants: Mapping[str, Any],
    divisible: Iterable[str] = (),
    num_warps: int = 4,
    num_stages: int = 3,
    **options: Any,
) -> Any:
    """The kernel as a launcher would have it compiled for ``sm_<arch>``.

    ``signature`` names the types of the arguments ("*fp32", "i32", "fp32", ...) that are neither
    pointers to float32 (``..._ptr``) nor int32; ``constants`` are the ``tl.constexpr`` ones and
    those that a launch makes constant: a stride of 1, a pointer that is None. The arguments in
    ``divisible``, pointers or integers, are multiples of 16; of a named tuple of pointers all are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    unknown = {*signature, *constants, *divisible} - {*names}
    assert not unknown, f"{kernel.__name__} has no arguments {sorted(unknown)}"
    types = {}
    for name in names:
        if name in constants:
            types[name] = "constexpr"
        else:
            types[name] = signature.get(name, "*fp32" if name.endswith("_ptr") else "i32")
    paths: list[tuple[int, ...]] = []
    for name in divisible:
        if name in constants:
            continue
        i, kind = names.index(name), types[name]
        paths += [(i, j) for j in range(len(kind))] if isinstance(kind, tuple) else [(i,)]
    attributes = {path: [["tt.divisibility", 16]] for path in paths}
    source = ASTSource(kernel, types, dict(constants), attributes)
    launch = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True}
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        return triton.compile(
            source, target=GPUTarget("cuda", arch, 32), options={**launch, **options}
        )


def resources(kernel: Any, folder: Path) -> dict[str, int]:
    """REG per thread, bytes of STACK and LOCAL, from the cubin. Spills live on the stack."""
    import triton

    cubin = Path(folder) / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    report = subprocess.run(
        [tool, "-res-usage", str(cubin)], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    found = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)
    assert len(found) == 3, report
    return {name: int(value) for name, value in found}


def check_resources(kernel: Any, arch: int, folder: Path, stack: int = 0) -> None:
    """Nothing is spilled, and a block may have as much shared memory. ``stack``: so many bytes may
    be put there before the first matrix instruction, to be read after the last."""
    assert kernel.metadata.shared <= SHARED_LIMITS[arch]
    found = resources(kernel, folder)
    print(f"shared {kernel.metadata.shared}", found)
    assert found["STACK"] <= stack
    assert found["LOCAL"] == 0
    if found["STACK"]:
        import triton

        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(Path(folder) / "kernel.cubin")]
        report = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        at = {
            name: [m.start() for m in re.finditer(rf"\b{name}\b", report.stdout)]
            for name in ("STL", "LDL", "HMMA", "HGMMA")
        }
        products = sorted(at["HMMA"] + at["HGMMA"])
        assert max(at["STL"]) < products[0] < products[-1] < min(at["LDL"])


def ptxas_spills(report: str) -> dict[str, int]:
    """Bytes of stack and spills of each kernel in a report of ``ptxas -v``."""
    found = re.findall(
        r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads",
        report,
    )
    return {name: sum(map(int, numbers)) for name, *numbers in found}
