"""Uniform grids of 2 to 8 bits: DoReFa, symmetric absmax and asymmetric min-max (docs/methods.md, sections 1 and 4)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .formats import CodeFormat, Grid, Quantized
from .launch import use_triton
from .packing import pack_reference, unpack_reference
from .scales import Scales, scales_of
from .segments import SegmentSums, code_format, finish, nothing, require_finite, row_chunks, row_parts, segment_sizes
from .statistics import RowStatistics, row_statistics_reference, statistics_batch
from .sums import exact_total, exponents, fineness, power_of_two
from .table import Batch
from .uniform_kernel import uniform_kernel

CLIP_FROM = 0.01
"""Codes of what lies outside are clamped as integers below 2^31."""


def _layer_extremes(statistics: RowStatistics) -> Tensor:
    """Return float32 [3, 1]: largest magnitude, minimum and maximum of a whole tensor."""
    require_finite(statistics.absmax)
    return torch.stack([statistics.absmax.amax(), statistics.minimum.amin(), statistics.maximum.amax()])[:, None]


def clipped(extremes: Tensor, clip: float) -> Tensor:
    """Return the ends of the range that scales span, of float32 [3, segments] and one rounding of ``clip`` times them.

    A segment of one value keeps its own, which is exact.
    """
    if clip == 1:
        return extremes
    shrunk = extremes * torch.tensor(clip, dtype=torch.float32)
    shrunk[1:] = torch.where(extremes[1] == extremes[2], extremes[1:], shrunk[1:])
    return shrunk


def multiplied(weight: Tensor, factor: Tensor) -> Tensor:
    """Return float32 ``weight`` [rows, length] times its input channel's ``factor``, float32 [in], rounded once.

    Raises:
        ValueError: ``factor`` is of another type, or its channels do not divide the rows.
    """
    channels, length = factor.numel(), weight.shape[1]
    if factor.dtype is not torch.float32 or factor.dim() != 1 or not channels or length % channels:
        raise ValueError(
            f"factor is {factor.dtype} with shape {tuple(factor.shape)} for rows of {length}; expected float32 "
            "[in_channels], which divide them"
        )
    return weight.float() * factor.to(weight.device).repeat_interleave(length // channels)


def _segment_codes(
    segments: Tensor, format: CodeFormat, shared: Scales | None, clip: float
) -> tuple[Tensor, Scales, tuple[Tensor, ...]]:
    """Return uint8 codes of float32 [segments, length], their scales and the fields of ``SegmentSums``."""
    minimum, maximum = segments.amin(1), segments.amax(1)
    absmax = torch.maximum(-minimum, maximum).abs()
    scales = scales_of(clipped(torch.stack([absmax, minimum, maximum]), clip), format) if shared is None else shared
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
        codes, sums = _integer_sums(wide, level, format, bits - exponent)
    return codes, scales, (absmax, bound, squares, *sums)


def _integer_sums(wide: Tensor, level: Tensor, format: CodeFormat, shift: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Codes and totals where a value is the scale times an integer v: v = 2u - L (DoReFa) or v = q (symmetric)."""
    if format.grid is Grid.DOREFA:
        levels, width = 2**format.bits - 1, format.bits
        codes = level.clamp_(0, levels).to(torch.uint8)
        level.mul_(2).sub_(levels)
    else:
        limit, width = 2 ** (format.bits - 1) - 1, format.bits - 1
        codes = level.clamp_(-limit, limit).add(limit + 1).to(torch.uint8)
    norms = level.square().sum(1).to(torch.int64)
    zeros = (level == 0).sum(1)  # DoReFa has none but for underflow, see _finish
    dots = exact_total(level.mul_(wide).mul_(power_of_two(shift - width)[:, None]))
    return codes, (dots, norms, zeros)


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


