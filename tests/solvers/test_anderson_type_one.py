"""Anderson acceleration of type I: its definition, what it is on linear maps, and who has it."""

import pytest
import torch

from fastdeq import AffineCell, Anderson, BackendError, DEQLayer, Status, fixed_point
from fastdeq.ops import anderson_mix
from fastdeq.solvers import loop
from fastdeq.solvers.anderson_type_one import mix_type_one

F64 = {"dtype": torch.float64}
FREE = {"regularization": 0.0, "safeguard": float("inf")}


def tanh_map(size, scale, batch=3, dtype=torch.float64):
    w = (scale * torch.randn(size, size, **F64) / size**0.5).to(dtype)
    b = torch.randn(batch, size, **F64).to(dtype)
    return (lambda z: torch.tanh(z @ w.t() + b)), torch.zeros_like(b)


def solve(f, start, solver, tol=1e-10, max_iter=300):
    mix = anderson_mix.reference
    return loop.solve(f, start, solver, tol=tol, max_iter=max_iter, anderson_mix=mix)


def points_of(f, start, solver, steps):
    seen = []

    def watched(z):
        seen.append(z[0].clone())
        return f(z)

    solve(watched, start, solver, 0.0, steps)
    return seen


@pytest.mark.parametrize("damping", [1.0, 0.6])
@pytest.mark.parametrize("window", [1, 3, 8])
def test_the_iterates_are_those_of_the_definition(window, damping):
    """``z + beta g - (S + beta Y)(S^T Y)^{-1} S^T g`` with successive differences, which span what
    those to the newest do."""
    f, start = tanh_map(12, 1.1, batch=1)
    mine = points_of(f, start, Anderson(window=window, damping=damping, kind="I", **FREE), 10)
    z = start
    zs, gs = [], []
    for point in mine:
        # Ten steps, each amplified by the condition of S^T Y, below 1e5 here.
        torch.testing.assert_close(point, z[0], rtol=1e-7, atol=1e-7)
        g = f(z) - z
        zs, gs = [*zs, z[0]][-window - 1 :], [*gs, g[0]][-window - 1 :]
        z = z + damping * g
        if len(zs) > 1:
            s, y = torch.stack(zs, 1).diff(dim=1), torch.stack(gs, 1).diff(dim=1)
            gamma = torch.linalg.solve(s.t() @ y, s.t() @ g[0])
            z = z - (s + damping * y) @ gamma


def test_on_a_linear_map_it_is_full_orthogonalisation():
    """Walker and Ni, theorem 2.8: z_{k+1} = f(x_k), x_k in the Krylov space with a residual
    orthogonal to it; where type II has that of GMRES."""
    a = torch.randn(15, 15, **F64) / 15**0.5
    b = torch.randn(1, 15, **F64)
    f = lambda z: z @ a.t() + b  # noqa: E731
    matrix = torch.eye(15, **F64) - a
    mine = points_of(f, torch.zeros_like(b), Anderson(window=15, kind="I", **FREE), 7)
    for k in range(1, 7):
        columns = [b[0]]
        for _ in range(k - 1):
            columns.append(a @ columns[-1])
        basis = torch.linalg.qr(torch.stack(columns, 1))[0]
        x = basis @ torch.linalg.solve(basis.t() @ matrix @ basis, basis.t() @ b[0])
        torch.testing.assert_close(mine[k + 1], f(x[None])[0], rtol=1e-8, atol=1e-8)
    other = points_of(f, torch.zeros_like(b), Anderson(window=15, **FREE), 7)
    assert (mine[4] - other[4]).norm() > 1e-3


