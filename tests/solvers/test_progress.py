"""What counts as progress, when a sample is given up, and which tolerance ends it: the loop in
Python and the C++ engine."""

import iteration_cases
import progress_cases as cases
import pytest
import torch

import fastdeq
from fastdeq import GMRES, MINRES, Anderson, HeavyBall, Neumann, Picard, Status, fixed_point
from fastdeq.solvers import loop

each_engine = pytest.mark.parametrize("engine", ["reference", "cpp", "iteration"])


@pytest.fixture
def solve(engine):
    if engine == "iteration":
        return lambda case, call: iteration_cases.run(case, call, engine)
    return lambda case, call: case.run(call, engine)


@pytest.fixture
def reference():
    return lambda case, call: case.run(call, "reference")


@each_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", cases.SOLVERS, ids=str)
def test_a_shrinking_state_is_not_given_up(solve, solver, dtype):
    cases.check_shrinking(solve, solver, dtype=dtype)
    cases.check_shrinking(solve, solver, size=33, batch=5, scale=0.9, dtype=dtype)


@each_engine
def test_falling_norms_are_progress(solve):
    cases.check_falling_norms(solve)


@each_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_equilibrium_at_zero_is_reached(solve, dtype):
    cases.check_zero_equilibrium(solve, dtype=dtype)


@each_engine
@pytest.mark.parametrize("solver", [Picard(), Anderson(), HeavyBall()], ids=str)
def test_the_absolute_tolerance_joins_the_relative_one(solve, solver):
    cases.check_absolute_tolerance(solve, solver)


@each_engine
@pytest.mark.parametrize("solver", [Neumann(), Anderson(window=10)], ids=str)
def test_the_absolute_tolerance_of_an_adjoint(solve, solver):
    cases.check_absolute_tolerance(solve, solver, adjoint=True)


@each_engine
def test_patience_follows_the_limit_or_is_given(solve):
    cases.check_patience(solve)


@each_engine
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_rounding_floor_patience_does_not_grow(solve, dtype):
    cases.check_rounding_floor(solve, dtype)


@each_engine
@pytest.mark.parametrize("solver", cases.SOLVERS, ids=str)
def test_states_whose_squares_overflow_are_solved(solve, solver):
    cases.check_large_states(solve, solver)


@pytest.mark.parametrize("engine", ["cpp", "iteration"])
def test_after_a_step_taken_back_the_history_refills(solve, reference):
    cases.check_refill(solve, reference)


def test_refilling_takes_plain_steps_until_the_history_is_full():
    """Points of one sample: an accelerated step is spoiled once, then each point is the value of
    the one before for as many steps as the window has entries."""
    torch.manual_seed(0)
    w = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0] * 0.9
    points, values = [], []

    def f(z):
        value = z @ w + 1.0
        if len(points) == 5:
            value = value + 1e6
        points.append(z.clone())
        values.append(value.clone())
        return value

    solver = Anderson(window=3)
    with torch.no_grad():
        solution = fixed_point(
            f, torch.zeros(1, 8, dtype=torch.float64), solver=solver, tol=1e-9, max_iter=400
        )[1]
    assert solution.rejects["safeguard"].tolist() == [1]
    assert torch.equal(points[6], values[4])  # taken back
    for k in (7, 8, 9):
        assert torch.equal(points[k], values[k - 1])
    assert not torch.equal(points[10], values[9])
    assert solution.converged.all()


def splitting(seeds, m, n):
    """Douglas-Rachford splitting of small linear programs, one to a sample."""
    parts = []
    for seed in seeds:
        g = torch.Generator().manual_seed(seed)
        a = torch.randn(m, n, generator=g, dtype=torch.float64)
        x = torch.rand(n, generator=g, dtype=torch.float64)
        y = torch.randn(m, generator=g, dtype=torch.float64)
        slack = torch.rand(n, generator=g, dtype=torch.float64)
        parts.append((a, a @ x, a.T @ y + slack, torch.linalg.pinv(a)))
    a, b, c, inverse = map(torch.stack, zip(*parts, strict=True))

    def f(v):
        x = v.clamp(min=0)
        w = 2 * x - v - c
        lift = torch.einsum("bmn,bn->bm", a, w) - b
        return v + w - torch.einsum("bnm,bm->bn", inverse, lift) - x

    return f, torch.zeros(len(parts), n, dtype=torch.float64)


@pytest.mark.parametrize(("m", "n"), [(4, 9), (6, 14)])
def test_linear_programs_are_not_given_up(m, n):
    """Residuals of a piecewise affine nonexpansive map do not fall monotonically."""
    f, start = splitting(range(9000, 9040), m, n)
    solution = fixed_point(f, start, tol=1e-4, max_iter=3000, on_failure="ignore")[1]
    assert not (solution.status == Status.STAGNATED).any()
    assert solution.converged.sum() >= 39
    limited = fixed_point(f, start, tol=1e-4, on_failure="ignore")[1]
    assert limited.converged.sum() >= 28


