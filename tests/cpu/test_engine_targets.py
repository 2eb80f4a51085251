"""The CPU engine on instruction sets other than this machine's best one."""

import ctypes
import os
import shutil
import subprocess
import sys

import pytest
import torch
from engine_cases import Adjoint, Call, Forward, Outputs, make_adjoint, make_forward, perturbed
from engine_checks import check_agreement
from engine_self_check import SIZES, check_vector_functions
from paths import CASES, ROOT

from fastdeq.activations import ACTIVATIONS
from fastdeq.backends import extension
from fastdeq.solvers import Picard

COMPILER = os.environ.get("CXX", "c++").split()


def why_no_avx2():
    """Why the engine for AVX2 cannot be compiled and run here; empty when it can."""
    if shutil.which(COMPILER[0]) is None:
        return "no C++ compiler"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "" if capabilities.get("avx2") and capabilities.get("fma3") else "the CPU has no AVX2"


@pytest.mark.skipif(
    extension.module is None, reason=f"no compiled extension: {extension.why_missing}"
)
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lower_capability(capability):
    if capability == "avx2" and why_no_avx2().startswith("the CPU"):
        pytest.skip(why_no_avx2())
    done = subprocess.run(
        [sys.executable, str(CASES / "engine_self_check.py")],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = extension.build_info["engine"].partition("compiled in: ")[2].split()
    expected = "avx2" if capability == "avx2" and "avx2" in compiled else "generic"
    assert done.stdout.split()[-1] == expected


class Engine:
    """The functions of engine_target.cpp on tensors."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        self.library.engine_name.restype = ctypes.c_char_p

    def _function(self, name, dtype):
        return getattr(self.library, f"{name}_{'float' if dtype == torch.float32 else 'double'}")

    def activate(self, x, name, derivative):
        x = x.contiguous()
        out = torch.full_like(x, 7.0)
        self._function("activate", x.dtype)(
            list(ACTIVATIONS).index(name),
            derivative,
            *(ctypes.c_void_p(t.data_ptr()) for t in (x, out)),
            ctypes.c_int64(x.numel()),
        )
        return out

    def solve(self, case, call):
        forward = isinstance(case, Forward)
        rows = case.injection if forward else case.grad
        batch, size = rows.shape
        value, slope = torch.empty_like(rows), torch.empty_like(rows)
        status = torch.empty(batch, dtype=torch.int8)
        iterations, residual = status.int(), torch.empty(batch, dtype=rows.dtype)
        pointer = [
            ctypes.c_void_p(None if t is None else t.data_ptr())
            for t in (case.weight, rows, None if forward else case.slope)
        ]
        self._function("picard", rows.dtype)(
            ctypes.c_int64(size),
            ctypes.c_int64(batch),
            *pointer,
            list(ACTIVATIONS).index(case.activation) if forward else 0,
            ctypes.c_double(call.tol),
            ctypes.c_int64(call.max_iter),
            *(ctypes.c_void_p(t.data_ptr()) for t in (value, slope, status, iterations, residual)),
        )
        rejects = torch.empty(batch, 0, dtype=torch.int32)
        return Outputs(value, status, iterations, residual, rejects, slope if forward else None)


@pytest.fixture(scope="module")
def avx2(tmp_path_factory):
    if why_no_avx2():
        pytest.skip(why_no_avx2())
    library = tmp_path_factory.mktemp("engine") / "libavx2.so"
    csrc = ROOT / "csrc"
    sources = [CASES / "engine_target.cpp", csrc / "cpu" / "target_avx2.cpp"]
    flags = ["-O3", "-std=c++20", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{csrc}"]
    defines = ["-DENGINE=engine_avx2", "-DFASTDEQ_HAS_AVX2"]
    command = [*COMPILER, *flags, *defines, "-o", str(library), *map(str, sources)]
    subprocess.run(command, check=True, timeout=120)
    return Engine(library)


def test_avx2_vector_functions(avx2):
    assert avx2.library.engine_name() == b"avx2"
    check_vector_functions(avx2.activate, "avx2")


@pytest.mark.parametrize("size", SIZES)
def test_avx2_solves(avx2, size):
    for dtype, tol in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        call = Call(Picard(), tol, 90)
        for case in (make_forward(9, size, dtype), make_adjoint(9, size, dtype)):
            outputs = avx2.solve(case, call)
            check_agreement(case, call, outputs, case.reference(call))
            if isinstance(case, Forward):
                expected = ACTIVATIONS["tanh"].slope(case.pre(outputs.value)).to(dtype)
                torch.testing.assert_close(outputs.value_slope, expected)


@pytest.mark.parametrize("make", [make_forward, make_adjoint])
def test_avx2_comparison_sees_a_planted_error(avx2, make):
    case, call = make(9, 33, torch.float32), Call(Picard(), 1e-4, 90)
    with pytest.raises(AssertionError):
        check_agreement(case, call, avx2.solve(perturbed(case, "row"), call), case.reference(call))


def test_avx2_slots_are_free_of_those_before(avx2):
    """Four slots take all samples in turn: NaN must not stay in one."""
    case, call = make_forward(40, 21, torch.float32), Call(Picard(), 1e-4, 90)
    clean = avx2.solve(case, call)
    bad = case.injection.clone()
    bad[::3] = torch.nan
    outputs = avx2.solve(Forward(case.weight, bad), call)
    others = torch.arange(40) % 3 != 0
    for name in ("value", "iterations", "residual", "value_slope"):
        assert torch.equal(getattr(outputs, name)[others], getattr(clean, name)[others])
    grad = Adjoint(case.weight, torch.ones_like(bad), bad)
    assert avx2.solve(grad, call).value[~others].isnan().all()
    assert avx2.solve(grad, call).value[others].isfinite().all()
