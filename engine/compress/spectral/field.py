"""What is known of one tensor in one network: a mean map and the spectrum of what varies around it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .torus import Torus, real, rescaled


@dataclass(frozen=True)
class Field:
    """A random map x[C, height, width]: a mean and, around it, a stationary field on a torus (a window of lags)."""

    mean: Tensor
    """Mean map, float32 [C, height, width] of the true size."""
    spectrum: Tensor
    """Cross-spectral density S, float32 [2, P, C, C]: real and imaginary parts at the kept frequencies of ``torus``."""
    torus: Torus
    lower: float | None = None
    """Least value the tensor can take (0 behind a ReLU)."""
    upper: float | None = None

    @property
    def channels(self) -> int:
        """Channels C."""
        return self.mean.shape[0]

    @cached_property
    def variance(self) -> Tensor:
        """Variance around the mean map, the diagonal of R(0), float32 [C]."""
        diagonal = self.spectrum[0].diagonal(dim1=1, dim2=2)
        return (self.torus.pairs.float() @ diagonal / self.torus.size).clamp_min(0)

    @cached_property
    def channel_mean(self) -> Tensor:
        """Mean over positions, float32 [C]."""
        return self.mean.flatten(1).mean(1)

    @cached_property
    def total_variance(self) -> Tensor:
        """Variance over positions and draws, as a norm counts it: R(0) and the spread of the mean map, float32 [C]."""
        return self.variance + self.mean.flatten(1).var(1, correction=0)

    def shifted(self, change: Tensor) -> Field:
        """Move the mean of every channel by ``change`` ([C]), within the range of the values."""
        mean = self.mean + change.float().view(-1, 1, 1)
        return replace(self, mean=mean.clamp(self.lower, self.upper) if self._bounded else mean)

    def scaled(self, gain: Tensor) -> Field:
        """Multiply channel c, mean and all, by ``gain[c]`` ([C])."""
        gain = gain.float()
        return Field(self.mean * gain.view(-1, 1, 1), rescaled(self.spectrum, gain), self.torus)

    @property
    def _bounded(self) -> bool:
        return self.lower is not None or self.upper is not None


def white(channels: int, size: tuple[int, int], grid: Torus, variance: float = 1.0) -> Field:
    """Return independent values of mean 0: what is assumed where nothing is known."""
    spectrum = real(variance * torch.eye(channels)).unsqueeze(1).expand(-1, len(grid.points), -1, -1)
    return Field(torch.zeros(channels, *size), spectrum, grid)


def image(channels: int, size: tuple[int, int], grid: Torus, exponent: float, colour_correlation: float) -> Field:
    """Return the prior of a normalised image: mean 0, variance 1, S ∝ |f|^-exponent, channels correlated alike.

    ``exponent`` is of the power, so 3 stands for amplitudes of 1/f^1.5. The constant term has the power of the lowest
    frequency.
    """
    turns = grid.points.double() / torch.tensor([grid.height, grid.width])
    radius = torch.minimum(turns, 1 - turns).square().sum(1).sqrt()
    power = radius.clamp_min(1 / max(grid.height, grid.width)) ** -exponent
    power = power * grid.size / (power * grid.pairs).sum()
    colours = torch.full((channels, channels), colour_correlation).fill_diagonal_(1.0)
    spectrum = power.float().view(-1, 1, 1) * colours
    return Field(torch.zeros(channels, *size), real(spectrum), grid)


def full_size(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return height and width of a node's output: [N, C], [N, C, W] and [N, C, H, W] have 1 × 1, 1 × W and H × W."""
    space = shape[2:4] if len(shape) == 4 else (1, shape[2]) if len(shape) == 3 else (1, 1)
    return (space[0], space[1])


def alive(variance: Tensor) -> Tensor:
    """Return which channels vary at all, bool [C]: products of the others would be denormal numbers, which are slow."""
    return variance > 1e-12 * variance.max()
