"""Times on a CPU: the references, the chain channel by channel, and a copy of the input, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from bench_kernels_shapes import Shapes
from channel_by_channel import dorefa_channel, pack, ternary_channel
from dfmpc.kernels import Grid, Quantized
from dfmpc.kernels.ternary import ternary_reference
from dfmpc.kernels.uniform import uniform_reference
from torch import Tensor

SHAPES = (
    Shapes("512×4608", ((512, 4608),), torch.float32),
    Shapes("2048×576", ((2048, 576),), torch.float32),
    Shapes("4096×64", ((4096, 64),), torch.float32),
    Shapes("4096×9", ((4096, 9),), torch.float32),
)
TIES = 1e-6
"""Share of bytes of codes that the two may differ in: float32 ties that fall the other way."""


@dataclass(frozen=True)
class CpuRow:
    """Median milliseconds of one shape and operation, and their ratios."""

    shape: str
    operation: str
    copy_ms: float
    reference_ms: float
    channelwise_ms: float
    channelwise_over_reference: float
    reference_over_copy: float


def _reference(weight: Tensor, bits: int) -> Quantized:
    if bits == 2:
        return ternary_reference(weight, group_size=weight.shape[1])
    return uniform_reference(weight, bits, Grid.DOREFA, group_size=weight.shape[1])


def channelwise(weight: Tensor, bits: int) -> Tensor:
    """Quantize and pack one channel after the other; return the codes."""
    rows = [ternary_channel(row) if bits == 2 else dorefa_channel(row, bits) for row in weight]
    return torch.stack([pack(codes, bits) for codes, _ in rows])


def measure_one(shapes: Shapes, bits: int, repeats: int) -> CpuRow:
    """Time the three in turn, after checking that the codes agree."""
    weight = shapes.weights("cpu", 0)[0]
    name = "ternary" if bits == 2 else f"uniform {bits}"
    differ = int((_reference(weight, bits).codes != channelwise(weight, bits)).sum())
    if differ > TIES * weight.numel():
        raise SystemExit(f"error: {shapes.name} {name}: {differ} bytes of codes differ; no time is worth quoting")
    target = torch.empty_like(weight)
    calls: list[Callable[[], object]] = [
        lambda: target.copy_(weight),
        lambda: _reference(weight, bits),
        lambda: channelwise(weight, bits),
    ]
    taken = [[_seconds(call) for call in calls] for _ in range(repeats)]
    copy, ours, naive = (statistics.median(column) * 1e3 for column in zip(*taken, strict=True))
    return CpuRow(shapes.name, name, copy, ours, naive, naive / ours, ours / copy)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(repeats: int) -> list[CpuRow]:
    """Time every shape at 2, 4 and 8 bits and print a row each."""
    print(f"{'shape':<12}{'operation':<12}{'copy ms':>9}{'ours ms':>9}{'by channel':>12}{'ratio':>7}{'of copy':>9}")
    rows = []
    for shapes in SHAPES:
        for bits in (2, 4, 8):
            row = measure_one(shapes, bits, repeats)
            rows.append(row)
            print(f"{row.shape:<12}{row.operation:<12}{row.copy_ms:>9.3f}{row.reference_ms:>9.2f}", end="")
            print(
                f"{row.channelwise_ms:>12.1f}{row.channelwise_over_reference:>7.1f}{row.reference_over_copy:>9.1f}",
                flush=True,
            )
    return rows
