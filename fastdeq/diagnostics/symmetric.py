"""An interval that holds the spectrum of a symmetric weight, by Lanczos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cells import AffineCell
from ..errors import lists_options
from ..estimate import check_numbers
from ..layer import DEQLayer
from . import krylov


@dataclass(frozen=True)
class EigenvalueBounds:
    """Where the eigenvalues of a symmetric W are, see :func:`eigenvalue_bounds`.

    Attributes:
        lower, upper: no eigenvalue is outside ``[lower, upper]``, but for the stated risk. NaN
            where W is not finite.
        accuracy: the smallest eigenvalue is at most ``lower + accuracy``, the largest at least
            ``upper - accuracy``, for certain.
        products: number of products with W.
        converged: whether ``accuracy <= tol * max(|lower|, |upper|)``, or is at the rounding floor.
    """

    lower: float
    upper: float
    accuracy: float
    products: int
    converged: bool


@lists_options("eigenvalue_bounds")
@torch.no_grad()
def eigenvalue_bounds(
    weight: Any,
    *,
    tol: float = 1e-2,
    max_products: int = 100,
    risk: float = 1e-3,
    generator: torch.Generator | None = None,
) -> EigenvalueBounds:
    """Bounds of the eigenvalues of a symmetric W, by Lanczos with full reorthogonalisation.

    The extreme Ritz values lie inside the spectrum. How far outside of them an eigenvalue can be
    follows from the Lanczos polynomial, which grows fast there, and from the random start, which
    does not miss an eigenvector but with small probability. The residual norm of a Ritz value would
    not do: it tells of some eigenvalue near by, not that there is none beyond. With at least d
    products the bounds are exact up to rounding. Runs in float64, whatever the dtype of W.

    Args:
        weight: a tensor ``(d, d)``, a module whose ``forward()`` returns one, an
            :class:`fastdeq.AffineCell`, or a :class:`fastdeq.DEQLayer` around one.
        tol: relative accuracy at which to stop, >= 0.
        max_products: most products with W, >= 1.
        risk: probability, of the random start, that an eigenvalue is outside, in (0, 1).
        generator: of the start; None: a fixed one, which leaves the global random state alone.

    Raises:
        TypeError, ValueError: options or a weight that do not fit; a W that is not symmetric up to
            the rounding of its dtype. What asymmetry there is widens the bounds.

    Source: J. van Dorsselaer, M. Hochstenbach and H. van der Vorst, SIAM J. Matrix Anal. Appl. 22
    (2000) 837; :mod:`fastdeq.diagnostics.krylov`.
    """
    check_numbers(tol, max_products, risk, generator)
    w, asymmetry = _symmetric_part(_matrix(weight))
    if not bool(w.isfinite().all()):
        return EigenvalueBounds(torch.nan, torch.nan, torch.nan, 0, False)
    size = len(w)
    reach = krylov.log_reach(size, risk / 2, symmetric=True)  # half of the risk for each end

    def read(projection: krylov.Projection) -> tuple[Tensor, Tensor]:
        top, _, upper = krylov.largest_ends(projection, reach)
        turned = projection._replace(hessenberg=-projection.hessenberg)
        bottom, _, lower = krylov.largest_ends(turned, reach)
        accuracy = torch.maximum(upper - top, lower - bottom) + projection.rounding + asymmetry
        upper, lower = upper + asymmetry, 0.0 - lower - asymmetry
        size = torch.maximum(upper.abs(), lower.abs())
        settled = accuracy <= torch.maximum(tol * size, 2.01 * projection.rounding + asymmetry)
        return torch.stack([lower, upper, accuracy], 1), settled

    start = krylov.start_vector(size, generator).to(w)
    one = torch.zeros(1, dtype=torch.bool, device=w.device)
    eps = torch.finfo(w.dtype).eps
    found = krylov.arnoldi(lambda v: v @ w, start, one, eps, read, max_products)
    lower, upper, accuracy = found.numbers[0].tolist()
    return EigenvalueBounds(lower, upper, accuracy, int(found.products), bool(found.settled))


def _matrix(weight: Any) -> Tensor:
    """W of any of the forms that :func:`eigenvalue_bounds` takes."""
    if isinstance(weight, DEQLayer):
        weight = weight.cell
    if isinstance(weight, AffineCell):
        weight = weight.recurrent_weight()
    elif isinstance(weight, nn.Module):
        try:
            weight = weight()
        except TypeError as error:
            raise TypeError(
                f"{type(weight).__name__}() does not return a weight ({error}). For a cell that is "
                "not an AffineCell use spectral_radius(cell, x)."
            ) from error
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"weight must be a tensor (d, d), a weight module or an AffineCell, not {weight!r}."
        )
    if weight.dim() != 2 or weight.shape[0] != weight.shape[1] or len(weight) == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; it must be (d, d) with d >= 1.")
    if not weight.is_floating_point():
        raise TypeError(f"weight has dtype {weight.dtype}; it must be real floating point.")
    return weight


def _symmetric_part(weight: Tensor) -> tuple[Tensor, float]:
    """``(W + W^T) / 2`` in float64, and a bound on the 2-norm of the rest."""
    w = weight.double()
    rest = (w - w.t()) / 2
    # Sums of d products, such as U U^T, are symmetric up to about this only.
    allowed = len(w) * torch.finfo(weight.dtype).eps * float(w.abs().max())
    if float(rest.abs().max()) > allowed:
        raise ValueError(
            "the weight is not symmetric: W - W^T has an entry of size "
            f"{2 * float(rest.abs().max()):.1e}. For other weights use "
            "spectral_radius(cell, x) or jacobian_norm(cell, x), or "
            "torch.linalg.svdvals(W) and torch.linalg.eigvals(W)."
        )
    return (w + w.t()) / 2, float(rest.norm())
