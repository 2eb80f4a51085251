"""``fastdeq::cholesky_qr2`` for callers in Python: QR made of products and triangular solves.

The operator is defined and implemented, for every device, in csrc/cholesky_qr.cpp. Its reference is
Householder QR, orthogonal_factor.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import extension
from .gram_schmidt import Factors

#: Compute capabilities of GPUs that run float64 at half the rate of float32 or more.
_FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


def has_cholesky_qr2() -> bool:
    return hasattr(torch.ops.fastdeq, "cholesky_qr2")


def prefers_cholesky_qr2(a: Tensor) -> bool:
    return a.is_cuda and has_cholesky_qr2()


def cholesky_qr2(a: Tensor, capturing: bool) -> Factors | None:
    """Q and R of ``a`` ``(m, n)``, or None where it fails; while capturing they are NaN instead.

    Raises:
        RuntimeError: there is no extension.
    """
    if not has_cholesky_qr2():
        raise RuntimeError(
            "method='cholesky_qr2' needs the compiled extension: "
            f"{extension.why_missing or 'the one that is there is older'}; method='auto' does not."
        )
    wide = not a.is_cuda or torch.cuda.get_device_capability(a.device) in _FAST_FLOAT64
    q, r, ok = torch.ops.fastdeq.cholesky_qr2(a, not capturing, wide)
    return Factors(q, r) if capturing or bool(ok) else None
