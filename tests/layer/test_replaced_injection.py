"""Cells whose input map was replaced: any module that makes c ``(B, features)`` of any x."""

import copy
import warnings

import pytest
import torch
from layer_cases import affine
from torch import nn
from torch.nn.utils import parametrizations

from fastdeq import AffineCell, DEQLayer, Picard


class Wrapped(nn.Module):
    """Another module around the linear one, without any of its attributes."""

    def __init__(self, module):
        super().__init__()
        self.inner = module

    def forward(self, x):
        return 2 * self.inner(x)


class OfDict(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.linear = nn.Linear(5, features)

    def forward(self, x):
        return self.linear(x["a"]) + x["b"]


class Scaled(nn.Linear):
    """A linear layer by inheritance that takes images."""

    def forward(self, x):
        return super().forward(x.flatten(1))


def spectral(features):
    return parametrizations.spectral_norm(nn.Linear(5, features))


# name: (module that makes 9 features, x)
REPLACED = {
    "another linear": (nn.Linear(11, 9), torch.randn(4, 11)),
    "mlp": (nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9)), torch.randn(4, 6)),
    "convolution": (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.LazyLinear(9)),
        torch.randn(4, 2, 5, 6),
    ),
    "wrapped": (Wrapped(nn.Linear(6, 9)), torch.randn(4, 6)),
    "embedding": (nn.EmbeddingBag(20, 9), torch.randint(20, (4, 7))),
    "dictionary": (OfDict(9), {"a": torch.randn(4, 5), "b": torch.randn(4, 1)}),
    "inherited": (Scaled(6, 9), torch.randn(4, 2, 3)),
    "parametrised": (spectral(9), torch.randn(4, 5)),
    "bilinear of one": (nn.Identity(), torch.randn(4, 9)),
}
replaced = pytest.mark.parametrize("name", REPLACED)


def cell_with(name, **options):
    injection, x = REPLACED[name]
    cell = AffineCell(6, 9, scale=0.5, **options)
    cell.injection = copy.deepcopy(injection).eval()
    return cell, x


@replaced
@pytest.mark.parametrize("weight", ["dense", "orthogonal", "symmetric"])
def test_the_solution_is_that_of_the_new_map(name, weight):
    cell, x = cell_with(name, weight=weight)
    layer = DEQLayer(cell, tol=1e-6)
    z = layer(x)
    assert z.shape == (4, 9)
    torch.testing.assert_close(cell(z, x), z, rtol=1e-4, atol=1e-4)
    c = cell.inject(x)
    fused = DEQLayer(AffineCell(9, 9, weight=cell.weight), tol=1e-6)
    fused.cell.injection = nn.Identity()
    assert torch.equal(fused(c), z)  # the same solve
    z.sum().backward()
    assert all(p.grad is not None for p in cell.parameters())


@replaced
def test_the_start_of_a_general_solve(name):
    cell, x = cell_with(name)
    start = cell.initial_state(x)
    assert torch.equal(start, torch.zeros(4, 9))
    expected = DEQLayer(cell, tol=1e-6)(x)
    cell.register_forward_hook(lambda m, i, o: None)
    torch.testing.assert_close(DEQLayer(cell, tol=1e-6)(x), expected, rtol=1e-4, atol=1e-4)


def test_it_is_evaluated_once_a_solve(monkeypatch):
    cell, x = cell_with("mlp")
    seen = []
    cell.injection.register_forward_hook(lambda m, i, o: seen.append(1))
    layer = DEQLayer(cell, solver=Picard(), adjoint="neumann")
    layer(x).sum().backward()
    assert len(seen) == 1


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend, fresh_compiler):
    cell, x = cell_with("mlp")
    layer = DEQLayer(cell, tol=1e-5)
    f = torch.compile(layer, backend=backend, fullgraph=True)
    torch.testing.assert_close(f(x), layer(x), rtol=1e-4, atol=1e-5)


def test_dynamic_quantisation():
    layer = DEQLayer(affine(6, 8))
    x = torch.randn(5, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(layer), {nn.Linear})
    assert type(small.cell.injection) is not nn.Linear
    torch.testing.assert_close(small(x), layer(x), rtol=0.1, atol=0.05)


def test_hooks_on_the_linear_injection_run_and_may_change_its_input():
    cell = affine(6, 8)
    x = torch.randn(3, 2, 3)
    with pytest.raises(ValueError, match=r"needs \(\.\.\., 6\)"):
        DEQLayer(cell)(x)
    cell.injection.register_forward_pre_hook(lambda m, i: (i[0].flatten(1),))
    cell.injection.register_forward_hook(lambda m, i, o: 0.5 * o)
    z = DEQLayer(cell, tol=1e-6)(x)
    cell.injection._forward_pre_hooks.clear()
    cell.injection._forward_hooks.clear()
    with torch.no_grad():
        cell.injection.weight.mul_(0.5)
        cell.injection.bias.mul_(0.5)
    torch.testing.assert_close(DEQLayer(cell, tol=1e-6)(x.flatten(1)), z, rtol=1e-4, atol=1e-5)


def test_samples_that_are_not_finite():
    cell, x = cell_with("convolution")
    x = x.clone()
    x[2, 1, 0, 0] = torch.nan
    layer = DEQLayer(cell, on_failure="ignore")
    z = layer(x)
    z.sum().backward()
    assert layer.last_solution.nonfinite.tolist() == [False, False, True, False]
    assert (z[2] == 0).all()
    assert all(p.grad.isfinite().all() for p in cell.parameters())


def test_autocast():
    cell, x = cell_with("mlp")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = DEQLayer(cell)(x)
    torch.testing.assert_close(z.float(), DEQLayer(cell)(x), rtol=0.05, atol=0.05)


class Returns(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


@pytest.mark.parametrize(
    ("c", "error", "message"),
    [
        (torch.zeros(4, 8), ValueError, r"shape \(4, 8\) for x \(4, 6\).* c \(B, 9\)"),
        (torch.zeros(4), ValueError, r"shape \(4,\)"),
        (torch.zeros(4, 2, 9), ValueError, r"shape \(4, 2, 9\)"),
        (torch.zeros(3, 9), ValueError, "one row for each sample"),
        (torch.zeros(4, 9, dtype=torch.int32), TypeError, "torch.int32, and W is in torch.float32"),
        (torch.zeros(4, 9, dtype=torch.float64), TypeError, "in torch.float64"),
        (torch.zeros(4, 9, dtype=torch.complex64), TypeError, "in torch.complex64"),
        (torch.zeros(4, 9, device="meta"), ValueError, "c on meta, and W is on cpu"),
        ((torch.zeros(4, 9),), TypeError, r"injection \(Returns\) returned a tuple"),
    ],
    ids=lambda v: str(getattr(v, "shape", ""))[10:],
)
def test_what_comes_out_must_suit_w(c, error, message):
    cell = AffineCell(6, 9)
    cell.injection = Returns(c)
    with pytest.raises(error, match=message):
        DEQLayer(cell)(torch.zeros(4, 6))
    with pytest.raises(error, match=message):
        cell(torch.zeros(4, 9), torch.zeros(4, 6))


def test_a_linear_map_of_other_sizes_is_told_what_it_takes():
    cell = AffineCell(6, 9)
    cell.injection = nn.Linear(11, 9)
    with pytest.raises(ValueError, match=r"needs \(\.\.\., 11\)"):
        DEQLayer(cell)(torch.zeros(4, 6))
    cell.injection = nn.Linear(6, 10)
    with pytest.raises(ValueError, match=r"returned a tensor of shape \(4, 10\)"):
        DEQLayer(cell)(torch.zeros(4, 6))
