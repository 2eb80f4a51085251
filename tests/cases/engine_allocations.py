"""Run with engine_allocations.cpp preloaded: memory requests of short and of long solves, as JSON.

A process of its own, because the functions that count must be there before any library is loaded.
"""

from __future__ import annotations

import ctypes
import json
import sys

import torch
from engine_cases import Adjoint, Call, Forward, make_weight

from fastdeq.solvers import Anderson, Picard, Solver

SHORT, LONG = 5, 200
SOLVERS: dict[str, Solver] = {
    "picard": Picard(),
    "picard, damped": Picard(damping=0.9),
    "anderson": Anderson(),
    "anderson, late": Anderson(window=3, accelerate_above=0.9),
}


def fewest_requests(run) -> int:
    """Over a few calls: what another thread of the process asks for is not the solve's."""
    count = ctypes.CDLL(None).allocation_count
    count.restype = ctypes.c_long
    found = []
    for _ in range(3):
        before = count()
        run()
        found.append(count() - before)
    return min(found)


def main(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    results = []
    shapes = [
        (32, torch.float32, "float32"),
        (32, torch.float64, "float32"),
        (32, torch.float32, "mixed"),
        (256, torch.float32, "float32"),
        (256, torch.float32, "mixed"),
    ]
    if threads > 1:  # a single sample, whose products the threads share
        shapes += [(769, torch.float32, "float32"), (769, torch.float32, "mixed")]
    for size, dtype, precision in shapes:
        # Rates so slow that the long solve goes on for long; c from small to large.
        weight = make_weight(size, 0.999).to(dtype)
        rows = torch.randn(1 if size > 500 else 15, size, dtype=dtype)
        cases = {
            "forward": Forward(weight, rows, "identity"),
            "adjoint": Adjoint(weight, torch.ones_like(rows), rows),
        }
        for direction, case in cases.items():
            for name, solver in SOLVERS.items():
                planted = name == "picard" and size == 32 and threads == 1
                for implementation in ("engine", "reference") if planted else ("engine",):
                    requests, updates = {}, {}
                    for max_iter in (SHORT, LONG):
                        call = Call(solver, 0.0, max_iter, precision)
                        solve = getattr(case, implementation)
                        updates[max_iter] = int(solve(call).iterations.max())  # and warms up
                        requests[max_iter] = fewest_requests(lambda s=solve, c=call: s(c))
                    results.append(
                        {
                            "case": f"{direction}, {name}, {size}, {dtype}, {precision}",
                            "implementation": implementation,
                            "requests": list(requests.values()),
                            "updates": list(updates.values()),
                        }
                    )
    print(json.dumps(results))


if __name__ == "__main__":
    main(int(sys.argv[1]))
