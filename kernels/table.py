"""The launch table: one launch works on many tensors, cut into segments, each kind of segment in tiles that suit it.

A segment has one scale: a row, or a group of a row. Segments of one tensor are equally far apart, so an item of the
table is (address, distance, elements, how many); a row with a short last group is several items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .formats import CodeFormat
from .launch import on_device, warps_for
from .segments import Part
from .shapes import Tile, measured_tile, most_registers, tile_for, tiles, walking_registers, walking_tile, walking_tiles
from .sums import fineness
from .tuned import Choice, choice_for, choices_for


@dataclass(frozen=True)
class Entry:
    """One tensor of a launch."""

    weight: Tensor
    """Contiguous [rows, length], float32, float16 or bfloat16."""
    format: CodeFormat
    first_segment: int
    """Where its segments begin in the launch's flat outputs: segment = first + row * groups + group."""
    first_byte: int
    """Where its codes begin in the launch's flat bytes; a multiple of 16."""
    factor: Tensor | None = None
    """float32 [length] on the CPU: what multiplies each column before everything else."""

    @property
    def segments(self) -> slice:
        """The tensor's part of a flat output."""
        return slice(self.first_segment, self.first_segment + self.weight.shape[0] * self.format.groups)

    def segmented(self, flat: Tensor) -> Tensor:
        """Return the tensor's part of a flat output as [rows, groups]."""
        return flat[self.segments].view(self.weight.shape[0], self.format.groups)

    def packed(self, flat: Tensor) -> Tensor:
        """Return the tensor's codes, uint8 [rows, row_bytes], within the launch's flat bytes."""
        rows, width = self.weight.shape[0], self.format.row_bytes
        return flat[self.first_byte : self.first_byte + rows * width].view(rows, width)

    def items(self, mixed: bool) -> Iterator[tuple[list[int], Tile]]:
        """Yield the first of the table's FIELDS and the tile of each run of equal segments."""
        rows, length = self.weight.shape
        for part in self._parts():
            apart = part.length if self._even else length
            address = self.weight.data_ptr() + part.columns.start * self.weight.element_size()
            size = self.weight.element_size()
            steady = address % 16 == 0 and (apart * size) % 16 == 0 and (part.length * size) % 16 == 0
            start = self.first_byte + part.columns.start * self.format.bits // 8
            step = part.length * self.format.bits // 8 if self._even else self.format.row_bytes
            first, hop = self.first_segment + part.groups.start, 1 if self._even else self.format.groups
            count = rows * self.format.groups if self._even else rows
            yield (
                [address, apart, part.length, count, start, step, first, hop],
                tile_for(part.length, size, steady, mixed),
            )

    @property
    def _even(self) -> bool:
        """Whether all segments are equally long and lie one behind the other, in memory and in the bit stream."""
        return self.format.groups > 1 and self.format.length % self.format.group_size == 0

    def _parts(self) -> list[Part]:
        size, length = self.format.group_size, self.format.length
        starts = range(0, size if self._even else length, size)
        return [
            Part(slice(start, min(start + size, length)), slice(i, i + 1), min(size, length - start))
            for i, start in enumerate(starts)
        ]


