"""Advance kernel of Anderson acceleration: judges an evaluation, extends the Gram matrix by a row,
solves for the weights, mixes, and says how the next evaluation is made; all of it for one sample in
one program. Algorithm: fastdeq/solvers/anderson.py, with the ramp as in csrc/cpu/ramp.h; the
scalars of a sample, its buffers and their bytes: sample.py.

Symbols: B samples of size n; z_k the point, f_k the value and g_k = f_k - z_k of evaluation k; m
slots of history, evaluation k in slot k % m; c entries in use beside the newest, the last c ones;
p = m - 1 and P the next power of two; beta the damping; ``points`` has two slots in turn.

    z = f_k - sum gamma_i (f_k - f_i) - (1 - beta) (g_k - sum gamma_i (g_k - g_i))
    z = f_{k-1}                  where z_k came from a mix and |g_k| is too large: taken back
    z = z_k + beta (f_k - z_k)   before the acceleration begins

Tile layout: tiles of (P, BLOCK), older entries as rows, newest first. The row of the Gram matrix in
float64 and the small solve are those of anderson_mix.py. The step kernel writes f_k to the history,
and g_k for a sample with HISTORY; where the acceleration only begins g_k is written here.

Bytes per sample and launch: 4 (c + 1) n of g and 4 (c + 1) n of f read (with beta < 1 again 4 c n
of g and 4 n of z_k), 4 n written, 8 c^2 + 8 c of the Gram matrix read, 16 c written; entries of the
history that are not in use are not read. Before the acceleration begins 4 n read and written. The
ramp: 4 n read and 2 n written before a narrow evaluation. 4 n read and written more where a best
iterate was not followed by a better one.

Compared with fastdeq/solvers/ by Triton's interpreter on a CPU; compiled for sm_80 and sm_90. No
GPU has run it: tile sizes and warp counts are choices, not measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from . import sample
from .advance import on_device, reanchor, store_ramp
from .anderson_mix import gram_row, solve_small, tile_shape
from .sample import Limits, Samples

SLOTS = 2  # of points
# Registers of a thread, by warps. Left to itself ptxas spills a few to fit one more program.
REGISTERS = {4: 168, 8: 168, 16: 128}
_SLOTS = tl.constexpr(SLOTS)


@triton.jit
def gamma_of(
    point_row,
    value_row,
    g_row,  # the history of the sample, (m, n), and its Gram matrix (m, m)
    gram,
    slots,
    size,
    newest,
    older,
    column,
    count,
    written,  # g of the newest entry is in the history
    regularization,
    rank_tolerance,
    max_weight,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The weights (COLUMNS,) float64 of the ``count`` newest differences, zero where they are
    rejected; whether they are; the number of columns dropped."""
    newest_g = g_row + newest * size
    if written == 0:
        for start in range(0, size, BLOCK):
            entry = start + tl.arange(0, BLOCK).to(tl.int64)
            inside = entry < size
            value = tl.load(value_row + entry, mask=inside, other=0.0)
            point = tl.load(point_row + entry, mask=inside, other=0.0)
            tl.store(newest_g + entry, value - point, mask=inside)
        tl.debug_barrier()  # other threads read it
    used = column < count
    both = used[:, None] & used[None, :]
    pairs = tl.load(gram + older[:, None] * slots + older[None, :], mask=both, other=0.0)
    own = tl.load(gram + older * (slots + 1), mask=used, other=0.0)
    older_g = g_row + (older * size)[:, None]
    row, diagonal = gram_row(newest_g, older_g, used, size, 1, COLUMNS, BLOCK)
    tl.store(gram + newest * (slots + 1), diagonal)
    tl.store(gram + newest * slots + older, row, mask=used)
    tl.store(gram + older * slots + newest, row, mask=used)
    gamma, kept, accepted = solve_small(
        pairs, own, row, diagonal, column, count, regularization, rank_tolerance, max_weight
    )
    return tl.where(accepted, gamma, 0.0), accepted == 0, count - kept


