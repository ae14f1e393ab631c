"""The options of every calibrator: how norm statistics of a quantized network are re-estimated without data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from .fields import Strict

PRIORS_VERSION = 1
"""Bumped by hand when the bytes of the images of compress/priors change; part of the key of all computed from them."""


class NoCalibrator(Strict):
    """BatchNorm statistics stay as they are."""

    name: Literal["none"] = Field("none", description="Which calibrator.")


class NormCalibrator(Strict):
    """Statistics scale with the ratio of the quantized to the original row norm (docs/methods.md, "Calibrators")."""

    name: Literal["norm"] = Field("norm", description="Which calibrator.")


class AnalyticCalibrator(Strict):
    """Closed-form moments propagated through the graph; no images (docs/methods.md, "Calibrators")."""

    name: Literal["analytic"] = Field("analytic", description="Which calibrator.")
    rho: float = Field(0.5, ge=0, le=1, description="Channel moments: correlation between the taps of one channel.")
    tau: float | None = Field(
        1.0, gt=0, description="Channel moments: noise of the identity that refines input means; null leaves them."
    )
    moments: Literal["channel", "spectral"] | None = Field(
        None,
        description="What is propagated: a mean and variance a channel, or mean maps and cross-spectra, which rounding "
        "with error feedback needs; default: the recipe's.",
    )


class SyntheticCalibrator(Strict):
    """Forward passes over images made from no data (docs/methods.md, "Calibrators"); a tier of its own."""

    name: Literal["synthetic"] = Field("synthetic", description="Which calibrator.")
    prior: Literal["noise", "leaves", "fractal", "distilled"] = Field(
        "leaves", description="How the images are made: 1/f noise, dead leaves, fractals, or from the BatchNorms."
    )
    images: int | None = Field(
        None, ge=8, le=4096, description="How many; default: by the sizes of input and widest map."
    )
    seed: int = Field(0, ge=0, description="Seed of the images and of the positions that are sampled.")


Calibrator = Annotated[
    NoCalibrator | NormCalibrator | AnalyticCalibrator | SyntheticCalibrator, Field(discriminator="name")
]


def _calibrator_from_name(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


NAME_OR_MAPPING = BeforeValidator(
    _calibrator_from_name, json_schema_input_type=Calibrator | Literal["none", "norm", "analytic", "synthetic"]
)
