"""Where ``fastdeq.compat.torchdeq`` does better than torchdeq, or something else; without it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torchdeq_cases import Problem, rows

import fastdeq.compat.torchdeq as torchdeq

SOLVERS = ("fixed_point_iter", "simple_fixed_point_iter", "anderson", "broyden")


def test_a_singular_history_does_not_end_a_solve():
    """Equal residuals, for which torchdeq's Anderson solves a singular system without its ridge,
    and states that are fixed from the start."""
    z0 = torch.zeros(3, 4)
    for f in (lambda z: z + 1.0, lambda z: z.clone(), lambda z: torch.ones_like(z)):
        z, _, info = torchdeq.get_solver("anderson")(f, z0, max_iter=12, tol=1e-4, lam=0.0)
        assert z.isfinite().all()
        assert info["abs_trace"].isfinite().all()
    z, _, info = torchdeq.get_solver("broyden")(lambda z: z.clone(), z0, max_iter=5)
    assert z.isfinite().all()


@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden"])
def test_a_sample_with_nan_harms_no_other(solver):
    problem = Problem(dtype=torch.float64)
    with torch.no_grad():
        problem.x[2] = torch.nan
    deq = torchdeq.get_deq(f_solver=solver, f_tol=1e-8, f_max_iter=60)
    with torch.no_grad():
        (z,), info = deq.eval()(problem, problem.start)
    others = [0, 1, 3, 4]
    assert z.isfinite().all()
    assert (info["abs_lowest"][others] < 1e-8).all()
    assert info["abs_lowest"][2] == 1e8


@pytest.mark.parametrize("core", ["sliced", "indexing"])
@pytest.mark.parametrize("options", [{"grad": 3}, {"ift": True}, {"n_states": 2}])
@pytest.mark.parametrize("parts", [1, 2])
def test_eval_mode_keeps_the_gradient_and_the_numbers(parts, options, core):
    problem = Problem(dtype=torch.float64, parts=parts)
    deq = torchdeq.get_deq(core=core, f_tol=1e-9, f_max_iter=80, b_tol=1e-9, **options).eval()
    states, info = deq(problem, problem.start)
    with torch.no_grad():
        without, _ = deq(problem, problem.start)
    assert len(states) == 1
    torch.testing.assert_close(states, without, rtol=0, atol=0)
    assert not rows(without[0]).requires_grad
    assert info["sradius"].tolist() == [0]
    steps = 80 if "ift" in options else options.get("grad", 1)
    exact = problem.exact()[1]
    # Phantom steps leave out what 0.6^steps of the gradient is.
    for found, true in zip(problem.gradients(states), exact, strict=True):
        assert (found - true).norm() <= (3 * 0.6**steps + 1e-6) * true.norm()


def test_the_spectral_radius_is_estimated_in_eval_mode():
    weight = torch.diag(torch.tensor([0.8, 0.5, -0.1]))
    deq = torchdeq.get_deq(f_max_iter=80).eval()
    for parts in (1, 2):
        x = torch.randn(4, 3)
        start = torch.zeros(4, 3) if parts == 1 else (torch.zeros(4, 1), torch.zeros(4, 2))

        def f(*state, x=x):
            value = torch.cat(state, 1) @ weight + x
            return value if len(state) == 1 else value.split([1, 2], 1)

        with torch.no_grad():
            info = deq(f, start, sradius_mode=True)[1]
        torch.testing.assert_close(info["sradius"], torch.full((4,), 0.8), rtol=1e-3, atol=0)


def test_as_many_states_as_asked_for_however_early_the_solve_ends():
    problem = Problem(scale=0.1)
    deq = torchdeq.get_deq(core="indexing", n_states=3, grad=[1, 2, 3], ift=True)
    states, info = deq(problem, problem.start)
    assert info["nstep"].max() < 10
    assert len(states) == 3
    for state in states:
        torch.testing.assert_close(state, states[-1], rtol=0, atol=1e-3)


def test_an_implicit_gradient_is_differentiated_again():
    problem = Problem(dtype=torch.float64, batch=2, size=3)
    deq = torchdeq.get_deq(ift=True, f_tol=1e-13, b_tol=1e-13, f_max_iter=99, b_max_iter=99)

    def solved(weight, x):
        return deq(lambda z: torch.tanh(z @ weight.T + x), problem.start)[0][-1]

    assert torch.autograd.gradcheck(solved, (problem.weight, problem.x))
    assert torch.autograd.gradgradcheck(solved, (problem.weight, problem.x))


@pytest.mark.parametrize("solver", ["fixed_point_iter", "anderson", "broyden", "auto"])
def test_nodes_of_a_graph_are_solved_together(solver):
    """The first dimension is coupled: adjoints of single rows would be wrong."""
    links = torch.rand(9, 9, dtype=torch.float64)
    links = 0.9 * links / torch.linalg.matrix_norm(links, 2)
    weight = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0].requires_grad_()
    x = torch.randn(9, 4, dtype=torch.float64)

    def f(z):
        return torch.tanh(links @ z @ weight + x)

    limits = {"f_max_iter": 200, "b_max_iter": 200, "f_tol": 1e-10, "b_tol": 1e-10}
    deq = torchdeq.get_deq(f_solver=solver, b_solver=solver, ift=True, **limits)
    z = torch.zeros_like(x)
    for _ in range(400):
        z = f(z)
    (true,) = torch.autograd.grad(z.square().sum(), weight)
    for _ in range(2):
        states, info = deq(f, torch.zeros_like(x))
        assert deq.coupled
        assert (info["abs_lowest"] < 1e-10).all()
        (found,) = torch.autograd.grad(states[-1].square().sum(), weight)
        torch.testing.assert_close(states[-1], z, rtol=0, atol=1e-8)
        torch.testing.assert_close(found, true, rtol=1e-7, atol=1e-7)


def test_backward_writers_hear_of_the_adjoint_solve():
    problem, heard = Problem(), []
    deq = torchdeq.get_deq(ift=True, b_tol=1e-4)
    states, _ = deq(problem, problem.start, backward_writer=heard.append)
    assert heard == []
    problem.gradients(states)
    (info,) = heard
    assert info["nstep"].shape == info["abs_lowest"].shape == (5,)
    assert info["rel_trace"].shape == (5, 1)
    assert (info["rel_lowest"] < 1e-3).all()


def test_registered_solvers_and_classes():
    calls = []

    def plain(func, x0, max_iter=50, tol=1e-3, stop_mode="abs", indexing=None, **options):
        calls.append((max_iter, tol, stop_mode, options))
        before, z = x0, x0
        for _ in range(max_iter):
            before, z = z, func(z)
        return z, [z], torchdeq.solver_stat_from_final_step(before, z, max_iter)

    torchdeq.register_solver("plain of this test", plain)
    name = "plain of this test"
    problem, heard = Problem(dtype=torch.float64, parts=2), []
    deq = torchdeq.get_deq(f_solver=name, b_solver=name, ift=True, f_tol=0.1, f_max_iter=60)
    states, _ = deq(problem, problem.start, solver_kwargs={"mine": 1}, backward_writer=heard.append)
    found = problem.gradients(states)
    torch.testing.assert_close(found, problem.exact()[1], rtol=0, atol=1e-7)
    assert calls == [(60, 0.1, "abs", {"mine": 1}), (40, 1e-6, "abs", {})]
    assert heard[0]["nstep"].tolist() == [40] * 5

    class Own(torchdeq.DEQSliced):
        def __init__(self, args=None, own=1, **kwargs):
            super().__init__(args, **kwargs)
            self.own = self.args.get("own", own)

    torchdeq.register_deq("own of this test", Own)
    deq = torchdeq.get_deq(core="own of this test", own=3, f_max_iter=5)
    assert (type(deq), deq.own, deq.f_max_iter) == (Own, 3, 5)
    assert len(deq(problem, problem.start)[0]) == 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_states_in_half_precision_and_maps_that_write(solver):
    problem = Problem()

    def writes(z):
        z.mul_(0.5)
        return z + 1

    z0 = torch.zeros(5, 8)
    if solver != "simple_fixed_point_iter":  # which iterates on what it is given
        z, _, _ = torchdeq.get_solver(solver)(writes, z0, tol=1e-5)
        torch.testing.assert_close(z, torch.full_like(z, 2.0), rtol=0, atol=1e-4)
        assert (z0 == 0).all()
    x = problem.x.detach()

    def half(z):
        assert z.dtype == torch.bfloat16
        return torch.cos(0.3 * z + x).bfloat16()

    deq = torchdeq.get_deq(f_solver=solver, ift=True)
    (z,), info = deq(half, torch.zeros(5, 8, dtype=torch.bfloat16))
    assert z.dtype == torch.bfloat16
    assert (info["abs_lowest"] < 0.1).all()


@pytest.mark.parametrize("core", ["sliced", "indexing"])
def test_deqs_are_copied_and_pickled(core):
    problem = Problem()
    deq = torchdeq.get_deq(core=core, ift=True, n_states=2, f_solver="anderson", b_solver="gmres")
    states, _ = deq(problem, problem.start)
    for other in (copy.deepcopy(deq), pickle.loads(pickle.dumps(deq))):
        torch.testing.assert_close(other(problem, problem.start)[0], states)


def test_a_model_of_torch_modules_trains_inside_a_compiled_function():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.deq = nn.Linear(4, 4), torchdeq.get_deq(ift=True)

        def forward(self, x):
            return self.deq(lambda z: torch.tanh(0.5 * self.linear(z) + x), x)[0][-1]

    model, x = Model(), torch.randn(3, 4)
    plain = model(x)
    compiled = torch.compile(model, backend="eager")(x)
    torch.testing.assert_close(compiled, plain)
    compiled.sum().backward()
    assert model.linear.weight.grad.isfinite().all()
