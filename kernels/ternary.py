"""Ternary codes with a threshold of 0.7 mean magnitudes (TWN, arXiv 1605.04711; docs/methods.md, section 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import jit, tl
from .device import exact_sum, exponent_of, locate, round_half_even, segment_extremes, store_codes, two_to_the
from .formats import CodeFormat, Grid, Quantized
from .launch import launch_shape, on_device, use_triton
from .packing import pack_reference
from .segments import SegmentSums, code_format, finish, nothing, require_finite, row_chunks, row_parts
from .statistics import row_statistics_reference, row_statistics_triton
from .sums import exact_total, exponents, fineness, power_of_two, tree_sum

THRESHOLD = 0.7
"""Of the mean magnitude: the minimiser of the squared error for normal and uniform weights, approximately."""


def _threshold(total: Tensor, count: int) -> Tensor:
    """Return the float32 threshold from float64 sums of magnitudes over ``count`` elements."""
    return (THRESHOLD * (total / count)).float()


def _layer_threshold(abs_sum: Tensor, count: int) -> Tensor:
    """Return the threshold [1] of a whole tensor from the sums [rows, 1] of its rows."""
    return _threshold(tree_sum(abs_sum[:, 0], 0)[None], count)


def _segment_codes(segments: Tensor, bits: int, threshold: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return uint8 codes of float32 [segments, length] and the fields of ``SegmentSums``."""
    magnitude = segments.abs()
    absmax = magnitude.amax(1)
    exponent = exponents(absmax)
    scaled = magnitude.double()
    squares = exact_total(scaled.square().mul_(power_of_two(bits - 2 * exponent)[:, None]))
    scaled.mul_(power_of_two(bits - exponent)[:, None]).round_()
    if threshold is None:
        total = exact_total(scaled).double() * power_of_two(exponent - bits)
        threshold = _threshold(total, segments.shape[1])
    mask = magnitude > threshold[:, None]
    kept = exact_total(scaled.mul_(mask))
    count = mask.sum(1)
    codes = (segments > threshold[:, None]).to(torch.uint8).add_(1).sub_((segments < -threshold[:, None]).byte())
    return codes, (absmax, absmax, squares, kept, count, segments.shape[1] - count)


