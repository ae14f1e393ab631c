"""What a quantized tensor is: its code grid, its packed codes, scales and row statistics."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # formats are read where nothing is computed, and torch takes seconds to import
    from torch import Tensor

NUMERICS_VERSION = 1
"""Bumped by hand whenever any kernel's or reference's output bytes change; part of every task's key."""


class Grid(StrEnum):
    """How a stored integer u stands for a weight (docs/methods.md gives the sources)."""

    TERNARY = "ternary"
    """u = t + 1 with t in {-1, 0, 1}, two bits; value = scale * t (TWN)."""
    DOREFA = "dorefa"
    """u in 0..2^k-1; value = scale * (2u / (2^k - 1) - 1); 2^k levels, none of them zero."""
    SYMMETRIC = "symmetric"
    """u = q + 2^(b-1), q in -(2^(b-1)-1)..2^(b-1)-1; value = scale * q."""
    ASYMMETRIC = "asymmetric"
    """u in 0..2^b-1; value = scale * (u - zero_point), zero_point a float."""


@dataclass(frozen=True)
class CodeFormat:
    """Grid and width of one layer's codes; ``group_size`` elements of a row share one scale."""

    grid: Grid
    bits: int
    length: int
    """Elements a row (before packing)."""
    group_size: int
    """Elements a scale within a row; ``length`` for one scale a row. A multiple of 8 unless it is ``length``."""
    layer_wise: bool = False
    """True: one scale for the whole tensor, shape [1, 1]."""

    @property
    def groups(self) -> int:
        """Scales a row."""
        return max(1, -(-self.length // max(1, self.group_size)))

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's dense LSB-first bit stream; every row starts on a byte."""
        return (self.length * self.bits + 7) // 8


@dataclass(frozen=True)
class TapSums:
    """What is summed over the taps of every input channel, both float64 [rows, length // taps]."""

    sums: Tensor
    squares: Tensor


@dataclass(frozen=True)
class TapSumsOfBoth:
    """Tap sums of a weight and of what its codes stand for, on the CPU."""

    original: TapSums
    quantized: TapSums


@dataclass(frozen=True)
class Quantized:
    """Packed codes of a [rows, length] weight with the row statistics that compensation and reports need."""

    format: CodeFormat
    codes: Tensor
    """uint8 [rows, row_bytes]."""
    scale: Tensor
    """float32 [rows, groups], or [1, 1] where the format is layer-wise."""
    zero_point: Tensor | None
    """float32, the scale's shape; only for the asymmetric grid."""
    dot: Tensor
    """float64 [rows] on the CPU: the inner product of quantized and original row."""
    quantized_norm: Tensor
    """float64 [rows] on the CPU: the squared norm of the quantized row."""
    original_norm: Tensor
    """float64 [rows] on the CPU: the squared norm of the original row."""
    zeros: Tensor
    """int64 [rows] on the CPU: how many quantized values are exactly zero."""
    taps: TapSumsOfBoth | None = None
    """Only where they were asked for."""
