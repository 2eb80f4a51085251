"""fastdeq.recommend: each rule where it applies and where it does not, and what changes do."""

import dataclasses
import math

import pytest
import torch
from advice_cases import F64, MLP, LinearCell, symmetric_matrix
from torch import nn

import fastdeq
from fastdeq import AffineCell, DEQLayer, Energy, Orthogonal, Picard
from fastdeq.diagnostics import Recommendation, Recommendations, advice

QUIET = {"on_failure": "ignore"}


def changes(found):
    return [r.change for r in found]


@pytest.mark.parametrize(
    "make",
    [lambda: AffineCell(6, 32, scale=3.0), lambda: fastdeq.init.dense_(MLP(12), 2.0)],
    ids=["affine", "mlp"],
)
def test_a_scale_that_was_measured(make):
    torch.manual_seed(0)
    cell = make()
    layer = DEQLayer(cell, **QUIET)
    x = torch.randn(16, 6 if isinstance(cell, AffineCell) else 12)
    before = {n: p.clone() for n, p in cell.named_parameters()}
    found = fastdeq.recommend(layer, x, samples=16)
    assert isinstance(found, Recommendations)
    assert found.diagnosis.distance < 0
    assert found[0].change == "scale"
    assert 0 < found.get("scale") < 1
    left = found.apply(layer)
    assert changes(left) == changes(found)[1:] == ["weight", "learning_rate"]
    chosen = found.diagnosis.recurrent
    for name, p in cell.named_parameters():
        factor = found.get("scale") if name in chosen else 1.0
        assert p.detach() == pytest.approx(factor * before[name].detach(), rel=1e-6)
    after = layer.diagnose(x, samples=16)
    assert after.converged_share == 1
    # What was measured at a factor is what is there: all samples were probed, to two digits.
    said = float(found[0].why.split("measured as ")[1].split(",")[0])
    assert 1 - after.distance == pytest.approx(said, rel=0.05)
    assert 0.5 < 1 - after.distance < 0.95
    assert "scale" not in changes(after.recommendations)


def test_the_family_at_the_recommended_scale():
    torch.manual_seed(0)
    cell = fastdeq.init.dense_(MLP(12), 2.0)
    size = math.prod(float(m.weight.detach().norm()) for m in (cell.first, cell.second)) / 12
    x = torch.randn(16, 12)
    found = fastdeq.recommend(cell, x)
    value = found.get("weight")
    assert value["family"] == "orthogonal"
    # The geometric mean of both, rounded to two digits.
    assert value["scale"] == pytest.approx(math.sqrt(size) * found.get("scale"), rel=0.05)
    fastdeq.init.initialize_(cell, **value)
    again = fastdeq.recommend(cell, x)
    assert again.diagnosis.converged_share == 1
    assert again.diagnosis.distance > 0.05
    assert "orthogonal" in str(found)


def test_factors_are_tried_until_all_converge():
    """A radius near the target is not enough; without one that is known the factor is halved."""
    seen = []

    def trial(factor):
        seen.append(factor)
        return (math.nan, 0.0) if factor > 1.5 else (0.8 * factor, 1.0 if factor < 0.9 else 0.5)

    assert advice._tried(trial, 2.0) == (0.8, pytest.approx(0.64), 1.0)
    assert seen == [2.0, 1.0, 0.8]


def test_names_choose_the_weights():
    torch.manual_seed(0)
    layer = DEQLayer(MLP(12, 2.0), **QUIET)
    first = layer.cell.first.weight.clone()
    found = fastdeq.recommend(layer, torch.randn(16, 12), names="second.*")
    assert found.diagnosis.recurrent == ("second.weight",)
    found.apply(layer)
    assert torch.equal(layer.cell.first.weight, first)


def test_a_cell_that_is_fine():
    found = fastdeq.recommend(MLP(12, 0.7), torch.randn(16, 12))
    assert changes(found) == ["learning_rate"]
    assert str(found).startswith("To change:\n  1. learning_rate = adam")
    assert found.get("scale") is None
    assert found.get("tol", 5) == 5


