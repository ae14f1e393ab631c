"""Values of packed codes, the very ones that quantization measured."""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import CodeFormat, Grid
from .packing import unpack_reference
from .segments import row_chunks, row_parts


def _values(codes: Tensor, scale: Tensor, zero_point: Tensor | None, format: CodeFormat) -> Tensor:
    """Return float32 values of uint8 codes; scale and zero point broadcast against them."""
    if zero_point is not None:
        return codes.float().sub_(zero_point).mul_(scale)
    if format.grid is Grid.DOREFA:
        levels = 2**format.bits - 1
        return codes.double().mul_(2).sub_(levels).mul_(scale.double()).div_(levels).float()
    middle = 1 if format.grid is Grid.TERNARY else 2 ** (format.bits - 1)
    return codes.float().sub_(middle).mul_(scale)


def dequantize_reference(
    format: CodeFormat, codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the values [rows, length] of uint8 ``codes`` [rows, row_bytes], computed in float32, then cast.

    ``scale`` and, for the asymmetric grid, ``zero_point`` are float32 [rows, groups], or [1, 1] if layer-wise.

    Raises:
        ValueError: the codes' rows have another number of bytes than the format says.
    """
    rows = codes.shape[0]
    values = torch.empty((rows, format.length), dtype=dtype, device=codes.device)
    for chunk in row_chunks(rows, format.length) if format.length else ():
        u = unpack_reference(codes[chunk], format.bits, format.length)
        for part in row_parts(format.length, format.group_size):
            where = (slice(None), slice(None)) if format.layer_wise else (chunk, part.groups)
            point = None if zero_point is None else zero_point[where][:, :, None]
            block = u[:, part.columns].view(len(u), -1, part.length)
            found = _values(block, scale[where][:, :, None], point, format)
            values[chunk, part.columns] = found.view(len(u), -1).to(dtype)
    return values


def dequantize(
    format: CodeFormat, codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the values of packed codes; see ``dequantize_reference``."""
    return dequantize_reference(format, codes, scale, zero_point, dtype)
