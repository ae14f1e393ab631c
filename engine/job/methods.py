"""The options of every method: what a bit-plan may say. The mathematics is in compress/, so this needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .budget import SizedPlan
from .calibrators import NAME_OR_MAPPING, AnalyticCalibrator, Calibrator
from .fields import Bits, Granularity, Plan, RoleGranularity


class DfmpcPlan(SizedPlan):
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
    calibrator: Annotated[Calibrator, NAME_OR_MAPPING] = Field(
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
