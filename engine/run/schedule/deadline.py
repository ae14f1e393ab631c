"""A time by which the run has to be over: what would not end in time is not started."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

from ...errors import UsageError

_PARTS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?")
_BARE_SECONDS = re.compile(r"\d+(?:\.\d+)?")
"""By itself only: who writes 2h30 means minutes."""
_MARGIN = 1.5
"""How much slower than the slowest of its kind so far a task may be."""


@dataclass
class Deadline:
    """``at`` is Unix time in seconds, None without a deadline; ``reserve_s`` is kept for ending in order."""

    at: float | None
    reserve_s: float
    _rates: dict[str, float] = field(default_factory=dict)
    """Slowest seconds per byte seen, by bit-plan."""

    def observe(self, plan: str, size: int, seconds: float) -> None:
        """Learn from a task of ``size`` bytes that took ``seconds``."""
        self._rates[plan] = max(self._rates.get(plan, 0.0), seconds / max(size, 1))

    def left_s(self) -> float | None:
        """Return the seconds left for work; None without a deadline."""
        return None if self.at is None else self.at - time.time() - self.reserve_s

    def slack_s(self, plan: str, size: int) -> float | None:
        """Return how long a task can still wait and be expected to end in time; None without a deadline.

        Where nothing is known of such tasks it can wait until the end.
        """
        left = self.left_s()
        if left is None:
            return None
        rate = self._rates.get(plan, max(self._rates.values(), default=0.0))
        return left - _MARGIN * rate * size

    def allows(self, plan: str, size: int) -> bool:
        """Tell whether a task that begins now can be expected to end in time."""
        slack = self.slack_s(plan, size)
        return slack is None or slack > 0


def parse_deadline(text: str | None, environment: Mapping[str, str]) -> float | None:
    """Return the Unix time that ``text`` names: a duration from now (``2h30m``, ``900``), ISO 8601, or ``auto``.

    ``auto`` is the end of the Slurm job (SLURM_JOB_END_TIME), or no deadline outside one. Raises UsageError.
    """
    if text is None:
        return None
    if text == "auto":
        end = environment.get("SLURM_JOB_END_TIME", "")
        return float(end) if end.isdigit() else None
    if _BARE_SECONDS.fullmatch(text.strip()):
        return time.time() + float(text)
    match = _PARTS.fullmatch(text.strip())
    if match and any(match.groups()):
        days, hours, minutes, seconds = (float(part or 0) for part in match.groups())
        return time.time() + 86400 * days + 3600 * hours + 60 * minutes + seconds
    try:
        stated = datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(
            f"--deadline {text!r}: give a duration such as 2h30m, a time such as 2026-01-31T06:00:00+00:00, or auto"
        ) from error
    return (stated if stated.tzinfo else stated.replace(tzinfo=UTC)).timestamp()
