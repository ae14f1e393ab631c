"""What the spectral model of a network assumes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SpectralOptions:
    """Prior of the input and fineness of the model; the defaults are the recipe's."""

    side: int = 32
    """Largest side of the torus at the input; wide networks get a smaller one (``network.affordable_side``)."""
    exponent: float = 3.0
    """Fall of the input's power with frequency."""
    colour_correlation: float = 0.93
    """Correlation between the image's colours."""
    order: int = 4
    """Terms of the Hermite series of an activation."""
    reach: int = 2
    """Lags along each axis up to which its terms beyond the first are kept."""
    tau: float | None = 1.0
    """How far a layer's input means are believed against its running mean; None keeps them."""
    contrast: float = 0.1
    """Variance of a factor that all values of an image share: v m mᵀ on top of the second moments of patches."""
    independence: float = 0.2
    """By how much covariances between channels are shrunk in the second moments of patches, 0–1."""
