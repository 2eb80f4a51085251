"""Rules of a diagnosis and of recommendations at their thresholds."""

import math

import pytest
import torch
from advice_cases import F64, MLP, LinearCell

import fastdeq
from fastdeq import AffineCell, DEQLayer

QUIET = {"on_failure": "ignore"}


def changes(found):
    return [r.change for r in found]


def test_random_directions_are_of_a_mean():
    d = DEQLayer(MLP()).diagnose(torch.randn(8, 12))
    assert d.gradient_norm == pytest.approx([1 / 8] * 8, rel=1e-5)


def test_an_applied_scale_is_in_the_state_dict():
    torch.manual_seed(0)
    layer, other = (
        DEQLayer(AffineCell(4, 24, weight="orthogonal", scale=2.5), **QUIET) for _ in range(2)
    )
    fastdeq.recommend(layer, torch.randn(9, 4)).apply(layer)
    other.load_state_dict(layer.state_dict())
    scale = layer.cell.weight.scale
    assert scale < 2
    assert float(layer.cell.weight.stored_scale) == pytest.approx(scale, rel=1e-6)
    assert other.cell.weight.scale == pytest.approx(scale, rel=1e-6)  # kept in float32
    w = layer.cell.recurrent_weight().detach()
    assert other.cell.recurrent_weight().detach() == pytest.approx(w, rel=1e-5, abs=1e-6)


def test_stragglers_take_more_than_twice_the_median():
    rates = torch.tensor([0.3] * 8 + [0.5, 0.62]).unsqueeze(1)
    layer = DEQLayer(lambda z, x, r: r * z + x, solver="picard")
    d = layer.diagnose(torch.ones(10, 3), rates)
    count = d.forward.iterations.double()
    assert 1 < count[8] / count[0] < 2 < count[9] / count[0] < 3
    assert d.stragglers.tolist() == [False] * 9 + [True]
    assert "compact" not in changes(d.recommendations)  # from three times the median on


def test_each_of_two_weights_takes_half_of_the_step():
    cell, x = MLP(), torch.randn(9, 12)
    both = fastdeq.recommend(cell, x).get("learning_rate")["adam"]
    one = fastdeq.recommend(cell, x, names="first.*").get("learning_rate")["adam"]
    assert one == pytest.approx(2 * both, rel=0.1)  # of two digits each


def test_the_rate_is_that_of_the_scaled_weights():
    torch.manual_seed(0)
    cell = fastdeq.init.dense_(MLP(), 3.0)
    layer, x = DEQLayer(cell, **QUIET), torch.randn(16, 12)
    before = fastdeq.recommend(layer, x, samples=16)
    assert before.get("scale") < 0.6
    before.apply(layer)
    after = fastdeq.recommend(layer, x, samples=16)
    assert "scale" not in changes(after)
    rate = after.get("learning_rate")["adam"]
    assert before.get("learning_rate")["adam"] == pytest.approx(rate, rel=0.15)


@pytest.mark.parametrize(("radius", "expected"), [(0.85, True), (0.7, False)])
def test_a_skewed_jacobian_calls_for_another_family(radius, expected):
    matrix = radius * torch.eye(6, dtype=F64) + torch.diag(torch.ones(5, dtype=F64), 1)
    found = fastdeq.recommend(LinearCell(matrix), torch.randn(9, 6, dtype=F64))
    norm = float(torch.linalg.matrix_norm(matrix, 2))
    assert norm > max(1.0, 1.5 * radius)
    assert ("weight" in changes(found)) == expected
    assert "scale" not in changes(found)
    if expected:
        size = float(matrix.norm()) / math.sqrt(6)
        assert found.get("weight")["scale"] == pytest.approx(size, rel=0.05)


def test_a_limit_for_an_adjoint_that_exceeds_its_gradient():
    """``(I - J)^-1`` of a Jordan block of 0.9 and k has the entries 10 and 100 k."""
    k = torch.tensor([0.01] * 9 + [3.0], dtype=F64)

    def cell(z, x, k):
        return torch.stack([0.9 * z[:, 0] + k * z[:, 1], 0.9 * z[:, 1]], 1) + x

    layer = DEQLayer(cell, tol=1e-8, max_iter=1000, **QUIET)
    found = fastdeq.recommend(layer, torch.ones(10, 2, dtype=F64), k, loss=lambda z: z[:, 0].sum())
    u = torch.stack([torch.full_like(k, 10.0), 100 * k], 1).norm(dim=1)
    assert found.diagnosis.amplification == pytest.approx(u, rel=1e-4)
    assert "scale" not in changes(found)
    # Ten times the median.
    assert found.get("adjoint_limit") == pytest.approx(10 * float(u.median()), rel=0.05)
    found.apply(layer)
    assert (
        fastdeq.recommend(layer, torch.ones(10, 2, dtype=F64), k, loss=lambda z: z[:, 0].sum()).get(
            "adjoint_limit"
        )
        is None
    )


def test_arguments_that_only_look_like_those_of_samples():
    """A vector of as many numbers as there are samples, which all of them share."""
    gains = torch.linspace(0.1, 0.9, 12, dtype=F64)
    layer = DEQLayer(lambda z, x, g: g.mean() * z + x)
    d = layer.diagnose(torch.randn(12, 3, dtype=F64), gains, samples=3)
    assert len(d.probed) == 3
    assert d.radius.value == pytest.approx([0.5] * 3, rel=1e-9)


def test_compiled_layers():
    torch.manual_seed(0)
    layer = DEQLayer(AffineCell(4, 24, scale=2.5), **QUIET)
    compiled = torch.compile(layer, backend="eager")
    x = torch.randn(9, 4)
    found = fastdeq.recommend(compiled, x)
    assert found.get("scale") == fastdeq.recommend(layer, x).get("scale") < 1
    found.apply(compiled)
    assert compiled.diagnose(x).converged_share == 1
