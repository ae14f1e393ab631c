"""Second moments of a layer's input patches, from the covariance function of its input and its mean map."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from .convolve import Kernel, Window
from .field import Field
from .torus import TABLES


def inside(size: int, window: Window, axis: int) -> Tensor:
    """Return which taps read inside the map at which output position, float32 [kernel, positions]."""
    kernel, stride = window.kernel[axis], window.stride[axis]
    padding, dilation = window.padding[axis], window.dilation[axis]
    outputs = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    reads = torch.arange(kernel).unsqueeze(1) * dilation - padding + torch.arange(max(1, outputs)) * stride
    return ((reads >= 0) & (reads < size)).float()


def coverage(field: Field, window: Window) -> Tensor:
    """Return the share of output positions where both of two taps read inside the map, float32 [taps, taps]."""
    return _coverage(field.mean.shape[1], field.mean.shape[2], window)


@lru_cache(maxsize=TABLES)
def _coverage(height: int, width: int, window: Window) -> Tensor:
    shares = [inside(size, window, axis) for axis, size in enumerate((height, width))]
    rows, columns = (share @ share.T / share.shape[1] for share in shares)
    return torch.kron(rows, columns)


def patch_moments(
    field: Field, window: Window, groups: int, contrast: float = 0.0, independence: float = 0.0
) -> Tensor:
    """Return Cov(h, h) of the patches h, float32 [groups, K, K], K = in / groups · taps, taps innermost.

    R at the taps' lags, where both taps read inside the map, and the covariance of the mean map's patches over the
    positions, both with the layer's zero padding. Images differ in contrast, which Gaussian fields do not: a common
    factor of variance ``contrast`` adds that times E[h] E[h]ᵀ. Blocks between different channels are shrunk by
    ``independence`` (linear shrinkage towards what the model knows best, after Ledoit and Wolf).
    """
    found = _around_mean(field, window, groups)
    patches = functional.unfold(field.mean.unsqueeze(0), window.kernel, window.dilation, window.padding, window.stride)
    patches = patches.view(groups, -1, patches.shape[-1])
    mean = patches.mean(2, keepdim=True)
    patches = patches - mean
    found.baddbmm_(patches, patches.mT, alpha=1 / patches.shape[2]).baddbmm_(mean, mean.mT, alpha=contrast)
    return _shrunk(found, len(window.offsets), independence)


def _shrunk(moments: Tensor, taps: int, independence: float) -> Tensor:
    """Multiply the blocks between different channels by 1 - ``independence``, in place."""
    channels = moments.shape[1] // taps
    blocks = moments.view(-1, channels, taps, channels, taps)
    own = blocks.diagonal(dim1=1, dim2=3)
    kept = own.clone()
    blocks.mul_(1 - independence)
    own.copy_(kept)
    return moments


@lru_cache(maxsize=TABLES)
def _lags(window: Window) -> tuple[Tensor, Tensor]:
    """Return the distinct differences of two taps, int64 [L, 2], and which of them a pair has, int64 [taps, taps]."""
    taps = window.offsets
    lags = (taps.unsqueeze(1) - taps).flatten(0, 1)
    distinct, index = torch.unique(lags, dim=0, return_inverse=True)
    return distinct, index.view(len(taps), -1)


def _around_mean(field: Field, window: Window, groups: int) -> Tensor:
    distinct, index = _lags(window)
    inputs, taps = field.channels // groups, len(index)
    covariance = field.torus.covariance(_in_groups(field.spectrum, groups), distinct)
    shares = coverage(field, window)[:, :, None, None, None]
    found = covariance.new_empty(groups, inputs, taps, inputs, taps)
    for one in range(taps):
        part = covariance[index[one]].mul_(shares[one])
        found[:, :, one].copy_(part.permute(1, 2, 3, 0))
    return found.view(groups, inputs * taps, -1)


def _in_groups(spectrum: Tensor, groups: int) -> Tensor:
    """Return the blocks on the diagonal, [2, P, groups, C / groups, C / groups], of [2, P, C, C]."""
    if groups == 1:
        return spectrum.unsqueeze(2)
    inputs = spectrum.shape[2] // groups
    blocks = spectrum.reshape(2, -1, groups, inputs, groups, inputs)
    return blocks.diagonal(dim1=2, dim2=4).movedim(-1, 2).contiguous()


def border_sums(kernel: Kernel, field: Field) -> Tensor:
    """Return tap sums with every tap weighted by the share of positions where it reads inside, [out, in / groups]."""
    shares = coverage(field, kernel.window).diagonal()
    return kernel.weight.flatten(2) @ shares
