"""A compiled orthogonal layer factorises a matrix once, until it changes; counted in a profile."""

import threading

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from fastdeq import AffineCell, DEQLayer, Orthogonal, OrthogonalMap
from fastdeq.cuda_stream import is_capturing
from fastdeq.ops import kept_factors, orthogonal_factor
from fastdeq.ops.kept_factors import FactorMemory
from fastdeq.weights import orthogonal_factor as factor

pytestmark = pytest.mark.usefixtures("fresh_compiler")
remembering = torch.ops.fastdeq.orthogonal_factor


@pytest.fixture(autouse=True)
def empty_memory():
    orthogonal_factor.memory.clear()


def factorisations(calls):
    with profile(activities=[ProfilerActivity.CPU]) as p:
        calls()
    names = [event.name for event in p.events()]
    return sum("linalg_qr" in n or "geqrf" in n or "cholesky" in n for n in names)


def compiled(module, backend="aot_eager"):
    return torch.compile(module, backend=backend, fullgraph=True)


def layer_of(features, dtype=torch.float32, scale=0.7):
    return DEQLayer(AffineCell(5, features, weight="orthogonal", scale=scale, dtype=dtype))


@pytest.mark.parametrize("features", [40, 170])  # Householder, and Gram-Schmidt
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_evaluations_do_not_factorise_again(features, dtype):
    layer = layer_of(features, dtype).eval()
    x, f = torch.randn(3, 5, dtype=dtype), compiled(layer)
    with torch.no_grad():
        expected = layer(x)
        first = f(x)
        assert factorisations(lambda: [f(x) for _ in range(4)]) == 0
        assert torch.equal(f(x), first)
    torch.testing.assert_close(first, expected, rtol=1e-2, atol=1e-3)


def test_several_layers_and_the_inductor():
    torch.manual_seed(0)
    model = nn.Sequential(
        layer_of(20), nn.Linear(20, 5), layer_of(30), nn.Linear(30, 5), layer_of(20)
    )
    x, f = torch.randn(3, 5), compiled(model, "inductor")
    with torch.no_grad():
        f(x)
        assert factorisations(lambda: [f(x) for _ in range(3)]) == 0
        torch.testing.assert_close(f(x), model(x), rtol=1e-4, atol=1e-5)
        model[2].cell.weight.weight.data[3, 4] += 0.5
        assert factorisations(lambda: f(x)) == 1  # one of the three
        torch.testing.assert_close(f(x), model(x), rtol=1e-4, atol=1e-5)


def edit_in_place(weight):
    with torch.no_grad():
        weight[2, 3] += 0.5


def edit_data(weight):
    weight.data[2, 3] += 0.5


def edit_numpy(weight):
    weight.detach().numpy()[2, 3] += 0.5


def replace_data(weight):
    weight.data = torch.randn_like(weight)


def step(weight):
    weight.grad = torch.randn_like(weight)
    torch.optim.SGD([weight], lr=0.1).step()


CHANGES = [edit_in_place, edit_data, edit_numpy, replace_data, step]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("no_grad", [True, False])
def test_every_change_is_seen(change, no_grad):
    layer, x = layer_of(24, torch.float64), torch.randn(3, 5, dtype=torch.float64)
    f = compiled(layer)
    with torch.set_grad_enabled(not no_grad):
        before = f(x)
        change(layer.cell.weight.weight)
        after = f(x)
        assert not torch.equal(after, before)
        torch.testing.assert_close(after, DEQLayer(layer.cell)(x))


def test_training_is_that_of_the_layer_itself():
    layer = layer_of(18, torch.float64)
    twin = layer_of(18, torch.float64)
    twin.load_state_dict(layer.state_dict())
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, 18, dtype=torch.float64)
    runs = []
    for model, f in ((layer, compiled(layer)), (twin, twin)):
        steps, losses = torch.optim.SGD(model.parameters(), lr=0.3), []
        for _ in range(4):
            steps.zero_grad()
            for part in (slice(0, 2), slice(2, 4)):  # gradients of two calls add up
                loss = (f(x[part]) - y[part]).square().sum()
                loss.backward()
                losses.append(loss.detach())
            steps.step()
        runs.append(torch.stack([*losses, model.cell.weight.weight.norm().detach()]))
    torch.testing.assert_close(runs[0], runs[1], rtol=1e-6, atol=1e-8)
    assert runs[0][0] > runs[0][-3]


