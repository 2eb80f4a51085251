"""A layer is an ordinary module: trains, saves, copies, compiles; memory and grad mode behave."""

import copy
import gc
import io
import pickle
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from fastdeq import AffineCell, Anderson, Broyden, DEQLayer, Orthogonal, Status


def make(weight="dense", **options):
    return DEQLayer(AffineCell(5, 8, activation="tanh", weight=weight, scale=0.5), **options)


@pytest.mark.parametrize("weight", ["dense", "orthogonal", "symmetric"])
def test_training_fits_a_small_regression(weight):
    model = nn.Sequential(make(weight, on_failure="ignore"), nn.Linear(8, 1))
    x = torch.randn(64, 5)
    y = torch.sin(x.sum(1, keepdim=True))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert model[0].last_solution.converged.float().mean() > 0.9
    assert model[0].last_adjoint_solution.converged.float().mean() > 0.9


@pytest.mark.parametrize("weight", ["dense", "orthogonal", "symmetric"])
def test_save_load_deepcopy_pickle(weight, tmp_path):
    layer = make(weight, solver=Anderson(window=3), tol=1e-5)
    x = torch.randn(4, 5)
    expected = layer(x)
    expected.sum().backward()
    torch.save(layer.state_dict(), tmp_path / "weights.pt")
    loaded = make(weight, solver=Anderson(window=3), tol=1e-5)
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    whole = torch.load(buffer, weights_only=False)
    for twin in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), whole):
        assert torch.equal(twin(x), expected)
        assert twin.options == layer.options


def test_copies_start_without_the_record_of_past_solves():
    layer = make()
    layer(torch.randn(4, 5)).sum().backward()
    twin = copy.deepcopy(layer)
    assert twin.last_solution is None
    assert twin.last_adjoint_solution is None
    assert layer.last_solution is not None


def test_numpy_numbers_are_numbers():
    options = make(tol=np.float32(1e-3), max_iter=np.int64(7)).options
    assert options.max_iter == 7
    assert type(options.max_iter) is int
    assert options.adjoint_limits() == {"tol": options.tol, "atol": 0.0, "max_iter": 7}


def test_gradients_follow_grad_mode_and_never_training():
    layer = make()
    x = torch.randn(4, 5)
    assert layer(x).requires_grad
    layer.eval()
    z = layer(x)
    assert z.requires_grad
    z.sum().backward()
    assert layer.cell.injection.weight.grad is not None
    with torch.no_grad():
        assert not layer(x).requires_grad
    with torch.inference_mode():
        assert not layer(x).requires_grad
    layer.requires_grad_(False)
    assert not layer(x).requires_grad
    assert layer(x.clone().requires_grad_()).requires_grad


def test_general_cell_without_parameters_or_gradients():
    layer = DEQLayer(lambda z, x: 0.5 * z + x)
    assert not layer(torch.ones(2, 3)).requires_grad
    torch.testing.assert_close(layer(torch.ones(2, 3)), torch.full((2, 3), 2.0), rtol=1e-3, atol=0)


def test_last_solution_is_per_sample_and_detached():
    layer = make()
    assert layer.last_solution is None
    z = layer(torch.randn(4, 5))
    solution = layer.last_solution
    assert torch.equal(solution.value, z)
    assert not solution.value.requires_grad
    for part in (solution.status, solution.iterations, solution.residual):
        assert part.shape == (4,)
    assert set(solution.rejects) == {"safeguard", "weight_cap", "rank_cut"}
    assert (solution.status == Status.CONVERGED).all()
    assert layer.last_adjoint_solution is None
    z.sum().backward()
    assert layer.last_adjoint_solution.status.shape == (4,)
    assert "4 CONVERGED" in repr(solution)


class Token:
    """Something a graph can hold and a weak reference can watch."""


@pytest.mark.parametrize("path", ["fused", "general"])
def test_graph_is_freed_without_the_garbage_collector(path):
    cell = AffineCell(5, 5, scale=0.5)
    layer = DEQLayer(cell if path == "fused" else (lambda z, x: cell(z, x)))
    gc.disable()
    try:
        z = layer(torch.randn(4, 5))
        z.sum().backward()
        token = Token()
        alive = weakref.ref(token)
        z.grad_fn.register_hook(lambda *_, token=token: None)
        del token
        assert alive() is not None
        del z
        assert alive() is None
    finally:
        gc.enable()


def test_backward_twice_through_one_graph():
    layer = make()
    z = layer(torch.randn(4, 5)).sum()
    z.backward(retain_graph=True)
    first = layer.cell.weight.weight.grad.clone()
    z.backward()
    torch.testing.assert_close(layer.cell.weight.weight.grad, 2 * first)


def test_warm_start_saves_iterations_and_gets_no_gradient():
    layer = make(tol=1e-5)
    x = torch.randn(4, 5)
    z = layer(x)
    cold = layer.last_solution.iterations.sum()
    start = z.detach().clone().requires_grad_()
    layer(x + 1e-3, z0=start).sum().backward()
    assert layer.last_solution.iterations.sum() < cold
    assert start.grad is None


