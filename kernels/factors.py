"""Factors of input channels, which multiply a weight before everything else: in torch, and as tiles are loaded."""

from __future__ import annotations

import torch
from torch import Tensor

from ._triton import jit, tl
from .tiles import chunk_mask, load_tile


def factor_columns(factor: Tensor, length: int) -> Tensor:
    """Return what multiplies each column of rows of ``length``, float32 [length], from a ``factor`` [in].

    Raises:
        ValueError: ``factor`` is of another type, or its channels do not divide the rows.
    """
    channels = factor.numel()
    if factor.dtype is not torch.float32 or factor.dim() != 1 or not channels or length % channels:
        raise ValueError(
            f"factor is {factor.dtype} with shape {tuple(factor.shape)} for rows of {length}; expected float32 "
            "[in_channels], which divide them"
        )
    return factor.repeat_interleave(length // channels)


def multiplied(weight: Tensor, factor: Tensor) -> Tensor:
    """Return float32 ``weight`` [rows, length] times its input channel's ``factor`` [in], rounded once."""
    return weight.float() * factor_columns(factor, weight.shape[1]).to(weight.device)


@jit
def factors_of(
    factors_ptr: tl.tensor,
    item_ptr: tl.tensor,
    o_output: tl.tensor,
    T: tl.constexpr,
    V: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Return pointers [ROWS, T, V] to what multiplies the first chunk of each segment (Batch.factors), float32."""
    here = factors_ptr + tl.load(item_ptr + 8) * 4
    groups, apart = tl.load(here + 2), tl.load(here + 3)
    base_ptr = (factors_ptr.to(tl.int64) + tl.load(here) * 8).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        base_ptr = tl.multiple_of(base_ptr, 16)
        apart = apart // V * V
    o_column = (o_output - tl.load(here + 1)) % groups * apart
    o_lane = (tl.arange(0, T) * V)[:, None] + tl.arange(0, V)[None, :]
    return base_ptr + o_column[:, None, None] + o_lane[None, :, :]


@jit
def load_products(
    here: tl.tensor,
    factor: tl.tensor,
    m_row: tl.tensor,
    count: tl.tensor,
    first: tl.tensor,
    T: tl.constexpr,
    V: tl.constexpr,
    NC: tl.constexpr,
    ALIGNED: tl.constexpr,
    FACTORED: tl.constexpr,
) -> tl.tensor:
    """Load as ``load_tile`` does, and where FACTORED multiply by ``factor`` (factors_of), rounded once to float32."""
    if FACTORED:
        products = ()
        for c in tl.static_range(NC):
            mask = chunk_mask(m_row, count, first + c * T * V, T, V, ALIGNED)
            b_w = tl.load(here + (first + c * T * V), mask=mask, other=0.0)
            b_factor = tl.load(factor + (first + c * T * V), mask=mask, other=0.0)
            products = products + (b_w.to(tl.float32) * b_factor,)
        return products
    else:
        return load_tile(here, m_row, count, first, T, V, NC, ALIGNED)
