"""Shared fixtures. Random input is fresh for every test: seeded by the test's own name."""

import zlib

import pytest
import torch
from layer_cases import Residual, affine

from fastdeq import DEQLayer
from fastdeq.weights import factor_cache


@pytest.fixture(autouse=True)
def seed(request):
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The problems here are small: a second thread costs more than it brings."""
    torch.set_num_threads(1)


@pytest.fixture(params=["fused", "general"])
def make_layer(request):
    """Builds a layer around an affine cell, or around one that is not known to be one."""

    def make(**options):
        return DEQLayer(affine() if request.param == "fused" else Residual(), **options)

    return make


@pytest.fixture
def count_factorisations(monkeypatch):
    """Counts factorisations made through a cache."""
    calls = []
    original = factor_cache.factors

    def counted(a, *args):
        calls.append(tuple(a.shape))
        return original(a, *args)

    monkeypatch.setattr(factor_cache, "factors", counted)
    return calls


@pytest.fixture
def fresh_compiler():
    """torch.compile gives up on a function that it has compiled for too many objects."""
    torch._dynamo.reset()


def pytest_terminal_summary(terminalreporter):
    """What only a GPU can show is not silently absent."""
    if torch.cuda.is_available():
        return
    reasons = [str(report.longrepr) for report in terminalreporter.stats.get("skipped", ())]
    skipped = sum("CUDA device" in reason for reason in reasons)
    terminalreporter.section("no GPU here")
    if skipped:
        terminalreporter.write_line(f"{skipped} tests of this run need a CUDA device: skipped.")
    terminalreporter.write_line(
        "Not run on a GPU: the persistent kernel (here: emulated), the Triton kernels (here: "
        "interpreted, compiled), their launches, CUDA graphs, every time. `make gpu` runs them."
    )
