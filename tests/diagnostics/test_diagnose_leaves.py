"""A diagnosis leaves the layer as it was, and inputs that are bad have defined outcomes."""

import math

import pytest
import torch
from advice_cases import MLP, Normalised

import fastdeq
from fastdeq import AffineCell, CoupledSamplesError, DEQLayer, Orthogonal, Symmetric


def state_of(layer):
    return {
        "values": {n: t.clone() for n, t in layer.state_dict().items()},
        "tensors": {n: id(t) for n, t in [*layer.named_parameters(), *layer.named_buffers()]},
        "grads": {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None},
        "modes": [m.training for m in layer.modules()],
        "flags": [p.requires_grad for p in layer.parameters()],
        "versions": [t._version for t in [*layer.parameters()]],
        "rng": torch.get_rng_state(),
        "solutions": (layer.last_solution, layer.last_adjoint_solution),
        "options": layer.options,
        "kept": layer.solutions,
        "keys": layer.__dict__.keys(),
    }


def assert_same(before, after):
    for key, value in before.items():
        if key in ("values", "grads"):
            assert value.keys() == after[key].keys()
            assert all(torch.equal(t, after[key][n]) for n, t in value.items()), key
        elif key == "rng":
            assert torch.equal(value, after[key])
        else:
            assert value == after[key], key


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("call", ["diagnose", "recommend"])
@pytest.mark.filterwarnings("ignore::fastdeq.ConvergenceWarning")
def test_the_layer_is_left_alone(training, context, call):
    seen = []
    layer = DEQLayer(
        Normalised(),
        randomness="same",
        keep_solutions=3,
        on_solution=lambda *args: seen.append(args),
        on_failure="raise",
        tol=1e-3,
        batch_dim=None if training else 0,
    )
    layer.train(training)
    x = torch.randn(5, 6)
    layer(x).sum().backward()
    graph = layer(x)
    before, count = state_of(layer), len(seen)
    with context():
        if call == "diagnose":
            layer.diagnose(x)
        else:
            fastdeq.recommend(layer, x)
    assert_same(before, state_of(layer))
    assert len(seen) == count
    assert x.grad is None
    graph.sum().backward()  # nothing that it has saved was written to


@pytest.mark.parametrize(
    "weight",
    [lambda: "dense", lambda: Symmetric(8, 1.5), lambda: Orthogonal(8, 0.5, max_scale=2.0)],
    ids=["dense", "symmetric", "orthogonal"],
)
def test_affine_cells_are_left_alone(weight):
    """Where factors of the scale are tried too."""
    layer = DEQLayer(
        AffineCell(4, 8, weight=weight(), **({"scale": 1.8} if weight() == "dense" else {}))
    )
    layer.options = DEQLayer(layer.cell, on_failure="ignore").options
    x = torch.randn(6, 4, requires_grad=True)
    layer(x).sum().backward()
    before, grad = state_of(layer), x.grad.clone()
    layer.diagnose(x, loss=lambda z: z.square().sum())
    assert_same(before, state_of(layer))
    assert torch.equal(x.grad, grad)


def test_the_same_numbers_each_time():
    layer = DEQLayer(MLP())
    x = torch.randn(9, 12)
    a, b = layer.diagnose(x), layer.diagnose(x)
    assert torch.equal(a.amplification, b.amplification)
    assert torch.equal(a.radius.value, b.radius.value)
    c = layer.diagnose(x, generator=torch.Generator().manual_seed(5))
    assert not torch.equal(a.amplification, c.amplification)


def test_samples_that_are_not_finite():
    layer = DEQLayer(MLP())
    x = torch.randn(9, 12)
    whole = layer.diagnose(x, samples=20)
    x[[2, 5], 3] = torch.tensor([math.nan, math.inf])
    d = layer.diagnose(x, samples=20)
    rest = torch.tensor([0, 1, 3, 4, 6, 7, 8])
    assert d.forward.nonfinite.nonzero().flatten().tolist() == [2, 5]
    assert d.amplification[[2, 5]].isnan().all()
    assert d.amplification[rest] == pytest.approx(whole.amplification[rest], rel=1e-3)
    assert sorted(d.probed.tolist()) == rest.tolist()
    first = d.recommendations[0]
    assert (first.change, first.value) == ("input", [2, 5])
    assert [r.change for r in d.recommendations] == ["input", "learning_rate"]
    assert "2 of 9 samples" in first.why
    assert "2 NONFINITE" in str(d)
    only = layer.diagnose(torch.full((3, 12), math.nan))
    assert len(only.probed) == 0
    assert math.isnan(only.distance)
    assert only.recommendations[0].value == [0, 1, 2]
    assert str(only)


def test_an_empty_batch():
    for layer, x in (
        (DEQLayer(MLP()), torch.zeros(0, 12)),
        (DEQLayer(AffineCell(3, 4)), torch.zeros(0, 3)),
    ):
        d = layer.diagnose(x)
        assert d.forward.status.shape == (0,)
        assert len(d.probed) == 0
        assert math.isnan(d.distance)
        assert (d.straggler_share, d.converged_share) == (0.0, 1.0)
        assert d.recommendations == ()
        assert "0 samples" in str(d)
        assert "Nothing to change." in str(d)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"samples": 0}, ValueError, "samples must be how many"),
        ({"samples": True}, ValueError, "samples must be how many"),
        ({"max_products": 1}, ValueError, "max_products must be 2"),
        ({"max_products": 2.5}, ValueError, "max_products must be an integer"),
        ({"generator": 3}, TypeError, "generator must be"),
        ({"loss": 3}, TypeError, "loss must be a function"),
        ({"loss": lambda z: z}, ValueError, r"one real number as a tensor, got \(4, 12\)"),
        ({"loss": lambda z: 1.0}, ValueError, "got float"),
        ({"z0": torch.zeros(4, 3)}, RuntimeError, "shapes cannot be multiplied"),
        ({"gian": torch.ones(4, 1)}, TypeError, "gian"),
    ],
    ids=lambda x: str(next(iter(x))) if isinstance(x, dict) else None,
)
def test_refused(options, error, message):
    with pytest.raises(error, match=message):
        DEQLayer(MLP()).diagnose(torch.randn(4, 12), **options)


def test_coupled_samples_are_refused_as_in_a_solve():
    with pytest.raises(CoupledSamplesError):
        DEQLayer(lambda z, x: 0.1 * z.flip(0) + x).diagnose(torch.randn(4, 3))


def test_a_loss_that_does_not_depend_on_the_state():
    d = DEQLayer(MLP()).diagnose(torch.randn(4, 12), loss=lambda z: torch.zeros(()))
    assert not d.gradient_norm.any()
    assert d.amplification.isnan().all()
    assert not any(p.norm for p in d.parameters)
