"""Plain and damped fixed-point iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..constants import PATIENCE
from .base import CheckedOptions, Problem, Step, Structure, check_integer, check_range

CERTIFIED = "certified"
_MOST_CERTIFIED = 1_000_000


def certified_iterations(contraction: float, tol: float) -> int:
    """Plain steps from zero after which the relative residual is at most ``tol``, whatever the map.

    With ``|f(a) - f(b)| <= s |a - b|``, s < 1, and ``e = |z*|`` the error at the start, the error
    after k steps is at most ``s^k e``, the residual ``(1 + s) s^k e``, and ``|f(z_k)|`` at least
    ``(1 - s^(k+1)) e``.

    Raises:
        ValueError: no contraction, or a tolerance that takes more than a million steps.
    """
    s = contraction
    if not 0 <= s < 1:
        raise ValueError(f"a certified iteration count needs a contraction below 1, not {s!r}.")
    k = 1
    if s > 0:
        k = max(1, math.ceil(math.log(tol / (1 + s + s * tol)) / math.log(s))) if tol > 0 else 0
    if not 1 <= k <= _MOST_CERTIFIED:
        raise ValueError(f"no certified iteration count up to a million for s={s!r}, tol={tol!r}.")
    return k


@dataclass(frozen=True)
class Picard(CheckedOptions):
    """``z <- z + damping * (f(z) - z)``; linear on contractions.

    Args:
        damping: in (0, 1].
        fixed_iterations: so many steps, whatever ``max_iter``, and no stop test, so that nothing
            waits for a number from the device; the residual of the last one is reported. 0: until
            ``tol`` or ``max_iter``. "certified": as many as ``tol`` needs in the worst case, from a
            start at zero, for a map known to contract (``Orthogonal`` with a scale below 1).
    """

    damping: float = 1.0
    fixed_iterations: int | str = 0

    name: ClassVar[str] = "picard"
    linear: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    patience: ClassVar[int] = PATIENCE
    rejects: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_range(owner, "damping", self.damping, 1e-12, 1.0, "in (0, 1]")
        fixed = self.fixed_iterations
        if fixed == CERTIFIED:
            if self.damping != 1.0:
                raise ValueError(f'{owner}(fixed_iterations="certified") takes no damping.')
            return
        if isinstance(fixed, str):
            raise ValueError(
                f"{owner}(fixed_iterations={fixed!r}): fixed_iterations must be an integer or "
                '"certified".'
            )
        fixed = check_integer(owner, "fixed_iterations", fixed, 0, 10**9)
        object.__setattr__(self, "fixed_iterations", fixed)

    def resolved(self, structure: Structure, tol: float) -> Picard:
        """The same with a number in the place of "certified"."""
        if self.fixed_iterations != CERTIFIED:
            return self
        if structure.contraction is None or structure.contraction >= 1:
            raise ValueError(
                'fixed_iterations="certified" needs a map known to contract, such as an '
                'AffineCell with weight="orthogonal", a scale below 1 and a nonexpansive '
                "activation and no hooks or overridden methods; the bound on its Lipschitz "
                f"constant is {structure.contraction}."
            )
        resolved = object.__new__(type(self))  # a compiler cannot follow a dataclass's own way
        object.__setattr__(resolved, "damping", self.damping)
        count = certified_iterations(structure.contraction, tol)
        object.__setattr__(resolved, "fixed_iterations", count)
        return resolved

    def init(self, point: Tensor, problem: Problem) -> None:
        return None

    def step(self, state: Any, point: Tensor, value: Tensor, norm: Tensor, running: Tensor) -> Step:
        following = value if self.damping == 1.0 else point + self.damping * (value - point)
        return Step(following, None, ~norm.isfinite())

    def counters(self, state: Any) -> tuple[Tensor, ...]:
        return ()
