"""Initialisation of the square weights of any module, in the style of ``torch.nn.init``: in place,
without a gradient, returning what was given.

A DEQ ``z = f(z, x)`` is sensitive to the statistics of the weights that its state runs through.
These functions give every square weight of a module one of the three families of
:class:`fastdeq.Dense`, :class:`fastdeq.Orthogonal` and :class:`fastdeq.Symmetric`, at a scale::

    fastdeq.init.orthogonal_(block, 0.9)
    fastdeq.init.symmetric_(block, 0.9, names="mix.*", generator=g)

What counts as square:

- a matrix ``(d, d)`` of any module, but for tables of embeddings;
- with ``blocks=True`` also one of several square blocks, each drawn on its own: ``(3d, d)`` as
  ``nn.MultiheadAttention.in_proj_weight``, the ``(4d, d)`` of an LSTM, ``(d, 2d)``;
- the kernel of a convolution with as many channels in as out, no groups and odd sizes: its centre
  tap is drawn, the others are zero, so that the map on images has the matrix's spectrum
  ("delta-orthogonal": Xiao et al., ICML 2018, arXiv 1806.05393).
"""

from __future__ import annotations

import math
import numbers
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .conventions import Convention, check_convention, radius_of
from .errors import check_choice
from .weights import WEIGHTS, OrthogonalMap, SymmetricMap, WeightName
from .weights.dense import Structured
from .weights.draw import drawn
from .weights.orthogonal import Orthogonal
from .weights.square import Names, Square, check_writable, find_squares, why_not_square, write

_Target = TypeVar("_Target", bound=nn.Module | Tensor)
_Module = TypeVar("_Module", bound=nn.Module)


def dense_(
    target: _Target,
    scale: float,
    *,
    names: Names = None,
    blocks: bool = False,
    convention: Convention = "spectral_radius",
    generator: torch.Generator | None = None,
) -> _Target:
    """Independent normal entries of variance ``scale^2 / d``, as :class:`fastdeq.Dense` has them.

    The arguments are those of :func:`initialize_`.
    """
    return initialize_(
        target,
        "dense",
        scale,
        names=names,
        blocks=blocks,
        convention=convention,
        generator=generator,
    )


def orthogonal_(
    target: _Target,
    scale: float,
    *,
    names: Names = None,
    blocks: bool = False,
    convention: Convention = "spectral_radius",
    generator: torch.Generator | None = None,
) -> _Target:
    """``scale * Q`` with Q orthogonal and Haar distributed, as :class:`fastdeq.Orthogonal` has it.

    The arguments are those of :func:`initialize_`. Training leaves the family: see :func:`keep_`.
    """
    return initialize_(
        target,
        "orthogonal",
        scale,
        names=names,
        blocks=blocks,
        convention=convention,
        generator=generator,
    )


def symmetric_(
    target: _Target,
    scale: float,
    *,
    names: Names = None,
    blocks: bool = False,
    convention: Convention = "spectral_radius",
    generator: torch.Generator | None = None,
) -> _Target:
    """``W = W^T`` of variance ``scale^2 / (4 d)`` off the diagonal and twice that on it, as
    :class:`fastdeq.Symmetric` has it.

    The arguments are those of :func:`initialize_`. Training leaves the family: see :func:`keep_`.
    """
    return initialize_(
        target,
        "symmetric",
        scale,
        names=names,
        blocks=blocks,
        convention=convention,
        generator=generator,
    )


@torch.no_grad()
def initialize_(
    target: _Target,
    family: WeightName,
    scale: float,
    *,
    names: Names = None,
    blocks: bool = False,
    convention: Convention = "spectral_radius",
    generator: torch.Generator | None = None,
) -> _Target:
    """Draws the square weights of a module, or a tensor, in a family by name.

    Weights of half precision are drawn in float32 and rounded. On the meta device nothing is drawn.
    A parametrised weight (``torch.nn.utils.parametrize``) is assigned, which goes through
    ``right_inverse``. A weight module of fastdeq takes its own family, at the new scale.

    Args:
        target: a module, or a tensor: ``(d, d)``, or a kernel ``(c, c, ...)`` of odd sizes. Real
            floating point.
        family: "dense", "orthogonal" or "symmetric".
        scale: spectral radius of each square matrix in the limit of large d, >= 0; another number
            with ``convention="variance"``.
        names: which weights of a module: a pattern as of ``fnmatch`` for names such as
            "mix.weight", several patterns, or a function of a name. None: all square ones.
        blocks: whether matrices of several square blocks count, such as ``(3d, d)``.
        convention: "spectral_radius", or "variance": entries have variance ``scale^2 / d`` in each
            family, and the radius of symmetric ones is ``2 scale``.
        generator: of the numbers, on the device of the weights; None: the global one.

    Returns:
        ``target``.

    Raises:
        TypeError: a target that is neither, or a dtype that is not real floating point.
        ValueError: no square weight, with what there is; a parametrisation that cannot take on such
            a weight; weights that hooks compute, or that are sharded; options out of range. Nothing
            has changed then, but where one of several parametrised weights is refused.

    Source: Agarwala and Schoenholz, ICML 2022, who find DEQs sensitive to the higher-order
    statistics of their weights, and orthogonal or symmetric ones to train stably over a broader
    range of scales.
    """
    check_choice(family, WEIGHTS, "family")
    check_convention(convention)
    _check_scale(scale)
    radius = radius_of(family, float(scale), convention)
    squares = _squares(target, names, blocks)
    for square in squares:
        check_writable(square)
        _check_family(square, family, radius)
    for square in squares:
        if square.tensor.device.type == "meta":
            continue
        owner = square.owner
        if isinstance(owner, Structured) and owner.parametrized and square.attribute == "weight":
            # The unconstrained matrix of an orthogonal weight starts at Q itself.
            factor = 1.0 if family == "orthogonal" else radius
            square.tensor.copy_(drawn(square, family, factor, generator))
        else:
            write(square, drawn(square, family, radius, generator))
        if type(owner) in WEIGHTS.values() and square.attribute == "weight":
            owner.scale = radius  # type: ignore[union-attr, assignment]
            if isinstance(owner, Orthogonal):
                owner._reset_scale()
    return target


