"""Weight layers on fields: S ← W(f) S W(f)ᴴ, and the mean map through the real, zero-padded convolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from ...models.graph import Layer, Node, Op
from .field import Field
from .torus import TABLES, Torus, adjoint, real, torus

_NOWHERE = torch.zeros(1, 2, dtype=torch.int64)
CACHED = 2**17
"""Numbers of a part of a spectrum that depthwise layers work on at once."""


@dataclass(frozen=True)
class Window:
    """How a two-dimensional convolution slides."""

    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def offsets(self) -> Tensor:
        """Where every tap reads, relative to the output's position, int64 [taps, 2]."""
        rows, columns = (
            torch.arange(k) * d - p for k, d, p in zip(self.kernel, self.dilation, self.padding, strict=True)
        )
        return torch.cartesian_prod(rows, columns).view(-1, 2)


def window_of(layer: Layer, source: Node, target: Node, field: Field) -> Window | None:
    """Return the window of a layer on ``field``, the state of ``source``; None where it is none over two axes.

    A linear layer on [N, features] is a convolution of the size of the map that was flattened to them.
    """
    kernel = layer.shape[2:]
    if field.channels != layer.in_channels // (field.mean.shape[1:].numel() if layer.op is Op.LINEAR else 1):
        return None
    if layer.op is Op.LINEAR and len(source.shape) == 2:
        return Window(_two(field.mean.shape[1:]))
    if len(kernel) != 2 or layer.op is not Op.CONV:
        return None
    dilation = [
        _dilation(*sizes)
        for sizes in zip(source.shape[2:], target.shape[2:], kernel, layer.stride, layer.padding, strict=True)
    ]
    return Window(_two(kernel), _two(layer.stride), _two(layer.padding), _two(dilation))


def _two(values: Sequence[int]) -> tuple[int, int]:
    return values[0], values[1]