@pytest.mark.parametrize("spectrum", [[0.9, *[0.1] * 15], [-0.8, *torch.linspace(-0.5, 0.5, 15)]])
def test_the_rate_of_gradient_descent(spectrum):
    """Ten steps of the recommended rate are the whole distance to the edge: for a symmetric W, and
    any change of it by E, the spectral radius moves by |E| at most (Bauer and Fike 1960)."""
    layer = DEQLayer(LinearCell(symmetric_matrix(spectrum)), tol=1e-10, max_iter=1000)
    x = torch.randn(6, 16, dtype=F64)
    target = torch.randn(6, 16, dtype=F64)

    def loss(z):
        return (z - target).square().sum()

    found = fastdeq.recommend(layer, x, loss=loss, max_products=40)
    rate = found.get("learning_rate")["sgd"]
    w = layer.cell.w.weight
    (grad,) = torch.autograd.grad(loss(layer(x)), w)
    now = float(torch.linalg.eigvals(w.detach()).abs().max())
    moved = w.detach() - 10 * rate * grad
    radius = float(torch.linalg.eigvals(moved).abs().max())
    room = 1 - now
    # |E| is the distance itself, of rates that are rounded to two digits.
    assert float(torch.linalg.matrix_norm(10 * rate * grad, 2)) == pytest.approx(room, rel=0.06)
    assert abs(radius - now) <= 1.06 * room
    adam = found.get("learning_rate")["adam"]
    signs = torch.outer(torch.ones(16), torch.ones(16)).to(F64)  # the largest 2-norm of such a step
    assert 10 * adam * float(torch.linalg.matrix_norm(signs, 2)) == pytest.approx(room, rel=0.06)
    assert "sgd" not in fastdeq.recommend(layer, x).get("learning_rate")  # no gradient of a loss


def test_a_certified_map_may_learn_at_any_rate():
    cell = AffineCell(4, 8, weight=Orthogonal(8, 0.9))
    assert changes(fastdeq.recommend(cell, torch.randn(9, 4))) == []


def slow(radius, **options):
    return DEQLayer(LinearCell(symmetric_matrix([radius, *[0.0] * 7])), **QUIET, **options)


def test_more_iterations_where_they_are_enough():
    torch.manual_seed(0)
    layer = slow(0.9, solver="picard", max_iter=20)
    x = torch.randn(9, 8, dtype=F64)
    found = fastdeq.recommend(layer, x)
    assert changes(found)[:2] == ["max_iter", "solver"]
    found.apply(layer)
    assert layer.options.solver.name == "anderson"
    plain = dataclasses.replace(layer.options, solver=Picard())
    layer.options = plain
    layer(x)
    assert bool(layer.last_solution.converged.all())


def test_a_tolerance_that_can_be_reached():
    """float32 rounds at 6e-8."""
    layer = DEQLayer(MLP(), tol=1e-12, max_iter=1000, **QUIET)
    x = torch.randn(9, 12)
    found = fastdeq.recommend(layer, x)
    assert 1e-9 < found.get("tol") < 1e-5
    found.apply(layer)
    layer(x)
    assert bool(layer.last_solution.converged.all())
    assert fastdeq.recommend(layer, x, tol=1e-3).get("tol") is None
    assert layer.options.tol == found.get("tol")


def test_an_adjoint_that_fails():
    layer = slow(0.9, max_iter=200, adjoint="neumann", adjoint_max_iter=5)
    x = torch.randn(9, 8, dtype=F64)
    found = fastdeq.recommend(layer, x)
    assert found.get("adjoint") == "gmres"
    assert "9 samples did not converge" in str(found).replace("\n     ", " ")
    found.apply(layer)
    assert layer.options.adjoint.name == "gmres"
    assert layer.diagnose(x).adjoint.converged.all()


def test_gmres_needs_more_products():
    torch.manual_seed(0)
    cell = LinearCell(symmetric_matrix(torch.linspace(-0.94, 0.94, 40).tolist()))
    layer = DEQLayer(cell, max_iter=300, adjoint="gmres", adjoint_max_iter=4, **QUIET)
    assert fastdeq.recommend(layer, torch.randn(9, 40, dtype=F64)).get("adjoint_max_iter") == 8


