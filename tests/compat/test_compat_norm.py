"""Normalised weights of ``fastdeq.compat.torchdeq``, next to torchdeq's own."""

import copy
from typing import ClassVar

import pytest
import torch
from torch import nn
from torchdeq_cases import Net

import fastdeq.compat.torchdeq as ours

theirs = pytest.importorskip("torchdeq")

OPTIONS = {
    "default": {},
    "fixed": {"learn_scale": False, "target_norm": 0.7},
    "clipped": {"learn_scale": False, "target_norm": 3.0, "clip": True, "clip_value": 0.5},
    "clipped and learned": {"clip": True, "clip_value": 0.9},
    "of a command line": {"args": {"norm_no_scale": True, "norm_target_norm": 0.4}},
    "filtered": {"filter_out": "conv"},
    "filtered by prefix": {"prefix_filter_out": ["block", "lin"]},
}


def pair(norm_type, **options):
    """The same model, normalised by each package from the same seed."""
    model = Net()
    models = []
    for package in (theirs, ours):
        own = copy.deepcopy(model)
        own.linear.weight.data.mul_(2)
        torch.manual_seed(3)
        package.apply_norm(own, norm_type, **copy.deepcopy(options))
        models.append(own)
    return models


def weights(model):
    return {name: m.weight for name, m in model.named_modules() if hasattr(m, "weight")}


def same(a, b):
    torch.testing.assert_close(dict(a), dict(b), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("norm_type", ["weight_norm", "spectral_norm", "none"])
def test_weights_parameters_and_gradients_are_the_same(norm_type, name):
    their, our = pair(norm_type, **OPTIONS[name])
    same(our.state_dict(), their.state_dict())
    for step in range(3):
        ours.reset_deq(our)
        theirs.reset_deq(their)
        if step == 1:
            our.eval(), their.eval()
        same(weights(our), weights(their))
        same(our.state_dict(), their.state_dict())
    for model in (our, their):
        model.zero_grad()
        sum((w * w.detach().cos()).sum() for w in weights(model).values()).backward()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(0.1 * p.grad if p.grad is not None else 0.0)
    same(our.state_dict(), their.state_dict())
    ours.remove_norm(our)
    theirs.remove_norm(their)
    same(weights(our), weights(their))
    same(our.state_dict(), their.state_dict())
    assert set(dict(our.named_parameters())) == set(dict(Net().named_parameters()))


def test_several_power_iterations():
    their, our = pair("spectral_norm", n_power_iterations=30)
    ours.reset_norm(our), theirs.reset_norm(their)
    same(weights(our), weights(their))
    # 30 steps from a random vector: the ratio of the two largest singular values to the 60th.
    assert torch.linalg.matrix_norm(our.linear.weight, 2).item() == pytest.approx(1.0, abs=0.05)
    our = pair("spectral_norm", args={"sn_n_power_iters": 4})[1]
    assert our.linear._deq_norm.n_power_iterations == 4


def test_norms_and_modules_can_be_registered():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, 2))

    for package in (theirs, ours):
        package.register_norm_module(Scaled, "weight_norm", "w", 0)
        model = nn.Sequential(Scaled())
        package.apply_norm(model, learn_scale=False)
        package.reset_norm(model)
        torch.testing.assert_close(model[0].w.norm(dim=1), torch.ones(3))

    class Halved:
        _target_modules: ClassVar = {nn.Linear: ("weight", 0)}

        @classmethod
        def apply(cls, module, deq_args=None, **options):
            assert options == {"factor": 0.5}
            return cls()

        def __call__(self, module):
            module.weight.data.mul_(0.5)

        def remove(self, module):
            pass

    ours.register_norm("halved", Halved)
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    ours.apply_norm(model, "halved", factor=0.5)
    ours.reset_norm(model)
    torch.testing.assert_close(model.weight.detach(), 0.5 * before)
    ours.remove_norm(model)
    assert not hasattr(model, "_deq_norm")
