"""Moments of rectified Gaussians, element by element (docs/methods.md, "Calibrators"). All tensors float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_INV_SQRT2 = 1 / math.sqrt(2)
_INV_SQRT_2PI = 1 / math.sqrt(2 * math.pi)


@dataclass(frozen=True)
class Moments:
    """Mean and variance of every channel, float64 [C]."""

    mean: Tensor
    variance: Tensor


def _first_two(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """E[max(x, 0)] and E[max(x, 0)^2] for x ~ N(mean, variance); exact limits where the variance is 0."""
    sd = variance.sqrt()
    z = torch.where(sd > 0, mean / sd.clamp_min(1e-300), torch.sign(mean) * 40)
    cdf = 0.5 * torch.erfc(-z * _INV_SQRT2)
    pdf = torch.exp(-0.5 * z * z) * _INV_SQRT_2PI
    return mean * cdf + sd * pdf, (mean * mean + variance) * cdf + mean * sd * pdf


def relu(moments: Moments) -> Moments:
    """ReLU of a Gaussian: E1 and E2 of methods.md, section 2."""
    first, second = _first_two(moments.mean, moments.variance)
    return Moments(first, (second - first * first).clamp_min(0))


def relu6(moments: Moments) -> Moments:
    """min(max(x, 0), 6) of a Gaussian: E1(m) - E1(m - 6) and E2(m) - E2(m - 6) - 12 E1(m - 6)."""
    first, second = _first_two(moments.mean, moments.variance)
    above, above2 = _first_two(moments.mean - 6, moments.variance)
    mean = first - above
    return Moments(mean, (second - above2 - 12 * above - mean * mean).clamp_min(0))


def leaky_relu(moments: Moments, slope: float) -> Moments:
    """X for x > 0, slope * x below: both halves of the Gaussian's second moment, weighted by the slope's square."""
    first, second = _first_two(moments.mean, moments.variance)
    mean = slope * moments.mean + (1 - slope) * first
    power = moments.mean * moments.mean + moments.variance
    square = slope * slope * power + (1 - slope * slope) * second
    return Moments(mean, (square - mean * mean).clamp_min(0))
