"""fastdeq.init on weights that are computed: parametrisations, hooks, fastdeq's own weights."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from fastdeq import AffineCell, DEQLayer, Orthogonal, OrthogonalMap, SymmetricMap, init


def close(a, b, error):
    torch.testing.assert_close(a, b, rtol=0, atol=error)


def parametrized(kind):
    layer = nn.Linear(8, 8)
    parametrize.register_parametrization(layer, "weight", kind)
    return layer


def test_through_the_inverse():
    layer = init.symmetric_(parametrized(SymmetricMap()), 0.9)
    assert torch.equal(layer.weight, layer.weight.T)
    layer = init.orthogonal_(parametrized(OrthogonalMap(0.5)), 0.5)
    # Sums of 8 products.
    w = layer.weight.detach()
    close(w @ w.T, 0.25 * torch.eye(8), 1e-6)
    layer = parametrizations.weight_norm(nn.Linear(8, 8))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    init.dense_(layer, 0.9, generator=generators[0])
    plain = init.dense_(torch.empty(8, 8), 0.9, generator=generators[1])
    close(layer.weight.detach(), plain, 1e-6)


class NoInverse(nn.Module):
    def forward(self, raw):
        return raw.tanh()


@pytest.mark.parametrize(
    ("make", "family", "why"),
    [
        (lambda: parametrized(OrthogonalMap()), "orthogonal", "OrthogonalMap, which turns"),
        (lambda: parametrized(SymmetricMap()), "dense", "SymmetricMap, which turns"),
        (lambda: parametrized(NoInverse()), "dense", "NoInverse, which does not take"),
        (lambda: parametrizations.spectral_norm(nn.Linear(8, 8)), "dense", "turns"),
    ],
    ids=["other scale", "other family", "no inverse", "spectral norm"],
)
def test_a_parametrisation_that_cannot(make, family, why):
    layer = make()
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    with pytest.raises(ValueError, match=why):
        init.initialize_(layer, family, 0.5)
    after = layer.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items())


@pytest.mark.parametrize(
    "make", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=lambda f: f.__name__
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_hooks_compute(make):
    with pytest.raises(ValueError, match="hooks of Linear compute weight from"):
        init.dense_(make(nn.Linear(8, 8)), 0.9)


def test_pruned_weights():
    with pytest.raises(ValueError, match="pruning"):
        init.dense_(prune.random_unstructured(nn.Linear(8, 8), "weight", 0.5), 0.9)


@pytest.mark.parametrize("family", ["dense", "orthogonal", "symmetric"])
def test_weight_modules_take_their_own_family_at_another_scale(family):
    cell = AffineCell(3, 64, weight=family, scale=0.3)
    before = cell.recurrent_weight().detach().clone()
    init.initialize_(cell, family, 0.8, names="weight.*")
    assert cell.weight.scale == 0.8
    w = cell.recurrent_weight().detach()
    assert float(w.norm() / before.norm()) == pytest.approx(0.8 / 0.3, rel=0.1)
    if family == "orthogonal":
        close(w @ w.T, 0.64 * torch.eye(64), 1e-5)
        assert cell.weight.norm_bound() == 0.8
        raw = cell.weight.weight.detach()  # perfectly conditioned, and of size 1 for the optimiser
        close(raw @ raw.T, torch.eye(64), 1e-5)
    copied = AffineCell(3, 64, weight=family, scale=0.3)
    copied.load_state_dict(cell.state_dict())
    assert torch.equal(copied.recurrent_weight(), w)
    assert DEQLayer(cell)(torch.randn(2, 3)).shape == (2, 64)


def test_a_learned_scale_stays_in_its_bound():
    weight = Orthogonal(8, 0.5, max_scale=0.9)
    init.orthogonal_(weight, 0.7)
    assert float(weight.current_scale().detach()) == pytest.approx(0.7, rel=1e-6)
    with pytest.raises(ValueError, match=r"learned scale in \(0, 0.9\)"):
        init.orthogonal_(weight, 0.95)


def test_kept_in_the_family_while_it_trains():
    block = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    init.keep_(init.orthogonal_(block, 0.8), "orthogonal")
    optimizer = torch.optim.Adam(block.parameters(), lr=0.1)
    before = block[0].weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        block(torch.randn(5, 16)).square().sum().backward()
        optimizer.step()
    w = block[0].weight.detach()
    assert float((w - before).abs().max()) > 0.1
    close(w @ w.T, 0.64 * torch.eye(16), 1e-5)
    symmetric = init.keep_(nn.Linear(6, 6), "symmetric").weight
    assert torch.equal(symmetric, symmetric.T)
    w = init.keep_(nn.Linear(6, 6), "orthogonal", scale=0.3).weight.detach()
    close(w @ w.T, 0.09 * torch.eye(6), 1e-6)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.Linear(3, 4), {}, "no square weight"),
        (lambda: nn.Conv2d(4, 4, 3), {}, "kernel of a convolution"),
        (lambda: parametrized(SymmetricMap()), {}, "parametrised already"),
        (lambda: AffineCell(4, 4), {"names": "weight.*"}, 'take weight="symmetric" there'),
        (lambda: nn.Linear(4, 4), {"scale": 0.5}, "scale > 0 for family"),
        (lambda: nn.Linear(4, 4), {"family": "dense"}, "unknown family 'dense'"),
    ],
    ids=["none", "kernel", "twice", "own", "scale", "dense"],
)
def test_keep_refuses(make, options, message):
    module = make()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=message):
        init.keep_(module, **{"family": "symmetric"} | options)
    assert before.keys() == module.state_dict().keys()
    with pytest.raises(TypeError, match="not Tensor"):
        init.keep_(torch.ones(3, 3), "symmetric")
