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
"""Elements, about, that a thread works on at a time: what it computes with stays in its core's second-level cache."""
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

    room: Tensor
    """All three, [3, ...]."""
    dim: int
    """The dimension along which a segment lies."""
    number: int = 0
    """Which of the blocks it is."""

    def __post_init__(self) -> None:
        self.rooms = self.room.unbind()
        self.wide, self.level, self.term = self.rooms
        """The weights; room for what stands for each; room for terms of a sum, which whatever is stored overwrites."""
        self.bits = self.room.view(torch.int64)
        """Those of all rooms."""

    @cached_property
    def whole(self) -> Tensor:
        """Int32 room of the block's shape; it is ``term``'s."""
        return self.term.view(-1).view(torch.int32)[: self.term.numel()].view(self.term.shape)

    def narrow(self) -> Tensor:
        """Return float32 room of the block's shape; it is ``term``'s."""
        return self.whole.view(torch.float32)

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
        blocks = max(1, round(rows * width / (BLOCK * min(_SHARED, torch.get_num_threads()))))
        self._rows = -(-rows // blocks)  # nearly as many in the last, where the operations take as long by themselves
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
                block = Block(self._room[:, : values.numel()].view(3, *values.shape), self._dim)
            block.wide.copy_(values)
            block.number = number
            yield block
        self._only = block if self._one_block else None

    def rows(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return the rows of each block of ``values`` [rows, ...]."""
        return self._split(values, self._rows)

    def each(self, values: Tensor, dim: int = -1) -> tuple[Tensor, ...]:
        """Return the part of each block of ``values``, whose dimension ``dim`` is [segments]."""
        return self._split(values, self._rows * self._groups, dim)

    def across(self, values: Tensor) -> tuple[Tensor, ...]:
        """Return the same of [..., segments] to be broadcast against the blocks; one number stands for all segments."""
        wide = values if values.shape[-1] == self.count else values.expand(self.count)
        return self.each(wide.unsqueeze(self._dim - 2), -1 - self._dim)

    def _split(self, values: Tensor, size: int, dim: int = 0) -> tuple[Tensor, ...]:
        return (values,) if self._one_block else torch.split(values, size, dim)

    def room_for(self, sums: int) -> Tensor:
        """Return int64 room [sums, segments], in the order in which torch adds up fast along the segments."""
        if self._dim:  # where sums come first in memory, threads share those out and not the segments
            return self._weight.new_empty((self.count, sums), dtype=torch.int64).T
        return self._weight.new_empty((sums, self.count), dtype=torch.int64)

    def extremes(self) -> Tensor:
        """Return float32 [3, segments]: largest magnitude, minimum and maximum."""
        found = self._weight.new_empty((3, self.count), dtype=None if self._dim else torch.float64)
        minimum, maximum = found[1], found[2]
        if self._dim:
            segments = self._weight.view(-1, self._groups, self.length)
            torch.amin(segments, 2, out=minimum.view(-1, self._groups))
            torch.amax(segments, 2, out=maximum.view(-1, self._groups))
        else:
            least, most = self.each(minimum), self.each(maximum)
            for block in self.blocks():
                torch.amin(block.wide, 0, out=least[block.number])
                torch.amax(block.wide, 0, out=most[block.number])
        torch.amax(found[1:].abs(), 0, out=found[0])
        return found.float()


class ExactSums:
    """Totals over each segment of terms rounded half to even to multiples of powers of two, ``units``.

    These are float64 [sums, segments]. A term below 2^51 units that is added to 1.5 * 2^52 of them is rounded so, and
    the low bits of the sum count the multiples. Bits are added modulo 2^64, so that segments of any length are exact.

    The terms of the sums lie in neighbouring rooms of the block, from ``first`` on, to be added up at once. Those of
    the last sum are made first: what lies in the rooms before is still there to make the others of.
    """

    def __init__(self, segments: Segments, units: Tensor, first: int = 0) -> None:
        self._patterns, self._length = units * _ROUNDING, segments.length
        self._found = segments.room_for(len(units))
        self._across = list(zip(*map(segments.across, self._patterns.unbind()), strict=True))
        self._each, self._rooms = segments.each(self._found), slice(first, first + len(units))

    def multiply(self, block: Block, number: int, left: Tensor, right: Tensor) -> None:
        """Make the terms ``left * right`` of a sum, which must be exact in float64.

        Then it does not matter whether the processor contracts product and sum: only the sum is rounded.
        """
        torch.addcmul(self._across[block.number][number], left, right, out=block.rooms[self._rooms][number])

    def take(self, block: Block, number: int, terms: Tensor) -> None:
        """Make ``terms`` those of a sum."""
        torch.add(terms, self._across[block.number][number], out=block.rooms[self._rooms][number])

    def add(self, block: Block) -> None:
        """Add up what the rooms of all sums hold."""
        torch.sum(block.bits[self._rooms], block.dim + 1, out=self._each[block.number])

    def of(self, block: Block) -> Tensor:
        """Return the multiples, int64 [sums, segments], of the last block."""
        patterns = torch.stack(self._across[block.number]).squeeze(block.dim + 1)
        return self._each[block.number] - patterns.view(torch.int64) * self._length

    def totals(self) -> Tensor:
        """Return the multiples, int64 [sums, segments], of all."""
        return self._found.sub_(self._patterns.view(torch.int64), alpha=self._length)
