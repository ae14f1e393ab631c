"""The kernel of uniform.py: codes of 2 to 8 bits on any uniform grid, and what is summed over a segment."""

from __future__ import annotations

from ._triton import jit, tl
from .device import exponent_of, two_to_the
from .factors import factors_of, load_products
from .scales import scales_kernel
from .tiles import (
    add_four,
    chunk_mask,
    item_of,
    largest_bits,
    rounded_pattern,
    segments_of,
    store_tile,
    tile_range,
    without_pattern,
)


@jit
def uniform_kernel(
    table_ptr: tl.tensor,
    programs_ptr: tl.tensor,
    extremes_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_point_ptr: tl.tensor,
    absmax_ptr: tl.tensor,
    bound_ptr: tl.tensor,
    square_ptr: tl.tensor,
    dot_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    count_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    GRID: tl.constexpr,
    BITS: tl.constexpr,
    LAYER_WISE: tl.constexpr,
    FINENESS: tl.constexpr,
    DTYPE: tl.constexpr,
    KINDS: tl.constexpr,
    WARPS: tl.constexpr,
    CLIPPED: tl.constexpr = False,
    FACTORED: tl.constexpr = False,
) -> None:
    """Codes u = clip(rint(w * inverse + offset)) in float64, half to even; totals of w², code times w and code².

    ``count``: the values that are not zero (not for DoReFa). ``scale`` and the next are not written where LAYER_WISE:
    scales then follow from ``extremes`` [tensors, 3].
    Where CLIPPED, ``extremes`` [tensors] is the fraction of a segment's range that its scale spans.
    Where FACTORED, w is the float32 product of a weight and what ``factors`` (Batch.factors) has for its column.
    """
    item_ptr, i_tile, kind = item_of(table_ptr, programs_ptr)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            _uniform_tile(
                item_ptr,
                i_tile,
                extremes_ptr,
                packed_ptr,
                scale_ptr,
                zero_point_ptr,
                absmax_ptr,
                bound_ptr,
                square_ptr,
                dot_ptr,
                norm_ptr,
                count_ptr,
                factors_ptr,
                GRID,
                BITS,
                LAYER_WISE,
                FINENESS,
                DTYPE,
                max(1, 32 * WARPS // (KINDS[k] // 4096)),
                KINDS[k] // 4096,
                KINDS[k] // 4 % 16,
                KINDS[k] // 64 % 64,
                KINDS[k] // 2 % 2 == 1,
                KINDS[k] % 2 == 1,
                CLIPPED,
                FACTORED,
            )


@jit
def _uniform_tile(
    item_ptr: tl.tensor,
    i_tile: tl.tensor,
    extremes_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    zero_point_ptr: tl.tensor,
    absmax_ptr: tl.tensor,
    bound_ptr: tl.tensor,
    square_ptr: tl.tensor,
    dot_ptr: tl.tensor,
    norm_ptr: tl.tensor,
    count_ptr: tl.tensor,
    factors_ptr: tl.tensor,
    GRID: tl.constexpr,
    BITS: tl.constexpr,
    LAYER_WISE: tl.constexpr,
    FINENESS: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    T: tl.constexpr,
    V: tl.constexpr,
    NC: tl.constexpr,
    ALIGNED: tl.constexpr,
    LOOP: tl.constexpr,
    CLIPPED: tl.constexpr,
    FACTORED: tl.constexpr,
) -> None:
    """One read where the tile holds the segments; else two passes, of which the second finds them in a cache."""
    STEP: tl.constexpr = NC * T * V
    # several chunks' codes make a word (store_tile); others are stored at once, as codes that wait take registers
    WAIT: tl.constexpr = V == 1 and T < 8
    here, m_row, count, o_output, o_byte = segments_of(item_ptr, i_tile, DTYPE, ROWS, T, V, ALIGNED)
    factor = here
    if FACTORED:
        factor = factors_of(factors_ptr, item_ptr, o_output, T, V, ALIGNED)
    b_bits = tl.zeros((ROWS, T), dtype=tl.int32)
    b_low = tl.full((ROWS, T), float("inf"), dtype=tl.float32)
    b_high = tl.full((ROWS, T), float("-inf"), dtype=tl.float32)
    if LOOP:
        for first in range(0, count, STEP):
            chunks = load_products(here, factor, m_row, count, first, T, V, NC, ALIGNED, FACTORED)
            b_bits = tl.maximum(b_bits, largest_bits(chunks, ROWS, T, NC))
            if GRID == "asymmetric":
                b_least, b_most = tile_range(chunks, m_row, count, first, ROWS, T, V, NC, ALIGNED)
                b_low, b_high = tl.minimum(b_low, b_least), tl.maximum(b_high, b_most)
    else:
        chunks = load_products(here, factor, m_row, count, 0, T, V, NC, ALIGNED, FACTORED)
        b_bits = largest_bits(chunks, ROWS, T, NC)
        if GRID == "asymmetric":
            b_low, b_high = tile_range(chunks, m_row, count, 0, ROWS, T, V, NC, ALIGNED)
    b_absmax = tl.max(b_bits, axis=1).to(tl.float32, bitcast=True)
    b_largest, b_minimum, b_maximum = b_absmax, b_absmax, b_absmax
    if LAYER_WISE:
        o_extremes = 3 * tl.load(item_ptr + 8) + tl.zeros((ROWS,), dtype=tl.int32)
        b_largest = tl.load(extremes_ptr + o_extremes)
        b_minimum = tl.load(extremes_ptr + o_extremes + 1)
        b_maximum = tl.load(extremes_ptr + o_extremes + 2)
    elif GRID == "asymmetric":
        b_minimum = tl.where(m_row, tl.min(b_low, axis=1), 0.0)
        b_maximum = tl.where(m_row, tl.max(b_high, axis=1), 0.0)
    if CLIPPED:
        b_clip = tl.load(extremes_ptr + tl.load(item_ptr + 8))
        b_constant = b_minimum == b_maximum
        b_largest = b_largest * b_clip
        b_minimum = tl.where(b_constant, b_minimum, b_minimum * b_clip)
        b_maximum = tl.where(b_constant, b_maximum, b_maximum * b_clip)
    b_scale, b_zero_point, b_inverse, b_offset, b_spread = scales_kernel(b_largest, b_minimum, b_maximum, GRID, BITS)
    b_bound = b_absmax + b_spread
    b_e = exponent_of(b_absmax)
    b_reach = exponent_of(b_bound)

    b_square = tl.zeros((ROWS, T), dtype=tl.int64)
    b_dot = tl.zeros((ROWS, T), dtype=tl.int64)
    b_norm = tl.zeros((ROWS, T), dtype=tl.int64)
    b_count = tl.zeros((ROWS, T), dtype=tl.int32)
    steps = 1
    if LOOP:
        steps = (count + STEP - 1) // STEP
    for first in range(0, count if LOOP else STEP, STEP):
        if LOOP:
            chunks = load_products(here, factor, m_row, count, first, T, V, NC, ALIGNED, FACTORED)
        codes = ()
        for c in tl.static_range(NC):
            mask = chunk_mask(m_row, count, first + c * T * V, T, V, ALIGNED)
            b_code, b_some_dot, b_some_norm, b_some = levels_kernel(
                chunks[c], mask, b_scale, b_zero_point, b_inverse, b_offset, b_e, b_reach, GRID, BITS, FINENESS
            )
            y = chunks[c].to(tl.float32).to(tl.float64) * two_to_the(FINENESS // 2 - b_e)[:, None, None]
            b_square += tl.sum(rounded_pattern(y * (1.0 + FINENESS % 2), y), axis=2)
            b_dot += tl.sum(b_some_dot, axis=2)
            b_norm += tl.sum(b_some_norm, axis=2)
            b_count += tl.sum(b_some, axis=2)
            if WAIT:
                codes = codes + (b_code,)
            else:
                store_tile(packed_ptr, o_byte, (b_code,), m_row, count, first + c * T * V, BITS, ROWS, T, V, 1, ALIGNED)
        if WAIT:
            store_tile(packed_ptr, o_byte, codes, m_row, count, first, BITS, ROWS, T, V, NC, ALIGNED)

    b_squares, b_dots, b_norms, b_counts = tl.reduce((b_square, b_dot, b_norm, b_count), 1, add_four)
    if GRID == "asymmetric":
        tl.store(bound_ptr + o_output, b_bound, mask=m_row)
        b_norms = without_pattern(b_norms, steps * STEP)
    if not LAYER_WISE:
        tl.store(scale_ptr + o_output, b_scale, mask=m_row)
        if GRID == "asymmetric":
            tl.store(zero_point_ptr + o_output, b_zero_point, mask=m_row)
    tl.store(absmax_ptr + o_output, b_absmax, mask=m_row)
    tl.store(square_ptr + o_output, without_pattern(b_squares, steps * STEP), mask=m_row)
    tl.store(dot_ptr + o_output, without_pattern(b_dots, steps * STEP), mask=m_row)
    tl.store(norm_ptr + o_output, b_norms, mask=m_row)
    if GRID != "dorefa":
        tl.store(count_ptr + o_output, b_counts, mask=m_row)


@jit
def levels_kernel(
    chunk: tl.tensor,
    mask: tl.tensor,
    b_scale: tl.tensor,
    b_zero_point: tl.tensor,
    b_inverse: tl.tensor,
    b_offset: tl.tensor,
    b_e: tl.tensor,
    b_reach: tl.tensor,
    GRID: tl.constexpr,
    BITS: tl.constexpr,
    FINENESS: tl.constexpr,
) -> tl.tensor:
    """Return int32 codes, patterns of the dot product's terms, squares and 1 where a value is not zero, [ROWS, T, V].

    Squares are integers, for the asymmetric grid patterns on the grid of 2^(2 reach - FINENESS). Codes are 0 where
    nothing exists.
    """
    H: tl.constexpr = FINENESS // 2
    b_w = chunk.to(tl.float32).to(tl.float64)
    y = b_w * two_to_the(H - b_e)[:, None, None]
    # the integer is in the low bits of the sum, and below 2^31
    b_sum = (b_w * b_inverse[:, None, None] + b_offset[:, None, None]) + 6755399441055744.0
    b_level = b_sum.to(tl.int64, bitcast=True).to(tl.int32)
    if GRID == "symmetric":
        b_level = tl.minimum(tl.maximum(b_level, 1 - 2 ** (BITS - 1)), 2 ** (BITS - 1) - 1)
        b_code = tl.where(mask, b_level + 2 ** (BITS - 1), 0)
        b_dot = rounded_pattern(b_level.to(tl.float64) * 2.0 ** (FINENESS - (BITS - 1) - H), y)
        return b_code, b_dot, b_level * b_level, (b_level != 0).to(tl.int32)
    else:
        b_level = tl.minimum(tl.maximum(b_level, 0), 2**BITS - 1)
        b_code = tl.where(mask, b_level, 0)
        if GRID == "dorefa":
            b_odd = tl.where(mask, 2 * b_level - (2**BITS - 1), 0)
            b_dot = rounded_pattern(b_odd.to(tl.float64) * 2.0 ** (FINENESS - BITS - H), y)
            return b_code, b_dot, b_odd * b_odd, tl.zeros_like(b_odd)
        else:
            b_value = (b_level.to(tl.float32) - b_zero_point[:, None, None]) * b_scale[:, None, None]
            b_value = tl.where(mask, b_value, 0.0)
            b_exact = b_value.to(tl.float64)
            b_dot = rounded_pattern(b_exact * two_to_the(FINENESS - H - b_reach)[:, None, None], y)
            z = b_exact * two_to_the(H - b_reach)[:, None, None]
            b_norm = rounded_pattern(z * (1.0 + FINENESS % 2), z)
            return b_code, b_dot, b_norm, (b_value != 0).to(tl.int32)
