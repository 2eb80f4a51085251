"""The small solve of Anderson acceleration by an emulated warp and by one thread: the same bits."""

from __future__ import annotations

import ctypes
import shutil
from ctypes import c_char_p, c_double, c_int32, c_void_p

import pytest
import torch
from cuda_persistent_emulation import COMPILER, load_harness

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER[0]) is None, reason=f"no C++ compiler ({COMPILER[0]})"
)


class _Call(ctypes.Structure):
    _fields_ = (
        ("gram", c_void_p),
        *((name, c_int32) for name in ("entries", "newest", "count")),
        *((name, c_double) for name in ("regularization", "rank_tolerance", "max_weight")),
        ("gamma", c_void_p),
        *((name, c_int32) for name in ("by_warp", "seed", "dropped", "rejected")),
    )


@pytest.fixture(scope="module")
def library():
    library = load_harness("anderson")
    library.small_solve_call.restype = c_char_p
    return library


def small_solve(library, gram, *, by_warp, seed=0, **options):
    """Weights, and the numbers of dropped columns and of rejected solves."""
    gamma = torch.full((len(gram) - 1,), torch.nan, dtype=torch.float64)
    call = _Call(
        gram=gram.data_ptr(),
        entries=len(gram),
        gamma=gamma.data_ptr(),
        by_warp=by_warp,
        seed=seed,
        **options,
    )
    message = library.small_solve_call(ctypes.byref(call)).decode()
    assert not message, message
    return gamma, call.dropped, call.rejected


NEWEST = 1


def gram_of(entries, size, count):
    """Of random residuals; what is not in use holds NaN."""
    g = torch.randn(entries, size, dtype=torch.float64)
    gram = g @ g.t()
    unused = [j for j in range(entries) if (NEWEST - j) % entries > count]
    gram[unused] = gram[:, unused] = torch.nan
    return gram


@pytest.mark.parametrize(
    ("entries", "size", "regularization", "max_weight", "drops", "rejects"),
    [
        pytest.param(2, 1, 1e-12, 1e8, False, False, id="one column"),
        pytest.param(6, 40, 1e-12, 1e8, False, False, id="a few columns"),
        pytest.param(6, 3, 1e-12, 1e8, True, False, id="dependent columns"),
        pytest.param(6, 40, 1e-2, 0.1, False, True, id="weights above the cap"),
        pytest.param(40, 60, 1e-12, 1e8, False, False, id="more columns than lanes"),
        pytest.param(40, 20, 1e-12, 1e8, True, False, id="more columns than lanes, dependent"),
    ],
)
def test_the_small_solve_of_a_warp_is_that_of_a_thread(
    library, entries, size, regularization, max_weight, drops, rejects
):
    options = {
        "newest": NEWEST,
        "regularization": regularization,
        "rank_tolerance": 1e-10,
        "max_weight": max_weight,
    }
    for count in (entries - 1, entries // 2, 1, 0):
        gram = gram_of(entries, size, count)
        gamma, *found = small_solve(library, gram, by_warp=False, count=count, **options)
        if count == entries - 1:
            assert (found[0] > 0, found[1] > 0) == (drops, rejects)
        assert gamma.isfinite().all()
        assert (gamma[count:] == 0).all()
        assert found[1] or count == 0 or gamma.any()
        for seed in range(5):
            again, *other = small_solve(
                library, gram, by_warp=True, seed=seed, count=count, **options
            )
            assert torch.equal(again, gamma)
            assert other == found


def test_the_lanes_of_a_warp_agree_on_weights_close_to_the_cap(library):
    """A lane that adds up weights before another has written its own would judge otherwise."""
    gram = gram_of(40, 60, 39)
    options = {"newest": NEWEST, "count": 39, "regularization": 1e-12, "rank_tolerance": 1e-10}
    gamma, _, _ = small_solve(library, gram, by_warp=False, max_weight=1e8, **options)
    total = float(gamma.abs().sum())
    for max_weight, rejects in ((0.999 * total, 1), (1.001 * total, 0)):
        for seed in range(5):
            found = small_solve(
                library, gram, by_warp=True, seed=seed, max_weight=max_weight, **options
            )
            assert torch.equal(found[0], gamma * (1 - rejects))
            assert found[2] == rejects