def test_a_limit_for_the_adjoint_of_few():
    rate = torch.tensor([0.1] * 11 + [0.9945]).unsqueeze(1).to(F64)
    layer = DEQLayer(lambda z, x, r: torch.where(x > 2, r, 0.1) * z + x, **QUIET, max_iter=4000)
    d = layer.diagnose(torch.ones(12, 3, dtype=F64) * torch.where(rate > 0.5, 3, 1), rate)
    assert d.amplification[-1] == pytest.approx(1 / (1 - 0.9945), rel=1e-2)
    # Near the edge it is J, of no known weight, that is to be scaled first.
    assert changes(d.recommendations) == ["scale"]
    assert d.recommendations[0].value == pytest.approx(0.8 / 0.9945, rel=1e-3)


def test_stragglers_can_be_left_out():
    rate = torch.tensor([0.05] * 15 + [0.9]).unsqueeze(1)
    layer = DEQLayer(lambda z, x, r: r * z + x, solver="picard", max_iter=500)
    found = fastdeq.recommend(layer, torch.ones(16, 3), rate)
    assert found.get("compact") is True
    found.apply(layer)
    layer(torch.ones(16, 3), rate)
    assert "compact" not in changes(fastdeq.recommend(layer, torch.ones(16, 3), rate))


def test_overflow_is_no_bad_input():
    torch.manual_seed(0)
    cell = AffineCell(4, 16, activation="relu", scale=4.0)
    layer = DEQLayer(cell, solver="picard", max_iter=300, **QUIET)
    found = fastdeq.recommend(layer, torch.randn(9, 4))
    assert "input" not in changes(found)
    assert found[0].change == "scale"
    assert found.get("scale") <= 0.5


def test_an_energy_needs_no_contraction():
    torch.manual_seed(0)
    cell = AffineCell(4, 16, weight="symmetric", scale=2.0)
    layer = DEQLayer(cell, solver=Energy(), max_iter=2000, **QUIET)
    found = fastdeq.recommend(layer, 0.1 * torch.randn(9, 4))
    assert found.diagnosis.converged_share == 1
    assert "weight" not in changes(found)
    assert "scale" not in changes(found)


@pytest.mark.parametrize("weight", ["dense", "orthogonal", "symmetric"])
def test_applied_to_weights_of_fastdeq(weight):
    torch.manual_seed(0)
    layer = DEQLayer(
        AffineCell(4, 24, weight=weight, scale=2.5), solver="anderson", max_iter=30, **QUIET
    )
    x = 0.3 * torch.randn(9, 4)
    before = layer.cell.recurrent_weight().detach().clone()
    found = fastdeq.recommend(layer, x)
    assert found.get("scale") is not None
    assert "scale" not in changes(found.apply(layer))
    w = layer.cell.recurrent_weight().detach()
    assert w == pytest.approx(found.get("scale") * before, rel=1e-5, abs=1e-6)
    assert layer.cell.weight.scale == pytest.approx(2.5 * found.get("scale"))


def test_weights_that_cannot_be_multiplied_are_left():
    torch.manual_seed(0)
    cell = MLP(12, 2.0)
    for name in ("first", "second"):
        nn.utils.parametrizations.orthogonal(getattr(cell, name))
        nn.init.orthogonal_(getattr(cell, name).weight)
    layer = DEQLayer(lambda z, x: 3 * cell(z, x), **QUIET)
    found = fastdeq.recommend(layer, torch.randn(9, 12))
    assert found[0].change == "scale"
    assert "to first order it scales with first.weight, second.weight" in found[0].why
    left = found.apply(layer)
    assert "not applied (first.weight is parametrised" in left[0].why


def test_messages():
    r = Recommendation("learning_rate", {"adam": 1.234e-4}, "a reason")
    assert str(r) == "learning_rate = adam 0.00012: a reason"
    assert str(Recommendation("input", list(range(9)), "x")).startswith(
        "input = [0, 1, 2, 3, 4, 5, ...]"
    )
    found = fastdeq.recommend(MLP(), torch.randn(9, 12))
    assert repr(found) == "Recommendations(learning_rate)"
    assert math.isfinite(found.diagnosis.growth)
    with pytest.raises(TypeError, match="in a DEQLayer, not MLP"):
        found.apply(MLP())
    with pytest.raises(TypeError, match="cell must be a module or function"):
        fastdeq.recommend(3, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="tol must be"):
        fastdeq.recommend(MLP(), torch.randn(9, 12), tol=-1)
