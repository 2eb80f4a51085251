"""The triangle step against float64; what is compared, and how closely: step_cases.py."""

import math

import pytest
import torch
from fastdeq.kernels import triangle
from fastdeq.kernels.activations import INDEX
from fastdeq.kernels.triangle import TILE, parts_of, triangle_step
from step_cases import EXACT, NARROW, PRODUCT, SLOT, STOPPED, Step, check

from fastdeq.activations import ACTIVATIONS

# Around the edges of one tile of W and of the sums, and 2 to 4 tiles: an odd and an even number.
SIZES = [1, 31, 32, 33, 63, 64, 65, 96, 130, 200]
MAPS = [pytest.param("tanh", id="forward"), pytest.param(None, id="adjoint")]
NAN = math.nan


class SymmetricStep(Step):
    """W^T = W."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.weight = (self.weight + self.weight.t()) / 2
        self.given = self.weight
        self.parts = self.weight.new_full(parts_of(*self.point.shape), NAN)

    def run(self, **more):
        self.before = self.state()
        triangle_step(self.samples, self.given, self.parts, **self.arguments(), **more)
        return self


def below_the_diagonal(size):
    """Entries of tiles that are not to be read."""
    tile = torch.arange(size) // TILE
    return tile[:, None] > tile[None, :]


@pytest.mark.parametrize("activation", MAPS)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", SIZES)
def test_an_evaluation_matches_float64_without_the_lower_triangle(device, size, batch, activation):
    step = SymmetricStep(device, batch, size, activation)
    step.given = step.weight.masked_fill(below_the_diagonal(size).to(device), NAN)
    check(step.run(), EXACT)


@pytest.mark.parametrize("activation", INDEX)
def test_every_activation(device, activation):
    check(SymmetricStep(device, 2, 33, activation).run(), EXACT)


@pytest.mark.parametrize("layout", ["transposed", "sliced", "strided"])
def test_weights_of_any_layout(device, layout):
    step = SymmetricStep(device, 2, 130)
    larger = step.weight.new_full((133, 265), NAN)
    view = larger[1:131, 1:261:2] if layout == "strided" else larger[1:131, 5:135]
    view.copy_(step.weight)
    step.given = step.weight.t() if layout == "transposed" else view
    check(step.run(), EXACT)


@pytest.mark.parametrize(
    "wanted",
    [
        (EXACT, STOPPED),
        (STOPPED, EXACT),
        (PRODUCT, EXACT),
        (PRODUCT, STOPPED),
        (NARROW, NARROW),
        (NARROW, PRODUCT),
        (STOPPED, STOPPED),
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", MAPS)
def test_rows_get_what_they_want_but_nothing_narrow(device, activation, wanted):
    step = SymmetricStep(device, 2, 130, activation, wanted=wanted)
    for row, kind in enumerate(wanted):
        if kind == STOPPED:
            for rows_of in (step.point, step.samples.offset, step.samples.slope):
                if rows_of is not None:
                    rows_of[row] = NAN
    check(step.run(), [EXACT if kind == NARROW else kind for kind in wanted])
    if wanted == (STOPPED, STOPPED):
        assert step.parts.isnan().all()


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_a_bad_row_does_not_reach_the_other(device, bad):
    torch.manual_seed(0)
    healthy = SymmetricStep(device, 2, 130).run().state()
    torch.manual_seed(0)
    sick = SymmetricStep(device, 2, 130)
    sick.point[0, 65] = bad
    after = sick.run().state()
    for name in healthy:
        torch.testing.assert_close(after[name][1], healthy[name][1], rtol=0, atol=0, equal_nan=True)
    assert after["sums"][0].isfinite().logical_not().any()


def test_slopes_alone(device):
    step = SymmetricStep(device, 2, 130, wanted=(EXACT, STOPPED))
    before = step.run(slope_only=True).before
    after = step.state()
    weight, point = step.weight.cpu().double(), step.point.cpu().double()
    slope = ACTIVATIONS["tanh"].slope(step.samples.offset.cpu().double() + point @ weight)
    # |phi''| < 1; the sums are as in step_cases.
    torch.testing.assert_close(after["values"][0, SLOT].double(), slope[0], rtol=0, atol=2e-5)
    assert after["values"][1].isnan().all()
    for other in ("residuals", "pre", "sums", "flags"):
        assert torch.equal(after[other].nan_to_num(9), before[other].nan_to_num(9))


def test_an_evaluation_repeated_gives_the_same_bits(device):
    step = SymmetricStep(device, 2, 200)
    first = step.run().state()
    second = step.run().state()
    for name in first:
        assert torch.equal(first[name].nan_to_num(9), second[name].nan_to_num(9))


def test_more_parts_than_are_added_at_a_time(device, monkeypatch):
    monkeypatch.setattr(triangle, "_PARTS", 2)
    check(SymmetricStep(device, 1, 5 * TILE - 3).run(), EXACT)


def test_no_rows_and_too_many(device):
    step = SymmetricStep(device, 0, 5)
    triangle_step(step.samples, step.weight, step.parts, **step.arguments())
    with pytest.raises(RuntimeError, match="at most 2 samples, got 3"):
        SymmetricStep(device, 3, 5).run()


PLANTED = {
    "a weight that is not symmetric": lambda s: s.weight[0, -1].add_(0.01),
    "a part twice": lambda s: s.weight[:TILE, :TILE].mul_(2),
    "a part lost": lambda s: s.weight[:TILE, -1].zero_(),
    "no offset": lambda s: s.samples.offset.zero_(),
    "a wrong sum": lambda s: s.samples.sums[0, -1, 0].mul_(1 + 1e-4),
    "a missing output": lambda s: s.values[0, SLOT, -1].fill_(NAN),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_the_comparison_sees_a_planted_error(device, planted):
    step = SymmetricStep(device, 2, 130).run()
    check(step, EXACT)
    PLANTED[planted](step)
    with pytest.raises(AssertionError):
        check(step, EXACT)