@triton.jit(do_not_specialize=["k", "max_iter", "patience"])
def advance_anderson_kernel(
    points,
    f_history,
    g_history,
    gram,
    change,
    sums,
    numbers,
    flags,
    remaining,
    slot,  # B n, from one slot of points to the next
    size,
    tiles,
    slots,  # m
    k,
    max_iter,
    patience,
    tol: tl.float32,
    undamped: tl.float32,  # 1 - beta
    regularization: tl.float64,
    rank_tolerance: tl.float64,
    max_weight: tl.float64,
    safeguard: tl.float32,
    accelerate_above: tl.float32,
    DAMPED: tl.constexpr,
    RAMP: tl.constexpr,
    COLUMNS: tl.constexpr,  # P
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    flags_row = flags + i * sample.FLAGS
    numbers_row = numbers + i * sample.NUMBERS
    if tl.load(flags_row + sample.WANTED) == sample.STOPPED:
        return
    exact = tl.load(flags_row + sample.MADE) == sample.EXACT
    previous = tl.load(numbers_row + sample.NORM)
    plain = tl.load(flags_row + sample.PLAIN) != 0
    accelerated = tl.load(flags_row + sample.ACCELERATED) != 0
    count = tl.load(flags_row + sample.COUNT)
    written = tl.load(flags_row + sample.HISTORY)
    backs = tl.load(flags_row + sample.REJECTS)
    caps = tl.load(flags_row + sample.REJECTS + 1)
    cuts = tl.load(flags_row + sample.REJECTS + 2)
    trusted_norm = tl.load(numbers_row + sample.TRUSTED_NORM)
    norm, relative = sample.measure(sums, i, tiles)
    best, idle, best_at, status = sample.assess(
        numbers_row, flags_row, exact, relative, k, tol, max_iter, _SLOTS, False
    )
    finite, slow = sample.is_finite(norm), (norm <= accelerate_above * previous) == 0
    home = (exact | finite | accelerated) == 0  # perhaps rounding is to blame: to the best point
    if RAMP:
        was_exact = tl.load(flags_row + sample.SINCE_ANCHOR) == 0
        # Nearer to the goal the rounding hides how fast the residual falls.
        clear = relative > 1.5 * tl.load(numbers_row + sample.GOAL)
        plain = plain & ((exact & was_exact & slow) == 0)
        # After a narrow evaluation the next one is exact before the history begins.
        begins = plain & (exact == 0) & (home == 0) & clear & slow
        before, goal, since, narrowest = reanchor(
            numbers_row, flags_row, exact, relative, plain, tol
        )
        narrowest = tl.where(home, sample.EXACT, narrowest)
        goal = tl.where(begins, float("inf"), goal)
        goes_plain = plain & (begins == 0)
    else:
        plain = plain & (slow == 0)
        goes_plain = plain

    # NaN compares false: "not (norm <= limit)" takes a step back that is not finite as well.
    accelerates = (plain | home) == 0
    back = accelerates & accelerated & ((norm <= safeguard * trusted_norm) == 0)
    fails = exact & ((finite | back) == 0)
    status = tl.where((status == sample.RUNNING) & fails, sample.failure(best, tol), status)
    idles = exact & sample.out_of_patience(idle, k, patience, False)
    takes_back = back & (status == sample.RUNNING)
    status = tl.where((status == sample.RUNNING) & idles, sample.STAGNATED, status)
    target = (k + 1) % _SLOTS
    save = best_at == target
    tl.debug_barrier()
    tl.store(flags_row + sample.REJECTS, backs + takes_back.to(tl.int32))
    tl.store(numbers_row + sample.BEST, best)
    tl.store(flags_row + sample.IDLE, idle)
    if status != sample.RUNNING:
        tl.store(flags_row + sample.BEST_AT, best_at)
        sample.stop(flags_row, remaining, status, k)
        return
    tl.store(flags_row + sample.BEST_AT, tl.where(save, _SLOTS, best_at))

    point_row = points + (k % _SLOTS).to(tl.int64) * slot + i * size
    target_row = points + target.to(tl.int64) * slot + i * size
    best_row = points + best_at.to(tl.int64) * slot + i * size
    saved_row = points + (target * 0 + _SLOTS).to(tl.int64) * slot + i * size
    change_row = change + i * size
    history = i * slots * size
    f_row = f_history + history
    newest = (k % slots).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    older = newest - 1 - column
    older = tl.where(older < 0, older + slots, older)
    value_row = f_row + newest * size

    gamma = tl.zeros((COLUMNS,), tl.float64)
    mixes = accelerates & (back == 0)  # otherwise all weights are zero
    if mixes:
        gamma, rejected, dropped = gamma_of(
            *(point_row, value_row, g_history + history, gram + i * slots * slots),
            *(slots, size, newest, older, column, count, written),
            *(regularization, rank_tolerance, max_weight, COLUMNS, BLOCK),
        )
        tl.store(flags_row + sample.REJECTS + 1, caps + rejected.to(tl.int32))
        tl.store(flags_row + sample.REJECTS + 2, cuts + (dropped > 0).to(tl.int32))
        accelerated = (rejected == 0) & (count > 0)
        trusted_norm = norm
    next_count = tl.where(mixes, tl.minimum(count + 1, slots - 1), tl.where(back | home, 0, count))
    tl.store(flags_row + sample.ACCELERATED, (accelerated & (back == 0)).to(tl.int32))
    tl.store(flags_row + sample.COUNT, next_count)
    tl.store(flags_row + sample.PLAIN, goes_plain.to(tl.int32))
    tl.store(flags_row + sample.HISTORY, (goes_plain == 0).to(tl.int32))
    tl.store(numbers_row + sample.TRUSTED_NORM, trusted_norm)
    tl.store(numbers_row + sample.NORM, norm)

    wanted = tl.full((), sample.EXACT, tl.int32)
    if RAMP:
        store_ramp(numbers_row, flags_row, before, goal, since, narrowest)
        wanted = sample.next_kind(
            *(relative, norm, previous, goes_plain, since, before, goal, narrowest),
            *(next_count, k, max_iter),
        )
    tl.store(flags_row + sample.WANTED, wanted)
    narrow = wanted == sample.NARROW

    older_f = f_row + (older * size)[:, None]
    older_g = g_history + history + (older * size)[:, None]
    before_row = f_row + tl.where(newest > 0, newest - 1, slots - 1) * size
    weight = gamma.to(tl.float32)[:, None]
    used = weight != 0
    damps = (back | home) == 0
    for start in range(0, size, BLOCK):
        entry = start + tl.arange(0, BLOCK).to(tl.int64)
        inside = entry < size
        f_new = tl.load(value_row + entry, mask=sample.only(inside, damps), other=0.0)
        trusted = tl.load(before_row + entry, mask=sample.only(inside, back), other=0.0)
        following = tl.where(back, trusted, f_new)
        reads_point = narrow | damps if DAMPED else narrow
        point = tl.load(point_row + entry, mask=sample.only(inside, reads_point), other=0.0)
        old_mask = used & inside[None, :]
        f_old = tl.load(older_f + entry[None, :], mask=old_mask, other=0.0)
        difference = f_new[None, :] - f_old
        if DAMPED:
            g_new = tl.where(damps, f_new - point, 0.0)
            g_old = tl.load(older_g + entry[None, :], mask=old_mask, other=0.0)
            difference -= undamped * (g_new[None, :] - g_old)
            following -= undamped * g_new
        following -= tl.sum(tl.where(used, weight * difference, 0.0), axis=0)
        if RAMP:
            best_entry = tl.load(best_row + entry, mask=sample.only(inside, home), other=0.0)
            following = tl.where(home, best_entry, following)
            rounded = (following - point).to(tl.bfloat16)
            tl.store(change_row + entry, rounded, mask=sample.only(inside, narrow))
        sample.replace(target_row, saved_row, entry, inside, save, following)


@dataclass(frozen=True)
class History:
    """Values and residuals ``(B, m, n)``, their Gram matrix ``(B, m, m)`` float64; all unset."""

    f: Tensor
    g: Tensor
    gram: Tensor


def advance_anderson(
    samples: Samples,
    history: History,
    k: int,
    limits: Limits,
    damping: float,
    regularization: float,
    rank_tolerance: float,
    max_weight: float,
    safeguard: float,
    accelerate_above: float,
) -> None:
    """After evaluation k, whose value lies in slot k % m of the history; the next point goes to
    slot (k + 1) % 2 of ``samples.points``."""
    batch, slots, size = history.f.shape
    columns, block, warps = tile_shape(slots, size)
    with on_device(history.f):
        advance_anderson_kernel[(batch,)](
            samples.points,
            history.f,
            history.g,
            history.gram,
            history.f if samples.change is None else samples.change,
            samples.sums,
            samples.numbers,
            samples.flags,
            samples.remaining,
            *(batch * size, size, samples.sums.shape[1], slots),
            *(k, limits.max_iter, limits.patience, limits.tol),
            *(1.0 - damping, regularization, rank_tolerance),
            *(max_weight, safeguard, accelerate_above),
            DAMPED=damping != 1.0,
            RAMP=samples.change is not None,
            COLUMNS=columns,
            BLOCK=block,
            num_warps=warps,
            maxnreg=REGISTERS[warps],
        )