@dataclass
class Batch:
    """Tensors of one type, width of code and fineness that one launch works on, and the launch's flat sizes.

    Either all or none of them have a factor.
    """

    entries: list[Entry] = field(default_factory=list)
    segments: int = 0
    bytes: int = 0

    def add(self, weight: Tensor, format: CodeFormat, factor: Tensor | None = None) -> None:
        """Take in a contiguous [rows, length] of at least one element; ``factor``, float32 [length], is on the CPU.

        Raises ValueError for rows without end.
        """
        if format.group_size > LONGEST:
            raise ValueError(f"segments of {format.group_size} elements; a kernel takes {LONGEST} at most: use groups")
        self.entries.append(Entry(weight, format, self.segments, self.bytes, factor))
        self.segments += weight.shape[0] * format.groups
        self.bytes += -(-weight.shape[0] * format.row_bytes // 16) * 16

    @classmethod
    def of(cls, weight: Tensor, format: CodeFormat, factor: Tensor | None = None) -> Batch:
        """Return the batch of one tensor of at least one element."""
        batch = cls()
        batch.add(weight.contiguous(), format, factor)
        return batch

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.entries[0].weight.device

    @property
    def dtype(self) -> str:
        """The tensors' type, as the kernels take it."""
        return _DTYPES[self.entries[0].weight.dtype]

    @property
    def fineness(self) -> int:
        """Fraction bits of the sums, the same for all (sums.fineness)."""
        return fineness(self.entries[0].format.group_size)

    @property
    def factored(self) -> bool:
        """Whether the tensors have factors."""
        return self.entries[0].factor is not None

    @cached_property
    def factors(self) -> Tensor:
        """What multiplies the columns, on the device: int64 [tensors, 4], and behind it the float32 factors.

        The four: where the tensor's factor begins, in int64; its first segment; segments of a row; elements of one.
        Nothing where there are none.
        """
        given = [(entry, entry.factor.detach().numpy()) for entry in self.entries if entry.factor is not None]
        # loads of 16 bytes want to begin with four floats
        columns = [np.pad(factor, (0, -len(factor) % 4)).view(np.int64) for _, factor in given]
        starts = np.cumsum([4 * len(given), *map(len, columns)])
        formats = [(entry.first_segment, entry.format.groups, entry.format.group_size) for entry, _ in given]
        rows = [np.asarray([start, *numbers]) for start, numbers in zip(starts, formats, strict=False)]
        return torch.from_numpy(np.concatenate([np.empty(0, np.int64), *rows, *columns])).to(self.device)

    def flat(self, dtype: torch.dtype) -> Tensor:
        """Allocate one number a segment, without filling."""
        return torch.empty(self.segments, dtype=dtype, device=self.device)

    def flat_bytes(self) -> Tensor:
        """Allocate the codes of all tensors, without filling; what lies between two tensors is not written."""
        return torch.empty(self.bytes, dtype=torch.uint8, device=self.device)

    def launch(
        self,
        kernel: Any,
        *outputs: Tensor,
        walked: int = 0,
        limited: bool = False,
        spare: int = 0,
        **constants: Any,
    ) -> None:
        """Run ``kernel`` over all tiles; it gets the table, the programs, ``outputs`` and ``constants``.

        ``walked``: it holds nothing, but walks over every segment again, in loads that may lie anywhere with at most so
        many registers (shapes.walking_registers). ``limited``, ``spare``: shapes.most_registers.
        """
        mixed = len(self.entries) > 1
        rows, chosen = self._items(mixed)
        size = self.entries[0].weight.element_size()
        if walked:
            chosen = [walking_tile(row[2], size, tile.aligned) for row, tile in zip(rows, chosen, strict=True)]
        elif not mixed and (choice := self._measured(kernel)):
            chosen = [measured_tile(tile, choice, row[2]) for row, tile in zip(rows, chosen, strict=True)]
        all_kinds = walking_tiles(size) if walked else tiles(size, mixed)
        kinds = all_kinds if mixed else tuple(dict.fromkeys(chosen))
        for row, tile in zip(rows, chosen, strict=True):
            row.append(kinds.index(tile))
        table, programs = sent_to(self.device, rows, [tile.rows for tile in chosen])
        registers = walking_registers(kinds, walked) if walked else most_registers(kinds, limited, spare)
        with on_device(table):
            kernel[(len(programs) // 2,)](
                table,
                programs,
                *outputs,
                **constants,
                DTYPE=self.dtype,
                KINDS=tuple(tile.code for tile in kinds),
                WARPS=chosen[0].warps,
                num_warps=warps_for(chosen[0].warps),
                enable_fp_fusion=False,
                **_register_limit(registers),
            )

    def _measured(self, kernel: Any) -> Choice | None:
        """Return the shape that was measured on this card for the segments of the launch's only tensor."""
        entry = self.entries[0]
        return choice_for(
            choices_for(self.device), kernel.fn.__name__, entry.weight.element_size(), entry.format.group_size
        )

    def _items(self, mixed: bool) -> tuple[list[list[int]], list[Tile]]:
        rows, chosen = [], []
        for number, entry in enumerate(self.entries):
            for row, tile in entry.items(mixed):
                rows.append([*row, number])
                chosen.append(tile)
        return rows, chosen


LONGEST = 2**28 - 2**16
"""Elements of a segment whose bits int32 counts, the tile beyond its end included; offsets of segments are int64."""
FIELDS = 10
"""Of an item: address, elements from one segment to the next, elements of one, segments, first byte of the codes, bytes
from one segment's codes to the next, first segment of the outputs, step between segments there, the tensor's number in
the launch, its kind of tile (tiles.item_of, tiles.segments_of)."""
_DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def _register_limit(registers: int | None) -> dict[str, int]:
    """Return the launch option that gives a thread so many registers; AMD has none of that kind."""
    return {} if registers is None or torch.version.hip is not None else {"maxnreg": registers}


def sent_to(device: torch.device, rows: Sequence[Sequence[int]], tile_rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Send the table, int64 [items * FIELDS], and the programs, int32 (item, tile) pairs, to ``device`` at once."""
    table = np.asarray(rows, dtype=np.int64)
    counts = -(-table[:, 3] // np.asarray(tile_rows))
    ends = np.cumsum(counts)
    item = np.repeat(np.arange(len(table), dtype=np.int32), counts)
    tile = (np.arange(ends[-1]) - np.repeat(ends - counts, counts)).astype(np.int32)
    programs = np.stack([item, tile], axis=1).reshape(-1)
    both = np.concatenate([table.reshape(-1), programs.view(np.int64)])
    sent = torch.from_numpy(both).to(device)
    return sent[: table.size], sent[table.size :].view(torch.int32)


def batches_of(
    weights: Sequence[Tensor], formats: Sequence[CodeFormat], factors: Sequence[Tensor | None] | None = None
) -> list[tuple[Batch, list[int]]]:
    """Put tensors that one launch can do together into batches; each comes with the tensors' places in ``weights``.

    A launch has one type of weight, grid, width of code and fineness, and factors (Batch.add) for all or none;
    tensors without elements are in none.
    """
    found: dict[object, tuple[Batch, list[int]]] = {}
    for place, (weight, format) in enumerate(zip(weights, formats, strict=True)):
        if weight.numel() == 0:
            continue
        factor = factors[place] if factors else None
        codes = format.grid, format.bits, format.layer_wise, fineness(format.group_size)
        alike = (weight.device, weight.dtype, *codes, factor is None)
        batch, places = found.setdefault(alike, (Batch(), []))
        batch.add(weight.contiguous(), format, factor)
        places.append(place)
    return list(found.values())
