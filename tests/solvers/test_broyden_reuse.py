"""The inverse of a forward Broyden solve, reused by the adjoint (SHINE)."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdeq import AffineCell, Anderson, Broyden, DEQLayer, fixed_point
from fastdeq.solvers.base import Problem

F64 = torch.float64
REUSE = Broyden(reuse=True)


def cell_of(size=24, scale=1.2):
    weight = torch.nn.Parameter(scale * torch.randn(size, size, dtype=F64) / size**0.5)
    return lambda z, x: torch.tanh(z @ weight.t() + x), weight


def gradients(layer, weight, x):
    return torch.autograd.grad(layer(x).square().sum(), [x, weight])


def test_the_same_gradient_from_fewer_products():
    cell, weight = cell_of()
    x = torch.randn(8, 24, dtype=F64, requires_grad=True)
    options = {"solver": Broyden(memory=60), "tol": 1e-10, "max_iter": 300}
    plain, reused = (
        DEQLayer(cell, adjoint=a, **options) for a in (Broyden(memory=60), Broyden(60, reuse=True))
    )
    expected, found = gradients(plain, weight, x), gradients(reused, weight, x)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-8
    assert reused.last_adjoint_solution.converged.all()
    products = [layer.last_adjoint_solution.evaluations for layer in (reused, plain)]
    assert products[0] < 0.8 * products[1]
    assert reused.last_solution.kept is None  # the memory is not held by the layer


def test_one_update_is_the_transposed_inverse(monkeypatch):
    kept = []
    own = Broyden.kept

    def watched(self, state):
        kept.append(own(self, state))
        return kept[-1]

    monkeypatch.setattr(Broyden, "kept", watched)
    n = 6
    matrix = torch.randn(n, n, dtype=F64) / n**0.5
    c = torch.randn(2, n, dtype=F64, requires_grad=True)
    options = {"solver": "broyden", "adjoint": REUSE, "tol": 1e-12, "max_iter": 100}
    options |= {"adjoint_max_iter": 1, "on_failure": "ignore"}
    z, _ = fixed_point(lambda z: torch.tanh(z @ matrix.t()) + c, torch.zeros_like(c), **options)
    inverse = kept[0]
    age = torch.arange(inverse.left.shape[1])
    used = (age < inverse.counts[:, None]).to(F64)
    dense = torch.einsum("bi,bin,bim->bnm", used, inverse.left, inverse.right)
    dense = dense - inverse.scale[:, None, None] * torch.eye(n, dtype=F64)
    g = torch.randn(2, n, dtype=F64)
    (found,) = torch.autograd.grad(z, c, g)
    torch.testing.assert_close(found, -torch.einsum("bnm,bn->bm", dense, g))


@pytest.mark.parametrize("create", [False, True])
def test_batched_gradients(create):
    cell, weight = cell_of(size=4, scale=0.8)
    x = torch.randn(3, 4, dtype=F64, requires_grad=True)
    options = {"solver": "broyden", "tol": 1e-12, "max_iter": 300}
    g = torch.randn(5, 3, 4, dtype=F64)
    found, expected = (
        torch.autograd.grad(
            DEQLayer(cell, adjoint=a, **options)(x),
            [x, weight],
            g,
            is_grads_batched=True,
            create_graph=create,
        )
        for a in (REUSE, "gmres")
    )
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


def test_solutions_hold_no_memory_of_the_solver():
    cell, weight = cell_of()
    x = torch.randn(4, 24, dtype=F64, requires_grad=True)
    layer = DEQLayer(cell, solver="broyden", adjoint=REUSE, keep_solutions=2, on_failure="ignore")
    gradients(layer, weight, x)
    last = layer.last_solution, layer.last_adjoint_solution
    assert [s.solver for s in last] == [Broyden(), REUSE]
    for s in (*last, *layer.solutions["forward"], *layer.solutions["adjoint"]):
        assert s.kept is None
        assert not any(torch.is_tensor(v) or v is None for v in vars(s.solver).values())


def test_the_adjoint_keeps_no_inverse(monkeypatch):
    made, own = [], Broyden.kept
    monkeypatch.setattr(Broyden, "kept", lambda *a: made.append(own(*a)) or made[-1])
    cell, weight = cell_of()
    x = torch.randn(4, 24, dtype=F64, requires_grad=True)
    gradients(DEQLayer(cell, solver="broyden", adjoint=REUSE, on_failure="ignore"), weight, x)
    assert len(made) == 1


class NoLook(TorchDispatchMode):
    """No number is read, and none is copied from the host."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default
        assert function is not torch.ops.aten.lift_fresh.default
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(("memory", "updates"), [(8, 3), (8, 8), (4, 11)])
def test_pairs_are_kept_newest_first_without_a_look(memory, updates):
    state = Broyden(memory=memory).init(torch.zeros(2, 3), Problem(0.0, 0.0, 100, None, None))
    solver = Broyden(memory=memory)
    every = torch.ones(2, dtype=torch.bool)
    for _ in range(updates):
        s, y, g = torch.randn(3, 2, 3).unbind()
        solver._update(state, s, y, g, every, every)
    with NoLook():
        kept = solver.kept(state)
    order = [(state.slot - 1 - i) % memory for i in range(min(updates, memory))]
    assert torch.equal(kept.left, state.left[:, order])
    assert torch.equal(kept.right, state.right[:, order])


def test_what_is_handed_on_is_no_option():
    with pytest.raises(TypeError, match="valid options: damping, memory, reuse, safeguard"):
        Broyden(memroy=5)


def test_samples_that_stopped_early_and_bad_ones():
    cell, weight = cell_of()
    x = torch.randn(6, 24, dtype=F64)
    x[0] *= 1e-3
    x[3] = torch.nan
    options = {"solver": Broyden(memory=10), "tol": 1e-9, "max_iter": 300, "on_failure": "ignore"}
    found = gradients(DEQLayer(cell, adjoint=REUSE, **options), weight, x.requires_grad_())
    expected = gradients(DEQLayer(cell, adjoint="gmres", **options), weight, x)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-7


def test_second_derivatives():
    cell, _ = cell_of(size=4, scale=0.8)
    layer = DEQLayer(cell, solver="broyden", adjoint=REUSE, tol=1e-12, max_iter=300)
    x = torch.randn(2, 4, dtype=F64, requires_grad=True)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("weight", ["dense", "symmetric"])
def test_an_affine_cell_is_called_as_a_general_one(weight):
    cell = AffineCell(3, 16, scale=0.8, weight=weight, dtype=F64)
    x = torch.randn(5, 3, dtype=F64, requires_grad=True)
    layer = DEQLayer(cell, solver="broyden", adjoint=REUSE, tol=1e-10)
    (found,) = torch.autograd.grad(layer(x).square().sum(), x)
    (expected,) = torch.autograd.grad(DEQLayer(cell, tol=1e-10)(x).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_what_it_needs():
    cell, _ = cell_of()
    with pytest.raises(ValueError, match='needs solver="broyden"'):
        DEQLayer(cell, adjoint=REUSE)
    with pytest.raises(ValueError, match='needs solver="broyden"'):
        DEQLayer(cell, solver=Anderson(), adjoint=REUSE)
    with pytest.raises(ValueError, match="is an adjoint solver"):
        DEQLayer(cell, solver=REUSE)
    with pytest.raises(ValueError, match="True or False"):
        Broyden(reuse="yes")