def test_a_sample_whose_norms_still_fall_is_not_given_up():
    """It is thrown far away once, and takes longer than its patience to come back."""
    calls = []

    def f(z):
        calls.append(0)
        return 0.97 * z + (1e6 if len(calls) == 60 else 0.01)

    def run(patience):
        calls.clear()
        options = {"solver": "picard", "tol": 1e-6, "max_iter": 1500, "on_failure": "ignore"}
        return fixed_point(f, torch.zeros(1, 4), patience=patience, **options)[1]

    assert run(20).status.tolist() == [Status.CONVERGED]
    assert run(20).iterations.item() > 500


PART_SOLVERS = ("picard", "anderson", "broyden", "newton_krylov", "auto")


@pytest.mark.parametrize("solver", PART_SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_part_of_a_state_meets_the_tolerance(solver, dtype):
    slow = torch.tensor([0.3, 0.6, 0.9], dtype=dtype)

    def f(state):
        big, small, tiny = state
        return 0.1 * big + 9e6, slow * small + 1.0, 0.5 * tiny + 1e-3

    start = tuple(torch.zeros(2, n, dtype=dtype) for n in (4, 3, 2))
    state, solution = fixed_point(f, start, solver=solver, tol=1e-4, max_iter=300)
    assert solution.converged.all()
    for part, image in zip(state, f(state), strict=True):
        assert (cases.norms(image - part) <= 1.01e-4 * cases.norms(image)).all()
    assert (solution.residual <= 1e-4).all()


@pytest.mark.parametrize("adjoint", ["neumann", "anderson", "gmres", "bicgstab", "broyden", "auto"])
def test_each_part_of_an_adjoint_meets_the_tolerance(adjoint):
    weight = torch.tensor([0.9], dtype=torch.float64, requires_grad=True)

    def f(state):
        big, small = state
        return 0.1 * big + 9e5, weight * small + 1e-6 * big

    start = (torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64))
    options = {"tol": 1e-10, "adjoint_tol": 1e-4, "max_iter": 500, "adjoint": adjoint}
    (big, small), _ = fixed_point(f, start, **options)
    (1e6 * big.sum() + small.sum()).backward()
    # small = big / 1e6 / (1 - w), d/dw = small / (1 - w).
    exact = (small.detach() / 0.1).sum()
    assert float((weight.grad - exact).abs() / exact) < 1e-2


@pytest.mark.parametrize("adjoint", [MINRES(), GMRES(), Neumann(), Anderson()], ids=str)
def test_a_layer_takes_the_new_options(adjoint):
    torch.manual_seed(1)
    cell = fastdeq.AffineCell(4, 12, weight="symmetric", scale=0.9)
    options = {"solver": Picard(), "adjoint": adjoint, "max_iter": 500}
    exact = fastdeq.DEQLayer(cell, tol=1e-6, **options)
    loose = fastdeq.DEQLayer(cell, tol=1e-6, atol=1e-2, adjoint_atol=1e-2, **options)
    x = torch.randn(6, 4)
    gradients = []
    for layer in (exact, loose):
        layer(x).square().sum().backward()
        gradients.append(cell.weight.weight.grad.clone())
        cell.zero_grad()
    assert (loose.last_solution.iterations < exact.last_solution.iterations).all()
    steps = [layer.last_adjoint_solution.iterations.sum() for layer in (loose, exact)]
    assert steps[0] < steps[1]
    assert 0 < (gradients[0] - gradients[1]).norm() < 0.2 * gradients[0].norm()
    impatient = fastdeq.DEQLayer(
        fastdeq.AffineCell(4, 12, scale=5.0), solver="picard", patience=5, on_failure="ignore"
    )
    impatient(x)
    assert (impatient.last_solution.iterations < 40).all()


@pytest.mark.parametrize(
    ("name", "value"), [("atol", -1.0), ("atol", float("nan")), ("patience", 0), ("patience", 1.5)]
)
def test_the_new_options_are_checked(name, value):
    with pytest.raises(ValueError, match=name):
        fixed_point(lambda z: 0.5 * z, torch.zeros(1, 2), **{name: value})


def test_an_iterate_that_meets_the_tolerance_ends_the_solve_whatever_came_before():
    """Lower relative residual and lower norm belong to two iterates before it."""
    norms, sizes = [1.0, 2.0, 1.5], [1.25, 10.0, 7.0]
    calls = []

    def f(z):
        k = len(calls)
        calls.append(k)
        value = torch.zeros_like(z)
        value[:, 0] = sizes[k]
        return value

    class Scripted(Picard):
        """Points from which the values are as far as the script says."""

        def step(self, state, point, value, norm, running):
            step = super().step(state, point, value, norm, running)
            k = min(len(calls), 2)
            following = torch.zeros_like(point)
            following[:, 0] = sizes[k] - norms[k]
            return step._replace(point=following)

    start = torch.tensor([[sizes[0] - norms[0], 0.0]])
    solution = loop.solve(f, start, Scripted(), tol=0.1, atol=0.85, max_iter=2, anderson_mix=None)
    assert solution.status.tolist() == [Status.CONVERGED]
    assert solution.iterations.tolist() == [2]