def uniform_triton(
    weight: Tensor,
    bits: int,
    grid: Grid,
    *,
    group_size: int,
    layer_wise: bool = False,
    clip: float = 1.0,
    factor: Tensor | None = None,
) -> Quantized:
    """Launch the kernel on one tensor; see ``uniform_reference``. A ``factor`` takes a pass of its own."""
    format = _uniform_format(weight, bits, grid, group_size, layer_wise, clip)
    weight = weight if factor is None else multiplied(weight, factor)
    return uniform_batch(Batch.of(weight, format), clip)[0] if weight.numel() else nothing(format, weight)


def uniform_batch(batch: Batch, clip: float = 1.0) -> list[Quantized]:
    """Launch the kernel once over all tensors of ``batch``; see ``uniform_reference``."""
    format = batch.entries[0].format
    packed, factors = batch.flat_bytes(), [batch.flat(torch.float32) for _ in range(2)]
    floats, totals = [batch.flat(torch.float32) for _ in range(2)], [batch.flat(torch.int64) for _ in range(3)]
    count, extremes = batch.flat(torch.int32), factors[0]
    if format.layer_wise:
        found = [clipped(_layer_extremes(statistics), clip) for statistics in statistics_batch(batch)]
        extremes = torch.cat(found, dim=1).t().contiguous()
    elif clip != 1:
        extremes = torch.full((len(batch.entries),), clip, device=batch.device)
    batch.launch(
        uniform_kernel,
        extremes,
        packed,
        *factors,
        *floats,
        *totals,
        count,
        GRID=format.grid.value,
        BITS=format.bits,
        LAYER_WISE=format.layer_wise,
        FINENESS=batch.fineness,
        CLIPPED=clip != 1 and not format.layer_wise,
    )
    layers = _layer_factors(extremes.cpu(), batch) if format.layer_wise else None
    sums = [flat.cpu() for flat in (*floats, *totals, count)]
    results = []
    for number, entry in enumerate(batch.entries):
        scale, zero_point = [entry.segmented(flat) for flat in factors] if layers is None else layers[number]
        totalled = _segment_sums(entry.format, *map(entry.segmented, sums))
        results.append(_finish(entry.format, entry.packed(packed), scale, zero_point, totalled))
    return results


def _layer_factors(extremes: Tensor, batch: Batch) -> list[list[Tensor]]:
    """Return each tensor's scale and zero point, [1, 1], from extremes [tensors, 3] on the CPU."""
    # there, since a GPU divides by a number as a product with its reciprocal
    found = scales_of(extremes.t(), batch.entries[0].format)
    both = torch.stack([found.scale, found.zero_point], 1)[:, :, None, None].to(batch.device)
    return [list(tensor) for tensor in both]


def _segment_sums(
    format: CodeFormat, absmax: Tensor, bound: Tensor, squares: Tensor, dots: Tensor, norms: Tensor, count: Tensor
) -> SegmentSums:
    """Put together what the kernel wrote; a zero of DoReFa is where a denormal scale underflows, see ``_finish``."""
    bound = bound if format.grid is Grid.ASYMMETRIC else absmax
    zeros = torch.zeros_like(squares) if format.grid is Grid.DOREFA else segment_sizes(format) - count
    return SegmentSums(absmax, bound, squares, dots, norms, zeros)


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
    small = (wide <= _UNDERFLOW).any(1).expand(len(codes))
    if format.grid is Grid.DOREFA and bool(small.any()):
        zeros = sums.zeros.clone()
        zeros[small] = _underflows(format, codes.cpu()[small], wide if format.layer_wise else wide[small])
        sums = replace(sums, zeros=zeros)
    point = zero_point if format.grid is Grid.ASYMMETRIC else None
    return finish(format, codes, scale, point, sums, dot_unit=units[0], norm_unit=units[1])


_UNDERFLOW = 2.0**-140
"""A DoReFa value is s (2u - L) / L, never zero but where that underflows: with a scale that is itself a denormal."""


