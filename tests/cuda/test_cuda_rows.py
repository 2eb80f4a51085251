"""The kernels of csrc/cuda/rows.cuh on an emulated GPU, against the reference."""

from __future__ import annotations

import ctypes
import random
import re
import shutil
from ctypes import Structure, c_char_p, c_int32, c_int64, c_uint64, c_void_p

import pytest
import torch
from cuda_persistent_emulation import COMPILER, ROOT, load_harness
from rows_cases import DTYPES, SIZES, awkward_rows, check_restored, check_scaled, make_rows
from torch import Tensor

pytestmark = pytest.mark.skipif(
    shutil.which(COMPILER[0]) is None, reason=f"no C++ compiler ({COMPILER[0]})"
)


class _Call(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("batch", "size")),
        *((name, c_void_p) for name in ("slope", "grad", "value", "rows", "norms", "largests")),
        ("seed", c_uint64),
        ("skip", c_char_p),
        ("skipped", c_int32),
    )


class Rows:
    """The two launches; outputs hold NaN or other nonsense before."""

    def __init__(self, library: ctypes.CDLL):
        self._call = library.rows_call
        self._call.argtypes = [ctypes.POINTER(_Call), ctypes.c_int]
        self._call.restype = c_char_p
        self.seed = 0
        self.skipped = False

    def _launch(self, rows: Tensor, skip: str = "", **tensors: Tensor) -> None:
        self.seed += 1
        pointers = {name: t.data_ptr() for name, t in tensors.items()}
        call = _Call(*rows.shape, rows=rows.data_ptr(), seed=self.seed, **pointers)
        call.skip = skip.encode()
        message = self._call(ctypes.byref(call), rows.dtype == torch.float64)
        assert not message, message.decode()
        self.skipped = bool(call.skipped)

    def scale(self, slope: Tensor, grad: Tensor, skip: str = "") -> tuple[Tensor, Tensor, Tensor]:
        rows = torch.full_like(grad, 1e30)  # NaN is a result here
        norm, largest = (grad.new_full((len(grad), 1), -1.0) for _ in range(2))
        self._launch(rows, skip, slope=slope, grad=grad, norms=norm, largests=largest)
        return rows, norm, largest

    def restore(self, value: Tensor, norm: Tensor, largest: Tensor) -> Tensor:
        restored = torch.full_like(value, 1e30)
        self._launch(restored, value=value, norms=norm, largests=largest)
        return restored


@pytest.fixture(scope="module")
def library():
    return load_harness("rows")


@pytest.fixture
def rows(library):
    return Rows(library)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_rows_and_factors_are_those_of_the_reference(rows, size, dtype):
    slope, grad = make_rows(5, size, dtype)
    check_scaled(slope, grad, *rows.scale(slope, grad))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_tiny_huge_zero_and_not_finite_rows(rows, size, dtype):
    slope, grad = awkward_rows(size, dtype)
    scaled = rows.scale(slope, grad)
    check_scaled(slope, grad, *scaled)
    assert (scaled[0][:2] == 0).all()
    assert scaled[1].isnan().flatten()[9:12].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_restored_rows_are_those_of_the_reference(rows, size, dtype):
    _, norm, largest = rows.scale(*awkward_rows(size, dtype))
    value = torch.randn(len(norm), size, dtype=dtype)
    check_restored(value, norm, largest, rows.restore(value, norm, largest))


def test_empty_rows(rows):
    slope = torch.empty(3, 0)
    _, norm, largest = rows.scale(slope, slope)
    assert (norm == 1).all()
    assert (largest == 1).all()


@pytest.mark.parametrize("planted", ["row", "norm", "largest", "a NaN that is lost"])
def test_the_checks_notice_a_planted_error(rows, planted):
    slope, grad = awkward_rows(33, torch.float32)
    out = [t.clone() for t in rows.scale(slope, grad)]
    which = {"row": 0, "norm": 1, "largest": 2, "a NaN that is lost": 1}[planted]
    out[which][10 if "NaN" in planted else 4, -1] = (
        1.0 if "NaN" in planted else out[which][4, -1] * (1 + 1e-6)
    )
    with pytest.raises(AssertionError):
        check_scaled(slope, grad, *out)


def synchronisations():
    text = (ROOT / "csrc/cuda/rows.cuh").read_text().splitlines()
    return [f"rows.cuh:{i}" for i, line in enumerate(text, 1) if re.search(r"__syncthreads", line)]


@pytest.mark.parametrize("line", synchronisations())
def test_no_synchronisation_can_be_left_out(rows, line):
    """A thread goes on too early for some order of the threads; the right kernel never fails."""
    slope = torch.rand(4, 200)
    grad = torch.randn(4, 200)
    slope[0] = 0  # alive in one warp, wrong in another
    slope[0, 70] = 0.5
    grad[0, 150] = torch.nan
    rows.seed = random.Random(line).randrange(10**6)
    for _ in range(5):
        check_scaled(slope, grad, *rows.scale(slope, grad))
    for _ in range(200):
        out = rows.scale(slope, grad, skip=line)
        assert rows.skipped
        try:
            check_scaled(slope, grad, *out)
        except AssertionError:
            return
    pytest.fail(f"nothing depends on {line}")
