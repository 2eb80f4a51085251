"""What structure pays: symmetric and orthogonal weights, against the same with dense ones.

Times, by the races of ``test_bench_peers.py``: the ratio to torchdeq's fastest solver with a dense
weight, and with a symmetric one of the same size. Products: how many a symmetric cell of spectral
radius 0.9 to 8 takes, forward and adjoint, by each method; every equilibrium is verified in
float64. Certificates: an orthogonal cell solved with no stop test.

``pytest bench/ --benchmark-only -k structure``
"""

from __future__ import annotations

import pytest
from entries import SCALING_ENTRIES
from problems import Spec
from structure import ADJOINTS, FORWARDS, RADII, SCALES, certificate, counts
from timing import bench

SPECS = (
    Spec(256, 64, scale=0.9, tol=1e-5),
    Spec(256, 64, scale=0.99, tol=1e-5),
    Spec(256, 64, scale=0.9, tol=1e-5, weight="symmetric"),
    Spec(256, 64, scale=0.99, tol=1e-5, weight="symmetric"),
    # With dense weights of scale 0.99 hardly anybody converges on these two kinds.
    Spec(256, 64, scale=0.9, tol=1e-5, inputs="small"),
    Spec(256, 64, scale=0.99, tol=1e-5, inputs="small", weight="symmetric"),
    Spec(256, 64, "identity", scale=0.9, tol=1e-5),
    Spec(256, 64, "identity", scale=0.99, tol=1e-5, weight="symmetric"),
    Spec(512, 128, scale=0.99, tol=1e-5),
    Spec(512, 128, scale=0.99, tol=1e-5, weight="symmetric"),
    Spec(1024, 1, scale=0.99, tol=1e-5),
    Spec(1024, 1, scale=0.99, tol=1e-5, weight="symmetric"),
)


def _key(spec: Spec) -> str:
    parts = (spec.weight, f"{spec.scale:g}", spec.activation, spec.inputs, f"{spec.d}x{spec.batch}")
    return "-".join(parts)


RACES = [
    pytest.param(spec, entry.name, id=f"{_key(spec)}-{entry.name}")
    for spec in SPECS
    for entry in SCALING_ENTRIES
]


@pytest.mark.timeout(1200)  # the first contestant of a race waits for all of it
@pytest.mark.parametrize(("spec", "name"), RACES)
def test_bench_structure_race(benchmark, races, spec, name):
    bench(benchmark, races, "structure", _key(spec), spec, "full", name, scaling=True)


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("direction", ["forward", "adjoint"])
def test_bench_structure_products(benchmark, tables, direction, radius):
    methods = FORWARDS if direction == "forward" else ADJOINTS
    result = benchmark.pedantic(counts, (direction, radius), rounds=1)
    title = (
        f"products per sample, {direction}: mean/worst of 64, symmetric tanh, d = 256, tol 1e-5; "
        "in brackets samples that did not converge"
    )
    tables.add(title, ("radius", *methods), (f"{radius:g}", *result))


@pytest.mark.parametrize("scale", SCALES)
def test_bench_structure_certificate(benchmark, tables, scale):
    result = benchmark.pedantic(certificate, (scale,), rounds=1)
    title = "orthogonal tanh cell, d = 256, B = 64, tol 1e-4: no stop test, and its certificate"
    head = (
        "scale",
        "fixed iterations",
        "residual",
        "error",
        "certified bound",
        "iterations with a stop test",
    )
    tables.add(title, head, (f"{scale:g}", *result))
