"""``batch_dim``: which dimensions count samples, against the same solve with samples first and
against dense solves."""

import numpy as np
import pytest
import torch
from coupled_cases import F64, TIGHT, contraction
from torch import nn

from fastdeq import DEQLayer, fixed_point
from fastdeq.samples import as_rows, check_batch_dim, from_rows, resolve, spread


def equal_solutions(a, b):
    for name in ("status", "iterations", "residual"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-13)


@pytest.mark.parametrize("solver", ["picard", "anderson"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(
    ("batch_dim", "to_front"),
    [
        (1, (1, 0, 2)),
        (-2, (1, 0, 2)),
        (2, (2, 0, 1)),
        ((0, 1), (0, 1, 2)),
        ((1, 0), (1, 0, 2)),
        ((0, 2), (0, 2, 1)),
        ([-1, 1], (2, 1, 0)),
    ],
    ids=str,
)
def test_equal_to_the_solve_with_samples_first(batch_dim, to_front, dtype, solver):
    """Forward, gradients, status per sample; one sample needs more iterations than the others."""
    shape = (5, 4, 3)
    c = torch.randn(shape, dtype=dtype)
    count = len(batch_dim) if isinstance(batch_dim, (tuple, list)) else 1
    sizes = [shape[d] for d in to_front]
    batch, rest = sizes[:count], sizes[count:]
    size = int(np.prod(rest))
    w = contraction(size).to(dtype)
    rates = torch.linspace(0.1, 1.0, int(np.prod(batch)), dtype=dtype).unsqueeze(1)
    back = [to_front.index(d) for d in range(3)]
    options = {"solver": solver, "tol": 1e-5 if dtype is torch.float32 else 1e-10, "max_iter": 200}

    def rows(z):
        return z.permute(to_front).reshape(-1, size)

    def states(r):
        return r.reshape(sizes).permute(back)

    found = []
    for moved in (True, False):
        leaf = c.clone().requires_grad_()
        f = lambda r, leaf=leaf: torch.tanh(rates * (r @ w) + rows(leaf))  # noqa: E731
        if moved:
            g = lambda z, f=f: states(f(rows(z)))  # noqa: E731
            z, solution = fixed_point(
                g, torch.zeros(shape, dtype=dtype), batch_dim=batch_dim, **options
            )
            assert z.shape == shape
            z = rows(z)
        else:
            z, solution = fixed_point(f, torch.zeros(len(rates), size, dtype=dtype), **options)
        (grad,) = torch.autograd.grad(z.pow(2).sum(), leaf, create_graph=True)
        (again,) = torch.autograd.grad(grad.pow(2).sum(), leaf)
        assert solution.status.shape == (len(rates),)
        found.append((z, grad, again, solution))
    tight = 1e-4 if dtype is torch.float32 else 1e-8
    for a, b in zip(found[0][:3], found[1][:3], strict=True):
        torch.testing.assert_close(a, b, rtol=tight, atol=tight)
    equal_solutions(found[0][3], found[1][3])
    assert len(found[0][3].iterations.unique()) > 1
    assert found[0][3].value.shape == shape
    if solver == "picard":
        estimates = [solution.error_estimate for *_, solution in found]
        torch.testing.assert_close(*estimates, rtol=1e-2, atol=1e-12)


def test_states_are_contiguous_in_the_cell():
    def f(z):
        assert z.is_contiguous()
        return 0.5 * torch.tanh(z.view(3, -1)).view(z.shape) + 1

    fixed_point(f, torch.zeros(3, 4, 2), batch_dim=1)
    fixed_point(f, torch.zeros(3, 4, 2).transpose(0, 1).contiguous().transpose(0, 1), batch_dim=1)


def test_tuples_with_another_batch_dimension():
    u0, v0 = torch.zeros(3, 4, 2, dtype=F64), torch.zeros(5, 4, dtype=F64)
    a, b = contraction(6, 0.3), contraction(5, 0.3)
    mix = contraction(6, 0.3)[:, :5]
    c = torch.randn(3, 4, 2, dtype=F64, requires_grad=True)

    def f(state):
        u, v = state
        rows = u.transpose(0, 1).reshape(4, 6)
        new = rows @ a.T + v.T @ mix.T
        return new.reshape(4, 3, 2).transpose(0, 1) + c, (v.T @ b.T + rows @ mix).T + 1

    (u, v), solution = fixed_point(f, (u0, v0), batch_dim=1, **TIGHT)
    assert solution.status.tolist() == [0] * 4
    whole = torch.cat([torch.cat([a, mix], 1), torch.cat([mix.T, b], 1)])
    right = torch.cat([c.transpose(0, 1).reshape(4, 6), torch.ones(4, 5, dtype=F64)], 1)
    exact = torch.linalg.solve(torch.eye(11, dtype=F64) - whole, right.T).T
    torch.testing.assert_close(u.transpose(0, 1).reshape(4, 6), exact[:, :6])
    torch.testing.assert_close(v.T, exact[:, 6:])
    (g,) = torch.autograd.grad(v.sum(), c)
    (e,) = torch.autograd.grad(exact[:, 6:].sum(), c)
    torch.testing.assert_close(g, e)


def test_one_sample_of_parts_with_different_leading_sizes():
    a, b = contraction(7, 0.4), torch.randn(3, 7, dtype=F64) / 20
    c = torch.randn(7, dtype=F64, requires_grad=True)

    def f(state):
        nodes, total, scale = state
        return a @ nodes + c + scale, b @ nodes + 0.1 * total, 0.2 * scale + nodes.mean() / 9

    start = (torch.zeros(7, dtype=F64), torch.zeros(3, dtype=F64), torch.zeros((), dtype=F64))
    (nodes, total, scale), solution = fixed_point(f, start, batch_dim=None, **TIGHT)
    assert (solution.status.shape, solution.residual.shape) == ((1,), (1,))
    assert [p.shape for p in solution.value] == [(7,), (3,), ()]
    m = torch.zeros(11, 11, dtype=F64)
    m[:7, :7], m[:7, 10], m[7:10, :7], m[10, :7], m[10, 10] = a, 1, b, 1 / 63, 0.2
    m[range(7, 10), range(7, 10)] = 0.1
    right = torch.cat([c, torch.zeros(4, dtype=F64)])
    exact = torch.linalg.solve(torch.eye(11, dtype=F64) - m, right)
    torch.testing.assert_close(torch.cat([nodes, total, scale[None]]), exact)
    loss, other = (total.pow(2).sum() + scale), (exact[7:10].pow(2).sum() + exact[10])
    torch.testing.assert_close(torch.autograd.grad(loss, c), torch.autograd.grad(other, c))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_scalar_state(dtype):
    theta = torch.tensor(0.7, dtype=dtype, requires_grad=True)
    z, solution = fixed_point(
        lambda z: torch.cos(theta * z), torch.zeros((), dtype=dtype), tol=1e-6, batch_dim=None
    )
    assert z.shape == ()
    assert solution.status.tolist() == [0]
    slope = -torch.sin(theta * z) * torch.stack([z, theta])
    (g,) = torch.autograd.grad(z, theta)
    torch.testing.assert_close(g, (slope[0] / (1 - slope[1])).detach(), rtol=1e-5, atol=0)
    assert DEQLayer(lambda z, x: torch.cos(z) * x, batch_dim=None)(theta).shape == ()


def test_batch_normalisation_in_training_mode():
    """Gradients of parameters and input, against unrolled iterations; float64."""
    norm, linear = nn.BatchNorm1d(5, dtype=F64), nn.Linear(5, 5, dtype=F64)
    cell = lambda z, x: torch.tanh(0.5 * norm(0.4 * linear(z) + x))  # noqa: E731
    x = torch.randn(6, 5, dtype=F64) * torch.logspace(-1, 1, 6, dtype=F64)[:, None]

    def run(solve):
        linear.zero_grad()
        leaf = x.clone().requires_grad_()
        z = solve(leaf)
        z.pow(3).sum().backward()
        return z.detach(), linear.weight.grad.clone(), leaf.grad

    def unrolled(x):
        z = torch.zeros_like(x)
        for _ in range(150):
            z = cell(z, x)
        return z

    layer = DEQLayer(cell, batch_dim=None, tol=1e-11, max_iter=500)
    for found, right in zip(run(layer), run(unrolled), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-7, atol=1e-9)
    assert layer.last_adjoint_solution.status.shape == (1,)


@pytest.mark.parametrize(
    ("value", "kept"),
    [(0, 0), (-1, -1), (None, None), ((0, 1), (0, 1)), ([1, 0], (1, 0)), ((2,), 2),
     (np.int64(3), 3), ((np.int8(0), -1), (0, -1))],
    ids=str,
)  # fmt: skip
def test_what_is_taken(value, kept):
    assert check_batch_dim(value) == kept
    assert DEQLayer(lambda z, x: z, batch_dim=value).options.batch_dim == kept


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((), "an int such as 0"),
        (True, "got True"),
        (0.0, r"got 0\.0"),
        ("0", "got '0'"),
        ((0, None), "None for a state that is one sample"),
        ((0, 0), "twice"),
        ((0, False), "an int"),
        (torch.tensor(0), "an int"),
    ],
    ids=str,
)
def test_what_is_not(value, message):
    for call in (
        lambda: DEQLayer(lambda z, x: z, batch_dim=value),
        lambda: fixed_point(torch.cos, torch.zeros(2, 2), batch_dim=value),
    ):
        with pytest.raises(ValueError, match=f"batch_dim.*{message}"):
            call()


