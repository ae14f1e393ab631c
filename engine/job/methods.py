"""The options of every method: what a bit-plan may say. The mathematics is in compress/, so this needs no torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from .budget import SizedPlan
from .calibrators import NAME_OR_MAPPING, Calibrator
from .fields import Bits, Granularity, Plan, RoleGranularity
from .neighbours import Neighbour, NeighbourPlan


def _step_of(value: object) -> object:
    return {True: "c", False: "none"}.get(value, value) if isinstance(value, bool) else value


_YES_OR_NO = BeforeValidator(_step_of, json_schema_input_type=Literal["none", "c", "least-squares"] | bool)


def _levels(fields: dict[str, Any]) -> Literal[3, 4]:
    """Four levels take the bytes of three; they lose less where their scale is clipped for least error."""
    clipped = fields.get("clip") == "mse" or (fields.get("clip") is None and fields.get("recipe") == "auto")
    asked = fields.get("ternary") is not None
    return 4 if fields.get("budget") is not None and clipped and not asked else 3


def _folds(fields: dict[str, Any]) -> bool:
    return fields.get("budget") is not None and fields.get("recipe") == "auto"


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
    calibrator: Annotated[Calibrator, NAME_OR_MAPPING] | None = Field(
        None,
        description="How norm statistics are re-estimated without data: none, norm, analytic, synthetic, or a mapping; "
        "default: the recipe's.",
    )
    ternary: Literal["twn", "exact"] | None = Field(
        None, description="Ternary levels: TWN's 0.7 rule or the least-squares optimum; default: the recipe's."
    )
    clip: Literal["absmax", "mse"] | None = Field(
        None,
        description="Scales of other grids: the largest weight, or clipped for least error; default: the recipe's.",
    )
    low_levels: Literal[3, 4] = Field(
        default_factory=_levels,
        description="Levels of a 2-bit LOW layer: 3 is ternary; 4 uses every code of the two bits (DoReFa), in the "
        "same bytes. Default: 3, but 4 with a budget, unless `ternary` is given or scales are not clipped.",
    )
    fold_scales: bool = Field(
        default_factory=_folds,
        description="Let the BatchNorm behind a layer hold its channels' scales, so that the layer stores one: the "
        "same network in fewer bytes. Default: true with a budget and `recipe: auto`, else false.",
    )
    rounding: Literal["nearest", "feedback"] | None = Field(
        None, description="To nearest, or with error feedback over the layer's input moments; default: the recipe's."
    )
    compensate: Annotated[Literal["none", "c", "least-squares"], _YES_OR_NO] | None = Field(
        None,
        description="How HIGH layers repair LOW ones: none, the coefficients c (also true), or a re-solve by least "
        "squares of every convolution but depthwise ones; default: the recipe's.",
    )
    lambda1: float = Field(0.5, ge=0, description="Weight of the bias term of the objective.")
    lambda2: float = Field(0.0, ge=0, description="Weight of the penalty on c squared.")


class RtnPlan(Plan):
    """Round to nearest with absmax (or min-max) scales; the baseline."""

    method: Literal["rtn"] = Field(description="Which method.")
    bits: Bits = Field(description="Bits of every layer.")
    granularity: Granularity = Field("channel", description="One scale a tensor, a channel or a group:N.")
    symmetric: bool = Field(True, description="false: min-max grid with a float zero point.")


BitPlan = Annotated[DfmpcPlan | RtnPlan | Neighbour, Field(discriminator="method")]


def role_granularity(plan: DfmpcPlan | RtnPlan | NeighbourPlan, role: Literal["low", "high"]) -> str:
    """Return the granularity that ``plan`` gives to layers of ``role``."""
    if isinstance(plan.granularity, RoleGranularity):
        return plan.granularity.low if role == "low" else plan.granularity.high
    return plan.granularity
