"""Mean field of ``z = phi(W z + c)``: a unit of a wide layer sees a normal field.

Entries of c are independent and normal, with mean 0 and variance ``injection_variance``; W is drawn
once (tied), independently of c. In the limit of large d an entry of z* is ``phi(p)`` with

    p - a phi(p) = h,    h normal with mean 0 and variance  v = e^2 q + injection_variance,
    q = E phi(p)^2,      e the entry scale,

and a reaction a, what a unit gets back of its own output through W:

    dense       a = 0. Conditioned on the other units, row i of W is independent of column i. Exact
                dynamic mean field (Sompolinsky, Crisanti and Sommers, Phys. Rev. Lett. 61 (1988)
                259); q is also that of untied weights (Poole et al., NeurIPS 2016).
    orthogonal  a = 0 to leading order, though rows of Q are not independent: averaged over Q, the
                action depends on fields y_t conjugate to p_t and on states z_t only through the
                spectrum of ``sum_t,t' (y_t.y_t') (z_t.z_t')``, as Q is invariant from both sides.
                All y_t.y_t' vanish at the saddle point, so only the first order is left: normal
                noise of covariance ``s^2 z_t.z_t' / d``, as for dense weights, and no response.
    symmetric   a = e^2 x, with the response ``x = E dz/dh = E[phi' / (1 - a phi')]``: unit i moves
                the others by ``W_ji z_i``, and they answer by ``sum_j W_ij x_j W_ji z_i``
                (Onsager's reaction: Thouless, Anderson and Palmer, Phil. Mag. 35 (1977) 593).

With phi the identity these give ``q = m_1 injection_variance`` of :func:`variance`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..activations import ACTIVATIONS, Activation
from ..errors import check_choice
from .conventions import check_size, check_weight, entry_scale
from .jacobian import Averages, Jacobian, averages, jacobian

_FARTHEST = 1e12  # variance over that of the injection beyond which a length is called infinite
_PLAIN_STEPS, _NEWTON_STEPS = 30, 60


@dataclass(frozen=True)
class Equilibrium:
    """What mean field predicts of an equilibrium of large width, per entry.

    Attributes:
        length: ``q = |z*|^2 / d``.
        field_variance: v, the variance of the field h.
        preactivation_variance: ``E p^2``, which is v where there is no reaction.
        mean_slope: ``E phi'(p)``.
        mean_square_slope: ``E phi'(p)^2``.
        reaction: a; 0 for dense and orthogonal weights.
        bulk_radius: radius of the continuous part of the spectrum of the Jacobian ``D W``. For
            symmetric weights beyond the edge of stability it only says, by ``>= 1``, that they are:
            ``sqrt(e^2 E[(phi' / (1 - a phi'))^2])``.
        jacobian_radius: its spectral radius: the bulk's, or an eigenvalue outside of it.
        adjoint_variance: ``|u|^2 / |g|^2`` of the adjoint ``u = g + W^T D u``, for g that depends
            on neither W nor c; infinity from the stability edge on.
        injection_gradient_variance: ``|q|^2 / |g|^2`` of ``q = D u = dL/dc``. The gradient
            ``dL/dW = q z*^T`` has ``|dL/dW|^2 = |q|^2 |z*|^2``.
    """

    length: float
    field_variance: float
    preactivation_variance: float
    mean_slope: float
    mean_square_slope: float
    reaction: float
    bulk_radius: float
    jacobian_radius: float
    adjoint_variance: float
    injection_gradient_variance: float

    @property
    def stable(self) -> bool:
        """Whether the Jacobian's spectral radius is below 1: else no iteration stays at z*."""
        return self.jacobian_radius < 1


def equilibrium(
    weight: str,
    activation: str | Activation,
    scale: float,
    injection_variance: float = 1.0,
) -> Equilibrium:
    """The mean-field equilibrium that a solve from zero reaches.

    Args:
        weight: "dense", "orthogonal" or "symmetric".
        activation: one of ``fastdeq.ACTIVATIONS``, by name or as an object. Symmetric weights need
            a monotone one: with slopes of both signs ``D W`` has no real spectrum.
        scale: spectral radius of W, finite and not negative.
        injection_variance: of the entries of c, finite and not negative. 0 with ``phi(0) = 0``
            gives z* = 0 and the slopes of phi next to 0.

    Returns:
        The prediction, also where it is not stable: there the mean-field equations have a solution,
        but a solve does not reach it, and the layer has no, or many, equilibria.

    Raises:
        ValueError: unknown names; numbers out of range; symmetric weights with an activation that
            is not monotone; no finite length.

    Source: the module's text. Near the edge of stability finite widths deviate, as for linear
    cells: see :func:`effective_width`.
    """
    phi = find_activation(check_weight(weight), activation)
    e2 = entry_scale(weight, scale) ** 2
    injected = check_size(injection_variance, "injection_variance")
    a, v = _with_reaction(phi, e2, injected) if weight == "symmetric" else (0.0, None)
    if v is None:
        v = _field_variance(phi, e2, injected)
    mean = averages(phi, v, a)
    spectrum: Jacobian = jacobian(mean, e2, symmetric=weight == "symmetric")
    adjoint, gradient = _adjoint(mean, e2)
    bulk, radius = spectrum.bulk, spectrum.radius
    if weight == "symmetric" and adjoint == math.inf:
        # The resolvent of D W at 1 has left its physical branch: z* is beyond the edge.
        bulk = math.sqrt(e2 * mean.of((mean.slope / (1 - a * mean.slope)) ** 2))
        radius = max(bulk, radius)
    return Equilibrium(
        length=mean.length if v > 0 else float(phi.function(torch.zeros(()))) ** 2,
        field_variance=v,
        preactivation_variance=mean.of(mean.p**2),
        mean_slope=mean.of(mean.slope),
        mean_square_slope=mean.of(mean.slope**2),
        reaction=a,
        bulk_radius=bulk,
        jacobian_radius=radius,
        adjoint_variance=adjoint,
        injection_gradient_variance=gradient,
    )


