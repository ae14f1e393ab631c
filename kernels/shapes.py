"""Which tile suits which segments. Results never depend on it (docs/design.md, "Exact sums"), only the time does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

from .formats import Grid
from .tuned import Choice

NUM_WARPS = 4
"""Of every program: one launch mixes all kinds of tile."""
LANES = 32
LOAD_BYTES = 16
"""The widest load of a thread."""
CHUNKS = {4: (4, 6, 9), 8: (3, 4, 5)}
"""By elements of a load, the loads that a thread keeps: with 2^k threads they fit 2^k, 3·2^k and the 9·2^k of 3×3."""
SHORT = {9: (1, 9), 25: (2, 13)}
"""Threads and chunks of single elements for the rows of depthwise convolutions, 3×3 and 5×5: few threads a row leave
few idle, and neighbours' loads lie in the same lines of the cache."""


@dataclass(frozen=True)
class Tile:
    """``rows`` segments of a program; of each, ``threads`` threads hold ``chunks`` times ``vector`` elements.

    Element j of thread t's chunk c is element (c * threads + t) * vector + j of the segment.
    """

    threads: int
    chunks: int
    vector: int
    aligned: bool
    """Whether a thread's ``vector`` elements are one aligned load; else segments may begin and end anywhere."""
    loop: bool = False
    """Whether segments are longer than the tile and are walked over three times, the last two within a cache."""
    warps: int = NUM_WARPS
    """Of a program; the same for all tiles of a launch."""

    @property
    def rows(self) -> int:
        """Segments a program takes."""
        return max(1, LANES * self.warps // self.threads)

    @property
    def elements(self) -> int:
        """Elements of a segment that the tile holds at a time."""
        return self.threads * self.chunks * self.vector

    @property
    def code(self) -> int:
        """All but the warps in one number, as the kernels take it."""
        return (((self.threads * 64 + self.chunks) * 16 + self.vector) * 2 + self.aligned) * 2 + self.loop

    def padded(self, length: int) -> int:
        """Return the elements that threads go through for a segment of ``length``; too few where it does not fit."""
        return -(-length // self.elements) * self.elements if self.loop else self.elements


def _loops(vector: int) -> list[Tile]:
    """A row a warp, or a row a program where four rows of all programs together would not stay in the cache."""
    return [Tile(32, 2, vector, True, loop=True), Tile(128, 2, vector, True, loop=True)]


_ANYWHERE = [Tile(32, 1, 1, False), Tile(32, 4, 1, False, loop=True), Tile(128, 4, 1, False, loop=True)]
LONG = 1024
"""Elements from which a row is walked over by a whole program."""


@cache
def tiles(itemsize: int, mixed: bool) -> tuple[Tile, ...]:
    """Return the kinds of tile for elements of ``itemsize`` bytes.

    ``mixed``: those of a launch over different tensors. They are branches of one kernel, whose registers are those of
    the greediest and whose compilation takes their sum, so they are few and hold little.
    """
    vector = LOAD_BYTES // itemsize
    held = [(2**k, 16 // vector) for k in (1, 2, 3, 4)]
    if not mixed:
        held = [(2**k, chunks) for k in range(1, 8) for chunks in CHUNKS[vector]]
    short = [Tile(threads, chunks, 1, False) for threads, chunks in SHORT.values()]
    return (*short, *(Tile(threads, chunks, vector, True) for threads, chunks in held), *_loops(vector), *_ANYWHERE)


@cache
def tile_for(length: int, itemsize: int, aligned: bool, mixed: bool) -> Tile:
    """Return the tile that wastes least on segments of ``length`` elements; one that holds them before one that loops.

    ``aligned``: every segment begins at and consists of whole loads of 16 bytes.
    """
    if not aligned and length in SHORT:
        return Tile(*SHORT[length], 1, False)
    usable = [tile for tile in tiles(itemsize, mixed)[len(SHORT) :] if tile.aligned == aligned]
    held = [tile for tile in usable if not tile.loop and tile.elements >= length]
    if held:
        return min(held, key=lambda tile: tile.elements)
    threads = 128 if length >= LONG else LANES
    return next(tile for tile in usable if tile.loop and tile.threads == threads)


SMALL = 16
"""Elements a thread may hold for four programs to fit a multiprocessor's registers."""
MEDIUM = 24
"""For three programs."""
WALK = 160
"""Elements that a thread should have to do where segments are walked over again."""


@cache
def walking_tiles(itemsize: int) -> tuple[Tile, ...]:
    """Return the kinds of tile of kernels that hold nothing, but walk over every segment again (Batch.launch)."""
    vector = LOAD_BYTES // itemsize
    aligned = [Tile(threads, 2, vector, True, loop=True) for threads in (1, 4, 16, 32)]
    return (*aligned, *(Tile(threads, 4, 1, False, loop=True) for threads in (1, 16)))


def walking_tile(length: int, itemsize: int, aligned: bool) -> Tile:
    """Return the tile of fewest threads a segment that gives each no more than it should have to do, if one does."""
    usable = [tile for tile in walking_tiles(itemsize) if tile.aligned == aligned]
    return next((tile for tile in usable if length < WALK * tile.threads), usable[-1])


def most_registers(kinds: tuple[Tile, ...], limited: bool = False, spare: int = 0) -> int | None:
    """Return the registers that a thread may have in a kernel of several kinds, or a ``limited`` one, on NVIDIA.

    Without a number ptxas aims at one more program a multiprocessor and spills a few bytes where it just misses; of
    the kernels of one kind only the ternary one with tap sums and those that multiply by factors have been seen to.
    ``spare`` comes on top of what lets three programs fit.
    """
    held = max(tile.chunks * tile.vector for tile in kinds)
    if held <= SMALL and (limited or len(kinds) > 1):
        return _registers_for(4)
    return _registers_for(3) + spare if held <= MEDIUM and limited else None


WALKED_MOMENTS, WALKED_SWEEP = 64, 168
"""Registers with which kernels that walk in single loads spill nothing on sm_80, sm_90 and sm_100."""


def walking_registers(kinds: tuple[Tile, ...], most: int) -> int | None:
    """Return the registers that a thread may have in a kernel that walks, on NVIDIA: ``most`` if no tile is aligned.

    Those of aligned tiles, and of all kinds in one kernel, spill nothing where ptxas chooses, and do with a number.
    """
    return None if any(tile.aligned for tile in kinds) else most


def spare_registers(grid: Grid, bits: int) -> int:
    """Return what a limited kernel of these codes wants beyond the registers of three programs.

    8 bits with zero points spill a few bytes with 168 at some tiles; where they may have 184, most take 168 or less.
    """
    return 16 if grid is Grid.ASYMMETRIC and bits == 8 else 0


def _registers_for(programs: int) -> int:
    """Return the registers of a thread with which so many programs fit a multiprocessor: it gives them in eights."""
    return 65536 // (programs * LANES * NUM_WARPS) // 8 * 8


def measured_tile(tile: Tile, choice: Choice | None, length: int) -> Tile:
    """Return what was measured on the card instead of ``tile``, where it suits segments of ``length``.

    The warps are a launch's: they are the measured ones also where the tile is not.
    """
    if choice is None:
        return tile
    found = Tile(choice.threads, choice.chunks, tile.vector, True, choice.loop)
    suits = tile.aligned and (found.loop or found.elements >= length)
    return replace(found if suits else tile, warps=choice.num_warps)
