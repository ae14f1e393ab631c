"""Codes that a method chose itself become a ``Quantized`` layer, with the statistics that a kernel would have left."""

from __future__ import annotations

import torch
from dfmpc.kernels.dequantize import dequantize
from dfmpc.kernels.formats import CodeFormat, Quantized
from dfmpc.kernels.packing import pack
from torch import Tensor

from ..errors import NonFiniteError

_ELEMENTS = 2**22
"""Weights whose float64 products are held at a time."""


def encode(
    weight: Tensor, levels: Tensor, format: CodeFormat, scale: Tensor, zero_point: Tensor | None = None
) -> Quantized:
    """Pack ``levels`` and measure what they stand for against ``weight``.

    ``weight`` is the original, [rows, length] of any floating type; ``levels`` uint8 [rows, length], the stored
    integers u of ``format.grid``; ``scale`` and ``zero_point`` float32 [rows, groups] (or [1, 1] layer-wise), both
    finite. Sums are in float64.

    Raises NonFiniteError where ``weight`` or a scale holds NaN or Inf.
    """
    for name, tensor in (("the weight", weight), ("a scale", scale), ("a zero point", zero_point)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(f"{name} holds NaN or Inf")
    codes, scale = pack(levels.contiguous(), format.bits), scale.float()
    point = None if zero_point is None else zero_point.float()
    values = dequantize(format, codes, scale, point)
    step = max(1, _ELEMENTS // max(1, format.length))
    parts = [
        _row_sums(weight[start : start + step].double(), values[start : start + step].double())
        for start in range(0, len(weight), step)
    ] or [torch.zeros(3, 0, dtype=torch.float64)]
    dot, quantized_norm, original_norm = torch.cat(parts, 1)
    zeros = (values == 0).sum(1).cpu()
    return Quantized(format, codes, scale, point, dot, quantized_norm, original_norm, zeros)


def _row_sums(weight: Tensor, values: Tensor) -> Tensor:
    """Float64 [3, rows] on the CPU: <Ŵ, W>, ‖Ŵ‖² and ‖W‖²."""
    return torch.stack([(values * weight).sum(1), values.square().sum(1), weight.square().sum(1)]).cpu()
