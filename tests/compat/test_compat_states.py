"""States, statistics and gradients of ``fastdeq.compat.torchdeq``, next to torchdeq's own."""

import pytest
import torch
from torchdeq_cases import Problem, rows

import fastdeq.compat.torchdeq as ours

theirs = pytest.importorskip("torchdeq")
SOLVERS = ("fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden")
# What either returns is within tol / (1 - 0.6) of the equilibrium.
FAR = 2.5


def both(problem, mode="train", call=None, **options):
    """(states, info) of each package."""
    found = []
    for package in (theirs, ours):
        deq = package.get_deq(**options)
        getattr(deq, mode)()
        found.append(deq(problem, problem.start, **(call or {})))
    return found


@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("core", ["sliced", "indexing"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_states_agree_to_the_tolerance(solver, core, parts, stop_mode):
    problem, tol = Problem(parts=parts), 1e-3
    options = {"f_solver": solver, "core": core, "f_tol": tol, "f_stop_mode": stop_mode}
    (their_z, _), (our_z, _) = both(problem, **options)
    assert type(our_z) is list
    assert len(our_z) == 1
    if parts > 1:
        assert type(our_z[0]) is list  # torchdeq's simple iteration passes on what f returns
        assert [p.shape for p in our_z[0]] == [p.shape for p in their_z[0]]
    exact = problem.exact()[0]
    size = exact.norm(dim=1) if stop_mode == "rel" else 1.0
    assert ((rows(our_z[0]) - exact).norm(dim=1) <= FAR * tol * size).all()
    assert ((rows(our_z[0]) - rows(their_z[0])).norm(dim=1) <= 2 * FAR * tol * size).all()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("max_iter", [0, 1, 2, 3, 20])
def test_info_has_the_same_keys_shapes_and_dtypes(max_iter, solver, dtype, mode):
    problem = Problem(dtype=dtype)
    options = {"f_solver": solver, "f_max_iter": max_iter, "eval_f_max_iter": max_iter}
    (_, their_info), (_, our_info) = both(problem, mode, **options)
    assert set(our_info) == set(their_info)
    assert isinstance(our_info, dict)
    for key, value in their_info.items():
        assert our_info[key].shape == value.shape, key
        # An integer count of no steps, where torchdeq took none.
        assert our_info[key].dtype == value.dtype or max_iter <= 2, key


@pytest.mark.parametrize("core", ["sliced", "indexing"])
@pytest.mark.parametrize("stop_mode", ["abs", "rel"])
def test_statistics_of_plain_iteration_are_the_same_numbers(stop_mode, core):
    """Both make the same evaluations, so residuals differ by rounding alone."""
    problem = Problem(dtype=torch.float64, scale=0.8)
    options = {"f_stop_mode": stop_mode, "core": core, "f_tol": 1e-4, "f_max_iter": 60}
    (their_z, their_info), (our_z, our_info) = both(problem, **options)
    torch.testing.assert_close(our_z, their_z, rtol=0, atol=1e-14)
    for key, value in their_info.items():
        torch.testing.assert_close(our_info[key], value, rtol=1e-9, atol=1e-14)
    assert our_info["nstep"].max() < 60


@pytest.mark.parametrize("solver", ["anderson", "broyden"])
def test_accelerated_solves_say_what_they_found(solver):
    problem = Problem(dtype=torch.float64)
    (_, their_info), (our_z, info) = both(problem, f_solver=solver, f_tol=1e-6)
    value = problem(our_z[0].detach())
    # One evaluation after the residual that is reported, which is a contraction by 0.6.
    assert ((value - our_z[0]).norm(dim=1) <= 0.61 * info["abs_lowest"]).all()
    assert (info["abs_lowest"] < 1e-6).all()
    assert (info["abs_trace"][:, 1:].min(1).values == info["abs_lowest"]).all()
    assert (info["nstep"] <= their_info["nstep"].max() + 5).all()


GRADIENTS = {
    "one step": {},
    "five": {"grad": 5},
    "damped": {"grad": 3, "tau": 0.6},
    "gap": {"grad": 5, "sup_gap": 2},
    "locations": {"grad": 5, "sup_loc": [1, 4]},
    "slices": {"n_states": 3, "grad": 2, "tau": 0.7},
    "more states than evaluations": {"n_states": 4, "f_max_iter": 6},
    "lists": {"indexing": [3, 9], "grad": [1, 2, 3], "f_tol": 0.0},
    "lists along": {"core": "indexing", "indexing": [3, 9], "grad": [1, 2, 3], "f_tol": 0.0},
    "states along": {"core": "indexing", "n_states": 4, "f_max_iter": 14, "f_tol": 0.0},
    "states along a simple solve": {
        "core": "indexing",
        "n_states": 3,
        "f_solver": "simple_fixed_point_iter",
    },
}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", GRADIENTS)
def test_phantom_gradients_are_those_of_the_same_steps(name, parts):
    problem = Problem(parts=parts, dtype=torch.float64)
    (their_z, _), (our_z, _) = both(problem, **GRADIENTS[name])
    assert len(our_z) == len(their_z)
    for our, their in zip(our_z, their_z, strict=True):
        torch.testing.assert_close(our, their, rtol=0, atol=1e-13)
    torch.testing.assert_close(
        problem.gradients(our_z), problem.gradients(their_z), rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("how", ["ift", "hook_ift"])
@pytest.mark.parametrize("core", ["sliced", "indexing"])
@pytest.mark.parametrize("b_solver", [*SOLVERS, "gmres", "auto"])
def test_implicit_gradients_are_exact(b_solver, core, how, parts):
    """torchdeq's own are compared where its adjoint solve can do it: not by its Anderson, whose
    ridge is absolute, and not for parts that its simple iteration keeps apart."""
    problem = Problem(parts=parts, dtype=torch.float64)
    limits = {"f_max_iter": 80, "b_max_iter": 80, "f_tol": 1e-10, "b_tol": 1e-10}
    deq = ours.get_deq(core=core, b_solver=b_solver, **limits, **{how: True})
    states, _ = deq(problem, problem.start)
    exact = problem.exact()[1]
    # Errors of 1e-10 / (1 - 0.6) in z and u, times the number of entries and the curvature.
    torch.testing.assert_close(problem.gradients(states), exact, rtol=0, atol=1e-7)
    if b_solver == "fixed_point_iter":
        their = theirs.get_deq(core=core, b_solver=b_solver, **limits, **{how: True})
        found = problem.gradients(their(problem, problem.start)[0])
        torch.testing.assert_close(problem.gradients(states), found, rtol=0, atol=1e-7)


def test_an_implicit_gradient_is_that_of_the_last_state():
    problem = Problem(dtype=torch.float64)
    options = {"n_states": 2, "grad": 1, "ift": True, "f_tol": 0.0, "b_tol": 1e-9}
    for core in ("sliced", "indexing"):
        pair = both(problem, core=core, **options)
        found = [problem.gradients(z) for z, _ in pair]
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4), (2, 3, 4, 4)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_shapes_of_states(solver, shape):
    simple = solver == "simple_fixed_point_iter"  # torchdeq's cannot take a vector
    peer = theirs if len(shape) >= 2 or not simple else ours
    problem = torch.randn(shape)

    def f(z, tau=1.0):  # torchdeq's simple iteration asks for damped steps
        return torch.cos(0.5 * z + problem)

    found = []
    for package in (peer, ours):
        z, _, info = package.get_solver(solver)(f, torch.zeros(shape), max_iter=30, tol=1e-4)
        found.append((z.reshape(shape), info["abs_lowest"]))  # a number: torchdeq makes it a vector
    assert z.shape == shape
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=5e-4)
    assert found[1][1].shape == found[0][1].shape or not shape


def test_a_call_may_say_how_long_and_how():
    problem = Problem(dtype=torch.float64)
    for kwargs in ({"f_max_iter": 5}, {"f_max_iter": 7, "tau": 0.5}, {"return_final": True}):
        (their_z, their_info), (our_z, our_info) = both(
            problem, call={"solver_kwargs": kwargs}, f_tol=1e-8
        )
        torch.testing.assert_close(our_z, their_z, rtol=0, atol=1e-13)
        torch.testing.assert_close(our_info["nstep"], their_info["nstep"])
    info = ours.get_deq()(problem, problem.start, solver_kwargs={"f_tol": 1e-9})[1]
    assert (info["abs_lowest"] < 1e-9).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_traces_and_counts_are_those_of_the_evaluations(solver):
    """torchdeq's Anderson does not count its first two evaluations, nor its Broyden the first."""
    problem, seen = Problem(batch=1, dtype=torch.float64), []

    def f(z):
        value = problem(z)
        seen.append((value - z).norm(dim=1))
        return value

    before = 1 if solver == "broyden" else 0
    for tol, simple in ((0.0, True), (1e-4, False)):
        seen.clear()
        info = ours.get_solver(solver)(f, problem.start, max_iter=9, tol=tol)[2]
        assert info["nstep"].item() == len(seen) - before
        if solver == "simple_fixed_point_iter":
            torch.testing.assert_close(info["abs_trace"], seen[-1:][0].unsqueeze(0))
            continue
        if simple:
            assert len(seen) == 9 + before
        first = {"anderson": 2, "broyden": 1}.get(solver, 0)
        torch.testing.assert_close(
            info["abs_trace"][0, 1 : 1 + len(seen) - first], torch.cat(seen[first:])
        )


@pytest.mark.parametrize("final", [False, True])
def test_the_best_state_of_a_solve_that_diverges(final):
    x = torch.rand(3, 2, dtype=torch.float64)
    how = {"max_iter": 8, "indexing": [2, 5, 8], "return_final": final}
    found = []
    for package in (theirs, ours):
        solver = package.get_solver("fixed_point_iter")
        z, along, info = solver(lambda z: x - 1.3 * z, torch.zeros_like(x), **how)
        found.append((z, along, info["nstep"], info["abs_lowest"], info["abs_trace"]))
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize(("mode", "most"), [("abs", 0.02), ("rel", 0.6)])
def test_what_the_tolerance_of_an_implicit_gradient_means(mode, most):
    """``u = g + 0.99 u`` is 100 g. A residual r leaves an error of 100 r: with r of 0.01 |g| that
    is 1 % of u, and with 0.01 |u| so much more that the solve ends at half of it."""
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    deq = ours.get_deq(ift=True, b_tol=1e-2, b_stop_mode=mode, b_max_iter=2000, f_max_iter=2000)
    z = deq(lambda z: 0.99 * z + x, torch.zeros_like(x))[0][-1]
    for scale in (1.0, 1e-6):  # of the gradient that arrives
        (found,) = torch.autograd.grad(scale * z.sum(), x, retain_graph=True)
        error = (1 - found / (100 * scale)).abs().max()
        assert most / 3 < error < most
