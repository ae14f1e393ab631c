"""Weight layers on fields: S ← W(f) S W(f)ᴴ, and the mean map through the real, zero-padded convolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ...models.graph import Layer, Node, Op
from .field import Field
from .torus import Torus, torus

_NOWHERE = torch.zeros(1, 2, dtype=torch.int64)


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

    @staticmethod
    def of(rows: Tensor, layer: Layer, window: Window) -> Kernel:
        """Take a layer's weight as [out, length] rows."""
        weight = rows.float().reshape(layer.out_channels, -1, *window.kernel)
        return Kernel(weight, layer.groups, window)

    def transfer(self, grid: Torus) -> Tensor:
        """W(f) = Σ_t w_t exp(i f t), complex64 [P, groups, out / groups, in / groups]."""
        outs, ins = self.weight.shape[:2]
        cosine, sine = grid.waves(self.window.offsets)
        taps = self.weight.flatten(2).movedim(2, 0).flatten(1)
        found = torch.complex(cosine.float() @ taps, sine.float() @ taps)
        return found.view(-1, self.groups, outs // self.groups, ins)

    @property
    def pointwise(self) -> bool:
        """Whether every output reads the one position that it stands at: then W(f) is the weight itself."""
        return self.window.kernel == (1, 1) and self.window.padding == (0, 0)

    def from_left(self, spectrum: Tensor, grid: Torus) -> Tensor:
        """W(f) X(f), complex64 [P, out, B], of X, [P, in, B]."""
        if self.pointwise and self.groups == 1:
            flat = torch.view_as_real(spectrum.resolve_conj()).flatten(2)
            product = torch.matmul(self.weight.flatten(1), flat)
            return torch.view_as_complex(product.view(len(flat), len(self.weight), -1, 2))
        return multiply(self.transfer(grid), spectrum)

    def both_sides(self, spectrum: Tensor, grid: Torus) -> Tensor:
        """W(f) S(f) W(f)ᴴ of a Hermitian S, complex64 [P, in, in]."""
        if self.pointwise and self.groups == 1:
            return self.from_left(self.from_left(spectrum, grid).mH, grid)
        transfer = self.transfer(grid)
        if transfer.shape[2:] == (1, 1):
            gains = transfer.view(len(transfer), -1)
            return (spectrum * gains.unsqueeze(2)).mul_(gains.conj().resolve_conj().unsqueeze(1))
        return multiply(transfer, multiply(transfer, spectrum).mH)

    def mean(self, mean: Tensor) -> Tensor:
        """Through the layer itself: float32 [out, height, width] of [in, height, width]."""
        window = self.window
        found = functional.conv2d(
            mean.unsqueeze(0), self.weight, None, window.stride, window.padding, window.dilation, self.groups
        )
        return found.squeeze(0)


def multiply(transfer: Tensor, spectrum: Tensor) -> Tensor:
    """Multiply by a transfer function, [P, groups, out / groups, in / groups], from the left."""
    points, groups, outs, ins = transfer.shape
    if ins == 1 and outs == 1:
        return transfer.view(points, groups, 1) * spectrum
    grouped = spectrum.reshape(points, groups, ins, -1)
    return (transfer @ grouped).view(points, groups * outs, -1)


def convolved(field: Field, kernel: Kernel, bias: Tensor | None) -> Field:
    """Return the field behind a weight layer."""
    mean = kernel.mean(field.mean)
    if bias is not None:
        mean = mean + bias.float().view(-1, 1, 1)
    spectrum = kernel.both_sides(field.spectrum, field.torus)
    grid = field.torus
    if mean.shape[1:].numel() == 1:
        return Field(mean, grid.covariance(spectrum, _NOWHERE).to(torch.complex64), torus(1, 1))
    if kernel.window.stride != (1, 1):
        grid, spectrum = grid.decimated(spectrum, kernel.window.stride)
    return Field(mean, spectrum, grid)
