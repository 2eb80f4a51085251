"""The kernel of csrc/cuda/persistent.cuh on an emulated GPU: solves of engine_cases' problems."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import subprocess
import tempfile
from ctypes import Structure, c_char_p, c_int32, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from engine_cases import Call, Case, Forward, Outputs
from native_options import NativeOptions, native_options
from paths import EMULATOR, ROOT

from fastdeq import constants
from fastdeq.activations import ACTIVATIONS
from fastdeq.ops import solve_affine_adjoint, solve_common
from fastdeq.solvers import HeavyBall, Solver, loop

COMPILER = os.environ.get("CXX", "c++").split()
TOL = {torch.float32: 1e-4, torch.float64: 1e-9}
_INDEX = {name: i for i, name in enumerate(ACTIVATIONS)}
_PLANNED = ("tile", "members", "groups", "tiles", "tile_rows", "tile_columns", "splits", "chunk")


class _Call(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("size", "batch")),
        *((name, c_void_p) for name in ("weight", "offset", "slope", "start")),
        *((name, c_int64) for name in ("output_stride", "input_stride")),
        ("activation", c_int32),
        ("options", NativeOptions),
        *((name, c_void_p) for name in ("value", "status", "iterations", "residual", "rejects")),
        ("value_slope", c_void_p),
        *((name, c_int32) for name in ("multiprocessors", "warps", "only_tile", "only_plan")),
        ("shared_bytes", c_int64),
        ("seed", c_uint64),
        ("skip", c_char_p),
        *((name, c_int32) for name in ("skipped", *_PLANNED)),
        *((name, c_int64) for name in ("shared_planned", "scratch_bytes", "counter_bytes")),
    )


class Device(NamedTuple):
    """What a plan is made for. ``warps`` of a block: fewer than a GPU's 8 are faster to emulate."""

    multiprocessors: int = 6
    shared_bytes: int = 100_000
    warps: int = 2
    tile: int = -1  # register tile, of those in persistent_plan.h; -1: any


ROOMY = Device()


class Plan(NamedTuple):
    tile: int
    members: int
    groups: int
    tiles: int
    tile_rows: int
    tile_columns: int
    splits: int
    chunk: int
    shared_bytes: int
    scratch_bytes: int
    counter_bytes: int


class EmulationError(RuntimeError):
    """The plan does not fit, or the emulated machine has seen an error."""


