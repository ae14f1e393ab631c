"""Uniform grids of 2 to 8 bits: DoReFa, symmetric absmax and asymmetric min-max (docs/methods.md, sections 1 and 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .formats import CodeFormat, Grid, Quantized
from .packing import pack_reference
from .segments import SegmentSums, code_format, finish, nothing, require_finite, row_chunks, row_parts
from .statistics import row_statistics_reference
from .sums import exact_total, exponents, fineness, power_of_two

SMALLEST = 2.0**-149
"""The least positive float32: a scale that would underflow becomes this one."""


@dataclass(frozen=True)
class _Scales:
    """Of each segment: stored factors, the float64 multiplier and offset of ``u = rint(w * inverse + offset)``."""

    scale: Tensor
    zero_point: Tensor
    inverse: Tensor
    offset: Tensor
    spread: Tensor
    """float32: how far a quantized value may lie from its weight (asymmetric); 0 for a constant segment."""


def _symmetric_scales(absmax: Tensor, format: CodeFormat) -> _Scales:
    """DoReFa: s = max|w|, u = rint(w * L/(2s) + L/2). Symmetric: scale = max|w|/Q, u = rint(w/scale) + Q + 1."""
    wide, none = absmax.double(), torch.zeros_like(absmax)
    if format.grid is Grid.DOREFA:
        levels = 2**format.bits - 1
        inverse = torch.where(wide > 0, levels / (2.0 * wide), 0.0)
        return _Scales(absmax, none, inverse, torch.full_like(wide, levels / 2), none)
    scale = (wide / (2 ** (format.bits - 1) - 1)).float()
    inverse = torch.where(scale > 0, 1.0 / scale.double(), 0.0)
    return _Scales(scale, none, inverse, torch.zeros_like(wide), none)


def _asymmetric_scales(minimum: Tensor, maximum: Tensor, format: CodeFormat) -> _Scales:
    """Scale = (max - min)/L, zero point = -min/scale; a constant segment is exact: scale 1, zero point -value."""
    low, high = minimum.double(), maximum.double()
    constant = minimum == maximum
    scale = ((high - low) / (2**format.bits - 1)).float().clamp(min=SMALLEST).masked_fill_(constant, 1.0)
    zero_point = ((0.0 - low) / scale.double()).float()
    inverse = (1.0 / scale.double()).masked_fill_(constant, 0.0)
    offset = zero_point.double().masked_fill(constant, 0.0)
    return _Scales(scale, zero_point, inverse, offset, scale.masked_fill(constant, 0.0))


def _scales(absmax: Tensor, minimum: Tensor, maximum: Tensor, format: CodeFormat) -> _Scales:
    if format.grid is Grid.ASYMMETRIC:
        return _asymmetric_scales(minimum, maximum, format)
    return _symmetric_scales(absmax, format)


def _layer_scales(weight: Tensor, format: CodeFormat) -> _Scales:
    """Return the scales [1] of a whole tensor."""
    found = row_statistics_reference(weight, weight.shape[1])
    require_finite(found.absmax)
    return _scales(found.absmax.amax()[None], found.minimum.amin()[None], found.maximum.amax()[None], format)


def _segment_codes(
    segments: Tensor, format: CodeFormat, shared: _Scales | None
) -> tuple[Tensor, _Scales, tuple[Tensor, ...]]:
    """Return uint8 codes of float32 [segments, length], their scales and the fields of ``SegmentSums``."""
    minimum, maximum = segments.amin(1), segments.amax(1)
    absmax = torch.maximum(-minimum, maximum).abs()
    scales = _scales(absmax, minimum, maximum, format) if shared is None else shared
    bits, exponent = fineness(format.group_size), exponents(absmax)
    wide = segments.double()
    squares = exact_total(wide.square().mul_(power_of_two(bits - 2 * exponent)[:, None]))
    level = (wide * scales.inverse[:, None]).add_(scales.offset[:, None]).round_()
    bound = absmax + scales.spread
    sums: tuple[Tensor, ...]
    if format.grid is Grid.ASYMMETRIC:
        codes = level.clamp_(0, 2**format.bits - 1).to(torch.uint8)
        sums = _asymmetric_sums(wide, level, scales, bits, exponent, exponents(bound))
    else:
        codes, sums = _integer_sums(wide, level, scales.scale, format, bits - exponent)
    return codes, scales, (absmax, bound, squares, *sums)


def _integer_sums(
    wide: Tensor, level: Tensor, scale: Tensor, format: CodeFormat, shift: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Codes and totals where a value is the scale times an integer v: v = 2u - L (DoReFa) or v = q (symmetric)."""
    if format.grid is Grid.DOREFA:
        levels, width = 2**format.bits - 1, format.bits
        codes = level.clamp_(0, levels).to(torch.uint8)
        level.mul_(2).sub_(levels)
    else:
        limit, width = 2 ** (format.bits - 1) - 1, format.bits - 1
        codes = level.clamp_(-limit, limit).add(limit + 1).to(torch.uint8)
    norms = level.square().sum(1).to(torch.int64)
    zeros = _zeros(level, scale, format)
    dots = exact_total(level.mul_(wide).mul_(power_of_two(shift - width)[:, None]))
    return codes, (dots, norms, zeros)


