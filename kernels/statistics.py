"""Extremes and exact sums of every segment of a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._triton import jit, tl
from .blocks import ExactSums, Segments
from .device import exponent_of, two_to_the
from .factors import factors_of, load_products
from .formats import Grid
from .launch import use_triton
from .segments import check_weight, code_format, join_parts, row_parts
from .sums import above, fineness
from .table import Batch
from .tiles import (
    add_two,
    item_of,
    largest_bits,
    segments_of,
    tile_range,
    tile_sums,
    without_pattern,
)


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


def _group_count(length: int, group_size: int) -> int:
    return max(1, -(-length // max(1, group_size)))


def _segment_totals(segments: Segments, bits: int) -> tuple[Tensor, ...]:
    """Return the fields of ``_Totals``, [segments] each."""
    extremes = segments.extremes()
    largest = above(extremes[0])
    sums = ExactSums(segments, torch.stack([largest * largest, largest]).mul_(2.0**-bits))
    for block in segments.blocks():
        sums.take(block, 1, torch.abs(block.wide, out=block.level))
        sums.multiply(block, 0, block.wide, block.wide)
        sums.add(block)
    squares, magnitudes = sums.totals()
    return *extremes, magnitudes, squares


@jit
def statistics_kernel(
    table_ptr: tl.tensor,
    programs_ptr: tl.tensor,
    absmax_ptr: tl.tensor,
    minimum_ptr: tl.tensor,
    maximum_ptr: tl.tensor,
    abs_ptr: tl.tensor,
    square_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    FINENESS: tl.constexpr,
    DTYPE: tl.constexpr,
    KINDS: tl.constexpr,
    WARPS: tl.constexpr,
    FACTORED: tl.constexpr = False,
) -> None:
    """Extremes of segments, then sum rint(|w| 2^(F-e)) and sum rint(w² 2^(F-2e)) with max|w| < 2^e.

    Where FACTORED, w is the float32 product of a weight and what ``factors`` (Batch.factors) has for its column.
    """
    item_ptr, i_tile, kind = item_of(table_ptr, programs_ptr)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            _statistics_tile(
                item_ptr,
                i_tile,
                absmax_ptr,
                minimum_ptr,
                maximum_ptr,
                abs_ptr,
                square_ptr,
                factors_ptr,
                FINENESS,
                DTYPE,
                max(1, 32 * WARPS // (KINDS[k] // 4096)),
                KINDS[k] // 4096,
                KINDS[k] // 4 % 16,
                KINDS[k] // 64 % 64,
                KINDS[k] // 2 % 2 == 1,
                KINDS[k] % 2 == 1,
                FACTORED,
            )


@jit
def _statistics_tile(
    item_ptr: tl.tensor,
    i_tile: tl.tensor,
    absmax_ptr: tl.tensor,
    minimum_ptr: tl.tensor,
    maximum_ptr: tl.tensor,
    abs_ptr: tl.tensor,
    square_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    FINENESS: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    T: tl.constexpr,
    V: tl.constexpr,
    NC: tl.constexpr,
    ALIGNED: tl.constexpr,
    LOOP: tl.constexpr,
    FACTORED: tl.constexpr,
) -> None:
    STEP: tl.constexpr = NC * T * V
    here, m_row, count, o_output, _ = segments_of(item_ptr, i_tile, DTYPE, ROWS, T, V, ALIGNED)
    factor = here
    if FACTORED:
        factor = factors_of(factors_ptr, item_ptr, o_output, T, V, ALIGNED)
    b_bits = tl.zeros((ROWS, T), dtype=tl.int32)
    b_low = tl.full((ROWS, T), float("inf"), dtype=tl.float32)
    b_high = tl.full((ROWS, T), float("-inf"), dtype=tl.float32)
    if LOOP:
        for first in range(0, count, STEP):
            chunks = load_products(here, factor, m_row, count, first, T, V, NC, ALIGNED, FACTORED)
            b_bits = tl.maximum(b_bits, largest_bits(chunks, ROWS, T, NC))
            b_least, b_most = tile_range(chunks, m_row, count, first, ROWS, T, V, NC, ALIGNED)
            b_low, b_high = tl.minimum(b_low, b_least), tl.maximum(b_high, b_most)
    else:
        chunks = load_products(here, factor, m_row, count, 0, T, V, NC, ALIGNED, FACTORED)
        b_bits = largest_bits(chunks, ROWS, T, NC)
        b_low, b_high = tile_range(chunks, m_row, count, 0, ROWS, T, V, NC, ALIGNED)
    b_absmax = tl.max(b_bits, axis=1).to(tl.float32, bitcast=True)
    b_unit = two_to_the(FINENESS // 2 - exponent_of(b_absmax))[:, None, None]

    steps = 1
    b_sum = tl.zeros((ROWS, T), dtype=tl.int64)
    b_square = tl.zeros((ROWS, T), dtype=tl.int64)
    if LOOP:
        steps = (count + STEP - 1) // STEP
        for first in range(0, count, STEP):
            chunks = load_products(here, factor, m_row, count, first, T, V, NC, ALIGNED, FACTORED)
            b_some, b_more = tile_sums(chunks, b_unit, FINENESS, ROWS, T, NC)
            b_sum += b_some
            b_square += b_more
    else:
        b_sum, b_square = tile_sums(chunks, b_unit, FINENESS, ROWS, T, NC)
    b_total, b_squares = tl.reduce((b_sum, b_square), 1, add_two)

    tl.store(absmax_ptr + o_output, b_absmax, mask=m_row)
    tl.store(minimum_ptr + o_output, tl.min(b_low, axis=1), mask=m_row)
    tl.store(maximum_ptr + o_output, tl.max(b_high, axis=1), mask=m_row)
    tl.store(abs_ptr + o_output, without_pattern(b_total, steps * STEP), mask=m_row)
    tl.store(square_ptr + o_output, without_pattern(b_squares, steps * STEP), mask=m_row)


def row_statistics_triton(weight: Tensor, group_size: int) -> RowStatistics:
    """Launch the kernel on one tensor; see ``row_statistics_reference``."""
    check_weight(weight, group_size)
    rows, length = weight.shape
    if weight.numel() == 0:
        totals = _Totals.filled(rows, _group_count(length, group_size), weight.device)
        return _finish(totals, fineness(min(group_size, length)))
    # the width matters only to codes, and none are written
    format = code_format(weight, Grid.SYMMETRIC, 8, group_size, layer_wise=False)
    return statistics_batch(Batch.of(weight, format))[0]


def statistics_batch(batch: Batch) -> list[RowStatistics]:
    """Launch the kernel once over all tensors of ``batch``; see ``row_statistics_reference``."""
    floats = [batch.flat(torch.float32) for _ in range(3)]
    totals = [batch.flat(torch.int64) for _ in range(2)]
    outputs = (*floats, *totals)
    batch.launch(
        statistics_kernel,
        *outputs,
        batch.factors,
        limited=batch.factored,
        FINENESS=batch.fineness,
        FACTORED=batch.factored,
    )
    found = (_Totals(*(entry.segmented(flat) for flat in outputs)) for entry in batch.entries)
    return [_finish(one, batch.fineness) for one in found]


def _finish(totals: _Totals, bits: int) -> RowStatistics:
    largest, finite = above(totals.absmax), torch.isfinite(totals.absmax)
    abs_sum = totals.abs_total.double() * (largest * 2.0**-bits)
    square_sum = totals.square_total.double() * (largest * largest * 2.0**-bits)
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
    (rows, length), bits = weight.shape, fineness(min(group_size, weight.shape[1]))
    if weight.numel() == 0:
        return _finish(_Totals.filled(rows, _group_count(length, group_size), weight.device), bits)
    parts = [_segment_totals(Segments(weight, part), bits) for part in row_parts(length, group_size)]
    return _finish(_Totals(*(join_parts(fields, rows) for fields in zip(*parts, strict=True))), bits)


def row_statistics(weight: Tensor, group_size: int) -> RowStatistics:
    """Return the statistics of every segment; see ``row_statistics_reference``."""
    run = row_statistics_triton if use_triton(weight) else row_statistics_reference
    return run(weight, group_size)
