"""Whether somebody is at a run: by the processes that wrote to its ledger, as far as can be known from this host."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

from ..artifact.owner import UNKNOWN_S, Owner
from .ledger import Event, Kind
from .store import RunFolder

_YOUNG_S = 3600
"""How long a run without events is taken to be about to begin."""
_FIRST_LINES = 8
_ENDS = (Kind.INTERRUPTED, Kind.PART_FINISHED, Kind.RUN_FINISHED)
"""What a command says of itself, without a task, when it is about to end."""


def is_attended(run: RunFolder, events: Sequence[Event]) -> bool:
    """Tell whether a command is, or may be, at ``run``, whose ledger holds ``events`` in order of time.

    Workers end with their command, so where commands are known only they count.
    """
    files = sorted(run.ledger.glob("*.jsonl"))
    said = [event for event in events if not event.task and event.kind in (Kind.RUN_STARTED, *_ENDS)]
    last = {event.process: event.kind for event in said}
    if not last:
        return any(map(may_live, files)) if files else is_young(changed(run.tasks_file))
    newest = max(map(changed, files), default=0.0)
    return any(may_live(file, newest) for file in files if last.get(file.stem) is Kind.RUN_STARTED)


def may_live(ledger_file: Path, heard: float | None = None) -> bool:
    """Tell whether the process that wrote ``ledger_file`` lives; elsewhere, whether it was heard of within a week.

    ``heard`` is the Unix time of that, else the file's last change is.
    """
    owner = _owner(ledger_file)
    dead = owner.is_dead() if owner is not None else None
    if dead is None:
        return time.time() - (changed(ledger_file) if heard is None else heard) < UNKNOWN_S
    return not dead


def is_young(made: float) -> bool:
    """Tell whether a run without events that was made then (Unix time) may be about to begin."""
    return time.time() - made < _YOUNG_S


def changed(file: Path) -> float:
    """Return the Unix time of a file's last change, 0 where it is gone."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _owner(ledger_file: Path) -> Owner | None:
    """Read the process that writes a ledger file from its first lines."""
    with ledger_file.open("rb") as file:
        for _, line in zip(range(_FIRST_LINES), file, strict=False):
            try:
                owner = Owner.parse(json.loads(line)["owner"])
            except (ValueError, TypeError, KeyError):
                continue
            if owner is not None:
                return owner
    return None
