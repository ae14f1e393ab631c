"""Rows cut into segments: one scale each, chunks of rows that fit in cache, and what is summed over a segment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

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
    def empty(cls, rows: int, groups: int, device: torch.device) -> SegmentSums:
        """Allocate without filling."""
        floats = torch.empty((2, rows, groups), dtype=torch.float32, device=device)
        counts = torch.empty((4, rows, groups), dtype=torch.int64, device=device)
        return cls(*floats.unbind(0), *counts.unbind(0))

    @property
    def fields(self) -> tuple[Tensor, ...]:
        """The tensors in the order of their declaration, which is the kernels'."""
        return self.absmax, self.bound, self.squares, self.dots, self.norms, self.zeros

    def put(self, rows: slice, groups: slice, segments: tuple[Tensor, ...]) -> None:
        """Store flat per-segment results, in the order of the fields, at ``[rows, groups]``."""
        for target, values in zip(self.fields, segments, strict=True):
            block = target[rows, groups]
            block.copy_(values.view(block.shape))

    def cpu(self) -> SegmentSums:
        """Return the same on the CPU."""
        return SegmentSums(*(tensor.cpu() for tensor in self.fields))


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


def row_chunks(rows: int, length: int) -> Iterator[slice]:
    """Yield slices of rows of about ``CHUNK`` elements."""
    step = max(1, CHUNK // max(1, length))
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
    bad = (~torch.isfinite(absmax)).any(1)
    if bool(bad.any()):
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
    square_unit = power_of_two(2 * exponents(sums.absmax) - fineness(format.group_size))
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
