"""What the cost depends on: batch, tolerance, threads, and one sample that is slower than the rest.

How it depends on d is read off the races of ``test_bench_peers.py``.

The straggler: with large inputs tanh saturates and plain iteration takes about 15 steps per sample;
one sample with a small input keeps the slope 1 and takes about 200. In the same batch with a large
input for that sample as well, nobody does.
"""

from __future__ import annotations

import pytest
from entries import SCALING_ENTRIES
from problems import Spec
from timing import bench

BATCHES = (1, 8, 64, 256)
TOLERANCES = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
THREADS = (1, 2)
THREAD_SIZES = ((256, 64), (1024, 256))
STRAGGLER_SCALE = 0.93

SPECS = (
    *(("batch", Spec(256, batch), "full") for batch in BATCHES),
    *(("tolerance", Spec(256, 64, tol=tol), "full") for tol in TOLERANCES),
    *(
        ("threads", Spec(*size, threads=threads), "full")
        for size in THREAD_SIZES
        for threads in THREADS
    ),
    *(
        ("straggler", Spec(256, 256, scale=STRAGGLER_SCALE, inputs=inputs), mode)
        for mode in ("forward", "full")
        for inputs in ("large", "straggler")
    ),
)


def _key(group: str, spec: Spec, mode: str) -> str:
    value = {
        "batch": spec.batch,
        "tolerance": f"{spec.tol:g}",
        "threads": spec.threads,
        "straggler": spec.inputs,
    }[group]
    return f"{spec.d}x{spec.batch}-{value}-{mode}"


CASES = [
    pytest.param(*case, entry.name, id=f"{case[0]}-{_key(*case)}-{entry.name}")
    for case in SPECS
    for entry in SCALING_ENTRIES
]


@pytest.mark.timeout(1200)  # the first contestant of a race waits for all of it
@pytest.mark.parametrize(("group", "spec", "mode", "name"), CASES)
def test_bench_scaling(benchmark, races, group, spec, mode, name):
    key = _key(group, spec, mode)
    bench(benchmark, races, group, key, spec, mode, name, scaling=True)
