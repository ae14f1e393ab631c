"""Networks for exports: every kind of layer, a tied weight, a batch written into the code, an operation ONNX lacks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import fractional_max_pool2d, linear


class EveryLayer(nn.Module):
    """Every kind of weight layer that has codes, on images [N, 5, 8, 8]; 9 outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(5, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6, bias=False)
        self.grouped = nn.Conv2d(6, 8, 3, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.up_grouped = nn.ConvTranspose2d(6, 8, 2, groups=2, bias=False)
        self.up_depthwise = nn.ConvTranspose2d(8, 8, 2, groups=8, bias=False)
        self.line = nn.Conv1d(8, 7, 5, bias=False)
        self.tokens, self.head = nn.Linear(7, 17), nn.Linear(17, 9)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        x = self.up(self.grouped(self.depthwise(x))).relu()
        x = self.up_depthwise(self.up_grouped(x)).relu()
        x = self.line(x.flatten(2)).transpose(1, 2)
        return self.head(self.tokens(x).relu().mean(1))


class Tied(nn.Module):
    """Two linear layers with one weight, on images [N, 5, 8, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(5, 16, 3, stride=2), nn.BatchNorm2d(16)
        self.encode, self.decode = nn.Linear(16, 16), nn.Linear(16, 16)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.decode(self.encode(x).relu())


class OneImage(nn.Module):
    """A network that says itself that there is one image, and takes several for one large one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(5, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).view(1, 8, -1).mean(2))


class _Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i1(x)


class _Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return fractional_max_pool2d(x, 2, 2)


class Unwritable(nn.Module):
    """A network with an operation that ONNX does not have, in the module ``odd``."""

    def __init__(self, operation: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 8, 3)
        self.odd = {"bessel": _Bessel, "pool": _Pool}[operation]()

    def forward(self, x: Tensor) -> Tensor:
        return linear(self.odd(self.conv(x)).mean((2, 3)), torch.ones(3, 8))
