"""Page faults per evaluation of a solve whose cell allocates as much as its state, several times.

Run as a script in a process of its own, where nothing large was freed before: prints the number.
"""

import resource
import sys

import torch

import fastdeq


def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def main(size):
    torch.set_num_threads(1)
    x = torch.linspace(-1, 1, 16 * size).view(16, size)
    calls = []

    def f(z):
        calls.append(0)
        first = torch.sin(z)
        second = torch.cos(z)
        third = first * second
        return x + 0.4 * (first + second + third)

    counts = []
    with torch.no_grad():
        for _ in range(6):
            calls.clear()
            before = faults()
            fastdeq.fixed_point(f, torch.zeros_like(x), tol=1e-30, max_iter=12, on_failure="ignore")
            counts.append((faults() - before) / len(calls))
    print(min(counts[2:]))


if __name__ == "__main__":
    main(int(sys.argv[1]))
