"""Expectations of piecewise polynomials of a Gaussian, in closed form. All tensors float64, of any one shape."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_INV_SQRT2 = 1 / math.sqrt(2)
_INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)


@dataclass(frozen=True)
class Knot:
    """The term ``weight * max(x - at, 0) ** degree``, degree at least 1."""

    at: float
    degree: int
    weight: float


@dataclass(frozen=True)
class Spline:
    """f(x) = slope x + the sum of its knots' terms: continuous, polynomial between neighbouring knots."""

    knots: tuple[Knot, ...]
    slope: float = 0.0


def hermite_polynomials(x: Tensor, order: int) -> list[Tensor]:
    """Probabilists' Hermite polynomials He_0 … He_order at ``x``: He_{k+1} = x He_k - k He_{k-1}."""
    values = [torch.ones_like(x), x]
    for k in range(1, order):
        values.append(x * values[k] - k * values[k - 1])
    return values[: order + 1]


def normal_cdf(z: Tensor) -> Tensor:
    """Φ, without cancellation in the lower tail."""
    return 0.5 * torch.erfc(-z * _INV_SQRT2)


def normal_pdf(z: Tensor) -> Tensor:
    """φ, the density of the standard normal."""
    return torch.exp(-0.5 * z * z) * _INV_SQRT_2PI


def standardise(x: Tensor, sd: Tensor) -> Tensor:
    """Return x / sd, and ±40 (where φ is 0 and Φ is 0 or 1) where sd is 0, so that limits come out exact."""
    bounded = (x / sd.clamp_min(1e-300)).clamp(-40, 40)
    return torch.where(sd > 0, bounded, torch.sign(x) * 40)


def spline_coefficients(spline: Spline, mean: Tensor, sd: Tensor, order: int) -> Tensor:
    """E[f(m + s z) He_j(z)] for z ~ N(0, 1) and j = 0 … order, float64 [order + 1, ...].

    By Stein's identity E[g He_j] = s^j E[g^(j)]: below a knot's degree r that is a truncated power's moment
    r! / (r - j)! s^j E[(x - t)_+^(r - j)], above it r! s^r φ(u) He_{j-r-1}(u) with u = (t - m) / s.
    """
    found = torch.zeros((order + 1, *mean.shape), dtype=mean.dtype)
    found[0] = spline.slope * mean
    if order:
        found[1] = spline.slope * sd
    for knot in spline.knots:
        for j, term in enumerate(_knot_terms(knot, mean, sd, order)):
            found[j] += knot.weight * term
    return found


def spline_mean(spline: Spline, mean: Tensor, sd: Tensor) -> Tensor:
    """E[f(m + s z)] for z ~ N(0, 1), of the shape of ``mean``."""
    return spline_coefficients(spline, mean, sd, 0)[0]


def _knot_terms(knot: Knot, mean: Tensor, sd: Tensor, order: int) -> list[Tensor]:
    r = knot.degree
    above = mean - knot.at
    u = standardise(-above, sd)
    moments = _truncated_powers(above, sd, u, r)
    low = [math.perm(r, j) * sd**j * moments[r - j] for j in range(min(order, r) + 1)]
    if order <= r:
        return low
    bell = math.factorial(r) * sd**r * normal_pdf(u)
    return low + [bell * polynomial for polynomial in hermite_polynomials(u, order - r - 1)]


def _truncated_powers(above: Tensor, sd: Tensor, u: Tensor, degree: int) -> list[Tensor]:
    """E[(x - t)_+^r] for r = 0 … degree; ``above`` is m - t: P_r = (m - t) P_{r-1} + (r - 1) s² P_{r-2}."""
    moments = [normal_cdf(-u)]
    moments.append(above * moments[0] + sd * normal_pdf(u))
    for r in range(2, degree + 1):
        moments.append(above * moments[r - 1] + (r - 1) * sd * sd * moments[r - 2])
    return moments
