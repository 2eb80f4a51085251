"""The structure SolveOptions of csrc/common/solve_options.h, for C++ that tests call by ctypes."""

from __future__ import annotations

import ctypes
import dataclasses
import math

from fastdeq.solvers import Solver
from fastdeq.solvers.solve_options import PRECISIONS, SolveOptions

_TYPES = {"str": ctypes.c_int8, "float": ctypes.c_double, "int": ctypes.c_int32}
_TYPES |= {"bool": ctypes.c_bool}
# The enumerators of Solver and Precision there.
_SOLVERS = {"picard": 0, "neumann": 0, "anderson": 1, "heavy_ball": 2, "energy": 3, "minres": 4}
# Options of solvers that are in Python alone.
PYTHON_ALONE = ("restart", "memory", "kind", "difference", "alpha", "stop_norm")
FIELDS = tuple(f for f in dataclasses.fields(SolveOptions) if f.name not in PYTHON_ALONE)


class NativeOptions(ctypes.Structure):
    _fields_ = (
        *((f.name, _TYPES[f.type]) for f in FIELDS),
        *((name, ctypes.c_double) for name in ("floor", "largest_size")),
    )


def native_options(
    solver: Solver,
    tol: float,
    max_iter: int,
    *,
    atol: float = 0.0,
    patience: int | None = None,
    floor: float = 0.0,
    largest_size: float = math.inf,
) -> NativeOptions:
    options = SolveOptions.of(solver, tol=tol, max_iter=max_iter, atol=atol, patience=patience)
    fields = {f.name: getattr(options, f.name) for f in FIELDS}
    fields["solver"] = _SOLVERS[options.solver]
    fields["precision"] = PRECISIONS.index(options.precision)
    fields["window"] = options.most_differences
    return NativeOptions(floor=floor, largest_size=largest_size, **fields)