def find_activation(weight: str, activation: str | Activation) -> Activation:
    if not isinstance(activation, Activation):
        check_choice(activation, ACTIVATIONS, "activation")
        activation = ACTIVATIONS[activation]
    if weight == "symmetric" and not activation.monotone:
        raise ValueError(
            f"activation={activation.name!r} is not monotone: with symmetric weights the Jacobian "
            'D W then has no real spectrum to predict. Take "dense" or "orthogonal" weights, or an '
            "activation whose slope is nowhere negative."
        )
    return activation


def _field_variance(phi: Activation, e2: float, injected: float) -> float:
    """The smallest v with ``e^2 E phi^2 + injected = v``: a solve from zero grows up to it."""

    def excess(v: float) -> float:
        return e2 * averages(phi, v).length + injected - v

    if e2 == 0 or (injected == 0 and _rests_at_zero(phi)):
        return injected
    low, step = injected, 0.05 * max(injected, 1e-3)
    while excess(high := low + step) > 0:
        low, step = high, 1.3 * step
        if high > _FARTHEST * max(injected, 1):
            raise ValueError(
                f"activation={phi.name!r}: at this scale the length of the state grows without "
                "limit. Take a smaller scale or a bounded activation."
            )
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return low


def _rests_at_zero(phi: Activation) -> bool:
    return float(phi.function(torch.zeros(()))) == 0


def _with_reaction(phi: Activation, e2: float, injected: float) -> tuple[float, float]:
    """a and v: some steps of their iteration (state evolution: Bolthausen, Commun. Math. Phys. 325
    (2014) 333), which lead to the solution that a solve from zero reaches, then Newton's method,
    since near the edge of stability the iteration is slow."""

    def step(a: float, v: float) -> tuple[float, float]:
        mean = averages(phi, v, a)
        return e2 * mean.response, (0.0 if rests else e2 * mean.length + injected)

    rests = injected == 0 and (e2 == 0 or _rests_at_zero(phi))
    a, v = 0.0, injected
    for _ in range(_PLAIN_STEPS):
        a, v = step(a, v)
        a = min(a, 0.95 / phi.lipschitz)  # a first step may go too far
    for _ in range(_NEWTON_STEPS):
        next_a, next_v = step(a, v)
        error = (next_a - a, next_v - v)
        if abs(error[0]) < 1e-13 and abs(error[1]) <= 1e-13 * v:
            return next_a, next_v
        if not v < _FARTHEST * max(injected, 1):
            break
        da, dv = 1e-6, 1e-6 * v
        by_a, by_v = step(a + da, v), step(a, v + dv)
        # The derivative of (a, v) - step(a, v).
        A = ((1 - (by_a[0] - next_a) / da), (-(by_v[0] - next_a) / dv if dv else 0.0))
        B = ((-(by_a[1] - next_v) / da), (1 - (by_v[1] - next_v) / dv if dv else 1.0))
        determinant = A[0] * B[1] - A[1] * B[0]
        if determinant > 0:
            newton_a = a + (error[0] * B[1] - error[1] * A[1]) / determinant
            newton_v = v + (error[1] * A[0] - error[0] * B[0]) / determinant
            if newton_a >= 0 and injected <= newton_v < math.inf:
                next_a, next_v = newton_a, newton_v
        a, v = next_a, next_v
    raise ValueError(
        f"activation={phi.name!r}: at this scale mean field finds no finite length for symmetric "
        "weights. Take a smaller scale or a bounded activation."
    )


def _adjoint(mean: Averages, e2: float) -> tuple[float, float]:
    """``|u|^2 / |g|^2`` and ``|D u|^2 / |g|^2``.

    As for the state, ``u = g + n + a D u`` with normal n of variance ``e^2 |D u|^2``: so
    ``u = (g + n) / (1 - a D)``, and with ``y = |D u|^2 / |g|^2``, ``y = k (1 + e^2 y)``,
    ``k = E[(D / (1 - a D))^2]``. It diverges where the bulk of the spectrum reaches 1.
    """
    rest = 1 - mean.reaction * mean.slope
    k = mean.of((mean.slope / rest) ** 2)
    if not e2 * k < 1:
        return math.inf, math.inf
    return mean.of(rest**-2) / (1 - e2 * k), k / (1 - e2 * k)
