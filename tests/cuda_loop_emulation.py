"""The kernels of csrc/cuda/loop.cuh on an emulated GPU, as solves of engine_cases' problems."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_double,
    c_int32,
    c_int64,
    c_uint64,
    c_void_p,
)
from pathlib import Path
from typing import NamedTuple

import torch
from engine_cases import Adjoint, Call, Case, Forward, Outputs
from engine_checks import true_residual, unit_of

from fastdeq import affine, driver
from fastdeq.activations import ACTIVATIONS
from fastdeq.solution import Status
from fastdeq.solvers import Anderson, HeavyBall, Picard

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "c++").split()
_INDEX = {name: i for i, name in enumerate(ACTIVATIONS)}

SOLVERS = (
    Picard(),
    Picard(damping=0.7),
    HeavyBall(),
    Anderson(),
    Anderson(damping=0.7),
    Anderson(window=1),
    Anderson(window=63),  # above the number of iterations
    Anderson(accelerate_above=0.5),
    Anderson(accelerate_above=0.5, damping=0.7, window=3),
    Anderson(regularization=1e-6, rank_tolerance=1e-4, max_weight=2.0, safeguard=1.0),
)
TOL = {torch.float32: 1e-4, torch.float64: 1e-9}


class _Call(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("size", "batch")),
        *((name, c_void_p) for name in ("factor", "offset", "slope", "start")),
        *((n, c_int32) for n in ("activation", "max_iter", "fixed", "patience", "momentum")),
        ("window", c_int32),
        *((name, c_double) for name in ("tol", "damping", "radius", "regularization")),
        *((name, c_double) for name in ("rank_tolerance", "max_weight")),
        *((name, c_double) for name in ("safeguard", "accelerate_above")),
        *((name, c_int32) for name in ("ramp", "graph", "pack")),
        *((n, c_void_p) for n in ("value", "status", "iterations", "residual", "rejects")),
        ("value_slope", c_void_p),
        ("seed", c_uint64),
        ("skip", c_char_p),
        *((name, c_int32) for name in ("skipped", "exact_products", "narrow_products")),
    )


class Products(NamedTuple):
    """How many products of each kind the last solve took."""

    exact: int
    narrow: int


def compile_emulation(folder: Path) -> ctypes.CDLL:
    library = folder / "loop.so"
    command = [*COMPILER, "-O2", "-std=c++20", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas"]
    command += ["-I", ROOT / "tests/cuda_emulator", "-I", ROOT / "csrc", "-shared", "-fPIC"]
    command += [ROOT / "tests/cuda_emulator/loop.cpp", "-o", library]
    subprocess.run([str(part) for part in command], check=True, timeout=120)
    loaded = ctypes.CDLL(str(library))
    loaded.loop_solve_call.argtypes = [POINTER(_Call), ctypes.c_int]
    loaded.loop_solve_call.restype = c_char_p
    return loaded


def _solver_options(solver: Picard | Anderson | HeavyBall) -> dict[str, float]:
    if isinstance(solver, HeavyBall):
        return {"momentum": 1, "radius": solver.radius, "damping": 1.0}
    if isinstance(solver, Picard):
        return {"damping": solver.damping, "fixed": solver.fixed_iterations}
    return dataclasses.asdict(solver)


@dataclasses.dataclass
class Emulation:
    """Solves on the emulated machine; what may be had from a GPU in other ways are options.

    ``graph``: the loop ends when the device says so, otherwise after all iterations; ``pack``:
    numbers in one access; ``ramp``: bfloat16 products.
    """

    library: ctypes.CDLL
    seed: int = 0
    products: Products | None = None
    skipped: bool = False

    def solve(
        self,
        case: Case,
        call: Call,
        *,
        ramp: bool = False,
        graph: bool = True,
        pack: int = 1,
        skip: str = "",
    ) -> Outputs:
        dtype = affine.working_dtype(*case.tensors())
        forward = isinstance(case, Forward)
        rows = case.injection if forward else case.grad
        batch, size = rows.shape
        scaled, unit = rows.to(dtype), None
        if isinstance(case, Adjoint):
            unit = affine.unit_rows(case.slope.to(dtype) * scaled)
            scaled = scaled / unit.largest / unit.norm
        weight = case.weight.to(dtype)
        inputs = {
            "factor": (weight.t() if forward else weight).contiguous(),
            "offset": scaled.contiguous(),
            "slope": None if forward else case.slope.to(dtype).contiguous(),
            "start": None,
        }
        if forward and case.start is not None:
            inputs["start"] = driver.finite_rows(case.start.to(dtype)).contiguous()
        counters = len(call.solver.rejects)
        value = torch.full((batch, size), torch.nan, dtype=dtype)
        out = {
            "value": value,
            "status": torch.full((batch,), 99, dtype=torch.int8),
            "iterations": torch.full((batch,), -1, dtype=torch.int32),
            "residual": torch.full((batch,), torch.nan, dtype=dtype),
            "rejects": torch.full((batch, counters), -1, dtype=torch.int32),
            "value_slope": torch.full_like(value, torch.nan) if forward else None,
        }
        options = _solver_options(call.solver)
        fixed = int(options.pop("fixed", 0))
        window = min(int(options.pop("window", 0)), call.max_iter)
        self.seed += 1
        request = _Call(
            size=size,
            batch=batch,
            activation=_INDEX[case.activation] if forward else -1,
            max_iter=fixed or call.max_iter,
            fixed=fixed > 0,
            patience=call.solver.patience,
            window=window,
            tol=call.tol,
            ramp=ramp,
            graph=graph,
            pack=pack,
            seed=self.seed,
            skip=skip.encode(),
            **options,
            **{k: None if t is None else t.data_ptr() for k, t in (inputs | out).items()},
        )
        message = self.library.loop_solve_call(byref(request), dtype == torch.float64)
        assert not message, message.decode()
        self.products = Products(request.exact_products, request.narrow_products)
        self.skipped = bool(request.skipped)
        if unit is not None:
            out["value"] = unit.restore(value)
        return Outputs(**out)


def call_for(dtype, solver, **changes):
    return Call(solver, **{"tol": TOL[dtype], "max_iter": 90, **changes})


def case_for(solver, make, batch, size, dtype, **options):
    """A problem that the solver is made for: heavy-ball steps take a real spectrum."""
    case = make(batch, size, dtype, **options)
    if solver.name != "heavy_ball":
        return case
    weight = (case.weight + case.weight.t()).double()
    norm = torch.linalg.matrix_norm(case.weight.double(), 2)
    weight = weight * (norm / torch.linalg.matrix_norm(weight, 2))
    return dataclasses.replace(case, weight=weight.to(dtype))


def rows_of(case, chosen):
    """The problem of the chosen samples alone."""
    names = ("injection", "start") if isinstance(case, Forward) else ("slope", "grad")
    given = {name: getattr(case, name) for name in names}
    return dataclasses.replace(
        case, **{k: None if t is None else t[chosen] for k, t in given.items()}
    )


def assert_same(actual, expected, chosen=slice(None)):
    for a, e in zip(actual, expected, strict=True):
        if e is not None:
            torch.testing.assert_close(a, e[chosen], rtol=0, atol=0, equal_nan=True)


def check_truth(case, call, outputs):
    """The reported residual is that of the value, up to the rounding of one exact evaluation."""
    difference, size, z = true_residual(case, outputs.value)
    exact, error = difference / size, case.rounding(z, unit_of(case)) / size
    assert ((outputs.residual - exact).abs() <= error).all()
    converged = outputs.status == Status.CONVERGED
    assert (exact <= call.tol + error)[converged].all()
