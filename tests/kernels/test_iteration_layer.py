"""The Triton iteration of general maps: float32, memory, values of any kind, adjoints, layers."""

import iteration_cases as cases
import pytest
import torch
from engine_cases import Call, make_adjoint, make_forward
from engine_checks import check_agreement
from fastdeq.kernels.iteration import engine, state
from iteration_cases import assert_same
from torch import nn

from fastdeq import Anderson, DEQLayer, Neumann, Picard
from fastdeq.solve import iteration
from fastdeq.solvers import SolveOptions

AUTO = Anderson(window=10, first_window=2, accelerate_above=0.4, safeguard=100.0)


@pytest.mark.parametrize(
    ("make", "solver"),
    [(make_forward, AUTO), (make_adjoint, Anderson(window=4)), (make_forward, Picard())],
)
@pytest.mark.parametrize("size", [1, 33])
def test_float32_is_right_but_for_rounding(make, solver, size, device):
    """Against float64: residuals, statuses and counts are those of the problem."""
    case = make(3, size, torch.float32)
    call = Call(solver, tol=1e-4, max_iter=60)
    actual = cases.run(case, call, "iteration", "triton", device)
    check_agreement(case, call, actual, cases.run(case, call, "reference"))


def test_what_a_map_keeps_or_returns_stays_as_it_was(device):
    """Points that somebody holds are not written to; the value may be the point itself, a view of
    it, or the same memory at every call."""
    f, start = cases.contraction(device, size=6)
    before, kept, copies = start.clone(), [], []

    def keeps(z):
        kept.append(z)
        copies.append(z.clone())
        return f(z)

    for solver in (Picard(), Anderson(window=2)):
        kept.clear(), copies.clear()
        assert cases.by_triton(keeps, start, solver, tol=1e-3, max_iter=60).converged.all()
        assert len(kept) > 4
        assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))
    same = torch.empty_like(start)
    reuses = lambda z: same.copy_(f(z))  # noqa: E731
    limits = {"tol": 1e-3, "max_iter": 60}
    actual = cases.by_triton(reuses, start, Anderson(window=2), **limits)
    assert_same(actual, cases.by_loop(f, start, Anderson(window=2), **limits))
    identity = cases.by_triton(lambda z: z.view(3, 6), start, Picard(), tol=1e-6, max_iter=5)
    assert identity.iterations.tolist() == [0] * 3
    mirrored = cases.by_triton(lambda z: z.flip(1).neg(), start, Picard(), tol=0.0, max_iter=4)
    expected = cases.by_loop(lambda z: z.flip(1).neg(), start, Picard(), tol=0.0, max_iter=4)
    assert_same(mirrored, expected)
    assert torch.equal(start, before)


def test_a_point_that_nobody_holds_is_written_to(device):
    """So that an iteration needs no state but the point, the value and the best."""
    f, start = cases.contraction(device)
    options = SolveOptions.of(Picard(), tol=1e-3, max_iter=9)
    own = engine.Iteration(start, options, [start.shape[1]])
    address = own.point().data_ptr()
    while own.advance(f(own.point())):
        assert own.point().data_ptr() == address
    held = engine.Iteration(start, options, [start.shape[1]])
    view = held.point()[1:, 2:]
    held.advance(f(held.point()))
    assert held.point().data_ptr() != view.data_ptr() - view.storage_offset() * view.itemsize


def test_a_history_grows_with_its_use(device, monkeypatch):
    monkeypatch.setattr(state, "SMALL_HISTORY", 0)
    f, start = cases.contraction(device, batch=2, size=40, rate=0.99)
    own = engine.Iteration(start, SolveOptions.of(AUTO, tol=0.0, max_iter=20), [40])
    held = []
    while own.advance(f(own.point())):
        held.append(len(own._history._slots))
    assert held[:3] == [1, 2, 2]
    assert held[14] == 2
    assert held[15] == 3
    assert held[18] == 4
    limits = {"tol": 1e-10, "max_iter": 30}
    grown = cases.by_triton(f, start, AUTO, **limits)
    assert int(grown.iterations.max()) > 15
    assert_same(grown, cases.by_loop(f, start, AUTO, **limits))


def test_values_of_any_layout_and_dtype(device):
    f, start = cases.contraction(device, size=6)
    limits = {"tol": 1e-3, "max_iter": 60}
    expected = cases.by_triton(f, start, Anderson(window=2), **limits)
    layouts = (
        lambda v: v.t().contiguous().t(),
        lambda v: torch.stack([v, v], 2)[:, :, 0],
        lambda v: nn.Parameter(v),
        lambda v: torch.complex(v, -v).conj().imag,
    )
    for layout in layouts:
        actual = cases.by_triton(lambda z, g=layout: g(f(z)), start, Anderson(window=2), **limits)
        assert torch.equal(actual.value, expected.value)
    rounded = cases.by_triton(lambda z: f(z).float(), start, Picard(), **limits)
    assert rounded.converged.all()
    assert rounded.value.dtype == torch.float64
    with pytest.raises(RuntimeError, match="must be"):
        cases.by_triton(lambda z: f(z)[:2], start, Picard(), **limits)
    with pytest.raises(RuntimeError, match="dense"):
        cases.by_triton(lambda z: f(z).to_sparse(), start, Picard(), **limits)


