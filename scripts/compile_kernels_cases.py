"""What compile_kernels.py compiles: every kernel with its constants, and the tile or block of one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from dfmpc.kernels.compensate import compensate_kernel
from dfmpc.kernels.dequantize import dequantize_kernel
from dfmpc.kernels.feedback import feedback_kernel, feedback_shape
from dfmpc.kernels.formats import Grid
from dfmpc.kernels.launch import LaunchShape, launch_shape, warps_for
from dfmpc.kernels.moments import moments_kernel
from dfmpc.kernels.optimum import LONGEST, optimum_kernel, optimum_shape
from dfmpc.kernels.packing import pack_kernel, unpack_kernel
from dfmpc.kernels.shapes import (
    NUM_WARPS,
    WALKED_MOMENTS,
    WALKED_SWEEP,
    Tile,
    most_registers,
    spare_registers,
    tile_for,
    tiles,
    walking_registers,
    walking_tile,
    walking_tiles,
)
from dfmpc.kernels.statistics import statistics_kernel
from dfmpc.kernels.sweep_kernel import sweep_kernel
from dfmpc.kernels.tap_sums import tap_sums_kernel
from dfmpc.kernels.ternary_kernel import ternary_kernel
from dfmpc.kernels.uniform_kernel import uniform_kernel
from kernel_cost import SHARED_LIMIT, Cost

ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}
_INT64 = ("table", "square", "kept", "abs", "dot", "norm", "layer", "total", "mean_total", "variance_total", "factors")
_OTHER = {
    "programs": "*i32",
    "count": "*i32",
    "codes": "*u8",
    "packed": "*u8",
    "level": "*u8",
    "start": "*i64",
    "taps": "*i32",
}
_TAPPED = {
    "taps_ptr": "*i64",
    "tap_sum_ptr": "*fp64",
    "tap_square_ptr": "*fp64",
    "tap_sign_ptr": "*i16",
    "tap_kept_ptr": "*i16",
}
_UNTAPPED = {"TAPPED": False} | dict.fromkeys(_TAPPED)
_FLOAT64 = ("vector", "lambda", "c", "rho", "mean", "variance")


@dataclass(frozen=True)
class Case:
    """A kernel with its constants. ``types`` are those of arguments that their names do not tell."""

    name: str
    kernel: Any
    constants: dict[str, object]
    types: dict[str, str]
    shape: Callable[[int, int], LaunchShape] = launch_shape
    written: float = 0.0
    """Bytes of codes an element that the kernel writes."""
    segment_bytes: int = 0
    """Bytes of scales and sums a segment that it writes."""
    walked: int = 0
    """Where it holds nothing, but walks over its segments again: its registers as for Batch.launch."""
    tapped: bool = False
    """Whether it sums taps too."""
    longest: int | None = None
    """Elements of the longest row that it takes, where there is a limit."""
    factored: bool = False
    """Whether it loads a float32 factor for every weight."""
    spare: int = 0
    """Registers that it wants beyond those of three programs, where they are limited."""
    by_channel: bool = False
    """Whether a thread takes the taps of an input channel one by one, so that its loads are single elements."""

    def registers_of(self, kinds: tuple[Tile, ...]) -> int | None:
        """Return the registers that a thread may have in its kernel of these ``kinds``, on NVIDIA, as Batch.launch."""
        if self.walked:
            return walking_registers(kinds, self.walked)
        return most_registers(kinds, self.tapped or self.factored, self.spare)

    @property
    def tabled(self) -> bool:
        """Whether it works from a launch table, in tiles."""
        return "KINDS" in self.kernel.arg_names

    def bytes_of(self, weight: str) -> float:
        """Return the bytes read and written an element."""
        return ITEMSIZE[weight] + self.written

    def tiles(self, itemsize: int) -> tuple[Tile, ...]:
        """Return all kinds of tile that one of its launches may have."""
        if self.walked:
            return walking_tiles(itemsize)
        return tuple(dict.fromkeys((*tiles(itemsize, False), *tiles(itemsize, True))))

    def tiles_for(self, length: int, itemsize: int) -> tuple[Tile, ...]:
        """Return its tile for rows of ``length``, alone and in a launch over different tensors."""
        aligned = length * itemsize % 16 == 0
        if self.walked:
            return (walking_tile(length, itemsize, aligned),)
        return tuple(tile_for(length, itemsize, aligned, mixed) for mixed in (False, True))

    def type_of(self, argument: str) -> str:
        """Return Triton's name of an argument's type."""
        name = argument.removesuffix("_ptr")
        if argument in self.types:
            return self.types[argument]
        if name == argument:
            return "i32"
        return _OTHER.get(name, "*i64" if name in _INT64 else "*fp64" if name in _FLOAT64 else "*fp32")


@dataclass(frozen=True)
class Shape:
    """One launch shape of a case: its constants, its size, and how wide its loads can be."""

    label: str
    constants: dict[str, object]
    num_warps: int
    registers: int | None
    """That a thread may have, on NVIDIA."""
    elements: int
    """Of the rows a program takes, all of them."""
    segments: int
    trips: int
    """How often a loop over a row runs."""
    load_bytes: int
    """Bytes that one load of a thread can be wide."""
    thread_bytes: int
    """Bytes of weights that a thread loads before a loop begins again; 0 where that is not checked."""

    @property
    def width(self) -> int:
        """Bytes of the widest load that a thread's part of a chunk allows."""
        return min(self.load_bytes, self.thread_bytes)


