"""fastdeq, torchdeq, jaxopt and plain loops on the same equilibrium, at the same verified residual.

    forward     the equilibrium, without a graph
    backward    gradients of W, U, b and x, from a state with a graph
    full        a state with a graph, and its gradients

On the hard problems plain iteration crawls or diverges, while an equilibrium exists: it is found in
float64 before anybody is timed. ``pytest bench/ --benchmark-only`` ends with a table of ratios;
``-k 64x32`` makes it short.
"""

from __future__ import annotations

import pytest
from entries import entries_of
from interleave import MODES
from problems import Spec
from report import PEERS
from timing import bench

SIZES = (
    (32, 16),
    (64, 32),
    (128, 64),
    (256, 64),
    (512, 128),
    (1024, 1),
    (1024, 8),
    (1024, 256),
    (2048, 256),
)
RELU_SIZES = ((64, 32), (256, 64), (512, 128))
# At scale 1.3 and d = 512 plain iteration takes only 50 steps with tanh.
HARD = (
    Spec(64, 32, "tanh", 1.3),
    Spec(256, 64, "tanh", 1.3),
    Spec(512, 128, "tanh", 1.5),
    Spec(64, 32, "relu", 1.2),
    Spec(256, 64, "relu", 1.2),
    Spec(512, 128, "relu", 1.2),
)

SPECS = (
    *((spec, MODES if spec.d < 512 else ("full",)) for spec in HARD),
    *((Spec(*size, "relu"), MODES) for size in RELU_SIZES),
    *((Spec(*size), MODES) for size in SIZES),
)
CASES = [
    pytest.param(spec, mode, entry.name, id=f"{spec.d}x{spec.batch}-{kind}-{mode}-{entry.name}")
    for spec, modes in SPECS
    for kind in [spec.kind.replace(" ", "-")]
    for mode in modes
    for entry in entries_of(spec)
]


@pytest.mark.timeout(1200)  # the first contestant of a race waits for all of it
@pytest.mark.parametrize(("spec", "mode", "name"), CASES)
def test_bench_peers(benchmark, races, spec, mode, name):
    key = f"{spec.d}x{spec.batch} {spec.kind} {mode}"
    bench(benchmark, races, PEERS, key, spec, mode, name)