def test_one_difference_in_one_dimension_is_the_secant_method():
    points = points_of(torch.cos, torch.zeros(1, 1, **F64), Anderson(window=1, kind="I", **FREE), 6)
    a, b = points[0], points[1]
    for point in points[2:]:
        g, h = torch.cos(a) - a, torch.cos(b) - b
        a, b = b, b - h * (b - a) / (h - g)
        torch.testing.assert_close(point, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hard_tanh_cells(dtype):
    f, start = tanh_map(32, 1.4, batch=24, dtype=dtype)
    mine, plain = (solve(f, start, s, 1e-4, 200) for s in (Anderson(kind="I"), Anderson()))
    assert mine.converged.sum() >= 20
    assert mine.iterations.double().mean() < 1.5 * plain.iterations.double().mean()
    value = f(mine.value).double()
    residual = (value - mine.value.double()).norm(dim=1) / value.norm(dim=1)
    assert (residual[mine.converged] <= 1e-4 + 32 * torch.finfo(dtype).eps).all()


def test_dependent_columns_are_dropped_and_counted():
    f, start = tanh_map(2, 0.5, batch=4)
    solution = solve(f, start, Anderson(window=10, kind="I"), 1e-13)
    assert solution.converged.all()
    assert (solution.rejects["rank_cut"] > 0).all()


def test_a_bad_sample_harms_no_other():
    f, start = tanh_map(16, 1.2, batch=5)

    def poisoned(z):
        calls.append(0)
        value = f(z)
        if len(calls) > 3:
            value = value.clone()
            value[2] = torch.nan
        return value

    calls = []
    good, bad = (solve(g, start, Anderson(kind="I")) for g in (f, poisoned))
    others = [0, 1, 3, 4]
    assert bad.status[2] == Status.NONFINITE
    assert torch.equal(good.value[others], bad.value[others])
    assert torch.equal(good.iterations[others], bad.iterations[others])


@pytest.mark.parametrize("direction", ["solver", "adjoint"])
def test_affine_cells_are_solved_by_the_reference(direction):
    cell = AffineCell(4, 16, scale=0.9).double()
    x = torch.randn(6, 4, **F64)
    options = {direction: Anderson(window=8, kind="I"), "tol": 1e-11, "max_iter": 500}
    layer, plain = DEQLayer(cell, **options), DEQLayer(cell, tol=1e-11, max_iter=500)
    grads = []
    for each in (layer, plain):
        grads.append(torch.autograd.grad(each(x).square().sum(), list(cell.parameters())))
        assert each.last_solution.path == "fused"
        assert each.last_adjoint_solution.converged.all()
    for mine, other in zip(*grads, strict=True):
        assert (mine - other).norm() <= 1e-8 * other.norm()
    found = layer.last_solution if direction == "solver" else layer.last_adjoint_solution
    assert found.solver.kind == "I"
    spec = getattr(layer._specs, "forward" if direction == "solver" else "adjoint")
    assert spec.engines_chosen == ("reference",)


@pytest.mark.parametrize("cell", [AffineCell(3, 3, scale=0.9), lambda z, x: 0.5 * z + x])
def test_an_explicit_engine_says_that_it_has_only_type_two(cell):
    layer = DEQLayer(cell, solver=Anderson(kind="I"), backend="cpp")
    with pytest.raises(BackendError, match=r"type I .*in plain PyTorch alone"):
        layer(torch.randn(2, 3))


def test_general_cells_are_solved_in_plain_pytorch():
    f, start = tanh_map(8, 1.2)
    start_32 = start.float()
    z, solution = fixed_point(lambda z: f(z.double()).float(), start_32, solver=Anderson(kind="I"))
    assert solution.converged.all()
    expected = solve(lambda z: f(z.double()).float(), start_32, Anderson(kind="I"), 1e-4, 100)
    assert torch.equal(z, expected.value)


def test_other_kinds_are_refused():
    with pytest.raises(ValueError, match="'II', 'I'"):
        Anderson(kind="III")


@pytest.mark.parametrize("rest", [float("nan"), 7.0])
def test_entries_that_do_not_count_may_hold_anything(rest):
    f, g = torch.randn(2, 5, 4, **F64), torch.randn(2, 5, 4, **F64)
    count = torch.tensor([2, 0], dtype=torch.int32)
    settings = (4, 1.0, 0.0, 1e-10, 1e8)
    expected = mix_type_one(f[:, 2:], g[:, 2:], None, count, 2, *settings[1:])
    f[:, :2], g[:, :2] = rest, torch.randn(2, 4, **F64)
    f[1, :4], g[1, :4] = rest, rest
    found = mix_type_one(f, g, None, count, *settings)
    torch.testing.assert_close(found[0], expected[0])
    assert torch.equal(found[0][1], f[1, 4])
    assert found[1].tolist() == [0, 0]
