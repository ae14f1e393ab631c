"""Images made from nothing, to compare networks on where there are no labels: dead leaves, each in light of its own.

Chosen among their kind by scripts/calibrate_fidelity.py (docs/fidelity.md). When their bytes change, so must
SYNTHETIC_VERSION of settings.py, which enters the keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import ceil

import torch
from torch import Tensor

from ..compress.priors import normalise, synthetic_images
from ..compress.priors.inputs import MOST_CHANNELS
from .noise import BRIGHTNESS_SD, CAST_SD, CONTRASTS, PIXEL_MEAN, noise_images

PRIOR = "leaves"
CANVAS = 256
"""Larger images than of this side are drawn smaller and enlarged: drawing would take longer than forwarding them."""
_DEPTH = 255


def fidelity_images(
    count: int,
    shape: Sequence[int],
    seed: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    prior: str = PRIOR,
) -> Tensor:
    """Return ``count`` images of a prior of compress/priors, float32 [count, *shape], normalised.

    ``shape`` is (C, H, W); an input that is no image, or has more channels than images have, gets ``noise_images``.
    Their random numbers are another stream than those of the synthetic calibrator, whatever its seed: no network is
    judged on what it was calibrated on. The same seed gives the same bytes. Without ``mean`` and ``std`` each channel
    gets mean 0 and standard deviation 1.

    Raises DataError where ``mean`` or ``std`` has not one entry a channel.
    """
    if len(shape) != 3 or shape[0] > MOST_CHANNELS:
        return noise_images(count, shape, _stream("noise", seed), mean, std)
    drawn = _drawn(count, shape, _stream(prior, seed), prior)
    pixels = lit(drawn, (shape[1], shape[2]), _stream(f"light on {prior}", seed))
    return normalise(pixels, mean, std)


def _drawn(count: int, shape: Sequence[int], seed: int, prior: str) -> Tensor:
    channels, height, width = shape
    coarser = max(1, ceil((height * width) ** 0.5 / CANVAS))
    return synthetic_images(prior, count, (channels, ceil(height / coarser), ceil(width / coarser)), seed)


def lit(drawn: Tensor, size: tuple[int, int], seed: int) -> Tensor:
    """Return images [N, C, h, w] enlarged to ``size``, each with a contrast, a brightness and a colour cast of its own.

    These are drawn as those of the noise: images that differ in their drawing only land in few classes of a trained
    network, and agreement on them says little. Pixels are multiples of 1/255 in 0-1.
    """
    generator = torch.Generator().manual_seed(seed)
    count, channels = drawn.shape[:2]
    low, high = CONTRASTS
    contrast = low + (high - low) * torch.rand((count, 1, 1, 1), generator=generator, dtype=torch.float64)
    level = BRIGHTNESS_SD * torch.randn((count, 1, 1, 1), generator=generator, dtype=torch.float64)
    cast = CAST_SD * torch.randn((count, channels, 1, 1), generator=generator, dtype=torch.float64)
    images = torch.empty((count, channels, *size), dtype=torch.float32)
    for at in range(count):  # one at a time: the steps in between need no memory to speak of
        exact = _enlarged(drawn[at : at + 1].double(), size)
        exact = exact.sub_(exact.mean())
        exact = exact.mul_(contrast[at] / exact.square().mean().sqrt().clamp_min(1e-3))
        exact = exact.add_(PIXEL_MEAN + level[at] + cast[at]).clamp_(0, 1)
        images[at] = exact.mul_(_DEPTH).round_().div_(_DEPTH)[0]
    return images


def _enlarged(image: Tensor, size: tuple[int, int]) -> Tensor:
    if image.shape[2:] == size:
        return image
    return torch.nn.functional.interpolate(image, size, mode="bilinear", align_corners=False)


def _stream(what: str, seed: int) -> int:
    """Return a seed of 63 bits that no small number is."""
    return int.from_bytes(hashlib.sha256(f"fidelity: {what}, {seed}".encode()).digest()[:8], "big") >> 1