@pytest.mark.parametrize("solver", [Neumann(), Anderson(window=3, damping=0.8)], ids=str)
def test_an_adjoint_adds_its_offset(solver, device):
    _, g = cases.contraction(device)
    size = g.shape[1]
    w = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0].mul(0.6).to(device)
    scale = torch.rand(len(g), dtype=torch.float64, device=device) + 0.1
    linear = lambda u: None if not u.any() else u @ w  # noqa: E731
    options = SolveOptions.of(solver, tol=1e-4, max_iter=60)
    zeros = torch.zeros((), dtype=torch.float64, device=device).expand(g.shape)
    how = (solver, options, None, lambda u: None)
    actual = iteration.iterate(linear, zeros, *how, g, scale, "triton")
    added = lambda u: u @ w + scale.unsqueeze(1) * g  # noqa: E731
    expected = cases.by_loop(added, torch.zeros_like(g), solver, tol=1e-4, max_iter=60)
    assert_same(actual, expected)


def test_what_is_not_for_these_kernels(device):
    class Mine(Anderson):
        pass

    start = torch.zeros(2, 3, device=device)
    assert iteration.is_compiled(Anderson(), "triton", start)
    assert iteration.is_compiled(Anderson(window=32), "triton", start)
    assert not iteration.is_compiled(Anderson(window=33), "triton", start)
    assert not iteration.is_compiled(Anderson(), "reference", start)
    assert not iteration.is_compiled(Mine(), "triton", start)
    assert not iteration.is_compiled(Anderson(), "triton", start.to(torch.bfloat16))
    assert not iteration.is_compiled(Anderson(), "triton", start[:0])
    assert not iteration.is_compiled(Anderson(), "triton", start.to("meta"))
    assert not iteration.is_compiled(Anderson(), "cuda", start)


class Cell(nn.Module):
    """A cell with two parts, of which one is an image."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 12)
        self.image = nn.Conv2d(1, 1, 3, padding=1)
        nn.init.orthogonal_(self.linear.weight, 0.5)
        nn.init.constant_(self.image.weight, 0.05)

    def initial_state(self, x):
        return x.new_zeros(len(x), 8), x.new_zeros(len(x), 1, 2, 2)

    def forward(self, z, x):
        vector, image = z
        mixed = torch.tanh(self.linear(torch.cat([vector, image.flatten(1)], 1)) + x)
        return mixed[:, :8], self.image(image) + mixed[:, 8:].view(-1, 1, 2, 2)


@pytest.mark.parametrize("batch_dim", [0, None])
def test_values_and_gradients_of_a_layer(batch_dim, device):
    """Both solve to 1e-9 where the map contracts by 0.8 at most."""
    cell = Cell().double().to(device)
    x = torch.randn(3, 12, dtype=torch.float64, device=device, requires_grad=True)
    found = {}
    for backend in ("triton", "reference"):
        layer = DEQLayer(cell, backend=backend, tol=1e-9, batch_dim=batch_dim)
        vector, image = layer(x)
        loss = vector.square().sum() + image.sum()
        found[backend] = (vector, image, *torch.autograd.grad(loss, (x, *cell.parameters())))
        solutions = layer.last_solution, layer.last_adjoint_solution
        assert all(s.converged.all() for s in solutions)
    for actual, expected in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-7)


def test_gradients_of_extreme_sizes_and_none(device):
    """A row that is not finite leaves as NaN and touches no other; one of any size is solved."""
    linear = nn.Linear(5, 5).to(device)
    nn.init.orthogonal_(linear.weight, 0.5)
    cell = lambda z, x: torch.tanh(linear(z) + x)  # noqa: E731
    x = torch.randn(4, 5, device=device, requires_grad=True)
    g = torch.randn(4, 5, device=device)
    factors = torch.tensor([[1.0], [1e-36], [1e30], [torch.nan]], device=device)
    grads = {}
    for backend in ("triton", "reference"):
        layer = DEQLayer(cell, backend=backend, tol=1e-5, on_failure="ignore")
        plain = torch.autograd.grad(layer(x), x, g)[0]
        grads[backend] = torch.autograd.grad(layer(x), x, factors * g)[0]
        assert grads[backend][3].isnan().all()
        ratio = grads[backend][:3] / (factors[:3] * plain[:3])
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-3, atol=1e-3)


def test_a_fixed_count_leaves_nothing_out(device):
    calls = []

    def cell(z, x):
        calls.append(len(z))
        return torch.tanh(0.3 * z.flip(1) + x)

    x = torch.randn(4, 5, device=device)
    layer = DEQLayer(
        cell,
        solver=Picard(fixed_iterations=5),
        backend="triton",
        compact=True,
        on_failure="ignore",
    )
    with torch.no_grad():
        layer(x)
    assert calls == [4] * 6


def test_finished_samples_are_left_out(device):
    calls = []

    class Cell(nn.Module):
        def forward(self, z, x, gain):
            calls.append(len(z))
            return torch.tanh(gain * z.flip(1) + x)

    x = torch.randn(8, 5, device=device)
    gain = torch.full((8, 1), 0.3, device=device)
    gain[3] = 0.95
    found = []
    for backend, compact in (("reference", False), ("triton", True)):
        leaf = x.clone().requires_grad_()
        layer = DEQLayer(Cell(), backend=backend, compact=compact, tol=1e-5, max_iter=400)
        z = layer(leaf, gain)
        found.append((z, *torch.autograd.grad(z.square().sum(), leaf)))
    assert "left out" in layer.last_solution.path
    assert "left out" in layer.last_adjoint_solution.path
    assert min(calls) <= 2
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
