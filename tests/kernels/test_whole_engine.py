"""Solves by the whole engine, one launch each, against the plain PyTorch ones and float64.

Both meet the tolerance, so that they differ by at most ``2 tol / (1 - contraction)`` of the state,
and by rounding: products of n terms in float32. With tol = 1e-5 and a contraction of 0.8 that is
1e-4; what is seen is some 1e-6.
"""

import pytest
import torch
from engine_cases import Adjoint, Call, Forward
from fastdeq.kernels.whole import engine
from triton_solves import plain

from fastdeq.solvers import MINRES, Anderson, HeavyBall, Neumann, Picard

TOL = 1e-5
SOLVERS = (
    Picard(),
    Picard(damping=0.8),
    Picard(fixed_iterations=7),
    HeavyBall(),
    Anderson(),
    Anderson(window=8, accelerate_above=0.9),
    Anderson(window=8, accelerate_above=0.5),
    Anderson(window=1, damping=0.9),
)


def problem(solver, batch, size, device, scale=0.8):
    """W with spectral norm ``scale``, c, D and g."""
    w = torch.randn(size, size)
    w = (w + w.t()) / 2 if solver.name == "heavy_ball" else w
    w *= scale / torch.linalg.matrix_norm(w, 2)
    c, g = torch.randn(2, batch, size)
    return [t.to(device) for t in (w, c, torch.rand(batch, size), g)]


class Plain:
    """The reference, called as an engine is."""

    @staticmethod
    def solve_affine(w, c, start, activation, with_slope, call):
        return plain(Forward(w, c, activation, start), call, with_slope)

    @staticmethod
    def solve_affine_adjoint(w, d, g, call):
        return plain(Adjoint(w, d, g), call)


def forward(by, w, c, solver, *, start=None, activation="tanh", tol=TOL, max_iter=100, slope=True):
    call = Call(solver, tol, max_iter, "auto")
    call = call if by is Plain else call.options()
    return by.solve_affine(w, c, start, activation, slope, call)


def adjoint(by, w, d, g, solver, *, tol=TOL, max_iter=100):
    call = Call(solver, tol, max_iter, "auto")
    return by.solve_affine_adjoint(w, d, g, call if by is Plain else call.options())


def check_alike(actual, expected, fixed=False):
    assert actual[0].isfinite().all()
    scale = expected[0].abs().amax()
    assert (actual[0] - expected[0]).abs().amax() <= 2e-4 * scale + 1e-6
    assert torch.equal(actual[1], expected[1])
    # A residual that meets the tolerance by a little in one may miss it in the other.
    assert (actual[2] - expected[2]).abs().amax() <= (0 if fixed else 1)


SIZES = [(1, 1), (3, 5), (17, 17), (16, 16), (20, 33)]


@pytest.mark.parametrize(
    ("solver", "batch", "size"),
    # A history is slow in the interpreter.
    [(s, *size) for s in SOLVERS for size in (SIZES[:3] if s.name == "anderson" else SIZES)],
    ids=str,
)
def test_agrees_with_plain_pytorch_and_float64(solver, batch, size, device):
    w, c, d, g = problem(solver, batch, size, device)
    fixed = bool(getattr(solver, "fixed_iterations", 0))
    z = forward(engine, w, c, solver)
    check_alike(z, forward(Plain, w, c, solver), fixed)
    q = adjoint(engine, w, d, g, solver)
    check_alike(q, adjoint(Plain, w, d, g, solver), fixed)
    if fixed:
        return
    assert (z[1] == 0).all()
    truth = torch.tanh(z[0].double() @ w.double().t() + c.double())
    relative = (truth - z[0]).norm(dim=1) / truth.norm(dim=1)
    assert relative.amax() <= 2 * TOL  # the float32 state is rounded by 6e-8 of itself
    torch.testing.assert_close(z[5], (1 - truth**2).float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [64, 100, 128])
def test_large_sizes(size, device):
    solver = Anderson(accelerate_above=0.9 if size == 64 else 0.0)
    w, c, d, g = problem(solver, 2, size, device)
    w = w.t().contiguous().t()  # any strides
    check_alike(forward(engine, w, c, solver), forward(Plain, w, c, solver))
    for linear in (Neumann(), Anderson(window=3)):
        check_alike(adjoint(engine, w, d, g, linear), adjoint(Plain, w, d, g, linear))


@pytest.mark.parametrize("activation", ["identity", "relu", "softplus", "elu", "gelu", "silu"])
def test_activations(activation, device):
    w, c, *_ = problem(Picard(), 5, 9, device, scale=0.5)
    actual = forward(engine, w, c, Picard(), activation=activation)
    check_alike(actual, forward(Plain, w, c, Picard(), activation=activation))


def test_a_start_is_used_and_one_that_is_not_finite_is_zero(device):
    w, c, *_ = problem(Picard(), 3, 7, device)
    start = forward(Plain, w, c, Picard(), tol=1e-6)[0]
    start[1, 2] = torch.nan
    actual = forward(engine, w, c, Picard(), start=start)
    assert actual[2].tolist()[::2] == [0, 0]
    assert actual[2][1] == forward(engine, w, c, Picard())[2][1]


