"""What kernels share: powers of two, rounding and totals as in sums.py, and codes into and out of a bit stream."""

from __future__ import annotations

from ._triton import jit, tl


@jit
def exponent_of(absmax: tl.tensor) -> tl.tensor:
    """Return int32 e with float32 ``absmax < 2^e`` (sums.exponents)."""
    field = absmax.to(tl.int32, bitcast=True) >> 23
    return tl.maximum(field, 1) - 126


@jit
def two_to_the(exponent: tl.tensor) -> tl.tensor:
    """Return 2^exponent in float64 (sums.power_of_two)."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@jit
def store_codes(
    packed_ptr: tl.tensor,
    codes: tl.tensor,
    o_start: tl.tensor,
    first: tl.tensor,
    length: tl.tensor,
    m_row: tl.tensor,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Pack int64 ``codes`` [ROWS, BLOCK], zero beyond the segment, and store them.

    ``o_start`` [ROWS] is where the segment's bytes begin, ``first`` the block's first column within the segment (a
    multiple of 8), ``length`` the segment's elements.
    """
    o_eight = tl.arange(0, 8)
    lanes = tl.reshape(codes, (ROWS, BLOCK // 8, 8)) << (o_eight * BITS).to(tl.int64)[None, None, :]
    words = tl.sum(lanes, axis=2)
    o_word = first // 8 + tl.arange(0, BLOCK // 8)
    o_byte = o_word[:, None] * BITS + o_eight[None, :]
    found = (words[:, :, None] >> (o_eight * 8).to(tl.int64)[None, None, :]) & 0xFF
    m_byte = (o_eight[None, :] < BITS) & (o_byte < (length * BITS + 7) // 8)
    o_store = o_start[:, None, None] + o_byte[None, :, :]
    tl.store(packed_ptr + o_store, found.to(tl.uint8), mask=m_row[:, None, None] & m_byte[None, :, :])


@jit
def load_codes(
    packed_ptr: tl.tensor,
    o_start: tl.tensor,
    o_column: tl.tensor,
    row_bytes: tl.tensor,
    mask: tl.tensor,
    BITS: tl.constexpr,
) -> tl.tensor:
    """Load int32 codes [rows, block] at columns ``o_column`` of rows that begin at byte ``o_start``.

    A code lies in one byte or in two neighbours; the second is not read where it would be the next row's.
    """
    o_bit = o_column.to(tl.int64) * BITS
    o_byte = o_bit // 8
    here = packed_ptr + o_start[:, None] + o_byte[None, :]
    low = tl.load(here, mask=mask, other=0).to(tl.int32)
    high = tl.load(here + 1, mask=mask & (o_byte + 1 < row_bytes)[None, :], other=0).to(tl.int32)
    return ((low | (high << 8)) >> (o_bit % 8).to(tl.int32)[None, :]) & ((1 << BITS) - 1)
