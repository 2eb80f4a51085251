"""``fastdeq::gmres_step``: one step of restarted GMRES for each sample on its own.

Its specification is ``solvers.gmres.gmres_step``. For CPU tensors it is in C++
(csrc/cpu/gmres_step.cpp): orthogonalisation, estimate and next point in one call; on a GPU it is
plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..solvers.gmres import gmres_step as reference

torch.library.define(
    "fastdeq::gmres_step",
    "(Tensor(a!) basis, Tensor(b!) hessenberg, Tensor(c!) null, Tensor(d!) beta, Tensor(e!) step, "
    "Tensor(f!) start, Tensor offset, Tensor scale, Tensor point, Tensor value, Tensor norm, "
    "Tensor running, int used, float tol, float atol, bool last) "
    "-> (Tensor following, Tensor iterate)",
)
torch.library.impl("fastdeq::gmres_step", "CompositeExplicitAutograd", reference)


@torch.library.register_fake("fastdeq::gmres_step")
def _fake(basis: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    point, running = others[7], others[10]
    return torch.empty_like(point), torch.empty_like(running)


def implementation(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operator as ``backend`` has it."""
    found: Callable[..., tuple[Tensor, Tensor]] = torch.ops.fastdeq.gmres_step
    return reference if backend == "reference" else found
