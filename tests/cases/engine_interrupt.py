"""A long solve of the CPU engine and a signal, in a process of its own.

Arguments: what the handler does ("raise": KeyboardInterrupt, "solve": a solve of its own, "thread":
raise, but the solve runs on another thread), threads, direction, size, batch. Prints the outcome of
the long solve, a number, and whether the next solve is bit for bit that before.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import torch
from engine_cases import Adjoint, Call, Forward, make_weight

from fastdeq import AffineCell, DEQLayer
from fastdeq.solvers import Neumann, Picard

LONG = 1_000_000_000  # iterations
WAIT = 0.5  # seconds from the start of the long solve to the signal


def send_signal() -> float:
    time.sleep(WAIT)
    sent = time.perf_counter()
    os.kill(os.getpid(), signal.SIGINT)
    return sent


def long_solve(direction: str, size: int, batch: int):
    """A function that solves for so many iterations in that direction, by a layer."""
    if direction == "one left":
        # All rows but the last are solved by the first iterate; that one is k after k steps.
        rows = torch.zeros(batch, size, dtype=torch.float64)
        rows[-1] = 1
        weight = torch.eye(size, dtype=torch.float64)
        call = Call(Picard(), 0.0, LONG)
        return lambda: Forward(weight, rows, "identity").engine(call)
    cell = AffineCell(8, size, scale=0.9)
    fixed = LONG if direction == "forward" else 5
    layer = DEQLayer(
        cell,
        solver=Picard(fixed_iterations=fixed),
        adjoint=Neumann(fixed_iterations=LONG if direction == "backward" else 5),
        on_failure="ignore",
    )
    x = torch.randn(batch, 8)
    if direction == "forward":
        return lambda: layer(x)
    value = layer(x).sum()
    return value.backward


def main() -> None:
    handler, threads, direction, size, batch = sys.argv[1], *map(str, sys.argv[2:6])
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    weight = make_weight(40, 0.9).float()
    rows = torch.randn(150, 40)
    case = Forward(weight, rows)
    back = Adjoint(weight, torch.rand_like(rows), rows)
    call = Call(Picard(), 1e-5, 200, "auto")

    def solve() -> list[torch.Tensor]:
        return [case.engine(call).value, back.engine(call).value]

    known, number, seen = solve(), 0.0, []
    if handler == "solve":
        limited = Call(Picard(fixed_iterations=50_000), 0.0, 1)
        wide = Forward(make_weight(int(size), 0.9).float(), torch.randn(int(batch), int(size)))
        expected = wide.engine(limited).value
        signal.signal(signal.SIGALRM, lambda *_: seen.append(solve()))
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.2)
        value = wide.engine(limited).value
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        same = torch.equal(value, expected) and all(
            torch.equal(a, b) for results in seen for a, b in zip(results, known, strict=True)
        )
        print("finished", len(seen), same)
        return
    if handler == "thread":
        wide = Forward(make_weight(int(size), 0.9).float(), torch.randn(int(batch), int(size)))
        limited = Call(Picard(fixed_iterations=20_000), 0.0, 1)
        expected, results = wide.engine(limited).value, []
        worker = threading.Thread(target=lambda: results.append(wide.engine(limited).value))
        worker.start()
        try:
            send_signal()
            time.sleep(60)
        except KeyboardInterrupt:
            pass
        worker.join()
        print("finished", 0, torch.equal(results[0], expected))
        return
    run = long_solve(direction, int(size), int(batch))
    sent: list[float] = []
    threading.Thread(target=lambda: sent.append(send_signal()), daemon=True).start()
    outcome = "finished"
    try:
        run()
    except KeyboardInterrupt:
        number, outcome = time.perf_counter(), "KeyboardInterrupt"
    while not sent:
        time.sleep(0.01)
    recovered = all(torch.equal(a, b) for a, b in zip(solve(), known, strict=True))
    print(outcome, number - sent[0], recovered)


if __name__ == "__main__":
    main()