def test_extra_arguments_reach_a_general_cell():
    layer = DEQLayer(lambda z, x, gain: torch.tanh(gain * z) + x)
    x = torch.randn(3, 4)
    assert not torch.equal(layer(x, 0.1), layer(x, 0.5))


def test_custom_solver_object():
    class Halving(Anderson):
        """Not one of the registered solvers, so the affine cell takes the general path."""

        name = "halving"

    layer = make(solver=Halving(window=2), adjoint=Halving(window=2))
    x = torch.randn(4, 5)
    z = layer(x)
    torch.testing.assert_close(z, make_like(layer)(x), rtol=1e-3, atol=1e-3)
    z.sum().backward()


def make_like(layer):
    return DEQLayer(layer.cell)


@pytest.mark.parametrize(
    ("weight", "solver", "adjoint"),
    [
        ("dense", "auto", "auto"),
        ("orthogonal", "auto", "auto"),
        ("symmetric", "auto", "auto"),
        ("dense", "picard", "neumann"),
        ("dense", "anderson", "gmres"),
        ("dense", Anderson(window=3), "anderson"),
    ],
    ids=str,
)
def test_compile_without_graph_breaks(fresh_compiler, weight, solver, adjoint):
    layer = make(weight, solver=solver, adjoint=adjoint)
    x = torch.randn(4, 5)
    expected = layer(x)
    expected.sum().backward()
    gradients = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    z = compiled(x)
    z.sum().backward()
    torch.testing.assert_close(z, expected)
    for p, g in zip(layer.parameters(), gradients, strict=True):
        torch.testing.assert_close(p.grad, g)


def peak_bytes(run):
    """Most bytes held at once by the CPU allocator during ``run``, above the start.

    The middle of three: a profile now and then lacks one of its 70,000 events.
    """
    return sorted(_peak_bytes(run) for _ in range(3))[1]


def _peak_bytes(run):
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


@pytest.mark.parametrize("path", ["fused", "general"])
@pytest.mark.parametrize(
    "adjoint", ["neumann", "gmres", "bicgstab", "anderson", Broyden(5)], ids=str
)
def test_memory_does_not_grow_with_the_iterations(path, adjoint):
    # A rotation by a third of a turn with |W| = 1: plain and accelerated steps go on to the limit.
    size, steps = 128, {}
    cell = AffineCell(size, size, activation="identity", weight=Orthogonal(size, 0.999))
    x = torch.randn(32, size)
    for max_iter in (10, 200):
        options = {"max_iter": max_iter, "tol": 0.0, "on_failure": "ignore", "adjoint": adjoint}
        inner = cell if path == "fused" else (lambda z, x: cell(z, x))
        layer = DEQLayer(inner, solver=Anderson(window=3), **options)
        layer(x).sum().backward()  # first call: one-time buffers
        steps[max_iter] = peak_bytes(lambda layer=layer: layer(x).sum().backward())
        assert layer.last_solution.iterations.max() >= 0.3 * max_iter
    state = x.numel() * x.element_size()
    # Equal up to bookkeeping: less than one state, where unrolling would add 190 of them.
    assert abs(steps[200] - steps[10]) < state


class Scaled(AffineCell):
    """Not the affine map any more: no bound of the weight says anything of it."""

    def forward(self, z, x):
        return 1.5 * z - 2 * z + super().forward(z, x)


class Shifted(AffineCell):
    def inject(self, x):
        return super().inject(x) + 1


@pytest.mark.parametrize("kind", [Scaled, Shifted])
def test_subclass_of_the_affine_cell_is_taken_as_a_general_cell(kind):
    layer = DEQLayer(kind(5, 8, weight="orthogonal", scale=0.5))
    x = torch.randn(4, 5)
    z = layer(x)
    assert layer.last_solution.rejects  # Anderson: nothing is known of the map
    torch.testing.assert_close(layer.cell(z, x), z, rtol=1e-3, atol=1e-3)


def test_hooks_of_an_affine_cell_run():
    layer, calls = make(), []
    layer.cell.register_forward_hook(lambda *_: calls.append(1))
    layer(torch.randn(4, 5))
    assert calls


def test_user_solver_with_options_of_its_own():
    class Mine(Anderson):
        def __init__(self, strength=1.0, **options):
            super().__init__(**options)
            object.__setattr__(self, "strength", strength)

    make(solver=Mine(strength=2.0, window=3))(torch.randn(4, 5))


def test_auto_takes_plain_iteration_only_on_a_certain_contraction():
    for activation, scale, plain in (
        ("tanh", 0.85, True),
        ("gelu", 0.85, True),  # its slope reaches 1.129: 0.96
        ("gelu", 0.9, False),  # 1.016
        ("tanh", 0.99, True),
        ("tanh", 1.0, False),
        ("sigmoid", 3.0, True),  # its slope is at most 1/4: 0.75
    ):
        cell = AffineCell(5, 8, activation=activation, weight="orthogonal", scale=scale)
        layer = DEQLayer(cell, on_failure="ignore")
        layer(torch.randn(4, 5)).sum().backward()
        assert (layer.last_solution.rejects == {}) == plain
        assert (layer.last_adjoint_solution.rejects == {}) == plain
