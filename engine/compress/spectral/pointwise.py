"""Activations on fields, by the Hermite series of a Gaussian (Mehler's formula)."""

from __future__ import annotations

from dataclasses import dataclass
from math import factorial

import torch
from torch import Tensor

from ...models.graph import Node
from ..activations import RANGES, activate, hermite_coefficients
from ..gaussian import Moments
from .field import Field, alive
from .torus import rescaled

ORDER = 4
"""Terms of the Hermite series; what they miss of a channel's variance is put on lag 0."""
REACH = 4
"""Lags along each axis up to which the terms beyond the first are kept."""
EXACT_POSITIONS = 2**19
"""Up to this many values of a mean map the coefficients are averaged over all positions, above it over every n-th."""


@dataclass(frozen=True)
class Activated:
    """A field behind an activation, and the gain with which what correlated with it before still does."""

    field: Field
    gain: Tensor
    """E[f'(x)], float32 [C]: Cov(f(x), y) = gain · Cov(x, y) for Gaussian x, y (Stein)."""


def activated(node: Node, field: Field, order: int = ORDER, reach: int = REACH) -> Activated:
    """Return the field behind the activation ``node``: Cov(f(x_i), f(x_j)) = Σ_j a_j b_j ρ^j / j!.

    The mean is taken position by position; coefficients and variance are averaged over the positions.
    """
    sd = field.variance.double().sqrt()
    mean = field.mean.double()
    spread = sd.view(-1, 1, 1).expand_as(mean)
    exact = activate(node, Moments(mean, spread.square()))
    step = -(-mean.numel() // EXACT_POSITIONS)
    sample = mean.flatten(1)[:, ::step]
    coefficients = hermite_coefficients(node, sample, sd.unsqueeze(1).expand_as(sample), order).mean(-1)
    variance = exact.variance.flatten(1).mean(1)
    varying = alive(sd.square()) & alive(variance)
    a = torch.where(varying, coefficients, 0.0).float()
    inverse = torch.where(varying, 1 / sd.clamp_min(1e-30), 0.0).float()
    variance = torch.where(varying, variance, 0.0).float()
    spectrum = _series(field, a, inverse, variance, reach)
    lower, upper = RANGES[node.op]
    return Activated(Field(exact.mean.float(), spectrum, field.torus, lower, upper), a[1] * inverse)


def _series(field: Field, coefficients: Tensor, inverse: Tensor, variance: Tensor, reach: int) -> Tensor:
    """Return the spectrum of Σ_j a_j a_jᵀ ρ^j / j!, with ``variance`` at lag 0.

    The linear term is a product with the gains at every frequency; the others fall fast with ρ and are taken at the
    near lags only.
    """
    lags = field.torus.near(reach)
    rho = field.torus.covariance(field.spectrum, lags)
    rho *= inverse.unsqueeze(1) * inverse
    first, *terms = [_outer(coefficients[j]) / factorial(j) for j in range(1, len(coefficients))]
    curved = _polynomial(rho, terms)
    diagonal = curved[0].diagonal()
    diagonal.copy_(torch.maximum(variance - first.diagonal() * (inverse > 0), diagonal))
    spectrum = rescaled(field.spectrum, coefficients[1] * inverse)
    return spectrum.add_(field.torus.spectrum(curved, curved.mT, lags))


def _polynomial(rho: Tensor, terms: list[Tensor]) -> Tensor:
    """Return Σ_j terms_j ρ^(j + 2), [L, C, C], a lag at a time, so that it stays in the cache."""
    found = torch.zeros_like(rho)
    for value, out in zip(rho, found, strict=True):
        for term in reversed(terms):
            out.mul_(value).add_(term)
        if terms:
            out.mul_(value).mul_(value)
    return found


def _outer(vector: Tensor) -> Tensor:
    return vector.unsqueeze(1) * vector