@pytest.mark.parametrize(
    ("state", "batch_dim", "message"),
    [
        (torch.zeros(3), 1, r"shape \(3,\), without the dimension of batch_dim=1.*None"),
        (torch.zeros(3, 2), (0, 2), "without the dimension"),
        (torch.zeros(3, 2), -3, "without the dimension"),
        (torch.zeros(3, 2), (0, -2), "twice in a state of 2 dimensions"),
        ((torch.zeros(()), torch.zeros(3)), 0, "leading batch dimension.*batch_dim=None"),
        (torch.zeros(()), 1, "leading batch dimension.*batch_dim=None"),
        ((torch.zeros(2, 3), torch.zeros(5, 2, 3)), -2, "ambiguous.*from the front"),
        ((torch.zeros(2, 3), torch.zeros(2, 4)), 1, r"differ in batch size.*batch_dim=1.*None"),
        ((torch.zeros(2, 3), torch.zeros(3, 2)), (0, 1), "differ in batch size"),
    ],
    ids=str,
)
def test_states_without_these_dimensions(state, batch_dim, message):
    with pytest.raises(ValueError, match=message):
        fixed_point(lambda z: z, state, batch_dim=batch_dim)


@pytest.mark.parametrize("dims", [(), (0,), (1,), (3,), (0, 1), (1, 0), (3, 1), (2, 0, 3)])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 0, 4, 1)])
def test_rows_and_back(shape, dims):
    t = torch.randn(shape)
    rows = as_rows(t, dims)
    sizes = [shape[d] for d in dims]
    assert rows.shape[0] == int(np.prod(sizes))
    assert torch.equal(from_rows(rows, shape, dims), t)
    assert resolve(dims or None, [t]) == dims
    mask = torch.rand(len(rows)) < 0.5
    chosen = torch.where(spread(mask, t, dims), t, 0.0)
    assert torch.equal(as_rows(chosen, dims), torch.where(mask.unsqueeze(1), rows, 0.0))
