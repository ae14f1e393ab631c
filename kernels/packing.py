"""Codes of 2 to 8 bits as one dense LSB-first bit stream a row: eight codes are one word of ``bits`` bytes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._triton import jit, tl
from .device import load_codes, store_codes
from .launch import launch_shape, on_device, use_triton, warps_for

# Pairs of lanes that are joined in three steps: bytes, then 16-bit lanes, then 32-bit lanes of one int64.
_LOW_LANES = {8: 0x00FF00FF00FF00FF, 16: 0x0000FFFF0000FFFF, 32: 0x00000000FFFFFFFF}


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits}; use 2 to 8")


def check_packed(packed: Tensor, bits: int, length: int) -> None:
    """Raise ValueError unless rows of ``packed`` have the bytes that ``length`` codes take."""
    _check_bits(bits)
    expected = (length * bits + 7) // 8
    if packed.shape[1] != expected:
        raise ValueError(f"rows have {packed.shape[1]} bytes; {length} codes of {bits} bits take {expected}")


def pack_reference(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 ``codes`` [rows, length] into uint8 [rows, ceil(length * bits / 8)].

    Code i of a row takes bits ``i * bits`` and up of the row's stream; the last byte is filled with zeros. Codes must
    be below 2^bits.

    Raises:
        ValueError: ``bits`` is not 2 to 8.
    """
    _check_bits(bits)
    rows, length = codes.shape
    if bits == 8:
        return codes.clone()
    if codes.numel() == 0:
        return codes.new_zeros((rows, 0))
    padded = pad(codes, (0, -length % 8)) if length % 8 else codes.contiguous()
    stream = _pack_whole_words(padded, bits)
    return stream[:, : (length * bits + 7) // 8].contiguous()


def _pack_whole_words(codes: Tensor, bits: int) -> Tensor:
    """Pack contiguous [rows, length], of a multiple of eight codes a row."""
    if bits == 4:  # of two neighbours the second moves to behind the first
        pairs = codes.view(torch.int16)
        return pairs.bitwise_or(pairs >> 4).to(torch.uint8)
    if bits == 2:  # this product puts all of four neighbours in its top byte, and nothing is carried there
        return (codes.view(torch.int32).mul(0x01041040) >> 24).to(torch.uint8)
    words = codes.view(torch.int64)
    for lane in (8, 16, 32):
        low = _LOW_LANES[lane]
        # Codes are below 2^7 here, so the top bit is clear and the arithmetic shift is a logical one.
        words = (words & low) | ((words & ~low) >> (lane - lane // 8 * bits))
    return words.view(torch.uint8).view(len(codes), -1, 8)[:, :, :bits].reshape(len(codes), -1)


def unpack_reference(packed: Tensor, bits: int, length: int) -> Tensor:
    """Unpack uint8 [rows, ceil(length * bits / 8)] into uint8 codes [rows, length].

    Raises:
        ValueError: ``bits`` is not 2 to 8, or the rows of ``packed`` have another number of bytes.
    """
    check_packed(packed, bits, length)
    rows, row_bytes = packed.shape
    if bits == 8 or packed.numel() == 0:
        return packed.reshape(rows, length).clone()
    groups = -(-length // 8)
    stream = pad(packed, (0, groups * bits - row_bytes)).view(rows, groups, bits)
    words = pad(stream, (0, 8 - bits)).reshape(-1).view(torch.int64).view(rows, groups)
    for lane in (32, 16, 8):
        low = lane // 8 * bits
        keep = _repeat_lanes((1 << low) - 1, 2 * lane)
        words = (words & keep) | ((words & (keep << low)) << (lane - low))
    return words.view(torch.uint8)[:, :length].contiguous()


def _repeat_lanes(mask: int, lane: int) -> int:
    return sum(mask << start for start in range(0, 64, lane))


@jit
def pack_kernel(
    codes_ptr: tl.tensor,
    packed_ptr: tl.tensor,
    rows: tl.tensor,
    length: tl.tensor,
    row_bytes: tl.tensor,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Eight codes become ``BITS`` bytes: the word sum code_i 2^(i BITS), least significant byte first."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    for first in range(0, length, BLOCK):
        o_column = first + tl.arange(0, BLOCK)
        mask = m_row[:, None] & (o_column < length)[None, :]
        b_code = tl.load(codes_ptr + o_row[:, None] * length + o_column[None, :], mask=mask, other=0).to(tl.int64)
        store_codes(packed_ptr, b_code, o_row * row_bytes, first, length, m_row, BITS, ROWS, BLOCK)


def pack_triton(codes: Tensor, bits: int) -> Tensor:
    """Launch the kernel; see ``pack_reference``."""
    _check_bits(bits)
    codes = codes.contiguous()
    rows, length = codes.shape
    packed = torch.empty((rows, (length * bits + 7) // 8), dtype=torch.uint8, device=codes.device)
    if codes.numel():
        shape = launch_shape(rows, length)
        with on_device(codes):
            pack_kernel[(-(-rows // shape.rows),)](
                codes,
                packed,
                rows,
                length,
                packed.shape[1],
                BITS=bits,
                ROWS=shape.rows,
                BLOCK=shape.block,
                num_warps=warps_for(shape.num_warps),
                enable_fp_fusion=False,
            )
    return packed


@jit
def unpack_kernel(
    packed_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    rows: tl.tensor,
    length: tl.tensor,
    row_bytes: tl.tensor,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Code i is ``BITS`` bits of the row's stream from bit ``i BITS`` on."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    for first in range(0, length, BLOCK):
        o_column = first + tl.arange(0, BLOCK)
        mask = m_row[:, None] & (o_column < length)[None, :]
        b_code = load_codes(packed_ptr, o_row * row_bytes, o_column, row_bytes, mask, BITS)
        tl.store(codes_ptr + o_row[:, None] * length + o_column[None, :], b_code.to(tl.uint8), mask=mask)


def unpack_triton(packed: Tensor, bits: int, length: int) -> Tensor:
    """Launch the kernel; see ``unpack_reference``."""
    check_packed(packed, bits, length)
    packed = packed.contiguous()
    codes = torch.empty((packed.shape[0], length), dtype=torch.uint8, device=packed.device)
    if codes.numel():
        shape = launch_shape(packed.shape[0], length)
        with on_device(packed):
            unpack_kernel[(-(-packed.shape[0] // shape.rows),)](
                packed,
                codes,
                packed.shape[0],
                length,
                packed.shape[1],
                BITS=bits,
                ROWS=shape.rows,
                BLOCK=shape.block,
                num_warps=warps_for(shape.num_warps),
                enable_fp_fusion=False,
            )
    return codes


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes; see ``pack_reference``."""
    return pack_triton(codes, bits) if use_triton(codes) else pack_reference(codes, bits)


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """Unpack codes; see ``unpack_reference``."""
    return unpack_triton(packed, bits, length) if use_triton(packed) else unpack_reference(packed, bits, length)
