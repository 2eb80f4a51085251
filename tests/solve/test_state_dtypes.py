"""Complex states, several dtypes in one state, and numbers without dimensions."""

import math

import pytest
import torch

from fastdeq import AffineCell, Anderson, DEQLayer, fixed_point
from fastdeq.errors import BackendError

C128, F64 = torch.complex128, torch.float64
TIGHT = {"tol": 1e-12, "max_iter": 300}


def contraction(size):
    w = torch.randn(size, size, dtype=C128)
    return 0.7 * w / torch.linalg.matrix_norm(w, 2)


@pytest.mark.parametrize(
    "solver", ["auto", "picard", Anderson(accelerate_above=0.0)], ids=["auto", "picard", "anderson"]
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("batch_dim", [0, 1, None])
def test_complex_states_and_gradients_in_closed_form(batch_dim, backend, solver):
    """``z = z W + c``: dL/dc = g (I - W^H)^-1 for rows, by PyTorch's convention that dL/dc is the
    conjugate Wirtinger derivative."""
    w = contraction(4).requires_grad_()
    c = torch.randn(3, 4, dtype=C128, requires_grad=True)
    turn = (lambda t: t.t()) if batch_dim == 1 else (lambda t: t)
    f = lambda z: turn(turn(z) @ w + c)  # noqa: E731
    start = turn(torch.zeros(3, 4, dtype=C128))
    options = {"batch_dim": batch_dim, "backend": backend, "solver": solver, **TIGHT}
    z, solution = fixed_point(f, start, **options)
    z = turn(z)
    expected = torch.linalg.solve(torch.eye(4, dtype=C128) - w.t(), c.t()).t()
    torch.testing.assert_close(z, expected, rtol=1e-10, atol=1e-10)
    assert z.dtype == C128
    assert solution.value.dtype == C128
    assert solution.residual.dtype == F64
    assert solution.residual.shape == (1 if batch_dim is None else 3,)
    g = torch.randn(3, 4, dtype=C128)
    found = torch.autograd.grad(z, (w, c), g)
    for one, other in zip(found, torch.autograd.grad(expected, (w, c), g), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gradient", ["implicit", "one_step"])
def test_gradcheck_of_a_map_that_is_not_holomorphic(gradient):
    """The real and the imaginary part go separate ways; the parameters are real and complex."""
    w = contraction(3).requires_grad_()
    c = torch.randn(2, 3, dtype=C128, requires_grad=True)
    s = torch.tensor(0.3, dtype=F64, requires_grad=True)

    def solved(w, c, s):
        def f(z):
            y = z.conj() @ w + c
            return torch.complex(torch.tanh(y.real), s * torch.sin(y.imag))

        return fixed_point(f, torch.zeros(2, 3, dtype=C128), gradient=gradient, **TIGHT)[0]

    if gradient == "implicit":
        assert torch.autograd.gradcheck(solved, (w, c, s))
        assert torch.autograd.gradgradcheck(solved, (w, c, s), atol=1e-4)
        return
    found = torch.autograd.grad(solved(w, c, s).abs().sum(), c)[0]
    at = solved(w, c, s).detach()
    y = at.conj() @ w + c
    once = torch.complex(torch.tanh(y.real), s * torch.sin(y.imag))
    expected = torch.autograd.grad(once.abs().sum(), c)[0]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_complex_layers():
    """x complex, the start like x, a sample that is not finite set aside, compact."""
    w = contraction(4)
    x = torch.randn(6, 4, dtype=C128) * torch.logspace(-6, 1, 6, dtype=F64)[:, None]
    expected = torch.linalg.solve(torch.eye(4, dtype=C128) - w.t(), x.t()).t()
    x[2, 1] = complex(0, math.nan)
    layer = DEQLayer(lambda z, x: z @ w + x, compact=True, on_failure="ignore", **TIGHT)
    z = layer(x)
    keep = [0, 1, 3, 4, 5]
    torch.testing.assert_close(z[keep], expected[keep], rtol=1e-9, atol=1e-12)
    assert z[2].abs().sum() == 0
    assert layer.last_solution.nonfinite.tolist() == [i == 2 for i in range(6)]
    with pytest.raises(BackendError, match="float64"):
        DEQLayer(lambda z, x: z @ w + x, precision="mixed")(x)


def test_the_residual_is_that_of_the_complex_norm():
    z, solution = fixed_point(lambda z: 0.5j * z + 1, torch.zeros(3, 2, dtype=torch.complex64))
    r = torch.linalg.vector_norm(0.5j * z + 1 - z, dim=1) / torch.linalg.vector_norm(z, dim=1)
    torch.testing.assert_close(solution.residual, r, rtol=1e-3, atol=1e-7)
    estimate = fixed_point(
        lambda z: 0.5j * z + 1, torch.zeros(3, 2, dtype=C128), solver="picard", tol=1e-6
    )[1].error_estimate
    assert estimate.shape == (3,)
    assert (estimate < 1e-5).all()


def test_a_complex_value_of_a_real_state_is_an_error():
    with pytest.raises(TypeError, match="a start that is complex"):
        fixed_point(lambda z: 0.5j * z, torch.ones(2, 2))
    z, _ = fixed_point(lambda z: (0.5 * z + 1).real, torch.zeros(2, 2, dtype=torch.complex64))
    assert z.is_complex()  # a real value is a complex one


@pytest.mark.parametrize(
    ("one", "other", "rows"),
    [
        (torch.float32, F64, F64),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, F64, F64),
        (torch.complex64, torch.float32, torch.float32),
        (torch.complex64, F64, F64),
        (C128, torch.bfloat16, F64),
    ],
    ids=str,
)
@pytest.mark.parametrize("compact", [False, True])
def test_each_part_has_its_own_dtype(one, other, rows, compact):
    seen = set()

    def cell(s, x):
        seen.add((s["a"].dtype, s["b"].dtype))
        mean = s["b"].to(x.dtype).mean(1, keepdim=True)
        a = 0.4 * s["a"] + (0.2 * mean + x).to(one)
        return {"a": a, "b": (0.5 * s["b"] + x.mean(1, keepdim=True).to(other))}

    x = torch.rand(3, 2, dtype=F64).add(1).requires_grad_()
    start = {"a": torch.zeros(3, 2, dtype=one), "b": torch.zeros(3, 4, dtype=other)}
    layer = DEQLayer(cell, tol=2e-2, compact=compact)
    state = layer(x, z0=start)
    assert {(state["a"].dtype, state["b"].dtype), *seen} == {(one, other)}
    value = layer.last_solution.value
    assert (value["a"].dtype, value["b"].dtype) == (one, other)
    assert layer.last_solution.residual.dtype == rows
    mean = x.mean(1, keepdim=True)
    # The error is the residual over 1 - 0.5, for either part.
    b = (2 * mean).expand(3, 4)
    a = (0.4 * mean + x) / 0.6
    torch.testing.assert_close(state["b"].real.to(F64), b, rtol=5e-2, atol=0)
    torch.testing.assert_close(state["a"].real.to(F64), a, rtol=8e-2, atol=0)
    found = torch.autograd.grad(state["a"].real.to(F64).sum() + state["b"].to(F64).sum(), x)[0]
    expected = torch.autograd.grad(a.sum() + b.sum(), x)[0]
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=0)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("batch_dim", [0, 1, None])
def test_a_complex_part_behind_an_odd_number_of_real_ones(batch_dim, backend):
    """Pairs that do not begin at an even place of a row cannot be seen as complex numbers."""
    theta = torch.tensor(0.3 + 0.2j, dtype=C128, requires_grad=True)
    f = lambda s: (0.5 * s[0] + 1, theta * s[1] + s[0].detach())  # noqa: E731
    start = (torch.zeros(3, 3, dtype=F64), torch.zeros(3, 3, dtype=C128))
    (a, b), _ = fixed_point(f, start, batch_dim=batch_dim, backend=backend, **TIGHT)
    expected = (2 / (1 - theta)).expand(3, 3)
    torch.testing.assert_close(a, torch.full((3, 3), 2.0, dtype=F64), rtol=1e-9, atol=0)
    torch.testing.assert_close(b, expected, rtol=1e-9, atol=0)
    found, known = (torch.autograd.grad(t.abs().sum(), theta)[0] for t in (b, expected))
    torch.testing.assert_close(found, known, rtol=1e-8, atol=0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.uint8], ids=str)
