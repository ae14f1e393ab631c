"""Values of packed codes, the very ones that quantization measured."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import jit, tl
from .device import load_codes
from .formats import CodeFormat, Grid
from .launch import launch_shape, on_device, use_triton, warps_for
from .packing import check_packed, unpack_reference
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


@jit
def dequantize_kernel(
    packed_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_point_ptr: tl.tensor,
    value_ptr: tl.tensor,
    rows: tl.tensor,
    length: tl.tensor,
    group_size: tl.tensor,
    groups: tl.tensor,
    row_bytes: tl.tensor,
    GRID: tl.constexpr,
    BITS: tl.constexpr,
    LAYER_WISE: tl.constexpr,
    BF16: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Values as formats.Grid defines them, in float32 (DoReFa: float64, rounded once), then in the output's type.

    ``BF16``: the output's pointer is to int16, in which the upper halves of float32 are stored.
    """
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    for first in range(0, length, BLOCK):
        o_column = first + tl.arange(0, BLOCK)
        mask = m_row[:, None] & (o_column < length)[None, :]
        b_code = load_codes(packed_ptr, o_row * row_bytes, o_column, row_bytes, mask, BITS)
        if LAYER_WISE:
            o_scale = tl.zeros((ROWS, BLOCK), dtype=tl.int64)
        else:
            o_scale = o_row[:, None] * groups + (o_column // group_size)[None, :]
        b_scale = tl.load(scale_ptr + o_scale, mask=mask, other=0.0)
        if GRID == "asymmetric":
            b_zero_point = tl.load(zero_point_ptr + o_scale, mask=mask, other=0.0)
            b_value = (b_code.to(tl.float32) - b_zero_point) * b_scale
        elif GRID == "dorefa":
            b_level = (2 * b_code - (2**BITS - 1)).to(tl.float64)
            b_value = (b_level * b_scale.to(tl.float64) / (2**BITS - 1)).to(tl.float32)
        else:
            b_value = (b_code - (1 if GRID == "ternary" else 2 ** (BITS - 1))).to(tl.float32) * b_scale
        here = value_ptr + o_row[:, None] * length + o_column[None, :]
        if BF16:
            # rounded by hand, half to even: an interpreter that cuts off would give other values than a GPU
            b_bits = b_value.to(tl.int32, bitcast=True)
            b_bits += 0x7FFF + ((b_bits >> 16) & 1)
            tl.store(here, (b_bits >> 16).to(tl.int16), mask=mask)
        else:
            tl.store(here, b_value.to(value_ptr.dtype.element_ty), mask=mask)


def dequantize_triton(
    format: CodeFormat, codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Launch the kernel; see ``dequantize_reference``."""
    check_packed(codes, format.bits, format.length)
    codes, scale, rows = codes.contiguous(), scale.contiguous(), codes.shape[0]
    values = torch.empty((rows, format.length), dtype=dtype, device=codes.device)
    if values.numel():
        shape = launch_shape(rows, format.length)
        with on_device(codes):
            dequantize_kernel[(-(-rows // shape.rows),)](
                codes,
                scale,
                scale if zero_point is None else zero_point.contiguous(),
                values.view(torch.int16) if dtype is torch.bfloat16 else values,
                rows,
                format.length,
                format.group_size,
                format.groups,
                format.row_bytes,
                GRID=format.grid.value,
                BITS=format.bits,
                LAYER_WISE=format.layer_wise,
                BF16=dtype is torch.bfloat16,
                ROWS=shape.rows,
                BLOCK=shape.block,
                num_warps=warps_for(shape.num_warps),
                enable_fp_fusion=False,
            )
    return values


def dequantize(
    format: CodeFormat, codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the values of packed codes; see ``dequantize_reference``."""
    run = dequantize_triton if use_triton(codes) else dequantize_reference
    return run(format, codes, scale, zero_point, dtype)
