"""Uniform grids of 2 to 8 bits: DoReFa, symmetric absmax and asymmetric min-max (docs/methods.md, sections 1 and 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import jit, tl
from .device import exact_sum, exponent_of, locate, round_half_even, segment_extremes, store_codes, two_to_the
from .formats import CodeFormat, Grid, Quantized
from .launch import launch_shape, on_device, use_triton
from .packing import pack_reference
from .scales import Scales, scales_kernel, scales_of
from .segments import SegmentSums, code_format, finish, nothing, require_finite, row_chunks, row_parts
from .statistics import RowStatistics, row_statistics_reference, row_statistics_triton
from .sums import exact_total, exponents, fineness, power_of_two


def _layer_extremes(statistics: RowStatistics) -> Tensor:
    """Return float32 [3, 1]: largest magnitude, minimum and maximum of a whole tensor."""
    require_finite(statistics.absmax)
    return torch.stack([statistics.absmax.amax(), statistics.minimum.amin(), statistics.maximum.amax()])[:, None]


def _segment_codes(
    segments: Tensor, format: CodeFormat, shared: Scales | None
) -> tuple[Tensor, Scales, tuple[Tensor, ...]]:
    """Return uint8 codes of float32 [segments, length], their scales and the fields of ``SegmentSums``."""
    minimum, maximum = segments.amin(1), segments.amax(1)
    absmax = torch.maximum(-minimum, maximum).abs()
    scales = scales_of(torch.stack([absmax, minimum, maximum]), format) if shared is None else shared
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
    found: Tensor = underflow.sum(1)
    return found


def _asymmetric_sums(
    wide: Tensor, level: Tensor, scales: Scales, bits: int, exponent: Tensor, reach: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Totals over the float32 values (u - zero_point) * scale."""
    value = level.float().sub_(scales.zero_point[:, None]).mul_(scales.scale[:, None])
    zeros = (value == 0).sum(1)
    exact = value.double()
    dots = exact_total((exact * wide).mul_(power_of_two(bits - exponent - reach)[:, None]))
    norms = exact_total(exact.square_().mul_(power_of_two(bits - 2 * reach)[:, None]))
    return dots, norms, zeros


