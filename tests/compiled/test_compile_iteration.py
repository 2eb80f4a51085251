"""The kernels of the iteration of general maps compile for sm_80 and sm_90 without spilling. No GPU
is needed, and none is used."""

from __future__ import annotations

import pytest
from compile_cases import (
    architectures,
    check_resources,
    compile_kernel,
    needs_triton,
    resources,
)

from fastdeq import Anderson, HeavyBall, Picard
from fastdeq.solvers import SolveOptions

pytestmark = [pytest.mark.compiled, needs_triton]
TYPES = {"running": "*i1", "flags": "*i32", "places": "*i32"}
TYPES |= dict.fromkeys(("spans", "firsts", "addresses"), "*i64")
TYPES |= dict.fromkeys(("settings", "numbers", "norms", "products", "gram", "gamma"), "*fp64")
DIVIDED = ("sums_kernel", "decide_kernel", "step_kernel")
AUTO = Anderson(window=10, first_window=2, accelerate_above=0.4)


def compiled(name, arch, solver, size, dtype="fp32", *, offset=True, several=True, **more):
    """One of the kernels as a launch has it, for rows of that length; by default with an offset,
    and several parts of the state."""
    from fastdeq.kernels.iteration import engine, kernels

    options = SolveOptions.of(solver, tol=1e-4, max_iter=100)
    buffers = {field: TYPES.get(field, f"*{dtype}") for field in engine.Buffers._fields}
    kernel = getattr(kernels, name)
    launch = dict(engine.tile_of(options, size))
    constants = engine.constants_of(options, offset, several)
    constants |= {"BLOCK": launch.pop("BLOCK")}
    aligned = size % 16 == 0  # and so is each part
    constants |= {} if several else {"parts": 1}
    constants |= {} if several and aligned else {"unit": 1}
    if name == "decide_kernel" and not constants["COLUMNS"]:
        launch = {"num_warps": 1}
    names = kernel.arg_names
    divisible = ["buffers", "length", *(["size", "unit"] if aligned else [])]
    return compile_kernel(
        kernel,
        arch,
        {"buffers": engine.Buffers(**buffers)},
        {key: value for key, value in constants.items() if key in names},
        [key for key in divisible if key in names],
        **{**launch, **more},
    )


def launches(size):
    from fastdeq.kernels.iteration import state

    return ("iterate_kernel",) if size <= state.ONE_LAUNCH else DIVIDED


CASES = [
    (Picard(), 1024, {}),
    (Picard(damping=0.7), 1001, {}),
    (Picard(fixed_iterations=9), 70_000, {"offset": False, "several": False}),
    (HeavyBall(), 1024, {}),
    (HeavyBall(), 70_001, {}),
    (Anderson(window=1), 64, {"offset": False, "several": False}),
    (Anderson(damping=0.7), 70_000, {}),
    (AUTO, 1024, {}),
    (AUTO, 70_001, {}),
    (Anderson(window=32, damping=0.7), 4096, {}),
    (Anderson(window=32), 70_001, {}),
]


@pytest.mark.parametrize(("arch", "dtype"), [(80, "fp64"), (90, "fp32")])
@pytest.mark.parametrize(("solver", "size", "how"), CASES, ids=lambda x: str(x)[:40])
def test_an_iteration_fits_the_registers(solver, size, how, dtype, arch, tmp_path):
    for name in launches(size):
        check_resources(compiled(name, arch, solver, size, dtype, **how), arch, tmp_path)


@pytest.mark.parametrize(("arch", "dtype"), [(90, "fp64"), (80, "fp32")])
def test_the_solver_of_auto_fits_the_registers(dtype, arch, tmp_path):
    for size in (1024, 70_001):
        for name in launches(size):
            check_resources(compiled(name, arch, AUTO, size, dtype), arch, tmp_path)


@architectures
def test_the_beginning_fits_the_registers(arch, tmp_path):
    from fastdeq.kernels.iteration.begin import begin_kernel

    floats = [p.name for p in begin_kernel.params if p.annotation_type]
    signature = {"settings": "*fp64", "numbers": "*fp64", "flags": "*i32"}
    signature |= dict.fromkeys(floats, "fp64")
    assert {p.annotation_type for p in begin_kernel.params if p.name in floats} == {"fp64"}
    kernel = compile_kernel(
        begin_kernel, arch, signature, {"PLAIN": 1}, ["settings", "numbers", "flags"], num_warps=1
    )
    check_resources(kernel, arch, tmp_path)


@architectures
@pytest.mark.parametrize("several", [False, True])
def test_rows_are_read_and_written_in_whole_vectors(several, arch):
    """Where 16 divides n and its parts, also those of the history, whose addresses come from a
    table."""

    def vectors(name, solver, size):
        ptx = compiled(name, arch, solver, size, several=several).asm["ptx"]
        return ptx.count("ld.global.v4.b32"), ptx.count("st.global.v4.b32")

    # Eight entries to a thread, of value, offset and point; of the best iterate and the next point.
    assert vectors("step_kernel", Picard(damping=0.7), 70_000) == (6, 4)
    assert vectors("step_kernel", Picard(damping=0.7), 70_001)[1] == 0
    for name in ("step_kernel", "sums_kernel"):  # but for the tables of addresses and of weights
        assert vectors(name, AUTO, 70_000)[0] > vectors(name, AUTO, 70_001)[0]


def test_a_spill_is_noticed(tmp_path):
    kernel = compiled("iterate_kernel", 80, AUTO, 1024, maxnreg=32)
    assert resources(kernel, tmp_path)["STACK"] > 0
