"""The kernel of sweep.py: segments rounded to every width at once, and the totals of what comes out."""

from __future__ import annotations

from ._triton import jit, tl
from .channels import channels_at, row_pointers
from .device import exponent_of, two_to_the
from .scales import scales_kernel
from .tiles import chunk_mask, item_of, largest_bits, load_tile, segments_of


@jit
def sweep_kernel(
    table_ptr: tl.tensor,
    programs_ptr: tl.tensor,
    taps_ptr: tl.tensor,
    absmax_ptr: tl.tensor,
    total_ptr: tl.tensor,
    GRID: tl.constexpr,
    WIDTHS: tl.constexpr,
    FINENESS: tl.constexpr,
    DTYPE: tl.constexpr,
    KINDS: tl.constexpr,
    WARPS: tl.constexpr,
) -> None:
    """Totals of w², and of code times w, code² and (sum of a channel's codes)² at every width.

    ``total`` is int64 [segments, 3, 8]: w² and then a code times w for every width; code²; squares of channels' sums.
    """
    item_ptr, i_tile, kind = item_of(table_ptr, programs_ptr)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            _sweep_tile(
                item_ptr,
                i_tile,
                taps_ptr,
                absmax_ptr,
                total_ptr,
                GRID,
                WIDTHS,
                FINENESS,
                DTYPE,
                max(1, 32 * WARPS // (KINDS[k] // 4096)),
                KINDS[k] // 4096,
                KINDS[k] // 4 % 16,
                KINDS[k] // 64 % 64,
                KINDS[k] // 2 % 2 == 1,
                KINDS[k] % 2 == 1,
            )


@jit
def _sweep_tile(
    item_ptr: tl.tensor,
    i_tile: tl.tensor,
    taps_ptr: tl.tensor,
    absmax_ptr: tl.tensor,
    total_ptr: tl.tensor,
    GRID: tl.constexpr,
    WIDTHS: tl.constexpr,
    FINENESS: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    T: tl.constexpr,
    V: tl.constexpr,
    NC: tl.constexpr,
    ALIGNED: tl.constexpr,
    LOOP: tl.constexpr,
) -> None:
    """Read the tile for the largest magnitude; then again, from the nearest cache, for all widths."""
    here, m_row, count, o_output, _o_byte = segments_of(item_ptr, i_tile, DTYPE, ROWS, T, V, ALIGNED)
    count = count.to(tl.int32)  # sweep.LONGEST
    b_bits = tl.zeros((ROWS, T), dtype=tl.int32)
    if LOOP:
        for first in range(0, count, NC * T * V):
            chunks = load_tile(here, m_row, count, first, T, V, NC, ALIGNED)
            b_bits = tl.maximum(b_bits, largest_bits(chunks, ROWS, T, NC))
    else:
        b_bits = largest_bits(load_tile(here, m_row, count, 0, T, V, NC, ALIGNED), ROWS, T, NC)
    b_absmax = tl.max(b_bits, axis=1).to(tl.float32, bitcast=True)
    tl.store(absmax_ptr + o_output, b_absmax, mask=m_row)
    b_e = exponent_of(b_absmax)
    b_unit = two_to_the(FINENESS - b_e)
    inverses = ()
    for k in tl.static_range(len(WIDTHS)):
        _scale, _zero_point, b_inverse, _offset, _spread = scales_kernel(b_absmax, b_absmax, b_absmax, GRID, WIDTHS[k])
        inverses = inverses + (b_inverse * two_to_the(b_e - FINENESS),)

    dots = _zeros(len(WIDTHS) + 1, tl.int64, ROWS, T)
    powers = _zeros(len(WIDTHS), tl.int64, ROWS, T)
    sums = _zeros(len(WIDTHS), tl.int32, ROWS, T)
    squares = _zeros(len(WIDTHS), tl.int64, ROWS, T)
    taps = tl.load(taps_ptr + tl.load(item_ptr + 8))
    if taps == 1:
        for first in range(0, count, T * V):
            mask = chunk_mask(m_row, count, first, T, V, ALIGNED)
            y = tl.load(here + first, mask=mask, other=0.0).to(tl.float32).to(tl.float64) * b_unit[:, None, None]
            dots, some, more = _add_levels(dots, y, inverses, GRID, WIDTHS, FINENESS)
            sums = _plus(sums, some)
            powers = _plus(powers, more)
        seen = (count + T * V - 1) // (T * V) * (T * V)
    else:
        channels = count // taps
        rows_ptr = row_pointers(item_ptr, i_tile, DTYPE, ROWS)
        for first in range(0, channels, T):
            channel_ptr, mask = channels_at(rows_ptr, m_row, first, channels, taps, T)
            few_sums = _zeros(len(WIDTHS), tl.int32, ROWS, T)
            few_powers = _zeros(len(WIDTHS), tl.int32, ROWS, T)
            for t in tl.range(0, taps, loop_unroll_factor=3):
                b_w = tl.load(channel_ptr + t, mask=mask, other=0.0).to(tl.float32)
                y = (b_w.to(tl.float64) * b_unit[:, None])[:, :, None]
                dots, some_here, more_here = _add_levels(dots, y, inverses, GRID, WIDTHS, FINENESS)
                few_sums = _plus(few_sums, some_here)
                few_powers = _plus(few_powers, more_here)
            sums = _plus(sums, few_sums)
            powers = _plus(powers, few_powers)
            squares = _plus_squares(squares, few_sums, taps, GRID, WIDTHS)
        seen = (channels + T - 1) // T * T * taps

    share = (seen // T).to(tl.int64)
    exact, norms = (_integers(dots[0], share, FINENESS),), ()
    for k in tl.static_range(len(WIDTHS)):
        exact = exact + (_integers(dots[k + 1], share, WIDTHS[k] - (GRID == "symmetric")),)
        # the sum of (low - zero)²
        twice = sums[k].to(tl.int64) * (2 * (2 ** WIDTHS[k] - (GRID == "dorefa")))
        norms = norms + (powers[k] - twice + share * (2 ** WIDTHS[k] - (GRID == "dorefa")) ** 2,)
    # what does not exist was read as 0, whose code is 1 (DoReFa) or 0
    extra = (seen - count).to(tl.int64) if GRID == "dorefa" else tl.zeros((), dtype=tl.int64)
    b_norms = tl.sum(_eight(norms), axis=1) - extra
    b_taps = b_norms
    if taps > 1:
        b_taps = tl.sum(_eight(squares), axis=1) - extra * taps
    o_total = (o_output * 24)[:, None] + tl.arange(0, 8)[None, :]
    tl.store(total_ptr + o_total, tl.sum(_eight(exact), axis=1), mask=m_row[:, None])
    tl.store(total_ptr + o_total + 8, b_norms, mask=m_row[:, None])
    tl.store(total_ptr + o_total + 16, b_taps, mask=m_row[:, None])


@jit
def _eight(values: tl.tensor) -> tl.tensor:
    """Return [ROWS, T, 8]: up to eight tensors [ROWS, T], and zeros."""
    for _ in tl.static_range(8 - len(values)):
        values = values + (tl.zeros_like(values[0]),)
    low = tl.join(tl.join(values[0], values[4]), tl.join(values[2], values[6]))
    high = tl.join(tl.join(values[1], values[5]), tl.join(values[3], values[7]))
    return tl.reshape(tl.join(low, high), (values[0].shape[0], values[0].shape[1], 8))


@jit
def _zeros(COUNT: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, T: tl.constexpr) -> tl.tensor:
    """Return a tuple of ``COUNT`` tensors [ROWS, T]."""
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (tl.zeros((ROWS, T), dtype=DTYPE),)
    return found


@jit
def _plus(sums: tl.tensor, more: tl.tensor) -> tl.tensor:
    """Return the sums of two tuples' tensors in the type of the first."""
    found = ()
    for k in tl.static_range(len(sums)):
        found = found + (sums[k] + more[k].to(sums[k].dtype),)
    return found


@jit
def _plus_squares(
    squares: tl.tensor, sums: tl.tensor, taps: tl.tensor, GRID: tl.constexpr, WIDTHS: tl.constexpr
) -> tl.tensor:
    """Add to int64 ``squares`` those of the sums of ``taps`` codes, the sums of whose ``low`` (_level) are ``sums``."""
    found = ()
    for k in tl.static_range(len(sums)):
        wide = (sums[k] - taps * (2 ** WIDTHS[k] - (GRID == "dorefa"))).to(tl.int64)
        found = found + (squares[k] + wide * wide,)
    return found


@jit
def _add_levels(
    dots: tl.tensor,
    y: tl.tensor,
    inverses: tl.tensor,
    GRID: tl.constexpr,
    WIDTHS: tl.constexpr,
    FINENESS: tl.constexpr,
) -> tl.tensor:
    """Add the patterns of y² and of each width's code times y to int64 ``dots``; sum ``low`` of _level and its squares.

    ``y`` is float64 [ROWS, T, V], the weight times 2^(FINENESS - e); sums are over V.
    """
    new, sums, powers = (dots[0] + tl.sum(_product(y, y, FINENESS), axis=2),), (), ()
    for k in tl.static_range(len(WIDTHS)):
        b_low, b_exact = _level(y * inverses[k][:, None, None], GRID, WIDTHS[k])
        new = new + (dots[k + 1] + tl.sum(_product(b_exact, y, WIDTHS[k] - (GRID == "symmetric")), axis=2),)
        sums = sums + (tl.sum(b_low, axis=2),)
        powers = powers + (tl.sum(b_low * b_low, axis=2),)
    return new, sums, powers


@jit
def _level(x: tl.tensor, GRID: tl.constexpr, BITS: tl.constexpr) -> tl.tensor:
    """Return the code of a weight of ``x`` steps, 2u - L (DoReFa) or q: low = code + L or + 2^BITS, and float64 code.

    A weight is at most the largest, so that u needs no clamp; q does where the scale is a denormal number. A float64
    of 1.5 * 2^52 and more has integers from 0 on in its low 32 bits.
    """
    MAGIC: tl.constexpr = 6755399441055744.0
    if GRID == "dorefa":
        bits = ((x + (2**BITS - 1) / 2) + MAGIC).to(tl.int64, bitcast=True)
        low = bits.to(tl.int32) * 2
    else:
        bits = (x + (MAGIC + 2**BITS)).to(tl.int64, bitcast=True)
        q = tl.maximum(bits.to(tl.int32), 2 ** (BITS - 1) + 1)
        low = tl.minimum(q, 3 * 2 ** (BITS - 1) - 1)
    bits = (bits & -4294967296) | low.to(tl.uint32, bitcast=True).to(tl.int64)
    return low, bits.to(tl.float64, bitcast=True) - (MAGIC + (2**BITS - (GRID == "dorefa")))


@jit
def _integers(patterns: tl.tensor, terms: tl.tensor, SHIFT: tl.constexpr) -> tl.tensor:
    """Return the integers in sums of ``terms`` patterns (_product)."""
    return patterns - ((tl.zeros_like(patterns) + terms * (2 * (0x433 + SHIFT) + 1)) << 51)


@jit
def _product(x: tl.tensor, y: tl.tensor, SHIFT: tl.constexpr) -> tl.tensor:
    """Return the bits of 1.5 * 2^(52 + SHIFT) + x y, x y exact: its integer multiple of 2^SHIFT, half to even."""
    return tl.fma(x, y, 6755399441055744.0 * 2.0**SHIFT).to(tl.int64, bitcast=True)
