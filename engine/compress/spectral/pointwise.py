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

ORDER = 4
"""Terms of the Hermite series; what they miss of a channel's variance is put on lag 0."""
REACH = 2
"""Lags along each axis up to which the terms beyond the first are kept."""
CACHED = 2**19
"""Numbers of a block of rows that are worked on at once."""
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
    near lags only. Rows of channels go by turns, so that everything but the spectra stays in the cache.
    """
    grid = field.torus
    lags = grid.near(reach)
    backward, forward = grid.to_covariance(lags), grid.to_spectrum(lags)
    spectrum = field.spectrum
    found = torch.empty(spectrum.shape)
    at_once = max(1, CACHED // ((spectrum.shape[1] + len(lags)) * field.channels))
    for rows in torch.split(torch.arange(field.channels), at_once):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        real, imaginary = (side[:, part].flatten(1) for side in spectrum)
        even, odd = backward.cosine @ real, backward.sine @ imaginary
        scale = (inverse[part].unsqueeze(1) * inverse).flatten()
        products = [(value[part].unsqueeze(1) * value).flatten() / factorial(j) for j, value in enumerate(coefficients)]
        ahead, behind = (_curved(side.mul_(scale), products[2:]) for side in (even - odd, even + odd))
        missing = variance[part] - coefficients[1, part].square()
        for side in (ahead, behind):
            diagonal = side[0].view(len(rows), -1).diagonal(part.start)
            diagonal.copy_(torch.maximum(missing, diagonal))
        gain = products[1] * scale
        for side, there, wave, lagged in (
            (real, found[0], forward.cosine, ahead + behind),
            (imaginary, found[1], forward.sine, behind - ahead),
        ):
            torch.mul(side, gain, out=there[:, part].flatten(1)).addmm_(wave, lagged)
    return found


def _curved(rho: Tensor, terms: list[Tensor]) -> Tensor:
    """Return Σ_j terms_j ρ^(j + 2) of [L, n], terms [n]."""
    found = torch.zeros_like(rho)
    for term in reversed(terms):
        found.mul_(rho).add_(term)
    return found.mul_(rho).mul_(rho)
