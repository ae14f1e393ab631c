"""The options of the other closed-form, data-free methods, which serve to compare (docs/methods.md, "Neighbours")."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from .fields import Bits, Granularity, Plan, RoleGranularity


class NeighbourPlan(Plan):
    """What every such plan has: one width for all layers, or the two widths of a pair."""

    method: str = Field(description="Which method.")
    bits: Bits | None = Field(None, description="Bits of every layer; leave it out where low and high are given.")
    low: Bits | None = Field(None, description="Bits of the LOW layers of dfmpc's pairs; needs high.")
    high: Bits | None = Field(None, description="Bits of the HIGH layers and of every layer in no pair; needs low.")
    granularity: Granularity | RoleGranularity = Field(
        "channel", description="One scale a tensor, a channel or a group:N, for all layers or by role {low, high}."
    )

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if [self.bits is None, self.low is None, self.high is None] not in ([False, True, True], [True, False, False]):
            raise ValueError("expected either bits, or low and high together")
        return self

    @property
    def paired(self) -> bool:
        """Whether the widths are those of a pair."""
        return self.bits is None

    def width(self, role: Literal["low", "high"]) -> int:
        """Return the bits of layers of ``role``."""
        found = self.bits if self.bits is not None else getattr(self, role)
        assert found is not None
        return int(found)

    @property
    def tier(self) -> str:
        """What stands in for data: none, or closed-form where expectations come from BatchNorm statistics."""
        return "none"

    @property
    def calibrator(self) -> str:
        """How reports name the step that re-estimates statistics."""
        return "none"


class TwnExactPlan(NeighbourPlan):
    """TWN with its threshold found exactly; ternary at 2 bits, DoReFa's grid at every other width."""

    method: Literal["twn-exact"] = Field(description="Which method.")


class OmsePlan(NeighbourPlan):
    """OMSE: symmetric grid, clipped where the squared error is least."""

    method: Literal["omse"] = Field(description="Which method.")


class VecqPlan(NeighbourPlan):
    """VecQ: mid-rise levels at the Gaussian step, then the least-squares scale."""

    method: Literal["vecq"] = Field(description="Which method.")


class Mul2qPlan(NeighbourPlan):
    """muL2Q: centred weights on mid-rise levels at the Gaussian step; as published, one scale a tensor."""

    method: Literal["mul2q"] = Field(description="Which method.")
    granularity: Granularity | RoleGranularity = Field(
        "tensor", description="One scale a tensor (as published), a channel or a group:N, or by role {low, high}."
    )


class DaqPlan(NeighbourPlan):
    """DAQ, its weights: every channel standardised, then mid-rise levels at the Gaussian step."""

    method: Literal["daq"] = Field(description="Which method.")


class DfqPlan(NeighbourPlan):
    """DFQ: equalisation across layers, bias absorption, round to nearest, bias correction."""

    method: Literal["dfq"] = Field(description="Which method.")
    symmetric: bool = Field(False, description="true: absmax grid; false, as published: min-max with a zero point.")
    equalise: bool = Field(True, description="Balance the channel ranges of adjacent layers.")
    absorb: bool = Field(True, description="Move what a ReLU never clips into the next layer's bias.")
    correct: bool = Field(True, description="Take the expected output error out of the biases.")

    @property
    def tier(self) -> str:
        """closed-form where an expectation over the inputs is used."""
        return "closed-form" if self.correct or self.absorb else "none"

    @property
    def calibrator(self) -> str:
        """The bias correction re-estimates means."""
        return "bias-correction" if self.correct else "none"


class SquantPlan(NeighbourPlan):
    """SQuant: roundings flipped until the signed errors of kernels and channels nearly cancel."""

    method: Literal["squant"] = Field(description="Which method.")
    symmetric: bool = Field(False, description="true: absmax grid; false, as published: min-max with a zero point.")


class HqqPlan(NeighbourPlan):
    """HQQ: a zero point that the half-quadratic solver finds, on a min-max grid."""

    method: Literal["hqq"] = Field(description="Which method.")
    granularity: Granularity | RoleGranularity = Field(
        "group:64", description="One scale a tensor, a channel or a group:N, for all layers or by role {low, high}."
    )
    p: float = Field(0.7, gt=0, le=1, description="Exponent of the error's norm.")
    beta: float = Field(10.0, gt=0, description="First weight of the quadratic term.")
    kappa: float = Field(1.01, ge=1, description="Its growth a step.")
    steps: int = Field(20, ge=1, le=1000, description="Steps of the solver.")


Neighbour = TwnExactPlan | OmsePlan | VecqPlan | Mul2qPlan | DaqPlan | DfqPlan | SquantPlan | HqqPlan
"""Every plan of this file."""
