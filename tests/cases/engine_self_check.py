"""The engine against its specification, in little; prints which engine that was.

A process of its own, because PyTorch reads ATEN_CPU_CAPABILITY once.
"""

from __future__ import annotations

import engine_vector_bounds as bounds
import iteration_cases
import numpy as np
import torch
from engine_cases import Call, make_adjoint, make_forward, perturbed
from engine_checks import check_agreement

from fastdeq.activations import ACTIVATIONS
from fastdeq.backends import extension
from fastdeq.solvers import Anderson, Picard

SIZES = (1, 3, 15, 16, 17, 33, 70, 130, 513)


def check_vector_functions(activate, engine: str) -> None:
    generator = np.random.default_rng(0)
    for dtype in (np.float32, np.float64) if bounds.wide_enough else (np.float32,):
        for name in ACTIVATIONS:
            for derivative in (0, 1):
                excess = bounds.worst_excess(
                    activate,
                    name,
                    derivative,
                    dtype,
                    generator,
                    count=1 << (14 if dtype == np.float32 else 10),
                    avx512=engine == "avx512",
                )
                assert excess <= 1, (name, derivative, dtype, excess)
    for dtype in (torch.float32, torch.float64):
        bounds.check_special_values(activate, dtype)


def check_iterations() -> None:
    """Rows that end within a vector or a block, and histories that are read in several passes."""
    for i, size in enumerate((*SIZES, 1041)):
        for dtype, tol in ((torch.float32, 1e-3), (torch.float64, 1e-9)):
            window, damping = (1, 4, 5, 11)[i % 4], (1.0, 0.8)[i % 2]
            for solver in (Picard(damping), Anderson(window, damping)):
                case = make_forward(3, size, dtype, rate=0.7)
                call = Call(solver, tol, 90)
                actual = iteration_cases.run(case, call, "iteration")
                check_agreement(case, call, actual, case.reference(call))


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    engine = extension.build_info["engine"].split()[0].rstrip(";")
    check_vector_functions(torch.ops.fastdeq.engine_activation, engine)
    for i, size in enumerate(SIZES):
        activation = list(ACTIVATIONS)[(3 * i) % len(ACTIVATIONS)]
        for dtype, tol in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
            for make, options in ((make_forward, {"activation": activation}), (make_adjoint, {})):
                case = make(7, size, dtype, **options)
                for solver in (Picard(), Anderson(accelerate_above=0.3 * (i % 2))):
                    call = Call(solver, tol if size < 500 else 10 * tol, 90)
                    check_agreement(case, call, case.engine(call), case.reference(call))
    check_iterations()
    case, call = make_forward(7, 33, torch.float32), Call(Picard(), 1e-4, 90)
    try:
        check_agreement(case, call, perturbed(case, "row").engine(call), case.reference(call))
    except AssertionError:
        print(engine)
    else:
        raise AssertionError("a planted error was not seen")


if __name__ == "__main__":
    main()
