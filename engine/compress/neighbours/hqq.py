"""HQQ: half-quadratic search for the zero point."""

from __future__ import annotations

import torch
from dfmpc.kernels.formats import CodeFormat, Quantized
from torch import Tensor

from ...job.neighbours import HqqPlan
from .segments import SMALLEST, Choice, by_segment, float32, small_sum


def hqq(rows: Tensor, format: CodeFormat, plan: HqqPlan, taps: int) -> Quantized:  # noqa: ARG001 - the interface
    """Minimise ‖w − w_r‖_p^p over the zero point (Badri and Shaji, "Half-Quadratic Quantization", mobiusml, 2023).

    With s = (2^b − 1)/(max − min) fixed and z = −min·s first, every step takes q = clip(round(w·s + z), 0, 2^b − 1),
    w_r = (q − z)/s, w_e = shrink(w − w_r) with shrink(x) = sign(x)·max(|x| − |x|^(p−1)/β, 0),
    z = mean(q − (w − w_e)·s), β ← κβ. Every segment keeps the z of the least mean |w − w_r|, the first one included;
    the authors' code stops the whole tensor at the first step that does not lower it.
    """
    return by_segment(rows, format, lambda segments: choose_zero_point(segments, format.bits, plan))


def choose_zero_point(w: Tensor, bits: int, plan: HqqPlan) -> Choice:
    """Return codes, scale 1/s and zero point for float64 [segments, length]; a constant segment is exact."""
    minimum, maximum = w.amin(1), w.amax(1)
    constant = minimum == maximum
    scale = float32(((maximum - minimum) / (2**bits - 1)).clamp(min=SMALLEST)).masked_fill_(constant, 1.0)
    scaled = (w * (1.0 / scale)[:, None]).float()
    z = best = float32(-minimum / scale)
    least = torch.full_like(z, torch.inf)
    beta = plan.beta
    for _ in range(plan.steps):
        residual = _residual(scaled, z, bits)
        best, least = _better(z, residual, best, least, bits)
        z = _next(z, residual, scale, bits, beta, plan.p)
        beta *= plan.kappa
    best, _ = _better(z, _residual(scaled, z, bits), best, least, bits)
    levels = (w / scale[:, None]).add_(best[:, None]).round_().clamp_(0, 2**bits - 1)
    return Choice(levels.masked_fill_(constant[:, None], 0), scale, best)


def _residual(scaled: Tensor, z: Tensor, bits: int) -> Tensor:
    """Return (w − w_r)·s, float32 [segments, length], at most 2^b in magnitude."""
    target = scaled + z.float()[:, None]
    return target - target.round().clamp_(0, 2**bits - 1)


def _better(z: Tensor, residual: Tensor, best: Tensor, least: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    error = small_sum(residual.abs(), bits)
    return torch.where(error < least, z, best), torch.minimum(error, least)


def _next(z: Tensor, residual: Tensor, scale: Tensor, bits: int, beta: float, p: float) -> Tensor:
    """Return mean(q − (w − w_e)·s), which is z − mean((w − w_r − w_e)·s). ``residual`` is lost."""
    if float((residual.abs().amax(1) * scale).amax()) > 0.999 * beta ** (-1 / (2 - p)):
        wide = scale[:, None]
        residual = (residual - shrink(residual * wide, beta, p) / wide).float()
    return float32(z - small_sum(residual, bits) / residual.shape[1])


def shrink(x: Tensor, beta: float, p: float) -> Tensor:
    """Return sign(x)·max(|x| − |x|^(p−1)/β, 0), which is 0 where |x| ≤ β^(−1/(2−p))."""
    magnitude = x.abs()
    return torch.sign(x) * (magnitude - magnitude.pow(p - 1) / beta).clamp_(min=0)
