"""CUDA graphs: whole training steps are recorded once, and their replays equal eager steps.

What a recording needs, and what the tests do: a warm-up on the stream that will record (kernels are
compiled and loaded, the library's handles and workspaces made), inputs that stay in place, and an
optimiser whose state is on the device. fastdeq reads nothing from the device while it records, and
what it decides then holds for every replay: the solver, the engine, the number of iterations.
"""

from __future__ import annotations

import copy

import pytest
import torch
from exact import TOL, S, make_cell
from recording_cases import (
    BATCH,
    CERTIFIED,
    FIXED,
    IN,
    INTERPRETED,
    OPTIMISERS,
    OUT,
    Training,
    make_model,
)

from fastdeq import BackendError, DEQLayer, Status
from fastdeq.weights import factor_cache

on_a_device = pytest.mark.skipif(
    INTERPRETED or not torch.cuda.is_available(),
    reason="CUDA graphs need a CUDA device, and kernels that are compiled",
)
BACKENDS = ("auto", "reference", "triton", "cuda")
every_backend = pytest.mark.parametrize("backend", BACKENDS)
WARM_UP = 3


def warm_up(step):
    """Runs a step a few times on the stream that will record it, which is returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    return stream


def record(step):
    """A CUDA graph of one step, after a warm-up; skips a backend that is not there."""
    try:
        stream = warm_up(step)
    except BackendError as reason:
        pytest.skip(str(reason))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph


def batches(count):
    return [
        (torch.randn(BATCH, IN, device="cuda"), torch.randn(BATCH, OUT, device="cuda"))
        for _ in range(count)
    ]


def replays_equal_steps(kind, d, options, optimiser="sgd"):
    model = make_model(kind, d, options)
    eager = Training(copy.deepcopy(model), OPTIMISERS[optimiser])
    recorded = Training(model, OPTIMISERS[optimiser])
    first, *others = batches(5)
    for training in (eager, recorded):
        training.load(*first)
    graph = record(recorded.step)  # recording runs nothing
    for _ in range(WARM_UP):
        eager.step()
    losses = []
    for batch in others:
        eager.load(*batch)
        eager.step()
        recorded.load(*batch)
        graph.replay()
        # The same kernels on the same numbers; a library may take another product on a stream of
        # another name, so a few roundings are allowed for.
        torch.testing.assert_close(recorded.loss, eager.loss, rtol=1e-4, atol=1e-6)
        losses.append(float(eager.loss))
        for name, expected in eager.model.named_parameters():
            found = recorded.model.get_parameter(name)
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5, msg=name)
    assert len(set(losses)) == len(losses)  # the batches differ, and so do what they give
    return recorded, graph


@on_a_device
@every_backend
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_a_training_step_of_fixed_iterations_is_recorded(backend, optimiser):
    recorded, _ = replays_equal_steps("dense", 48, FIXED | {"backend": backend}, optimiser)
    for found in (recorded.model[0].last_solution, recorded.model[0].last_adjoint_solution):
        assert (found.iterations == 14).all()
        assert found.converged.all()  # 0.5^14 < 1e-4


@on_a_device
@every_backend
@pytest.mark.parametrize("d", [48, 192])
def test_a_training_step_of_a_certified_solve_is_recorded(backend, d):
    if not hasattr(torch.ops.fastdeq, "cholesky_qr2"):
        pytest.skip("without the extension the factor is not to be had while recording")
    recorded, _ = replays_equal_steps("orthogonal", d, CERTIFIED | {"backend": backend})
    assert recorded.model[0].last_solution.converged.all()
    weight = recorded.model[0].cell.recurrent_weight().detach()
    apart = (weight.t() @ weight / 0.25 - torch.eye(d, device="cuda")).norm()
    assert apart < 1e-4  # of the matrix that the last replay left


@on_a_device
@pytest.mark.parametrize("backend", ["auto", "reference", "triton"])
def test_a_training_step_of_a_general_cell_is_recorded(backend):
    replays_equal_steps("general", 24, FIXED | {"backend": backend})


@on_a_device
@pytest.mark.parametrize("solver", ["picard", "anderson"])
def test_a_general_cell_that_stops_by_itself_is_recorded(solver):
    """All iterations are recorded; samples that have converged are frozen in the replay."""
    options = {"solver": solver, "adjoint": solver, "max_iter": 25, "tol": 1e-3}
    recorded, _ = replays_equal_steps("general", 24, options | {"on_failure": "ignore"})
    for found in (recorded.model[0].last_solution, recorded.model[0].last_adjoint_solution):
        assert found.converged.all()
        assert (found.iterations < 25).all()


@on_a_device
@every_backend
def test_a_replay_reports_on_its_own_batch(backend):
    recorded, graph = replays_equal_steps("dense", 48, FIXED | {"backend": backend})
    x, y = batches(1)[0]
    x[3, 2] = torch.nan
    recorded.load(x, y)
    graph.replay()
    status = recorded.model[0].last_solution.status.cpu()
    assert status[3] == Status.NONFINITE
    assert (status[torch.arange(BATCH) != 3] == Status.CONVERGED).all()


@on_a_device
@every_backend
def test_a_solve_that_stops_by_itself_is_recorded(backend):
    """All iterations are recorded; samples that have converged are frozen in the replay."""
    options = {"solver": "picard", "max_iter": 40, "backend": backend, "tol": TOL}
    eager = DEQLayer(make_cell(48, IN).to("cuda"), **options)
    recorded = copy.deepcopy(eager)
    x, out = torch.randn(BATCH, IN, device="cuda"), torch.empty(BATCH, 48, device="cuda")

    def solve():
        with torch.no_grad():
            out.copy_(recorded(x))

    graph = record(solve)
    for scale in (1.0, 0.1, 3.0):
        x.copy_(scale * torch.randn(BATCH, IN, device="cuda"))
        out.fill_(torch.nan)
        graph.replay()
        with torch.no_grad():
            expected = eager(x)
        assert recorded.last_solution.converged.all()
        # Each is within tol |z| / (1 - S) of the equilibrium; a fifth for rounding.
        apart = (out - expected).norm(dim=1) / expected.norm(dim=1)
        assert apart.max() <= 2.4 * TOL / (1 - S)
        more = recorded.last_solution.iterations - eager.last_solution.iterations
        assert more.abs().max() <= 1


@on_a_device
def test_eager_steps_after_a_recording_see_what_replays_did():
    """The factor of an orthogonal weight is kept while it does not change; replays change it."""
    if not hasattr(torch.ops.fastdeq, "cholesky_qr2"):
        pytest.skip("without the extension the factor is not to be had while recording")
    recorded, graph = replays_equal_steps("orthogonal", 48, CERTIFIED)
    before = recorded.model[0].cell.recurrent_weight().detach().clone()
    graph.replay()
    after = recorded.model[0].cell.recurrent_weight().detach()
    raw = recorded.model[0].cell.weight.weight.detach()
    assert (after - before).abs().max() > 1e-6
    torch.testing.assert_close(after, 0.5 * factor_cache.orthogonal_factor(raw))
