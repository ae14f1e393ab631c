"""The device side of the launch table: where a program works, what it loads, and codes on their way out.

A tile is [ROWS, T, V] elements in each of NC chunks, a tuple of tensors that stay in registers (shapes.Tile): element
``first + (c * T + t) * V + j`` of segment r is ``chunks[c][r, t, j]``.
"""

from __future__ import annotations

from ._triton import jit, tl


@jit
def item_of(table_ptr: tl.tensor, programs_ptr: tl.tensor) -> tl.tensor:
    """Return this program's item of the table (table.FIELDS int64), its tile within the item and the tile's kind."""
    pid = tl.program_id(0).to(tl.int64)
    item_ptr = table_ptr + tl.load(programs_ptr + 2 * pid).to(tl.int64) * 10
    return item_ptr, tl.load(programs_ptr + 2 * pid + 1).to(tl.int64), tl.load(item_ptr + 9)


@jit
def segments_of(
    item_ptr: tl.tensor,
    i_tile: tl.tensor,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    T: tl.constexpr,
    V: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Return pointers [ROWS, T, V] to the first chunk, which segments exist, how long they are, and where they go.

    The last two: the place of each segment in the flat outputs and its first byte in the flat codes, int64 [ROWS].
    """
    address, apart, count = tl.load(item_ptr), tl.load(item_ptr + 1), tl.load(item_ptr + 2)
    if DTYPE == "fp32":
        base_ptr = address.to(tl.pointer_type(tl.float32))
    elif DTYPE == "fp16":
        base_ptr = address.to(tl.pointer_type(tl.float16))
    else:
        base_ptr = address.to(tl.pointer_type(tl.bfloat16))
    if ALIGNED:
        base_ptr = tl.multiple_of(base_ptr, 16)
        apart = apart // V * V
        count = count // V * V
    count = count.to(tl.int32)
    o_segment = i_tile * ROWS + tl.arange(0, ROWS)
    m_row = o_segment < tl.load(item_ptr + 3)
    o_lane = (tl.arange(0, T) * V)[:, None] + tl.arange(0, V)[None, :]
    here = base_ptr + (o_segment * apart)[:, None, None] + o_lane[None, :, :]
    o_byte = tl.load(item_ptr + 4) + o_segment * tl.load(item_ptr + 5)
    o_output = tl.load(item_ptr + 6) + o_segment * tl.load(item_ptr + 7)
    return here, m_row, count, o_output, o_byte


@jit
def chunk_mask(
    m_row: tl.tensor, count: tl.tensor, start: tl.tensor, T: tl.constexpr, V: tl.constexpr, ALIGNED: tl.constexpr
) -> tl.tensor:
    """Return which elements of the chunk that begins at ``start`` exist, [ROWS, T, V], or [ROWS, T, 1] if aligned."""
    o_column = start + (tl.arange(0, T) * V)[:, None]
    if not ALIGNED:
        o_column += tl.arange(0, V)[None, :]
    return m_row[:, None, None] & (o_column < count)[None, :, :]


@jit
def load_tile(
    here: tl.tensor,
    m_row: tl.tensor,
    count: tl.tensor,
    first: tl.tensor,
    T: tl.constexpr,
    V: tl.constexpr,
    NC: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Load the chunks from element ``first`` on, in the weight's own type; zeros where nothing exists."""
    chunks = ()
    for c in tl.static_range(NC):
        mask = chunk_mask(m_row, count, first + c * T * V, T, V, ALIGNED)
        chunks = chunks + (tl.load(here + (first + c * T * V), mask=mask, other=0.0),)
    return chunks


@jit
def largest_bits(chunks: tl.tensor, ROWS: tl.constexpr, T: tl.constexpr, NC: tl.constexpr) -> tl.tensor:
    """Return int32 [ROWS, T]: the bits of each thread's largest float32 |w|, with Inf and then NaN on top."""
    b_bits = tl.zeros((ROWS, T), dtype=tl.int32)
    for c in tl.static_range(NC):
        magnitude = chunks[c].to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
        b_bits = tl.maximum(b_bits, tl.max(magnitude, axis=2))
    return b_bits


@jit
def tile_range(
    chunks: tl.tensor,
    m_row: tl.tensor,
    count: tl.tensor,
    first: tl.tensor,
    ROWS: tl.constexpr,
    T: tl.constexpr,
    V: tl.constexpr,
    NC: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tl.tensor:
    """Return each thread's least and greatest w, float32 [ROWS, T]: infinities where it has none."""
    b_low = tl.full((ROWS, T), float("inf"), dtype=tl.float32)
    b_high = tl.full((ROWS, T), float("-inf"), dtype=tl.float32)
    for c in tl.static_range(NC):
        mask = chunk_mask(m_row, count, first + c * T * V, T, V, ALIGNED)
        b_w = chunks[c].to(tl.float32)
        b_low = tl.minimum(b_low, tl.min(tl.where(mask, b_w, float("inf")), axis=2))
        b_high = tl.maximum(b_high, tl.max(tl.where(mask, b_w, float("-inf")), axis=2))
    return b_low, b_high


@jit
def scaled_magnitude(chunk: tl.tensor, b_unit: tl.tensor) -> tl.tensor:
    """Return |w| times the float64 power of two ``b_unit`` [ROWS, 1, 1]: exact."""
    return tl.abs(chunk.to(tl.float32)).to(tl.float64) * b_unit


@jit
def rounded_pattern(x: tl.tensor, y: tl.tensor) -> tl.tensor:
    """Return 1.5 * 2^52 + rint(x * y) as its int64 bits, x * y exact and below 2^51: rint in the low 48 bits.

    Sums of patterns, modulo 2^64, are sums of the integers but for what ``without_pattern`` takes off.
    """
    return tl.fma(x, y, 6755399441055744.0).to(tl.int64, bitcast=True)


@jit
def without_pattern(total: tl.tensor, terms: tl.tensor) -> tl.tensor:
    """Return the sum of integers from the sum of ``terms`` patterns: those of 1.5 * 2^52 are 0x4338 * 2^48 each."""
    return total - (((tl.zeros_like(total) + terms) * 0x4338) << 48)


@jit
def add_two(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tensor:
    """Add pairs, for tl.reduce."""
    return a + c, b + d


@jit
def add_four(
    a: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    d: tl.tensor,
    e: tl.tensor,
    f: tl.tensor,
    g: tl.tensor,
    h: tl.tensor,
) -> tl.tensor:
    """Add fours, for tl.reduce."""
    return a + e, b + f, c + g, d + h


@jit
def tile_sums(
    chunks: tl.tensor, b_unit: tl.tensor, FINENESS: tl.constexpr, ROWS: tl.constexpr, T: tl.constexpr, NC: tl.constexpr
) -> tl.tensor:
    """Return patterns of |w| and of w² on the grid, summed a thread: int64 [ROWS, T] each.

    ``b_unit`` is 2^(FINENESS // 2 - e), float64 [ROWS, 1, 1], where the segment's |w| are below 2^e.
    """
    b_sum = tl.zeros((ROWS, T), dtype=tl.int64)
    b_square = tl.zeros((ROWS, T), dtype=tl.int64)
    for c in tl.static_range(NC):
        y = scaled_magnitude(chunks[c], b_unit)
        b_sum += tl.sum(rounded_pattern(y, 2.0 ** (FINENESS - FINENESS // 2)), axis=2)
        b_square += tl.sum(rounded_pattern(y * (1.0 + FINENESS % 2), y), axis=2)
    return b_sum, b_square


@jit
def store_tile(
    packed_ptr: tl.tensor,
    o_byte: tl.tensor,
    codes: tl.tensor,
    m_row: tl.tensor,
    count: tl.tensor,
    first: tl.tensor,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    T: tl.constexpr,
    V: tl.constexpr,
    NC: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """Pack the int32 ``codes`` of a tile, zero where nothing exists, from element ``first`` (a multiple of 8) on.

    ``o_byte`` int64 [ROWS] is where the segments' dense LSB-first streams begin.
    """
    if V == 1 and T < 8:
        _store_short(packed_ptr, o_byte, codes, m_row, count, BITS, T, NC)
    else:
        for c in tl.static_range(NC):
            o_here = o_byte + (first + c * T * V) * BITS // 8
            left = count - (first + c * T * V)
            _store_chunk(packed_ptr, o_here, codes[c], m_row, left, BITS, ROWS, T, V, ALIGNED)


@jit
def _store_chunk(
    packed_ptr: tl.tensor,
    o_byte: tl.tensor,
    code: tl.tensor,
    m_row: tl.tensor,
    left: tl.tensor,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    T: tl.constexpr,
    V: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> None:
    """A thread's own codes are whole bytes, or eight neighbours' are; ``left`` elements are still to come."""
    W: tl.constexpr = V if ALIGNED and V * BITS % 8 == 0 else 8
    BYTES: tl.constexpr = W * BITS // 8
    if W != V:
        code = tl.reshape(code, (ROWS, T * V // W, W))
    if BYTES > 4:
        code = code.to(tl.int64)
    o_shift = (tl.arange(0, W) * BITS).to(code.dtype)
    word = tl.sum(code << o_shift[None, None, :], axis=2)
    o_word = tl.arange(0, T * V // W) * BYTES
    end = (left * BITS + 7) // 8
    if ALIGNED and (BYTES == 1 or BYTES == 2 or BYTES == 4 or BYTES == 8):
        mask = m_row[:, None] & (o_word < end)[None, :]
        o_store = (o_byte // BYTES)[:, None] + tl.arange(0, T * V // W)[None, :]
        if BYTES == 1:
            tl.store(packed_ptr + o_store, word.to(tl.uint8), mask=mask)
        elif BYTES == 2:
            tl.store(packed_ptr.to(tl.pointer_type(tl.int16)) + o_store, word.to(tl.int16), mask=mask)
        elif BYTES == 4:
            tl.store(packed_ptr.to(tl.pointer_type(tl.int32)) + o_store, word, mask=mask)
        else:
            tl.store(packed_ptr.to(tl.pointer_type(tl.int64)) + o_store, word, mask=mask)
    else:
        for i in tl.static_range(BYTES):
            mask = m_row[:, None] & (o_word + i < end)[None, :]
            found = ((word >> (8 * i)) & 0xFF).to(tl.uint8)
            tl.store(packed_ptr + o_byte[:, None] + (o_word + i)[None, :], found, mask=mask)


@jit
def _store_short(
    packed_ptr: tl.tensor,
    o_byte: tl.tensor,
    codes: tl.tensor,
    m_row: tl.tensor,
    count: tl.tensor,
    BITS: tl.constexpr,
    T: tl.constexpr,
    NC: tl.constexpr,
) -> None:
    """T threads have single codes of a segment, fewer than eight a chunk: 8 / T chunks make a word."""
    MANY: tl.constexpr = 8 // T
    o_shift = (tl.arange(0, T) * BITS).to(tl.int64)[None, :, None]
    end = (count * BITS + 7) // 8
    for first in tl.static_range(0, NC, MANY):
        word = codes[first].to(tl.int64) << o_shift
        for c in tl.static_range(first + 1, min(first + MANY, NC)):
            word |= codes[c].to(tl.int64) << (o_shift + (c - first) * T * BITS)
        word = tl.sum(tl.sum(word, axis=2), axis=1)
        for i in tl.static_range(BITS):
            o_here = first * T * BITS // 8 + i
            found = ((word >> (8 * i)) & 0xFF).to(tl.uint8)
            tl.store(packed_ptr + o_byte + o_here, found, mask=m_row & (o_here < end))
