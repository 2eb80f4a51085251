"""The iterations of a general map between its evaluations, for tensors on a GPU: one launch for
short rows, three for long ones. Kernels: kernels.py; memory: state.py. Specification:
fastdeq/solvers/loop.py. The same class for tensors on a CPU: csrc/cpu/iteration.h.

Memory, in states: the point and the best iterate, with heavy-ball steps the point before, and with
a history two for each entry, taken when one may be used. Nothing is read from the device but, one
iteration late, whether any sample still runs; with a fixed number of iterations not that either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import triton
from torch import Tensor

from ... import constants
from ...cuda_stream import DelayedCount
from ...solvers import SOLVERS
from ...solvers.loop import finite_rows
from ...solvers.solve_options import SolveOptions
from ..anderson_mix import tile_shape
from ..launch import on_device, window_of
from ..steps import sample
from ..steps.anderson_steps import REGISTERS
from ..steps.sample import rows_tile
from . import kernels, state
from .begin import begin


class Buffers(NamedTuple):
    """What the kernels work on, see state.py, and the rows ``(B, n)`` of an evaluation; contiguous.
    What a solver does not have is a tensor of the same dtype that is not touched."""

    value: Tensor
    offset: Tensor
    scale: Tensor
    point: Tensor
    following: Tensor
    best: Tensor
    last: Tensor
    settings: Tensor
    flags: Tensor
    numbers: Tensor
    running: Tensor
    spans: Tensor
    firsts: Tensor
    norms: Tensor
    products: Tensor
    addresses: Tensor
    places: Tensor
    gram: Tensor
    gamma: Tensor


def _uses(t: Tensor) -> int:
    """How many tensors have the memory of t, but for a constant."""
    found: int = torch._C._storage_Use_Count(t.untyped_storage()._cdata)
    return found


def tile_of(options: SolveOptions, size: int) -> dict[str, int]:
    """BLOCK, warps and registers of a program that walks rows."""
    window = window_of(options)
    if window == 0:
        return rows_tile(size)
    _, block, warps = tile_shape(window + 1, size)
    return {"BLOCK": block, "num_warps": warps, "maxnreg": REGISTERS[warps]}


def constants_of(options: SolveOptions, offset: bool, several: bool) -> dict[str, Any]:
    """What the kernels are made for; ``several`` parts of the state."""
    window = window_of(options)
    return {
        "OFFSET": offset,
        "MANY": several,
        "FIXED": options.fixed_iterations > 0,
        "DAMPED": options.damping != 1.0,
        "BALL": options.solver == "heavy_ball",
        "COLUMNS": triton.next_power_of_2(window) if window else 0,
    }


class Iteration:
    """The iteration of ``z = f(z)`` from ``start`` ``(B, n)`` float32 or float64 on a GPU, for
    plain, heavy-ball and Anderson steps.

    ``parts`` are the sizes of the parts of a row, one or more, each of which is to meet the
    tolerance. Where there is an ``offset`` ``(B, n)``, f is the map that is evaluated plus
    ``scale`` ``(B,)`` times it. It ``counts`` running samples, or only sees whether there are any.
    """

    dtypes: ClassVar = (torch.float32, torch.float64)
    #: Of Anderson acceleration. With 64 the small solve spills registers, beside all else.
    most_differences: ClassVar[int] = 32

    def __init__(
        self,
        start: Tensor,
        options: SolveOptions,
        parts: Sequence[int],
        offset: Tensor | None = None,
        scale: Tensor | None = None,
        counts: bool = False,
    ):
        with torch.no_grad(), torch.inference_mode(False):  # versions of the point are counted
            self._options = options
            self._point = finite_rows(start).contiguous()
            self._chunks = state.chunks_of(parts, start.device)
            self._window = window_of(options)
            self._history = None
            if self._window:
                self._history = state.History(self._point, self._window)
            self._buffers = self._buffers_for(offset, scale)
            self._tile = tile_of(options, start.shape[1])
            self._constants = constants_of(options, offset is not None, len(parts) > 1)
            self._unshared = _uses(torch.empty_like(self._point[:0]))
            self._counts = counts
            self._count = DelayedCount(start.device, len(start) if counts else 1)
            self._runs = self._buffers.running.unbind()
            self._evaluations = 0
            b = self._buffers
            begin(b.settings, b.flags, b.numbers, options, self._point.dtype)

    def point(self) -> Tensor:
        """``(B, n)``: where to evaluate the map. Its memory may be written to by the next
        ``advance``, unless somebody still holds the tensor or a view of it then."""
        # A tensor of its own on the same memory, so that whether somebody holds it can be seen.
        return self._point.detach()

    def advance(self, value: Tensor | None) -> int:
        """Takes the map's value at the point ``(B, n)``, None for zeros; 0 when the solve has
        ended, and else how many samples go on at most where it ``counts`` them, or 1.

        Raises:
            RuntimeError: a value of another shape, device or kind.
        """
        k = self._evaluations
        with torch.no_grad(), torch.inference_mode(False):
            value = torch.zeros_like(self._point) if value is None else self._rows(value)
            # What others hold, the value for one if it is a view of the point, is left to them.
            held = _uses(self._point) > self._unshared
            following = torch.empty_like(self._point) if held else self._point
            most = self._most_differences(k)
            if self._history is not None:
                self._history.reserve(min(k + 1, most))
            buffers = self._buffers._replace(value=value, point=self._point, following=following)
            with on_device(self._point):
                self._iterate(buffers, k, most, copies=int(held))
            self._point = following
        self._evaluations += 1
        if k >= self._options.updates:
            return 0
        if self._options.fixed_iterations:
            return 1
        return self._count.left(self._running() if self._counts else self._runs[k % 2])

    def running(self) -> Tensor:
        """Which samples go on, int64; waits for the device."""
        return self._running().nonzero().flatten()

    def _running(self) -> Tensor:
        return self._buffers.flags[:, sample.REQUESTED.value] != 0

    def result(self) -> tuple[Tensor, ...]:
        """Of each sample: value, status, iterations, residual, rejects, rate, middle, end, as
        csrc/cpu/iteration.h has them."""
        flags, numbers = self._buffers.flags, self._buffers.numbers
        counters = len(SOLVERS[self._options.solver].rejects)

        def numbers_at(*columns: Any) -> list[Tensor]:
            return [numbers[:, c.value].to(self._point.dtype) for c in columns]

        latest = state.LATEST.value
        end = numbers[:, latest : latest + state.TREND_SPAN.value].amin(1)
        residual, rate, middle = numbers_at(sample.BEST, state.RATE, state.MIDDLE)
        first = sample.REJECTS.value
        return (
            self._buffers.best,
            flags[:, sample.STATUS.value].to(torch.int8),
            flags[:, sample.ITERATIONS.value].clone(),
            residual,
            flags[:, first : first + counters].clone(),
            rate,
            middle,
            end.to(self._point.dtype),
        )

    def _rows(self, value: Tensor) -> Tensor:
        like = self._point
        if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided:
            raise RuntimeError("the map returned other than a dense tensor for a state that is one")
        if value.shape != like.shape or value.device != like.device:
            raise RuntimeError(
                f"the value must be {list(like.shape)} on {like.device}, got "
                f"{list(value.shape)} on {value.device}"
            )
        return value.to(like.dtype).contiguous()

    def _most_differences(self, k: int) -> int:
        """Those that the evaluation after number k may use."""
        first = self._options.first_window
        if first == 0:
            return self._window
        beyond = max(0, k - constants.GROW_AFTER) // constants.GROW_EVERY
        return min(self._window, first + beyond)

    def _buffers_for(self, offset: Tensor | None, scale: Tensor | None) -> Buffers:
        point, chunks, history = self._point, self._chunks, self._history
        batch = len(point)

        def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=point.device)

        flags = empty(batch, sample.FLAGS.value, dtype=torch.int32)
        numbers = empty(batch, sample.NUMBERS.value)
        none, long = point.new_empty(1), empty(1, dtype=torch.int64)
        if offset is not None:
            assert scale is not None
            if offset.shape != point.shape or scale.shape != point.shape[:1]:
                raise RuntimeError(
                    f"the offset must be {list(point.shape)} with a scale for each row"
                )
            offset = offset.detach().to(point.dtype).contiguous()
            scale = scale.detach().to(point.dtype).contiguous()
        columns = history.columns if history else 1
        return Buffers(
            value=none,
            offset=none if offset is None else offset,
            scale=none if scale is None else scale,
            point=none,
            following=none,
            best=torch.empty_like(point),
            last=torch.empty_like(point) if self._options.solver == "heavy_ball" else none,
            settings=empty(state.SETTINGS.value),
            flags=flags,
            numbers=numbers,
            running=torch.zeros(2, dtype=torch.bool, device=point.device),
            spans=long if chunks.spans is None else chunks.spans,
            firsts=long if chunks.firsts is None else chunks.firsts,
            norms=empty(batch, chunks.count, 2),
            products=empty(batch, chunks.count, columns) if history else numbers,
            addresses=history.addresses if history else long,
            places=history.places if history else flags,
            gram=history.gram if history else numbers,
            gamma=history.gamma if history else numbers,
        )

    def _iterate(self, buffers: Buffers, k: int, most: int, copies: int) -> None:
        batch, size = self._point.shape
        arguments = {
            "buffers": buffers,
            "batch": batch,
            "size": size,
            "length": self._chunks.length,
            "unit": self._chunks.unit,
            "chunks": self._chunks.count,
            "parts": self._chunks.parts,
            "window": self._window,
            "k": k,
            "most": most,
            "copies": copies,
            **self._constants,
        }
        tile = self._tile
        if size <= state.ONE_LAUNCH:
            _launch(kernels.iterate_kernel, batch, arguments, tile)
            return
        _launch(kernels.sums_kernel, batch * self._chunks.count, arguments, tile)
        one = tile if self._history else {"num_warps": 1}  # it walks no rows
        _launch(kernels.decide_kernel, batch, arguments, one)
        _launch(kernels.step_kernel, batch * self._chunks.count, arguments, tile)


def _launch(kernel: Any, programs: int, arguments: dict[str, Any], tile: dict[str, Any]) -> None:
    """With those of the arguments that the kernel has."""
    own = {name: arguments[name] for name in kernel.arg_names if name in arguments}
    if "BLOCK" not in kernel.arg_names:
        tile = {name: value for name, value in tile.items() if name != "BLOCK"}
    kernel[(programs,)](**own, **tile, enable_fp_fusion=True)
