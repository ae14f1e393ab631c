"""The closed-form coefficients c that let a HIGH layer repair its LOW one (arXiv 2307.00498, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .result import Coefficients

DEAD_FRACTION = 1e-12
"""A channel is dead where the denominator is at most this fraction of the layer's largest."""


@dataclass(frozen=True)
class NormVectors:
    """A BatchNorm's vectors for the LOW layer's channels, float64 [C]: original and re-estimated statistics."""

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    sigma: Tensor
    """sqrt(variance + eps)."""
    quantized_mean: Tensor
    quantized_sigma: Tensor


@dataclass(frozen=True)
class Solution:
    """Coefficients c, float64 [C], all >= 0, and which channels are dead (c = 1 there)."""

    c: Tensor
    dead: Tensor


def solve(
    dot: Tensor, quantized_norm: Tensor, bias: Tensor, norm: NormVectors, lambda1: float, lambda2: float
) -> Solution:
    """Minimise ||c X̂ - X||^2 + λ1 (c ŷ - y)^2 + λ2 c^2 for every channel, c >= 0.

    X = γ W / σ and X̂ = γ Ŵ / σ̂ enter through ``dot`` = <Ŵ, W> and ``quantized_norm`` = ||Ŵ||^2, float64 [C];
    y = β + γ (b - μ) / σ, ŷ likewise with the re-estimated statistics; ``bias`` is the convolution's b, float64 [C].
    """
    scale, quantized_scale = norm.gamma / norm.sigma, norm.gamma / norm.quantized_sigma
    y = norm.beta + scale * (bias - norm.mean)
    y_hat = norm.beta + quantized_scale * (bias - norm.quantized_mean)
    numerator = scale * quantized_scale * dot + lambda1 * y_hat * y
    denominator = quantized_scale.square() * quantized_norm + lambda1 * y_hat.square() + lambda2
    dead = denominator <= DEAD_FRACTION * denominator.max() if len(denominator) else denominator > 0
    c = torch.where(dead, 1.0, numerator / torch.where(dead, 1.0, denominator)).clamp_min(0)
    return Solution(c, dead)


def summarise(solutions: list[Solution]) -> Coefficients:
    """Return the summary of a LOW layer's coefficients over all of its HIGH layers."""
    c = torch.cat([solution.c for solution in solutions])
    counts = torch.histc(c.clamp(0, 2 - 1e-9), bins=20, min=0, max=2)
    dead = sum(int(solution.dead.sum()) for solution in solutions)
    return Coefficients(
        float(c.min()), float(c.mean()), float(c.max()), tuple(int(count) for count in counts.tolist()), dead
    )
