"""The whole-solve kernel compiles for sm_80 and sm_90 without spilling a register."""

import pytest
from compile_cases import ARCHITECTURES, SHARED_LIMITS, compile_kernel, resources, why_no_triton

from fastdeq.solvers import Anderson

pytestmark = pytest.mark.skipif(bool(why_no_triton()), reason=why_no_triton() or "triton is here")

HISTORY = ("f_ptr", "g_ptr", "gram_ptr", "weights_ptr", "notes_ptr", "rejects_ptr")
INTEGERS = {"status_ptr": "*i8", "iterations_ptr": "*i32", "rejects_ptr": "*i32"}
INTEGERS |= {"notes_ptr": "*i32", "gram_ptr": "*fp64"}


def compile_solve(arch, solver, size, adjoint, window=0, **more):
    import triton
    from fastdeq.kernels import whole_solve
    from fastdeq.kernels.whole_kernel import whole_solve_kernel as kernel

    block, padded, chunk, warps = whole_solve.tile_shape(size, solver)
    constants = {
        "SOLVER": whole_solve._METHODS[solver].value,
        "ACTIVATION": -1 if adjoint else 3,
        "FIXED": False,
        "DAMPED": False,
        "WINDOW": window,
        "OLDER": triton.next_power_of_2(window + 1),
        "BLOCK_M": block,
        "SIZE": padded,
        "CHUNK": chunk,
        "PRECISION": "tf32x3",
        "start_ptr": None,
    }
    constants |= (
        {"value_slope_ptr": None, "w_stride_output": 1}
        if adjoint
        else {"slope_ptr": None, "w_stride_input": 1}
    )
    if not window:
        constants |= dict.fromkeys(HISTORY)
    signature = dict(INTEGERS)
    signature |= dict.fromkeys(("tol", "first", "safeguard", "accelerate_above"), "fp32")
    signature |= dict.fromkeys(("regularization", "rank_tolerance", "max_weight"), "fp64")
    aligned = [name for name in kernel.arg_names if name.endswith("_ptr")]
    if size % 16 == 0:
        aligned += ["size", "w_stride_input", "w_stride_output"]
    return compile_kernel(kernel, arch, signature, constants, aligned, num_warps=warps, **more)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("adjoint", [False, True], ids=["forward", "adjoint"])
@pytest.mark.parametrize(
    ("solver", "size", "window"),
    [
        ("picard", 16, 0),
        ("picard", 60, 0),
        ("heavy_ball", 100, 0),
        ("heavy_ball", 128, 0),
        ("anderson", 16, Anderson().window),
        ("anderson", 31, Anderson().window),
        ("anderson", 64, 8),
        ("anderson", 100, Anderson().window),
    ],
    ids=str,
)
def test_no_register_is_spilled(tmp_path, solver, size, window, adjoint, arch):
    from fastdeq.kernels.whole_solve import shared_bytes

    kernel = compile_solve(arch, solver, size, adjoint, window)
    found = resources(kernel, tmp_path)
    print(kernel.metadata.shared, found)
    assert found["STACK"] == found["LOCAL"] == 0
    assert kernel.metadata.shared <= max(shared_bytes(size), 4096) <= SHARED_LIMITS[arch]


def test_a_spill_is_noticed(tmp_path):
    kernel = compile_solve(90, "picard", 64, False, maxnreg=32)
    assert resources(kernel, tmp_path)["STACK"] > 0
