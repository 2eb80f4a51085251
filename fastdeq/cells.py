"""The affine cell ``f(z, x) = phi(W z + U x + b)``, the one that is fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .activations import ACTIVATIONS, Activation, ActivationName
from .errors import check_choice, lists_options
from .samples import plain_tensor
from .solvers import Structure
from .weights import Statement, WeightName, is_modified, make_weight, stated

_ALMOST_SYMMETRIC = 1e-2  # what rounding to bfloat16 may do
_PARTS = ("forward", "phi", "inject", "injection_of", "recurrent_weight", "initial_state")


class AffineCell(nn.Module):
    """``f(z, x) = phi(W z + U x + b)``: z ``(..., features)``, x ``(..., in_features)``.

    Leading dimensions are as in ``nn.Linear``: each vector is a sample.

    Args:
        in_features: size n of the input, >= 1.
        features: size d of the state, >= 1.
        activation: a name from ``fastdeq.ACTIVATIONS``.
        weight: "dense", "orthogonal", "symmetric", or a module whose ``forward()`` is W ``(d, d)``.
            What it states of W (tags, a norm bound) is believed while nothing that may change W is
            attached to it: hooks, a patched method.
        scale: spectral radius of W in the limit of large d, for the three named families; None: 0.9
            for those, and nothing else beside a module.
        bias: whether b is learned.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        injection: the map U x + b, an ``nn.Linear``. Another module may take its place: it gets x
            as it is, and returns c ``(B, features)`` in the dtype of W.

    Raises:
        ValueError, TypeError: unknown names or options, with the valid ones; sizes below 1.
    """

    _known_structure: tuple[Statement, str, Structure] | None = None
    _looked_at: tuple[nn.Module, ...] = ()  # the weight whose tags were compared with W

    @lists_options("AffineCell")
    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        activation: ActivationName = "tanh",
        weight: WeightName | nn.Module = "dense",
        scale: float | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if in_features < 1 or features < 1:
            raise ValueError(
                f"in_features and features must be >= 1, got {in_features} and {features}."
            )
        check_choice(activation, ACTIVATIONS, "activation")
        self.in_features = in_features
        self.features = features
        self.activation = activation
        self.weight = make_weight(weight, features, scale, device, dtype)
        self.injection: nn.Module = nn.Linear(
            in_features, features, bias=bias, device=device, dtype=dtype
        )

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
        module = self.weight
        weight: Any = module()
        if not isinstance(weight, Tensor):
            raise TypeError(
                f"{type(module).__name__} returned a {type(weight).__name__}; its forward() "
                f"must return W ({self.features}, {self.features})."
            )
        if weight.shape != (self.features, self.features):
            raise ValueError(
                f"{type(module).__name__} returned a weight of shape {tuple(weight.shape)}; "
                f"AffineCell(features={self.features}) needs ({self.features}, {self.features})."
            )
        if not (self._looked_at and self._looked_at[0] is module):
            self._check_tags(module, weight.detach())
        return plain_tensor(weight)

    def _check_tags(self, module: nn.Module, weight: Tensor) -> None:
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor
        if torch.compiler.is_compiling() or weight.is_meta or wrapped(weight):
            return
        if weight.numel() and type(weight) is Tensor and not weight.untyped_storage().size():
            raise RuntimeError(
                f"the memory of the W that {type(module).__name__} returned is free: fully_shard "
                "frees what it gathered for a module once that has returned, and this one returned "
                "its parameter. Shard the layer as a whole: fully_shard(layer)."
            )
        statement = stated(module)
        if "symmetric" in statement.tags and not statement.bitwise_symmetric:
            if not weight.isfinite().all():
                return  # not to be judged yet
            self._check_symmetry(weight)
        if not is_modified(module):  # what it states will count when it is not
            self._looked_at = (module,)

    def _check_symmetry(self, weight: Tensor) -> None:
        apart = float((weight - weight.t()).abs().amax() / weight.abs().amax().clamp(min=1e-30))
        if apart > _ALMOST_SYMMETRIC:
            raise ValueError(
                f'{type(self.weight).__name__} has the tag "symmetric", but its W is not: entries '
                f"W_ij and W_ji differ by up to {apart:.1e} of the largest. Leave the tag out."
            )

    def inject(self, x: Tensor) -> Tensor:
        """``c = U x + b``, ``(..., features)``, for x ``(..., in_features)``; where ``injection``
        was replaced by another module, what that returns for any x with the batch first.

        Raises:
            TypeError, ValueError: x of another shape, dtype or device than the cell's; where
                ``injection`` was replaced, a c that does not suit W.
        """
        return self.injection_of(self.checked_input(x))

    def injection_of(self, x: Tensor) -> Tensor:
        """``inject`` for what ``checked_input`` returned."""
        c = self.injection(x)
        if not self._has_linear_injection():
            self._check_injection(c, x)
        return plain_tensor(c)

    def checked_input(self, x: Tensor) -> Tensor:
        """x as ``injection`` takes it, a plain tensor where that is an ``nn.Linear``, or an error
        as of ``check_input``."""
        self.check_input(x)
        return x if type(x) is Tensor or not self._has_linear_injection() else plain_tensor(x)

    def _has_linear_injection(self) -> bool:
        """Whether x has to be what an ``nn.Linear`` into this cell takes."""
        injection = self._modules["injection"]
        return (
            type(injection) is nn.Linear
            and injection.out_features == self.features
            and not is_modified(injection)
        )

    def is_plain(self) -> bool:
        """Whether this really is the affine map: nothing overridden, no hooks to be run."""
        if (
            self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
        ):
            return False
        own = self.__dict__
        if "forward" in own or "inject" in own or "recurrent_weight" in own:
            return False
        if "injection_of" in own or "initial_state" in own:
            return False
        kind = type(self)
        return kind is AffineCell or all(getattr(kind, p) is getattr(AffineCell, p) for p in _PARTS)

    def takes_vectors(self, x: Tensor) -> bool:
        """Whether each vector of x ``(..., in_features)`` is a sample of the cell."""
        u = self._modules["injection"]
        if not isinstance(u, nn.Linear) or type(u).forward is not nn.Linear.forward:
            return False
        if x.dim() == 0 or x.shape[-1] != u.in_features:
            return False
        kind, own = type(self), self.__dict__
        return all(p not in own and getattr(kind, p) is getattr(AffineCell, p) for p in _PARTS)

    def initial_state(self, x: Tensor) -> Tensor:
        """The default start of a solve: zeros ``(..., features)``."""
        if self._has_linear_injection():
            return plain_tensor(x).new_zeros((*x.shape[:-1], self.features))
        with torch.no_grad():
            return torch.zeros_like(self.inject(x))

    def structure(self) -> Structure:
        """What is certain of the map: the weight's tags and a bound on its Lipschitz constant."""
        statement = stated(self.weight)
        known = self._known_structure
        if known is None or known[0] != statement or known[1] != self.activation:
            known = statement, self.activation, _structure(statement, self.phi)
            if not torch.compiler.is_compiling():
                self._known_structure = known
        return known[2]

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """One step ``f(z, x)``, ``(..., features)``."""
        return self.phi.function(z @ self.recurrent_weight().t() + self.inject(x))

    def check_input(self, x: Tensor) -> None:
        """Raises TypeError or ValueError unless x suits ``inject``; another module than an
        ``nn.Linear`` judges its own input."""
        if not self._has_linear_injection():
            return
        injection: Any = self._modules["injection"]
        u = injection._parameters.get("weight")
        if (
            type(x) is Tensor
            and u is not None
            and x.dtype == u.dtype
            and x.device == u.device
            and x.dim() > 0
            and x.shape[-1] == injection.in_features
        ):
            return
        if not isinstance(x, Tensor):
            raise TypeError(
                f"x must be a tensor (..., {injection.in_features}), not {type(x).__name__}."
            )
        if x.dim() == 0 or x.shape[-1] != injection.in_features:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; AffineCell needs (..., {injection.in_features})."
            )
        if not x.is_floating_point():
            raise TypeError(f"x has dtype {x.dtype}; floating point is needed, e.g. x.float().")
        parameter = injection.weight
        if x.device != parameter.device:
            raise ValueError(
                f"x is on {x.device} and the cell on {parameter.device}; move one of them."
            )
        if x.dtype != parameter.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(
                f"x has dtype {x.dtype} and the cell {parameter.dtype}; convert one of them, e.g. "
                f"x.to({parameter.dtype}) or cell.to({x.dtype}), or run under torch.autocast."
            )

    def _check_injection(self, c: Any, x: Any) -> None:
        """Raises TypeError or ValueError unless c is an injection for the samples of x."""
        name = f"injection ({type(self.injection).__name__})"
        needed = f"c (B, {self.features}), one row for each sample of x"
        if not isinstance(c, Tensor):
            raise TypeError(f"{name} returned a {type(c).__name__}; it must return {needed}.")
        batch_first = not isinstance(x, Tensor) or x.dim() == 0 or x.shape[:1] == c.shape[:1]
        fits = c.dim() == 2 and c.shape[1] == self.features and batch_first
        if isinstance(x, Tensor) and self.takes_vectors(x):
            fits = c.shape == (*x.shape[:-1], self.features)
        if not fits:
            given = f" for x {tuple(x.shape)}" if isinstance(x, Tensor) else ""
            raise ValueError(
                f"{name} returned a tensor of shape {tuple(c.shape)}{given}; it must return "
                f"{needed}."
            )
        parameters = (*self.weight.parameters(), *self.weight.buffers())
        w = next((t for t in parameters if t.is_floating_point()), None)
        like = c if w is None else w
        if c.device != like.device:
            raise ValueError(
                f"{name} returned c on {c.device}, and W is on {like.device}; move one of them."
            )
        autocast = torch.is_autocast_enabled(c.device.type)
        if not c.is_floating_point() or (c.dtype != like.dtype and not autocast):
            raise TypeError(
                f"{name} returned c in {c.dtype}, and W is in {like.dtype}; c must be floating "
                "point in the dtype of W, or run under torch.autocast."
            )

    def check_state(self, z: Tensor, injection: Tensor) -> Tensor:
        """z as a start of the solve, a plain tensor, or an error that says what it should be."""
        if not isinstance(z, Tensor) or z.shape != injection.shape:
            got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ValueError(f"z0 is {got}; it must have shape {tuple(injection.shape)}.")
        if not z.is_floating_point() or z.device != injection.device:
            raise TypeError(
                f"z0 is {z.dtype} on {z.device}; it must be floating point on {injection.device}."
            )
        return plain_tensor(z)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.features}, activation={self.activation!r}"


def _structure(statement: Statement, phi: Activation) -> Structure:
    """What follows for ``z -> phi(W z + c)`` from what is certain of W."""
    tags, norm_bound, bitwise_symmetric = statement
    return Structure(
        None if norm_bound is None else norm_bound * phi.lipschitz,
        tags | {"monotone"} if phi.monotone else tags,
        affine=True,
        bitwise_symmetric=bitwise_symmetric,
    )
