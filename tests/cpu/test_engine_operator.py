"""The solves of the CPU engine as operators: what they pass on, declare and refuse."""

import pytest
import torch
from engine_cases import Call, make_adjoint, make_forward

from fastdeq import extension
from fastdeq.affine import encode
from fastdeq.solvers import GMRES, Anderson, Picard

pytestmark = pytest.mark.skipif(
    extension.module is None, reason=f"no compiled extension: {extension.why_missing}"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gmres_is_left_to_the_reference(dtype):
    case = make_adjoint(5, 24, dtype, rows="strided")
    for restart in (3, 30):
        call = Call(GMRES(restart), 1e-4, 60)
        actual, expected = case.engine(call), case.reference(call)
        for a, e in zip(actual[:5], expected[:5], strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize("precision", ["float32", "mixed"])
@pytest.mark.parametrize("solver", [Picard(), Anderson(accelerate_above=0.7)], ids=str)
def test_opcheck(solver, precision):
    forward, adjoint = make_forward(3, 17, torch.float32), make_adjoint(3, 17, torch.float32)
    last = *encode(solver), 1e-4, 20, precision
    for slope in (True, False):
        arguments = forward.weight, forward.injection, None, "tanh", *last, slope
        torch.library.opcheck(torch.ops.fastdeq.solve_affine.default, arguments)
    torch.library.opcheck(
        torch.ops.fastdeq.solve_affine_adjoint.default, (*adjoint.tensors(), *last)
    )


W, C = torch.eye(4) / 2, torch.ones(3, 4)
BAD_FORWARD = {
    "weight must be": {"weight": torch.eye(5)},
    "injection must be": {"injection": torch.ones(4)},
    "start must be": {"start": torch.ones(2, 4)},
    "floating-point": {"injection": C.int()},
    "unknown activation": {"activation": "tanhh"},
    "unknown solver": {"solver": "newton"},
    "takes 2 options": {"options": [1.0, 2.0, 3.0]},
    "takes 7 options": {"solver": "anderson", "options": [5.0]},
    "window": {"solver": "anderson", "options": [0.0, *encode(Anderson())[1][1:]]},
    "precision must be": {"precision": "bfloat16"},
    "max_iter is -1": {"max_iter": -1, "tol": 10.0},  # where the tolerance ends it at once
    "max_iter is 0": {"max_iter": 0, "solver": "anderson", "options": encode(Anderson())[1]},
}


@pytest.mark.parametrize("message", BAD_FORWARD)
def test_bad_arguments_of_the_forward_solve(message):
    given = {
        "weight": W,
        "injection": C,
        "start": None,
        "activation": "tanh",
        "solver": "picard",
        "options": [1.0, 0.0],
        "tol": 1e-3,
        "max_iter": 9,
        "precision": "auto",
        **BAD_FORWARD[message],
    }
    # Unknown solvers are left to the plain PyTorch form, which raises ValueError.
    with pytest.raises((RuntimeError, ValueError), match=message):
        torch.ops.fastdeq.solve_affine(*given.values())


BAD_ADJOINT = {
    "weight must be": (torch.eye(5), C, C),
    "slope must be": (W, torch.ones(1, 4), C),
    "grad must be": (W, C[0], C[0]),
    "floating-point": (W.long(), C, C),
}


@pytest.mark.parametrize("message", BAD_ADJOINT)
def test_bad_arguments_of_the_adjoint_solve(message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastdeq.solve_affine_adjoint(
            *BAD_ADJOINT[message], "neumann", [1.0, 0.0], 1e-3, 9
        )


@pytest.mark.parametrize("batch", [0, 3])
def test_unknown_precision_is_refused_whoever_solves(batch):
    """The engine leaves GMRES, and empty batches, to the plain PyTorch form."""
    grad = torch.ones(batch, 4)
    for name, options in (("neumann", [1.0, 0.0]), encode(GMRES())):
        with pytest.raises(RuntimeError, match="precision must be"):
            torch.ops.fastdeq.solve_affine_adjoint(W, grad, grad, name, options, 1e-3, 9, "half")
