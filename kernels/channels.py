"""Rows walked over channel by channel: a thread has an input channel of a row and takes its taps one by one."""

from __future__ import annotations

from ._triton import jit, tl


@jit
def row_pointers(item_ptr: tl.tensor, i_tile: tl.tensor, DTYPE: tl.constexpr, ROWS: tl.constexpr) -> tl.tensor:
    """Return pointers [ROWS] to the first element of each of a tile's segments (tiles.item_of gives the two)."""
    address, apart = tl.load(item_ptr), tl.load(item_ptr + 1)
    if DTYPE == "fp32":
        base_ptr = address.to(tl.pointer_type(tl.float32))
    elif DTYPE == "fp16":
        base_ptr = address.to(tl.pointer_type(tl.float16))
    else:
        base_ptr = address.to(tl.pointer_type(tl.bfloat16))
    return base_ptr + (i_tile * ROWS + tl.arange(0, ROWS)) * apart


@jit
def channels_at(
    rows_ptr: tl.tensor, m_row: tl.tensor, first: tl.tensor, channels: tl.tensor, taps: tl.tensor, T: tl.constexpr
) -> tl.tensor:
    """Return pointers to the first taps of channels ``first`` and up, and which of them exist, both [ROWS, T]."""
    o_channel = first + tl.arange(0, T)
    mask = m_row[:, None] & (o_channel < channels)[None, :]
    return rows_ptr[:, None] + (o_channel * taps)[None, :], mask
