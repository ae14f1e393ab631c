"""Networks that build in milliseconds, and factories that misbehave; run through --allow-code by the tests."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import torch
from torch import Tensor, nn


def _unit(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def _head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)]


def plain(width: int = 8) -> nn.Module:
    """Three convolutions with BatchNorm: a stem, a LOW and a HIGH layer."""
    return nn.Sequential(*_unit(3, width), *_unit(width, width), *_unit(width, width), *_head(width))


def without_norm() -> nn.Module:
    """No BatchNorm anywhere: one layer between the stem and the classifier."""
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), *_head(8))


class TwoInputs(nn.Module):
    """A network that takes two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.conv(first) + self.conv(second)


def blocks_while(fifo: str) -> nn.Module:
    """Say this process's number into ``fifo`` and never come back; once the file is gone, be ``plain``."""
    if Path(fifo).exists():
        with open(fifo, "w", encoding="ascii") as pipe:
            pipe.write(f"{os.getpid()}\n")
        threading.Event().wait()
    return plain()


def blocks_once(marker: str) -> nn.Module:
    """Never come back the first time."""
    if not Path(marker).exists():
        Path(marker).touch()
        threading.Event().wait()
    return plain()


def dies_once(marker: str) -> nn.Module:
    """Be killed the first time."""
    if not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return plain()


def raises_a_bug() -> nn.Module:
    """Fail in a way that nobody foresaw."""
    raise ZeroDivisionError("unforeseen")


def folded(width: int = 8) -> nn.Module:
    """``plain`` with its BatchNorms folded away: convolutions with biases, a ReLU behind each."""
    units = [(nn.Conv2d(i, width, 3, padding=1), nn.ReLU()) for i in (3, width, width)]
    return nn.Sequential(*(module for unit in units for module in unit), *_head(width))


class _Attention(nn.Module):
    """Self-attention of one head, written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


class _TransformerBlock(nn.Module):
    """Attention and an MLP, each behind a LayerNorm and beside a residual stream."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), _Attention(width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """A tiny ViT: patches of 4 x 4, learned positions, the mean over tokens."""

    def __init__(self, width: int = 16, side: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.positions = nn.Parameter(torch.randn(1, (side // 4) ** 2, width) * 0.1)
        self.blocks = nn.Sequential(_TransformerBlock(width), _TransformerBlock(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(1))


class _ConvNextBlock(nn.Module):
    """A depthwise convolution, a LayerNorm and an MLP over channels, scaled a channel and added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.scale * self.down(nn.functional.gelu(self.up(y))).permute(0, 3, 1, 2)


def vision_transformer(width: int = 16) -> nn.Module:
    """Make a ViT of two blocks for images of 16 x 16."""
    return VisionTransformer(width)


def convnext(width: int = 8) -> nn.Module:
    """Make a ConvNeXt of two blocks."""
    blocks = [_ConvNextBlock(width), _ConvNextBlock(width)]
    return nn.Sequential(nn.Conv2d(3, width, 2, 2), nn.GroupNorm(1, width), *blocks, *_head(width))


class Gated(nn.Module):
    """An inverted residual with squeeze and excite and Hardswish, as in MobileNetV3."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.expand, self.norm1 = nn.Conv2d(width, 2 * width, 1, bias=False), nn.BatchNorm2d(2 * width)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * width)
        self.squeeze, self.excite = nn.Conv2d(2 * width, 4, 1), nn.Conv2d(4, 2 * width, 1)
        self.project, self.norm3 = nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.head = nn.Sequential(*_head(width))

    def forward(self, x: Tensor) -> Tensor:
        act = nn.functional.hardswish
        x = act(self.norm0(self.stem(x)))
        y = act(self.norm2(self.depthwise(act(self.norm1(self.expand(x))))))
        gate = self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True))))
        return self.head(x + self.norm3(self.project(nn.functional.hardsigmoid(gate) * y)))


def gated(width: int = 8) -> nn.Module:
    """Make a network of one gated inverted residual."""
    return Gated(width)
