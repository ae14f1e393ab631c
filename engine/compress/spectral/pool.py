"""Pools, gates and flattening on fields."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from .field import Field
from .torus import real, rescaled, torus

_MAXIMUM = {4: (1.029, 0.4917), 9: (1.485, 0.357)}
"""Mean and variance of the largest of 2 × 2 and 3 × 3 independent standard normal values (docs/methods.md)."""


def averaged(field: Field, size: tuple[int, int]) -> Field:
    """Return the field behind an average pool to ``size`` positions."""
    mean = functional.adaptive_avg_pool2d(field.mean, size)
    if size == (1, 1):
        return Field(mean, field.spectrum[:, :1] / field.torus.size, torus(1, 1), field.lower, field.upper)
    strides = _strides(field, size)
    box = torch.cartesian_prod(*(torch.arange(stride) for stride in strides)).view(-1, 2)
    waves = field.torus.waves(box)
    power = waves.cosine.mean(1).square() + waves.sine.mean(1).square()
    grid, spectrum = field.torus.decimated(field.spectrum * power.float().view(-1, 1, 1), strides)
    return Field(mean, spectrum, grid, field.lower, field.upper)


def maximum(field: Field, size: tuple[int, int], window: int) -> Field:
    """Return the field behind a max pool of Gaussian values to ``size`` positions, ``window`` values a maximum.

    mean += k s √(1 - ρ), var ·= ρ + v (1 - ρ), ρ the correlation of neighbours (docs/methods.md); k and v are those of
    independent values.
    """
    lags = torch.tensor([(0, 0), (1, 0), (0, 1)])
    diagonal = field.spectrum.diagonal(dim1=2, dim2=3).unsqueeze(2)
    here, below, beside = field.torus.covariance(diagonal, lags).squeeze(1)
    rho = torch.where(here > 0, 0.5 * (below + beside) / here.clamp_min(1e-30), 1.0).clamp(0, 1)
    lift, rest = _MAXIMUM.get(window, _largest(window))
    factor = rho + rest * (1 - rho)
    mean = functional.adaptive_avg_pool2d(field.mean, size) + (lift * here.clamp_min(0).sqrt() * (1 - rho).sqrt()).view(
        -1, 1, 1
    )
    grid, spectrum = field.torus.decimated(field.spectrum, _strides(field, size))
    return Field(mean, rescaled(spectrum, factor.sqrt()), grid, field.lower, field.upper)


def _largest(count: int) -> tuple[float, float]:
    """Return approximate mean and variance of the largest of ``count`` independent normal values (Blom; Gumbel)."""
    if count <= 1:
        return 0.0, 1.0
    quantile = math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * (count - 0.375) / (count + 0.25) - 1)))
    return quantile, 1 / (1 + 0.7 * math.log(count) * 1.3)


def _strides(field: Field, size: tuple[int, int]) -> tuple[int, int]:
    height, width = field.mean.shape[1:]
    return max(1, round(height / size[0])), max(1, round(width / size[1]))


def gated(one: Field, other: Field) -> Field:
    """Return the product of a map and a gate with one value a channel, or of two maps, taken as independent.

    Cov = R_x ∘ R_g + R_x ∘ m_g m_gᵀ + R_g ∘ m_x m_xᵀ.
    """
    field, gate = (one, other) if one.mean.shape[1:].numel() >= other.mean.shape[1:].numel() else (other, one)
    grid = field.torus
    covariance = grid.covariance(field.spectrum)
    gates = gate.torus.covariance(
        gate.spectrum, grid.points if gate.torus == grid else torch.zeros(1, 2, dtype=torch.int64)
    )
    found = covariance * (gates + _outer(gate.channel_mean)) + gates * _outer(field.channel_mean)
    return Field(field.mean * gate.mean, grid.spectrum(found, found.mT), grid)


def _outer(vector: Tensor) -> Tensor:
    return vector.unsqueeze(1) * vector


def flattened(field: Field) -> Field:
    """Return every position as a feature of its own: channel c becomes height · width neighbouring features."""
    height, width = field.mean.shape[1:]
    count = field.channels * height * width
    if (height, width) == (1, 1) and field.torus.size == 1:
        return field
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(-1, 2)
    mean = field.mean.reshape(count, 1, 1)
    lags = (places.unsqueeze(1) - places).flatten(0, 1)
    distinct, index = torch.unique(lags, dim=0, return_inverse=True)
    covariance = field.torus.covariance(field.spectrum, distinct)
    blocks = covariance[index].view(len(places), len(places), field.channels, field.channels)
    spectrum = blocks.permute(2, 0, 3, 1).reshape(1, count, count)
    return Field(mean, real(spectrum), torus(1, 1), field.lower, field.upper)
