"""The cached factorisation: hits, everything that must invalidate it."""

import pytest
import torch
from torch.nn.utils import parametrize

from fastdeq import Orthogonal
from fastdeq.ops import kept_factors
from fastdeq.weights import FactorCache, orthogonal_factor


def fresh(module):
    return module.scale * orthogonal_factor(module.weight)


def test_one_factorisation_is_kept_until_the_parameter_changes(count_factorisations):
    module = Orthogonal(6, 0.9)
    for _ in range(3):
        assert torch.equal(module(), fresh(module))
    with torch.no_grad():
        module()
    with torch.inference_mode():
        module()
    assert len(count_factorisations) == 1


def training_step(module):
    module().square().mul(torch.randn(6, 6)).sum().backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()


def edit_in_place(module):
    with torch.no_grad():
        module.weight[2, 3] += 0.5


def edit_data(module):
    module.weight.data[2, 3] += 0.5


def edit_numpy(module):
    module.weight.detach().numpy()[2, 3] += 0.5


def replace_data(module):
    module.weight.data = torch.randn(6, 6)


def replace_parameter(module):
    module.weight = torch.nn.Parameter(torch.randn(6, 6))


def load(module):
    module.load_state_dict(Orthogonal(6, 0.9).state_dict())


def load_assigning(module):
    module.load_state_dict(Orthogonal(6, 0.9).state_dict(), assign=True)


def reset(module):
    module.reset_parameters()


CHANGES = [
    training_step,
    edit_in_place,
    edit_data,
    edit_numpy,
    replace_data,
    replace_parameter,
    load,
    load_assigning,
    reset,
]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_the_parameter_is_seen(change):
    module = Orthogonal(6, 0.9)
    before = module().detach()
    change(module)
    after = module()
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(module))
    assert after.requires_grad


@pytest.mark.parametrize("change", [edit_data, edit_in_place])
def test_the_smallest_change_is_seen(change):
    module = Orthogonal(6, 0.9)
    module()
    with torch.no_grad():
        target = module.weight.data if change is edit_data else module.weight
        target[0, 0] = torch.nextafter(target[0, 0], torch.tensor(2.0))
    module()
    assert torch.equal(module.map.cache._entry.copy, module.weight)


def test_dtype_and_device_moves():
    module = Orthogonal(6, 0.9)
    module()
    module.double()
    assert module().dtype == torch.float64
    assert torch.equal(module(), fresh(module))
    assert module.bfloat16()().dtype == torch.bfloat16
    assert module.to("meta")().device.type == "meta"


def test_functional_call_and_parametrize_swaps():
    module = Orthogonal(6, 0.9)
    own = module()
    other = {k: v.clone() for k, v in Orthogonal(6, 0.9).state_dict().items()}
    called = torch.func.functional_call(module, other)
    assert torch.equal(called, 0.9 * orthogonal_factor(other["weight"]))
    assert torch.equal(module(), own)
    parametrize.register_parametrization(module, "weight", torch.nn.Tanh(), unsafe=True)
    assert torch.equal(module(), fresh(module))


def test_other_devices_compare_identity_address_and_version(monkeypatch, count_factorisations):
    # As on a GPU: no copy is kept.
    monkeypatch.setattr(kept_factors, "compares_entries", lambda raw: False)
    module = Orthogonal(6, 0.9)
    module()
    module()
    assert len(count_factorisations) == 1
    for change in (training_step, edit_in_place, load, load_assigning, replace_parameter, reset):
        module()
        made = len(count_factorisations)
        change(module)
        assert torch.equal(module(), fresh(module)), change
        assert len(count_factorisations) > made
    # Documented: not seen, until the cache is told.
    stale = module()
    edit_data(module)
    assert torch.equal(module(), stale)
    module.map.cache.clear()
    assert torch.equal(module(), fresh(module))
    # The same address and version, another tensor.
    cache = FactorCache()
    cache.orthogonal(torch.randn(6, 6))
    other = torch.randn(6, 6)
    assert torch.equal(cache.orthogonal(other), orthogonal_factor(other))
