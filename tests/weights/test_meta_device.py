"""Cells that are made without values: on the meta device, by to_empty, by skip_init."""

import copy

import pytest
import torch
from torch.nn.utils import skip_init

from fastdeq import AffineCell, Dense, DEQLayer, Orthogonal, Symmetric

WEIGHTS = {
    "dense": lambda scale, **o: Dense(7, scale, **o),
    "symmetric": lambda scale, **o: Symmetric(7, scale, **o),
    "bounded": lambda scale, **o: Symmetric(7, scale, max_eigenvalue=0.8, **o),
    "orthogonal": lambda scale, **o: Orthogonal(7, scale, **o),
    "learned scale": lambda scale, **o: Orthogonal(7, scale, max_scale=0.95, **o),
    "free symmetric": lambda scale, **o: Symmetric(7, scale, parametrized=False, **o),
    "free orthogonal": lambda scale, **o: Orthogonal(7, scale, parametrized=False, **o),
}
every_weight = pytest.mark.parametrize("name", WEIGHTS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])


def make(name, scale=0.6, **options):
    return DEQLayer(AffineCell(4, 7, weight=WEIGHTS[name](scale, **options), **options))


def on_meta(name, scale=0.6, **options):
    with torch.device("meta"):
        layer = make(name, scale, **options)
    assert all(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    return layer


@every_weight
@every_dtype
@pytest.mark.parametrize("scale", [0.6, 0.45])  # of the empty one
def test_a_checkpoint_gives_its_tensors(name, dtype, scale):
    made = make(name, dtype=dtype)
    layer = on_meta(name, scale, dtype=dtype)
    state = made.state_dict()
    layer.load_state_dict(state, assign=True)
    assert not any(t.is_meta for t in (*layer.parameters(), *layer.buffers()))
    assert layer.cell.weight.weight.data_ptr() == state["cell.weight.weight"].data_ptr()
    x = torch.randn(3, 4, dtype=dtype)
    torch.testing.assert_close(layer.cell.weight(), made.cell.weight(), rtol=1e-2, atol=0)
    torch.testing.assert_close(layer(x), made(x), rtol=1e-2, atol=1e-2)
    if scale == 0.6:
        assert torch.equal(layer(x), made(x))
    layer(x).sum().backward()


@every_weight
@every_dtype
def test_to_empty_then_reset(name, dtype):
    layer = on_meta(name, dtype=dtype).to_empty(device="cpu")
    for t in (*layer.parameters(), *layer.buffers()):
        t.data.fill_(torch.nan)  # what lies there may be anything
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    twin = make(name, 0.3, dtype=dtype)
    twin.load_state_dict(layer.state_dict())
    # A state_dict has the scale in the dtype of the weight.
    torch.testing.assert_close(twin.cell.weight(), layer.cell.weight(), rtol=1e-2, atol=0)
    assert layer(torch.randn(3, 4, dtype=dtype)).isfinite().all()
    assert layer.cell.structure() == make(name, dtype=dtype).cell.structure()


@every_weight
def test_empty_cells_filled_by_hand_say_how_they_were_made(name):
    """The scale of an orthogonal weight is in its state_dict, whatever lay in the buffer."""
    source = make(name)
    layer = on_meta(name).to_empty(device="cpu")
    for t in layer.buffers():
        t.fill_(1e30)
    with torch.no_grad():
        for p, q in zip(layer.parameters(), source.parameters(), strict=True):
            p.copy_(q)
    twin = make(name, 0.3)
    twin.load_state_dict(layer.state_dict())
    torch.testing.assert_close(twin.cell.weight(), source.cell.weight(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [Dense, Symmetric, Orthogonal])
def test_skip_init(kind):
    weight = skip_init(kind, 5, 0.7)
    assert weight.weight.device.type == "cpu"
    source = kind(5, 0.7)
    weight.load_state_dict(source.state_dict())
    assert torch.equal(weight(), source())
    weight.reset_parameters()
    assert weight().isfinite().all()


def test_skip_init_with_options():
    for weight in (
        skip_init(Orthogonal, 5, 0.7, max_scale=0.9, dtype=torch.float64),
        skip_init(Symmetric, 5, 0.7, max_eigenvalue=0.9, dtype=torch.float64),
        skip_init(Orthogonal, 5, 0.7, parametrized=False, dtype=torch.float64),
    ):
        assert weight.weight.dtype == torch.float64
        weight.reset_parameters()
        assert weight().isfinite().all()
    cell = skip_init(AffineCell, 3, 4, weight="orthogonal", scale=0.5)
    cell.load_state_dict(AffineCell(3, 4, weight="orthogonal", scale=0.8).state_dict())
    assert cell.structure().contraction == pytest.approx(0.8)


@pytest.mark.parametrize("saved", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("own", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("learned", [True, False])
def test_a_rounded_copy_of_the_own_scale_changes_nothing(own, saved, learned):
    options = {"max_scale": 0.9} if learned else {}
    weight = Orthogonal(6, 0.7, **options).to(own)
    state = copy.deepcopy(weight).to(saved).state_dict()
    weight.load_state_dict(state)
    assert weight.norm_bound() == (0.9 if learned else 0.7)


def test_a_scale_that_was_set_is_saved():
    weight, twin = Orthogonal(6, 0.7), Orthogonal(6, 0.5)
    weight.scale = 0.25
    twin.load_state_dict(weight.state_dict())
    assert torch.equal(twin(), weight())
    assert twin.norm_bound() == 0.25
