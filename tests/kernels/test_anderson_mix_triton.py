"""The Triton kernel of anderson_mix against the reference, under Triton's interpreter on the CPU.

Triton decides when it is imported whether it interprets. The interpreter therefore lives in a child
process, and no other test module notices it.
"""

from __future__ import annotations

import importlib.util
import io
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import pytest
import torch
from anderson_mix_cases import (
    OPTIONS,
    Inputs,
    Outputs,
    check_against_reference,
    make_inputs,
    reference_mix,
    unused_slots,
)
from torch import Tensor

from fastdeq.backends import extension

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def _interpret() -> None:
    os.environ["TRITON_INTERPRET"] = "1"


def _in_child(payload: bytes) -> bytes:
    from fastdeq.kernels.anderson_mix import anderson_mix

    inputs, options = torch.load(io.BytesIO(payload), weights_only=False)
    results = anderson_mix(*inputs, *options)
    reply = io.BytesIO()
    torch.save((*results, inputs[2]), reply)
    return reply.getvalue()


def _ask(child, inputs: Inputs, **changes: float) -> Outputs:
    payload = io.BytesIO()
    # torch.save keeps the strides and the storage behind a view.
    torch.save((tuple(inputs), tuple({**OPTIONS, **changes}.values())), payload)
    reply = child.submit(_in_child, payload.getvalue()).result()
    return Outputs(*torch.load(io.BytesIO(reply), weights_only=False))


@pytest.fixture(scope="module")
def child():
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_interpret) as pool:
        try:
            _ask(pool, make_inputs(0, torch.float32, slots=2, size=2))
        except Exception as error:
            if "only 0-dimensional arrays" in str(error):
                pytest.skip("the interpreter of triton 3.6 needs numpy < 2.4")
            raise
        yield pool


@pytest.fixture
def triton_mix(child):
    return partial(_ask, child)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 33, 257])
@pytest.mark.parametrize("slots", [2, 6, 9])
@pytest.mark.parametrize(("seed", "damping"), [(0, 1.0), (1, 0.7)])
def test_matches_the_reference(triton_mix, seed, damping, slots, size, dtype):
    inputs = make_inputs(seed, dtype, slots, size)
    check_against_reference(inputs, triton_mix(inputs, damping=damping), damping=damping)


