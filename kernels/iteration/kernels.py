"""The kernels of an iteration of a general map. Symbols and memory: state.py; what they do with the
rows of a sample: rows.py; its decision: decide.py.

    short rows   iterate_kernel, one program per sample: sums, decision, step
    long rows    sums_kernel, a program per sample and chunk; decide_kernel, one per sample;
                 step_kernel, a program per sample and chunk

so that an iteration is one launch or three, and two passes over the state and its history, the
second of a short row from a cache. A sample that has stopped costs no pass, but where the next
point is in new memory, as somebody holds the old one: there its row is copied.

Compared with the specification by Triton's interpreter on a CPU; compiled for sm_80 and sm_90. Tile
sizes and warp counts are choices, not measurements.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..steps import sample
from .decide import decide
from .rows import Rows, measure, take_step
from .state import IMPROVED, STEP, STILL, Memory


@triton.jit
def rows_of(i, buffers, batch, size, OFFSET: tl.constexpr):
    at = i * size
    scale = 0.0
    if OFFSET:
        scale = tl.load(buffers.scale + i)
    return Rows(
        value=buffers.value + at,
        offset=buffers.offset + at,
        scale=scale,
        point=buffers.point + at,
        following=buffers.following + at,
        best=buffers.best + at,
        last=buffers.last + at,
        addresses=buffers.addresses,
        to_value=at,
        to_residual=tl.cast(batch, tl.int64) * size + at,
    )


@triton.jit
def memory_of(i, buffers, chunks, window, COLUMNS: tl.constexpr):
    return Memory(
        settings=buffers.settings,
        flags=buffers.flags + i * sample.FLAGS,
        numbers=buffers.numbers + i * sample.NUMBERS,
        firsts=buffers.firsts,
        norms=buffers.norms + i * chunks * 2,
        products=buffers.products + i * chunks * COLUMNS,
        places=buffers.places + i * COLUMNS,
        gram=buffers.gram + i * window * window,
        gamma=buffers.gamma + i * COLUMNS,
    )


@triton.jit
def span_of(buffers, chunk, length, unit, size, MANY: tl.constexpr):
    """The first entry of a chunk, and the one after its last."""
    begin = tl.cast(chunk, tl.int64) * length
    end = tl.minimum(begin + length, tl.cast(size, tl.int64))
    if MANY:
        begin = tl.load(buffers.spans + 2 * chunk) * unit
        end = tl.load(buffers.spans + 2 * chunk + 1) * unit
    return begin, end


@triton.jit
def runs_at(memory):
    return tl.load(memory.flags + sample.REQUESTED) != sample.STOPPED


@triton.jit
def begin_decision(i, running, k):
    """Nobody is known to run after the evaluation after this one."""
    tl.store(running + (k + 1) % 2, 0, mask=i == 0)


@triton.jit
def stay(memory):
    """A sample that stopped before is left as it is."""
    tl.store(memory.flags + IMPROVED, 0)
    tl.store(memory.flags + STEP, STILL)


@triton.jit
def settle(
    buffers,
    memory,
    chunks,
    parts,
    k,
    most,
    window,
    MANY: tl.constexpr,
    FIXED: tl.constexpr,
    BALL: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The decision of a sample that runs, and whether it goes on."""
    goes_on = decide(
        memory,
        chunks,
        parts,
        k,
        most,
        window,
        DTYPE=buffers.point.dtype.element_ty,
        MANY=MANY,
        FIXED=FIXED,
        BALL=BALL,
        COLUMNS=COLUMNS,
    )
    tl.store(buffers.running + k % 2, 1, mask=goes_on)


@triton.jit(do_not_specialize=["batch", "k", "most", "copies", "chunks", "parts"])
def iterate_kernel(
    buffers,
    batch,
    size,
    length,  # of a chunk
    unit,  # of the entries where chunks begin
    chunks,
    parts,
    window,
    k,
    most,
    copies,
    OFFSET: tl.constexpr,
    MANY: tl.constexpr,
    FIXED: tl.constexpr,
    DAMPED: tl.constexpr,
    BALL: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    begin_decision(i, buffers.running, k)
    memory = memory_of(i, buffers, chunks, window, COLUMNS)
    rows = rows_of(i, buffers, batch, size, OFFSET)
    runs = runs_at(memory)
    if runs:
        count = tl.load(memory.flags + sample.COUNT)
        for chunk in range(chunks):
            begin, end = span_of(buffers, chunk, length, unit, size, MANY)
            measure(rows, memory, chunk, begin, end, count, OFFSET, COLUMNS, BLOCK)
        tl.debug_barrier()  # the sums are there
        settle(buffers, memory, chunks, parts, k, most, window, MANY, FIXED, BALL, COLUMNS)
    elif copies != 0:
        tl.debug_barrier()  # REQUESTED was loaded
        stay(memory)
    if runs | (copies != 0):
        tl.debug_barrier()  # the decision is there
        for chunk in range(chunks):
            begin, end = span_of(buffers, chunk, length, unit, size, MANY)
            take_step(
                rows,
                memory,
                begin,
                end,
                copies,
                OFFSET=OFFSET,
                DAMPED=DAMPED,
                BALL=BALL,
                COLUMNS=COLUMNS,
                BLOCK=BLOCK,
            )


@triton.jit(do_not_specialize=["batch", "chunks"])
def sums_kernel(
    buffers,
    batch,
    size,
    length,
    unit,
    chunks,
    window,
    OFFSET: tl.constexpr,
    MANY: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) // chunks
    chunk = tl.program_id(0) % chunks
    memory = memory_of(i, buffers, chunks, window, COLUMNS)
    if runs_at(memory):
        rows = rows_of(i, buffers, batch, size, OFFSET)
        count = tl.load(memory.flags + sample.COUNT)
        begin, end = span_of(buffers, chunk, length, unit, size, MANY)
        measure(rows, memory, chunk, begin, end, count, OFFSET, COLUMNS, BLOCK)


@triton.jit(do_not_specialize=["k", "most", "chunks", "parts"])
def decide_kernel(
    buffers,
    chunks,
    parts,
    window,
    k,
    most,
    MANY: tl.constexpr,
    FIXED: tl.constexpr,
    BALL: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    begin_decision(i, buffers.running, k)
    memory = memory_of(i, buffers, chunks, window, COLUMNS)
    runs = runs_at(memory)
    tl.debug_barrier()
    if runs:
        settle(buffers, memory, chunks, parts, k, most, window, MANY, FIXED, BALL, COLUMNS)
    else:
        stay(memory)


@triton.jit(do_not_specialize=["batch", "copies", "chunks"])
def step_kernel(
    buffers,
    batch,
    size,
    length,
    unit,
    chunks,
    window,
    copies,
    OFFSET: tl.constexpr,
    MANY: tl.constexpr,
    DAMPED: tl.constexpr,
    BALL: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) // chunks
    chunk = tl.program_id(0) % chunks
    memory = memory_of(i, buffers, chunks, window, COLUMNS)
    begin, end = span_of(buffers, chunk, length, unit, size, MANY)
    take_step(
        rows_of(i, buffers, batch, size, OFFSET),
        memory,
        begin,
        end,
        copies,
        OFFSET=OFFSET,
        DAMPED=DAMPED,
        BALL=BALL,
        COLUMNS=COLUMNS,
        BLOCK=BLOCK,
    )
