"""Images made from nothing: seeded 1/f noise, every image with a slope, contrast, brightness and colour of its own.

Inputs that are no images get them (synthetic.py). When they change, so must SYNTHETIC_VERSION of settings.py, which
enters the keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..compress.priors.noise import one_over_f
from ..errors import DataError

SLOPES = (1.0, 2.5)
"""Amplitude falls as 1/f to a power drawn from this range; photographs lie in its middle."""
CONTRASTS = (0.1, 0.4)
"""Standard deviation of an image's pixels, which are 0-1."""
COLOUR_CORRELATION = 0.8
PIXEL_MEAN = 0.47
BRIGHTNESS_SD = 0.15
"""How the mean of an image varies, all channels alike."""
CAST_SD = 0.2
"""How the mean of a channel varies beyond that."""


def noise_images(
    count: int,
    shape: Sequence[int],
    seed: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Return ``count`` noise images, float32 [count, *shape], ``shape`` = (C, H, W) (any number of space axes works).

    Images that differ in nothing but the noise all land in one class of a trained network, and agreement on them says
    nothing; so each draws its own slope, contrast, brightness and colour cast. Pixels are clamped to 0-1 and then
    normalised as (x - mean) / std, or without them to mean 0 and standard deviation 1 over all. The same seed gives
    the same images, with and without a GPU.

    Raises DataError where ``mean`` or ``std`` has not one entry a channel.
    """
    generator = torch.Generator().manual_seed(seed)
    channels, space = shape[0], tuple(shape[1:])
    each = (count, 1, *[1] * len(space))
    slopes = _between(SLOPES, each, generator)
    own = one_over_f(slopes, channels, space, generator)
    common = one_over_f(slopes, 1, space, generator)
    mixed = COLOUR_CORRELATION**0.5 * common + (1 - COLOUR_CORRELATION) ** 0.5 * own
    axes = tuple(range(1, mixed.dim()))
    spread = mixed.std(axes, keepdim=True, correction=0).clamp_min(1e-12)
    flat = (mixed - mixed.mean(axes, keepdim=True)) / spread
    level = PIXEL_MEAN + BRIGHTNESS_SD * torch.randn(each, generator=generator, dtype=torch.float64)
    cast = CAST_SD * torch.randn((count, channels, *each[2:]), generator=generator, dtype=torch.float64)
    pixels = (flat * _between(CONTRASTS, each, generator) + level + cast).clamp_(0, 1)
    return _normalised(pixels, shape, mean, std)


def _between(bounds: tuple[float, float], shape: Sequence[int], generator: torch.Generator) -> Tensor:
    low, high = bounds
    return low + (high - low) * torch.rand(tuple(shape), generator=generator, dtype=torch.float64)


def _normalised(
    pixels: Tensor, shape: Sequence[int], mean: Sequence[float] | None, std: Sequence[float] | None
) -> Tensor:
    if mean is None or std is None:
        return pixels.sub_(pixels.mean()).div_(pixels.std()).float()
    return pixels.sub_(_a_channel(mean, shape)).div_(_a_channel(std, shape)).float()


def _a_channel(values: Sequence[float], shape: Sequence[int]) -> Tensor:
    if len(values) != shape[0]:
        raise DataError(f"mean and std have {len(values)} entries, the network's input {shape[0]} channels: drop them")
    return torch.tensor(values, dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
