"""What a message about a failed solve suggests, and what a Solution is compared by."""

import dataclasses
import re

import pytest
import torch
from slow_problems import diffusion, nonnegative_least_squares, rotation

from fastdeq import (
    AffineCell,
    Anderson,
    ConvergenceError,
    ConvergenceWarning,
    DEQLayer,
    Picard,
    Solution,
    Status,
    fixed_point,
)
from fastdeq.failure import failure_message

WIDER = re.compile(r"(\w+)=(Anderson\(.*?\))")


def solved(problem, solver="anderson", **options):
    f, start = problem
    return fixed_point(f, start, solver=solver, on_failure="ignore", **options)[1]


def suggested(solution, what="fixed_point"):
    """The option and the solver that the message names, if it does."""
    if solution.converged.all():
        return None
    found = WIDER.search(failure_message(solution, what))
    return None if found is None else (found[1], eval(found[2], {"Anderson": Anderson}))


def made(status, iterations=None, residual=1e-3, window=5, **rejects):
    """A solution of samples with these statuses, 100 iterations each."""
    n = len(status)
    counts = {name: torch.full((n,), count) for name, count in rejects.items()}
    return Solution(
        torch.zeros(n, 2),
        torch.tensor(status, dtype=torch.int8),
        torch.full((n,), iterations or 100),
        torch.full((n,), residual),
        counts,
        solver=Anderson(window=window),
    )


# --- a wider window --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "tol"),
    [
        (lambda seed: rotation(10, seed), 1e-4),
        (lambda seed: rotation(12, seed), 1e-4),
        (lambda seed: diffusion(26, seed), 1e-4),
        (lambda seed: diffusion(32, seed), 1e-4),
        (lambda seed: nonnegative_least_squares(90, 60, seed), 1e-8),
        (lambda seed: nonnegative_least_squares(150, 100, seed), 1e-8),
    ],
    ids=["rotation10", "rotation12", "diffusion26", "diffusion32", "nnls60", "nnls100"],
)
def test_a_wider_window_is_suggested_and_helps(problem, tol):
    named, before, after = 0, 0, 0
    for seed in range(20, 25):
        first = solved(problem(seed), tol=tol)
        found = suggested(first)
        if found is not None:
            assert found == ("solver", Anderson(window=10))
            named += 1
            before += int(first.converged.sum())
            after += int(solved(problem(seed), found[1], tol=tol).converged.sum())
    assert named >= 3
    assert before <= 2 * named  # of four samples each
    assert after >= 3 * named


def test_the_adjoint_has_its_own_option():
    f, start = rotation(10, seed=3)
    theta = torch.zeros_like(start, requires_grad=True)
    adjoint = {"adjoint": Anderson(window=5), "on_failure": "raise"}
    z, _ = fixed_point(lambda z: f(z) + theta, start, solver=Anderson(window=12), **adjoint)
    with pytest.raises(ConvergenceError, match="raise adjoint_max_iter, raise adjoint_tol") as e:
        z.pow(2).sum().backward()
    assert WIDER.search(str(e.value)).groups() == ("adjoint", "Anderson(window=10)")


@pytest.mark.parametrize("kind", ["fused", "general"])
def test_other_options_of_the_solver_are_kept(kind):
    cell = AffineCell(6, 10, activation="identity", weight="orthogonal", scale=0.99)
    layer = DEQLayer(
        cell if kind == "fused" else (lambda z, x: cell(z, x)),
        solver=Anderson(damping=0.875, window=4, accelerate_above=0.5),
        tol=1e-6,
        on_failure="raise",
    )
    with pytest.raises(ConvergenceError) as caught:
        layer(torch.randn(3, 6), z0=torch.zeros(3, 10))
    assert WIDER.search(str(caught.value)).groups() == (
        "solver",
        "Anderson(window=8, damping=0.875, accelerate_above=0.5)",
    )


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_not_where_there_is_no_equilibrium(batch, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    c = torch.rand(batch, 30, generator=g, dtype=dtype) + 0.5
    w = torch.randn(30, 30, generator=g, dtype=dtype)
    maps = {
        "drifts": lambda z: z + c + 0.3 * torch.sin(z),
        "relu": lambda z: torch.relu(z @ (8 / 30**0.5 * w) + c),
        "expands": lambda z: z @ (6 / 30**0.5 * w) + c,
    }
    failed = 0
    for name, f in maps.items():
        solution = solved((f, torch.zeros_like(c)))
        assert suggested(solution) is None, name
        failed += not solution.converged.all()
    assert failed


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-9), (torch.float64, 0.0)])
@pytest.mark.parametrize("max_iter", [60, 100])
def test_not_at_the_rounding_floor(batch, dtype, tol, max_iter):
    w = torch.randn(40, 40, dtype=dtype) * (0.8 / 40**0.5)
    c = torch.randn(batch, 40, dtype=dtype)
    problem = (lambda z: torch.tanh(z @ w + c), torch.zeros_like(c))
    solution = solved(problem, tol=tol, max_iter=max_iter)
    assert not solution.converged.all()
    assert suggested(solution) is None


