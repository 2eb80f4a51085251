"""The affine cell ``f(z, x) = phi(W z + U x + b)``, the one that is fused."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor, nn

from .activations import ACTIVATIONS, Activation
from .errors import check_choice, check_options
from .solvers import Structure
from .weights import TAGS, WEIGHTS, Symmetric, make_weight

_ALMOST_SYMMETRIC = 1e-2  # what rounding to bfloat16 may do


class AffineCell(nn.Module):
    """``f(z, x) = phi(W z + U x + b)`` on rows: z ``(B, features)``, x ``(B, in_features)``.

    Args:
        in_features: size n of the input, >= 1.
        features: size d of the state, >= 1.
        activation: a name from ``fastdeq.ACTIVATIONS``.
        weight: "dense", "orthogonal", "symmetric", or a module whose ``forward()`` is W ``(d, d)``.
        scale: spectral radius of W in the limit of large d, for the three named families.
        bias: whether b is learned.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError, TypeError: unknown names or options, with the valid ones; sizes below 1.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        activation: str = "tanh",
        weight: str | nn.Module = "dense",
        scale: float | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **unknown: object,
    ):
        super().__init__()
        valid = ("activation", "weight", "scale", "bias", "device", "dtype")
        check_options(unknown, valid, "AffineCell")
        if in_features < 1 or features < 1:
            raise ValueError(
                f"in_features and features must be >= 1, got {in_features} and {features}."
            )
        check_choice(activation, ACTIVATIONS, "activation")
        self.in_features = in_features
        self.features = features
        self.activation = activation
        self.weight = make_weight(weight, features, scale, device, dtype)
        self.injection = nn.Linear(in_features, features, bias=bias, device=device, dtype=dtype)
        self._checked_weight: int | None = None  # the id of the weight whose tags were looked at

    @property
    def phi(self) -> Activation:
        """The activation with its slope and properties."""
        return ACTIVATIONS[self.activation]

    def recurrent_weight(self) -> Tensor:
        """W ``(features, features)``.

        Raises:
            ValueError: the weight module returns another shape, or is tagged "symmetric" and is
                not (looked at once for each module).
        """
        weight: Any = self.weight()
        if not isinstance(weight, Tensor):
            raise TypeError(
                f"{type(self.weight).__name__} returned a {type(weight).__name__}; its forward() "
                f"must return W ({self.features}, {self.features})."
            )
        if weight.shape != (self.features, self.features):
            raise ValueError(
                f"{type(self.weight).__name__} returned a weight of shape {tuple(weight.shape)}; "
                f"AffineCell(features={self.features}) needs ({self.features}, {self.features})."
            )
        if self._checked_weight != id(self.weight) and not torch.compiler.is_compiling():
            self._check_tags(weight.detach())
        checked: Tensor = weight
        return checked

    def _check_tags(self, weight: Tensor) -> None:
        own = type(self.weight) in WEIGHTS.values()
        if not own and "symmetric" in self.structure().tags:
            if not weight.isfinite().all():
                return  # not to be judged yet
            self._check_symmetry(weight)
        self._checked_weight = id(self.weight)

    def _check_symmetry(self, weight: Tensor) -> None:
        apart = float((weight - weight.t()).abs().amax() / weight.abs().amax().clamp(min=1e-30))
        if apart > _ALMOST_SYMMETRIC:
            raise ValueError(
                f'{type(self.weight).__name__} has the tag "symmetric", but its W is not: entries '
                f"W_ij and W_ji differ by up to {apart:.1e} of the largest. Leave the tag out."
            )

    def inject(self, x: Tensor) -> Tensor:
        """``c = U x + b``, ``(B, features)``, for x ``(B, in_features)``.

        Raises:
            TypeError, ValueError: x of another shape, dtype or device than the cell's.
        """
        self.check_input(x)
        return self.injection(x)  # type: ignore[no-any-return]

    def is_plain(self) -> bool:
        """Whether this really is the affine map: nothing overridden, no hooks to be run."""
        if (
            self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
        ):
            return False
        parts = ("forward", "phi", "inject", "recurrent_weight", "initial_state")
        kind = type(self)
        return kind is AffineCell or all(getattr(kind, p) is getattr(AffineCell, p) for p in parts)

    def initial_state(self, x: Tensor) -> Tensor:
        """The default start of a solve: zeros ``(B, features)``."""
        return x.new_zeros(len(x), self.features)

    def structure(self) -> Structure:
        """What is certain of the map: the weight's tags and a bound on its Lipschitz constant."""
        tags, norm_bound = _stated(self.weight)
        contraction = None if norm_bound is None else norm_bound * self.phi.lipschitz
        bitwise_symmetric = type(self.weight) is Symmetric and "symmetric" in tags
        if self.phi.monotone:
            tags = tags | {"monotone"}
        return Structure(contraction, tags, affine=True, bitwise_symmetric=bitwise_symmetric)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """One step ``f(z, x)``, ``(B, features)``."""
        return self.phi.function(z @ self.recurrent_weight().t() + self.inject(x))

    def check_input(self, x: Tensor) -> None:
        """Raises TypeError or ValueError unless x suits ``inject``."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor (B, {self.in_features}), not {type(x).__name__}.")
        if x.dim() != 2 or x.shape[1] != self.in_features:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; AffineCell needs (B, {self.in_features}). "
                "Flatten leading dimensions into the batch first."
            )
        if not x.is_floating_point():
            raise TypeError(f"x has dtype {x.dtype}; floating point is needed, e.g. x.float().")
        parameter = self.injection.weight
        if x.device != parameter.device:
            raise ValueError(
                f"x is on {x.device} and the cell on {parameter.device}; move one of them."
            )
        if x.dtype != parameter.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"x has dtype {x.dtype} and the cell {parameter.dtype}; convert one of them, e.g. "
                f"x.to({parameter.dtype}) or cell.to({x.dtype}), or run under torch.autocast."
            )

    def check_state(self, z: Tensor, injection: Tensor) -> Tensor:
        """z as a start of the solve, or an error that says what it should be."""
        if not isinstance(z, Tensor) or z.shape != injection.shape:
            got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"z0 is {got}; it must have shape {tuple(injection.shape)}.")
        if not z.is_floating_point() or z.device != injection.device:
            raise TypeError(
                f"z0 is {z.dtype} on {z.device}; it must be floating point on {injection.device}."
            )
        return z

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.features}, activation={self.activation!r}"


def _stated(weight: nn.Module) -> tuple[frozenset[str], float | None]:
    """What a weight says of itself, or an error that says what it may say."""
    tags: Any = getattr(weight, "tags", frozenset())
    name = type(weight).__name__
    if isinstance(tags, str) or not all(isinstance(tag, str) for tag in tags):
        raise TypeError(
            f'{name}.tags must be a set of names such as {{"symmetric"}}, not {tags!r}.'
        )
    for tag in tags:
        check_choice(tag, TAGS, f"tag of {name}")
    bound = getattr(weight, "norm_bound", None)
    if bound is not None and not callable(bound):
        raise TypeError(f"{name}.norm_bound must be a method that returns a number or None.")
    value: Any = None if bound is None else bound()
    number = value is None or isinstance(value, numbers.Real)
    if not number or (value is not None and not value >= 0):
        raise ValueError(f"{name}.norm_bound() is {value!r}; it must be a number >= 0, or None.")
    return frozenset(tags), None if value is None else float(value)
