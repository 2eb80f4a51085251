"""Products with a large weight by the library (``torch.mm``), from which the step kernel takes its
tiles.

    full precision   point @ M.T in float32
    low precision    change @ M.T, both factors in bfloat16, the result in float32

Either is of the whole batch, into a buffer that exists, and enqueued without waiting: which rows a
step uses, and whether in full or in low precision, is decided on the device. Rows that have stopped
are multiplied as well, whatever is in them; nobody reads what becomes of them.

TF32: only the settings of the process decide how ``torch.mm`` multiplies float32 on a GPU (torch
2.11 to 2.15 have no argument and no thread-local setting for it), so a full-precision product comes
from the library only where they leave float32 alone. A thread that changes them while another one
solves can be seen in the latter's products. A bfloat16 product has sums in float32, because its
result is float32.

Bytes per product: 4 n^2 (low precision: 2 n^2) of M, 4 B n (2 B n) read, 4 B n written, and as much
read by the step kernel. Operations: 2 B n^2.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

# The smallest n for which the library makes the products: where a tile of a step kernel has to walk
# through a thousand inputs, a library's schedule of them pays. A count, not a measurement.
FROM_SIZE = 1024


def keeps_float32(device: torch.device) -> bool:
    """Whether ``torch.mm`` multiplies float32 there in full precision."""
    if device.type != "cuda":
        return True
    # cuBLAS itself looks at the variable; torch.backends does not know of it.
    forced = os.environ.get("NVIDIA_TF32_OVERRIDE") == "1"
    return not forced and torch.backends.cuda.matmul.fp32_precision != "tf32"


def full_product(point: Tensor, weight: Tensor, product: Tensor) -> None:
    """``product = point @ weight.T``. Autocast leaves ``out=`` alone."""
    torch.mm(point, weight.t(), out=product)


def low_product(change: Tensor, low_weight: Tensor, product: Tensor) -> None:
    """``product = change @ low_weight.T`` of bfloat16 factors, summed in float32."""
    if change.is_cuda:
        torch.mm(change, low_weight.t(), out_dtype=torch.float32, out=product)
    else:  # the interpreter: products of bfloat16 numbers are float32 numbers
        torch.mm(change.float(), low_weight.float().t(), out=product)
