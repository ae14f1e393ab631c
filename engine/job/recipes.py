"""What a dfmpc plan's recipe stands for: every step that the plan leaves open gets a value here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .calibrators import AnalyticCalibrator, Calibrator, NoCalibrator, SyntheticCalibrator
from .methods import BitPlan, DfmpcPlan, RtnPlan
from .neighbours import NeighbourPlan

RECIPES_VERSION = 5
"""Bumped by hand when a constant of a recipe, calibrator, rounding or budget changes bytes; part of every key."""
Tier = Literal["none", "closed-form", "synthetic"]


@dataclass(frozen=True)
class Steps:
    """The steps of one plan, all settled."""

    recipe: str
    """``published`` or ``auto``."""
    calibrator: Calibrator
    ternary: Literal["twn", "exact"]
    clip: Literal["absmax", "mse"]
    rounding: Literal["nearest", "feedback"]
    compensate: Literal["none", "c", "least-squares"]
    correct_biases: bool
    """Whether the shift of a layer's mean output that no norm takes up goes into its bias."""

    @property
    def tier(self) -> Tier:
        """What stands in for data: nothing, closed form, or images made from no data."""
        if isinstance(self.calibrator, SyntheticCalibrator):
            return "synthetic"
        return "none" if isinstance(self.calibrator, NoCalibrator) else "closed-form"

    @property
    def name(self) -> str:
        """The recipe and its steps in one line, as reports and manifests have it."""
        return f"{self.recipe}: {self.ternary} ternary, {self.clip} clip, {self.rounding}, {self.compensate}"

    @property
    def needs_moments(self) -> bool:
        """Whether rounding asks for second moments of the layers' inputs."""
        return self.rounding == "feedback" or self.compensate == "least-squares"

    @property
    def factorises(self) -> bool:
        """Whether bytes may depend on the kind of device, the number of threads and the version of torch."""
        spectral = isinstance(self.calibrator, AnalyticCalibrator) and self.calibrator.moments == "spectral"
        return self.needs_moments or spectral or self.tier == "synthetic"


def steps_of(plan: DfmpcPlan) -> Steps:
    """Return the steps of ``plan``: what it says, and for the rest what its recipe stands for.

    ``published`` is the paper's steps (arXiv 2307.00498) with the named calibrator, default analytic. ``auto`` is the
    best known in the calibrator's tier: error feedback from exact ternary levels and searched clips and, in the
    synthetic tier (the default), a least-squares re-solve of the layers for what the quantized network feeds them.
    """
    return _published(plan) if plan.recipe == "published" else _auto(plan)


def _published(plan: DfmpcPlan) -> Steps:
    calibrator = plan.calibrator or AnalyticCalibrator()
    return Steps(
        "published",
        _with_moments(calibrator, "channel"),
        plan.ternary or "twn",
        plan.clip or "absmax",
        plan.rounding or "nearest",
        plan.compensate or "c",
        correct_biases=False,
    )


def _auto(plan: DfmpcPlan) -> Steps:
    calibrator = _with_moments(plan.calibrator or SyntheticCalibrator(), "spectral")
    images = isinstance(calibrator, SyntheticCalibrator)
    informed = images or (isinstance(calibrator, AnalyticCalibrator) and calibrator.moments == "spectral")
    return Steps(
        "auto",
        calibrator,
        plan.ternary or "exact",
        plan.clip or "mse",
        plan.rounding or ("feedback" if informed else "nearest"),
        plan.compensate or ("least-squares" if images else "none"),
        correct_biases=True,
    )


def _with_moments(calibrator: Calibrator, moments: Literal["channel", "spectral"]) -> Calibrator:
    if isinstance(calibrator, AnalyticCalibrator) and calibrator.moments is None:
        return calibrator.model_copy(update={"moments": moments})
    return calibrator


@dataclass(frozen=True)
class PlanDescription:
    """How reports name a bit-plan."""

    method: str
    recipe: str
    tier: str
    """none (no statistics are re-estimated), closed-form (they are, without images) or synthetic (from images made
    from no data)."""
    calibrator: str


def describe_plan(plan: BitPlan) -> PlanDescription:
    """Return method, resolved recipe, tier and calibrator of ``plan``."""
    if isinstance(plan, RtnPlan):
        return PlanDescription("rtn", "", "none", "none")
    if isinstance(plan, NeighbourPlan):
        return PlanDescription(plan.method, "", plan.tier, plan.calibrator)
    steps = steps_of(plan)
    return PlanDescription("dfmpc", steps.name, steps.tier, steps.calibrator.name)
