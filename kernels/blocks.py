"""Segments of a weight, block after block in float64, and exact sums over each: what the references compute with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .packing import pack_reference
from .segments import Part

BLOCK = 3 << 14
"""Elements that a thread works on at a time: what it computes with stays in its core's second-level cache."""
_SHARED = 2
"""Threads that a block is made for, at most: to wait for more of them takes longer than what they would do."""
SHORT = 32
"""Elements below which segments lie side by side: torch adds up and scales short rows one by one."""

_ROUNDING = 1.5 * 2.0**52
"""What is added to this is rounded to a whole number, which the low bits of the sum then count."""


@dataclass
class Block:
    """Some segments in float64 and two tensors of the same shape to compute in.

    That shape is [segments, length], or [length, segments] where they are short.
    """

    wide: Tensor
    """The weights."""
    level: Tensor
    """Room for what stands for each weight."""
    term: Tensor
    """Room for the terms of a sum; whatever is added up or stored may overwrite it."""
    dim: int
    """The dimension along which a segment lies."""
    number: int = 0
    """Which of the blocks it is."""

    @cached_property
    def bits(self) -> Tensor:
        """Int64: the bits of ``term``."""
        return self.term.view(torch.int64)

    @cached_property
    def whole(self) -> Tensor:
        """Int32 room of the block's shape; it is ``term``'s."""
        return self.term.view(-1).view(torch.int32)[: self.term.numel()].view(self.term.shape)

    def narrow(self) -> Tensor:
        """Return float32 room of the block's shape; it is ``term``'s."""
        return self.whole.view(torch.float32)

    def sum_to(self, found: Tensor, terms: Tensor) -> None:
        """Add ``terms`` up along the segments."""
        torch.sum(terms, self.dim, out=found)

    def store(self, codes: Tensor, offset: int, bits: int, rows: Tensor) -> None:
        """Pack whole numbers of the block's shape, plus ``offset``, into the bytes of its ``rows``."""
        # bytes are sooner made of int32 than of float64, but for those whose order changes
        if self.dim:
            whole = self.whole.copy_(codes)
        else:
            whole = (torch.add(codes, offset, out=self.term) if offset else codes).T
        if bits == 8:
            target = rows.view(len(rows), -1, whole.shape[1])
            target.copy_(whole.view(target.shape))
        else:
            target = whole.to(torch.uint8, memory_format=torch.contiguous_format)
        if offset and self.dim:
            target.add_(offset)  # modulo 2^8, so that what was below zero comes out right
        if bits < 8:
            rows.copy_(pack_reference(target.view(len(rows), -1), bits))


class Segments:
    """The segments of a part of a weight's rows, which are taken in blocks of whole rows.

    A number of each segment is a tensor [segments], those of the first row first.
    """

    def __init__(self, weight: Tensor, part: Part) -> None:
        self.length = part.length
        self._weight = weight.detach()[:, part.columns]
        rows, width = self._weight.shape
        self.count = rows * width // self.length
        self._rows = min(rows, max(1, BLOCK * min(_SHARED, torch.get_num_threads()) // width))
        self._groups, self._one_block = width // self.length, self._rows == rows
        self._dim = int(self.length >= SHORT)
        self._room = self._weight.new_empty((3, self._rows * width), dtype=torch.float64)
        self._only: Block | None = None

    def blocks(self) -> Iterator[Block]:
        """Yield all blocks; they share their memory, so that nothing of their size is allocated twice."""
        if self._only is not None:  # it is still there
            yield self._only
            return
        block = None
        for number, piece in enumerate(self.rows(self._weight)):
            values = piece.reshape(-1, self.length)
            values = values if self._dim else values.T
            if block is None or block.wide.shape != values.shape:
                wide, level, term = self._room[:, : values.numel()].view(3, *values.shape).unbind()
                block = Block(wide, level, term, self._dim)
            block.wide.copy_(values)
            block.number = number
            yield block
        self._only = block if self._one_block else None

    def rows(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return the rows of each block of ``values`` [rows, ...]."""
        return self._split(values, self._rows)

    def each(self, values: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """Return the part of each block of ``values``, whose dimension ``dim`` is [segments]."""
        return self._split(values, self._rows * self._groups, dim)

    def across(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return the same of [segments] to be broadcast against the blocks; one number stands for all segments."""
        return self.each(values.expand(self.count).unsqueeze(self._dim), 1 - self._dim)

    def _split(self, values: Tensor, size: int, dim: int = 0) -> tuple[Tensor, ...]:
        return (values,) if self._one_block else torch.split(values, size, dim)

    def extremes(self) -> Tensor:
        """Return float32 [3, segments]: largest magnitude, minimum and maximum."""
        if self._dim:
            segments = self._weight.view(-1, self._groups, self.length)
            minimum, maximum = segments.amin(2).flatten().float(), segments.amax(2).flatten().float()
        else:
            found = self._weight.new_empty((2, self.count), dtype=torch.float64)
            least, most = self.each(found[0]), self.each(found[1])
            for block in self.blocks():
                torch.amin(block.wide, 0, out=least[block.number])
                torch.amax(block.wide, 0, out=most[block.number])
            minimum, maximum = found.float()
        return torch.stack([torch.maximum(-minimum, maximum).abs(), minimum, maximum])


class ExactSum:
    """One of ``ExactSums``; see there."""

    def __init__(self, segments: Segments, pattern: Tensor, found: Tensor) -> None:
        self._across, self._each, self._length = segments.across(pattern), segments.each(found), segments.length

    def add(self, block: Block, left: Tensor, right: Tensor) -> None:
        """Find a block's totals of ``left * right``, which must be exact in float64.

        Then it does not matter whether the processor contracts product and sum: only the sum is rounded.
        """
        torch.addcmul(self._across[block.number], left, right, out=block.term)
        block.sum_to(self._each[block.number], block.bits)

    def add_terms(self, block: Block, terms: Tensor) -> None:
        """Find a block's totals of ``terms``."""
        torch.add(terms, self._across[block.number], out=block.term)
        block.sum_to(self._each[block.number], block.bits)

    def of(self, block: Block) -> Tensor:
        """Return the multiples, int64 [segments], of the last block."""
        pattern = self._across[block.number].squeeze(block.dim).view(torch.int64)
        return self._each[block.number] - pattern * self._length


class ExactSums:
    """Totals over each segment of terms rounded half to even to multiples of powers of two, ``units``.

    These are float64 [sums, segments]. A term below 2^51 units that is added to 1.5 * 2^52 of them is rounded so, and
    the low bits of the sum count the multiples. Bits are added modulo 2^64, so that segments of any length are exact.
    """

    def __init__(self, segments: Segments, units: Tensor) -> None:
        self._patterns, self._length = units * _ROUNDING, segments.length
        self._found = torch.empty_like(units, dtype=torch.int64)
        both = zip(self._patterns.unbind(), self._found.unbind(), strict=True)
        self.each = [ExactSum(segments, pattern, found) for pattern, found in both]

    def totals(self) -> Tensor:
        """Return the multiples, int64 [sums, segments], of all."""
        return self._found - self._patterns.view(torch.int64) * self._length
