"""Sets of images made from no data: seeded pixels, and the normalisation that a network expects.

When their bytes change, so must PRIORS_VERSION of job/calibrators.py, which enters the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ...errors import DataError, UsageError
from .fractal import fractal_pixels
from .leaves import leaves_pixels
from .noise import noise_pixels

PIXEL_PRIORS: dict[str, Callable[[int, tuple[int, int, int], torch.Generator], Tensor]] = {
    "noise": noise_pixels,
    "leaves": leaves_pixels,
    "fractal": fractal_pixels,
}
"""What makes [n, C, H, W] float64 pixels, by the prior's name."""
_PORTION = 2**18
"""Values that are made at a time: they fit a core's cache, and memory does not grow with the set."""
_DEPTH = 255


def synthetic_images(prior: str, count: int, shape: Sequence[int], seed: int) -> Tensor:
    """Return ``count`` images of a prior, float32 [count, C, H, W] with pixels in 0-1; ``shape`` is (C, H, W).

    Pixels are multiples of 1/255, as those of a photograph. They are computed in float64 on the CPU, so that rounding
    hides what FFTs and logarithms of different machines differ by: the same seed gives the same bytes. torch's global
    generator is not touched.

    Raises UsageError for another prior than ``PIXEL_PRIORS`` names, or a shape that is none.
    """
    make = PIXEL_PRIORS.get(prior)
    if make is None:
        raise UsageError(f"prior {prior!r}: expected one of {', '.join(PIXEL_PRIORS)}")
    if len(shape) != 3 or min(shape) < 1 or count < 0:
        raise UsageError(f"{count} images of shape {list(shape)}: expected [channels, height, width], all positive")
    channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    images = torch.empty((count, channels, height, width), dtype=torch.float32)
    for part in _portions(images):
        pixels = make(len(part), (channels, height, width), generator)
        part.copy_(pixels.clamp_(0, 1).mul_(_DEPTH).round_().div_(_DEPTH))
    return images


def _portions(images: Tensor) -> Iterator[Tensor]:
    size = max(1, _PORTION // max(1, images[:1].numel()))
    return (images[start : start + size] for start in range(0, len(images), size))


def normalise(pixels: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Tensor:
    """Return (pixels - mean) / std a channel, float32 [N, C, H, W].

    Without ``mean`` and ``std`` each channel gets mean 0 and standard deviation 1 over the set (a channel of one value
    becomes 0). Raises DataError where they have not one entry a channel.
    """
    exact = pixels.double()
    if mean is None or std is None:
        axes = (0, 2, 3)
        centred = exact - exact.mean(axes, keepdim=True)
        return (centred / centred.square().mean(axes, keepdim=True).sqrt().clamp_min(1e-6)).float()
    if len(mean) != pixels.shape[1] or len(std) != pixels.shape[1]:
        raise DataError(
            f"mean has {len(mean)} entries, std {len(std)}, the network's input {pixels.shape[1]} channels: "
            "give one each, or drop both"
        )
    centre, spread = (torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1) for values in (mean, std))
    return ((exact - centre) / spread).float()
