"""The square weights of any module: which there are, and how values are written to them."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .dense import Dense

#: Which weights of a module: patterns of their names, or a predicate of a name.
Names: TypeAlias = str | Iterable[str] | Callable[[str], bool] | None

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NO_MAPS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class Square:
    """A weight that consists of square matrices: itself, the centre of a kernel, or blocks.

    Attributes:
        name: as in ``named_parameters``, for a parametrised one that of what it computes.
        owner: the module that has it, None for a tensor alone.
        attribute: its name there.
        tensor: its values.
        parametrized: whether it is computed, by ``torch.nn.utils.parametrize``.
    """

    name: str
    owner: nn.Module | None
    attribute: str
    tensor: Tensor
    parametrized: bool = False

    @property
    def size(self) -> int:
        """d of the square matrices."""
        return min(self.tensor.shape[:2])

    def views(self, values: Tensor) -> list[Tensor]:
        """The square matrices of ``values``, shaped like the weight."""
        if values.dim() > 2:
            for k in reversed(values.shape[2:]):
                values = values.select(-1, k // 2)
            return [values]
        dim = 0 if values.shape[0] >= values.shape[1] else 1
        return list(values.split(self.size, dim))


def find_squares(module: nn.Module, names: Names = None, blocks: bool = False) -> list[Square]:
    """Those of ``module`` whose names fit.

    Raises:
        ValueError: there is none; the message lists what there is instead.
    """
    fits = _chooser(names)
    found, others = [], []
    for candidate in _candidates(module):
        reason = why_not_square(candidate.tensor, candidate.owner, blocks)
        if reason is None and not fits(candidate.name):
            reason = f"is square, but not among names={names!r}"
        if reason is None:
            found.append(candidate)
        elif candidate.tensor.dim() > 1:
            others.append(f"{candidate.name} {tuple(candidate.tensor.shape)} {reason}")
    if not found:
        listed = "; ".join(others[:8]) + ("; ..." if len(others) > 8 else "")
        raise ValueError(
            f"{type(module).__name__} has no square weight: "
            f"{listed or 'it has no matrices at all'}."
        )
    return found


def why_not_square(tensor: Tensor, owner: nn.Module | None, blocks: bool) -> str | None:
    """Why a weight does not count as square; None where it does."""
    shape = tuple(tensor.shape)
    if tensor.dim() < 2:
        return "is no matrix"
    if isinstance(owner, _NO_MAPS):
        return "is a table of embeddings"
    if tensor.dim() == 2:
        rows, columns = shape
        if 0 in shape:
            return "is empty"
        if rows == columns:
            return None
        packed = min(shape) > 1 and max(shape) % min(shape) == 0
        if packed and blocks:
            return None
        hint = f" ({max(shape) // min(shape)} square blocks: pass blocks=True)" if packed else ""
        return f"is not square{hint}"
    if owner is not None and not isinstance(owner, _CONVOLUTIONS):
        return "is neither a matrix nor the kernel of a convolution"
    if tensor.dim() > 5:
        return "has more dimensions than a kernel"
    if getattr(owner, "groups", 1) != 1:
        return "belongs to groups of channels"
    if shape[0] != shape[1] or 0 in shape:
        return "has other channels in than out"
    return None if all(k % 2 for k in shape[2:]) else "has a kernel of even size, without a centre"


@torch.no_grad()
def write(square: Square, values: Tensor) -> None:
    """Gives the weight these values, through its parametrisation where it has one.

    Raises:
        ValueError: the parametrisation cannot take on the values; the weight is as it was.
    """
    if not square.parametrized:
        square.tensor.copy_(values)
        return
    owner: Any = square.owner
    chain = owner.parametrizations[square.attribute]
    kinds = ", ".join(type(part).__name__ for part in chain)
    before = {name: t.clone() for name, t in chain.state_dict().items()}
    wanted = values.to(square.tensor)
    try:
        with _still(chain):
            setattr(owner, square.attribute, wanted)
            now = getattr(owner, square.attribute)
        # Two roundings of each entry, and sums of d products within the map and its inverse.
        allowed = 8 * square.size * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
        if float((now - wanted).abs().max()) <= allowed:
            return
        why = f"turns these values into others (off by {float((now - wanted).abs().max()):.1e})"
    except (NotImplementedError, RuntimeError, ValueError) as error:
        why = f"does not take them ({str(error).splitlines()[0]})"
    chain.load_state_dict(before)
    raise ValueError(
        f"{square.name} is parametrised by {kinds}, which {why}. Initialise the weight before the "
        "parametrisation is registered, in a family and at a scale that the parametrisation can "
        "have, or leave it out by names=."
    )


def _candidates(module: nn.Module) -> Iterator[Square]:
    """Every parameter, and what is computed of parameters in place of one."""
    seen: set[int] = set()
    for prefix, owner in module.named_modules():
        path = prefix.split(".") if prefix else []
        if "parametrizations" in path:
            continue
        computed = (
            getattr(owner, "parametrizations", {}) if parametrize.is_parametrized(owner) else {}
        )
        own = [(name, True) for name in computed]
        own += [(name, False) for name, t in owner._parameters.items() if t is not None]
        for name, parametrized in own:
            with _still(computed[name]) if parametrized else nullcontext():
                tensor = getattr(owner, name)
            full = ".".join([*path, name])
            if isinstance(tensor, nn.UninitializedParameter):
                raise ValueError(f"{full} has no shape yet: call the module once before.")
            if id(tensor) not in seen or parametrized:
                seen.add(id(tensor))
                yield Square(full, owner, name, tensor, parametrized)


@contextmanager
def _still(chain: nn.Module) -> Iterator[None]:
    """No parametrisation changes its buffers, as spectral norm does at each look in training."""
    modes = [(part, part.training) for part in chain.modules()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def check_writable(square: Square) -> None:
    """Raises TypeError or ValueError for a weight that cannot be written to as it is."""
    tensor, owner, name = square.tensor, square.owner, square.attribute
    if not tensor.is_floating_point():
        raise TypeError(
            f"{square.name} has dtype {tensor.dtype}; it must be real floating point. Leave it out "
            "by names=, or initialise its real and its imaginary part."
        )
    if hasattr(tensor, "full_tensor"):
        raise ValueError(f"{square.name} is sharded: initialise the module before it is sharded.")
    if owner is None or isinstance(owner, Dense):
        return
    for end in ("_v", "_orig"):
        stem = name.removesuffix(end)
        if stem != name and stem not in owner._parameters and hasattr(owner, stem):
            raise ValueError(
                f"{square.name} is what hooks of {type(owner).__name__} compute {stem} from "
                "(weight norm, spectral norm or pruning of torch.nn.utils): initialise it before "
                "these are applied, or use torch.nn.utils.parametrizations instead."
            )


def _chooser(names: Names) -> Callable[[str], bool]:
    if names is None:
        return lambda name: True
    if callable(names):
        return lambda name: bool(names(name))
    patterns = [names] if isinstance(names, str) else list(names)
    if not all(isinstance(p, str) for p in patterns):
        raise TypeError(
            'names must be a pattern such as "*.mix.weight", several of them, or a function of a '
            f"name, got {names!r}."
        )
    return lambda name: any(fnmatch.fnmatchcase(name, p) for p in patterns)
