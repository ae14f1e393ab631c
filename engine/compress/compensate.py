"""The coefficients c of one pair of layers, and their summary (the mathematics: kernels/compensate.py)."""

from __future__ import annotations

import torch
from dfmpc.kernels.compensate import LowLayer, NormVectors, Solution, compensate
from torch import Tensor

from .result import Coefficients

__all__ = ["NormVectors", "Solution", "solve", "summarise"]


def solve(
    dot: Tensor, quantized_norm: Tensor, bias: Tensor, norm: NormVectors, lambda1: float, lambda2: float
) -> Solution:
    """Minimise ||c X̂ - X||^2 + λ1 (c ŷ - y)^2 + λ2 c^2 for every channel, c >= 0.

    X = γ W / σ and X̂ = γ Ŵ / σ̂ enter through ``dot`` = <Ŵ, W> and ``quantized_norm`` = ||Ŵ||^2, float64 [C];
    y = β + γ (b - μ) / σ, ŷ likewise with the re-estimated statistics; ``bias`` is the convolution's b, float64 [C].
    """
    return compensate([LowLayer(dot, quantized_norm, bias, norm, lambda1, lambda2)])[0]


def summarise(solutions: list[Solution]) -> Coefficients:
    """Return the summary of a LOW layer's coefficients over all of its HIGH layers."""
    c = torch.cat([solution.c for solution in solutions])
    counts = torch.histc(c.clamp(0, 2 - 1e-9), bins=20, min=0, max=2)
    dead = sum(int(solution.dead.sum()) for solution in solutions)
    return Coefficients(
        float(c.min()), float(c.mean()), float(c.max()), tuple(int(count) for count in counts.tolist()), dead
    )