def _underflows(format: CodeFormat, codes: Tensor, scale: Tensor) -> Tensor:
    """Count the values of each segment, [rows, groups], that are zero in float32; all on the CPU."""
    levels = 2**format.bits - 1
    odd = unpack_reference(codes, format.bits, format.length).to(torch.int64).mul_(2).sub_(levels).abs_()
    found = torch.zeros((len(codes), format.groups), dtype=torch.int64)
    for part in row_parts(format.length, format.group_size):
        block = odd[:, part.columns].view(len(codes), -1, part.length)
        limit = scale if format.layer_wise else scale[:, part.groups]
        found[:, part.groups] = (block * limit[:, :, None] <= levels * 2.0**-150).sum(2)
    return found


def uniform_reference(
    weight: Tensor,
    bits: int,
    grid: Grid,
    *,
    group_size: int,
    layer_wise: bool = False,
    clip: float = 1.0,
    factor: Tensor | None = None,
) -> Quantized:
    """Quantize ``weight`` (float32, float16 or bfloat16 [rows, length]) to 2^bits levels, or one less if symmetric.

    Codes come from float64 ``rint(w * inverse + offset)``, half to even; scales are rounded once, to float32. A value
    is what ``dequantize`` gives. ``layer_wise`` takes one scale for the whole tensor. Scales span the fraction
    ``clip`` (0 to 1) of the largest magnitude or the range; what lies outside takes the code at the end. ``factor``,
    float32 [in], multiplies the weight's input channels, runs of ``length // in`` columns, before everything else.

    Raises:
        ValueError: the weight, the group size, ``bits``, ``grid``, ``clip`` or ``factor`` cannot be used.
        NonFiniteError: the weight holds NaN or Inf.
    """
    format = _uniform_format(weight, bits, grid, group_size, layer_wise, clip)
    weight = weight if factor is None else multiplied(weight, factor)
    if weight.numel() == 0:
        return nothing(format, weight)
    rows, length = weight.shape
    shared = None
    if layer_wise:
        extremes = _layer_extremes(row_statistics_reference(weight, length))
        shared = scales_of(clipped(extremes, clip), format)
    packed = torch.empty((rows, format.row_bytes), dtype=torch.uint8, device=weight.device)
    factors = torch.empty((2, rows, format.groups), device=weight.device)
    sums = SegmentSums.empty(rows, format.groups, weight.device)
    for chunk in row_chunks(rows, length):
        codes = torch.empty((chunk.stop - chunk.start, length), dtype=torch.uint8, device=weight.device)
        for part in row_parts(length, format.group_size):
            segments = weight[chunk, part.columns].reshape(-1, part.length).float()
            u, scales, found = _segment_codes(segments, format, shared, clip)
            codes[:, part.columns] = u.view(len(codes), -1)
            sums.put(chunk, part.groups, found)
            if shared is None:
                block = factors[:, chunk, part.groups]
                block.copy_(torch.stack([scales.scale, scales.zero_point]).view(block.shape))
        packed[chunk] = pack_reference(codes, bits)
    if shared is not None:
        factors = torch.stack([shared.scale, shared.zero_point])[:, None]
    return _finish(format, packed, factors[0], factors[1], sums)


def _uniform_format(
    weight: Tensor, bits: int, grid: Grid, group_size: int, layer_wise: bool, clip: float
) -> CodeFormat:
    if grid is Grid.TERNARY:
        raise ValueError("the ternary grid is not uniform; use ternary()")
    if not CLIP_FROM <= clip <= 1:
        raise ValueError(f"clip is {clip}; use {CLIP_FROM} to 1, the part of the range that the scale spans")
    return code_format(weight, grid, bits, group_size, layer_wise)


def uniform(
    weight: Tensor,
    bits: int,
    grid: Grid,
    *,
    group_size: int,
    layer_wise: bool = False,
    clip: float = 1.0,
    factor: Tensor | None = None,
) -> Quantized:
    """Quantize to a uniform grid; see ``uniform_reference``."""
    run = uniform_triton if use_triton(weight) else uniform_reference
    return run(weight, bits, grid, group_size=group_size, layer_wise=layer_wise, clip=clip, factor=factor)
