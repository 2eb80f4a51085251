"""What fastdeq reads from the device while a CUDA graph is recorded, seen on the CPU: nothing."""

from __future__ import annotations

import pytest
import torch
from recording_cases import (
    BATCH,
    CERTIFIED,
    FIXED,
    INTERPRETED,
    OPTIMISERS,
    InTwo,
    Training,
    make_model,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastdeq import Neumann, Picard, cuda_stream, solution
from fastdeq.ops import orthogonal_factor
from fastdeq.weights import factor_cache


class NoReads(TorchDispatchMode):
    """Raises where an operation would read a number from the device, or bring one there."""

    READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "unique", "masked_select")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.lstrip("_") in [read.lstrip("_") for read in self.READS]:
            raise AssertionError(f"{func} reads from the device")
        if any(isinstance(a, (list, tuple)) and _has_mask(a) for a in args):
            raise AssertionError(f"{func} with a mask for an index reads its size")
        return func(*args, **(kwargs or {}))


def _has_mask(indices):
    return any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in indices)


@pytest.fixture
def as_if_recording(monkeypatch):
    """On the CPU, what fastdeq does while a CUDA graph is recorded, as far as Python decides it."""
    for module in (cuda_stream, solution, factor_cache, orthogonal_factor):
        monkeypatch.setattr(module, "is_capturing", lambda device: True)
    with NoReads():
        yield


@pytest.mark.parametrize("on_failure", ["warn", "raise", "ignore"])
@pytest.mark.parametrize("kind", ["dense", "orthogonal", "symmetric", "general"])
def test_a_step_of_fixed_iterations_reads_nothing(kind, on_failure, as_if_recording):
    options = FIXED | {"backend": "reference", "on_failure": on_failure}
    model = make_model(kind, 192, options, "cpu")
    Training(model, OPTIMISERS["sgd"]).step()
    assert model[0].last_solution is not None
    assert model[0].last_adjoint_solution is not None


@pytest.mark.skipif(not INTERPRETED, reason="kernels on the CPU are for the interpreter")
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_of_a_general_cell_by_kernels_reads_nothing(parts, as_if_recording):
    count = {"fixed_iterations": 4}
    options = {"solver": Picard(**count), "adjoint": Neumann(**count), "backend": "triton"}
    model = make_model("general", 6, options | {"on_failure": "ignore"}, "cpu")
    if parts == 2:
        model[0].cell = InTwo(model[0].cell)
        model[0].register_forward_hook(lambda layer, x, z: torch.cat(z, 1))
    Training(model, OPTIMISERS["sgd"]).step()
    for found in (model[0].last_solution, model[0].last_adjoint_solution):
        with _disable_current_modes():
            assert found.iterations.tolist() == [4] * BATCH


@pytest.mark.parametrize("gradient", ["implicit", "one_step"])
def test_a_certified_step_reads_nothing(gradient, as_if_recording):
    options = CERTIFIED | {"backend": "reference", "gradient": gradient}
    Training(make_model("orthogonal", 192, options, "cpu"), OPTIMISERS["sgd"]).step()


def test_a_read_is_noticed(as_if_recording):
    x = torch.randn(3)
    with pytest.raises(AssertionError, match="reads from the device"):
        x.sum().item()
    with pytest.raises(AssertionError, match="reads its size"):
        x[x > 0]
    with pytest.raises(AssertionError, match="reads from the device"):
        torch.equal(x, x)
