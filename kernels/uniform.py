"""Uniform grids of 2 to 8 bits: DoReFa, symmetric absmax and asymmetric min-max (docs/methods.md, sections 1 and 4)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .blocks import Block, ExactSums, Segments
from .factors import factor_columns, multiplied
from .formats import CodeFormat, Grid, Quantized
from .launch import use_triton
from .packing import unpack_reference
from .scales import Scales, scales_of
from .segments import (
    SegmentSums,
    code_format,
    finish,
    join_parts,
    nothing,
    require_finite,
    row_parts,
    segment_sizes,
    units_of,
)
from .shapes import spare_registers
from .statistics import RowStatistics, row_statistics_reference, statistics_batch
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


@torch.inference_mode()  # without it short segments wait for what autograd notes of every view
def _encode(
    segments: Segments, format: CodeFormat, shared: Scales | None, clip: float, packed: Tensor
) -> tuple[Scales, tuple[Tensor, ...]]:
    """Write the codes of ``segments`` to ``packed``; return their scales and the fields of ``SegmentSums``."""
    extremes = segments.extremes()
    scales = scales_of(clipped(extremes, clip), format) if shared is None else shared
    absmax, bound = extremes[0], extremes[0]
    if format.grid is Grid.ASYMMETRIC:
        bound = absmax + scales.spread
    units = units_of(format, absmax, bound)
    sums = ExactSums(segments, units)
    halves = format.grid is Grid.DOREFA  # are its levels, never zero; but see _finish
    zeros = torch.zeros_like(absmax, dtype=torch.int64 if halves else torch.float64)
    grid = _Steps(segments, format, scales, clip, packed)
    each = segments.each(zeros)
    for block in segments.blocks():
        grid.round(block)
        if not halves:
            torch.sum(torch.eq(block.level, 0, out=block.term), block.dim, out=each[block.number])
        sums.multiply(block, 2, block.level, block.level)
        sums.multiply(block, 1, block.level, block.wide)
        sums.multiply(block, 0, block.wide, block.wide)
        sums.add(block)
    return scales, (absmax, units, sums.totals(), zeros.long())


class _Steps:
    """How the weights of a block become codes."""

    def __init__(self, segments: Segments, format: CodeFormat, scales: Scales, clip: float, packed: Tensor) -> None:
        self._format, self._clip = format, clip
        self._rows, self._inverse = segments.rows(packed), segments.across(scales.inverse)
        affine = (scales.offset, scales.zero_point, scales.scale) if format.grid is Grid.ASYMMETRIC else ()
        self._affine = [segments.across(values) for values in affine]

    def round(self, block: Block) -> None:
        """Store the codes and leave in ``level`` what stands for the values; see ``units_of``."""
        format, rows = self._format, self._rows[block.number]
        level, width, highest = block.level, format.bits, 2**format.bits - 1
        torch.mul(block.wide, self._inverse[block.number], out=level)
        if format.grid is Grid.DOREFA:
            level.add_(highest / 2).round_()
            if self._clip != 1:  # elsewhere |w| inverse is L/2 or, by its roundings, hardly more: no code is outside
                level.clamp_(0, highest)
            block.store(level, 0, width, rows)
            level.sub_(highest / 2)
        elif format.grid is Grid.SYMMETRIC:
            limit = 2 ** (width - 1) - 1
            level.round_().clamp_(-limit, limit)
            block.store(level, limit + 1, width, rows)
        else:
            offset, zero_point, scale = (values[block.number] for values in self._affine)
            level.add_(offset).round_().clamp_(0, highest)
            block.store(level, 0, width, rows)
            level.copy_(block.narrow().copy_(level).sub_(zero_point).mul_(scale))


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
    """Launch the kernel on one tensor; see ``uniform_reference``."""
    format = _uniform_format(weight, bits, grid, group_size, layer_wise, clip)
    columns = None if factor is None else factor_columns(factor.cpu(), format.length)
    return uniform_batch(Batch.of(weight, format, columns), clip)[0] if weight.numel() else nothing(format, weight)


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
        batch.factors,
        limited=batch.factored,
        spare=spare_registers(format.grid, format.bits),
        GRID=format.grid.value,
        BITS=format.bits,
        LAYER_WISE=format.layer_wise,
        FINENESS=batch.fineness,
        CLIPPED=clip != 1 and not format.layer_wise,
        FACTORED=batch.factored,
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
    units, totals = units_of(format, absmax, bound), torch.stack([squares, dots, norms])
    zeros = torch.zeros_like(squares) if format.grid is Grid.DOREFA else segment_sizes(format) - count
    return SegmentSums(absmax, units, totals, zeros)


def _finish(format: CodeFormat, codes: Tensor, scale: Tensor, zero_point: Tensor, sums: SegmentSums) -> Quantized:
    """Turn totals into row statistics: a level is worth a step."""
    sums, wide = sums.cpu(), scale.cpu().double()
    require_finite(sums.absmax)
    if format.grid is Grid.ASYMMETRIC:
        return finish(format, codes, scale, zero_point, sums, None)
    if format.grid is Grid.SYMMETRIC:
        return finish(format, codes, scale, None, sums, wide)
    if float(wide.amin()) <= _UNDERFLOW:  # on the CPU
        small, zeros = (wide <= _UNDERFLOW).any(1).expand(len(codes)), sums.zeros.clone()
        zeros[small] = _underflows(format, codes.cpu()[small], wide if format.layer_wise else wide[small])
        sums = replace(sums, zeros=zeros)
    return finish(format, codes, scale, None, sums, wide / ((2**format.bits - 1) / 2))


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
    (rows, length), shared = weight.shape, None
    if layer_wise:
        extremes = _layer_extremes(row_statistics_reference(weight, length))
        shared = scales_of(clipped(extremes, clip), format)
    packed = torch.empty((rows, format.row_bytes), dtype=torch.uint8, device=weight.device)
    factors, sums = [], []
    for part in row_parts(length, format.group_size):
        scales, found = _encode(Segments(weight, part), format, shared, clip, packed[:, part.bytes(bits)])
        factors.append((scales.scale, scales.zero_point))
        sums.append(found)
    # copies, since a tensor of inference mode could not be changed in place outside
    scale, zero_point = (join_parts(each, 1 if layer_wise else rows).clone() for each in zip(*factors, strict=True))
    return _finish(format, packed, scale, zero_point, SegmentSums.joined(sums, rows))


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
