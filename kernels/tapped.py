"""Tap sums that come with a launch of the ternary kernel, and what its signs and counts stand for (docs/kernels.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from .formats import Quantized, TapSums, TapSumsOfBoth
from .table import Batch, Entry
from .tap_sums import tap_sums_of_both

MOST_TAPS = 1024
"""More are summed in passes of their own; the kernel's signs and counts are int16."""


def with_taps(quantized: Quantized, weight: Tensor, taps: int) -> Quantized:
    """Return ``quantized`` with the tap sums of ``weight`` and of its codes, by passes of their own; as it is for 0."""
    return replace(quantized, taps=tap_sums_of_both(weight, quantized, taps)) if taps else quantized


def sums_of_signs(signs: Tensor, kept: Tensor, scale: Tensor, taps: int) -> TapSums:
    """Return the tap sums of the values ``scale`` times -1, 0 or 1, as adding them up from left to right gives them.

    ``signs`` and ``kept``, integers [rows, channels], are the sum and the count of the signs of ``taps`` values;
    ``scale`` is float32 [rows, 1] or [1, 1]. A sum of scales is exact. One of their squares is for 32 at most; it
    depends on the count alone.
    """
    wide = scale.double()
    squares = [torch.zeros_like(wide)]
    for _ in range(taps):
        squares.append(squares[-1] + wide * wide)
    table = torch.cat(squares, 1).expand(len(signs), -1)
    return TapSums(signs * wide, table.gather(1, kept.long()))


class TappedLaunch:
    """Where the tensors of one launch leave their tap sums; a tensor's ``taps`` are 0 where none are asked for."""

    def __init__(self, batch: Batch, taps: Sequence[int]) -> None:
        """Allocate the outputs of those tensors that the kernel can sum."""
        self._taps = list(taps) or [0] * len(batch.entries)
        pairs = list(zip(batch.entries, self._taps, strict=True))
        self._fused = [taps if _in_the_kernel(entry, taps) else 0 for entry, taps in pairs]
        sizes = [
            entry.weight.numel() // taps if taps else 0 for entry, taps in zip(batch.entries, self._fused, strict=True)
        ]
        self._starts = list(accumulate(sizes, initial=0))
        # all four begin at multiples of 16 bytes: Triton compiles anew for those that do not
        places = -(-self._starts[-1] // 8) * 8
        self._sums = torch.empty((2, places), dtype=torch.float64, device=batch.device)
        self._signs = torch.empty((2, places), dtype=torch.int16, device=batch.device)

    def arguments(self) -> dict[str, Any]:
        """Return what the launch needs: nothing where no tensor's sums come from it, and it is the plain kernel."""
        if not any(self._fused):
            return {}
        table = torch.tensor(list(zip(self._fused, self._starts[:-1], strict=True)), dtype=torch.int64)
        return {
            "limited": True,
            "TAPPED": True,
            "taps_ptr": table.to(self._sums.device),
            "tap_sum_ptr": self._sums[0],
            "tap_square_ptr": self._sums[1],
            "tap_sign_ptr": self._signs[0],
            "tap_kept_ptr": self._signs[1],
        }

    def added(self, entries: Sequence[Entry], found: Sequence[Quantized]) -> list[Quantized]:
        """Return what the launch ``found``, with the tap sums where they are asked for."""
        self._sums, self._signs = self._sums.cpu(), self._signs.cpu()
        return [
            self._of(number, done) if self._fused[number] else with_taps(done, entry.weight, self._taps[number])
            for number, (entry, done) in enumerate(zip(entries, found, strict=True))
        ]

    def _of(self, number: int, done: Quantized) -> Quantized:
        here, shape = slice(*self._starts[number : number + 2]), (2, len(done.dot), -1)
        (sums, squares), (signs, kept) = (flat[:, here].view(shape) for flat in (self._sums, self._signs))
        quantized = sums_of_signs(signs, kept, done.scale.cpu(), self._fused[number])
        return replace(done, taps=TapSumsOfBoth(TapSums(sums, squares), quantized))


def _in_the_kernel(entry: Entry, taps: int) -> bool:
    """Whether taps lie within segments, and their signs' sum within what the kernel stores."""
    return entry.format.groups == 1 and taps <= MOST_TAPS
