"""Rows cut into segments: one scale each, chunks of rows that fit in cache, and what is summed over a segment."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from dfmpc.errors import NonFiniteError
from torch import Tensor

from .formats import CodeFormat, Grid, Quantized
from .sums import exponents, fineness, power_of_two, tree_sum

CHUNK = 1 << 16
"""Elements that a reference works on at a time: its float64 temporaries stay in the second-level cache."""


@dataclass(frozen=True)
class Part:
    """Neighbouring segments of equal length: all whole groups of a row, or its short last one."""

    columns: slice
    groups: slice
    length: int

    def bytes(self, bits: int) -> slice:
        """Return where the part's codes of ``bits`` bits lie in a packed row; a part begins with a byte."""
        return slice(self.columns.start * bits // 8, (self.columns.stop * bits + 7) // 8)


@dataclass(frozen=True)
class SegmentSums:
    """What one pass over a weight leaves for every segment; all tensors are [rows, groups]."""

    absmax: Tensor
    """float32: largest magnitude."""
    bound: Tensor
    """float32: no quantized magnitude is above it (asymmetric grid; elsewhere the same as ``absmax``)."""
    squares: Tensor
    """int64: exact total of w² on the grid of 2^(2e - fineness)."""
    dots: Tensor
    """int64: exact total of code times weight; the unit is the grid's."""
    norms: Tensor
    """int64: total of squared codes; the unit is the grid's."""
    zeros: Tensor
    """int64: values that are exactly zero."""

    @classmethod
    def joined(cls, parts: list[tuple[Tensor, ...]], rows: int) -> SegmentSums:
        """Put the parts of rows side by side: of each the fields in the order of their declaration, [segments]."""
        return cls(*(join_parts(fields, rows) for fields in zip(*parts, strict=True)))

    @cached_property
    def exponent(self) -> Tensor:
        """int64: no weight is above 2^exponent."""
        return exponents(self.absmax)

    def cpu(self) -> SegmentSums:
        """Return the same on the CPU."""
        fields = self.absmax, self.bound, self.squares, self.dots, self.norms, self.zeros
        return SegmentSums(*(tensor.cpu() for tensor in fields))


def join_parts(parts: Sequence[Tensor], rows: int) -> Tensor:
    """Return [rows, groups] of numbers a segment, [segments], of every part of a row."""
    return parts[0].view(rows, -1) if len(parts) == 1 else torch.cat([part.view(rows, -1) for part in parts], 1)


def check_weight(weight: Tensor, group_size: int) -> None:
    """Raise ValueError unless ``weight`` is a floating [rows, length] and ``group_size`` suits its rows."""
    if weight.dim() != 2 or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"weight is {weight.dtype} with shape {tuple(weight.shape)}; expected float32, float16 or bfloat16 "
            "[rows, length]"
        )
    length = weight.shape[1]
    if group_size < length and (group_size < 8 or group_size % 8):
        raise ValueError(f"group_size is {group_size} for rows of {length}; use a multiple of 8 or at least {length}")


def code_format(weight: Tensor, grid: Grid, bits: int, group_size: int, layer_wise: bool) -> CodeFormat:
    """Return the format of ``weight``'s codes; a group longer than the row is the row.

    Raises:
        ValueError: the weight's shape or type, the group size or ``bits`` cannot be used.
    """
    check_weight(weight, group_size)
    if not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits}; use 2 to 8")
    length = weight.shape[1]
    group = length if layer_wise else min(group_size, length)
    return CodeFormat(grid=grid, bits=bits, length=length, group_size=group, layer_wise=layer_wise)


def row_chunks(rows: int, length: int, elements: int = CHUNK) -> Iterator[slice]:
    """Yield slices of rows of about so many ``elements``."""
    step = max(1, elements // max(1, length))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def row_parts(length: int, group_size: int) -> list[Part]:
    """Return the whole groups of a row, then the short last one if there is one."""
    group_size = min(group_size, length)
    whole = length // group_size
    parts = [Part(slice(0, whole * group_size), slice(0, whole), group_size)]
    if whole * group_size < length:
        parts.append(Part(slice(whole * group_size, length), slice(whole, whole + 1), length - whole * group_size))
    return parts


def segment_sizes(format: CodeFormat) -> Tensor:
    """Return the elements of each of a row's segments, int64 [groups]."""
    starts = torch.arange(format.groups) * format.group_size
    return (format.length - starts).clamp(max=format.group_size)


def nothing(format: CodeFormat, weight: Tensor) -> Quantized:
    """Return the codes of a weight without elements."""
    rows, shape = weight.shape[0], (1, 1) if format.layer_wise else (weight.shape[0], format.groups)
    affine = format.grid is Grid.ASYMMETRIC
    none = torch.zeros(rows, dtype=torch.float64)
    return Quantized(
        format=format,
        codes=torch.zeros((rows, format.row_bytes), dtype=torch.uint8, device=weight.device),
        scale=torch.full(shape, float(affine), device=weight.device),
        zero_point=torch.zeros(shape, device=weight.device) if affine else None,
        dot=none,
        quantized_norm=none.clone(),
        original_norm=none.clone(),
        zeros=torch.zeros(rows, dtype=torch.int64),
    )


def require_finite(absmax: Tensor) -> None:
    """Raise NonFiniteError where a segment's largest magnitude is NaN or Inf."""
    if absmax.numel() == 0 or math.isfinite(float(absmax.amax())):
        return
    bad = (~torch.isfinite(absmax)).any(1)
    raise NonFiniteError(
        f"{int(bad.sum())} of {len(bad)} weight rows hold NaN or Inf, the first is row {int(bad.int().argmax())}; "
        "repair or re-export the checkpoint"
    )


def finish(
    format: CodeFormat,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    sums: SegmentSums,
    *,
    dot_unit: Tensor,
    norm_unit: Tensor,
) -> Quantized:
    """Turn a pass's integer totals (on the CPU) into row statistics; the units are float64 [rows, groups]."""
    square_unit = power_of_two(2 * sums.exponent - fineness(format.group_size))
    return Quantized(
        format=format,
        codes=codes,
        scale=scale,
        zero_point=zero_point,
        dot=tree_sum(sums.dots.double() * dot_unit, 1),
        quantized_norm=tree_sum(sums.norms.double() * norm_unit, 1),
        original_norm=tree_sum(sums.squares.double() * square_unit, 1),
        zeros=sums.zeros.sum(1),
    )
