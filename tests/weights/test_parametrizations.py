"""The maps on their own and under ``torch.nn.utils.parametrize``."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from fastdeq.weights import OrthogonalMap, SymmetricMap, orthogonal_factor


def error_of(w, scale=1.0):
    """Of the orthonormality of columns, or of the rows of a wide matrix."""
    q = w.detach().double() / scale
    q = q if q.shape[0] >= q.shape[1] else q.T
    return (q.T @ q - torch.eye(q.shape[1], dtype=q.dtype)).abs().max().item()


def largest_eigenvalue(w):
    return torch.linalg.eigvalsh(w.detach().double())[-1].item()


# in_features, out_features
SHAPES = [(8, 5), (5, 8), (6, 6), (1, 7), (7, 1), (1, 1), (140, 200)]


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 0.7, -1.5])
@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.SGD])
def test_linear_layers_of_any_shape_stay_orthogonal(sizes, scale, optimizer):
    layer = nn.Linear(*sizes)
    parametrize.register_parametrization(layer, "weight", OrthogonalMap(scale))
    assert error_of(layer.weight, scale) < 1e-6
    raw = layer.parametrizations.weight.original
    assert error_of(raw) < 1e-6  # the parameter starts at Q itself
    start = layer.weight.detach()
    steps, x, y = optimizer(layer.parameters(), lr=0.05), torch.randn(16, sizes[0]), 1.0
    for _ in range(20):
        steps.zero_grad()
        (layer(x) - y).square().mean().backward()
        steps.step()
    assert error_of(layer.weight, scale) < 1e-6
    assert layer.weight.shape == start.shape
    if min(sizes) > 1:
        assert (layer.weight - start).norm() > 1e-3


@pytest.mark.parametrize("shape", [(8, 5), (5, 8), (6, 6)])
@pytest.mark.parametrize("scale", [0.7, -1.5])
def test_assigning_a_weight_that_is_orthogonal_gives_it_back(shape, scale):
    layer = nn.Linear(shape[1], shape[0])
    parametrize.register_parametrization(layer, "weight", OrthogonalMap(scale))
    target = scale * nn.init.orthogonal_(torch.empty(shape))
    layer.weight = target
    torch.testing.assert_close(layer.weight, target, rtol=1e-5, atol=1e-6)
    layer.weight = torch.randn(shape)  # made orthonormal first
    assert error_of(layer.weight, scale) < 1e-6


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_start_of_low_rank_is_made_orthonormal(value):
    layer = nn.Linear(6, 4)
    nn.init.constant_(layer.weight, value)
    parametrize.register_parametrization(layer, "weight", OrthogonalMap())
    assert error_of(layer.weight) < 1e-6
    layer(torch.randn(3, 6)).sum().backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


def test_parametrize_cached_removal_copies_and_state_dicts():
    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, "weight", OrthogonalMap(0.9))
    x = torch.randn(2, 6)
    with parametrize.cached():
        assert layer.weight is layer.weight
        layer(x).sum().backward()
    expected = layer(x)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), expected)
    other = nn.Linear(6, 6)
    parametrize.register_parametrization(other, "weight", OrthogonalMap(0.9))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), expected)
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer(x), expected)


def test_symmetric_linear_layer():
    layer = nn.Linear(7, 7)
    start = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", SymmetricMap(max_eigenvalue=0.3))
    assert torch.equal(layer.parametrizations.weight.original, (start + start.T) / 2)
    steps = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(20):
        steps.zero_grad()
        (layer(torch.randn(16, 7)) - 1.0).square().mean().backward()
        steps.step()
        assert torch.equal(layer.weight, layer.weight.T)
        assert largest_eigenvalue(layer.weight) <= 0.3


@pytest.mark.parametrize("module", [OrthogonalMap(0.8), SymmetricMap(), SymmetricMap(0.5)])
def test_derivatives(module):
    a = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (a,))
    assert torch.autograd.gradgradcheck(module, (a,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 30, 200])
def test_no_eigenvalue_exceeds_its_bound(n, dtype):
    bound = 0.6
    module = SymmetricMap(bound)
    for _ in range(3):
        for scale in (0.01, 0.3, 1.0, 100.0):
            raw = torch.randn(n, n).mul(scale / n**0.5).to(dtype)
            for shift in (0.0, -10.0):
                s = raw + shift * torch.eye(n, dtype=dtype)
                w = module(s)
                assert w.dtype == dtype
                assert torch.equal(w, w.T)
                assert largest_eigenvalue(w) <= bound
                free = largest_eigenvalue((s + s.T) / 2)
                if free < 0.9 * bound:
                    assert torch.equal(w, (s + s.T) / 2)
                elif dtype != torch.bfloat16 and shift == 0.0:
                    assert largest_eigenvalue(w) == pytest.approx(min(free, bound), rel=1e-3)


def test_matrices_at_the_bound_itself():
    module = SymmetricMap(0.5)
    for s in (0.5 * torch.eye(20), torch.zeros(3, 3), -torch.eye(3), torch.ones(1, 1)):
        w = module(s)
        assert largest_eigenvalue(w) <= 0.5
        torch.testing.assert_close(w, s.clamp(max=0.5), rtol=1e-5, atol=1e-6)
    assert module(torch.empty(0, 0)).shape == (0, 0)


def test_not_finite_in_is_not_finite_out():
    for value in (float("nan"), float("inf")):
        a = torch.eye(4)
        a[1, 2] = value
        assert OrthogonalMap()(a).isnan().all()
        assert not SymmetricMap(0.5)(a).isfinite().all()
        assert not SymmetricMap()(a).isfinite().all()


@pytest.mark.parametrize("bound", [0.4, 100.0])
def test_bounded_map_compiles_and_has_transforms(bound):
    module, a = SymmetricMap(bound), torch.randn(6, 6, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(module, fullgraph=True)(a), module(a))
    jacobian = torch.func.jacrev(module)(a)
    torch.testing.assert_close(torch.func.jacfwd(module)(a), jacobian)


def test_autocast_keeps_the_structure():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert error_of(OrthogonalMap()(torch.randn(40, 40))) < 1e-6
        assert largest_eigenvalue(SymmetricMap(0.5)(torch.randn(40, 40))) <= 0.5


def test_orthogonal_factor_of_narrow_dtypes_and_under_transforms():
    a = torch.randn(6, 4)
    assert orthogonal_factor(a.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(torch.vmap(orthogonal_factor)(a[None])[0], orthogonal_factor(a))
    with pytest.raises(ValueError, match=r"m >= n, got \(4, 6\)"):
        torch.vmap(orthogonal_factor)(a.T[None])


def test_misuse():
    with pytest.raises(ValueError, match=r"square matrix, got one of shape \(5, 8\)"):
        parametrize.register_parametrization(nn.Linear(8, 5), "weight", SymmetricMap())
    for module in (OrthogonalMap(), SymmetricMap()):
        with pytest.raises(ValueError, match=r"needs a matrix, got a tensor of shape \(4,\)"):
            module(torch.ones(4))
    for bound in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="max_eigenvalue must be positive"):
            SymmetricMap(bound)
    with pytest.raises(ValueError, match="finite scale"):
        OrthogonalMap(float("inf"))
