"""Second moments of stationary real fields on a torus: covariance functions, spectra, and the way between them.

A field x[C, ny, nx] has R(τ) = E[x(p + τ) x(p)ᵀ] and S(f) = Σ_τ R(τ) exp(-i f τ). R(-τ) = R(τ)ᵀ and S(-f) = conj S(f),
so one of each pair ±τ and ±f is kept. Tori here are small, so the transform is a matrix product over a leading axis. A
spectrum is float32 [2, P, ...], its real and its imaginary parts, each of them contiguous; tables are made once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

SMALLEST = 4
"""Strides do not make a side smaller than this: the taps of a 3 × 3 kernel would meet around the torus."""
TABLES = 32
"""Tables of each kind that are kept: of the largest torus one takes 2 MiB."""


@dataclass(frozen=True)
class Waves:
    """The real and the odd part of a transform between lags and frequencies."""

    cosine: Tensor
    sine: Tensor


@dataclass(frozen=True)
class Torus:
    """A grid of ``height`` × ``width`` positions that wraps around."""

    height: int
    width: int

    @cached_property
    def points(self) -> Tensor:
        """One of each pair ±(y, x), int64 [P, 2], the origin first: the lags and the frequencies that are kept."""
        kept = [
            (y, x)
            for y in range(self.height)
            for x in range(self.width)
            if (y, x) <= (-y % self.height, -x % self.width)
        ]
        return torch.tensor(kept)

    @cached_property
    def pairs(self) -> Tensor:
        """How many points of the torus each kept one stands for (1 or 2), float64 [P]."""
        mirrored = torch.stack([-self.points[:, 0] % self.height, -self.points[:, 1] % self.width], 1)
        return 2.0 - (mirrored == self.points).all(1).double()

    @cached_property
    def size(self) -> int:
        """Positions."""
        return self.height * self.width

    def waves(self, offsets: Tensor) -> Waves:
        """Cosine and sine of 2π f · offset at every kept f, float64 [P, N], for ``offsets``, int64 [N, 2]."""
        turns = self.points.double() / torch.tensor([self.height, self.width])
        angles = 2 * math.pi * (turns @ offsets.double().T)
        # What is left of a zero in floating point would give denormal products, which are slow.
        cosine, sine = (torch.where(wave.abs() < 1e-12, 0.0, wave) for wave in (angles.cos(), angles.sin()))
        return Waves(cosine, sine)

    @lru_cache(maxsize=TABLES)  # noqa: B019  # a torus is one of a few and lives as long
    def near(self, reach: int) -> Tensor:
        """Return the kept lags of at most ``reach`` along each axis, signed, int64 [L, 2], the origin first."""
        lags = self.signed(self.points)
        return lags[(lags.abs() <= reach).all(1)]

    def signed(self, lags: Tensor) -> Tensor:
        """Return the lags of least size that are the same on the torus."""
        size = torch.tensor([self.height, self.width])
        return torch.where(lags > size // 2, lags - size, lags)

    def to_covariance(self, lags: Tensor) -> Waves:
        """R(τ) = cosine · Re S - sine · Im S at ``lags`` (int64 [L, 2]): float32 [L, P] each."""
        return _to_covariance(self, _Points(lags))

    def to_spectrum(self, lags: Tensor) -> Waves:
        """S = cosine · (R(τ) + R(-τ)) + i sine · (R(-τ) - R(τ)), one of each ±τ in ``lags``: float32 [P, L] each."""
        return _to_spectrum(self, _Points(lags))

    def covariance(self, spectrum: Tensor, lags: Tensor | None = None) -> Tensor:
        """R at ``lags`` (int64 [L, 2], default the kept ones), float32 [L, A, B], of S, float32 [2, P, A, B]."""
        waves = self.to_covariance(self.points if lags is None else lags)
        real, imaginary = (part.flatten(1) for part in spectrum)
        found = torch.addmm(waves.cosine @ real, waves.sine, imaginary, alpha=-1)
        return found.view(-1, *spectrum.shape[2:])

    def spectrum(self, covariance: Tensor, mirrored: Tensor) -> Tensor:
        """S, float32 [2, P, A, B], of R at the kept lags and ``mirrored``, R at their negatives, float32 [P, A, B]."""
        waves = self.to_spectrum(self.points)
        even, odd = (covariance + mirrored).flatten(1), (mirrored - covariance).flatten(1)
        return torch.stack((waves.cosine @ even, waves.sine @ odd)).view(2, *covariance.shape)

    def decimated(self, spectrum: Tensor, strides: tuple[int, int]) -> tuple[Torus, Tensor]:
        """Return torus and spectrum of every ``strides``-th position: the covariance function at every such lag.

        The torus becomes smaller by the strides, but not below SMALLEST (where it was not). Where it would, or where a
        stride does not divide its side, lags that do not fit both tori are 0, and the others fall towards them as
        Bartlett's triangle: a function that breaks off would have a spectrum that no field has (one below 0), and
        error feedback would find it.
        """
        small, folds = _folds(self, strides)
        return small, torch.bmm(folds, spectrum.flatten(2)).view(2, -1, *spectrum.shape[2:])


class _Points:
    """Offsets that a table is made for, int64 [N, 2]; equal where their values are."""

    def __init__(self, values: Tensor) -> None:
        self.values, self.key = values, values.numpy().tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Points) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


@lru_cache(maxsize=TABLES)
def _to_covariance(grid: Torus, lags: _Points) -> Waves:
    waves = grid.waves(lags.values)
    cosine, sine = ((wave.T * grid.pairs / grid.size).float() for wave in (waves.cosine, waves.sine))
    return Waves(cosine, sine)


@lru_cache(maxsize=TABLES)
def _to_spectrum(grid: Torus, lags: _Points) -> Waves:
    waves = grid.waves(lags.values)
    alone = ((2 * lags.values) % torch.tensor([grid.height, grid.width]) == 0).all(1)
    cosine, sine = ((wave * torch.where(alone, 0.5, 1.0)).float() for wave in (waves.cosine, waves.sine))
    return Waves(cosine, sine)


@lru_cache(maxsize=TABLES)
def _folds(grid: Torus, strides: tuple[int, int]) -> tuple[Torus, Tensor]:
    """Return the decimated torus and what makes its spectrum of this one's, float32 [2, P of it, P].

    It is the way to the covariance function and back: even lags need the real part alone, odd ones the imaginary.
    """
    sides = [
        min(side, max(side // stride, SMALLEST))
        for side, stride in zip((grid.height, grid.width), strides, strict=True)
    ]
    small = torus(sides[0], sides[1])
    kept, step = small.signed(small.points), torch.tensor(strides)
    large, new = torch.tensor([grid.height, grid.width]), torch.tensor(sides)
    reach = torch.minimum(large // step, new // 2).clamp_min(1)
    taper = torch.where(new * step == large, 1.0, 1 - kept.abs() / reach).clamp_min(0).prod(1)
    there, back = grid.to_covariance(kept * step), small.to_spectrum(small.points)
    pairs = ((back.cosine, there.cosine), (back.sine, there.sine))
    return small, torch.stack([(2 * ((after.double() * taper) @ before.double())).float() for after, before in pairs])


def adjoint(spectrum: Tensor) -> Tensor:
    """Return Sᴴ, float32 [2, P, B, A], of S."""
    return torch.stack((spectrum[0].mT, spectrum[1].mT.neg()))


def add_adjoint(spectrum: Tensor, other: Tensor) -> None:
    """Add the adjoint of ``other``, [2, P, A, A], to a spectrum in place."""
    spectrum[0].add_(other[0].mT)
    spectrum[1].sub_(other[1].mT)


def real(values: Tensor) -> Tensor:
    """Return a spectrum without imaginary part, float32 [2, P, ...] of [P, ...]."""
    return torch.stack((values, torch.zeros_like(values)))


def rescaled(spectrum: Tensor, gain: Tensor) -> Tensor:
    """Multiply rows and columns of [2, P, C, C] by ``gain``, float32 [C]."""
    return spectrum * (gain.unsqueeze(1) * gain)


@lru_cache(maxsize=64)
def torus(height: int, width: int) -> Torus:
    """Return the torus of this size; its tables are computed once."""
    return Torus(height, width)