@pytest.mark.parametrize("how", ["bfloat16", "autocast", "inside"])
@pytest.mark.parametrize("batch", [1, 5])
def test_not_at_the_rounding_floor_of_low_precision(how, batch):
    """The cell's own dtype, autocast around the solve, and autocast within the cell."""
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32
    failed = wrong = 0
    for _ in range(10):
        w = (torch.randn(60, 60) * (0.9 / 60**0.5)).to(dtype)
        c = torch.randn(batch, 60).to(dtype)

        def f(z, w=w, c=c):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how != "bfloat16"):
                return torch.tanh(z @ w + c).to(dtype)

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
            _, solution = fixed_point(f, torch.zeros_like(c), tol=1e-5, on_failure="ignore")
            wrong += suggested(solution) is not None
        failed += int((solution.status == int(Status.MAX_ITER)).any())
    assert failed
    # Within the cell its precision is not known, only whether residuals fell: 3 of 20 are wrong.
    assert wrong <= (3 if how == "inside" else 0)


LIMIT, STUCK = int(Status.MAX_ITER), int(Status.STAGNATED)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"safeguard": 5, "rank_cut": 20}, True),
        ({"safeguard": 30}, False),  # every history is cut short
        ({"weight_cap": 60}, False),
        ({"rank_cut": 40}, False),  # there is no more to be had
        ({"residual": 0.4}, False),  # it hardly fell
        ({"residual": torch.inf}, False),
        ({"residual": 1e-6}, False),  # float32
        ({"iterations": 9}, False),  # the history was never full for long
        ({"iterations": 12}, True),
        ({"window": 60}, False),
        ({"window": 1000, "iterations": 10**6}, False),  # as wide as it can be
    ],
    ids=str,
)
def test_what_decides(options, expected):
    solution = made([LIMIT, 0, LIMIT], **options)
    assert (suggested(solution) is not None) == expected
    assert suggested(made([LIMIT, STUCK, LIMIT], **options)) is None
    assert suggested(made([STUCK, STUCK, 0], **options)) is None


@pytest.mark.parametrize("solver", [Picard(), None, object()])
def test_not_for_other_solvers(solver):
    assert suggested(dataclasses.replace(made([LIMIT]), solver=solver)) is None


# --- other advice ----------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["fixed_point", "DEQLayer, adjoint solve"])
def test_nothing_is_suggested_twice(what):
    statuses = [LIMIT, STUCK, int(Status.NONFINITE), 0]
    message = failure_message(made(statuses, residual=0.5), what)
    advice = message.split("To try: ")[1]
    prefix = "adjoint_" if "adjoint" in what else ""
    assert advice.count("tol") == 1
    assert advice.startswith(f"raise {prefix}max_iter, raise {prefix}tol (the rounding floor")
    assert "look for NaN" in advice
    assert len(re.findall(r'(?:adjoint|solver)="auto"', advice)) == 1


# --- the object ------------------------------------------------------------------------------


def test_a_solution_is_equal_to_itself_alone():
    first, second = (fixed_point(torch.cos, torch.zeros(3, 2))[1] for _ in range(2))
    assert first == first
    assert first != second
    assert first != dataclasses.replace(first)
    assert first in [second, first]
    assert len({first, second, first}) == 2
    assert {first: 1}[first] == 1


@pytest.mark.parametrize("bad", [False, True])
def test_a_solution_names_the_solver_that_made_it(make_layer, bad):
    layer = make_layer(solver="auto", on_failure="ignore")
    x = torch.randn(3, 6)
    x[0] = torch.nan if bad else 0.0
    layer(x).sum().backward()
    assert type(layer.last_solution.solver) is Anderson
    assert layer.last_adjoint_solution.solver.window == 10
    layer = make_layer(solver="picard", on_failure="ignore")
    layer(x)
    assert layer.last_solution.solver == Picard()


def test_a_warning_has_the_same_text():
    f, start = rotation(10, seed=1)
    with pytest.warns(ConvergenceWarning, match=r"solver=Anderson\(window=10\)"):
        fixed_point(f, start, solver="anderson")
