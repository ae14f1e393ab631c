"""Extremes and exact sums of every segment of a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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

    def put(self, rows: slice, groups: slice, segments: tuple[Tensor, ...]) -> None:
        """Store flat per-segment results, in the order of the fields, at ``[rows, groups]``."""
        mine = (self.absmax, self.minimum, self.maximum, self.abs_total, self.square_total)
        for target, values in zip(mine, segments, strict=True):
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
    return row_statistics_reference(weight, group_size)