def test_rectangular_maps():
    for shape in ((9, 4), (4, 9)):
        linear = nn.Linear(shape[1], shape[0])
        nn.utils.parametrize.register_parametrization(linear, "weight", OrthogonalMap(0.8))
        x, f = torch.randn(2, shape[1]), compiled(linear)
        with torch.no_grad():
            f(x)
            assert factorisations(lambda f=f, x=x: f(x)) == 0
            torch.testing.assert_close(f(x), linear(x))


def test_outputs_are_nobodys_memory():
    raw = torch.randn(6, 6)
    found = remembering(raw, "auto", True)
    expected = [t.clone() for t in found]
    for t in found:
        t.fill_(7.0)
    assert all(map(torch.equal, remembering(raw, "auto", True), expected))
    assert torch.equal(factor(raw), expected[0])
    torch.library.opcheck(remembering.default, (torch.randn(5, 3), "auto", True))
    torch.library.opcheck(remembering.default, (raw.requires_grad_(), "auto", True))
    with torch.inference_mode():
        other = torch.randn(6, 6)
        remembering(other, "auto", True)
    leaf = other.clone().requires_grad_()  # what was kept there may be used by autograd here
    remembering(leaf, "auto", True)[0].square().mul(torch.randn(6, 6)).sum().backward()
    assert leaf.grad.isfinite().all()


def test_nothing_is_remembered_unless_asked():
    raw = torch.randn(6, 6)
    remembering(raw)
    factor(raw)
    Orthogonal(6, 0.5)()
    remembering(raw, "householder", True)
    assert orthogonal_factor.memory._entries == ()
    remembering(raw, "auto", True)
    assert len(orthogonal_factor.memory._entries) == 1
    Orthogonal(6, 0.5).map.cache.clear()
    assert orthogonal_factor.memory._entries == ()


def test_memory_is_bounded():
    def entries(memory, *sizes):
        for n in sizes:
            memory.factors(torch.randn(n, n), orthogonal_factor.factors)
        return [len(e.found.q) for e in memory._entries]

    per_8 = 3 * 8 * 8 * 4
    assert entries(FactorMemory(3 * per_8), 8, 8, 8, 8, 8) == [8, 8, 8]
    assert entries(FactorMemory(per_8), 4, 8, 20) == [20]  # the newest, whatever its size
    memory, matrix = FactorMemory(1 << 20), torch.randn(8, 8)
    for _ in range(5):  # a matrix that changes leaves nothing behind
        matrix += 1
        memory.factors(matrix, orthogonal_factor.factors)
    assert len(memory._entries) == 1


def test_elsewhere_only_parameters_are_remembered_by_address_and_version(monkeypatch):
    """As on a GPU, where a compiler may put another matrix into the memory of an intermediate."""
    monkeypatch.setattr(kept_factors, "compares_entries", lambda raw: False)
    memory, made = FactorMemory(1 << 20), []

    def compute(raw):
        made.append(raw)
        return orthogonal_factor.factors(raw.detach())

    weight, other = nn.Parameter(torch.randn(6, 6)), torch.randn(6, 6)
    for raw, count in ((weight, 1), (weight, 1), (other, 2), (other, 3), (weight, 3)):
        memory.factors(raw, compute)
        assert len(made) == count
    with torch.no_grad():
        weight.mul_(2)
    memory.factors(weight, compute)
    assert len(made) == 4
    weight.data = torch.randn(6, 6)
    memory.factors(weight, compute)
    assert len(made) == 5


def test_a_recorded_factorisation_is_made_at_every_call(monkeypatch):
    memory, made, capturing = FactorMemory(1 << 20), [], []

    def compute(raw):
        made.append(raw)
        return orthogonal_factor.factors(raw)

    assert not is_capturing(torch.device("cpu"))
    monkeypatch.setattr(kept_factors, "is_capturing", lambda device: bool(capturing))
    raw = torch.randn(5, 5)
    memory.factors(raw, compute)
    memory.factors(raw, compute)
    assert len(made) == 1
    capturing.append(True)
    memory.factors(raw, compute)
    capturing.clear()
    memory.factors(raw, compute)  # a replay may have changed it
    memory.factors(raw, compute)
    assert len(made) == 4
    memory.clear()
    memory.factors(raw, compute)
    memory.factors(raw, compute)
    assert len(made) == 5


def test_threads_share_it():
    matrices = [torch.randn(12, 12) for _ in range(6)]
    expected, wrong = [factor(m) for m in matrices], []

    def work(seed):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        for i in order.tolist():
            q = remembering(matrices[i % 6], "auto", True)[0]
            if not torch.equal(q, expected[i % 6]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
