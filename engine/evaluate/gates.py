"""The bounds a finished task must keep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ..job.gates import AtLeast, AtMost, Gates

GateStatus = Literal["pass", "warn", "fail", "none"]
_SLACK = 1e-9
"""What decimal figures may lose in binary: 60 - 56.9 is no more than 3.1."""


@dataclass(frozen=True)
class Figures:
    """What gates look at. None: not known; of ``logit_sqnr_db`` beside an agreement: infinite, as nothing changed."""

    top1_before: float | None = None
    """Per cent, like the next."""
    top1_after: float | None = None
    agreement: float | None = None
    """0-1."""
    logit_sqnr_db: float | None = None
    """dB."""
    bits_per_weight: float | None = None
    seconds: float | None = None
    """Reading, compressing and writing."""


@dataclass(frozen=True)
class GateResult:
    """What the gates said, with a reason for every bound that was broken or could not be checked, the worst first."""

    status: GateStatus
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Check:
    """One bound and its figure, and both in words."""

    gate: str
    bound: AtMost | AtLeast | None
    value: float | None
    text: str
    unknown: str
    by_default: bool = False
    """The job said nothing of it."""

    def broken(self) -> Literal["fail", "warn"] | None:
        """Tell which end of the bound is broken."""
        assert self.bound is not None
        for end in ("fail", "warn"):
            limit = getattr(self.bound, end)
            if limit is not None and not self._keeps(limit):
                return "fail" if end == "fail" else "warn"
        return None

    def _keeps(self, limit: float) -> bool:
        """Tell whether the figure keeps ``limit``; one that is no number keeps none."""
        assert self.value is not None
        slack = _SLACK * max(1.0, abs(limit))
        return self.value <= limit + slack if isinstance(self.bound, AtMost) else self.value >= limit - slack

    def reason(self, end: Literal["fail", "warn"]) -> str:
        """Return what was found and what was asked for."""
        said = "" if end == "fail" else " warns at"
        limit = f"{getattr(self.bound, end):g}"
        why = ", the default without labels (docs/fidelity.md)" if self.by_default else ""
        return f"{self.text}, {self.gate}{said or ' is'} {limit}{why}"


def check_gates(gates: Gates, figures: Figures) -> GateResult:
    """Hold ``figures`` against ``gates``.

    fail: a bound is broken. warn: only warnings are. pass: every bound that could be checked is kept. none: there is no
    bound, or none could be checked; a bound on top-1 needs labelled images, and without them it fails nothing but is
    named among the reasons. An agreement without labels, of which the gates do not speak, is held against a default.
    """
    reasons: dict[str, list[str]] = {"fail": [], "warn": [], "unchecked": []}
    checked = 0
    for check in _checks(gates, figures):
        if check.value is None:
            reasons["unchecked"].append(f"{check.gate} was not checked: {check.unknown}")
            continue
        checked += 1
        end = check.broken()
        if end is not None:
            reasons[end].append(check.reason(end))
    status: GateStatus = "fail" if reasons["fail"] else "warn" if reasons["warn"] else "pass" if checked else "none"
    return GateResult(status, (*reasons["fail"], *reasons["warn"], *reasons["unchecked"]))


def _checks(gates: Gates, figures: Figures) -> Iterator[_Check]:
    known = (_top1_drop(gates, figures), _agreement(gates, figures), *_others(gates, figures))
    return (check for check in known if check.bound is not None)


def _top1_drop(gates: Gates, figures: Figures) -> _Check:
    before, after = figures.top1_before, figures.top1_after
    drop = None if before is None or after is None else before - after
    text = "" if drop is None else f"top-1 fell by {drop:.2f} points"
    return _Check("max_top1_drop", gates.max_top1_drop, drop, text, "no labelled images, give evaluate.data")


def _agreement(gates: Gates, figures: Figures) -> _Check:
    value = figures.agreement
    unlabelled = value is not None and figures.top1_after is None
    default = gates.default_agreement if unlabelled else None
    text = "" if value is None else f"agreement is {value:.4f}"
    bound = gates.min_agreement or default
    return _Check("min_agreement", bound, value, text, "the task was not evaluated", default is not None)


def _others(gates: Gates, figures: Figures) -> Iterator[_Check]:
    sqnr, bits, seconds = figures.logit_sqnr_db, figures.bits_per_weight, figures.seconds
    if sqnr is None and figures.agreement is not None:
        sqnr = float("inf")
    text = "" if sqnr is None else f"logit SQNR is {sqnr:.2f} dB"
    yield _Check("min_sqnr_db", gates.min_sqnr_db, sqnr, text, "the task was not evaluated")
    text = "" if bits is None else f"{bits:.3f} bits a weight"
    yield _Check("max_bits_per_weight", gates.max_bits_per_weight, bits, text, "no weight is quantized")
    text = "" if seconds is None else f"it took {seconds:.1f} s"
    yield _Check("max_seconds", gates.max_seconds, seconds, text, "its time is not known")
