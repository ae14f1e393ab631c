"""The prior ``fractal``: attractors of random iterated function systems, coloured, before 1/f noise.

After FractalDB (Kataoka et al., Pre-training without Natural Images, arXiv 2101.08515); systems are drawn by their
singular values as in Anderson and Farrell, Improving Fractal Pre-training, arXiv 2110.03091, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .noise import PIXEL_MEAN, blurred, noise_pixels

FRACTALS = 2
"""Attractors an image, the later over the earlier."""
MAPS = (2, 5)
"""Least and most affine maps of a system."""
CONTRACTION = 0.95
"""The largest singular value of a map: every system has an attractor."""
EXTENTS = (0.15, 0.4)
"""Standard deviation of an attractor's longer axis in sides of the image."""
CANVAS = 96
"""Attractors are drawn on a canvas of about this side at most and enlarged: finer ones would fall to dust."""
POINTS = 4.0
"""Points drawn a pixel of the canvas and an attractor."""
SEEDS = 16
"""Points of the attractor that are carried to all its copies."""
SEED_DEPTH, DEPTH = 16, 6
"""Maps composed to reach the attractor's points, and its smaller copies of itself."""
OPACITY = 1.0
"""A pixel hit n times covers what is below it by 1 - exp(-OPACITY n)."""
GREYS = (0.0, 0.94)
JITTER_SD = 0.08


@dataclass(frozen=True)
class _Maps:
    """Affine maps y, x -> matrix (y, x) + offset of every image, each with a colour."""

    matrices: Tensor
    """[n, maps, 2, 2]"""
    offsets: Tensor
    """[n, maps, 2]"""
    colours: Tensor
    """[n, maps, C]"""


@dataclass(frozen=True)
class _Systems:
    """One system an image: its maps, and how often each is drawn."""

    maps: _Maps
    thresholds: Tensor
    """Cumulative probabilities of the maps but the last, [n, maps - 1]."""


