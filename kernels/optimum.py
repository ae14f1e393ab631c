"""The thresholds of the exact ternary optimum: sorted prefixes (docs/methods.md, "TWN exact")."""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import CodeFormat
from .segments import row_chunks, row_parts
from .sums import exponents, fineness, power_of_two


def optimal_thresholds(weight: Tensor, format: CodeFormat) -> Tensor:
    """Return what |w| must be above to be kept, float32 [rows, groups], or [1, 1] where ``format`` is layer-wise.

    Of every segment of ``weight`` [rows, length] the k largest magnitudes are kept that maximise (Σ|w|)² / k: with
    their mean as the scale no other ternary codes have less squared error. Sums are exact, so that every device finds
    the same k. Sorting is torch's, on the weight's device; a layer-wise optimum sorts the whole tensor.
    """
    bits = fineness(weight.numel() if format.layer_wise else format.group_size)
    if format.layer_wise:
        return _thresholds(weight.reshape(1, -1), bits)[:, None]
    found = torch.empty((len(weight), format.groups), device=weight.device)
    for chunk in row_chunks(len(weight), format.length):
        for part in row_parts(format.length, format.group_size):
            there = found[chunk, part.groups]
            there.copy_(_thresholds(weight[chunk, part.columns].reshape(-1, part.length), bits).view(there.shape))
    return found


def _thresholds(segments: Tensor, bits: int) -> Tensor:
    """Return the largest magnitude that is not kept, float32 [segments]; 0 where all but zeros are."""
    magnitude = segments.abs().float().sort(1, descending=True).values
    unit = power_of_two(bits - exponents(magnitude[:, 0].nan_to_num(0.0, 0.0)))
    total = (magnitude.double() * unit[:, None]).round_().to(torch.int64).cumsum(1)
    count = torch.arange(1, segments.shape[1] + 1, device=segments.device)
    # equal magnitudes are kept or dropped together: along them the objective is convex in k
    kept = (total.double().square() / count).argmax(1)
    after = torch.cat([magnitude, magnitude.new_zeros(len(magnitude), 1)], 1)
    return after.gather(1, kept[:, None] + 1)[:, 0]