@jit
def uniform_kernel(
    weight_ptr: tl.tensor,
    extremes_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_point_ptr: tl.tensor,
    absmax_ptr: tl.tensor,
    bound_ptr: tl.tensor,
    square_ptr: tl.tensor,
    dot_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    rows: tl.tensor,
    length: tl.tensor,
    group_size: tl.tensor,
    groups: tl.tensor,
    row_bytes: tl.tensor,
    GRID: tl.constexpr,
    BITS: tl.constexpr,
    FINENESS: tl.constexpr,
    LAYER_WISE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Codes u = clip(rint(w * inverse + offset)) in float64, half to even; totals of w², code times w and code²."""
    o_row, m_row, i_group, start, count = locate(rows, length, group_size, groups, ROWS)
    segment_ptr = weight_ptr + o_row[:, None] * length + start
    o_segment = o_row * groups + i_group

    b_absmax, b_minimum, b_maximum = segment_extremes(segment_ptr, m_row, count, group_size, ROWS, BLOCK)
    b_e = exponent_of(b_absmax)
    b_largest = b_absmax
    if LAYER_WISE:
        o_same = tl.zeros((ROWS,), dtype=tl.int32)
        b_largest = tl.load(extremes_ptr + o_same)
        b_minimum = tl.load(extremes_ptr + 1 + o_same)
        b_maximum = tl.load(extremes_ptr + 2 + o_same)
    b_scale, b_zero_point, b_inverse, b_offset, b_spread = scales_kernel(b_largest, b_minimum, b_maximum, GRID, BITS)
    if not LAYER_WISE:
        tl.store(scale_ptr + o_segment, b_scale, mask=m_row)
        tl.store(zero_point_ptr + o_segment, b_zero_point, mask=m_row)
    b_bound = b_absmax + b_spread

    b_square = tl.zeros((ROWS,), dtype=tl.int64)
    b_dot = tl.zeros((ROWS,), dtype=tl.int64)
    b_norm = tl.zeros((ROWS,), dtype=tl.int64)
    b_zero = tl.zeros((ROWS,), dtype=tl.int64)
    o_start = o_row * row_bytes + start * BITS // 8
    for first in range(0, group_size, BLOCK):
        o_column = first + tl.arange(0, BLOCK)
        mask = m_row[:, None] & (o_column < count)[None, :]
        b_w = tl.load(segment_ptr + o_column[None, :], mask=mask, other=0.0).to(tl.float32).to(tl.float64)
        b_level = round_half_even(b_w * b_inverse[:, None] + b_offset[:, None])
        b_code, b_term, b_power, b_none = levels_kernel(
            b_w, b_level, b_scale[:, None], b_zero_point[:, None], b_e[:, None], b_bound[:, None], GRID, BITS, FINENESS
        )
        b_square += exact_sum(b_w * b_w * two_to_the(FINENESS - 2 * b_e)[:, None])
        b_dot += exact_sum(b_term)
        b_norm += tl.sum(tl.where(mask, b_power, 0), axis=1)
        b_zero += tl.sum((mask & b_none).to(tl.int64), axis=1)
        b_code = tl.where(mask, b_code, 0)
        store_codes(packed_ptr, b_code, o_start, first, count, m_row, BITS, ROWS, BLOCK)

    tl.store(absmax_ptr + o_segment, b_absmax, mask=m_row)
    tl.store(bound_ptr + o_segment, b_bound, mask=m_row)
    tl.store(square_ptr + o_segment, b_square, mask=m_row)
    tl.store(dot_ptr + o_segment, b_dot, mask=m_row)
    tl.store(norm_ptr + o_segment, b_norm, mask=m_row)
    tl.store(zero_ptr + o_segment, b_zero, mask=m_row)


@jit
def levels_kernel(
    b_w: tl.tensor,
    b_level: tl.tensor,
    b_scale: tl.tensor,
    b_zero_point: tl.tensor,
    b_e: tl.tensor,
    b_bound: tl.tensor,
    GRID: tl.constexpr,
    BITS: tl.constexpr,
    FINENESS: tl.constexpr,
) -> tl.tensor:
    """Return int64 codes, float64 terms of the dot product, int64 squares and where a value is zero, [ROWS, BLOCK]."""
    if GRID == "dorefa":
        b_level = tl.minimum(tl.maximum(b_level, 0.0), 2**BITS - 1.0)
        b_code = b_level.to(tl.int64)
        b_v = 2.0 * b_level - (2**BITS - 1.0)
        b_none = tl.abs(b_v) * b_scale.to(tl.float64) <= (2**BITS - 1) * 7.006492321624085e-46  # 2^-150: underflow
        b_term = b_v * b_w * two_to_the(FINENESS - BITS - b_e)
        b_power = (b_v * b_v).to(tl.int64)
    elif GRID == "symmetric":
        b_level = tl.minimum(tl.maximum(b_level, 1.0 - 2 ** (BITS - 1)), 2 ** (BITS - 1) - 1.0)
        b_code = b_level.to(tl.int64) + 2 ** (BITS - 1)
        b_none = (b_level == 0) | (b_scale == 0)
        b_term = b_level * b_w * two_to_the(FINENESS - (BITS - 1) - b_e)
        b_power = (b_level * b_level).to(tl.int64)
    else:
        b_level = tl.minimum(tl.maximum(b_level, 0.0), 2**BITS - 1.0)
        b_code = b_level.to(tl.int64)
        b_value = (b_level.to(tl.float32) - b_zero_point) * b_scale
        b_none = b_value == 0
        b_exact = b_value.to(tl.float64)
        b_reach = exponent_of(b_bound)
        b_term = b_exact * b_w * two_to_the(FINENESS - b_e - b_reach)
        b_power = round_half_even(b_exact * b_exact * two_to_the(FINENESS - 2 * b_reach)).to(tl.int64)
    return b_code, b_term, b_power, b_none


def uniform_triton(weight: Tensor, bits: int, grid: Grid, *, group_size: int, layer_wise: bool = False) -> Quantized:
    """Launch the kernel; see ``uniform_reference``."""
    format = _uniform_format(weight, bits, grid, group_size, layer_wise)
    if weight.numel() == 0:
        return nothing(format, weight)
    weight = weight.contiguous()
    (rows, length), extremes = weight.shape, weight
    factors = torch.empty((2, rows, format.groups), device=weight.device)
    if layer_wise:
        extremes = _layer_extremes(row_statistics_triton(weight, length))
        # on the CPU: a GPU divides by a number as a product with its reciprocal
        shared = scales_of(extremes.cpu(), format)
        factors = torch.stack([shared.scale, shared.zero_point])[:, None].to(weight.device)
    packed = torch.empty((rows, format.row_bytes), dtype=torch.uint8, device=weight.device)
    sums = SegmentSums.empty(rows, format.groups, weight.device)
    shape = launch_shape(rows, format.group_size)
    with on_device(weight):
        uniform_kernel[(-(-rows // shape.rows) * format.groups,)](
            weight,
            extremes,
            packed,
            *factors.unbind(),
            *sums.fields,
            rows,
            length,
            format.group_size,
            format.groups,
            format.row_bytes,
            GRID=grid.value,
            BITS=bits,
            FINENESS=fineness(format.group_size),
            LAYER_WISE=layer_wise,
            ROWS=shape.rows,
            BLOCK=shape.block,
            num_warps=shape.num_warps,
            enable_fp_fusion=False,
        )
    return _finish(format, packed, factors[0], factors[1], sums)


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
    rows, length = weight.shape
    shared = None
    if layer_wise:
        extremes = _layer_extremes(row_statistics_reference(weight, length))
        shared = scales_of(extremes, format)
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
    run = uniform_triton if use_triton(weight) else uniform_reference
    return run(weight, bits, grid, group_size=group_size, layer_wise=layer_wise)
