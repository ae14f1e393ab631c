"""Rows cut into segments: one scale each, chunks of rows that fit in cache, and what is summed over a segment."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from dfmpc.errors import NonFiniteError
from torch import Tensor

from .formats import CodeFormat, Grid, Quantized
from .sums import above, fineness, tree_sum

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
    """What one pass over a weight leaves for every segment."""

    absmax: Tensor
    """float32 [rows, groups]: largest magnitude."""
    units: Tensor
    """float64 [3, rows, groups]: what ``totals`` count; see ``units_of``."""
    totals: Tensor
    """int64 [3, rows, groups]: exact totals of w², of level times w, and of squared levels."""
    zeros: Tensor
    """int64 [rows, groups]: values that are exactly zero."""

    @classmethod
    def joined(cls, parts: list[tuple[Tensor, ...]], rows: int) -> SegmentSums:
        """Put the parts of rows side by side: of each the fields in the order of their declaration, [..., segments]."""
        return cls(*(join_parts(fields, rows) for fields in zip(*parts, strict=True)))

    def cpu(self) -> SegmentSums:
        """Return the same on the CPU."""
        return SegmentSums(*(tensor.cpu() for tensor in (self.absmax, self.units, self.totals, self.zeros)))

    def sums(self) -> Tensor:
        """Return float64 [3, rows, groups], each rounded once."""
        return self.totals.double().mul_(self.units)


def join_parts(parts: Sequence[Tensor], rows: int) -> Tensor:
    """Return [..., rows, groups] of numbers a segment, [..., segments], of every part of a row."""
    views = [part.view(*part.shape[:-1], rows, -1) for part in parts]
    return views[0] if len(views) == 1 else torch.cat(views, -1)


def units_of(format: CodeFormat, absmax: Tensor, bound: Tensor) -> Tensor:
    """Return the powers of two that totals of w², vw and v² count, float64 [3, ...] of ``absmax`` and ``bound`` [...].

    Here v is the level or, on the asymmetric grid, the value, of |v| <= ``bound``.
    """
    largest, fine = above(absmax), 2.0 ** -fineness(format.group_size)
    if format.grid is Grid.ASYMMETRIC:
        reach = above(bound)
        return torch.stack([largest * largest, largest * reach, reach * reach]).mul_(fine)
    highest = 1.0 if format.grid is Grid.TERNARY else 2.0 ** (format.bits - 1)
    # a level of DoReFa is u - L/2, the half of an odd number: the square of one counts quarters
    whole = torch.full_like(largest, 0.25 if format.grid is Grid.DOREFA else 1.0)
    return torch.stack([largest * largest * fine, largest * (highest * fine), whole])


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
    format: CodeFormat, codes: Tensor, scale: Tensor, zero_point: Tensor | None, sums: SegmentSums, step: Tensor | None
) -> Quantized:
    """Turn a pass's totals (on the CPU) into row statistics.

    ``step`` is what a level is worth, float64 [rows, groups] or [1, 1]; None where levels are values.
    """
    found = sums.sums()
    if step is not None:
        found[1].mul_(step)
        found[2].mul_(step * step)
    original_norm, dot, quantized_norm = tree_sum(found, 2).unbind()
    return Quantized(
        format=format,
        codes=codes,
        scale=scale,
        zero_point=zero_point,
        dot=dot,
        quantized_norm=quantized_norm,
        original_norm=original_norm,
        zeros=sums.zeros.sum(1),
    )
