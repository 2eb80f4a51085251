"""Rows of Anderson steps: the residual of the newest entry, and the next point. Symbols and
formulas: anderson_steps.py, in whose program these run."""

from __future__ import annotations

import triton
import triton.language as tl

from .judge import only, replace


@triton.jit
def write_residual(point_row, value_row, g_row, size, BLOCK: tl.constexpr):
    """g of the newest entry, where the step kernel did not write it."""
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = entry < size
        value = tl.load(value_row + entry, mask=inside, other=0.0)
        point = tl.load(point_row + entry, mask=inside, other=0.0)
        tl.store(g_row + entry, value - point, mask=inside)


@triton.jit
def mix_rows(
    f_rows,
    g_rows,
    newest,
    before,
    older,
    point_row,
    best_row,
    next_point,
    change_row,
    weight,  # (P, 1), 0 for an entry that is not in use
    back,
    to_best,
    low,
    undamped,
    size,
    DAMPED: tl.constexpr,
    SCHEDULE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes the next point: mixed, the plain or damped value, the value before where the step is
    taken ``back``, or ``to_best`` the best iterate; and, for a ``low`` precision evaluation, the
    change."""
    value_row = f_rows + newest * size
    before_row = f_rows + before * size
    used = weight != 0
    damps = (back | to_best) == 0
    older_f = (f_rows + older * size)[:, None]
    older_g = (g_rows + older * size)[:, None]
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = entry < size
        f_new = tl.load(value_row + entry, mask=only(inside, damps), other=0.0)
        trusted = tl.load(before_row + entry, mask=only(inside, back), other=0.0)
        following = tl.where(back, trusted, f_new)
        reads_point = low | damps if DAMPED else low
        point = tl.load(point_row + entry, mask=only(inside, reads_point), other=0.0)
        old_mask = used & inside[None, :]
        f_old = tl.load(older_f + entry[None, :], mask=old_mask, other=0.0)
        difference = f_new[None, :] - f_old
        if DAMPED:
            g_new = tl.where(damps, f_new - point, 0.0)
            g_old = tl.load(older_g + entry[None, :], mask=old_mask, other=0.0)
            difference -= undamped * (g_new[None, :] - g_old)
            following -= undamped * g_new
        following -= tl.sum(tl.where(used, weight * difference, 0.0), axis=0)
        if SCHEDULE:
            best_entry = tl.load(best_row + entry, mask=only(inside, to_best), other=0.0)
            following = tl.where(to_best, best_entry, following)
            rounded = (following - point).to(tl.bfloat16)
            tl.store(change_row + entry, rounded, mask=only(inside, low))
        replace(next_point, entry, inside, following)
