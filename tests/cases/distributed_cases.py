"""Two processes of a gloo group, kept for the tests of a module, and models for them."""

import contextlib
import os
import queue
import tempfile
import traceback

import torch
from torch import distributed, multiprocessing, nn

from fastdeq import AffineCell, DEQLayer

RANKS = 2


def _work(rank, store, tasks, results):
    """Runs what it is sent, in a process of its own."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        distributed.init_process_group(
            "gloo", store=distributed.FileStore(store, RANKS), rank=rank, world_size=RANKS
        )
        while (task := tasks.get()) is not None:
            function, args = task
            torch.manual_seed(0)
            try:
                results.put((rank, True, function(rank, *args)))
            except Exception:
                results.put((rank, False, traceback.format_exc()))
    finally:
        with contextlib.suppress(Exception):
            distributed.destroy_process_group()


class Ranks:
    """Processes that call the same function; they meet through a file, so no port is taken."""

    def __init__(self):
        self._folder = tempfile.TemporaryDirectory()
        self._processes = []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stop()
        self._folder.cleanup()

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self._results = context.Queue()
        self._tasks = [context.Queue() for _ in range(RANKS)]
        store = tempfile.mktemp(dir=self._folder.name)
        self._processes = [
            context.Process(
                target=_work, args=(r, store, self._tasks[r], self._results), daemon=True
            )
            for r in range(RANKS)
        ]
        for p in self._processes:
            p.start()

    def _stop(self):
        for p, tasks in zip(self._processes, self._tasks, strict=True) if self._processes else ():
            tasks.put(None)
            p.join(5)
            if p.is_alive():
                p.kill()
                p.join()
        self._processes = []

    def run(self, function, *args, timeout=60):
        """``function(rank, *args)`` on each, and what they return; an error of one is raised.

        A function that hangs fails, and the next one gets new processes.
        """
        if not self._processes:
            self._start()
        for tasks in self._tasks:
            tasks.put((function, args))
        found = {}
        while len(found) < RANKS:
            try:
                rank, fine, result = self._results.get(timeout=timeout)
            except queue.Empty:
                self._kill()
                raise AssertionError(f"ranks {sorted({*range(RANKS)} - {*found})} hang.") from None
            if not fine:
                self._kill()  # the other may wait for it
                raise AssertionError(f"rank {rank}:\n{result}")
            found[rank] = result
        return [found[rank] for rank in range(RANKS)]

    def _kill(self):
        for p in self._processes:
            p.kill()
            p.join()
        self._processes = []


class Perceptron(nn.Module):
    """A general cell that contracts."""

    def __init__(self, size=8):
        super().__init__()
        self.first, self.second = (nn.Linear(size, size, dtype=torch.float64) for _ in range(2))
        with torch.no_grad():
            for linear in (self.first, self.second):
                linear.weight.mul_(0.8)

    def forward(self, z, x):
        return torch.tanh(self.second(torch.tanh(self.first(z))) + x)


KINDS = ("dense", "symmetric", "orthogonal", "general")
TIGHT = {"tol": 1e-12, "max_iter": 500}


def model(kind, **options):
    """A layer between two linear ones, the same on each rank."""
    torch.manual_seed(1)
    cell = Perceptron()
    if kind != "general":
        cell = AffineCell(8, 8, weight=kind, scale=0.8, dtype=torch.float64)
    layer = DEQLayer(cell, **{**TIGHT, **options})
    ends = (nn.Linear(4, 8, dtype=torch.float64), nn.Linear(8, 2, dtype=torch.float64))
    return nn.Sequential(ends[0], layer, ends[1])


def batch(step=0):
    """Inputs and targets for all ranks; those of the last saturate, and are solved sooner."""
    torch.manual_seed(step + 10)
    x = torch.randn(4 * RANKS, 4, dtype=torch.float64)
    x[-4:] *= 30
    return x, torch.randn(4 * RANKS, 2, dtype=torch.float64)


def share(rank, t):
    return t[4 * rank : 4 * (rank + 1)]


def loss_of(module, x, y):
    return nn.functional.mse_loss(module(x), y)


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def trained(module, take, steps=3):
    """Gradients of the first step, and parameters after some of SGD; ``take`` is a rank's share."""
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    first = None
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        loss_of(module, take(x), take(y)).backward()
        first = first or [whole(p.grad).clone() for p in module.parameters()]
        optimizer.step()
    return first, [whole(p).detach().clone() for p in module.parameters()]


def check_as_one_process(ours, kind, **options):
    """Gradients and trained parameters are those of one process, to the tolerance of the solves.

    Residuals of 1e-12 leave errors of 1e-12 / (1 - 0.8) in states of size 1.
    """
    for mine, theirs in zip(ours, trained(model(kind, **options), lambda t: t), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def iterations(layer):
    return int(layer.last_solution.iterations.max())
