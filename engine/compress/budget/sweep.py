"""The error of one layer at every width it may have: noise at its output, and what that does to the network's.

The error is what is left of W - a Ŵ after the best factor a of a row (docs/methods.md, "Bit-plans by size"): the norm
behind a layer is re-estimated, and c repairs a LOW layer, so a row's scale is no error. Scales are searched as the
recipes with error feedback search them; a large layer is judged by a sample of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from dfmpc.kernels.formats import CodeFormat, Grid
from torch import Tensor

from ..assign import Assignment
from ..feedback import values_of
from ..rows import to_rows
from ..scale_search import Rounded, clip_search, nearest_levels, ternary_optimum
from .sensitivity import RHO, LayerUse

_SAMPLE = 2**16
"""Weights of a layer that are looked at: every n-th row, n the least that stays below."""
_LOWEST_CLIP = {2: 0.4, 3: 0.5, 4: 0.6, 5: 0.8}
"""Least clip that is tried at a width, of the largest weight: 1 above 5 bits, where less hardly ever wins."""


@dataclass(frozen=True)
class Errors:
    """What a layer loses under each of several assignments."""

    errors: tuple[float, ...]
    """Noise-to-signal at the layer's output, over all channels."""
    effects: tuple[float, ...]
    """Noise-to-signal that this brings to the network's output: what the choice minimises the sum of."""


def measure(weight: Tensor, options: Sequence[Assignment], uses: Sequence[LayerUse]) -> Errors:
    """Return what ``weight`` (stored shape, any floating type) loses under each of ``options``, all of its layer."""
    layer = options[0].layer
    rows = to_rows(weight.float(), layer)
    index = torch.arange(0, len(rows), max(1, -(-layer.params // _SAMPLE)))
    judges = [_Judge(use, rows, index) for use in uses]
    found = [_over_uses(judges, nearest(rows[index], option)) for option in options]
    return Errors(tuple(error for error, _ in found), tuple(effect for _, effect in found))


def _over_uses(judges: Sequence[_Judge], quantized: Tensor) -> tuple[float, float]:
    parts = [judge.error_and_effect(quantized) for judge in judges]
    return sum(error for error, _ in parts) / max(1, len(parts)), sum(effect for _, effect in parts)


class _Judge:
    """The quadratic form q of one use (methods.md, section 2), and the sampled rows seen through it."""

    def __init__(self, use: LayerUse, rows: Tensor, index: Tensor) -> None:
        layer = self.layer = use.layer
        inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
        by_group = use.input_variance.float().view(layer.groups, inputs)
        self.variance = by_group.repeat_interleave(outputs, 0) if layer.groups > 1 else by_group
        signal = self._product(rows, rows)
        whole = float((use.effect * signal).sum())
        self.variance = self.variance[index] if layer.groups > 1 else self.variance
        self.rows, self.effect, self.signal = rows[index], use.effect[index], float(signal[index].sum())
        part = float((self.effect * signal[index]).sum())
        # the rows that are not looked at lose as much of their effect-weighted signal as those that are
        self.share = whole / part if part > 0 else 1.0

    def error_and_effect(self, quantized: Tensor) -> tuple[float, float]:
        noise = self._residual(quantized)
        error = float(noise.sum()) / self.signal if self.signal > 0 else 0.0
        return error, self.share * float((self.effect * noise).sum())

    def _residual(self, quantized: Tensor) -> Tensor:
        """q(W - a Ŵ) of every row for its best factor a, float64: through Ŵ - W, where little cancels."""
        error = quantized - self.rows
        along, length = self._product(error, quantized), self._product(quantized, quantized)
        best = torch.where(length > 0, along.square() / length.clamp_min(1e-300), 0.0)
        return (self._product(error, error) - best).clamp_min(0)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        shape = (len(left), self.layer.in_channels // self.layer.groups, self.layer.taps)
        left, right = left.view(shape), right.view(shape)
        an_input = (left * right).sum(2)
        if self.layer.taps > 1:
            an_input = torch.lerp(an_input, left.sum(2) * right.sum(2), RHO)
        return (an_input * self.variance).sum(1).double()


def nearest(rows: Tensor, option: Assignment) -> Tensor:
    """Return Ŵ of float32 ``rows`` [n, length] rounded to the nearest level, scales of least squared error."""
    size, whole = option.group_size, option.layer_wise
    if option.grid is Grid.TERNARY:
        return values_of(ternary_optimum(rows, group_size=size, layer_wise=whole))
    lowest = _LOWEST_CLIP.get(option.bits, 1.0)
    found = clip_search(rows, option.bits, option.grid, group_size=size, layer_wise=whole, lowest=lowest)
    form = CodeFormat(option.grid, option.bits, rows.shape[1], size, whole)
    return values_of(Rounded(form, nearest_levels(rows, form, found), found.scale))
