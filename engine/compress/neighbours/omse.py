"""OMSE: the clip of least squared error, by line search."""

from __future__ import annotations

import torch
from dfmpc.kernels.formats import CodeFormat, Quantized
from torch import Tensor

from ...job.neighbours import OmsePlan
from .segments import Choice, by_segment, float32, inverse, small_sum

COARSE = 16
"""Clips of the first search, in equal steps up to the largest magnitude."""
FINER = (64, 256)
"""Each later search looks three of its steps, 1/64 and then 1/256 of the largest magnitude, to either side."""


def omse(rows: Tensor, format: CodeFormat, plan: OmsePlan, taps: int) -> Quantized:  # noqa: ARG001 - the interface
    """Symmetric grid whose clip α minimises ‖w − Q_α(w)‖² (Choukroun et al., arXiv 1902.06822, section 3).

    Q_α(w) = s·clip(round(w/s), −Q, Q) with s = α/Q, Q = 2^(b−1) − 1. The search starts at α = max|w|, which is round to
    nearest, so that it is never worse; at 2 bits the levels are −α, 0 and α.
    """
    return by_segment(rows, format, lambda segments: choose_clip(segments, format.bits))


def choose_clip(w: Tensor, bits: int) -> Choice:
    """Return codes q + 2^(b−1) and the scale of least squared error for float64 [segments, length]."""
    limit = 2 ** (bits - 1) - 1
    absmax = w.abs().amax(1)
    unit = (w * inverse(absmax)[:, None]).float()
    best = torch.ones_like(unit[:, 0])
    least = _squared_error(unit, best, limit)
    for divisor in (COARSE, *FINER):
        centre = best
        for offset in range(1 - COARSE, 0) if divisor == COARSE else (-3, -2, -1, 1, 2, 3):
            ratio = (centre + offset / divisor).clamp(1 / max(FINER), 1)
            error = _squared_error(unit, ratio, limit)
            best, least = torch.where(error < least, ratio, best), torch.minimum(error, least)
    scale = float32(best * absmax / limit)
    level = (w * inverse(scale)[:, None]).round_().clamp_(-limit, limit)
    return Choice(level.add_(limit + 1), scale)


def _squared_error(unit: Tensor, ratio: Tensor, limit: int) -> Tensor:
    """Return the squared error of float32 [segments, length] within ±1, clipped at ``ratio``."""
    step = (ratio / limit)[:, None]
    value = (unit / step).round_().clamp_(-limit, limit).mul_(step)
    return small_sum(value.sub_(unit).square_(), 0)
