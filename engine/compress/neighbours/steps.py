"""Mid-rise levels at the step that is best for a Gaussian: what VecQ, muL2Q and DAQ have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from .segments import SMALLEST, Choice, exact_sum, float32, inverse

STEPS = {2: 0.9957, 3: 0.5860, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
"""λ_b: the step of 2^b mid-rise levels that minimises E‖x − Q(x)‖² for x ~ N(0, 1) (VecQ, table 1)."""


def mean_and_deviation(w: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation (over n, not n − 1) of float64 [segments, length]; deviation 0 if constant."""
    absmax, count = w.abs().amax(1), w.shape[1]
    mean = exact_sum(w.clone(), absmax) / count
    deviation = (exact_sum((w - mean[:, None]).square_()) / count).sqrt()
    return mean, torch.where(w.amin(1) == w.amax(1), 0.0, deviation)


def mid_rise(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """Return u = clip(round(x/step − ½), −2^(b−1), 2^(b−1) − 1) + 2^(b−1); the level is v = u − 2^(b−1) + ½.

    Where the step is 0 the formula's limit holds: the outermost level of x's sign.
    """
    half = 2 ** (bits - 1)
    scaled = torch.where(step[:, None] > 0, x * inverse(step)[:, None], torch.sign(x) * half)
    return scaled.sub_(0.5).round_().clamp_(-half, half - 1).add_(half)


def choose_centred(w: Tensor, bits: int) -> Choice:
    """Centre float64 [segments, length]; value = α v + mean with α = λ_b · deviation, on the asymmetric grid.

    α (u − 2^(b−1) + ½) + mean = α (u − z) with z = 2^(b−1) − ½ − mean/α. A constant segment is exact.
    """
    mean, deviation = mean_and_deviation(w)
    constant = deviation == 0
    alpha = torch.where(constant, 1.0, float32((STEPS[bits] * deviation).clamp(min=SMALLEST)))
    point = float32(2 ** (bits - 1) - 0.5 - mean / alpha)
    levels = mid_rise(w - mean[:, None], alpha, bits)
    return Choice(torch.where(constant[:, None], 0.0, levels), alpha, torch.where(constant, -w[:, 0], point))
