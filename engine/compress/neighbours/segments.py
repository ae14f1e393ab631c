"""What the methods share: segments of a weight in, codes and factors out, and sums that no order changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from dfmpc.kernels.formats import CodeFormat, Quantized
from dfmpc.kernels.segments import nothing, require_finite, row_chunks, row_parts
from dfmpc.kernels.sums import exact_total, fineness, power_of_two
from torch import Tensor

from ..encode import encode

SMALLEST = 2.0**-149
"""The least positive float32: a scale that would underflow becomes this one."""


@dataclass(frozen=True)
class Choice:
    """What a method chose for some segments (what shares a scale: a row, a group of one, or a whole tensor)."""

    levels: Tensor
    """Stored integers u of the format's grid, [segments, length], any dtype."""
    scale: Tensor
    """[segments], values that float32 holds."""
    zero_point: Tensor | None = None
    """Likewise; only for the asymmetric grid."""


Chooser = Callable[[Tensor], Choice]
"""From float64 [segments, length], all finite and none empty, to what the method chooses for them."""


def by_segment(rows: Tensor, format: CodeFormat, choose: Chooser) -> Quantized:
    """Quantize float32 ``rows`` [rows, length] segment by segment.

    Raises NonFiniteError where ``rows`` holds NaN or Inf.
    """
    if rows.numel() == 0:
        return nothing(format, rows)
    require_finite(rows.abs().amax(1, keepdim=True))
    if format.layer_wise:
        choice = choose(rows.reshape(1, -1).double())
        point = None if choice.zero_point is None else choice.zero_point.float().view(1, 1)
        levels = choice.levels.to(torch.uint8).view(rows.shape)
        return encode(rows, levels, format, choice.scale.float().view(1, 1), point)
    levels = torch.empty(rows.shape, dtype=torch.uint8, device=rows.device)
    scale = torch.empty((len(rows), format.groups), device=rows.device)
    points: Tensor | None = None
    for chunk in row_chunks(*rows.shape):
        for part in row_parts(format.length, format.group_size):
            choice = choose(rows[chunk, part.columns].reshape(-1, part.length).double())
            block = levels[chunk, part.columns]
            block.copy_(choice.levels.view(block.shape))
            shape = scale[chunk, part.groups].shape
            scale[chunk, part.groups] = choice.scale.float().view(shape)
            if choice.zero_point is not None:
                points = torch.empty_like(scale) if points is None else points
                points[chunk, part.groups] = choice.zero_point.float().view(shape)
    return encode(rows, levels, format, scale, points)


def exact_sum(terms: Tensor, bound: Tensor | None = None) -> Tensor:
    """Sum float64 [segments, length] over its rows, to 2^-40 of the largest term; any order gives the same bits.

    ``bound``, float64 [segments], is at least the largest magnitude; without it that is looked for. ``terms`` is lost.
    """
    if bound is None:
        bound = terms.abs().amax(1)
    exponent = torch.frexp(bound).exponent.to(torch.int64).clamp(min=-900)
    bits = fineness(terms.shape[1])
    total = exact_total(terms.mul_(power_of_two(bits - exponent)[:, None]))
    return total.double() * power_of_two(exponent - bits)


def small_sum(terms: Tensor, exponent: int) -> Tensor:
    """Sum float32 [segments, length], magnitudes at most 2^exponent, in float64; any order gives the same bits.

    Terms become integers whose total stays below 2^53. ``terms`` is lost. Cheaper than ``exact_sum``.
    """
    bits = min(40, 52 - terms.shape[1].bit_length()) - exponent
    return terms.mul_(2.0**bits).round_().sum(1, dtype=torch.float64) * 2.0**-bits


def float32(values: Tensor) -> Tensor:
    """Round float64 to what float32 holds."""
    return values.float().double()


def inverse(scale: Tensor) -> Tensor:
    """Return 1 / scale, and 0 for 0."""
    return torch.where(scale > 0, 1.0 / torch.where(scale > 0, scale, 1.0), 0.0)
