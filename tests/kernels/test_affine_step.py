"""The Triton affine step against float64; what is compared, and how closely: step_cases.py."""

import math

import pytest
import torch
from fastdeq.kernels.activations import INDEX
from fastdeq.kernels.steps import affine_step as module
from fastdeq.kernels.steps.affine_step import affine_step
from fastdeq.kernels.steps.tile_choice import TILES, TILES_UNALIGNED, candidates, default_tile
from step_cases import FULL, LOW, PRODUCT, REQUESTED, SLOT, STOPPED, Step, check

SIZES = [1, 31, 32, 33, 64, 65, 130]
BATCHES = [1, 2, 17, 33, 70]
MAPS = [pytest.param("tanh", id="forward"), pytest.param(None, id="adjoint")]
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("activation", MAPS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("size", SIZES)
def test_an_evaluation_matches_float64(device, size, batch, activation):
    check(Step(device, batch, size, activation).run(), FULL)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 17, 33])
def test_a_low_precision_evaluation_matches_float64_on_rounded_factors(device, batch, size):
    check(Step(device, batch, size, requested=LOW, schedule=True).run(), LOW)


@pytest.mark.parametrize("activation", INDEX)
def test_every_activation(device, activation):
    """Of masked outputs phi(0) must not get into the sums, where it is not 0."""
    check(Step(device, 17, 33, activation).run(), FULL)


def mixed(batch):
    return [(FULL, LOW, PRODUCT, STOPPED, LOW)[row % 5] for row in range(batch)]


def evaluated_of(requested, rows):
    """What becomes of the requests in tiles of so many rows."""
    kinds = []
    for start in range(0, len(requested), rows):
        tile = requested[start : start + rows]
        low = all(kind in (LOW, STOPPED) for kind in tile)
        kinds += [FULL if kind == LOW and not low else kind for kind in tile]
    return kinds


@pytest.mark.parametrize("size", [64, 65, 130])
@pytest.mark.parametrize("tile", TILES + TILES_UNALIGNED)
def test_every_tile_with_mixed_requests(device, tile, size):
    requested = mixed(40) + [LOW, STOPPED] * 50
    step = Step(device, len(requested), size, requested=requested, schedule=True)
    kinds = evaluated_of(requested, tile.rows)
    assert {FULL, LOW, PRODUCT, STOPPED} == {*kinds}
    check(step.run(tile=tile), kinds)


def test_without_the_schedule_low_precision_is_not_used(device):
    check(Step(device, 5, 33, requested=mixed(5)).run(), [FULL, FULL, PRODUCT, STOPPED, FULL])


@pytest.mark.parametrize("activation", MAPS)
def test_products_only(device, activation):
    check(Step(device, 17, 65, activation, requested=PRODUCT).run(), PRODUCT)


@pytest.mark.parametrize("size", [33, 130])
@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "sliced transposed"])
def test_weights_of_any_layout(device, layout, size):
    step = Step(device, 17, size, requested=[FULL] * 16 + [LOW], schedule=True)
    for name in ("weight", "low_weight"):
        dense = getattr(step, name)
        larger = dense.new_full((size + 3, 2 * size + 5), NAN)
        if layout == "transposed":
            view = dense.t().contiguous().t()
        elif layout == "sliced":
            view = larger[1 : size + 1, 5 : size + 5]
        elif layout == "strided":
            view = larger[1 : size + 1, 1 : 2 * size + 1 : 2]
        else:
            view = larger[1 : size + 1, 5 : size + 5].t()
        setattr(step, name, view.copy_(dense) if layout != "transposed" else view)
        assert size == 1 or not getattr(step, name).is_contiguous()
    check(step.run(tile=TILES[0]), [FULL] * 16 + [LOW])


def poison(step, rows, value=NAN):
    samples = step.samples
    for rows_of in (step.point, samples.offset, samples.pre, samples.change, samples.slope):
        if rows_of is not None:
            rows_of[rows] = value


@pytest.mark.parametrize("activation", MAPS)
@pytest.mark.parametrize("kind", [FULL, LOW])
def test_stopped_rows_are_neither_read_nor_written(device, kind, activation):
    """Even in a tile with running ones."""
    requested = [STOPPED, kind, kind, STOPPED] * 8
    step = Step(device, 32, 65, activation, requested=requested, schedule=True)
    poison(step, [row for row in range(32) if requested[row] == STOPPED])
    check(step.run(), requested)


@pytest.mark.parametrize("kind", [FULL, LOW])
@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_bad_row_does_not_reach_the_others(device, bad, kind):
    torch.manual_seed(0)
    healthy = Step(device, 20, 65, requested=kind, schedule=True).run()
    torch.manual_seed(0)
    sick = Step(device, 20, 65, requested=kind, schedule=True)
    poison(sick, [7], bad)
    sick.run()
    others = [row for row in range(20) if row != 7]
    before, after = healthy.state(), sick.state()
    for name in before:
        torch.testing.assert_close(
            after[name][others], before[name][others], rtol=0, atol=0, equal_nan=True
        )
    if math.isnan(bad):
        assert after["values"][7, SLOT].isnan().all()
        assert after["sums"][7].isnan().all()


