"""What a weight states of its W is believed only while nothing that may change W is attached."""

import copy

import pytest
import torch
from modified_weights import ATTACHED, lopsided
from torch import nn
from torch.nn.utils import parametrize, prune

from fastdeq import (
    AffineCell,
    DEQLayer,
    Orthogonal,
    OrthogonalMap,
    Symmetric,
    SymmetricMap,
)

f64 = torch.float64


class HalfSymmetric(Symmetric):
    def forward(self):
        return lopsided(super().forward())


class LopsidedSymmetric(Symmetric):
    def compose(self, raw):
        return lopsided(super().compose(raw))


class LopsidedOrthogonal(Orthogonal):
    def compose(self, raw):
        return lopsided(super().compose(raw))


class LouderOrthogonal(Orthogonal):
    def current_scale(self):
        return 1.5 * self.scale


class CalledOrthogonal(Orthogonal):
    def __call__(self):
        return lopsided(super().__call__())


attached = pytest.mark.parametrize("how", ATTACHED)
families = pytest.mark.parametrize("family", [Orthogonal, Symmetric])


def weight_structure(weight):
    structure = AffineCell(3, weight.features, activation="gelu", weight=weight).structure()
    return structure.tags, structure.contraction, structure.bitwise_symmetric


NOTHING = (frozenset(), None, False)


@attached
@families
def test_nothing_is_believed_of_a_weight_with_something_attached(family, how):
    weight = family(7, 0.6)
    before = weight_structure(weight)
    assert before[0] == {family.__name__.lower()}
    ATTACHED[how](weight)
    assert weight_structure(weight) == NOTHING


@families
def test_it_is_believed_again_without(family):
    weight = family(5, 0.6)
    before = weight_structure(weight)
    every = nn.modules.module
    for attach in (
        weight.register_forward_hook,
        weight.map.register_forward_hook,
        every.register_module_forward_hook,
        every.register_module_forward_pre_hook,
        every.register_module_full_backward_hook,
    ):
        handle = attach(lambda *a: None)
        try:
            assert weight_structure(weight) == NOTHING
        finally:
            handle.remove()
        assert weight_structure(weight) == before
    weight.forward = lambda: weight.weight
    assert weight_structure(copy.copy(weight)) == NOTHING
    del weight.forward
    assert weight_structure(weight) == before


@pytest.mark.parametrize(
    "kind",
    [
        HalfSymmetric,
        LopsidedSymmetric,
        LopsidedOrthogonal,
        LouderOrthogonal,
        CalledOrthogonal,
    ],
)
def test_a_subclass_that_makes_another_w_has_to_state_what_holds(kind):
    assert weight_structure(kind(6, 0.6)) == NOTHING

    class Stating(kind):
        tags = frozenset({"symmetric"})

        def norm_bound(self):
            return 2.5

    tags, contraction, bitwise_symmetric = weight_structure(Stating(6, 0.6))
    assert tags == {"symmetric"}
    assert contraction == pytest.approx(2.5 * 1.129)
    assert not bitwise_symmetric


class Narrower(Symmetric):
    """Overrides nothing of which W is made."""

    def reset_parameters(self):
        super().reset_parameters()
        self.weight.data.mul_(0.5)


def test_what_leaves_w_structured_is_believed():
    for weight in (Narrower(6, 0.6), Symmetric(6, 0.6, max_eigenvalue=0.5)):
        assert weight_structure(weight) == ({"symmetric"}, None, True)
    for family, before in ((Symmetric, (None, True)), (Orthogonal, (0.6 * 1.129, False))):
        weight = family(6, 0.6)
        parametrize.register_parametrization(weight, "weight", nn.Tanh(), unsafe=True)
        tags, contraction, bitwise_symmetric = weight_structure(weight)
        assert tags == {family.__name__.lower()}
        assert (contraction and pytest.approx(contraction), bitwise_symmetric) == before
    assert weight_structure(Orthogonal(4, 0.6, max_scale=0.8))[1] == pytest.approx(0.8 * 1.129)


def test_a_mask_by_pruning_counts_once_it_is_permanent():
    weight = Symmetric(9, 0.6)
    prune.random_unstructured(weight, "weight", 0.4)  # a forward pre-hook
    assert weight_structure(weight) == NOTHING
    prune.remove(weight, "weight")
    assert weight_structure(weight) == ({"symmetric"}, None, True)
    assert torch.equal(weight(), weight().t())


@families
def test_a_weight_that_is_trained_itself_from_now_on(family):
    weight = family(5, 0.6)
    weight.parametrized = False
    assert weight_structure(weight) == NOTHING


class Inside(nn.Module):
    """A user's weight around another."""

    tags = frozenset({"symmetric"})

    def __init__(self, features):
        super().__init__()
        self.inner = nn.ModuleDict({"a": Symmetric(features, 0.5, dtype=f64)})

    def forward(self):
        return 0.5 * self.inner["a"]()


def test_a_users_own_weight():
    weight = Inside(4)
    assert weight_structure_of_user(weight) == {"symmetric"}
    handle = weight.inner["a"].register_forward_hook(lambda m, i, o: lopsided(o))
    assert weight_structure_of_user(weight) == set()
    handle.remove()
    assert weight_structure_of_user(weight) == {"symmetric"}
    weight.forward = lambda: torch.eye(4, dtype=f64)
    assert weight_structure_of_user(weight) == set()


def weight_structure_of_user(weight):
    return AffineCell(3, 4, activation="gelu", weight=weight).structure().tags


class Falsely(nn.Module):
    """A user's weight whose tag is false."""

    tags = frozenset({"symmetric"})

    def forward(self):
        return lopsided(torch.full((4, 4), 0.1, dtype=f64))


def test_a_tag_is_compared_with_w_when_it_counts():
    """Not while something is attached: then it is not believed anyway."""
    cell, x = AffineCell(3, 4, weight=Falsely(), dtype=f64), torch.randn(2, 3, dtype=f64)
    handle = cell.weight.register_forward_hook(lambda m, i, o: None)
    DEQLayer(cell)(x)
    handle.remove()
    with pytest.raises(ValueError, match="but its W is not"):
        DEQLayer(cell)(x)
    # The next weight may lie where the last one did.
    cell.weight = Inside(4)
    DEQLayer(cell)(x)
    looked_at = cell._looked_at[0]
    assert looked_at is cell.weight
    twin = copy.deepcopy(cell)
    assert twin._looked_at[0] is twin.weight
    assert set(dict(cell.named_modules())) == {
        "",
        "weight",
        "weight.inner",
        "weight.inner.a",
        "weight.inner.a.map",
        "injection",
    }
    cell.weight = Falsely()
    with pytest.raises(ValueError, match="but its W is not"):
        DEQLayer(cell)(x)


def test_hooks_on_maps_run_in_weights():
    for weight, kind in ((Orthogonal(6, 0.7), OrthogonalMap), (Symmetric(6, 0.7), SymmetricMap)):
        seen = []
        weight.map.register_forward_hook(lambda m, i, o, seen=seen: seen.append(type(m)))
        w = weight()
        assert seen == [kind]
        seen.clear()
        weight.map._forward_hooks.clear()
        assert torch.equal(weight(), w)
        assert seen == []
