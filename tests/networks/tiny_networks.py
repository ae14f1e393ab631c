"""Networks that build in milliseconds, and factories that misbehave; run through --allow-code by the tests."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

from torch import Tensor, nn


def _unit(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def _head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)]


def plain(width: int = 8) -> nn.Module:
    """Three convolutions with BatchNorm: a stem, a LOW and a HIGH layer."""
    return nn.Sequential(*_unit(3, width), *_unit(width, width), *_unit(width, width), *_head(width))


def without_norm() -> nn.Module:
    """No BatchNorm anywhere: nothing for dfmpc to pair."""
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