@jit
def ternary_kernel(
    weight_ptr: tl.tensor,
    threshold_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    absmax_ptr: tl.tensor,
    bound_ptr: tl.tensor,
    square_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    count_ptr: tl.tensor,
    zero_ptr: tl.tensor,
    rows: tl.tensor,
    length: tl.tensor,
    group_size: tl.tensor,
    groups: tl.tensor,
    row_bytes: tl.tensor,
    FINENESS: tl.constexpr,
    LAYER_WISE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Codes t + 1 with t = sign(w) where |w| > float32(0.7 mean|w|), else 0; totals of w² and of the kept |w|."""
    o_row, m_row, i_group, start, count = locate(rows, length, group_size, groups, ROWS)
    segment_ptr = weight_ptr + o_row[:, None] * length + start

    b_absmax, _, _ = segment_extremes(segment_ptr, m_row, count, group_size, ROWS, BLOCK)
    b_e = exponent_of(b_absmax)
    b_unit = two_to_the(FINENESS - b_e)[:, None]

    b_total = tl.zeros((ROWS,), dtype=tl.int64)
    b_square = tl.zeros((ROWS,), dtype=tl.int64)
    for first in range(0, group_size, BLOCK):
        o_column = first + tl.arange(0, BLOCK)
        mask = m_row[:, None] & (o_column < count)[None, :]
        b_w = tl.load(segment_ptr + o_column[None, :], mask=mask, other=0.0).to(tl.float32).to(tl.float64)
        b_total += exact_sum(tl.abs(b_w) * b_unit)
        b_square += exact_sum(b_w * b_w * two_to_the(FINENESS - 2 * b_e)[:, None])
    if LAYER_WISE:
        b_threshold = tl.load(threshold_ptr + tl.zeros((ROWS,), dtype=tl.int32))
    else:
        b_mean = b_total.to(tl.float64) * two_to_the(b_e - FINENESS) / count.to(tl.float64)
        b_threshold = (0.7 * b_mean).to(tl.float32)

    b_kept = tl.zeros((ROWS,), dtype=tl.int64)
    b_count = tl.zeros((ROWS,), dtype=tl.int64)
    o_start = o_row * row_bytes + start * 2 // 8
    for first in range(0, group_size, BLOCK):
        o_column = first + tl.arange(0, BLOCK)
        mask = m_row[:, None] & (o_column < count)[None, :]
        b_w = tl.load(segment_ptr + o_column[None, :], mask=mask, other=0.0).to(tl.float32)
        b_plus = b_w > b_threshold[:, None]
        b_minus = -b_w > b_threshold[:, None]
        b_above = b_plus | b_minus
        b_term = round_half_even(tl.abs(b_w).to(tl.float64) * b_unit).to(tl.int64)
        b_kept += tl.sum(tl.where(b_above, b_term, 0), axis=1)
        b_count += tl.sum(b_above.to(tl.int64), axis=1)
        b_code = tl.where(mask, 1 + b_plus.to(tl.int64) - b_minus.to(tl.int64), 0)
        store_codes(packed_ptr, b_code, o_start, first, count, m_row, 2, ROWS, BLOCK)

    o_segment = o_row * groups + i_group
    tl.store(absmax_ptr + o_segment, b_absmax, mask=m_row)
    tl.store(bound_ptr + o_segment, b_absmax, mask=m_row)
    tl.store(square_ptr + o_segment, b_square, mask=m_row)
    tl.store(kept_ptr + o_segment, b_kept, mask=m_row)
    tl.store(count_ptr + o_segment, b_count, mask=m_row)
    tl.store(zero_ptr + o_segment, count - b_count, mask=m_row)


def ternary_triton(weight: Tensor, *, group_size: int, layer_wise: bool = False) -> Quantized:
    """Launch the kernel; see ``ternary_reference``."""
    format = code_format(weight, Grid.TERNARY, 2, group_size, layer_wise)
    if weight.numel() == 0:
        return nothing(format, weight)
    weight = weight.contiguous()
    (rows, length), threshold = weight.shape, weight
    if layer_wise:
        statistics = row_statistics_triton(weight, length)
        require_finite(statistics.absmax)
        # on the CPU: a GPU divides by a number as a product with its reciprocal
        threshold = _layer_threshold(statistics.abs_sum.cpu(), weight.numel()).to(weight.device)
    packed = torch.empty((rows, format.row_bytes), dtype=torch.uint8, device=weight.device)
    sums = SegmentSums.empty(rows, format.groups, weight.device)
    shape = launch_shape(rows, format.group_size)
    with on_device(weight):
        ternary_kernel[(-(-rows // shape.rows) * format.groups,)](
            weight,
            threshold,
            packed,
            *sums.fields,
            rows,
            length,
            format.group_size,
            format.groups,
            format.row_bytes,
            FINENESS=fineness(format.group_size),
            LAYER_WISE=layer_wise,
            ROWS=shape.rows,
            BLOCK=shape.block,
            num_warps=shape.num_warps,
            enable_fp_fusion=False,
        )
    return _finish(format, packed, sums)


def _finish(format: CodeFormat, codes: Tensor, sums: SegmentSums) -> Quantized:
    """Derive the scale from the kept magnitudes and their count, and the row statistics from all."""
    sums = sums.cpu()
    require_finite(sums.absmax)
    unit = power_of_two(exponents(sums.absmax) - fineness(format.group_size))
    kept, count = sums.dots.double() * unit, sums.norms
    if format.layer_wise:
        kept, count = tree_sum(kept, 0)[None], count.sum(0)[None]
    scale = torch.where(count > 0, kept / count.clamp(min=1), 0.0).float()
    wide = scale.double()
    dot_unit, norm_unit = wide * unit, (wide * wide).expand_as(unit)
    return finish(format, codes, scale.to(codes.device), None, sums, dot_unit=dot_unit, norm_unit=norm_unit)


def ternary_reference(weight: Tensor, *, group_size: int, layer_wise: bool = False) -> Quantized:
    """Quantize ``weight`` (float32, float16 or bfloat16 [rows, length]) to {-1, 0, 1} times a scale.

    A segment's threshold is float32(0.7 * mean|w|); weights strictly above it keep their sign; the scale is the mean
    magnitude of those kept, 0 where there are none. ``layer_wise`` takes one threshold and scale for the whole tensor.

    Raises:
        ValueError: the weight's shape or type or the group size cannot be used.
        NonFiniteError: the weight holds NaN or Inf.
    """
    format = code_format(weight, Grid.TERNARY, 2, group_size, layer_wise)
    if weight.numel() == 0:
        return nothing(format, weight)
    rows, length = weight.shape
    bits = fineness(format.group_size)
    threshold = None
    if layer_wise:
        statistics = row_statistics_reference(weight, length)
        require_finite(statistics.absmax)
        threshold = _layer_threshold(statistics.abs_sum, weight.numel())
    packed = torch.empty((rows, format.row_bytes), dtype=torch.uint8, device=weight.device)
    sums = SegmentSums.empty(rows, format.groups, weight.device)
    for chunk in row_chunks(rows, length):
        codes = torch.empty((chunk.stop - chunk.start, length), dtype=torch.uint8, device=weight.device)
        for part in row_parts(length, format.group_size):
            segments = weight[chunk, part.columns].reshape(-1, part.length).float()
            u, found = _segment_codes(segments, bits, threshold)
            codes[:, part.columns] = u.view(len(codes), -1)
            sums.put(chunk, part.groups, found)
        packed[chunk] = pack_reference(codes, 2)
    return _finish(format, packed, sums)


def ternary(weight: Tensor, *, group_size: int, layer_wise: bool = False) -> Quantized:
    """Quantize to ternary codes; see ``ternary_reference``."""
    run = ternary_triton if use_triton(weight) else ternary_reference
    return run(weight, group_size=group_size, layer_wise=layer_wise)
