"""One layer's weight to codes through the kernels, on the device that is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from dfmpc.kernels.dequantize import dequantize
from dfmpc.kernels.formats import Grid, Quantized
from dfmpc.kernels.group import Request, quantize_group
from dfmpc.kernels.launch import use_triton
from dfmpc.kernels.tap_sums import tap_sums
from torch import Tensor

from ..models.graph import Layer
from .assign import Assignment
from .rows import to_rows
from .taps import Taps

_LEAST = 16
"""Bytes of an input channel's taps from which on their float64 sums come along, which take at most twice as many."""


def quantize_layer(weight: Tensor, assignment: Assignment, device: str) -> Quantized:
    """Return the codes of ``weight`` (stored shape, any floating type) under ``assignment``."""
    return quantize_layers([(weight, assignment)], device)[0]


def quantize_layers(
    layers: Sequence[tuple[Tensor, Assignment]], device: str, with_taps: bool = False
) -> list[Quantized]:
    """Return the codes of every weight (stored shape, any floating type) under its assignment, in few launches.

    ``with_taps``: tap sums will be wanted of all, so that those which cost no pass over a weight are left at once.

    Raises NonFiniteError where one of them holds NaN or Inf.
    """
    return quantize_group([_request(weight, given, device, with_taps) for weight, given in layers])


def _request(weight: Tensor, given: Assignment, device: str, with_taps: bool) -> Request:
    rows = rows_on(weight, given.layer, device)
    # the references go over the weight once more whenever they are asked: they are asked when it is the layer's turn;
    # until then the sums of all layers are kept, which of few taps would be several times as large as the weights
    enough = given.layer.taps * rows.element_size() >= _LEAST
    saved = with_taps and given.grid is Grid.TERNARY and enough and use_triton(rows)
    taps = given.layer.taps if saved else 0
    return Request(rows, given.grid, given.bits, given.group_size, given.layer_wise, taps=taps)


def clipped_fraction(weight: Tensor, layer: Layer, quantized: Quantized, device: str) -> float:
    """Return the fraction of the weights, 0-1, beyond the grid's ends: 0 but for ternary, whose ends are means."""
    form, ends = quantized.format, quantized.scale
    if form.grid is not Grid.TERNARY:
        return 0.0
    if form.groups > 1:
        ends = ends.repeat_interleave(form.group_size, 1)[:, : form.length]
    return int((rows_on(weight, layer, device).abs() > ends).sum()) / max(1, layer.params)


def original_taps(weight: Tensor, layer: Layer, device: str) -> Taps:
    """Return the tap sums of the original weight, on the CPU."""
    return _taps(rows_on(weight, layer, device), layer)


def rows_on(weight: Tensor, layer: Layer, device: str) -> Tensor:
    """Return ``weight`` as [out, length] on ``device``, in its own type but for double precision."""
    # the network computes in float32, so double precision ends here
    dtype = torch.float32 if weight.dtype is torch.float64 else weight.dtype
    return to_rows(weight.to(device, dtype), layer)


def taps_of_both(weight: Tensor, quantized: Quantized, layer: Layer, device: str) -> tuple[Taps, Taps]:
    """Return the tap sums of the original weight and of the dequantized one, on the CPU, as they came with the codes.

    Where none came, they are summed now.
    """
    came = quantized.taps
    if came is None:
        return original_taps(weight, layer, device), quantized_taps(quantized, layer)
    return (
        Taps.of(layer, came.original.sums, came.original.squares),
        Taps.of(layer, came.quantized.sums, came.quantized.squares),
    )


def quantized_taps(quantized: Quantized, layer: Layer) -> Taps:
    """Return the tap sums of the dequantized weight, on the CPU."""
    rows = dequantize(quantized.format, quantized.codes, quantized.scale, quantized.zero_point, torch.float32)
    return _taps(rows, layer)


def _taps(rows: Tensor, layer: Layer) -> Taps:
    found = tap_sums(rows, layer.taps)
    return Taps.of(layer, found.sums.cpu(), found.squares.cpu())
