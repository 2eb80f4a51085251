"""The energy of a symmetric cell in float64, and how much of a rise is rounding."""

import math

import torch
from engine_cases import SUM

from fastdeq.activations import ACTIVATIONS


def energy(case, a):
    """E (B,) in float64, a bound on the rounding of this evaluation, and s."""
    phi = ACTIVATIONS[case.activation]
    z, c = phi.function(a), case.injection.double()
    product = z @ case.weight.double()
    terms = torch.stack([a * z, -phi.primitive(a), -z * product / 2, -c * z])
    rounding = terms.abs().sum((0, 2)) * SUM * math.sqrt(4 * a.shape[1]) * 2**-53
    return terms.sum((0, 2)), rounding, product + c - a


def allowance(case, old, new, s_old, s_new):
    """How far the rounding of the solver's own account of a change of E can lead it astray.

    With unit u: sums of s, as of any product, the activation's 4 u, those of kappa where it is a
    difference; and of its leading term what that leaves out. For a phi with bounded third
    derivative that is less than 1e-3 |da|^3; elu, whose second derivative jumps, 1e-2.
    """
    phi, u = ACTIVATIONS[case.activation], torch.finfo(case.weight.dtype).eps / 2
    z_old, z_new, da = phi.function(old), phi.function(new), new - old
    error = sum(
        case.sum_error(z, u) + 4 * u * (a.abs() + s.abs())
        for z, a, s in ((z_old, old, s_old), (z_new, new, s_new))
    )
    size = sum(phi.primitive(a).abs() + (a * z).abs() for a, z in ((old, z_old), (new, z_new)))
    gap = torch.where((da.abs() >= 0.1) | (not phi.smooth), 8 * u * size, 0.0)
    left_out = torch.where(
        da.abs() <= 0.1001, (1e-2 if phi.name == "elu" else 1e-3) * da.abs() ** 3, 0
    )
    moved = 4 * u * ((s_old * z_old).abs() + (s_new * z_new).abs())
    return (error * (z_new - z_old).abs() / 2 + gap + moved + left_out).sum(1)
