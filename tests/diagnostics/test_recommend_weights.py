"""Which weights fastdeq.recommend speaks of, and when it recommends others."""

import math

import pytest
import torch
from advice_cases import MLP, Attention
from torch import nn

import fastdeq
from fastdeq import AffineCell, DEQLayer
from fastdeq.diagnostics.recurrent import are_orthogonal, recurrent_squares

QUIET = {"on_failure": "ignore"}


class Packed(nn.Module):
    """Both gates in one product: ``sigmoid(A z) tanh(B z + x)``."""

    def __init__(self, size=12):
        super().__init__()
        self.gates = nn.Linear(size, 2 * size)

    def forward(self, z, x):
        a, b = self.gates(z).chunk(2, -1)
        return torch.sigmoid(a) * torch.tanh(b + x)


def test_names_that_choose_nothing():
    layer = DEQLayer(MLP())
    x = torch.randn(4, 12)
    with pytest.raises(ValueError, match=r"names='mix.*' chooses no square.*first.weight \(12, 12"):
        fastdeq.recommend(layer, x, names="mix.*")
    with pytest.raises(ValueError, match="chooses no square weight"):
        layer.diagnose(x, names=["gate.weight", "mix.weight"])
    plain = DEQLayer(lambda z, x: torch.tanh(0.5 * z + x))
    assert plain.diagnose(x).recurrent == ()
    with pytest.raises(ValueError, match="no module that is known"):
        plain.diagnose(x, names="w")


def test_packed_weights():
    cell = Attention()
    assert [s.name for s in recurrent_squares(cell)] == ["attend.out_proj.weight"]
    both = recurrent_squares(cell, "attend.*")
    assert [s.name for s in both] == ["attend.in_proj_weight", "attend.out_proj.weight"]
    assert [s.name for s in recurrent_squares(Packed())] == ["gates.weight"]


def test_the_family_of_packed_weights():
    torch.manual_seed(0)
    cell = Packed()
    fastdeq.init.dense_(cell, 6.0, blocks=True)
    found = fastdeq.recommend(cell, torch.randn(16, 12))
    value = found.get("weight")
    assert value["blocks"] is True
    fastdeq.init.initialize_(cell, **value)
    assert are_orthogonal(recurrent_squares(cell))
    assert fastdeq.recommend(cell, torch.randn(16, 12)).diagnosis.converged_share == 1


@pytest.mark.parametrize("family", ["dense", "orthogonal"])
def test_orthogonal_weights_are_not_recommended_to_orthogonal_ones(family):
    torch.manual_seed(0)
    cell = MLP(12)
    fastdeq.init.initialize_(cell, family, 2.0)
    found = fastdeq.recommend(DEQLayer(cell, **QUIET), torch.randn(16, 12))
    assert found.get("scale") < 1
    assert (found.get("weight") is None) == (family == "orthogonal")


def test_what_is_orthogonal():
    w = nn.Linear(32, 32, bias=False)
    for family, expected in (("orthogonal", True), ("dense", False), ("symmetric", False)):
        fastdeq.init.initialize_(w, family, 0.8)
        assert are_orthogonal(recurrent_squares(w)) == expected
    fastdeq.init.orthogonal_(w, 0.8)
    assert are_orthogonal(recurrent_squares(w.bfloat16()))
    with torch.no_grad():
        w.weight[0] *= 1.5
    assert not are_orthogonal(recurrent_squares(w))
    w.weight.data.fill_(math.nan)
    assert not are_orthogonal(recurrent_squares(w))
    assert not are_orthogonal([])


def test_the_rate_names_its_weights():
    found = fastdeq.recommend(MLP(), torch.randn(9, 12))
    assert "rule of thumb for first.weight, second.weight: a step" in found[0].why
    found = fastdeq.recommend(AffineCell(3, 4), torch.randn(9, 3))
    assert "for weight.weight: a step" in found[-1].why


def test_a_whole_model_is_told_to_pass_its_layer():
    model = nn.Sequential(DEQLayer(AffineCell(4, 8)), nn.Linear(8, 3))
    with pytest.raises(TypeError, match=r"Sequential is a model with DEQ layers, 0: pass one"):
        fastdeq.recommend(model, torch.randn(2, 4))