def tiled(case: Case, tile: Tile, length: int, weight: str, warp: int) -> Shape:
    """Return the shape of ``tile`` on a GPU whose warps have ``warp`` threads."""
    size, warps = ITEMSIZE[weight], warps_for(NUM_WARPS, warp)
    constants = {"DTYPE": weight, "KINDS": (tile.code,), "WARPS": NUM_WARPS}
    held = tile.rows * tile.elements * (size + 4 * case.factored) // (warps * warp)
    wide = tile.vector if tile.aligned else 1
    return Shape(
        label=f"{tile.threads}×{tile.chunks}×{tile.vector}{' loop' * tile.loop}{'' if tile.aligned else ' any'}",
        constants={name: value for name, value in constants.items() if name in case.kernel.arg_names},
        num_warps=warps,
        registers=case.registers_of((tile,)),
        elements=tile.rows * length,
        segments=tile.rows,
        trips=-(-length // tile.elements),
        load_bytes=max(size, min(wide, tile.rows * tile.threads * tile.vector // (warps * warp)) * size),
        thread_bytes=0 if case.by_channel else held,
    )


def blocked(case: Case, length: int, warp: int) -> Shape:
    """Return the shape of a kernel that takes rows and blocks of columns."""
    shape = case.shape(1 << 16, length)
    constants = {"ROWS": shape.rows, "BLOCK": shape.block}
    return Shape(
        label=f"{shape.rows}×{shape.block}",
        constants={name: value for name, value in constants.items() if name in case.kernel.arg_names},
        num_warps=warps_for(shape.num_warps, warp),
        registers=None,
        elements=shape.rows * length,
        segments=shape.rows,
        trips=-(-length // shape.block),
        load_bytes=0,
        thread_bytes=0,
    )


def shapes_of(case: Case, lengths: list[int], weight: str, warp: int) -> Iterator[tuple[int, Shape]]:
    """Yield the launch shapes that rows of ``lengths`` get, each kind of tile once."""
    seen = set()
    for length in lengths:
        if case.longest and length > case.longest:
            continue
        if not case.tabled:
            yield length, blocked(case, length, warp)
            continue
        for tile in case.tiles_for(length, ITEMSIZE[weight]):
            if tile not in seen:
                seen.add(tile)
                yield length, tiled(case, tile, length, weight, warp)


def every_tile(case: Case, weight: str, warp: int) -> Iterator[tuple[int, Shape]]:
    """Yield the launch shapes of all kinds of tile, each for the longest row that it holds."""
    for tile in case.tiles(ITEMSIZE[weight]):
        length = tile.elements * (16 if tile.loop else 1)
        yield length, tiled(case, tile, length, weight, warp)


def together(case: Case, weight: str, warp: int) -> Shape:
    """Return the shape of a launch over different tensors: all its kinds of tile are branches of one kernel."""
    size = ITEMSIZE[weight]
    kinds = walking_tiles(size) if case.walked else tiles(size, True)
    one = tiled(case, kinds[0], kinds[0].elements, weight, warp)
    constants = one.constants | {"KINDS": tuple(tile.code for tile in kinds)}
    label = f"{len(kinds)} kinds"
    return replace(
        one, label=label, constants=constants, registers=case.registers_of(kinds), load_bytes=0, thread_bytes=0
    )


def cases(weight: str) -> Iterator[Case]:
    """Yield every kernel, for weights of a type."""
    weights = {"weight_ptr": f"*{weight}"}
    fine, plain, product = {"FINENESS": 40}, {"FACTORED": False}, {"FACTORED": True}
    yield Case("statistics", statistics_kernel, fine | plain, weights, segment_bytes=28)
    yield Case("factored statistics", statistics_kernel, fine | product, weights, segment_bytes=28, factored=True)
    twn = fine | {"GIVEN": ""}
    yield Case("ternary", ternary_kernel, twn | _UNTAPPED, weights, written=0.25, segment_bytes=24)
    tapped = twn | {"TAPPED": True}
    yield Case("tapped ternary", ternary_kernel, tapped, _TAPPED, written=0.25, segment_bytes=24, tapped=True)
    for grid, bits in (("dorefa", 6), ("dorefa", 4), ("symmetric", 4), ("asymmetric", 3), ("asymmetric", 8)):
        constants = {"GRID": grid, "BITS": bits, "LAYER_WISE": False, "GIVEN": "", "BF16": False}
        one = Case(
            f"uniform {grid} {bits}",
            uniform_kernel,
            fine | plain | constants | {"CLIPPED": False},
            weights,
            written=bits / 8,
            segment_bytes=48,
            spare=spare_registers(Grid(grid), bits),
        )
        yield one
        if grid == "asymmetric":
            yield replace(one, name=f"clipped {grid} {bits}", constants=one.constants | {"CLIPPED": True})
        if bits == 4 or grid == "asymmetric":
            yield replace(one, name=f"factored {grid} {bits}", constants=one.constants | product, factored=True)
        yield Case(f"dequantize {grid} {bits}", dequantize_kernel, constants, {}, written=bits / 8)
    yield Case(
        "sweep",
        sweep_kernel,
        fine | {"GRID": "dorefa", "WIDTHS": tuple(range(2, 9))},
        {},
        segment_bytes=192,
        walked=WALKED_SWEEP,
    )
    yield Case("moments", moments_kernel, {}, {}, segment_bytes=20, walked=WALKED_MOMENTS, by_channel=True)
    yield Case("optimum", optimum_kernel, fine | {"DTYPE": weight}, {}, optimum_shape, longest=LONGEST)
    yield Case("pack 6", pack_kernel, {"BITS": 6}, {})
    yield Case("unpack 6", unpack_kernel, {"BITS": 6}, {})
    doubles = {"sum_ptr": "*fp64", "square_ptr": "*fp64"}
    yield Case("tap_sums 9", tap_sums_kernel, {"TAPS": 9}, weights | doubles)
    for name, grouped, group in (("feedback", False, "*fp32"), ("feedback grouped", True, "*i64")):
        types = {"group_ptr": group, "low": "fp32", "high": "fp32"}
        yield Case(name, feedback_kernel, {"GROUPED": grouped}, types, feedback_shape)
    yield Case("compensate", compensate_kernel, {"DEAD": 1e-6, "BLOCK": 256}, {"dead_ptr": "*u8"})


def faults(cost: Cost, shape: Shape, target: str) -> Iterator[str]:
    """Yield what is wrong with a compiled kernel."""
    if cost.spilled:
        yield "spills"
    if cost.shared > SHARED_LIMIT[target]:
        yield "shared memory above the limit"
    if cost.wide_bytes(shape.width) < shape.thread_bytes:
        yield f"loads narrower than {shape.width} bytes"
