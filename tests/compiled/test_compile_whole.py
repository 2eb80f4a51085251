"""The whole-solve kernel compiles for sm_80 and sm_90 without spilling a register."""

import pytest
from compile_cases import ARCHITECTURES, check_resources, compile_kernel, needs_triton, resources

from fastdeq.solvers import Anderson

pytestmark = [pytest.mark.compiled, needs_triton]

HISTORY = ("history_ptr", "gram_ptr", "rejects_ptr")
INTEGERS = {"status_ptr": "*i8", "iterations_ptr": "*i32", "rejects_ptr": "*i32"}
INTEGERS |= {"gram_ptr": "*fp64"}


def compile_solve(arch, solver, size, adjoint, window=0, **more):
    import triton
    from fastdeq.kernels.whole import engine
    from fastdeq.kernels.whole.kernel import whole_kernel as kernel

    block, padded, chunk, warps = engine.tile_shape(size, solver)
    constants = {
        "SOLVER": engine.KERNEL_SOLVERS[solver].value,
        "ACTIVATION": -1 if adjoint else 3,
        "FIXED": False,
        "DAMPED": False,
        "WINDOW": window,
        "COLUMNS": triton.next_power_of_2(max(window, 1)),
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
    signature |= dict.fromkeys(
        ("tol", "atol", "damping", "radius", "safeguard", "accelerate_above"), "fp32"
    )
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
def test_no_register_is_spilled(tmp_path, request, solver, size, window, adjoint, arch):
    from fastdeq.kernels.whole.engine import shared_bytes

    if (solver, size, adjoint, arch) == ("anderson", 100, True, 80):
        reason = "24 bytes more than the addresses, in the loop; what they cost is to be measured"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    kernel = compile_solve(arch, solver, size, adjoint, window)
    # Where 16 does not divide n, addresses of the results may wait on the stack for the loop's end.
    check_resources(kernel, arch, tmp_path, stack=16 if size % 16 and size > 64 else 0)
    assert kernel.metadata.shared <= max(shared_bytes(size), 4096)


def test_a_spill_is_noticed(tmp_path):
    kernel = compile_solve(90, "picard", 64, False, maxnreg=32)
    assert resources(kernel, tmp_path)["STACK"] > 0