@functools.cache
def load_harness(name: str) -> ctypes.CDLL:
    """tests/cuda_emulator/<name>.cpp as a library."""
    flags = ["-O2", "-std=c++20", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas"]
    flags += ["-shared", "-fPIC", f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / f"{name}.so"
        command = [*COMPILER, *flags, str(EMULATOR / f"{name}.cpp"), "-o", str(library)]
        subprocess.run(command, check=True, timeout=120)
        return ctypes.CDLL(str(library))


def call_for(dtype: torch.dtype, solver: Solver, **changes: float) -> Call:
    return Call(solver, **{"tol": TOL[dtype], "max_iter": 90, **changes})


def suited(case: Case, solver: Solver) -> Case:
    """The problem, or one with a symmetric weight for a heavy ball, which needs a real spectrum."""
    if not isinstance(solver, HeavyBall):
        return case
    return dataclasses.replace(case, weight=(case.weight + case.weight.t()) / 2)


def same(actual: Outputs, expected: Outputs, chosen: slice | list[int] = slice(None)) -> bool:
    """Bit for bit, of the chosen samples."""
    return all(
        e is None or torch.equal(a[chosen].nan_to_num(-77.0), e[chosen].nan_to_num(-77.0))
        for a, e in zip(actual, expected, strict=True)
    )


@dataclasses.dataclass
class Emulation:
    library: ctypes.CDLL = dataclasses.field(default_factory=lambda: load_harness("persistent"))
    plan: Plan | None = None  # of the last solve
    skipped: bool = False  # whether the last solve met the line to be skipped

    def __post_init__(self) -> None:
        self.library.persistent_solve_call.restype = c_char_p

    def _call(self, request: _Call, dtype: torch.dtype) -> None:
        message = self.library.persistent_solve_call(
            ctypes.byref(request), dtype == torch.float64
        ).decode()
        if message:
            raise EmulationError(message)
        planned = (getattr(request, name) for name in _PLANNED)
        sizes = request.shared_planned, request.scratch_bytes, request.counter_bytes
        self.plan = Plan(*planned, *sizes)
        self.skipped = bool(request.skipped)

    def plan_for(
        self, size: int, batch: int, dtype: torch.dtype, device: Device, window: int = 0
    ) -> Plan:
        request = _Call(
            size=size,
            batch=batch,
            options=NativeOptions(window=window),
            only_plan=True,
            multiprocessors=device.multiprocessors,
            warps=device.warps,
            only_tile=device.tile,
            shared_bytes=device.shared_bytes,
        )
        self._call(request, dtype)
        assert self.plan is not None
        return self.plan

    def tightest(self, case: Case, call: Call, device: Device) -> Device:
        """The device with the least shared memory that will do: so many members to a group."""
        dtype = solve_common.working_dtype(*case.tensors())
        rows = case.injection if isinstance(case, Forward) else case.grad
        window = min(int(getattr(call.solver, "window", 0)), call.max_iter)
        low, high = 0, device.shared_bytes
        while high - low > 16:
            middle = (low + high) // 2
            try:
                self.plan_for(
                    rows.shape[1], len(rows), dtype, device._replace(shared_bytes=middle), window
                )
                high = middle
            except EmulationError:
                low = middle
        return device._replace(shared_bytes=high)

    def solve(
        self,
        case: Case,
        call: Call,
        device: Device = ROOMY,
        *,
        slope: bool = True,
        seed: int = 0,
        skip: str = "",
    ) -> Outputs:
        dtype = solve_common.working_dtype(*case.tensors())
        forward = isinstance(case, Forward)
        rows = (case.injection if forward else case.grad).to(dtype)
        batch, size = rows.shape
        unit = None
        if not forward:
            unit = solve_affine_adjoint.unit_rows(case.slope.to(dtype) * rows)
            rows = rows / unit.largest / unit.norm
        weight = case.weight.to(dtype)
        if 1 not in weight.stride():
            weight = weight.contiguous()
        start = case.start if forward else None
        inputs = {
            "weight": weight,
            "offset": rows.contiguous(),
            "slope": None if forward else case.slope.to(dtype).contiguous(),
            "start": None if start is None else loop.finite_rows(start.to(dtype)).contiguous(),
        }
        out = {
            "value": torch.full((batch, size), torch.nan, dtype=dtype),
            "status": torch.full((batch,), 99, dtype=torch.int8),
            "iterations": torch.full((batch,), -1, dtype=torch.int32),
            "residual": torch.full((batch,), torch.nan, dtype=dtype),
            "rejects": torch.full((batch, len(call.solver.rejects)), -1, dtype=torch.int32),
            "value_slope": None,
        }
        if forward and slope:
            out["value_slope"] = torch.full((batch, size), torch.nan, dtype=dtype)
        strides = weight.stride() if forward else weight.t().stride()
        request = _Call(
            size=size,
            batch=batch,
            output_stride=strides[0],
            input_stride=strides[1],
            activation=_INDEX[case.activation] if forward else -1,
            options=native_options(
                call.solver,
                call.tol,
                call.max_iter,
                atol=call.atol,
                patience=call.patience,
                floor=constants.ROUNDING_FLOOR * torch.finfo(dtype).eps,
                largest_size=torch.finfo(dtype).max ** constants.SIZE_EXPONENT,
            ),
            multiprocessors=device.multiprocessors,
            warps=device.warps,
            only_tile=device.tile,
            shared_bytes=device.shared_bytes,
            seed=seed,
            skip=skip.encode(),
            **{k: None if t is None else t.data_ptr() for k, t in (inputs | out).items()},
        )
        self._call(request, dtype)
        if unit is not None:
            out["value"] = unit.restore(out["value"])
        return Outputs(**out)
