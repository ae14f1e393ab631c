"""Have the kernels compiled once a node before many workers want them, instead of by each of them at the same time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from . import dequantize, row_statistics, tap_sums, ternary, uniform
from .formats import Grid
from .group import Request, quantize_group

LENGTHS = (9, 64, 576)
"""Rows of a depthwise, a pointwise and an ordinary convolution: each has a launch shape of its own."""
WIDTHS = (4, 6, 8)
TOGETHER = ((Grid.TERNARY, 2, 0), (Grid.TERNARY, 2, 9), (Grid.DOREFA, 6, 0))
"""What plans that round to nearest ask for at 2/6: grid, bits, taps whose sums come along (calibrator analytic).
A kernel for many tensors has every kind of tile and takes longest to compile."""


def warm_kernels(device: str) -> None:
    """Run every operation on small tensors on ``device``; whoever comes second finds the compiled ones on the disk.

    The lock is the file system's own, so one that a dead process held is free.
    """
    with _first_of_the_node():
        for length in LENGTHS:
            weight = torch.linspace(-1, 1, 4 * length, device=device).reshape(4, length)
            for layer_wise in (False, True):
                found = ternary(weight, group_size=length, layer_wise=layer_wise)
                dequantize(found.format, found.codes, found.scale, found.zero_point)
            for bits in WIDTHS:
                found = uniform(weight, bits, Grid.DOREFA, group_size=length)
                dequantize(found.format, found.codes, found.scale, found.zero_point)
            row_statistics(weight, length)
        tap_sums(torch.ones(4, 72, device=device), 9)
        weights = [torch.ones(4, length, device=device) for length in LENGTHS]
        for grid, bits, taps in TOGETHER:
            divided = [taps if taps and weight.shape[1] % taps == 0 else 0 for weight in weights]
            quantize_group(
                [Request(w, grid, bits, w.shape[1], taps=own) for w, own in zip(weights, divided, strict=True)]
            )


@contextmanager
def _first_of_the_node() -> Iterator[None]:
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / "dfmpc-warm.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:  # a cache that cannot be written: every worker compiles for itself
        yield
        return
    try:
        with suppress(OSError):  # a file system without locks: as without a folder
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
