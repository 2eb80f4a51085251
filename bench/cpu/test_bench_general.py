"""Cells that are not affine: fastdeq, torchdeq, the tutorial's loop, and the bare calls.

    forward     the equilibrium, without a graph
    backward    gradients of the cell's parameters and of x, from a state with a graph
    full        a state with a graph, and its gradients

Everybody is brought to a relative residual of 1e-3 in both directions, verified in float64 by an
evaluation that is not its own. Who does not reach it is listed and counts for nothing.
``pytest bench/ --benchmark-only -k bench_general``
"""

from __future__ import annotations

import pytest
from general_problem import GeneralSpec
from general_race import NAMES, general_race
from general_report import GENERAL
from interleave import MODES
from timing import time_again

SPECS = (
    GeneralSpec("narrow", (64, 32)),
    GeneralSpec("narrow", (64, 1)),
    GeneralSpec("mlp", (256, 64)),
    GeneralSpec("convolution", (16, 48, 16, 16)),
    GeneralSpec("transformer", (8, 64, 128)),
    GeneralSpec("multiscale", (8, 16, 32, 3)),
    GeneralSpec("graph", (1800, 32)),
)
CASES = [
    pytest.param(spec, mode, name, id=f"{spec.kind}-{spec.size}-{mode}-{name}")
    for spec in SPECS
    for mode in MODES
    for name in NAMES
]


@pytest.mark.timeout(1200)  # the first contestant of a race waits for all of it
@pytest.mark.parametrize(("spec", "mode", "name"), CASES)
def test_bench_general(benchmark, races, spec, mode, name):
    result = general_race(spec, mode, benchmark.enabled)
    key = f"{spec.kind} {spec.size} {mode}"
    time_again(benchmark, races, GENERAL, key, result, name)
