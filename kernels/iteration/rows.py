"""The entries of one sample in one iteration of a general map: sums, and the step.

    v, z      value f(z) and point z, of one dtype T; g = v - z
    measure   |g|^2 and |v|^2; with a history <g, g_i> with the c residuals in use in it
    take_step the next point; v and g in the history, the point as the best iterate

Tile layout: (BLOCK,) of the rows and (P, BLOCK) of the history, over the entries of a chunk. Sums
are in float64, because the differences of a Gram matrix cancel; they stay spread over the tile and
are reduced once, in an order that the shape alone decides.

Numbers per entry: measure reads 2 + c. take_step reads 2, in the Anderson steps c more (2 c where
damping < 1), in heavy-ball steps 1 more; it writes 1, 1 more where the point is the best, 2 more
where the evaluation enters the history, 1 more in heavy-ball steps. An offset is read in both.

The next point may lie where the point is, and the entry that is replaced in the history is one of
those that are mixed: in a block all is read before anything is written.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..steps.judge import only
from .state import (
    DAMPING,
    IMPROVED,
    MIX,
    SLOT,
    STEP,
    STEP_OMEGA,
    STILL,
    TAKE_BACK,
)


class Rows(NamedTuple):
    """Of one sample: its evaluation, where the step goes, and its entries in a slot of history."""

    value: Any
    offset: Any  # added to the value, times ``scale``
    scale: Any
    point: Any
    following: Any  # the next point
    best: Any
    last: Any  # heavy ball: the point before
    addresses: Any  # of the slots
    to_value: (
        Any  # entries from the address of a slot to the value of the sample, and to its residual
    )
    to_residual: Any


@triton.jit
def value_at(rows, entry, inside, OFFSET: tl.constexpr):
    value = tl.load(rows.value + entry, mask=inside, other=0.0)
    if OFFSET:
        value += rows.scale * tl.load(rows.offset + entry, mask=inside, other=0.0)
    return value


@triton.jit
def slot_rows(rows, slots, exists, at):
    """Pointers to rows of a sample in the history's ``slots``, so many entries from the address."""
    address = tl.load(rows.addresses + slots, mask=exists, other=0)
    base = address.to(tl.pointer_type(rows.point.dtype.element_ty))
    return tl.multiple_of(base, 16) + at


@triton.jit
def measure(
    rows,
    memory,
    chunk,
    begin,
    end,
    count,  # entries of the history in use
    OFFSET: tl.constexpr,
    COLUMNS: tl.constexpr,  # P, 0 without a history
    BLOCK: tl.constexpr,
):
    """Stores the sums of a chunk, entries ``begin`` to ``end``."""
    residual = tl.zeros((BLOCK,), tl.float64)
    size = tl.zeros((BLOCK,), tl.float64)
    if COLUMNS > 0:
        age = tl.arange(0, COLUMNS)
        used = age < count
        slots = tl.load(memory.places + age, mask=used, other=0)
        old_g = slot_rows(rows, slots, used, rows.to_residual)
        row = tl.zeros((COLUMNS, BLOCK), tl.float64)
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = entry < end
        value = value_at(rows, entry, inside, OFFSET)
        g = value - tl.load(rows.point + entry, mask=inside, other=0.0)
        wide_g, wide_value = g.to(tl.float64), value.to(tl.float64)
        residual += wide_g * wide_g
        size += wide_value * wide_value
        if COLUMNS > 0:
            old_mask = used[:, None] & inside[None, :]
            old = tl.load(old_g[:, None] + entry[None, :], mask=old_mask, other=0.0)
            row += old.to(tl.float64) * wide_g[None, :]
    tl.store(memory.norms + 2 * chunk, tl.sum(residual, axis=0))
    tl.store(memory.norms + 2 * chunk + 1, tl.sum(size, axis=0))
    if COLUMNS > 0:
        tl.store(memory.products + COLUMNS * chunk + age, tl.sum(row, axis=1))


@triton.jit
def take_step(
    rows,
    memory,
    begin,
    end,
    copies,  # a point that stays is copied to the next one
    OFFSET: tl.constexpr,
    DAMPED: tl.constexpr,
    BALL: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As the decision of the sample says, for entries ``begin`` to ``end``."""
    dtype = rows.point.dtype.element_ty
    step = tl.load(memory.flags + STEP)
    improved = tl.load(memory.flags + IMPROVED) != 0
    moves = step != STILL
    writes = moves | (copies != 0)
    damping = tl.load(memory.settings + DAMPING).to(dtype)
    if COLUMNS > 0:
        mixes, back = step == MIX, step == TAKE_BACK
        slot = tl.load(memory.flags + SLOT)
        column = tl.arange(0, COLUMNS)
        # An entry that is not used may hold anything.
        weight = tl.load(memory.gamma + column, mask=only(column >= 0, mixes), other=0.0)
        weight = weight.to(dtype)
        used = weight != 0
        any_used = tl.max(used.to(tl.int32), axis=0) != 0
        old_f = slot_rows(rows, column, used, rows.to_value)
        old_g = slot_rows(rows, column, used, rows.to_residual)
        own_f = slot_rows(rows, slot, mixes | back, rows.to_value)
        own_g = slot_rows(rows, slot, mixes | back, rows.to_residual)
    if BALL:
        omega = tl.load(memory.numbers + STEP_OMEGA).to(dtype)
    if writes | improved:
        for start in range(begin, end, BLOCK):
            entry = start + tl.arange(0, BLOCK).to(tl.int64)
            inside = entry < end
            moved = only(inside, moves)
            point = tl.load(rows.point + entry, mask=inside, other=0.0)
            value = value_at(rows, entry, moved, OFFSET)
            following = value
            if DAMPED:
                following = point + damping * (value - point)
            if BALL:  # without momentum there may be anything
                before = tl.load(rows.last + entry, mask=only(moved, omega != 1), other=0.0)
                following = before + omega * (value - before)
            if COLUMNS > 0:
                g = value - point
                if any_used:
                    old_mask = used[:, None] & inside[None, :]
                    old = tl.load(old_f[:, None] + entry[None, :], mask=old_mask, other=0.0)
                    difference = value[None, :] - old
                    if DAMPED:
                        old = tl.load(old_g[:, None] + entry[None, :], mask=old_mask, other=0.0)
                        difference -= (1 - damping) * (g[None, :] - old)
                    change = tl.where(used[:, None], weight[:, None] * difference, 0.0)
                    following -= tl.sum(change, axis=0)
                trusted = tl.load(own_f + entry, mask=only(inside, back), other=0.0)
                following = tl.where(back, trusted, following)
            tl.debug_barrier()  # another thread may write where this one has read
            tl.store(rows.best + entry, point, mask=only(inside, improved))
            if BALL:
                tl.store(rows.last + entry, point, mask=moved)
            if COLUMNS > 0:
                tl.store(own_f + entry, value, mask=only(inside, mixes))
                tl.store(own_g + entry, g, mask=only(inside, mixes))
            following = tl.where(moves, following, point)
            tl.store(rows.following + entry, following, mask=only(inside, writes))