def _dilation(before: int, after: int, kernel: int, stride: int, padding: int) -> int:
    """Return the least dilation that makes ``before`` positions ``after``: the graph does not keep it."""
    if kernel == 1:
        return 1
    return max(1, -(-(before + 2 * padding - after * stride) // (kernel - 1)))


@dataclass(frozen=True)
class Kernel:
    """The weight of one layer in one network."""

    weight: Tensor
    """float32 [out, in / groups, *kernel]."""
    groups: int
    window: Window
    kept: dict[Torus, Tensor] = field(default_factory=dict, compare=False, repr=False)
    """Transfer functions that are still to be asked for; whoever puts one here takes it out."""

    @staticmethod
    def of(rows: Tensor, layer: Layer, window: Window) -> Kernel:
        """Take a layer's weight as [out, length] rows."""
        weight = rows.float().reshape(layer.out_channels, -1, *window.kernel)
        return Kernel(weight, layer.groups, window)

    def transfer(self, grid: Torus) -> Tensor:
        """W(f) = Σ_t w_t exp(i f t), float32 [2, P, groups, out / groups, in / groups]."""
        if grid in self.kept:
            return self.kept[grid]
        outs, ins = self.weight.shape[:2]
        taps = self.weight.flatten(2).movedim(2, 0).flatten(1)
        return (_waves(grid, self.window) @ taps).view(2, -1, self.groups, outs // self.groups, ins)

    @property
    def pointwise(self) -> bool:
        """Whether every output reads the one position that it stands at: then W(f) is the weight itself."""
        return self.window.kernel == (1, 1) and self.window.padding == (0, 0)

    def from_left(self, spectrum: Tensor, grid: Torus) -> Tensor:
        """W(f) X(f), float32 [2, P, out, B], of X, [2, P, in, B]."""
        if self.pointwise and self.groups == 1:
            return torch.matmul(self.weight.flatten(1), spectrum)
        return multiply(self.transfer(grid), spectrum)

    def both_sides(self, spectrum: Tensor, grid: Torus) -> tuple[Tensor, Tensor | None]:
        """W(f) S(f) W(f)ᴴ of a Hermitian S, float32 [2, P, out, out], and W(f) S(f) where that came first."""
        if self.weight.shape[1] == 1 and self.groups == len(self.weight) and not self.pointwise:
            return _times_gains(self.transfer(grid).flatten(2), spectrum), None
        product = self.from_left(spectrum, grid)
        if self.groups > 1:
            return multiply(self.transfer(grid), adjoint(product)), product
        if self.pointwise:
            return torch.matmul(product, self.weight.flatten(1).T), product
        return _times_adjoint(product, self.transfer(grid)[:, :, 0]), product

    def mean(self, mean: Tensor) -> Tensor:
        """Through the layer itself: float32 [out, height, width] of [in, height, width]."""
        window = self.window
        found = functional.conv2d(
            mean.unsqueeze(0), self.weight, None, window.stride, window.padding, window.dilation, self.groups
        )
        return found.squeeze(0)


@lru_cache(maxsize=TABLES)
def _waves(grid: Torus, window: Window) -> Tensor:
    """Cosines, then sines, of what every tap is shifted by, float32 [2 P, taps]."""
    waves = grid.waves(window.offsets)
    return torch.cat((waves.cosine, waves.sine)).float()


def multiply(transfer: Tensor, spectrum: Tensor) -> Tensor:
    """Multiply by a transfer function, [2, P, groups, out / groups, in / groups], from the left."""
    _, points, groups, outs, ins = transfer.shape
    (a, b), (x, y) = transfer.flatten(1, 2), spectrum.reshape(2, points * groups, ins, -1)
    found = spectrum.new_empty(2, *a.shape[:2], x.shape[2])
    if ins == 1 and outs == 1:  # elementwise: as matrices they are too small
        torch.mul(a, x, out=found[0]).addcmul_(b, y, value=-1)
        torch.mul(a, y, out=found[1]).addcmul_(b, x)
    else:
        torch.bmm(a, x, out=found[0]).baddbmm_(b, y, alpha=-1)
        torch.bmm(a, y, out=found[1]).baddbmm_(b, x)
    return found.view(2, points, groups * outs, -1)


def _times_adjoint(product: Tensor, transfer: Tensor) -> Tensor:
    """X Wᴴ, float32 [2, P, A, out], of X [2, P, A, in] and W [2, P, out, in]."""
    (x, y), (a, b) = product, transfer.mT
    found = product.new_empty(*product.shape[:3], transfer.shape[2])
    torch.bmm(x, a, out=found[0]).baddbmm_(y, b)
    torch.bmm(y, a, out=found[1]).baddbmm_(x, b, alpha=-1)
    return found


def _times_gains(gains: Tensor, spectrum: Tensor) -> Tensor:
    """g_i S_ij conj(g_j), float32 [2, P, C, C], of gains [2, P, C]; a few frequencies at a time, which stay cached."""
    found = torch.empty(spectrum.shape)
    at_once = max(1, CACHED // spectrum[0, 0].numel())
    for gain, before, after in zip(*(torch.split(part, at_once, 1) for part in (gains, spectrum, found)), strict=True):
        (a, b), (x, y) = gain.unsqueeze(3), before
        real, imaginary = (x * a).addcmul_(y, b, value=-1), (y * a).addcmul_(x, b)
        a, b = gain.unsqueeze(2)
        torch.mul(real, a, out=after[0]).addcmul_(imaginary, b)
        torch.mul(imaginary, a, out=after[1]).addcmul_(real, b, value=-1)
    return found


@dataclass(frozen=True)
class Convolved:
    """A field behind a weight layer, and how it varies together with the layer's input."""

    field: Field
    product: Tensor | None
    """W(f) S(f), float32 [2, P, out, in], on the input's torus; None where it is not known."""


def convolved(field: Field, kernel: Kernel, bias: Tensor | None) -> Convolved:
    """Return what stands behind a weight layer; its transfer function stays kept."""
    mean = kernel.mean(field.mean)
    if bias is not None:
        mean = mean + bias.float().view(-1, 1, 1)
    grid = field.torus
    if not kernel.pointwise:
        kernel.kept[grid] = kernel.transfer(grid)
    spectrum, product = kernel.both_sides(field.spectrum, grid)
    if mean.shape[1:].numel() == 1:
        return Convolved(Field(mean, real(grid.covariance(spectrum, _NOWHERE)), torus(1, 1)), product)
    if kernel.window.stride != (1, 1):
        grid, spectrum = grid.decimated(spectrum, kernel.window.stride)
    return Convolved(Field(mean, spectrum, grid), product)