def fractal_pixels(count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Return coloured attractors before 1/f noise, float64 [count, C, H, W], a little blurred, not clamped."""
    image = noise_pixels(count, shape, generator)
    coarser = max(1, round((shape[1] * shape[2]) ** 0.5 / CANVAS))
    canvas = (-(-shape[1] // coarser), -(-shape[2] // coarser))
    for _ in range(FRACTALS):
        systems = _draw(count, shape[0], generator)
        points, colours = _attractor(systems, canvas[0] * canvas[1], generator)
        image = _over(image, _render(points, colours, canvas, generator))
    return blurred(image, generator)


def _over(image: Tensor, drawn: Tensor) -> Tensor:
    """Lay colours times cover, and the cover behind them, [n, C + 1, h, w], enlarged over the image."""
    size = image.shape[2:]
    if drawn.shape[2:] != size:
        drawn = torch.nn.functional.interpolate(drawn, size, mode="bilinear", align_corners=False)
    return image.mul_(1 - drawn[:, -1:]).add_(drawn[:, :-1])


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float64).mul_(high - low).add_(low)


def _draw(count: int, channels: int, generator: torch.Generator) -> _Systems:
    """Draw systems with sum(s1 + 2 s2) between (5 + maps) / 2 and (6 + maps) / 2 for the singular values s1 >= s2."""
    most = MAPS[1]
    number = torch.randint(MAPS[0], most + 1, (count, 1), generator=generator)
    active = (torch.arange(most) < number).double()
    large = _uniform(0.3, 1, (count, most), generator)
    small = large * _uniform(0.1, 1, (count, most), generator)
    wanted = (number + _uniform(5, 6, (count, 1), generator)) / 2
    factor = wanted / ((large + 2 * small) * active).sum(1, keepdim=True)
    singular = torch.stack([large * factor, small * factor], -1).clamp_(max=CONTRACTION)
    matrices = _turn(count, generator) * singular.unsqueeze(-2) @ _turn(count, generator)
    offsets = _uniform(-1, 1, (count, most, 2), generator)
    grey = _uniform(*GREYS, (count, most, 1), generator)
    jitter = torch.randn((count, most, channels), generator=generator, dtype=torch.float64)
    # Areas decide how often a map is drawn, so that points lie evenly; a map of no area still gets some.
    often = singular.prod(-1).clamp_min(0.02) * active
    thresholds = often.cumsum(1)[:, :-1] / often.sum(1, keepdim=True)
    return _Systems(_Maps(matrices, offsets, grey + JITTER_SD * jitter), thresholds)


def _turn(count: int, generator: torch.Generator) -> Tensor:
    """Random rotations, half of them with a reflection: [count, maps, 2, 2]."""
    angle = _uniform(0, 2 * torch.pi, (count, MAPS[1]), generator)
    flip = torch.randint(0, 2, (count, MAPS[1]), generator=generator).double().mul_(2).sub_(1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos, -sin * flip, sin, cos * flip], -1).reshape(count, MAPS[1], 2, 2)


def _attractor(systems: _Systems, pixels: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points on the attractors [n, copies, SEEDS, 2] and a colour a copy [n, copies, C].

    An attractor is the union of its images under all compositions of DEPTH maps: the same few points on it, carried
    through many random compositions, are as many points as a long chaos game gives, without its steps.
    """
    copies = max(8, round(POINTS * pixels / SEEDS))
    seeds = _compose(systems, SEEDS, SEED_DEPTH, generator).offsets
    small = _compose(systems, copies, DEPTH, generator)
    placed = seeds.unsqueeze(1) @ small.matrices.transpose(2, 3) + small.offsets.unsqueeze(2)
    return placed, small.colours


def _compose(systems: _Systems, number: int, depth: int, generator: torch.Generator) -> _Maps:
    """Compose ``depth`` maps, each drawn as the system says, to ``number`` new ones an image.

    A colour moves half way to that of each map it goes through (Draves, The Fractal Flame Algorithm).
    """
    maps = systems.maps
    count = len(maps.matrices)
    image = torch.arange(count).unsqueeze(1)
    matrix = torch.eye(2, dtype=torch.float64).expand(count, number, 2, 2)
    offset = torch.zeros((count, number, 2, 1), dtype=torch.float64)
    colour = torch.full((count, number, maps.colours.shape[2]), PIXEL_MEAN, dtype=torch.float64)
    for _ in range(depth):
        dice = torch.rand((count, number), generator=generator, dtype=torch.float64)
        chosen = torch.searchsorted(systems.thresholds, dice, right=True)
        taken = maps.matrices[image, chosen]
        matrix, offset = taken @ matrix, taken @ offset + maps.offsets[image, chosen].unsqueeze(-1)
        colour = (colour + maps.colours[image, chosen]) / 2
    return _Maps(matrix, offset.squeeze(-1), colour)


def _render(points: Tensor, colours: Tensor, canvas: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw each image's points on a canvas: colours times cover, and the cover, [n, C + 1, *canvas]."""
    (height, width), count = canvas, len(points)
    places = points.flatten(1, 2)
    centred = places - places.mean(1, keepdim=True)
    spread = centred.square().mean(1, keepdim=True).amax(-1, keepdim=True).sqrt_().clamp_min_(1e-9)
    sides = torch.tensor(canvas, dtype=torch.float64)
    size = _uniform(*EXTENTS, (count, 1, 1), generator) / spread * sides
    centre = _uniform(0.3, 0.7, (count, 1, 2), generator) * sides
    y, x = torch.addcmul(centre, centred, size).floor_().long().unbind(-1)
    inside = (y >= 0).logical_and_(y < height).logical_and_(x >= 0).logical_and_(x < width)
    # What lies outside is counted in one pixel more, and dropped.
    pixel = torch.where(inside, y * width + x, height * width)
    pixel = (pixel + torch.arange(count).unsqueeze(1) * (height * width + 1)).flatten()
    cells = (count, 1, height * width + 1)
    hits = torch.bincount(pixel, minlength=prod(cells)).reshape(cells)
    weights = (colour.unsqueeze(-1).expand(points.shape[:3]).flatten() for colour in colours.unbind(-1))
    sums = torch.cat([torch.bincount(pixel, weight, prod(cells)).reshape(cells) for weight in weights], 1)
    cover = 1 - (-OPACITY * hits.double()).exp_()
    drawn = torch.cat([sums / hits.clamp_min(1) * cover, cover], 1)
    return drawn[..., :-1].reshape(count, -1, height, width)
