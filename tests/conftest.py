"""Shared fixtures. Random input is fresh for every test: seeded by the test's own name."""

import zlib

import pytest
import torch
from layer_cases import Residual, affine

from fastdeq import DEQLayer, parametrizations


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
    original = parametrizations.factors

    def counted(a, *args):
        calls.append(tuple(a.shape))
        return original(a, *args)

    monkeypatch.setattr(parametrizations, "factors", counted)
    return calls


@pytest.fixture
def fresh_compiler():
    """torch.compile gives up on a function that it has compiled for too many objects."""
    torch._dynamo.reset()
