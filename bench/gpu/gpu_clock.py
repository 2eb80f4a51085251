"""Times on a device: CUDA events around a region, or a dry run's stand-in for them on the CPU."""

from __future__ import annotations

import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Run = Callable[[], Any]
LOST = 3  # exit status: the device does not answer any more
# Cycles, five milliseconds or so: longer than the host takes to queue what is to wait behind it.
_SLEEP = 10_000_000


class Clock:
    """Seconds of a run on ``device``, from an idle device to the end of all that it queued."""

    def __init__(self, device: torch.device):
        self.device = device
        self.on_gpu = device.type == "cuda"

    def settle(self) -> None:
        """Waits for all work, on every stream."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def survived(self, error: Exception) -> str:
        """The error in one line, for a program that goes on.

        Raises:
            SystemExit: it cannot go on, since the device answers no more in this process.
        """
        line = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        try:
            self.settle()
        except RuntimeError:
            print(f"the device is lost: {line}", flush=True)
            sys.exit(LOST)
        return line

    def seconds(self, run: Run) -> float:
        """One run, with whatever the host does meanwhile."""
        if not self.on_gpu:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        self.settle()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def median(self, run: Run, times: int) -> float:
        """After three runs that do not count."""
        for _ in range(3):
            run()
        return statistics.median(self.seconds(run) for _ in range(times))

    def queued(self, run: Run, times: int) -> float:
        """Seconds per run of a queue that the device finds full, so that the host is not seen.

        Only where ``run`` waits for nothing, and where the host queues all of them within the sleep
        that holds the device up; otherwise the host's time is seen after all.
        """
        if not self.on_gpu:
            return self.median(run, times)
        self.settle()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_SLEEP)
        begin.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / times

    def peak_mib(self, run: Run) -> float | None:
        """MiB that PyTorch's allocator held during a run beyond what it held before."""
        if not self.on_gpu:
            return None
        self.settle()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        self.settle()
        return (torch.cuda.max_memory_allocated(self.device) - before) / 2**20


def interleaved(
    clock: Clock,
    runs: Mapping[str, Run],
    seconds: float,
    least: int,
    most: int,
    announce: Callable[[str], None],
) -> dict[str, list[float]]:
    """Times of rounds in which everybody runs once, in a new random order each round.

    Whatever else the machine does meets everybody alike. A run is preceded by one that does not
    count, which brings the contestant's data back into the caches. ``announce`` is told whose turn
    it is.
    """
    order = list(runs)
    times: dict[str, list[float]] = {name: [] for name in order}
    shuffle = random.Random(0).shuffle
    end = time.perf_counter() + seconds
    gc.collect()
    gc.disable()
    try:
        for count in range(most):
            if count >= least and time.perf_counter() > end:
                break
            shuffle(order)
            for name in order:
                announce(name)
                runs[name]()
                times[name].append(clock.seconds(runs[name]))
            gc.collect(0)
    finally:
        gc.enable()
    return times