@pytest.mark.parametrize(("slots", "size"), [(1, 7), (2, 1030), (5, 600), (33, 65), (65, 70)])
def test_the_ends_of_the_range_of_slots_and_several_tiles(triton_mix, slots, size):
    inputs = make_inputs(2, torch.float32, slots, size, batch=2)
    actual = triton_mix(inputs, damping=0.5)
    if slots == 1:
        f, g = inputs.f_history[:, 0], inputs.g_history[:, 0]
        torch.testing.assert_close(actual.z, f - 0.5 * g)
    else:
        check_against_reference(inputs, actual, damping=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_history_close_to_convergence(triton_mix, dtype):
    inputs = make_inputs(14, dtype, slots=6, size=33)
    age = (inputs.slot - torch.arange(6)) % 6
    inputs.g_history.mul_(0.1 ** (5.0 - age)[None, :, None])  # each residual a tenth of the last
    inputs.f_history.copy_(inputs.f_history[:, :1] + inputs.g_history)
    g = inputs.g_history.double()
    inputs.gram.copy_(torch.einsum("bin,bjn->bij", g, g))
    check_against_reference(inputs, triton_mix(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("planted", ["slot order", "rounded gram"])
def test_the_comparison_notices_a_planted_error(triton_mix, planted, dtype):
    inputs = make_inputs(3, dtype, slots=6, size=33, batch=2)
    inputs.count[:] = 5
    if planted == "slot order":  # entries of age 1 and 2 change places
        a, b = (inputs.slot - 1) % 6, (inputs.slot - 2) % 6
        wrong = inputs.f_history.clone()
        wrong[:, [a, b]] = wrong[:, [b, a]]
        wrong_inputs = inputs._replace(f_history=wrong)
    else:  # to about the square root of the rounding unit of the result
        coarse = torch.float16 if dtype == torch.float32 else torch.float32
        wrong_inputs = inputs._replace(gram=inputs.gram.to(coarse).double())
    actual = triton_mix(wrong_inputs)
    with pytest.raises(AssertionError, match="above the bound"):
        check_against_reference(inputs, actual)


@pytest.mark.parametrize("layout", ["slots first", "every second entry", "samples last"])
def test_histories_and_gram_need_not_be_contiguous(triton_mix, layout):
    inputs = make_inputs(4, torch.float32, slots=6, size=33)

    def stored(history: Tensor) -> Tensor:
        if layout == "slots first":
            return history.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "samples last":
            return history.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        return torch.stack((history, torch.full_like(history, torch.nan)), dim=3)[..., 0]

    padded = torch.full((4, 7, 9), 7.5, dtype=torch.float64)
    gram = padded[:, :6, 2:8].transpose(1, 2)
    gram.copy_(inputs.gram)
    count = torch.stack((inputs.count, inputs.count - 99), dim=1)[:, 0]
    strided = Inputs(stored(inputs.f_history), stored(inputs.g_history), gram, count, inputs.slot)
    assert not any(t.is_contiguous() for t in strided[:4])
    actual = triton_mix(strided, damping=0.7)
    check_against_reference(inputs, actual, damping=0.7)
    whole = actual.gram.as_strided((4, 7, 9), (63, 9, 1), 0)
    border = torch.ones(7, 9, dtype=torch.bool)
    border[:6, 2:8] = False
    assert (whole[:, border] == 7.5).all()


@pytest.mark.parametrize("damping", [1.0, 0.7])
def test_unused_slots_may_hold_nan(triton_mix, damping):
    clean = make_inputs(5, torch.float32, slots=6, size=33)
    unused = unused_slots(clean)
    assert unused.any()
    poisoned = clean._replace(
        f_history=clean.f_history.masked_fill(unused[:, :, None], torch.nan),
        g_history=clean.g_history.masked_fill(unused[:, :, None], torch.nan),
        gram=clean.gram.masked_fill(unused[:, :, None] | unused[:, None, :], torch.nan),
    )
    actual = triton_mix(poisoned, damping=damping)
    assert torch.equal(actual.z, triton_mix(clean, damping=damping).z)
    expected = reference_mix(poisoned, damping=damping)
    assert torch.equal(actual.gram.isnan(), expected.gram.isnan())
    assert torch.equal(actual.dropped, expected.dropped)


@pytest.mark.parametrize("age", [0, 1])
def test_a_nan_sample_leaves_the_others_bitwise_alone(triton_mix, age):
    clean = make_inputs(6, torch.float32, slots=6, size=33)
    clean.count[:] = 4
    sick = clean._replace(
        f_history=clean.f_history.clone(),
        g_history=clean.g_history.clone(),
        gram=clean.gram.clone(),
    )
    slot = (clean.slot - age) % 6
    sick.f_history[1, slot, 3] = sick.g_history[1, slot, 3] = torch.nan
    sick.gram[1, slot, :] = sick.gram[1, :, slot] = torch.nan
    actual, healthy = triton_mix(sick), triton_mix(clean)
    others = [0, 2, 3]
    for name in ("z", "dropped", "rejected", "gram"):
        assert torch.equal(getattr(actual, name)[others], getattr(healthy, name)[others])
    # The sick sample itself: a NaN entry is dropped like a dependent one.
    expected = reference_mix(sick)
    assert torch.equal(actual.dropped, expected.dropped)
    assert torch.equal(actual.z.isnan(), expected.z.isnan())


def test_an_infinite_newest_residual_reaches_the_result_as_in_the_reference(triton_mix):
    inputs = make_inputs(7, torch.float32, slots=3, size=5)
    inputs.g_history[0, inputs.slot, 2] = torch.inf
    expected, actual = reference_mix(inputs), triton_mix(inputs)
    assert expected.z[0].isnan().tolist() == [False, False, True, False, False]
    assert torch.equal(actual.z.isnan(), expected.z.isnan())


@pytest.mark.parametrize("size", [1, 2, 5])
def test_a_window_larger_than_the_state_drops_the_dependent_columns(triton_mix, size):
    inputs = make_inputs(8, torch.float64, slots=9, size=size)
    inputs.count[:] = 8
    actual = triton_mix(inputs)
    assert (actual.dropped == 8 - size).all()
    check_against_reference(inputs, actual)


def test_a_repeated_iterate_is_dropped(triton_mix):
    inputs = make_inputs(9, torch.float32, slots=3, size=33)
    inputs.count[:] = 2
    inputs.g_history[:] = inputs.g_history[:, :1]
    inputs.gram[:] = torch.einsum(
        "bin,bjn->bij", inputs.g_history.double(), inputs.g_history.double()
    )
    actual = triton_mix(inputs)
    assert (actual.dropped == 2).all()
    assert torch.equal(actual.z, inputs.f_history[:, inputs.slot])


def test_weights_above_the_cap_give_the_plain_step(triton_mix):
    inputs = make_inputs(10, torch.float32, slots=6, size=33)
    inputs.count[:] = torch.tensor([0, 1, 3, 5])
    options = {"damping": 0.7, "max_weight": 1e-3}
    actual = triton_mix(inputs, **options)
    assert actual.rejected.tolist() == [False, True, True, True]
    f, g = (h[:, inputs.slot] for h in (inputs.f_history, inputs.g_history))
    torch.testing.assert_close(actual.z, f - (1 - 0.7) * g)
    assert torch.equal(actual.rejected, reference_mix(inputs, **options).rejected)


def test_an_empty_batch_returns_at_once(triton_mix):
    actual = triton_mix(make_inputs(11, torch.float64, slots=4, size=7, batch=0))
    assert (actual.z.shape, actual.z.dtype) == ((0, 7), torch.float64)
    assert (actual.dropped.shape, actual.dropped.dtype) == ((0,), torch.int32)
    assert (actual.rejected.shape, actual.rejected.dtype) == ((0,), torch.bool)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i._replace(f_history=i.f_history[0]), r"must both be \(B, m, n\)"),
        (lambda i: i._replace(g_history=i.g_history[:, :, 1:]), r"must both be \(B, m, n\)"),
        (lambda i: i._replace(gram=i.gram.float()), r"gram must be float64 \(4, 3, 3\)"),
        (lambda i: i._replace(gram=i.gram[:, 1:]), r"gram must be float64 \(4, 3, 3\)"),
        (lambda i: i._replace(count=i.count.long()), r"count must be int32 \(4,\)"),
        (lambda i: i._replace(count=i.count[1:]), r"count must be int32 \(4,\)"),
        (lambda i: i._replace(g_history=i.g_history.double()), "differ in dtype"),
        (
            lambda i: i._replace(f_history=i.f_history.half(), g_history=i.g_history.half()),
            "must be float32 or float64",
        ),
        (lambda i: i._replace(slot=3), r"newest 3 is not in \[0, 3\)"),
        (lambda i: i._replace(slot=-1), r"newest -1 is not in \[0, 3\)"),
    ],
)
def test_arguments_it_cannot_take_raise_as_in_the_compiled_one(triton_mix, change, message):
    inputs = change(make_inputs(12, torch.float32, slots=3, size=5))
    with pytest.raises(RuntimeError, match=message):
        triton_mix(inputs)
    if not extension.why_missing:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fastdeq.anderson_mix(*inputs, *OPTIONS.values())


def test_too_many_slots_raise(triton_mix):
    with pytest.raises(RuntimeError, match="at most 65 entries, got 66"):
        triton_mix(make_inputs(13, torch.float32, slots=66, size=2))
