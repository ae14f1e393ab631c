"""Input patches of a convolution or linear layer at sampled output positions, and their second moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..models.graph import Layer, Op
from .calibrate import InputMoments

SAMPLES = 24_000
"""Positions that are sampled at least, where there are as many …"""
SAMPLES_A_WEIGHT = 2.5
"""… and at least this many for every weight of a row."""
DEPTHWISE_SAMPLES = 6_000
"""A depthwise row has few weights: fewer positions determine its moments."""
_TOGETHER = 160
"""Columns of depthwise patches that are multiplied at once."""
_BLOCKED, _BLOCKS = 1024, 6
"""Rows of at least this length are contracted with themselves in blocks: 6 of them save 5/12 of the products."""


@dataclass(frozen=True)
class Window:
    """How a convolution slides; one entry an axis of space."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]


def window_of(layer: Layer, arguments: Mapping[str, Any]) -> Window | None:
    """Return the window of a 1- or 2-dimensional convolution from its ATen ``arguments``; None for anything else."""
    kernel = layer.shape[2:]
    if layer.op is not Op.CONV or len(kernel) not in (1, 2):
        return None
    dilation = _sizes(arguments.get("dilation", 1), len(kernel))
    padding = arguments.get("padding", 0)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
        if any(d * (k - 1) % 2 for d, k in zip(dilation, kernel, strict=True)):
            return None
    return Window(kernel, _sizes(arguments.get("stride", 1), len(kernel)), _sizes(padding, len(kernel)), dilation)


def _sizes(value: Any, rank: int) -> tuple[int, ...]:
    given = [int(value)] if isinstance(value, int) else [int(size) for size in value]
    return tuple(given * rank if len(given) == 1 else given)


def sample_count(layer: Layer, positions: int) -> int:
    """Return how many of ``positions`` are sampled for the moments of ``layer``."""
    wanted = DEPTHWISE_SAMPLES if layer.depthwise else max(SAMPLES, int(SAMPLES_A_WEIGHT * layer.length))
    return min(positions, wanted)


def sampled_moments(
    inputs: Tensor, target: Tensor, layer: Layer, window: Window | None, generator: torch.Generator
) -> InputMoments:
    """Return Cov(h, h) and Cov(t, h) over a random subset of the output positions.

    ``inputs`` is the layer's input (float32 [N, C, *space], or [N, …, in] for a linear layer), ``target`` the output
    that is wanted there ([N, out, *space] or [N, …, out]). ``window`` is None for a linear layer.
    """
    outputs = target if window is None else target.movedim(1, -1)
    flat = outputs.reshape(-1, layer.out_channels)
    count = sample_count(layer, len(flat))
    chosen = None
    if count < len(flat):
        chosen = torch.randperm(len(flat), generator=generator)[:count].to(flat.device)
        flat = flat[chosen]
    if window is None:
        rows = inputs.reshape(-1, layer.in_channels)
        patches = (rows if chosen is None else rows[chosen]).unsqueeze(1)
    else:
        patches = _patches(inputs, window, tuple(outputs.shape[1:-1]), chosen)
    return _moments(patches, flat, layer)


def _patches(inputs: Tensor, window: Window, space: tuple[int, ...], chosen: Tensor | None) -> Tensor:
    """Return [M, taps, C]: the inputs under the window at the chosen output positions (all, where None)."""
    pads = [size for pad in reversed(window.padding) for size in (pad, pad)]
    last = functional.pad(inputs, pads).movedim(1, -1).contiguous()
    batch, *extent = last.shape[:-1]
    steps = [torch.arange(size) * stride for size, stride in zip(space, window.stride, strict=True)]
    taps = [torch.arange(size) * dilation for size, dilation in zip(window.kernel, window.dilation, strict=True)]
    starts, offsets = torch.arange(batch) * prod(extent), torch.zeros(1, dtype=torch.int64)
    for axis in range(len(space)):
        inner = prod(extent[axis + 1 :])
        starts = (starts[:, None] + steps[axis] * inner).flatten()
        offsets = (offsets[:, None] + taps[axis] * inner).flatten()
    starts = starts.to(inputs.device)
    starts = starts if chosen is None else starts[chosen]
    index = (starts[:, None] + offsets.to(inputs.device)).flatten()
    return last.view(-1, last.shape[-1]).index_select(0, index).view(len(starts), len(offsets), -1)


def _moments(patches: Tensor, target: Tensor, layer: Layer) -> InputMoments:
    """Contract [M, taps, C] patches with themselves and with [M, out] targets, group by group, and centre."""
    count, taps, channels = patches.shape
    if layer.depthwise and channels == target.shape[1]:
        return _depthwise_moments(patches, target)
    groups, inside = layer.groups, channels // layer.groups
    # [groups, M, taps * C / groups]; the contraction is put into the order of rows (channel major) when it is small
    grouped = patches.view(count, taps, groups, inside).permute(2, 0, 1, 3).reshape(groups, count, taps * inside)
    wanted = target.view(count, groups, -1).transpose(0, 1)
    mean, wanted_mean = grouped.mean(1), wanted.mean(1)
    second = _gram(grouped) - mean[:, :, None] * mean[:, None, :]
    cross = _contract(wanted, grouped) - wanted_mean[:, :, None] * mean[:, None, :]
    order = torch.arange(taps * inside, device=patches.device).view(taps, inside).t().flatten()
    return InputMoments(second[:, order][:, :, order], cross[:, :, order], count)


def _depthwise_moments(patches: Tensor, target: Tensor) -> InputMoments:
    """Contract every channel's own taps: [M, taps, C] to [C, taps, taps] and [C, 1, taps].

    Many tiny products are slow, so neighbouring channels are multiplied together and their own blocks taken out.
    """
    count, taps, channels = patches.shape
    mean, wanted = patches.mean(0).t(), target.mean(0)
    second, cross = (torch.empty((channels, *shape), device=patches.device) for shape in ((taps, taps), (taps,)))
    together = max(1, _TOGETHER // taps)
    for start in range(0, channels, together):
        part = patches[:, :, start : start + together].reshape(count, -1)
        blocks = (part.t() @ part).view(taps, -1, taps, part.shape[1] // taps)
        second[start : start + together] = blocks.diagonal(dim1=1, dim2=3).permute(2, 0, 1) / count
        beside = (part.t() @ target[:, start : start + together]).view(taps, blocks.shape[1], -1)
        cross[start : start + together] = beside.diagonal(dim1=1, dim2=2).t() / count
    second -= mean[:, :, None] * mean[:, None, :]
    return InputMoments(second, (cross - mean * wanted[:, None]).unsqueeze(1))


def _gram(patches: Tensor) -> Tensor:
    """``_contract`` of patches with themselves: only blocks on and above the diagonal are multiplied."""
    length = patches.shape[2]
    if length < _BLOCKED:
        return _contract(patches, patches)
    found = patches.new_empty((len(patches), length, length))
    for start in range(0, length, -(-length // _BLOCKS)):
        block = slice(start, min(length, start + -(-length // _BLOCKS)))
        found[:, block, start:] = _contract(patches[:, :, block], patches[:, :, start:])
        found[:, start:, block] = found[:, block, start:].transpose(1, 2)
    return found


def _contract(first: Tensor, second: Tensor) -> Tensor:
    """Mean over M of the outer products, float32 [groups, A, B]."""
    return torch.bmm(first.transpose(1, 2), second) / first.shape[1]
