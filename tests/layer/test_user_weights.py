"""Weights of a user's own: what they may say of themselves, and what happens when it is wrong."""

import pytest
import torch

from fastdeq import AffineCell, DEQLayer


class LowRank(torch.nn.Module):
    """A user's weight: W = s A B^T, with a norm bound that holds at any time."""

    def __init__(self, features, rank):
        super().__init__()
        self.a = torch.nn.Parameter(torch.randn(features, rank))
        self.b = torch.nn.Parameter(torch.randn(features, rank))

    def forward(self):
        return 0.8 * (self.a / self.a.norm()) @ (self.b / self.b.norm()).T

    def norm_bound(self):
        return 0.8


def test_user_weight_object_and_what_it_states():
    layer = DEQLayer(AffineCell(3, 10, weight=LowRank(10, 2)))
    layer(torch.randn(4, 3)).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert layer.cell.structure().contraction == 0.8
    # A bound below one lets "auto" take plain iteration, which counts no rejects.
    assert layer.last_solution.rejects == {}


class Tagged(torch.nn.Module):
    """A user's weight with a tag."""

    tags = frozenset({"symmetric"})

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(weight)

    def forward(self):
        return self.weight


def test_a_weight_that_is_not_what_its_tag_says_is_refused():
    w = torch.randn(6, 6)
    layer = DEQLayer(AffineCell(3, 6, weight=Tagged(w + w.T)))
    layer(torch.randn(2, 3))
    with pytest.raises(ValueError, match="but its W is not"):
        DEQLayer(AffineCell(3, 6, weight=Tagged(w)))(torch.randn(2, 3))


@pytest.mark.parametrize(
    ("stated", "error", "message"),
    [
        ({"tags": {"symetric"}}, ValueError, "unknown tag of Tagged 'symetric'"),
        ({"tags": "symmetric"}, TypeError, "must be a set"),
        ({"norm_bound": 0.8}, TypeError, "must be a method"),
        ({"norm_bound": lambda: -1.0}, ValueError, "must be a number >= 0"),
        ({"norm_bound": lambda: float("nan")}, ValueError, "must be a number >= 0"),
        ({"norm_bound": lambda: "0.8"}, ValueError, "must be a number >= 0"),
        ({"forward": lambda: [1.0]}, TypeError, "returned a list"),
    ],
)
def test_what_a_weight_states_is_checked(stated, error, message):
    weight = Tagged(torch.zeros(6, 6))
    for name, value in stated.items():
        object.__setattr__(weight, name, value)
    with pytest.raises(error, match=message):
        DEQLayer(AffineCell(3, 6, weight=weight))(torch.randn(2, 3))


@pytest.mark.parametrize("size", [32, 520])
def test_a_false_tag_cannot_make_a_residual_lie(size):
    """Half of W is read, and one copy does for both directions, only where W is built symmetric."""
    weight = Tagged(torch.eye(size) * 0.1)
    cell = AffineCell(3, size, weight=weight)
    layer = DEQLayer(cell, on_failure="ignore", tol=1e-5)
    x, g = torch.randn(1, 3), torch.randn(1, size)
    layer(x)
    with torch.no_grad():
        weight.weight.copy_(torch.randn(size, size) * 0.4 / size**0.5)
    z = layer(x)
    true = (cell(z, x) - z).norm() / z.norm()
    assert layer.last_solution.residual.item() == pytest.approx(true.item(), rel=0.1, abs=1e-6)
    found = torch.autograd.grad(z, weight.weight, g)[0]
    object.__setattr__(weight, "tags", frozenset())
    other = torch.autograd.grad(DEQLayer(cell, tol=1e-6)(x), weight.weight, g)[0]
    if layer.last_adjoint_solution.converged.all():
        assert (found - other).norm() <= 1e-3 * other.norm()


def test_another_weight_is_looked_at_again():
    w = torch.randn(6, 6)
    layer = DEQLayer(AffineCell(3, 6, weight="symmetric", scale=0.5))
    layer(torch.randn(2, 3))
    layer.cell.weight = Tagged(w)
    with pytest.raises(ValueError, match="but its W is not"):
        layer(torch.randn(2, 3))
