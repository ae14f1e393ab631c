"""Sums over the taps of every input channel: what the analytic calibrator needs (docs/methods.md, section 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .segments import check_weight, row_chunks


@dataclass(frozen=True)
class TapSums:
    """Both are float64 [rows, length // taps]."""

    sums: Tensor
    squares: Tensor


def _check_taps(weight: Tensor, taps: int) -> None:
    check_weight(weight, weight.shape[-1])
    if taps < 1 or weight.shape[1] % taps:
        raise ValueError(f"taps is {taps} for rows of {weight.shape[1]}; it must divide them")


def tap_sums_reference(weight: Tensor, taps: int) -> TapSums:
    """Sum ``weight`` [rows, length] and its squares over each run of ``taps`` neighbours, in float64, left to right.

    Raises:
        ValueError: the weight's shape or type cannot be used, or ``taps`` does not divide the length.
    """
    _check_taps(weight, taps)
    rows, length = weight.shape
    sums = torch.zeros((rows, length // taps), dtype=torch.float64, device=weight.device)
    squares = torch.zeros_like(sums)
    for chunk in row_chunks(rows, length):
        columns = weight[chunk].reshape(-1, length // taps, taps).permute(2, 0, 1).double()
        for column in columns.contiguous():
            sums[chunk] += column
            squares[chunk] += column * column
    return TapSums(sums, squares)


def tap_sums(weight: Tensor, taps: int) -> TapSums:
    """Sum over taps; see ``tap_sums_reference``."""
    return tap_sums_reference(weight, taps)
