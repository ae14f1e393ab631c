"""The bounds a finished task must keep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..job.schema import Gates
from .cache import Scores

GateStatus = Literal["pass", "fail", "none"]


@dataclass(frozen=True)
class GateResult:
    """What the gates said, with a reason for every bound that was broken or could not be checked."""

    status: GateStatus
    reasons: tuple[str, ...] = ()


def check_gates(gates: Gates, scores: Scores) -> GateResult:
    """Hold ``scores`` against ``gates``.

    fail: a bound is broken. pass: every bound that could be checked is kept. none: there is no bound, or none could be
    checked; a bound on top-1 needs labelled images, and without them it fails nothing but is named among the reasons.
    """
    broken, unchecked, checked = [], [], 0
    if gates.max_top1_drop is not None:
        if scores.top1_before is None or scores.top1_after is None:
            unchecked.append("max_top1_drop was not checked: no labelled images, give evaluate.data")
        else:
            checked += 1
            drop = scores.top1_before - scores.top1_after
            if drop > gates.max_top1_drop:
                broken.append(f"top-1 fell by {drop:.2f} points, max_top1_drop is {gates.max_top1_drop:g}")
    if gates.min_agreement is not None:
        checked += 1
        if scores.agreement < gates.min_agreement:
            broken.append(f"agreement is {scores.agreement:.4f}, min_agreement is {gates.min_agreement:g}")
    status: GateStatus = "fail" if broken else "pass" if checked else "none"
    return GateResult(status, (*broken, *unchecked))
