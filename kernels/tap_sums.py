"""Sums over the taps of every input channel: what the analytic calibrator needs (docs/methods.md, section 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import jit, tl
from .dequantize import dequantize
from .formats import Quantized, TapSums, TapSumsOfBoth
from .launch import launch_shape, on_device, use_triton, warps_for
from .segments import check_weight, row_chunks


def check_taps(weight: Tensor, taps: int) -> None:
    """Raise ValueError unless ``weight`` is a floating [rows, length] and ``taps`` divides its length."""
    check_weight(weight, weight.shape[-1])
    if taps < 1 or weight.shape[1] % taps:
        raise ValueError(f"taps is {taps} for rows of {weight.shape[1]}; it must divide them")


def tap_sums_reference(weight: Tensor, taps: int) -> TapSums:
    """Sum ``weight`` [rows, length] and its squares over each run of ``taps`` neighbours, in float64, left to right.

    Raises:
        ValueError: the weight's shape or type cannot be used, or ``taps`` does not divide the length.
    """
    check_taps(weight, taps)
    rows, length = weight.shape
    sums = torch.zeros((rows, length // taps), dtype=torch.float64, device=weight.device)
    squares = torch.zeros_like(sums)
    for chunk in row_chunks(rows, length) if length else ():
        columns = weight[chunk].reshape(-1, length // taps, taps).permute(2, 0, 1).double()
        for column in columns.contiguous():
            sums[chunk] += column
            squares[chunk] += column * column
    return TapSums(sums, squares)


@jit
def tap_sums_kernel(
    weight_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    square_ptr: tl.tensor,
    rows: tl.tensor,
    channels: tl.tensor,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Sum_t w[r, i, t] and sum_t w[r, i, t]², t in order; a square of float32 is exact in float64."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    for first in range(0, channels, BLOCK):
        o_channel = first + tl.arange(0, BLOCK)
        mask = (o_row < rows)[:, None] & (o_channel < channels)[None, :]
        o_here = o_row[:, None] * channels + o_channel[None, :]
        b_sum = tl.zeros((ROWS, BLOCK), dtype=tl.float64)
        b_square = tl.zeros((ROWS, BLOCK), dtype=tl.float64)
        for t in range(TAPS):
            b_w = tl.load(weight_ptr + o_here * TAPS + t, mask=mask, other=0.0).to(tl.float32).to(tl.float64)
            b_sum += b_w
            b_square += b_w * b_w
        tl.store(sum_ptr + o_here, b_sum, mask=mask)
        tl.store(square_ptr + o_here, b_square, mask=mask)


def tap_sums_triton(weight: Tensor, taps: int) -> TapSums:
    """Launch the kernel; see ``tap_sums_reference``."""
    check_taps(weight, taps)
    weight = weight.contiguous()
    rows, channels = weight.shape[0], weight.shape[1] // taps
    sums, squares = torch.empty((2, rows, channels), dtype=torch.float64, device=weight.device).unbind()
    if weight.numel():
        shape = launch_shape(rows, channels)
        with on_device(weight):
            tap_sums_kernel[(-(-rows // shape.rows),)](
                weight,
                sums,
                squares,
                rows,
                channels,
                TAPS=taps,
                ROWS=shape.rows,
                BLOCK=shape.block,
                num_warps=warps_for(shape.num_warps),
                enable_fp_fusion=False,
            )
    return TapSums(sums, squares)


def tap_sums(weight: Tensor, taps: int) -> TapSums:
    """Sum over taps; see ``tap_sums_reference``."""
    return tap_sums_triton(weight, taps) if use_triton(weight) else tap_sums_reference(weight, taps)


def tap_sums_of_both(weight: Tensor, quantized: Quantized, taps: int) -> TapSumsOfBoth:
    """Return the tap sums of ``weight`` [rows, length] and of the values of its codes, by passes of their own.

    Raises:
        ValueError: the weight's shape or type cannot be used, or ``taps`` does not divide the length.
    """
    original = tap_sums(weight, taps)
    values = dequantize(quantized.format, quantized.codes, quantized.scale, quantized.zero_point, torch.float32)
    return TapSumsOfBoth(_on_cpu(original), _on_cpu(tap_sums(values, taps)))


def _on_cpu(found: TapSums) -> TapSums:
    return TapSums(found.sums.cpu(), found.squares.cpu())
