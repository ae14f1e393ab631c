"""What bench_kernels.py and tune_kernels.py work on: rows × length of layers, seeded random weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shapes:
    """The layers of one launch."""

    name: str
    layers: tuple[tuple[int, int], ...]
    """(rows, length) of each."""
    dtype: torch.dtype

    @property
    def input_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(rows * length for rows, length in self.layers) * self.dtype.itemsize

    @property
    def longest(self) -> int:
        """Elements of the longest row."""
        return max(length for _, length in self.layers)

    def as_one(self) -> Shapes:
        """Return one tensor of the same bytes, with rows of 512 elements."""
        rows = self.input_bytes // self.dtype.itemsize // 512
        return Shapes(f"{self.name}, one tensor", ((rows, 512),), self.dtype)

    def weights(self, device: str, seed: int) -> list[Tensor]:
        """Draw weights like a trained layer's: normal, of a spread that shrinks with the length."""
        generator = torch.Generator(device=device).manual_seed(seed)
        return [_normal(rows, length, self.dtype, generator) for rows, length in self.layers]


def _normal(rows: int, length: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    drawn = torch.randn((rows, length), dtype=dtype, device=generator.device, generator=generator)
    return drawn.mul_(length**-0.5)


def _one(rows: int, length: int, dtype: torch.dtype) -> Shapes:
    return Shapes(f"{rows}×{length} {str(dtype).removeprefix('torch.')}", ((rows, length),), dtype)


SINGLE = (
    _one(57344, 4096, torch.bfloat16),
    _one(16384, 14336, torch.bfloat16),
    _one(65536, 4608, torch.float32),
    _one(262144, 576, torch.float32),
    _one(1048576, 64, torch.float32),
    _one(4194304, 9, torch.float32),
    _one(2097152, 25, torch.float32),
)


def _resnet50() -> tuple[tuple[int, int], ...]:
    layers, before = [(64, 3 * 49)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers += [(width, before), (width, width * 9), (4 * width, width)]
            if block == 0:
                layers.append((4 * width, before))
            before = 4 * width
    return (*layers, (1000, before))


def _mobilenetv2() -> tuple[tuple[int, int], ...]:
    layers, before = [(32, 27)], 32
    for expansion, width, blocks in (
        (1, 16, 1),
        (6, 24, 2),
        (6, 32, 3),
        (6, 64, 4),
        (6, 96, 3),
        (6, 160, 3),
        (6, 320, 1),
    ):
        for _ in range(blocks):
            hidden = before * expansion
            layers += [(hidden, before)] * (expansion > 1) + [(hidden, 9), (width, hidden)]
            before = width
    return (*layers, (1280, before), (1000, 1280))


LLAMA = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
"""Query, key, value, output, gate, up and down of one layer of Llama 3 8B."""

GROUPED = (
    Shapes("ResNet-50", _resnet50(), torch.float32),
    Shapes("MobileNetV2", _mobilenetv2(), torch.float32),
    Shapes("Llama-8B layer", LLAMA, torch.bfloat16),
)


def shrunk(shapes: Shapes, rows: int) -> Shapes:
    """Return the same layers with at most ``rows`` rows each: for a trial run where time does not matter."""
    return Shapes(shapes.name, tuple((min(rows, r), length) for r, length in shapes.layers), shapes.dtype)


def sampled(rows: int, count: int) -> list[int]:
    """Return up to ``count`` rows spread over ``rows``, the first and the last among them."""
    steps = max(1, min(count, rows) - 1)
    return sorted({round(i * (rows - 1) / steps) for i in range(min(count, rows))})


def total_bytes(tensors: Sequence[Tensor | None]) -> int:
    """Return the bytes of all tensors that are there."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
