"""Spectral radius and 2-norm of the Jacobian ``J = df/dz`` of any cell, sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cells import AffineCell
from ..estimate import Estimate, check_numbers
from ..layer import DEQLayer
from ..solve.cell_map import CellMap
from ..solve.coupling import are_independent
from ..solve.leading import leading_of
from ..solve.packing import Packing
from . import krylov
from .keywords import takes_keywords
from .untouched import differentiable_twice, usable


@takes_keywords("spectral_radius")
def spectral_radius(
    cell: Any,
    x: Any,
    z: Any = None,
    *,
    context: tuple[Any, ...] = (),
    tol: float = 1e-2,
    max_products: int = 100,
    risk: float = 1e-3,
    generator: torch.Generator | None = None,
    **keywords: Any,
) -> Estimate:
    """Largest modulus of the eigenvalues of ``J = df/dz`` at each sample's state, by Arnoldi.

    Below 1, plain iteration converges near the state, at this rate. J is never formed: a product is
    one vector-Jacobian product of the cell, for the whole batch. Memory: up to ``max_products``
    states per sample. A Krylov space of the state's dimension, or one that closes before, is exact.

    What the estimate means:

    - For normal J (symmetric, orthogonal) ``value <= spectral radius <= upper <= value +
      accuracy``; the first for certain, as Ritz values lie in the convex hull of the spectrum,
      the second with probability ``1 - risk``.
    - For any J the spectral radius is at most ``upper``, with the same probability, but for
      rounding. On the lower side accuracy is a backward error: some matrix within ``accuracy``
      of J, in the 2-norm, has an eigenvalue of modulus in ``[value - accuracy, value]``: the
      Ritz residual ``h |y_m|`` is part of it. An eigenvalue of a strongly non-normal J moves
      much further than the matrix: ``value`` can be far above the spectral radius although
      ``accuracy`` is small.
    - Rounding is charged as a change of J by 4 eps of its projection's Frobenius norm, with the
      eps of the cell's dtype. ``accuracy`` and ``upper`` include its effect on a normal J.

    Spectra with many eigenvalues near the largest modulus, as those of orthogonal and dense
    weights, need about as many products as the state has entries for full accuracy. A cell
    whose result does not require gradients, or does not depend on z, has J = 0.

    Args:
        cell: an :class:`fastdeq.AffineCell`, any module or function ``cell(z, x)`` that treats
            samples (rows) independently, or a :class:`fastdeq.DEQLayer` around one, whose
            ``batch_dim`` is taken.
        x: what the cell takes, ``(B, ...)``.
        z: the states, a tensor ``(B, ...)`` or a tuple of them. None: the equilibrium, which the
            layer finds, or ``DEQLayer(cell)`` for a cell, with its warning where it does not.
        context: further arguments of a general cell.
        tol: relative accuracy at which a sample is done, >= 0.
        max_products: most products with J of a sample, >= 1.
        risk: probability, of the random start, that ``upper`` fails for a sample, in (0, 1).
        generator: of the start; None: a fixed one, which leaves the global random state alone.
        keywords: of the cell, by name; one that is called like an option here goes in ``context``.

    Returns:
        An :class:`Estimate`.

    Raises:
        TypeError, ValueError: options, states or inputs that do not fit, with what does.
        CoupledSamplesError: a sample depends on another; a ValueError.

    Source: :mod:`fastdeq.diagnostics.krylov`.
    """
    check_numbers(tol, max_products, risk, generator)
    with torch.inference_mode(False):
        at = _Linearization(cell, x, z, context, keywords)
        reach = krylov.log_reach(at.size, risk, symmetric=False)

        def read(projection: krylov.Projection) -> tuple[Tensor, Tensor]:
            return _reading(*krylov.modulus_ends(projection, reach), projection.rounding, tol)

        return at.estimate(at.transposed_product, read, max_products, generator)


@takes_keywords("jacobian_norm")
def jacobian_norm(
    cell: Any,
    x: Any,
    z: Any = None,
    *,
    context: tuple[Any, ...] = (),
    tol: float = 1e-2,
    max_products: int = 100,
    risk: float = 1e-3,
    generator: torch.Generator | None = None,
    **keywords: Any,
) -> Estimate:
    """2-norm of ``J = df/dz`` at each sample's state, by Lanczos on ``J^T J``.

    It is the cell's local Lipschitz constant in z: below 1, plain iteration comes closer to the
    equilibrium with every step. The arguments are those of :func:`spectral_radius`. A step takes
    two products, one with J and one with its transpose, both reverse mode. Attention is computed
    without fused kernels.

    Returns:
        An :class:`Estimate` with ``value <= |J| <= upper = value + accuracy``, up to rounding,
        which ``accuracy`` and ``upper`` include; the first for certain, the second with probability
        ``1 - risk``.

    Raises:
        TypeError, ValueError: as :func:`spectral_radius` does; ``max_products`` below 2.
        RuntimeError: a cell that cannot be differentiated twice.

    Source: :mod:`fastdeq.diagnostics.krylov`; products with J by differentiating the linear map
    ``u -> J^T u`` (J. Townsend, "A new trick for calculating Jacobian vector products", 2017).
    """
    check_numbers(tol, max_products, risk, generator)
    if max_products < 2:
        raise ValueError(f"a step of jacobian_norm takes 2 products, got {max_products=}.")
    with torch.inference_mode(False), differentiable_twice():
        at = _Linearization(cell, x, z, context, keywords)
        reach = krylov.log_reach(at.size, risk, symmetric=True)
        scale: Tensor | None = None

        def gram(rows: Tensor) -> Tensor:
            """``J^T J / s^2``, s being ``|J v|`` of the start: its square may leave the range."""
            nonlocal scale
            image = at.product(rows)
            if scale is None:
                scale = torch.linalg.vector_norm(image, dim=1, keepdim=True, dtype=torch.float64)
                scale = torch.where(scale > 0, scale, 1.0)
            # NaN or infinity in one sample stays there.
            image = at.transposed_product((image / scale).to(rows.dtype))
            return (image / scale).to(rows.dtype)

        def read(projection: krylov.Projection) -> tuple[Tensor, Tensor]:
            ends = [t.clamp(min=0).sqrt() for t in krylov.largest_ends(projection, reach)]
            value, floor = ends[0], projection.rounding
            # A change of the square by r changes the root by at most sqrt(r).
            floor = torch.minimum(floor.sqrt(), floor / value.clamp(min=1e-300))
            return _reading(ends[0], ends[1], ends[2], floor, tol)

        found = at.estimate(gram, read, max_products // 2, generator)
    if scale is None:
        return found
    s = scale.squeeze(1)
    value, accuracy, upper = (
        (t.double() * s).to(t.dtype) for t in (found.value, found.accuracy, found.upper)
    )
    return Estimate(value, accuracy, upper, 2 * found.products, found.converged)


def _reading(
    value: Tensor, inside: Tensor, outside: Tensor, floor: Tensor, tol: float
) -> tuple[Tensor, Tensor]:
    """Value, accuracy and upper bound as ``(A, 3)``, and whether they are good enough ``(A,)``."""
    accuracy = torch.maximum(value - inside, outside - value)
    # Slightly more than the floor: sums of it with the value are rounded.
    settled = accuracy <= torch.maximum(tol * value, 1.01 * floor)
    return torch.stack([value, accuracy, outside], 1), settled


class _Linearization:
    """A cell at a state, as rows ``(B, n)``: products with its Jacobian and the transpose."""

    def __init__(
        self, cell: Any, x: Any, z: Any, context: tuple[Any, ...], keywords: dict[str, Any]
    ):
        x, z, context, keywords = map(usable, (x, z, context, keywords))
        layer = cell if isinstance(cell, DEQLayer) else None
        if layer is not None:
            cell = layer.cell
        elif not callable(cell) or isinstance(cell, type):
            raise TypeError(f"cell must be a module or function cell(z, x), not {cell!r}.")
        excluded = None
        if z is None:
            z, excluded = _equilibrium(cell, layer, x, context, keywords)
        elif isinstance(cell, AffineCell):
            z = cell.check_state(z, cell.inject(x).detach())
        batch_dim = 0 if layer is None else layer.options.batch_dim
        if (leading := leading_of(cell, x)) is not None:
            batch_dim = leading.batch_dim
        has_aux = layer is not None and layer.options.has_aux
        f = CellMap(cell, (x, *context), keywords, has_aux)
        packing = Packing(z, batch_dim)
        packing.copies = True  # z is the caller's
        rows = packing.pack(z).detach()
        if excluded is None:
            excluded = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        excluded = excluded | ~rows.isfinite().all(1)
        self.at = rows.requires_grad_()
        with torch.enable_grad():
            self.value = packing.pack(f(packing.unpack(self.at)))
        if len(rows) > 1:
            are_independent(self.value, self.at, batch_dim)
        self.excluded = excluded | ~self.value.detach().isfinite().all(1)
        self.batch, self.size = rows.shape
        self.eps = max(torch.finfo(t).eps for t in (packing.dtype, *packing.dtypes))
        device = packing.device.type
        if torch.is_autocast_enabled(device):
            self.eps = max(self.eps, torch.finfo(torch.get_autocast_dtype(device)).eps)
        self._forward: tuple[Tensor, Tensor] | None = None  # u and J^T u, differentiable in u

    def transposed_product(self, rows: Tensor) -> Tensor:
        """``J^T u`` for each row u ``(B, n)``."""
        return _pull(self.value, self.at, rows)

    def product(self, rows: Tensor) -> Tensor:
        """``J v`` for each row v ``(B, n)``, the transpose of the linear map ``u -> J^T u``."""
        if self._forward is None:
            u = torch.zeros_like(self.at, requires_grad=True)
            with torch.enable_grad():
                self._forward = u, _pull(self.value, self.at, u, create_graph=True)
        u, image = self._forward
        found = _pull(image, u, rows)
        # Zeros are right where J is zero, and only there.
        if not bool(found.any()) and bool(_pull(self.value, self.at, rows).any()):
            self._refuse_constant(image, u)
        return found

    @staticmethod
    def _refuse_constant(image: Tensor, u: Tensor) -> None:
        """Raises RuntimeError where ``J^T u`` does not depend on u for autograd."""
        seen = None
        if image.requires_grad:
            ones = torch.ones_like(image)
            (seen,) = torch.autograd.grad(image, u, ones, retain_graph=True, allow_unused=True)
        if seen is None:
            raise RuntimeError(
                "the backward pass of the cell cannot be differentiated, so that there are no "
                "products with J: write it in differentiable operations."
            )

    def estimate(
        self,
        product: Callable[[Tensor], Tensor],
        read: krylov.Read,
        max_products: int,
        generator: torch.Generator | None,
    ) -> Estimate:
        """Runs the Krylov process with ``product``; ``read`` gives value, accuracy and upper."""
        dtype = self.at.dtype
        if self.batch == 0 or self.size == 0:
            zero = self.at.new_zeros(self.batch)
            products = torch.zeros(self.batch, dtype=torch.int32, device=zero.device)
            return Estimate(zero, zero.clone(), zero.clone(), products, torch.ones_like(zero) > 0)
        with torch.no_grad():
            start = krylov.start_vector(self.size, generator).to(self.at)
            found = krylov.arnoldi(product, start, self.excluded, self.eps, read, max_products)
        value, accuracy, upper = (t.to(dtype) for t in found.numbers.unbind(1))
        return Estimate(value, accuracy, upper, found.products, found.settled)


def _pull(output: Tensor, at: Tensor, rows: Tensor, create_graph: bool = False) -> Tensor:
    """The gradient of ``rows . output`` at ``at``; zeros where the output does not depend on it."""
    if not output.requires_grad:
        return torch.zeros_like(at)
    (grad,) = torch.autograd.grad(
        output, at, rows, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return torch.zeros_like(at) if grad is None else grad


@torch.no_grad()
def _equilibrium(
    cell: Any, layer: DEQLayer | None, x: Any, context: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[Any, Tensor]:
    """The state that the layer, or ``DEQLayer(cell)``, finds, and which samples have none."""
    if not isinstance(x, Tensor) and not hasattr(cell, "initial_state"):
        raise TypeError(
            f"no start for the solve: x is a {type(x).__name__}, so pass the state as z=..., or "
            "define initial_state(x) on the cell."
        )
    probe = DEQLayer(cell)  # not the layer itself: it keeps a record of its solves
    if layer is not None:
        probe.options = layer.options
    z = probe(x, *context, **keywords)
    assert probe.last_solution is not None
    if probe.options.has_aux:
        z, _ = z
    return z, probe.last_solution.nonfinite
