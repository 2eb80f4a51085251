"""Tests of the GPU kernels: on a GPU where there is one, or under Triton's interpreter on the CPU.

Triton decides when it is imported whether it interprets, so the interpreter has a run of its own:
``TRITON_INTERPRET=1 pytest tests/kernels``, as ``make test`` does. Without it and without a GPU
nothing here is collected.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def device():
    """Where the tensors live: "cpu" under the interpreter, else "cuda"."""
    return "cpu" if INTERPRETED else "cuda"
