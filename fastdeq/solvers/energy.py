"""The energy solver: forward solves with symmetric weights and a monotone activation.

    E(z) = sum Phi*(z_i) - z^T W z / 2 - c^T z,     grad E = -s,   s = (W z + c) - a,  z = phi(a)

Phi is the primitive of phi and Phi* its conjugate. The solutions of ``z = phi(W z + c)`` are the
stationary points of E. The iteration lives in a, which needs no inverse of phi and keeps z in its
range. With ``D = phi'(a)``, ``h = D^1/2``:

    (I - h W h) v = h s          by conjugate gradients, to a residual of min(0.7, rho^0.2) times
                                 the first, or up to and along a direction of negative curvature
    a' = a + t (s + W h v)       t = 1, 1/2, ... until E falls, at last without W h v

rho is the relative residual. v = 0 gives the plain step; every step so cut short goes downhill, as
the residuals of conjugate gradients are orthogonal to h s and their directions conjugate. Each
direction costs one product with W, each trial one more, which also verifies the residual there. E
never rises from the first trial on; for a bounded phi it is bounded below, whatever the scale of W.

The change of E is computed without E, from small differences only:

    E(z') - E(z) = -(s + s')^T (z' - z) / 2 + sum kappa_i
    kappa = (a' - a) (z + z') / 2 - (Phi(a') - Phi(a)),    (a' - a)^2 (D' - D) / 12  for small steps

kappa being the error of the trapezoidal rule for phi, and the second form its leading term.

Sources: energy: J. Hopfield, PNAS 81 (1984) 3088. Inexact Newton: S. Eisenstat and H. Walker, SIAM
J. Sci. Comput. 17 (1996) 16; T. Steihaug, SIAM J. Numer. Anal. 20 (1983) 626.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..activations import Activation
from ..constants import (
    ASSUMED_CURVATURE,
    FIRST_RADIUS,
    FLOOR_HALVINGS,
    FORCING_POWER,
    LEAST_CURVATURE,
    MOST_FORCING,
    MOST_HALVINGS,
    NEWTON_HALVINGS,
    PATIENCE_ENERGY,
    RESIDUAL_EPS,
    ROUNDING_FLOOR,
    SMALL_STEP,
    SUFFICIENT_DECREASE,
)
from .base import AffineMap, CheckedOptions, Problem, Step, check_integer, where_rows
from .heavy_ball import Momentum

# What the point of evaluation is: a heavy-ball iterate, the first iterate of the descent, a
# direction of conjugate gradients, a trial.
_MOMENTUM, _OPEN, _DIRECTION, _TRIAL = 0, 1, 2, 3


@dataclass
class _State:
    map: AffineMap
    momentum: Momentum
    mode: Tensor  # (B,) int8
    fresh: bool
    lowest: Tensor  # (B,): lowest relative residual under momentum
    a: Tensor  # (B, n), and z = phi(a)
    z: Tensor
    s: Tensor
    h: Tensor
    slope: Tensor  # D
    da: Tensor  # the step, s + W h v so far
    residual: Tensor  # of conjugate gradients, their direction, and its length squared
    direction: Tensor
    square: Tensor  # (B,) |residual|^2
    goal: Tensor  # (B,) of it
    directions: Tensor  # (B,) int32: used in this step
    t: Tensor  # (B,)
    halvings: Tensor  # (B,) int32, of this step
    floor: Tensor  # (B,) bool: the step began near the rounding floor
    energy: Tensor  # (B,) int32 counter
    curvature: Tensor
    trial: Tensor  # (B, n): a + t da


@dataclass(frozen=True)
class Energy(CheckedOptions):
    """Descent on the energy of a symmetric cell by truncated Newton steps.

    Args:
        momentum: begin with heavy-ball steps, which are cheaper where the map contracts; the
            descent goes on from a sample's best iterate after the first six of them that do not
            halve its residual.
        most_directions: of conjugate gradients per step, >= 1.
    """

    momentum: bool = False
    most_directions: int = 60

    name: ClassVar[str] = "energy"
    linear: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"symmetric", "monotone"})
    patience: ClassVar[int] = PATIENCE_ENERGY
    waits: ClassVar[bool] = True
    rejects: ClassVar[tuple[str, ...]] = ("energy", "curvature")

    def __post_init__(self) -> None:
        momentum = check_integer("Energy", "momentum", self.momentum, 0, 1)  # a switch
        object.__setattr__(self, "momentum", bool(momentum))
        most = check_integer("Energy", "most_directions", self.most_directions, 1, 10_000)
        object.__setattr__(self, "most_directions", most)

    def init(self, point: Tensor, problem: Problem) -> _State:
        assert problem.affine is not None
        rows, zeros = torch.zeros_like(point), point.new_zeros(len(point))
        counter = torch.zeros(len(point), dtype=torch.int32, device=point.device)
        first = _MOMENTUM if self.momentum else _OPEN
        return _State(
            map=problem.affine,
            momentum=Momentum.start(point, FIRST_RADIUS),
            mode=torch.full_like(counter, first, dtype=torch.int8),
            fresh=True,
            lowest=torch.full_like(zeros, torch.inf),
            **dict.fromkeys(("a", "z", "s", "h", "slope", "da", "residual", "direction"), rows),
            square=zeros,
            goal=zeros,
            directions=counter.clone(),
            t=torch.ones_like(zeros),
            halvings=counter.clone(),
            floor=counter.bool(),
            energy=counter.clone(),
            curvature=counter.clone(),
            trial=rows,
        )

    def step(
        self, state: _State, point: Tensor, value: Tensor, norm: Tensor, running: Tensor
    ) -> Step:
        phi, pre = state.map.activation, state.map.pre
        assert phi is not None
        mode, finite = state.mode, norm.isfinite()
        following = point
        open_next = torch.zeros_like(finite)  # evaluate phi(a) next
        if state.fresh:
            state.fresh = False
            state.a = pre
            open_next = (mode == _OPEN) & finite
        failed = (mode <= _OPEN) & ~finite & ~open_next

        if bool((mode == _MOMENTUM).any()):
            heavy = mode == _MOMENTUM
            relative = norm / (torch.linalg.vector_norm(value, dim=1) + RESIDUAL_EPS)
            lower = heavy & (relative < state.lowest)
            state.a = where_rows(lower, pre, state.a)
            state.lowest = torch.where(lower, relative, state.lowest)
            following, slow = state.momentum.step(point, value, norm)
            switches = heavy & (slow | ~finite) & state.lowest.isfinite()
            failed = failed & ~switches
            open_next = open_next | switches
            following = where_rows(heavy, following, point)

        trial = mode == _TRIAL
        accepted = (mode == _OPEN) & ~open_next
        if bool(trial.any()):
            fell = self._energy_falls(state, phi, point, pre)
            accepted = accepted | (trial & fell)
            rejected = trial & ~fell
            state.energy += rejected & running
            state.halvings = torch.where(rejected, state.halvings + 1, 0)
            state.t = torch.where(rejected, 0.5 * state.t, 1.0)
            plain = rejected & (state.halvings == NEWTON_HALVINGS)
            state.da = where_rows(plain, state.s, state.da)
            state.t = torch.where(plain, 1.0, state.t)
            state.a = where_rows(trial & fell, state.trial, state.a)
        done = self._conjugate_gradients(state, mode == _DIRECTION, running)
        if bool(accepted.any()):
            size = torch.linalg.vector_norm(value, dim=1)
            self._begin(state, phi, accepted, point, pre, norm / size)
        # Where there is nothing to solve for (D = 0 everywhere), the plain step.
        done = done | (accepted & (state.square == 0))

        state.trial = state.a + state.t.unsqueeze(1) * state.da
        tries = done | (trial & ~accepted)
        directs = (mode == _DIRECTION) & ~done | (accepted & ~done)
        following = where_rows(open_next, phi.function(state.a), following)
        following = where_rows(tries, phi.function(state.trial), following)
        following = where_rows(directs, state.h * state.direction, following)
        state.mode = torch.where(open_next, _OPEN, mode)
        state.mode = torch.where(tries, _TRIAL, state.mode)
        state.mode = torch.where(directs, _DIRECTION, state.mode).to(torch.int8)
        most = torch.where(state.floor, FLOOR_HALVINGS, MOST_HALVINGS)
        return Step(following, state.mode != _DIRECTION, failed, state.halvings > most)

    def _energy_falls(self, state: _State, phi: Activation, z: Tensor, pre: Tensor) -> Tensor:
        """Whether E at the trial, evaluated at z with pre-activation pre, is low enough."""
        assert phi.primitive is not None
        slope = phi.slope(state.trial)
        da, dz = state.trial - state.a, z - state.z
        gap = 0.5 * da * (z + state.z) - (phi.primitive(state.trial) - phi.primitive(state.a))
        small = da * da * (slope - state.slope) / 12
        kappa = torch.where((da.abs() < SMALL_STEP) & phi.smooth, small, gap)
        # On one linear piece, or one saturated side, the first form is rounding error alone.
        alike = (slope == state.slope) & ((state.trial > 0) == (state.a > 0))
        kappa = torch.where(alike, 0.0, kappa)
        change = kappa - 0.5 * (state.s + (pre - state.trial)) * dz
        promised = (state.slope * state.s * da).double().sum(1)
        return change.double().sum(1) <= -SUFFICIENT_DECREASE * promised  # false for NaN

    def _begin(
        self,
        state: _State,
        phi: Activation,
        rows: Tensor,
        z: Tensor,
        pre: Tensor,
        relative: Tensor,
    ) -> None:
        """A new step from z = phi(a), for the samples ``rows``."""
        slope = phi.slope(state.a)
        s, h = pre - state.a, slope.sqrt()
        rhs = h * s
        square = rhs.square().double().sum(1).to(rhs.dtype)
        forcing = (relative**FORCING_POWER).clamp(max=MOST_FORCING)
        state.z, state.s = where_rows(rows, z, state.z), where_rows(rows, s, state.s)
        state.slope, state.h = where_rows(rows, slope, state.slope), where_rows(rows, h, state.h)
        state.da = where_rows(rows, s, state.da)
        state.residual = where_rows(rows, rhs, state.residual)
        state.direction = where_rows(rows, rhs, state.direction)
        state.square = torch.where(rows, square, state.square)
        state.goal = torch.where(rows, forcing * forcing * square, state.goal)
        state.directions = torch.where(rows, 0, state.directions)
        state.halvings = torch.where(rows, 0, state.halvings)
        floor = ROUNDING_FLOOR * torch.finfo(z.dtype).eps
        state.floor = torch.where(rows, relative < floor, state.floor)

    def _conjugate_gradients(self, state: _State, rows: Tensor, running: Tensor) -> Tensor:
        """One step for the samples ``rows``; returns those that are done."""
        if not bool(rows.any()):
            return rows
        product = state.map.product
        image = state.direction - state.h * product
        length = state.direction.square().double().sum(1)
        curvature = (state.direction * image).double().sum(1)
        flat = ~(curvature > LEAST_CURVATURE * length)  # true for NaN
        state.curvature += rows & flat & running
        goes_on = rows & ~flat
        assumed = torch.maximum(curvature.abs(), ASSUMED_CURVATURE * length)
        alpha = (state.square / torch.where(flat, assumed, curvature)).to(product.dtype)
        moved = state.da + alpha.unsqueeze(1) * product
        state.da = where_rows(rows & curvature.isfinite(), moved, state.da)
        residual = state.residual - alpha.unsqueeze(1) * image
        square = residual.square().double().sum(1).to(product.dtype)
        direction = residual + (square / state.square).unsqueeze(1) * state.direction
        state.residual = where_rows(goes_on, residual, state.residual)
        state.direction = where_rows(goes_on, direction, state.direction)
        state.square = torch.where(goes_on, square, state.square)
        state.directions = state.directions + goes_on
        enough = (state.square <= state.goal) | (state.directions >= self.most_directions)
        return rows & (flat | enough)

    def counters(self, state: _State) -> tuple[Tensor, ...]:
        return state.energy, state.curvature
