"""The solves of the CPU engine as operators: what they pass on, declare and refuse."""

import dataclasses

import pytest
import torch
from engine_cases import Adjoint, Call, Forward, make_adjoint, make_forward

from fastdeq import BackendError
from fastdeq.backends import extension
from fastdeq.solvers import GMRES, Anderson, Neumann, Picard, SolveOptions

pytestmark = pytest.mark.skipif(
    extension.module is None, reason=f"no compiled extension: {extension.why_missing}"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gmres_is_left_to_the_reference(dtype):
    case = make_adjoint(5, 24, dtype, rows="strided")
    for restart in (3, 30):
        call = Call(GMRES(restart), 1e-4, 60)
        actual, expected = case.run(call, "auto"), case.reference(call)
        for a, e in zip(actual[:5], expected[:5], strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize("precision", ["float32", "mixed"])
@pytest.mark.parametrize("solver", [Picard(), Anderson(accelerate_above=0.7)], ids=str)
def test_opcheck(solver, precision):
    forward, adjoint = make_forward(3, 17, torch.float32), make_adjoint(3, 17, torch.float32)
    call = Call(solver, 1e-4, 20, precision)
    for slope in (True, False):
        arguments = forward.arguments(call, "cpp", slope)
        torch.library.opcheck(torch.ops.fastdeq.solve_affine.default, arguments)
    arguments = adjoint.arguments(call, "cpp")
    torch.library.opcheck(torch.ops.fastdeq.solve_affine_adjoint.default, arguments)


W, C = torch.eye(4) / 2, torch.ones(3, 4)
PICARD = SolveOptions.of(Picard(), tol=1e-3, max_iter=9)
BAD_FORWARD = {
    "weight must be": {"weight": torch.eye(5)},
    "injection must be": {"injection": torch.ones(4)},
    "start must be": {"start": torch.ones(2, 4)},
    "floating-point": {"injection": C.int()},
    "unknown activation": {"activation": "tanhh"},
    "have no solver .newton.": {"solver": "newton"},
    "fixed_iterations is -1": {"fixed_iterations": -1},
    "window": {"solver": "anderson", "window": 0},
    "precision must be": {"precision": "bfloat16"},
    "max_iter is -1": {"max_iter": -1, "tol": 10.0},  # where the tolerance ends it at once
    "max_iter is 0": {"max_iter": 0, "solver": "anderson", "window": 5},
}


@pytest.mark.parametrize("message", BAD_FORWARD)
def test_bad_arguments_of_the_forward_solve(message):
    fixed = {"weight": W, "injection": C, "start": None, "activation": "tanh"}
    fixed |= {"with_slope": True, "packed": None, "bitwise_symmetric": False, "engine": "cpp"}
    given = {**fixed, **dataclasses.asdict(PICARD), **BAD_FORWARD[message]}
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastdeq.solve_affine(**given)


@pytest.mark.parametrize("engine", ["reference", "auto"])
def test_an_unknown_solver_is_named_with_those_that_there_are(engine):
    options = dataclasses.replace(PICARD, solver="newton").arguments
    with pytest.raises(ValueError, match=r"'newton'.*picard|picard.*'newton'"):
        torch.ops.fastdeq.solve_affine(W, C, None, "tanh", False, None, False, engine, *options)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_an_operator_given_a_backend_that_cannot_be_had_says_so(backend):
    how = (None, False, backend, *PICARD.arguments)
    with pytest.raises(BackendError, match=f"backend='{backend}' is not available"):
        torch.ops.fastdeq.solve_affine(W, C, None, "tanh", False, *how)


BAD_ADJOINT = {
    "weight must be": (torch.eye(5), C, C),
    "slope must be": (W, torch.ones(1, 4), C),
    "grad must be": (W, C[0], C[0]),
    "floating-point": (W.long(), C, C),
}


@pytest.mark.parametrize("message", BAD_ADJOINT)
def test_bad_arguments_of_the_adjoint_solve(message):
    arguments = Adjoint(*BAD_ADJOINT[message]).arguments(Call(Neumann(), 1e-3, 9), "cpp")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastdeq.solve_affine_adjoint(*arguments)


@pytest.mark.parametrize("engine", ["cpp", "reference", "auto"])
def test_unknown_precision_is_refused_by_every_engine(engine):
    *arguments, options = Adjoint(W, C, C).tensors(), PICARD.arguments
    options = ["half" if option == "auto" else option for option in options]
    with pytest.raises((RuntimeError, ValueError), match="precision must be"):
        torch.ops.fastdeq.solve_affine_adjoint(*arguments[0], None, False, engine, *options)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_nothing_to_solve(shape):
    """No layer asks the engine for it, and it is calm all the same."""
    for precision in ("auto", "mixed"):
        call = Call(Anderson(), precision=precision)
        w, c = torch.zeros(shape[1], shape[1]), torch.ones(shape)
        for outputs in (Forward(w, c).engine(call), Adjoint(w, c, c).engine(call)):
            assert outputs.value.shape == shape
            assert outputs.status.tolist() == [0] * shape[0]
            assert outputs.residual.tolist() == [0.0] * shape[0]
