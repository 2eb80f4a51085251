"""Statistics at initialisation, and eigenvalues of trained models, against known answers."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("pyarrow")

from fastdeq import theory
from fastdeq.study import Config, Ensemble, digits, measure
from fastdeq.study.spectra import eigenvalues
from fastdeq.study.training import model_of

FAMILIES = ("dense", "orthogonal", "symmetric")


@pytest.mark.parametrize("family", FAMILIES)
def test_linear_moments_are_those_of_the_theory(family):
    d, scale, draws = 96, 0.5, 40
    found = measure(Ensemble(family, scale, features=d, draws=draws))
    assert all(found["solved"])
    for name, predicted in (
        ("moment_1", theory.variance(family, scale)),
        ("moment_2", theory.fourth_moment(family, scale)),
        ("length", theory.variance(family, scale)),
        ("adjoint", theory.variance(family, scale)),
    ):
        values = torch.tensor(found[name])
        # Five standard errors of the mean, and the bias of a finite d, of order 1/d.
        allowed = 5 * float(values.std()) / math.sqrt(draws) + 4 * predicted / d
        assert abs(float(values.mean()) - predicted) < allowed, name
    assert found["mean_square_slope"] == [1.0] * draws
    radius = torch.tensor(found["radius"])
    assert radius.isfinite().sum() == 20
    assert (radius[:20] - scale).abs().max() < 0.25 * scale


def test_the_resolvent_of_an_orthogonal_weight_has_its_bound():
    found = measure(Ensemble("orthogonal", 0.8, features=64, draws=5))
    assert max(found["resolvent"]) <= 1 / (1 - 0.8) * (1 + 1e-12)
    assert max(found["resolvent"]) > 0.7 / (1 - 0.8)


def test_a_tanh_equilibrium_is_shorter_than_a_linear_one():
    linear, tanh = (
        measure(Ensemble("dense", 0.5, a, features=64, draws=8)) for a in ("identity", "tanh")
    )
    assert max(tanh["length"]) < min(linear["length"])
    assert all(0 < s < 1 for s in tanh["mean_square_slope"])


def test_draws_without_an_equilibrium_are_said_to_be_so():
    found = measure(Ensemble("dense", 4.0, "relu", features=64, draws=4))
    assert not any(found["solved"])
    assert all(math.isnan(value) for value in found["length"] + found["radius"])


def test_the_global_random_state_is_left_alone_and_seeds_decide():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = measure(Ensemble("dense", 0.5, features=8, draws=2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert measure(Ensemble("dense", 0.5, features=8, draws=2)) == first
    assert measure(Ensemble("dense", 0.5, features=8, draws=2, seed=1)) != first


@pytest.mark.parametrize("family", FAMILIES)
def test_eigenvalues_are_those_of_the_matrices(family):
    dataset = digits()
    config = Config(family, 0.7, features=12, activation="relu")
    model = model_of(config, dataset).double()
    dataset = dataclasses.replace(dataset, x_test=dataset.x_test.double())
    found = eigenvalues(model, dataset, "before")
    cell = model.layer.cell
    w, x = cell.recurrent_weight().detach(), dataset.x_test[:1]
    z = model.layer(x).detach()
    jacobian = torch.autograd.functional.jacobian(lambda z: cell(z, x).squeeze(0), z).squeeze(1)
    for name, matrix in (("weight_before", w), ("jacobian_before", jacobian)):
        pairs = torch.tensor(found[name], dtype=torch.float64).view(-1, 2)
        # The sum and the sum of squares of the eigenvalues, both real.
        values = torch.view_as_complex(pairs)
        assert len(values) == 12
        assert torch.allclose(values.sum().real, matrix.trace(), atol=1e-5)
        assert torch.allclose((values**2).sum().real, (matrix @ matrix).trace(), atol=1e-5)
        assert abs(values.sum().imag) < 1e-5
