"""Inputs of anderson_mix, the reference's answer, and how far a correct answer may be from it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastdeq.ops import anderson_mix

OPTIONS = {
    "damping": 1.0,
    "regularization": 1e-12,
    "rank_tolerance": 1e-6,
    "max_weight": 1e6,
}


class Inputs(NamedTuple):
    f_history: Tensor
    g_history: Tensor
    gram: Tensor
    count: Tensor
    slot: int


class Outputs(NamedTuple):
    z: Tensor
    dropped: Tensor
    rejected: Tensor
    gram: Tensor


def reference_mix(inputs: Inputs, **changes: float) -> Outputs:
    gram = inputs.gram.clone()
    results = anderson_mix.reference(
        inputs.f_history,
        inputs.g_history,
        gram,
        inputs.count,
        inputs.slot,
        **{**OPTIONS, **changes},
    )
    return Outputs(*results, gram)


def make_inputs(seed: int, dtype: torch.dtype, slots: int, size: int, batch: int = 4) -> Inputs:
    """Random histories; the last sample has a full window, the others any number of entries."""
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(batch, slots, size, generator=generator, dtype=dtype)
    g = 0.3 * torch.randn(batch, slots, size, generator=generator, dtype=dtype)
    gram = torch.einsum("bin,bjn->bij", g.double(), g.double())
    count = torch.randint(0, slots, (batch,), generator=generator, dtype=torch.int32)
    count[-1:] = slots - 1
    slot = int(torch.randint(0, slots, (1,), generator=generator))
    return Inputs(f, g, gram, count, slot)


def unused_slots(inputs: Inputs) -> Tensor:
    """(B, m) bool: neither the newest entry nor one of the ``count`` before it."""
    slots = inputs.f_history.shape[1]
    age = (inputs.slot - torch.arange(slots)) % slots
    return age > inputs.count.unsqueeze(1)


def tolerance(inputs: Inputs, gram: Tensor, **changes: float) -> Tensor:
    """Largest difference (B, 1) between two correct results z; ``gram`` is that after the call.

    Let e be the rounding unit of the dtype, u = 2^-53, p = m - 1 and S = 2 (max |f| + max |g|),
    which bounds an entry of a difference. Both results err, hence a factor 2 at the end.

    Mixing. z is a sum of p + 2 terms, gamma_i times a difference of up to 4 numbers, gamma_i
    itself rounded to the dtype: at most ``(p + 6) e (1 + |gamma|_1) S``.

    Weights. They solve M y = r on unit-norm columns, gamma_i = y_i s_i with s_i = 1 / |dg_i|. A
    Gram entry errs by n u G, where G is the largest of them; an entry of M adds four, scaled
    by s_i s_j, and the elimination adds about 8 p u. So with s = max s_i

        ``dM = p u (4 n G s^2 + 8 p)``,   ``dr = p^1/2 u (2 n G s + 8 p |r|)``,
        ``|d gamma|_1 <= p^1/2 s |M^-1| (dM |y| + dr)``,   which moves z by at most S times that.
    """
    options = {**OPTIONS, **changes}
    dtype, size = inputs.f_history.dtype, inputs.f_history.shape[2]
    slots, slot = gram.shape[1], inputs.slot
    p, unit = slots - 1, 2.0**-53
    older = (slot - torch.arange(1, slots)) % slots
    valid = torch.arange(1, slots) <= inputs.count.unsqueeze(1)
    gamma, _ = anderson_mix._solve_small(
        gram, slot, older, valid, options["regularization"], options["rank_tolerance"]
    )
    kept = gamma != 0
    both = kept[:, :, None] & kept[:, None, :]
    newest = gram[:, slot, slot]
    rhs = newest[:, None] - gram[:, slot, older]
    matrix = newest[:, None, None] - gram[:, slot, older][:, :, None]
    matrix = matrix - gram[:, slot, older][:, None, :] + gram[:, older][:, :, older]
    norm = torch.where(kept, matrix.diagonal(dim1=1, dim2=2), 1.0).sqrt()
    matrix = matrix / norm[:, :, None] / norm[:, None, :]
    matrix = torch.where(both, matrix, torch.eye(p, dtype=torch.float64))
    inverse = 1 / torch.linalg.eigvalsh(matrix)[:, 0]
    scale = torch.where(kept, 1 / norm, 0.0).amax(1)
    y = (gamma * norm).norm(dim=1)
    rhs_norm = torch.where(kept, rhs / norm, 0.0).norm(dim=1)
    largest = torch.where(both, gram[:, older][:, :, older].abs(), newest.abs()[:, None, None])
    largest = largest.amax((1, 2))

    matrix_error = p * unit * (4 * size * largest * scale**2 + 8 * p)
    rhs_error = p**0.5 * unit * (2 * size * largest * scale + 8 * p * rhs_norm)
    weight_error = p**0.5 * scale * inverse * (matrix_error * y + rhs_error)
    seen = ~unused_slots(inputs)[:, :, None]
    f_max = torch.where(seen, inputs.f_history.abs(), 0.0).amax((1, 2)).double()
    g_max = torch.where(seen, inputs.g_history.abs(), 0.0).amax((1, 2)).double()
    rounding = (p + 6) * torch.finfo(dtype).eps * (1 + gamma.abs().sum(1))
    return (2 * 2 * (f_max + g_max) * (rounding + weight_error)).unsqueeze(1)


def check_against_reference(inputs: Inputs, actual: Outputs, **changes: float) -> None:
    expected = reference_mix(inputs, **changes)
    assert actual.z.dtype == expected.z.dtype
    error = (actual.z - expected.z).abs().double()
    bound = tolerance(inputs, expected.gram, **changes)
    assert (error <= bound).all(), f"error {error.amax(1)} above the bound {bound.squeeze(1)}"
    assert torch.equal(actual.dropped, expected.dropped)
    assert torch.equal(actual.rejected, expected.rejected)
    # n terms in any order; everything outside row and column `slot` is left alone.
    size, slot = inputs.f_history.shape[2], inputs.slot
    scale = float(expected.gram.nan_to_num().abs().amax())
    torch.testing.assert_close(
        actual.gram, expected.gram, rtol=0, atol=2 * size * 2.0**-53 * scale, equal_nan=True
    )
    untouched = torch.ones_like(expected.gram, dtype=torch.bool)
    untouched[:, slot, :] = untouched[:, :, slot] = False
    assert torch.equal(actual.gram[untouched], inputs.gram[untouched])
