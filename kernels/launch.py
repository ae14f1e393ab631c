"""How kernels are launched: the shape of a program's tile and the device it runs on. No autotuning, so no surprises."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ._triton import available
from .shapes import LANES

TILE = 512
"""Elements a program holds at a time: four for each thread of four warps. Twice as many spill (compile_kernels.py)."""


@dataclass(frozen=True)
class LaunchShape:
    """A program works on ``rows`` rows, ``block`` columns at a time; both are powers of two."""

    rows: int
    block: int
    num_warps: int
    """Of 32 threads; see ``warps_for``."""


def power_of_two_above(n: int) -> int:
    """Return the least power of two that is at least ``n`` (and at least 1)."""
    return 1 << max(0, n - 1).bit_length()


def launch_shape(rows: int, length: int) -> LaunchShape:
    """Return the tile for ``rows`` rows (or segments) of ``length``: short rows share a program, long ones are looped.

    The block is at least 8, one word of codes. Results never depend on it (docs/design.md, "Exact sums").
    """
    block = min(TILE, max(8, power_of_two_above(length)))
    tile_rows = min(TILE // block, power_of_two_above(rows))
    return LaunchShape(rows=tile_rows, block=block, num_warps=max(1, min(4, tile_rows * block // 128)))


def warps_for(warps: int, threads: int | None = None) -> int:
    """Return how many warps have as many threads as ``warps`` of 32, one at least.

    A warp has so many ``threads``: by default those of this installation's GPUs, which are 64 on AMD.
    """
    threads = threads or (LANES if torch.version.hip is None else 2 * LANES)
    return max(1, warps * LANES // threads)


def use_triton(tensor: Tensor) -> bool:
    """Tell whether ``tensor`` is where kernels run; everywhere else the references do the work."""
    return tensor.device.type == "cuda" and available()


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which launches go to the device of ``tensor``."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
