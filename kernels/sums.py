"""Order-independent sums: float64 terms on a fixed grid, added as integers (docs/design.md, "Exact sums")."""

from __future__ import annotations

import torch
from torch import Tensor

FINENESS = 40
"""Bits kept below the power of two that bounds a segment's terms."""
EXACT_RUN = 8192
"""This many terms below 2^40 stay below 2^53, so that float64 adds them without rounding in any order."""
_EXPONENT = 0x7FF << 52
"""The bits of a float64's exponent."""


def fineness(length: int) -> int:
    """Return the fraction bits for segments of ``length`` elements.

    40 up to 2^22 elements; one less for every doubling beyond, so that the int64 total stays below 2^62.
    """
    return FINENESS - max(0, (length - 1).bit_length() - 22)


def exponents(absmax: Tensor) -> Tensor:
    """Return int64 e with ``absmax < 2^e``, read from the float32 exponent field (denormals and zero: -125)."""
    field = absmax.contiguous().view(torch.int32) >> 23
    return field.clamp_(min=1).to(torch.int64).sub_(126)


def power_of_two(exponent: Tensor) -> Tensor:
    """Return 2^exponent in float64 for int64 exponents in -1022..1023."""
    return (exponent + 1023).bitwise_left_shift_(52).view(torch.float64)


def above(absmax: Tensor) -> Tensor:
    """Return float64 2^e with ``absmax < 2^e``, e as in ``exponents``: 129 of what is not finite."""
    below = absmax.double().view(torch.int64).bitwise_and_(_EXPONENT).view(torch.float64)  # 2^(e-1), 0 for 0
    return below.mul_(2.0).clamp_(2.0**-125, 2.0**129)


def exact_total(terms: Tensor) -> Tensor:
    """Round float64 terms [segments, length] half to even in place and return their int64 totals [segments].

    Every term must be at most 2^40 in magnitude (2^fineness).
    """
    terms.round_()
    if terms.shape[1] <= EXACT_RUN:
        return terms.sum(1).to(torch.int64)
    runs = [run.sum(1).to(torch.int64) for run in torch.split(terms, EXACT_RUN, 1)]
    return torch.stack(runs).sum(0)


def tree_sum(x: Tensor, dim: int) -> Tensor:
    """Sum ``x`` over ``dim`` in float64 by adding halves of a zero-padded power of two.

    The tree depends on nothing but the extent of ``dim``, so every device and thread count gives the same bits.
    """
    x = x.to(torch.float64).movedim(dim, 0)
    size = 1 << max(0, x.shape[0] - 1).bit_length()
    if size != x.shape[0]:
        x = torch.cat([x, x.new_zeros((size - x.shape[0], *x.shape[1:]))])
    while size > 1:
        size //= 2
        x = x[:size] + x[size:]
    return x[0]
