"""Gradients through the cached factorisation, what it keeps alive, and who may share it."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch.nn.utils import parametrize

from fastdeq import AffineCell, DEQLayer, Orthogonal
from fastdeq.weights import OrthogonalMap, orthogonal_factor


def fresh(module):
    return module.scale * orthogonal_factor(module.weight)


def edit_in_place(module):
    with torch.no_grad():
        module.weight[2, 3] += 0.5


@pytest.mark.parametrize("n", [5, 150])
def test_gradients_on_a_hit_are_those_of_a_miss(n, count_factorisations):
    module = Orthogonal(n, 0.7, dtype=torch.float64)
    with torch.no_grad():
        module.weight += 0.1 / n**0.5 * torch.randn(n, n)
    weights = torch.randn(n, n, dtype=torch.float64)

    def gradients():
        module.zero_grad()
        loss = (module() ** 3 * weights).sum()
        (first,) = torch.autograd.grad(loss, module.weight, create_graph=True)
        (second,) = torch.autograd.grad((first**2).sum(), module.weight)
        (module() ** 3 * weights).sum().backward()
        return first.detach(), second, module.weight.grad.clone()

    miss, hit = gradients(), gradients()
    assert len(count_factorisations) == 1
    raw = module.weight.detach().clone().requires_grad_()
    loss = ((0.7 * torch.ops.fastdeq.orthogonal_factor(raw)[0]) ** 3 * weights).sum()
    (first,) = torch.autograd.grad(loss, raw, create_graph=True)
    expected = first.detach(), torch.autograd.grad((first**2).sum(), raw)[0], first.detach()
    for x, y, z in zip(miss, hit, expected, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(y, z, rtol=1e-9, atol=1e-10 * z.abs().max().item())


def test_first_and_second_derivatives_on_a_hit():
    module = OrthogonalMap(0.7)
    for shape in ((4, 4), (5, 3), (3, 5)):
        raw = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        module(raw)
        assert torch.autograd.gradcheck(module, (raw,))
        assert torch.autograd.gradgradcheck(module, (raw,))


def test_backward_after_the_parameter_changed_uses_the_factors_of_the_forward_pass():
    module = Orthogonal(6, 0.9)
    g = torch.randn(6, 6)
    expected = torch.autograd.grad((module() * g).sum(), module.weight)[0]
    loss = (module() * g).sum()
    edit_in_place(module)
    module()
    assert torch.equal(torch.autograd.grad(loss, module.weight)[0], expected)


def test_editing_what_was_returned_does_not_reach_the_cache():
    for scale in (0.9, 1.0):
        module = Orthogonal(6, scale)
        with torch.no_grad():
            module().zero_()
            assert torch.equal(module(), fresh(module))
        module().data.zero_()
        module().detach().zero_()
        w = module()
        w *= 0
        w.sum().backward()
        assert torch.equal(module(), fresh(module))
    linear = parametrize.register_parametrization(torch.nn.Linear(4, 4), "weight", OrthogonalMap())
    linear.weight.data.zero_()
    assert linear.weight.detach().norm() > 1


class Token:
    """Something a graph can hold and a weak reference can watch."""


def test_no_graph_is_kept():
    module = Orthogonal(6, 0.9)
    gc.disable()
    try:
        w = module()
        w.sum().backward()
        token = Token()
        alive = weakref.ref(token)
        w.grad_fn.register_hook(lambda *_, token=token: None)
        w.grad_fn.next_functions[0][0].register_hook(lambda *_, token=token: None)
        del token
        assert alive() is not None
        del w
        assert alive() is None
    finally:
        gc.enable()
    module().sum().backward()  # a second graph over the same factors


def test_the_parameter_is_not_kept_alive():
    module = OrthogonalMap()
    raw = torch.randn(4, 4)
    alive = weakref.ref(raw)
    module(raw)
    del raw
    assert alive() is None


def test_copies_pickles_and_state_dicts_are_without_the_cache():
    module = Orthogonal(6, 0.9)
    expected = module()
    assert set(module.state_dict()) == {"weight", "stored_scale"}
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    twins = (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(buffer, weights_only=False),
    )
    for twin in twins:
        assert twin.map.cache._entry is None
        assert torch.equal(twin(), expected)
    assert module.map.cache._entry is not None
    assert copy.copy(module.map.cache)._entry is None


def test_inference_tensors_and_grad_mode_afterwards():
    with torch.inference_mode():
        module = Orthogonal(6, 0.9)
        inside = module()
    assert torch.equal(module(), inside)
    module = Orthogonal(6, 0.9)
    with torch.inference_mode():
        module()
    module().sum().backward()  # the factors cached before are normal tensors


def test_transforms_and_compilation_bypass_it(count_factorisations):
    module = Orthogonal(4, 0.9, dtype=torch.float64)
    parameters = {k: v.detach().clone() for k, v in module.state_dict().items()}
    g = torch.randn(4, 4, dtype=torch.float64)

    def loss(weight):
        return (torch.func.functional_call(module, {**parameters, "weight": weight}) * g).sum()

    raw = torch.randn(4, 4, dtype=torch.float64)
    leaf = raw.clone().requires_grad_()
    expected = torch.autograd.grad((0.9 * orthogonal_factor(leaf) * g).sum(), leaf)[0]
    torch.testing.assert_close(torch.func.grad(loss)(raw), expected)
    stacked = torch.stack([raw, raw + 1])
    torch.testing.assert_close(torch.vmap(loss)(stacked)[0], loss(raw))
    torch.testing.assert_close(torch.vmap(torch.func.grad(loss))(stacked)[0], expected)
    tangent = torch.randn_like(raw)
    _, change = torch.func.jvp(loss, (raw,), (tangent,))
    torch.testing.assert_close(change, (expected * tangent).sum())
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(raw, tangent)
        change = torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent
    torch.testing.assert_close(change, (expected * tangent).sum())
    made = len(count_factorisations)
    compiled = torch.compile(module, fullgraph=True)
    torch.testing.assert_close(compiled(), fresh(module))
    with torch.no_grad():
        module.weight += 1.0
    torch.testing.assert_close(compiled(), fresh(module))
    (compiled() * g).sum().backward()
    got, module.weight.grad = module.weight.grad, None
    (fresh(module) * g).sum().backward()
    torch.testing.assert_close(got, module.weight.grad)
    assert len(count_factorisations) == made


def test_threads_share_a_cache():
    module = OrthogonalMap()
    matrices = [torch.randn(40, 40) for _ in range(2)]
    expected = [orthogonal_factor(m) for m in matrices]
    wrong = []

    def work(i):
        for _ in range(200):
            if not torch.equal(module(matrices[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []


def test_a_general_cell_gets_its_gradient_through_the_cache(count_factorisations):
    # A general cell asks for W at every step, and its parameters are found by watching.
    cell = AffineCell(5, 8, weight="orthogonal", scale=0.5).double()
    x = torch.randn(4, 5, dtype=torch.float64)
    layer = DEQLayer(lambda z, x: cell(z, x), tol=1e-12, adjoint_tol=1e-12)
    fused = DEQLayer(cell, tol=1e-12, adjoint_tol=1e-12)
    start = torch.zeros(4, 8, dtype=torch.float64)
    gradients = []
    for solve in (layer, fused):
        cell.zero_grad()
        solve(x, z0=start).square().sum().backward()
        gradients.append(cell.weight.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-10)
    assert gradients[0].norm() > 0
    assert len(count_factorisations) == 1
