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
def round_half_even(x: tl.tensor) -> tl.tensor:
    """Round float64 below 2^51 half to even: adding 1.5 * 2^52 leaves no room for a fraction."""
    return (x + 6755399441055744.0) - 6755399441055744.0


@jit
def exact_sum(terms: tl.tensor) -> tl.tensor:
    """Round float64 terms [rows, block] and add them to int64 [rows] (sums.exact_total)."""
    return tl.sum(round_half_even(terms).to(tl.int64), axis=1)


@jit
def magnitude_bits(x: tl.tensor) -> tl.tensor:
    """Return the bits of float32 |x| as int32: they order as magnitudes do, with Inf and then NaN on top."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@jit
def locate(
    rows: tl.tensor, length: tl.tensor, group_size: tl.tensor, groups: tl.tensor, ROWS: tl.constexpr
) -> tl.tensor:
    """Return this program's rows [ROWS], which of them exist, its group, that group's first column and its extent."""
    pid = tl.program_id(0).to(tl.int64)
    i_group = pid % groups
    o_row = (pid // groups) * ROWS + tl.arange(0, ROWS)
    start = i_group * group_size
    return o_row, o_row < rows, i_group, start, tl.minimum(group_size, length - start)


@jit
def segment_extremes(
    segment_ptr: tl.tensor,
    m_row: tl.tensor,
    count: tl.tensor,
    group_size: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Return float32 largest magnitude, minimum and maximum [ROWS] of the first ``count`` columns; 0 for no row."""
    b_bits = tl.zeros((ROWS,), dtype=tl.int32)
    b_minimum = tl.full((ROWS,), float("inf"), dtype=tl.float32)
    b_maximum = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    for first in range(0, group_size, BLOCK):
        o_column = first + tl.arange(0, BLOCK)
        mask = m_row[:, None] & (o_column < count)[None, :]
        b_w = tl.load(segment_ptr + o_column[None, :], mask=mask, other=0.0).to(tl.float32)
        b_bits = tl.maximum(b_bits, tl.max(magnitude_bits(b_w), axis=1))
        b_minimum = tl.minimum(b_minimum, tl.min(tl.where(mask, b_w, float("inf")), axis=1))
        b_maximum = tl.maximum(b_maximum, tl.max(tl.where(mask, b_w, float("-inf")), axis=1))
    b_absmax = b_bits.to(tl.float32, bitcast=True)
    return b_absmax, tl.where(m_row, b_minimum, 0.0), tl.where(m_row, b_maximum, 0.0)


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