@pytest.mark.parametrize("solver", [Picard(), Anderson()], ids=repr)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_sample_leaves_the_others_bitwise_alone(solver, bad, device):
    w, c, d, g = problem(solver, 5, 9, device)
    good, good_q = forward(engine, w, c, solver), adjoint(engine, w, d, g, solver)
    c[2, 3] = g[2, 3] = bad
    others = [0, 1, 3, 4]
    z, q = forward(engine, w, c, solver), adjoint(engine, w, d, g, solver)
    for actual, expected in ((z, good), (q, good_q)):
        for a, b in zip(actual[:5], expected[:5], strict=True):
            assert torch.equal(a[others], b[others])
    expected = forward(Plain, w, c, solver), adjoint(Plain, w, d, g, solver)
    for actual, other in zip((z, q), expected, strict=True):
        assert actual[1][2] == other[1][2]
        assert torch.equal(actual[0][2].isnan(), other[0][2].isnan())


def test_a_slope_of_zero_gives_zeros_whatever_the_gradient(device):
    w, _, d, g = problem(Neumann(), 3, 6, device)
    d[1] = 0
    g[1, 0] = torch.nan
    q = adjoint(engine, w, d, g, Neumann())
    assert torch.equal(q[0][1], torch.zeros_like(q[0][1]))
    check_alike(q, adjoint(Plain, w, d, g, Neumann()))


def test_steps_are_taken_back_and_counted(device):
    """Dense weights of scale 1.5: acceleration alone overshoots now and then."""
    solver = Anderson(safeguard=1.0)
    w, c = 1.5 * torch.randn(12, 12) / 12**0.5, torch.randn(16, 12)
    actual = forward(engine, w.to(device), c.to(device), solver, max_iter=30)
    expected = forward(Plain, w.to(device), c.to(device), solver, max_iter=30)
    assert (actual[4][:, 0] > 0).any()
    assert (expected[4][:, 0] > 0).any()
    alike = (actual[4] == expected[4]).all(1)  # chaotic samples part after some steps
    assert alike.float().mean() >= 0.5


def test_limits(device):
    w, c, *_ = problem(Picard(), 4, 6, device)
    assert forward(engine, w, c, Picard(), max_iter=1)[1].tolist() == [1] * 4
    # A float32 iteration ends in a cycle of roundings, or at a point that maps to itself.
    ended = forward(engine, w, c, Picard(), tol=0.0, max_iter=400)
    assert set(ended[1].tolist()) <= {0, 2}
    assert (ended[2] < 200).all()


def test_every_output_is_written(device, monkeypatch):
    w, c, d, g = problem(Anderson(), 5, 9, device)
    good, good_q = forward(engine, w, c, Anderson()), adjoint(engine, w, d, g, Anderson())
    empty = torch.Tensor.new_empty

    def poisoned(tensor, *args, **more):
        made = empty(tensor, *args, **more)
        return made.fill_(torch.nan) if made.is_floating_point() else made.fill_(77)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    monkeypatch.setattr(
        torch, "empty_like", lambda t, **more: poisoned(t, t.shape, dtype=more.get("dtype"))
    )
    z, q = forward(engine, w, c, Anderson()), adjoint(engine, w, d, g, Anderson())
    for actual, expected in ((z, good), (q, good_q)):
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("planted", ["transposed weight", "wrong offset", "one step less"])
def test_the_comparison_notices_a_planted_error(planted, device):
    solver = Picard(fixed_iterations=7)
    w, c, *_ = problem(solver, 3, 9, device)
    expected = forward(Plain, w, c, solver)
    if planted == "transposed weight":
        w = w.t()
    elif planted == "wrong offset":
        c[1, -1] += 1e-2
    else:
        solver = Picard(fixed_iterations=6)
    with pytest.raises(AssertionError):
        check_alike(forward(engine, w, c, solver), expected, fixed=True)


def test_rows_of_an_adjoint_that_are_not_finite_are_those_of_plain_pytorch(device):
    """In D, in g, where the other is zero as well; and rows at both ends of the range."""
    w, _, d, g = problem(Neumann(), 8, 6, device)
    d[0], g[0, 1] = 0, torch.nan
    d[1, 2], g[1, 2] = 0, torch.inf
    g[2, 3], d[3, 1], d[4, 1] = torch.nan, torch.nan, torch.inf
    g[5], g[6], g[7] = 0, 3e37, 1e-36
    actual, expected = adjoint(engine, w, d, g, Neumann()), adjoint(Plain, w, d, g, Neumann())
    assert torch.equal(actual[1], expected[1])
    torch.testing.assert_close(actual[3], expected[3], rtol=0, atol=TOL)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-40, equal_nan=True)
    assert actual[0].isnan().all(1).tolist() == [False, True, True, True, True] + [False] * 3


def test_what_is_not_supported_has_a_reason():
    def why_not(solver, size=8, dtype=torch.float32, shared_memory=None, **more):
        call = Call(solver, max_iter=more.pop("max_iter", 100), precision=more.get("p", "auto"))
        return engine.why_not(call.options(), size, dtype, shared_memory)

    assert "window" in why_not(Anderson(window=9))
    assert why_not(Anderson(window=9), max_iter=8) == ""
    assert "size" in why_not(Picard(), 129)
    assert "float64" in why_not(Picard(), dtype=torch.float64)
    assert "minres" in why_not(MINRES())
    assert "low-precision" in why_not(Picard(), p="mixed")
    assert why_not(Picard(), 128) == ""
    # Blocks of some GPUs have 99 KiB of shared memory.
    assert "shared memory" in why_not(Picard(), 128, shared_memory=99 * 1024)
    assert why_not(Picard(), 64, shared_memory=99 * 1024) == ""
