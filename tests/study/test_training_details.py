"""What a run does at each step: the rate, the length of the gradient, the means that it reports."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from fastdeq import study
from fastdeq.study.trace import BINS, Tally, Trace
from fastdeq.study.training import _optimizer, evaluate, model_of


@pytest.fixture(scope="module")
def dataset():
    whole = study.digits()
    return study.Dataset(whole.x_train[:96], whole.y_train[:96], whole.x_test, whole.y_test)


@pytest.fixture
def steps(monkeypatch):
    """Rate and length of the gradient at each update of plain stochastic gradient descent."""
    seen, step = [], torch.optim.SGD.step

    def watched(self, *args):
        squares = [p.grad.square().sum() for g in self.param_groups for p in g["params"]]
        seen.append((self.param_groups[0]["lr"], float(sum(squares).sqrt())))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    return seen


def test_the_rate_falls_like_a_cosine_from_its_start(dataset, steps):
    config = study.Config("dense", 0.5, features=8, epochs=3, batch_size=32, learning_rate=0.2)
    study.train(dataset, config)
    expected = [0.2 * (1 + math.cos(math.pi * k / 9)) / 2 for k in range(9)]
    assert [rate for rate, _ in steps] == pytest.approx(expected)


@pytest.mark.parametrize("longest", [0.05, math.inf])
def test_long_gradients_are_shortened(dataset, steps, longest):
    config = study.Config(
        "dense", 0.5, features=8, epochs=1, batch_size=32, max_gradient=longest, learning_rate=0.01
    )
    result = study.train(dataset, config)
    lengths = [length for _, length in steps]
    if longest < 1:
        assert lengths == pytest.approx([longest] * 3, rel=1e-4)
        assert min(result.trace["gradient_norm"]) > longest  # before it was shortened
    else:
        assert lengths == pytest.approx(result.trace["gradient_norm"], rel=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("kept", [True, False])
def test_an_orthogonal_weight_moves_as_far_as_another_of_its_scale(dataset, optimizer, kept):
    """W = s Q of a parameter Q: a step of it is s times one of Q, and so is the gradient of Q that
    of W; Adam's step does not depend on the length of the gradient."""
    scale, rate = 4.0, 0.1
    config = study.Config(
        "orthogonal", scale, parametrized=kept, features=8, optimizer=optimizer, learning_rate=rate
    )
    rest, recurrent = _optimizer(model_of(config, dataset), config).param_groups
    power = {"sgd": 2, "adam": 1}[optimizer] if kept else 0
    assert recurrent["lr"] == pytest.approx(rate / scale**power)
    assert rest["lr"] == rate
    assert len(recurrent["params"]) == 1


def test_evaluation_weighs_samples_equally_in_a_last_part_that_is_short():
    logits = torch.eye(3)[[0, 1, 2, 0, 1]] * 20
    labels = torch.tensor([0, 1, 2, 0, 0])
    share, loss = evaluate(torch.nn.Identity(), logits, labels, rows=2)
    assert share == pytest.approx(4 / 5)
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)))


def test_the_loss_is_that_of_the_last_epoch(dataset):
    short, long = (
        study.train(dataset, study.Config("dense", 0.5, features=8, epochs=n)) for n in (1, 6)
    )
    assert long.loss < min(short.loss, long.trace["loss"][0])
    last = long.trace["loss"][-2:]  # of the twelve steps, which are fewer than the bins
    assert long.loss == pytest.approx(sum(last) / 2)


def solution(iterations, residual, converged):
    return SimpleNamespace(
        iterations=torch.tensor(iterations),
        residual=torch.tensor(residual),
        converged=torch.tensor(converged),
        nonfinite=torch.zeros(len(iterations), dtype=torch.bool),
        status=torch.zeros(len(iterations)),
    )


def test_means_are_over_samples_and_not_over_solves():
    tally = Tally()
    tally.add(solution([1, 2, 3], [0.1] * 3, [True, True, False]))
    tally.add(solution([10], [0.1], [False]))
    tally.add(None)
    assert tally.read() == (4.0, 0.5, 0)
    assert math.isnan(Tally().read()[0])


def test_a_trace_holds_medians_of_residuals_and_means_of_stretches():
    trace = Trace()
    count = 2 * BINS
    for k in range(count):
        trace.add(
            torch.tensor(float(k)), solution([2, 4, 9], [0.1, 0.2, 9.0], [True, True, False]),
            None, torch.tensor(1.0),
        )  # fmt: skip
    found = trace.binned()
    assert found["step"] == list(range(2, count + 1, 2))
    assert found["loss"] == [2 * k + 0.5 for k in range(BINS)]
    assert found["forward_residual"] == pytest.approx([0.2] * BINS)
    assert found["forward_iterations"] == [5.0] * BINS
    assert all(math.isnan(v) for v in found["backward_iterations"])


def test_the_drift_is_the_largest_of_any_epoch(dataset, monkeypatch):
    drifts = iter([0.1, 0.7, 0.2])
    monkeypatch.setattr("fastdeq.study.training._drift", lambda *_: next(drifts))
    config = study.Config("symmetric", 0.5, features=8, epochs=3)
    assert study.train(dataset, config).structure_drift == 0.7
