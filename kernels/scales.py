"""Scale, zero point and multiplier of a segment on each uniform grid, in torch and in Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._triton import jit, tl
from .formats import CodeFormat, Grid

SMALLEST = 2.0**-149
"""The least positive float32: a scale that would underflow becomes this one."""


@dataclass(frozen=True)
class Scales:
    """Of each segment: stored factors, the float64 multiplier and offset of ``u = rint(w * inverse + offset)``.

    ``zero_point``, ``offset`` and ``spread`` are the asymmetric grid's and zeros elsewhere: a symmetric grid's offset
    is the same for all segments.
    """

    scale: Tensor
    zero_point: Tensor
    inverse: Tensor
    offset: Tensor
    spread: Tensor
    """float32: how far a quantized value may lie from its weight (asymmetric); 0 for a constant segment."""


def _symmetric_scales(absmax: Tensor, format: CodeFormat) -> Scales:
    """DoReFa: s = max|w|, u = rint(w * L/(2s) + L/2). Symmetric: scale = max|w|/Q, u = rint(w/scale) + Q + 1."""
    wide, none = absmax.double(), torch.zeros_like(absmax)
    if format.grid is Grid.DOREFA:
        levels = 2**format.bits - 1
        # a number over a tensor would be its reciprocal times the number, which rounds twice
        inverse = torch.full_like(wide, levels / 2).div_(wide).nan_to_num_(posinf=0.0)
        return Scales(absmax, none, inverse, none, none)
    scale = (wide / (2 ** (format.bits - 1) - 1)).float()
    inverse = scale.double().reciprocal_().nan_to_num_(posinf=0.0)
    return Scales(scale, none, inverse, none, none)


def _asymmetric_scales(minimum: Tensor, maximum: Tensor, format: CodeFormat) -> Scales:
    """Scale = (max - min)/L, zero point = -min/scale; a constant segment is exact: scale 1, zero point -value."""
    low, high = minimum.double(), maximum.double()
    constant = minimum == maximum
    scale = ((high - low) / (2**format.bits - 1)).clamp(min=SMALLEST).float().masked_fill_(constant, 1.0)
    zero_point = ((0.0 - low) / scale.double()).float()
    inverse = (1.0 / scale.double()).masked_fill_(constant, 0.0)
    offset = zero_point.double().masked_fill(constant, 0.0)
    return Scales(scale, zero_point, inverse, offset, scale.masked_fill(constant, 0.0))


def scales_of(extremes: Tensor, format: CodeFormat) -> Scales:
    """Return the scales of segments whose largest magnitude, minimum and maximum are float32 [3, segments]."""
    if format.grid is Grid.ASYMMETRIC:
        return _asymmetric_scales(extremes[1], extremes[2], format)
    return _symmetric_scales(extremes[0], format)


@jit
def scales_kernel(
    b_absmax: tl.tensor, b_minimum: tl.tensor, b_maximum: tl.tensor, GRID: tl.constexpr, BITS: tl.constexpr
) -> tl.tensor:
    """Return the fields of ``Scales`` for float32 extremes [rows], by the same float64 arithmetic."""
    b_wide = b_absmax.to(tl.float64)
    b_zero_point = tl.zeros_like(b_absmax)
    b_spread = tl.zeros_like(b_absmax)
    if GRID == "dorefa":
        b_scale = b_absmax
        b_inverse = tl.where(b_wide > 0, (2**BITS - 1) / tl.where(b_wide > 0, 2.0 * b_wide, 1.0), 0.0)
        b_offset = tl.zeros_like(b_wide) + (2**BITS - 1) / 2
    elif GRID == "symmetric":
        b_scale = (b_wide / (2 ** (BITS - 1) - 1)).to(tl.float32)
        b_inverse = tl.where(b_scale > 0, 1.0 / tl.where(b_scale > 0, b_scale, 1.0).to(tl.float64), 0.0)
        b_offset = tl.zeros_like(b_wide)
    else:
        b_low = b_minimum.to(tl.float64)
        b_constant = b_minimum == b_maximum
        b_step = (b_maximum.to(tl.float64) - b_low) / (2**BITS - 1)
        b_scale = tl.where(b_constant, 1.0, tl.maximum(b_step, 1.401298464324817e-45).to(tl.float32))
        b_zero_point = ((0.0 - b_low) / b_scale.to(tl.float64)).to(tl.float32)
        b_inverse = tl.where(b_constant, 0.0, 1.0 / b_scale.to(tl.float64))
        b_offset = tl.where(b_constant, 0.0, b_zero_point.to(tl.float64))
        b_spread = tl.where(b_constant, 0.0, b_scale)
    return b_scale, b_zero_point, b_inverse, b_offset, b_spread
