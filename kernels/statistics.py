"""Extremes and exact sums of every segment of a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._triton import jit, tl
from .device import exact_sum, exponent_of, locate, segment_extremes, two_to_the
from .launch import launch_shape, on_device, use_triton
from .segments import check_weight, row_chunks, row_parts
from .sums import exact_total, exponents, fineness, power_of_two


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of the segments of a [rows, length] weight; all tensors are [rows, groups] on its device."""

    absmax: Tensor
    """float32: largest magnitude (NaN or Inf where the segment holds one)."""
    minimum: Tensor
    """float32."""
    maximum: Tensor
    """float32."""
    abs_sum: Tensor
    """float64: sum of magnitudes, NaN where ``absmax`` is not finite."""
    square_sum: Tensor
    """float64: sum of squares, NaN where ``absmax`` is not finite."""
    finite: bool
    """False where any weight is NaN or Inf."""


@dataclass(frozen=True)
class _Totals:
    """One pass over a weight: float32 extremes and int64 totals, [rows, groups] each."""

    absmax: Tensor
    minimum: Tensor
    maximum: Tensor
    abs_total: Tensor
    square_total: Tensor

    @classmethod
    def filled(cls, rows: int, groups: int, device: torch.device) -> _Totals:
        """Allocate zeros, which is what a segment without elements has."""
        floats = torch.zeros((3, rows, groups), dtype=torch.float32, device=device)
        totals = torch.zeros((2, rows, groups), dtype=torch.int64, device=device)
        return cls(*floats.unbind(0), *totals.unbind(0))

    @property
    def fields(self) -> tuple[Tensor, ...]:
        """The tensors in the order of their declaration, which is the kernel's."""
        return self.absmax, self.minimum, self.maximum, self.abs_total, self.square_total

    def put(self, rows: slice, groups: slice, segments: tuple[Tensor, ...]) -> None:
        """Store flat per-segment results, in the order of the fields, at ``[rows, groups]``."""
        for target, values in zip(self.fields, segments, strict=True):
            block = target[rows, groups]
            block.copy_(values.view(block.shape))


def _group_count(length: int, group_size: int) -> int:
    return max(1, -(-length // max(1, group_size)))


def _segment_totals(segments: Tensor, bits: int) -> tuple[Tensor, ...]:
    """Return the fields of ``_Totals`` for float32 [segments, length]."""
    minimum, maximum = segments.amin(1), segments.amax(1)
    absmax = torch.maximum(-minimum, maximum).abs()
    exponent = exponents(absmax)
    scaled = segments.double()
    squares = exact_total(scaled.square().mul_(power_of_two(bits - 2 * exponent)[:, None]))
    absolute = exact_total(scaled.abs_().mul_(power_of_two(bits - exponent)[:, None]))
    return absmax, minimum, maximum, absolute, squares


@jit
def statistics_kernel(
    weight_ptr: tl.tensor,
    absmax_ptr: tl.tensor,
    minimum_ptr: tl.tensor,
    maximum_ptr: tl.tensor,
    abs_ptr: tl.tensor,
    square_ptr: tl.tensor,
    rows: tl.tensor,
    length: tl.tensor,
    group_size: tl.tensor,
    groups: tl.tensor,
    FINENESS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Extremes of [ROWS] segments, then sum rint(|w| 2^(F-e)) and sum rint(w² 2^(F-2e)) with max|w| < 2^e."""
    o_row, m_row, i_group, start, count = locate(rows, length, group_size, groups, ROWS)
    segment_ptr = weight_ptr + o_row[:, None] * length + start

    b_absmax, b_minimum, b_maximum = segment_extremes(segment_ptr, m_row, count, group_size, ROWS, BLOCK)
    b_e = exponent_of(b_absmax)
    b_abs_unit = two_to_the(FINENESS - b_e)[:, None]
    b_square_unit = two_to_the(FINENESS - 2 * b_e)[:, None]

    b_abs = tl.zeros((ROWS,), dtype=tl.int64)
    b_square = tl.zeros((ROWS,), dtype=tl.int64)
    for first in range(0, group_size, BLOCK):
        o_column = first + tl.arange(0, BLOCK)
        mask = m_row[:, None] & (o_column < count)[None, :]
        b_w = tl.load(segment_ptr + o_column[None, :], mask=mask, other=0.0).to(tl.float32).to(tl.float64)
        b_abs += exact_sum(tl.abs(b_w) * b_abs_unit)
        b_square += exact_sum(b_w * b_w * b_square_unit)

    o_segment = o_row * groups + i_group
    tl.store(absmax_ptr + o_segment, b_absmax, mask=m_row)
    tl.store(minimum_ptr + o_segment, b_minimum, mask=m_row)
    tl.store(maximum_ptr + o_segment, b_maximum, mask=m_row)
    tl.store(abs_ptr + o_segment, b_abs, mask=m_row)
    tl.store(square_ptr + o_segment, b_square, mask=m_row)


def row_statistics_triton(weight: Tensor, group_size: int) -> RowStatistics:
    """Launch the kernel; see ``row_statistics_reference``."""
    check_weight(weight, group_size)
    weight = weight.contiguous()
    rows, length = weight.shape
    group_size, groups = min(group_size, length), _group_count(length, group_size)
    totals, bits = _Totals.filled(rows, groups, weight.device), fineness(group_size)
    if weight.numel() == 0:
        return _finish(totals, bits)
    shape = launch_shape(rows, group_size)
    with on_device(weight):
        statistics_kernel[(-(-rows // shape.rows) * groups,)](
            weight,
            *totals.fields,
            rows,
            length,
            group_size,
            groups,
            FINENESS=bits,
            ROWS=shape.rows,
            BLOCK=shape.block,
            num_warps=shape.num_warps,
            enable_fp_fusion=False,
        )
    return _finish(totals, bits)


def _finish(totals: _Totals, bits: int) -> RowStatistics:
    exponent = exponents(totals.absmax)
    finite = torch.isfinite(totals.absmax)
    abs_sum = totals.abs_total.double() * power_of_two(exponent - bits)
    square_sum = totals.square_total.double() * power_of_two(2 * exponent - bits)
    return RowStatistics(
        absmax=totals.absmax,
        minimum=totals.minimum + 0.0,  # the sign of a zero would depend on the order of comparison
        maximum=totals.maximum + 0.0,
        abs_sum=abs_sum.masked_fill_(~finite, torch.nan),
        square_sum=square_sum.masked_fill_(~finite, torch.nan),
        finite=bool(finite.all()),
    )


def row_statistics_reference(weight: Tensor, group_size: int) -> RowStatistics:
    """Return the statistics of ``weight`` (float32, float16 or bfloat16 [rows, length]) a segment of ``group_size``.

    Sums are exact up to 2^-40 of the segment's largest term and independent of the order of the elements.

    Raises:
        ValueError: the weight's shape or type or the group size cannot be used.
    """
    check_weight(weight, group_size)
    rows, length = weight.shape
    totals = _Totals.filled(rows, _group_count(length, group_size), weight.device)
    bits = fineness(min(group_size, length))
    for chunk in row_chunks(rows, length) if length else ():
        for part in row_parts(length, group_size):
            segments = weight[chunk, part.columns].reshape(-1, part.length).float()
            totals.put(chunk, part.groups, _segment_totals(segments, bits))
    return _finish(totals, bits)


def row_statistics(weight: Tensor, group_size: int) -> RowStatistics:
    """Return the statistics of every segment; see ``row_statistics_reference``."""
    run = row_statistics_triton if use_triton(weight) else row_statistics_reference
    return run(weight, group_size)
