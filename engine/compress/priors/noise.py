"""Seeded 1/f noise: the prior ``noise``, and the fields that the other priors and the evaluation are made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SLOPE = 1.5
"""Amplitude falls as 1/f to this power (docs/methods.md, "Images made from no data")."""
COLOUR_CORRELATION = 0.93
"""Between any two channels."""
PIXEL_MEAN = 0.47
PIXEL_SD = 0.25
"""Over all pixels of a set, before clamping: images differ in brightness and contrast."""
BLUR = 0.8
"""The most that the 3 by 3 mean is mixed into an image of hard edges."""


def noise_pixels(count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Return 1/f^1.5 noise with the colour statistics of photographs, float64 [count, C, H, W], not clamped."""
    field = correlated(unit_fields(SLOPE, (count, *shape), generator))
    return field.mul_(PIXEL_SD).add_(PIXEL_MEAN)


def correlated(independent: Tensor) -> Tensor:
    """Give independent channels of variance 1, [N, C, ...], the correlation COLOUR_CORRELATION; variances stay 1.

    The symmetric square root of (1 - r) I + r 11' in closed form, so any number of channels works.
    """
    channels, r = independent.shape[1], COLOUR_CORRELATION
    own = (1 - r) ** 0.5
    common = ((1 + (channels - 1) * r) ** 0.5 - own) / channels
    mixed: Tensor = independent * own + independent.sum(1, keepdim=True) * common
    return mixed


def blurred(image: Tensor, generator: torch.Generator) -> Tensor:
    """Mix a part of its own of the 3 by 3 mean into every image [N, C, H, W], in place: the lens of a camera."""
    mixed = BLUR * torch.rand((len(image), 1, 1, 1), generator=generator, dtype=torch.float64)
    means = torch.nn.functional.avg_pool2d(image, 3, stride=1, padding=1, count_include_pad=False)
    return image.lerp_(means, mixed)


def unit_fields(slope: float, shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """Return independent 1/f^slope fields, float64 [N, C, H, W], whose variance over many is exactly 1."""
    slopes = torch.full((1, 1, 1, 1), slope, dtype=torch.float64)
    power = _amplitude(slopes, shape[2:]).square()
    # Every column of the half spectrum stands for two but the constant one and, in an even width, the last.
    twice = torch.full((power.shape[-1],), 2.0, dtype=torch.float64)
    twice[0] = 1
    if shape[3] % 2 == 0:
        twice[-1] = 1
    variance = (power * twice).sum() / twice.sum() / shape[2] / power.mean()
    fields = one_over_f(slopes.expand(shape[0], -1, -1, -1), shape[1], shape[2:], generator)
    return fields.div_(variance.sqrt())


def one_over_f(slopes: Tensor, channels: int, space: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return noise float64 [N, channels, *space] whose amplitude falls as 1/f to the power of ``slopes`` [N, 1, ...].

    The variance is near 1 (``unit_fields``: exactly). Fields are periodic, and so may be rolled.
    """
    white = torch.randn((len(slopes), channels, *space), generator=generator, dtype=torch.float64)
    if not space:
        return white
    axes = tuple(range(2, 2 + len(space)))
    amplitude = _amplitude(slopes, space)
    power = amplitude.square().mean(axes, keepdim=True).sqrt()
    shaped: Tensor = torch.fft.irfftn(torch.fft.rfftn(white, dim=axes) * amplitude, s=tuple(space), dim=axes)
    return shaped.div_(power)


def _amplitude(slopes: Tensor, space: Sequence[int]) -> Tensor:
    """1/f to the power of ``slopes`` on the half spectrum of ``space``."""
    squares = torch.zeros((), dtype=torch.float64)
    for axis, size in enumerate(space):
        last = axis == len(space) - 1
        steps = torch.fft.rfftfreq(size) if last else torch.fft.fftfreq(size)
        squares = squares + steps.double().square().reshape([-1 if i == axis else 1 for i in range(len(space))])
    # The constant term gets the amplitude of the lowest frequency.
    return squares.sqrt().clamp_min(1 / max(space)).pow(-slopes)
