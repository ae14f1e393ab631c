"""Images made from nothing: seeded 1/f noise with the statistics of photographs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import DataError

EXPONENT = 1.0
"""Amplitude falls as 1/f to this power (power as 1/f^2), as in natural images."""
COLOUR_CORRELATION = 0.93
PIXEL_MEAN = 0.47
PIXEL_SD = 0.25


def noise_images(
    count: int,
    shape: Sequence[int],
    seed: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """Return ``count`` noise images, float32 [count, *shape], ``shape`` = (C, H, W) (any number of space axes works).

    1/f noise whose channels correlate by 0.93, set to mean 0.47 and standard deviation 0.25, clamped to 0-1 and then
    normalised as (x - mean) / std, or without them to mean 0 and standard deviation 1 over all. The same seed gives
    the same images, with and without a GPU (docs/methods.md, section 5, step 0 for the statistics).

    Raises DataError where ``mean`` or ``std`` has not one entry a channel.
    """
    generator = torch.Generator().manual_seed(seed)
    channels, space = shape[0], tuple(shape[1:])
    own = _one_over_f(count, channels, space, generator)
    common = _one_over_f(count, 1, space, generator)
    mixed = COLOUR_CORRELATION**0.5 * common + (1 - COLOUR_CORRELATION) ** 0.5 * own
    pixels: Tensor = ((mixed - mixed.mean()) / mixed.std() * PIXEL_SD + PIXEL_MEAN).clamp_(0, 1)
    if mean is None or std is None:
        centre, spread = pixels.mean(), pixels.std()
    else:
        centre, spread = _a_channel(mean, shape), _a_channel(std, shape)
    return pixels.sub_(centre).div_(spread).float()


def _one_over_f(count: int, channels: int, space: tuple[int, ...], generator: torch.Generator) -> Tensor:
    white = torch.randn((count, channels, *space), generator=generator, dtype=torch.float64)
    if not space:
        return white
    axes = tuple(range(2, 2 + len(space)))
    spectrum = torch.fft.rfftn(white, dim=axes)
    squares = torch.zeros((), dtype=torch.float64)
    for axis, size in enumerate(space):
        last = axis == len(space) - 1
        steps = torch.fft.rfftfreq(size) if last else torch.fft.fftfreq(size)
        squares = squares + steps.double().square().reshape([-1 if i == axis else 1 for i in range(len(space))])
    # The constant term gets the amplitude of the lowest frequency, so that brightness differs between images.
    lowest = 1 / max(space)
    amplitude = squares.sqrt().clamp_min(lowest).pow(-EXPONENT)
    shaped: Tensor = torch.fft.irfftn(spectrum * amplitude, s=space, dim=axes)
    return shaped.div_(amplitude.square().mean().sqrt())


def _a_channel(values: Sequence[float], shape: Sequence[int]) -> Tensor:
    if len(values) != shape[0]:
        raise DataError(f"mean and std have {len(values)} entries, the network's input {shape[0]} channels: drop them")
    return torch.tensor(values, dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
