"""Codes of 2 to 8 bits as one dense LSB-first bit stream a row: eight codes are one word of ``bits`` bytes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

# Pairs of lanes that are joined in three steps: bytes, then 16-bit lanes, then 32-bit lanes of one int64.
_LOW_LANES = {8: 0x00FF00FF00FF00FF, 16: 0x0000FFFF0000FFFF, 32: 0x00000000FFFFFFFF}


def _check_bits(bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits is {bits}; use 2 to 8")


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
    words = pad(codes, (0, -length % 8)).contiguous().view(torch.int64)
    for lane in (8, 16, 32):
        low = _LOW_LANES[lane]
        # Codes are below 2^7 here, so the top bit is clear and the arithmetic shift is a logical one.
        words = (words & low) | ((words & ~low) >> (lane - lane // 8 * bits))
    stream = words.view(torch.uint8).view(rows, words.shape[1], 8)[:, :, :bits]
    return stream.reshape(rows, words.shape[1] * bits)[:, : (length * bits + 7) // 8].contiguous()


def unpack_reference(packed: Tensor, bits: int, length: int) -> Tensor:
    """Unpack uint8 [rows, ceil(length * bits / 8)] into uint8 codes [rows, length].

    Raises:
        ValueError: ``bits`` is not 2 to 8, or the rows of ``packed`` have another number of bytes.
    """
    _check_bits(bits)
    rows, row_bytes = packed.shape
    if row_bytes != (length * bits + 7) // 8:
        raise ValueError(f"rows have {row_bytes} bytes; {length} codes of {bits} bits take {(length * bits + 7) // 8}")
    if bits == 8:
        return packed.clone()
    groups = -(-length // 8)
    stream = pad(packed, (0, groups * bits - row_bytes)).view(rows, groups, bits)
    words = pad(stream, (0, 8 - bits)).contiguous().view(torch.int64).view(rows, groups)
    for lane in (32, 16, 8):
        low = lane // 8 * bits
        keep = _repeat_lanes((1 << low) - 1, 2 * lane)
        words = (words & keep) | ((words & (keep << low)) << (lane - low))
    return words.view(torch.uint8)[:, :length].contiguous()


def _repeat_lanes(mask: int, lane: int) -> int:
    return sum(mask << start for start in range(0, 64, lane))


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes on whatever device they are; see ``pack_reference``."""
    return pack_reference(codes, bits)


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """Unpack codes on whatever device they are; see ``unpack_reference``."""
    return unpack_reference(packed, bits, length)
