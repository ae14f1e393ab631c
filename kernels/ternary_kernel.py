"""The kernel of ternary.py: codes in {-1, 0, 1} by a threshold, and what is summed over a segment."""

from __future__ import annotations

from ._triton import jit, tl
from .device import exponent_of, two_to_the
from .tiles import (
    add_two,
    chunk_mask,
    item_of,
    largest_bits,
    load_tile,
    rounded_pattern,
    scaled_magnitude,
    segments_of,
    store_tile,
    tile_sums,
    without_pattern,
)


@jit
def ternary_kernel(
    table_ptr: tl.tensor,
    programs_ptr: tl.tensor,
    threshold_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    absmax_ptr: tl.tensor,
    square_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    count_ptr: tl.tensor,
    GIVEN: tl.constexpr,
    FINENESS: tl.constexpr,
    DTYPE: tl.constexpr,
    KINDS: tl.constexpr,
    WARPS: tl.constexpr,
    TAPPED: tl.constexpr = False,
    taps_ptr: tl.tensor = None,
    tap_sum_ptr: tl.tensor = None,
    tap_square_ptr: tl.tensor = None,
    tap_sign_ptr: tl.tensor = None,
    tap_kept_ptr: tl.tensor = None,
) -> None:
    """Codes t + 1 with t = sign(w) where |w| > threshold, else 0; totals of w² and of the kept |w|, and their count.

    The threshold is float32(0.7 mean|w|) of the segment, or GIVEN: "tensor", one a tensor, or "segment". TAPPED: the
    sums over taps too, of tensors whose ``taps_ptr`` (int64 [tensors, 2]: taps or 0, first place of its sums) asks.
    """
    item_ptr, i_tile, kind = item_of(table_ptr, programs_ptr)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            b_threshold = _ternary_tile(
                item_ptr,
                i_tile,
                threshold_ptr,
                packed_ptr,
                absmax_ptr,
                square_ptr,
                kept_ptr,
                count_ptr,
                GIVEN,
                FINENESS,
                DTYPE,
                max(1, 32 * WARPS // (KINDS[k] // 4096)),
                KINDS[k] // 4096,
                KINDS[k] // 4 % 16,
                KINDS[k] // 64 % 64,
                KINDS[k] // 2 % 2 == 1,
                KINDS[k] % 2 == 1,
            )
            if TAPPED:
                _store_taps(
                    item_ptr,
                    i_tile,
                    b_threshold,
                    taps_ptr,
                    tap_sum_ptr,
                    tap_square_ptr,
                    tap_sign_ptr,
                    tap_kept_ptr,
                    DTYPE,
                    max(1, 32 * WARPS // (KINDS[k] // 4096)),
                    KINDS[k] // 4096,
                )


@jit
def _ternary_tile(
    item_ptr: tl.tensor,
    i_tile: tl.tensor,
    threshold_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    absmax_ptr: tl.tensor,
    square_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    count_ptr: tl.tensor,
    GIVEN: tl.constexpr,
    FINENESS: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    T: tl.constexpr,
    V: tl.constexpr,
    NC: tl.constexpr,
    ALIGNED: tl.constexpr,
    LOOP: tl.constexpr,
) -> tl.tensor:
    """One read where the tile holds the segments; else three passes, of which the later ones find them in a cache.

    Return the threshold of every segment, float32 [ROWS].
    """
    STEP: tl.constexpr = NC * T * V
    here, m_row, count, o_output, o_byte = segments_of(item_ptr, i_tile, DTYPE, ROWS, T, V, ALIGNED)
    b_bits = tl.zeros((ROWS, T), dtype=tl.int32)
    if LOOP:
        for first in range(0, count, STEP):
            chunks = load_tile(here, m_row, count, first, T, V, NC, ALIGNED)
            b_bits = tl.maximum(b_bits, largest_bits(chunks, ROWS, T, NC))
    else:
        chunks = load_tile(here, m_row, count, 0, T, V, NC, ALIGNED)
        b_bits = largest_bits(chunks, ROWS, T, NC)
    b_absmax = tl.max(b_bits, axis=1).to(tl.float32, bitcast=True)
    b_e = exponent_of(b_absmax)
    b_unit = two_to_the(FINENESS // 2 - b_e)[:, None, None]

    b_sum = tl.zeros((ROWS, T), dtype=tl.int64)
    b_square = tl.zeros((ROWS, T), dtype=tl.int64)
    steps = 1
    if LOOP:
        steps = (count + STEP - 1) // STEP
        for first in range(0, count, STEP):
            chunks = load_tile(here, m_row, count, first, T, V, NC, ALIGNED)
            b_some, b_more = tile_sums(chunks, b_unit, FINENESS, ROWS, T, NC)
            b_sum += b_some
            b_square += b_more
    else:
        b_sum, b_square = tile_sums(chunks, b_unit, FINENESS, ROWS, T, NC)
    b_total, b_squares = tl.reduce((b_sum, b_square), 1, add_two)
    if GIVEN == "tensor":
        b_threshold = tl.load(threshold_ptr + tl.load(item_ptr + 8) + tl.zeros((ROWS,), dtype=tl.int32))
    elif GIVEN == "segment":
        b_threshold = tl.load(threshold_ptr + o_output, mask=m_row, other=0.0)
    else:
        b_mean = without_pattern(b_total, steps * STEP).to(tl.float64) * two_to_the(b_e - FINENESS)
        b_threshold = (0.7 * (b_mean / count.to(tl.float64))).to(tl.float32)

    b_kept = tl.zeros((ROWS, T), dtype=tl.int64)
    b_count = tl.zeros((ROWS, T), dtype=tl.int32)
    if LOOP:
        for first in range(0, count, STEP):
            chunks = load_tile(here, m_row, count, first, T, V, NC, ALIGNED)
            codes, b_some, b_more = _codes(
                chunks, b_threshold, b_unit, m_row, count, first, FINENESS, ROWS, T, V, NC, ALIGNED
            )
            b_kept += b_some
            b_count += b_more
            store_tile(packed_ptr, o_byte, codes, m_row, count, first, 2, ROWS, T, V, NC, ALIGNED)
    else:
        codes, b_kept, b_count = _codes(chunks, b_threshold, b_unit, m_row, count, 0, FINENESS, ROWS, T, V, NC, ALIGNED)
        store_tile(packed_ptr, o_byte, codes, m_row, count, 0, 2, ROWS, T, V, NC, ALIGNED)
    b_keep, b_counts = tl.reduce((b_kept, b_count), 1, add_two)

    tl.store(absmax_ptr + o_output, b_absmax, mask=m_row)
    tl.store(square_ptr + o_output, without_pattern(b_squares, steps * STEP), mask=m_row)
    tl.store(kept_ptr + o_output, without_pattern(b_keep, steps * STEP), mask=m_row)
    tl.store(count_ptr + o_output, b_counts, mask=m_row)
    return b_threshold


@jit
def _store_taps(
    item_ptr: tl.tensor,
    i_tile: tl.tensor,
    b_threshold: tl.tensor,
    taps_ptr: tl.tensor,
    tap_sum_ptr: tl.tensor,
    tap_square_ptr: tl.tensor,
    tap_sign_ptr: tl.tensor,
    tap_kept_ptr: tl.tensor,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    T: tl.constexpr,
) -> None:
    """Of rows of one segment, for every channel: Σ_t w and Σ_t w² (t in order), the sum of the kept signs, their count.

    A thread a channel, [ROWS, T] at a time: the rows are in the nearest cache, from the passes before. Nothing but the
    threshold is kept from those, so that registers do not run short in them.
    """
    KIND: tl.constexpr = tl.float32 if DTYPE == "fp32" else tl.float16 if DTYPE == "fp16" else tl.bfloat16
    asked_ptr = taps_ptr + 2 * tl.load(item_ptr + 8)
    taps = tl.load(asked_ptr).to(tl.int32)
    channels = tl.where(taps > 0, tl.load(item_ptr + 2).to(tl.int32) // tl.maximum(taps, 1), 0)
    o_row = i_tile * ROWS + tl.arange(0, ROWS)
    m_row = o_row < tl.load(item_ptr + 3)
    row_ptr = tl.load(item_ptr).to(tl.pointer_type(KIND)) + (o_row * tl.load(item_ptr + 1))[:, None]
    o_taps = tl.load(asked_ptr + 1) + o_row * channels
    for first in range(0, channels, T):
        o_channel = first + tl.arange(0, T)
        mask = m_row[:, None] & (o_channel < channels)[None, :]
        b_sum = tl.zeros((ROWS, T), dtype=tl.float64)
        b_square = tl.zeros((ROWS, T), dtype=tl.float64)
        b_sign = tl.zeros((ROWS, T), dtype=tl.int32)
        b_kept = tl.zeros((ROWS, T), dtype=tl.int32)
        for t in range(taps):
            b_w = tl.load(row_ptr + (o_channel * taps + t)[None, :], mask=mask, other=0.0).to(tl.float32)
            b_wide = b_w.to(tl.float64)
            b_sum += b_wide
            b_square += b_wide * b_wide
            b_above = (tl.abs(b_w) > b_threshold[:, None]).to(tl.int32)
            b_kept += b_above
            b_sign += tl.where(b_w < 0, -b_above, b_above)
        o_here = o_taps[:, None] + o_channel[None, :]
        tl.store(tap_sum_ptr + o_here, b_sum, mask=mask)
        tl.store(tap_square_ptr + o_here, b_square, mask=mask)
        tl.store(tap_sign_ptr + o_here, b_sign.to(tl.int16), mask=mask)
        tl.store(tap_kept_ptr + o_here, b_kept.to(tl.int16), mask=mask)


@jit
def _codes(
    chunks: tl.tensor,
    b_threshold: tl.tensor,
    b_unit: tl.tensor,
    m_row: tl.tensor,
    count: tl.tensor,
    first: tl.tensor,
    FINENESS: tl.constexpr,
    ROWS: tl.constexpr,
    T: tl.constexpr,
    V: tl.constexpr,
    NC: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Return the codes of every chunk, and of what is kept the patterns' sum and the count a thread, [ROWS, T]."""
    codes = ()
    b_kept = tl.zeros((ROWS, T), dtype=tl.int64)
    b_count = tl.zeros((ROWS, T), dtype=tl.int32)
    for c in tl.static_range(NC):
        b_w = chunks[c].to(tl.float32)
        b_above = tl.abs(b_w) > b_threshold[:, None, None]
        pattern = rounded_pattern(scaled_magnitude(chunks[c], b_unit), 2.0 ** (FINENESS - FINENESS // 2))
        b_kept += tl.sum(tl.where(b_above, pattern, 0x4338000000000000), axis=2)
        b_count += tl.sum(b_above.to(tl.int32), axis=2)
        b_code = tl.where(b_above, 2 - ((b_w.to(tl.int32, bitcast=True) >> 30) & 2), 1)
        if not ALIGNED:
            b_code = tl.where(chunk_mask(m_row, count, first + c * T * V, T, V, ALIGNED), b_code, 0)
        codes = codes + (b_code,)
    return codes, b_kept, b_count
