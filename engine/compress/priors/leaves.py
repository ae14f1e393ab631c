"""The prior ``leaves``: dead leaves, pictures of overlapping ellipses and boxes (Lee, Mumford, Huang, IJCV 41, 2001).

As training data without photographs: Baradad et al., Learning to See by Looking at Noise, arXiv 2106.05963.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .noise import blurred, noise_pixels, unit_fields

LAYERS = 12
PRESENCE = 0.8
"""How likely an image gets a leaf of a layer."""
ELLIPSES = 0.6
"""Share of ellipses; the others are boxes."""
RADII = (2.0, 20.0)
"""Of the first layer, in pixels of an image of 32 by 32; log-uniform."""
LAST_RADIUS = 0.4
"""What the radius has shrunk to by the last layer, so that large leaves do not hide everything below them."""
ASPECTS = (0.4, 1.6)
EDGES = (0.5, 1.0)
"""Width of a leaf's soft edge in pixels."""
GREYS = (-0.1, 1.04)
JITTER_SD = 0.1
"""How the channels of a leaf's colour differ from its grey."""
GRADIENT_SD = 0.25
"""Change of brightness from a leaf's centre to its rim."""
TEXTURES = (0.0, 0.08)
"""Standard deviation of a leaf's 1/f texture."""
FIELDS = 4
"""Texture fields an image; the layers share them, shifted."""


@dataclass(frozen=True)
class _Leaf:
    """One leaf an image: geometry and colour, each float64 [n, 1 or C, 1, 1]."""

    present: Tensor
    ellipse: Tensor
    y: Tensor
    x: Tensor
    cos: Tensor
    sin: Tensor
    radius: Tensor
    aspect: Tensor
    edge: Tensor
    colour: Tensor
    gradient: Tensor
    texture: Tensor


def leaves_pixels(count: int, shape: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Return dead leaves before 1/f noise, float64 [count, C, H, W], a little blurred, not clamped."""
    image = noise_pixels(count, shape, generator)
    fields = unit_fields(1, (count, FIELDS, *shape[1:]), generator)
    for layer in range(LAYERS):
        leaf = _draw(layer, count, shape, generator)
        image = _lay(image, leaf, _texture(fields, layer))
    return blurred(image, generator)


def _draw(layer: int, count: int, shape: tuple[int, int, int], generator: torch.Generator) -> _Leaf:
    channels, height, width = shape
    uniform = torch.rand((10, count, 1, 1, 1), generator=generator, dtype=torch.float64)
    jitter = torch.randn((count, channels, 1, 1), generator=generator, dtype=torch.float64)
    slope = torch.randn((count, 1, 1, 1), generator=generator, dtype=torch.float64)
    present, ellipse, y, x, angle, radius, aspect, edge, grey, texture = uniform
    angle = angle * (2 * torch.pi)
    scale = (height * width) ** 0.5 / 32 * LAST_RADIUS ** (layer / (LAYERS - 1))
    return _Leaf(
        present=(present < PRESENCE).double(),
        ellipse=ellipse < ELLIPSES,
        y=y * height,
        x=x * width,
        cos=angle.cos(),
        sin=angle.sin(),
        radius=scale * RADII[0] * (RADII[1] / RADII[0]) ** radius,
        aspect=_within(ASPECTS, aspect),
        edge=_within(EDGES, edge),
        colour=_within(GREYS, grey) + JITTER_SD * jitter,
        gradient=GRADIENT_SD * slope,
        texture=_within(TEXTURES, texture),
    )


def _within(bounds: tuple[float, float], uniform: Tensor) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * uniform


def _lay(image: Tensor, leaf: _Leaf, texture: Tensor) -> Tensor:
    """Put a leaf an image over what is there; the texture is [n, 1, H, W]."""
    height, width = image.shape[2:]
    y = torch.arange(height, dtype=torch.float64).reshape(1, 1, -1, 1) + 0.5 - leaf.y
    x = torch.arange(width, dtype=torch.float64).reshape(1, 1, 1, -1) + 0.5 - leaf.x
    along = (leaf.cos * x + leaf.sin * y) / leaf.radius
    across = (leaf.cos * y - leaf.sin * x) / (leaf.radius * leaf.aspect)
    round_ = (along.square() + across.square()).sqrt_()
    distance = torch.where(leaf.ellipse, round_, torch.maximum(along.abs(), across.abs()))
    inside = (1 - distance) * (leaf.radius * leaf.aspect.clamp(max=1)) / leaf.edge
    cover = inside.add_(0.5).clamp_(0, 1).mul_(leaf.present)
    shade = (along * leaf.gradient).addcmul_(texture, leaf.texture)
    return image.lerp_(leaf.colour + shade, cover)


def _texture(fields: Tensor, layer: int) -> Tensor:
    """One of the shared fields, shifted by thirds of its side: [n, 1, H, W]."""
    field, turn = layer % FIELDS, layer // FIELDS
    turns = LAYERS // FIELDS
    shift = (turn * fields.shape[2] // turns, turn * fields.shape[3] // turns)
    return fields[:, field : field + 1].roll(shift, (2, 3))
