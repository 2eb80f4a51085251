"""The persistent CUDA solver does not depend on the order of threads, and all of its waits are
needed; how it is laid out on real devices."""

import re
import shutil

import pytest
import torch
from cuda_persistent_emulation import (
    COMPILER,
    ROOMY,
    ROOT,
    Device,
    Emulation,
    EmulationError,
    call_for,
    same,
)
from engine_cases import make_adjoint, make_forward

from fastdeq.backends import extension
from fastdeq.solvers import Anderson, HeavyBall, Picard

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER[0]) is None, reason=f"no C++ compiler ({COMPILER[0]})"
)
DTYPES = [torch.float32, torch.float64]
SOLVERS = [HeavyBall(), Anderson(accelerate_above=0.5, damping=0.7, window=3), Anderson(window=40)]
A100, H100 = Device(108, 163 * 1024, 8), Device(132, 227 * 1024, 8)


@pytest.fixture(scope="module")
def emulation():
    return Emulation()


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_results_do_not_depend_on_the_order_of_threads(emulation, solver):
    for dtype, make in ((torch.float32, make_forward), (torch.float64, make_adjoint)):
        case, call = make(20, 70, dtype), call_for(dtype, solver)
        device = emulation.tightest(case, call, ROOMY)
        expected = emulation.solve(case, call, device)
        assert emulation.plan.members > 1
        for seed in range(1, 4):
            assert same(emulation.solve(case, call, device, seed=seed), expected)


def synchronisations():
    """Where threads or blocks wait for each other, or make writes seen."""
    for name in (
        "device.cuh",
        *sorted(p.name for p in (ROOT / "csrc/cuda").glob("persistent*.cuh")),
    ):
        for number, line in enumerate((ROOT / "csrc/cuda" / name).read_text().splitlines(), 1):
            code = line.split("//")[0]
            if any(s in code for s in ("__syncthreads", "__threadfence", "machine.acquire")):
                yield f"{name}:{number}"


@pytest.mark.parametrize("place", list(synchronisations()))
def test_a_missing_synchronisation_is_seen(emulation, place):
    """By another result, or an error of the machine, in one of a few solves."""
    dtype = torch.float32
    met = False
    for solver, start, batch, size, slope in (
        (Anderson(window=3), "none", 40, 70, True),
        (Anderson(window=12), "random", 70, 70, True),
        (Picard(), "none", 70, 70, False),
    ):
        case = make_forward(batch, size, dtype, start=start)
        call = call_for(dtype, solver, max_iter=12)
        device = emulation.tightest(case, call, ROOMY)
        whole = emulation.solve(case, call, device, slope=slope)
        for seed in range(12):
            try:
                outputs = emulation.solve(case, call, device, slope=slope, seed=seed, skip=place)
            except EmulationError:
                return
            met |= emulation.skipped
            if not same(outputs, whole):
                return
    assert met, "the solves never get there"
    pytest.fail("nothing changes")


@pytest.mark.parametrize("device", [A100, H100], ids=["A100", "H100"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plans_fit_the_device(emulation, device, dtype):
    bytes_of = torch.finfo(dtype).bits // 8
    for size in (1, 17, 64, 200, 512, 1000, 1024):
        for batch in (1, 5, 64, 1000, 100_000):
            for window in (0, 5, 20):
                p = emulation.plan_for(size, batch, dtype, device, window)
                assert p.members * p.groups <= device.multiprocessors
                assert p.members * p.tile_columns >= size > (p.members - 1) * p.tile_columns
                assert p.tiles * p.tile_rows >= batch > (p.tiles - 1) * p.tile_rows
                assert p.groups <= p.tiles
                assert p.tile_columns * size * bytes_of < p.shared_bytes <= device.shared_bytes
                assert p.counter_bytes < p.scratch_bytes


def test_what_fits_on_known_devices(emulation):
    """W has to fit the shared memory of all blocks: 17 MiB on an A100, 29 MiB on an H100."""
    assert emulation.plan_for(2048, 8, torch.float32, H100).members == 128
    for size, dtype, device in (
        (2048, torch.float32, A100),
        (4096, torch.float32, H100),
        (2048, torch.float64, H100),
    ):
        with pytest.raises(EmulationError, match="does not fit into"):
            emulation.plan_for(size, 8, dtype, device)
    with pytest.raises(EmulationError, match="with an Anderson window of 1000 does not fit"):
        emulation.plan_for(64, 8, torch.float32, H100, window=1000)


@pytest.mark.skipif(extension.module is None, reason="no extension here")
@pytest.mark.parametrize("device", [A100, H100, Device(46, 99 * 1024, 8)], ids=str)
def test_the_extension_makes_the_same_plans(emulation, device):
    """As compiled for a GPU, where it is, it refuses what the emulated one refuses."""
    refused = 0
    for size in (3, 190, 1024, 1500, 3000):
        for dtype, window in ((torch.float32, 0), (torch.float32, 700), (torch.float64, 9)):
            why_not = extension.module.why_not_persistent(
                size=size,
                batch=41,
                element_bytes=dtype.itemsize,
                window=window,
                multiprocessors=device.multiprocessors,
                shared_bytes=device.shared_bytes,
            )
            if not why_not:
                emulation.plan_for(size, 41, dtype, device, window)
                continue
            with pytest.raises(EmulationError, match=re.escape(why_not)):
                emulation.plan_for(size, 41, dtype, device, window)
            refused += 1
    assert 0 < refused < 15
