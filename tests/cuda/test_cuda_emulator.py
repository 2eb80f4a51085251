"""The emulated GPU that the CUDA kernels are tested on, and a small part of theirs: activations."""

import ctypes
import shutil

import pytest
import torch
from cuda_persistent_emulation import COMPILER, EMULATOR, ROOT, load_harness

from fastdeq.activations import ACTIVATIONS

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER[0]) is None, reason=f"no C++ compiler ({COMPILER[0]})"
)


@pytest.fixture(scope="module")
def machine():
    library = load_harness("machine")
    for name in ("machine_sum", "machine_copy", "machine_warps", "machine_error"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="module")
def pieces():
    return load_harness("pieces")


def pointer(t):
    return ctypes.c_void_p(t.data_ptr())


def line_of(path, text):
    numbers = [i for i, line in enumerate(path.read_text().splitlines(), 1) if text in line]
    assert len(numbers) == 1, (path.name, text, numbers)
    return f"{path.name}:{numbers[0]}"


def sum_on_machine(machine, seed, skip=""):
    numbers = torch.randint(100, (3, 64), dtype=torch.int32)
    out = torch.full((3,), -1, dtype=torch.int32)
    message = machine.machine_sum(
        pointer(numbers), pointer(out), 3, ctypes.c_uint64(seed), skip.encode()
    )
    assert bool(machine.machine_skipped()) == bool(skip)
    return not message and (out == numbers.sum()).all()


def test_the_machine_adds_up_over_threads_and_blocks(machine):
    assert all(sum_on_machine(machine, seed) for seed in range(20))


@pytest.mark.parametrize("what", ["// halves", "__threadfence();", "machine.acquire"])
def test_the_machine_shows_a_missing_synchronisation(machine, what):
    path = EMULATOR / "machine.cpp" if "halves" in what else ROOT / "csrc/cuda/device.cuh"
    place = line_of(path, what)
    assert not all(sum_on_machine(machine, seed, place) for seed in range(20))


def test_the_machine_copies_asynchronously(machine):
    numbers, out = torch.randn(64, 4), torch.zeros(64, 4)
    swapped = numbers.view(32, 2, 4).flip(1).view(64, 4)
    for seed in range(5):
        assert not machine.machine_copy(pointer(numbers), pointer(out), 1, ctypes.c_uint64(seed))
        assert torch.equal(out, swapped)
        machine.machine_copy(pointer(numbers), pointer(out), 0, ctypes.c_uint64(seed))
        assert out.isnan().any()  # as shared memory was


def test_the_machine_exchanges_within_warps(machine):
    numbers, out = torch.randn(2, 32, dtype=torch.float64), torch.zeros(2, 32, dtype=torch.float64)
    votes = torch.zeros(2, 32, dtype=torch.int32)
    assert not machine.machine_warps(
        pointer(numbers), pointer(out), pointer(votes), ctypes.c_uint64(1)
    )
    assert (out == out[:, :1]).all()
    torch.testing.assert_close(out[:, 0], numbers.sum(1))
    bits = ((numbers > 0) << torch.arange(32)).sum(1)
    assert ((votes.long() & 0xFFFFFFFF) == bits[:, None]).all()


def test_the_machine_reports_deadlocks_and_writes_out_of_bounds(machine):
    messages = [machine.machine_error(i).decode() for i in range(3)]
    expected = "threads spin and nothing happens", "deadlock", "outside of shared memory"
    assert all(e in m for e, m in zip(expected, messages, strict=True)), messages


# Closer than any difference of formulas: the functions are the C library's here.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_and_slopes(pieces, name, dtype):
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, 20.0, -20.0, 90.0, -90.0, torch.nan], dtype=dtype)
    points = torch.cat((torch.randn(300, dtype=dtype) * 4, special))
    call = pieces.activation_float if dtype == torch.float32 else pieces.activation_double
    index = list(ACTIVATIONS).index(name)
    functions = ACTIVATIONS[name].function, ACTIVATIONS[name].slope
    for slope, function in enumerate(functions):
        found = torch.full_like(points, -77)
        call(index, slope, pointer(points), pointer(found), len(points))
        tolerance = 16 * torch.finfo(dtype).eps
        expected = function(points.double()).to(dtype)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
