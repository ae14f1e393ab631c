"""The options of every method: what a bit-plan may say. The mathematics is in compress/, so this needs no torch."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

Bits = Annotated[int, Field(ge=2, le=8)]


class Strict(BaseModel):
    """Base of every part of a job file: unknown fields are errors, instances are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _check_name(value: str) -> str:
    if len(value) > 128 or ".." in value or not re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]*", value):
        raise ValueError("expected 1 to 128 letters, digits, '.', '_', '-' or '+', no '..' and no '.' in front")
    return value


Name = Annotated[str, AfterValidator(_check_name)]
"""A name that becomes a folder."""


def _check_granularity(value: str) -> str:
    if value in ("tensor", "channel"):
        return value
    match = re.fullmatch(r"group:(\d+)", value)
    if not match or int(match.group(1)) < 8 or int(match.group(1)) % 8:
        raise ValueError("expected 'tensor', 'channel' or 'group:N' with N a multiple of 8")
    return value


Granularity = Annotated[str, AfterValidator(_check_granularity)]


class RoleGranularity(Strict):
    """A granularity for each role."""

    low: Granularity = Field("channel", description="Of the LOW layers.")
    high: Granularity = Field("channel", description="Of the HIGH and unpaired layers.")


class NoCalibrator(Strict):
    """BatchNorm statistics stay as they are."""

    name: Literal["none"] = Field("none", description="Which calibrator.")


class NormCalibrator(Strict):
    """Statistics scale with the ratio of the quantized to the original row norm (docs/methods.md, "Calibrators")."""

    name: Literal["norm"] = Field("norm", description="Which calibrator.")


class AnalyticCalibrator(Strict):
    """Closed-form moments propagated through the graph; no images (docs/methods.md, "Calibrators")."""

    name: Literal["analytic"] = Field("analytic", description="Which calibrator.")
    rho: float = Field(0.5, ge=0, le=1, description="Assumed correlation between the taps of one input channel.")
    tau: float | None = Field(
        1.0, gt=0, description="Noise of the identity that refines the input means; null leaves them unrefined."
    )


Calibrator = Annotated[NoCalibrator | NormCalibrator | AnalyticCalibrator, Field(discriminator="name")]


def _calibrator_from_name(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


_NAME_OR_MAPPING = BeforeValidator(
    _calibrator_from_name, json_schema_input_type=Calibrator | Literal["none", "norm", "analytic"]
)


class Plan(Strict):
    """What every bit-plan has."""

    name: Name = Field(description="Name of the plan; becomes a folder, so letters, digits, '.', '_', '-' and '+'.")


class DfmpcPlan(Plan):
    """DF-MPC (arXiv 2307.00498): LOW layers get few bits, per-channel coefficients let the HIGH layers repair them."""

    method: Literal["dfmpc"] = Field(description="Which method.")
    low: Bits = Field(2, description="Bits of the LOW layers; 2 is ternary.")
    high: Bits = Field(6, description="Bits of the HIGH layers and of every layer in no pair.")
    granularity: Granularity | RoleGranularity = Field(
        "channel", description="One scale a tensor, a channel or a group:N, for all layers or by role {low, high}."
    )
    recipe: Literal["auto", "published"] = Field(
        "auto", description="published: the paper's steps with the named calibrator; auto: the best one known."
    )
    calibrator: Annotated[Calibrator, _NAME_OR_MAPPING] = Field(
        default=AnalyticCalibrator(),
        description="How BatchNorm statistics are re-estimated without data: none, norm, analytic, or a mapping.",
    )
    compensate: bool = Field(True, description="Solve for the coefficients c; false leaves c = 1.")
    lambda1: float = Field(0.5, ge=0, description="Weight of the bias term of the objective.")
    lambda2: float = Field(0.0, ge=0, description="Weight of the penalty on c squared.")


class RtnPlan(Plan):
    """Round to nearest with absmax (or min-max) scales; the baseline."""

    method: Literal["rtn"] = Field(description="Which method.")
    bits: Bits = Field(description="Bits of every layer.")
    granularity: Granularity = Field("channel", description="One scale a tensor, a channel or a group:N.")
    symmetric: bool = Field(True, description="false: min-max grid with a float zero point.")


BitPlan = Annotated[DfmpcPlan | RtnPlan, Field(discriminator="method")]


def role_granularity(plan: DfmpcPlan | RtnPlan, role: Literal["low", "high"]) -> str:
    """Return the granularity that ``plan`` gives to layers of ``role``."""
    if isinstance(plan.granularity, RoleGranularity):
        return plan.granularity.low if role == "low" else plan.granularity.high
    return plan.granularity
