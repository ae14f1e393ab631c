"""What the spectral model of a network assumes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SpectralOptions:
    """Prior of the input and fineness of the model; the defaults are the recipe's."""

    side: int = 32
    """Largest side of the torus at the input."""
    exponent: float = 3.0
    """Fall of the input's power with frequency."""
    colour_correlation: float = 0.93
    """Correlation between the image's colours."""
    order: int = 4
    """Terms of the Hermite series of an activation."""
    tau: float | None = 1.0
    """How far a layer's input means are believed against its running mean; None keeps them."""