def keep_(
    module: _Module,
    family: Literal["orthogonal", "symmetric"],
    *,
    names: Names = None,
    scale: float | None = None,
) -> _Module:
    """Keeps the square matrices of a module in a family while it trains, by parametrising them with
    :class:`fastdeq.OrthogonalMap` or :class:`fastdeq.SymmetricMap`::

        fastdeq.init.keep_(fastdeq.init.orthogonal_(block, 0.9), "orthogonal")

    The parameters change: make the optimiser afterwards. A matrix outside the family is moved into
    it. ``torch.nn.utils.parametrize.remove_parametrizations`` undoes it.

    Args:
        module: with square matrices ``(d, d)``; convolutions and blocks are not for this.
        family: "orthogonal" or "symmetric".
        names: which, as in :func:`initialize_`.
        scale: of orthogonal ones, every singular value at all times, > 0; None: the root mean
            square of those of the matrix now, which is s for ``s Q``.

    Returns:
        ``module``.

    Raises:
        TypeError: no module.
        ValueError: no square matrix; one that is parametrised already, or a weight module of
            fastdeq, which keeps its family by itself; a scale for symmetric ones.
    """
    check_choice(family, ("orthogonal", "symmetric"), "family")
    if not isinstance(module, nn.Module):
        raise TypeError(f"keep_ parametrises a module, not {type(module).__name__}.")
    if scale is not None:
        _check_scale(scale)
        if family == "symmetric" or scale == 0:
            raise ValueError('keep_ takes a scale > 0 for family="orthogonal" alone.')
    squares = find_squares(module, names)
    for square in squares:
        check_writable(square)
        if square.parametrized or isinstance(square.owner, tuple(WEIGHTS.values())):
            raise ValueError(
                f"{square.name} is parametrised already, or belongs to a weight of fastdeq (take "
                f'weight="{family}" there): leave it out by names=.'
            )
        if square.tensor.dim() > 2:
            raise ValueError(
                f"{square.name} is the kernel of a convolution, which keep_ does not parametrise: "
                "leave it out by names=."
            )
    for square in squares:
        assert square.owner is not None
        kept: nn.Module = SymmetricMap()
        if family == "orthogonal":
            norm = float(torch.linalg.vector_norm(square.tensor.detach().float()))
            kept = OrthogonalMap(scale or norm / math.sqrt(square.size))
        parametrize.register_parametrization(square.owner, square.attribute, kept)
    return module


def _squares(target: object, names: Names, blocks: bool) -> list[Square]:
    if isinstance(target, nn.Module):
        return find_squares(target, names, blocks)
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a module or a tensor, not {type(target).__name__}.")
    if names is not None:
        raise ValueError("names= chooses weights of a module; this target is a tensor.")
    reason = why_not_square(target, None, blocks)
    if reason is not None:
        raise ValueError(f"the tensor of shape {tuple(target.shape)} {reason}.")
    return [Square("the tensor", None, "", target)]


def _check_family(square: Square, family: str, radius: float) -> None:
    """A weight module of fastdeq that keeps a structure takes its own family only."""
    owner = square.owner
    if not isinstance(owner, Structured) or not owner.parametrized:
        return
    known = [name for name, kind in WEIGHTS.items() if type(owner) is kind]
    if known != [family]:
        raise ValueError(
            f"{square.name} belongs to {owner!r}, which keeps its own structure, not that of "
            f"family={family!r}: replace it, cell.weight = fastdeq.{WEIGHTS[family].__name__}(...)."
        )
    most = getattr(owner, "max_scale", None)
    if most is not None and not 0 < radius < most:
        raise ValueError(
            f"{square.name} has a learned scale in (0, {most}); got a scale of {radius}."
        )


def _check_scale(scale: object) -> None:
    real = isinstance(scale, numbers.Real) and not isinstance(scale, bool)
    if not real or not 0 <= scale < math.inf:  # type: ignore[operator]
        raise ValueError(f"scale must be a finite number >= 0 such as 0.9, got {scale!r}.")