def _zeros(level: Tensor, scale: Tensor, format: CodeFormat) -> Tensor:
    """Count the values that are zero in float32; a DoReFa value is one only where a denormal scale underflows."""
    count = torch.full((len(level),), level.shape[1], dtype=torch.int64, device=level.device)
    if format.grid is Grid.SYMMETRIC:
        return torch.where(scale > 0, (level == 0).sum(1), count)
    if bool((scale > 2.0**-140).all()):
        return torch.zeros_like(count)
    underflow = (level * scale.double()[:, None]).abs() <= (2**format.bits - 1) * 2.0**-150
    return underflow.sum(1)


def _asymmetric_sums(
    wide: Tensor, level: Tensor, scales: _Scales, bits: int, exponent: Tensor, reach: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Totals over the float32 values (u - zero_point) * scale."""
    value = level.float().sub_(scales.zero_point[:, None]).mul_(scales.scale[:, None])
    zeros = (value == 0).sum(1)
    exact = value.double()
    dots = exact_total((exact * wide).mul_(power_of_two(bits - exponent - reach)[:, None]))
    norms = exact_total(exact.square_().mul_(power_of_two(bits - 2 * reach)[:, None]))
    return dots, norms, zeros


def _finish(format: CodeFormat, codes: Tensor, scale: Tensor, zero_point: Tensor, sums: SegmentSums) -> Quantized:
    """Turn totals into row statistics: the unit of a total is its grid times the scale of an integer."""
    sums, wide = sums.cpu(), scale.cpu().double()
    require_finite(sums.absmax)
    bits, exponent = fineness(format.group_size), exponents(sums.absmax)
    if format.grid is Grid.ASYMMETRIC:
        reach = exponents(sums.bound)
        units = power_of_two(exponent + reach - bits), power_of_two(2 * reach - bits)
    else:
        dorefa = format.grid is Grid.DOREFA
        step = wide / (2**format.bits - 1) if dorefa else wide
        width = format.bits if dorefa else format.bits - 1
        units = step * power_of_two(exponent + width - bits), (step * step).expand_as(exponent)
    point = zero_point if format.grid is Grid.ASYMMETRIC else None
    return finish(format, codes, scale, point, sums, dot_unit=units[0], norm_unit=units[1])


def uniform_reference(weight: Tensor, bits: int, grid: Grid, *, group_size: int, layer_wise: bool = False) -> Quantized:
    """Quantize ``weight`` (float32, float16 or bfloat16 [rows, length]) to 2^bits levels, or one less if symmetric.

    Codes come from float64 ``rint(w * inverse + offset)``, half to even; scales are rounded once, to float32. A value
    is what ``dequantize`` gives. ``layer_wise`` takes one scale for the whole tensor.

    Raises:
        ValueError: the weight's shape or type, the group size, ``bits`` or ``grid`` cannot be used.
        NonFiniteError: the weight holds NaN or Inf.
    """
    format = _uniform_format(weight, bits, grid, group_size, layer_wise)
    if weight.numel() == 0:
        return nothing(format, weight)
    shared = _layer_scales(weight, format) if layer_wise else None
    rows, length = weight.shape
    packed = torch.empty((rows, format.row_bytes), dtype=torch.uint8, device=weight.device)
    factors = torch.empty((2, rows, format.groups), device=weight.device)
    sums = SegmentSums.empty(rows, format.groups, weight.device)
    for chunk in row_chunks(rows, length):
        codes = torch.empty((chunk.stop - chunk.start, length), dtype=torch.uint8, device=weight.device)
        for part in row_parts(length, format.group_size):
            segments = weight[chunk, part.columns].reshape(-1, part.length).float()
            u, scales, found = _segment_codes(segments, format, shared)
            codes[:, part.columns] = u.view(len(codes), -1)
            sums.put(chunk, part.groups, found)
            if shared is None:
                block = factors[:, chunk, part.groups]
                block.copy_(torch.stack([scales.scale, scales.zero_point]).view(block.shape))
        packed[chunk] = pack_reference(codes, bits)
    if shared is not None:
        factors = torch.stack([shared.scale, shared.zero_point])[:, None]
    return _finish(format, packed, factors[0], factors[1], sums)


def _uniform_format(weight: Tensor, bits: int, grid: Grid, group_size: int, layer_wise: bool) -> CodeFormat:
    if grid is Grid.TERNARY:
        raise ValueError("the ternary grid is not uniform; use ternary()")
    return code_format(weight, grid, bits, group_size, layer_wise)


def uniform(weight: Tensor, bits: int, grid: Grid, *, group_size: int, layer_wise: bool = False) -> Quantized:
    """Quantize to a uniform grid; see ``uniform_reference``."""
    return uniform_reference(weight, bits, grid, group_size=group_size, layer_wise=layer_wise)