def test_integers_are_refused(dtype):
    with pytest.raises(TypeError, match=f"{dtype}; it must be floating point or complex"):
        fixed_point(lambda z: z, {"a": torch.zeros(2, 2), "b": torch.zeros(2, dtype=dtype)})


def test_a_number_is_one_sample():
    theta = torch.tensor(0.0, dtype=F64, requires_grad=True)
    z, solution = fixed_point(lambda z: torch.cos(z) + theta, torch.tensor(0.0, dtype=F64), **TIGHT)
    assert z.shape == ()
    assert solution.status.shape == (1,)
    assert solution.value.shape == ()
    # dz/dtheta = 1 / (1 + sin z)
    (grad,) = torch.autograd.grad(z, theta, create_graph=True)
    torch.testing.assert_close(grad, 1 / (1 + torch.sin(z)), rtol=1e-10, atol=0)
    (second,) = torch.autograd.grad(grad, theta)
    torch.testing.assert_close(second, -torch.cos(z) / (1 + torch.sin(z)) ** 3, rtol=1e-8, atol=0)
    estimate = fixed_point(torch.cos, torch.tensor(0.0), solver="picard")[1].error_estimate
    assert estimate.shape == (1,)


def test_numbers_in_a_structure_and_in_a_layer():
    z, solution = fixed_point(
        lambda s: {"a": 0.5 * s["b"] + 1, "b": 0.5 * s["a"]},
        {"a": torch.tensor(0.0), "b": torch.tensor(0.0)},
    )
    torch.testing.assert_close(z["a"], torch.tensor(4 / 3), rtol=1e-3, atol=0)
    assert solution.status.shape == (1,)
    layer = DEQLayer(lambda z, x: 0.5 * z + x)
    torch.testing.assert_close(layer(torch.tensor(1.0)), torch.tensor(2.0), rtol=1e-3, atol=0)
    layer = DEQLayer(lambda z, x: 0.5 * z + x, on_failure="ignore")
    assert layer(torch.tensor(math.nan)) == 0
    assert layer.last_solution.nonfinite.tolist() == [True]
    with pytest.raises(ValueError, match="batch_dim=None"):  # with a vector it may be n samples
        fixed_point(lambda s: s, (torch.tensor(0.0), torch.zeros(3)))


def test_an_affine_cell_has_real_input():
    with pytest.raises(TypeError, match="floating point"):
        DEQLayer(AffineCell(3, 4))(torch.zeros(2, 3, dtype=torch.complex64))