@pytest.mark.parametrize("activation", MAPS)
@pytest.mark.parametrize("size", [33, 130])
def test_at_zero_neither_the_point_nor_the_weight_is_read(device, size, activation):
    step = Step(device, 17, size, activation, requested=[FULL, STOPPED] * 8 + [FULL])
    step.point.fill_(NAN)
    step.weight.fill_(NAN)
    check(step.run(at_zero=True), [FULL, STOPPED] * 8 + [FULL], at_zero=True)


@pytest.mark.parametrize("missing", ["pre", "residual"])
def test_what_is_not_kept_is_not_needed(device, missing):
    step = Step(device, 17, 65)
    kept = Step.arguments(step)
    if missing == "residual":
        kept["residual"] = None
        affine_step(step.samples, step.weight, None, **kept)
        assert step.state()["residuals"].isnan().all()
    else:
        object.__setattr__(step.samples, "pre", None)
        affine_step(step.samples, step.weight, None, **kept)
    step.samples.flags[:, REQUESTED] = FULL
    again = step.values[:, SLOT].clone()
    object.__setattr__(step.samples, "pre", torch.full_like(step.point, NAN))
    assert torch.equal(step.run().values[:, SLOT], again)


@pytest.mark.parametrize("kind", [FULL, LOW])
def test_measuring_tiles_leaves_no_trace(device, kind, monkeypatch):
    """A LOW launch adds to pre, and measuring repeats it. (The interpreter measures nothing.)"""
    monkeypatch.setattr(module, "_measured", {})
    check(Step(device, 33, 97, requested=kind, schedule=True).run(), kind)
    assert bool(module._measured) == (device == "cuda")


def test_an_evaluation_repeated_gives_the_same_bits(device):
    """The order of no sum depends on chance, and nothing that is read is written."""
    step = Step(device, 33, 130, requested=[FULL, PRODUCT, STOPPED] * 11)
    first = step.run().state()
    second = step.run().state()
    for name in first:
        assert torch.equal(first[name].nan_to_num(9), second[name].nan_to_num(9))


def test_no_rows_and_no_entries(device):
    for batch, size in ((0, 5), (3, 0)):
        step = Step(device, batch, size or 1)
        step.point = step.point[:, :size]
        affine_step(step.samples, step.weight, None, **step.arguments())


def test_strides_that_overflow_the_offsets_raise(device):
    step = Step(device, 2, 2)
    step.weight = torch.empty_strided((2, 2), (1 << 24, 1), device="meta")
    with pytest.raises(RuntimeError, match="takes strides below"):
        step.run()


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize("aligned", [False, True])
def test_few_tiles_are_measured_and_small_batches_get_small_ones(aligned, precision):
    for batch in (1, 16, 17, 32, 64, 1000):
        tiles = candidates(batch, aligned, precision)
        assert 1 <= len(tiles) <= 4
        assert all(tile.rows < 2 * max(batch, 16) for tile in tiles)
        assert default_tile(batch, 256, aligned, precision) in tiles
    assert default_tile(1000, 4096, aligned, precision).rows == 64


PLANTED = {
    "a transposed weight": lambda s: setattr(s, "weight", s.weight.t()),
    "no offset": lambda s: s.samples.offset.zero_(),
    "a rounded weight": lambda s: setattr(s, "weight", s.low_weight.float()),
    "a wrong input of the product": lambda s: s.point[:, -1].zero_(),
    "another activation": lambda s: setattr(s, "activation", "sigmoid"),
    "a wrong value": lambda s: s.values[3, SLOT, -1].mul_(1 + 1e-4),
    "a wrong sum": lambda s: s.samples.sums[3, -1, 0].mul_(1 + 1e-4),
    "a sum of too much": lambda s: s.samples.sums[3, -1, 1].add_(0.25),
    "a row that was not to be written": lambda s: s.values[0, SLOT, 0].fill_(1.0),
    "a history that was not requested": lambda s: s.residuals[1, SLOT].fill_(1.0),
    "another slot": lambda s: s.values[3, SLOT + 1, 0].fill_(1.0),
    "a kind that was not evaluated": lambda s: s.samples.flags[3, 1].fill_(LOW),
    "a missing output": lambda s: s.values[3, SLOT, 0].fill_(NAN),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_the_comparison_sees_a_planted_error(device, planted):
    requested = [STOPPED] + [FULL] * 16
    step = Step(device, 17, 65, requested=requested).run()
    check(step, requested)
    PLANTED[planted](step)
    with pytest.raises(AssertionError):
        check(step, requested)


def test_the_comparison_tells_rounded_factors_from_others(device):
    step = Step(device, 17, 65, requested=LOW, schedule=True).run()
    check(step, LOW)
    step.low_weight = step.weight
    with pytest.raises(AssertionError, match="above the bound"):
        check(step, LOW)
