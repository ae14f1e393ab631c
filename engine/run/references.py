"""What the runs of a store still need: which of them are at work or unfinished, and what their reports name."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..artifact.latest import pointers, read_latest
from ..artifact.owner import Owner
from ..errors import ArtifactError
from .ledger import SETTLED, fold
from .store import RunFolder, Store

_UNKNOWN_S = 7 * 24 * 3600
"""How long a process on another host is taken to live after its last event."""
_YOUNG_S = 3600
"""How long a run without events is taken to be about to begin."""
_FIRST_LINES = 8


@dataclass(frozen=True)
class RunUse:
    """What a run refers to. What cannot be read (another version, torn) is None, which means: perhaps anything."""

    run: RunFolder
    live: bool
    """Somebody is at it, as far as can be known."""
    finished: bool
    last_s: float
    """Unix time of its last event."""
    tasks: frozenset[str] | None
    """MODEL/PLAN of its tasks."""
    artifacts: frozenset[str] | None
    """What its report names, relative to the store."""

    def may_use(self, task: str, artifact: str) -> bool:
        """Tell whether the run's report names ``artifact``, or the run may still come to use it for ``task``."""
        if self.finished and self.artifacts is not None:
            return artifact in self.artifacts
        return self.has_task(task) or artifact in (self.artifacts or ())

    def has_task(self, task: str) -> bool:
        """Tell whether ``task`` (MODEL/PLAN) is, or may be, one of the run's."""
        return self.tasks is None or task in self.tasks


@dataclass(frozen=True)
class Published:
    """What the pointers of a store name."""

    artifacts: frozenset[str]
    """Relative to the store."""
    unreadable: frozenset[str]
    """MODEL/PLAN of pointers that do not say which artifact they name: perhaps any."""

    def names(self, task: str, artifact: str) -> bool:
        """Tell whether the pointer of ``task`` (MODEL/PLAN) names ``artifact``, or may."""
        return artifact in self.artifacts or task in self.unreadable


def published(store: Store) -> Published:
    """Return what the pointers of ``store`` name."""
    artifacts, unreadable = set(), set()
    for file in pointers(store.root):
        try:
            artifacts.add(read_latest(file).artifact)
        except ArtifactError:
            unreadable.add("/".join(file.parts[-2:]))
    return Published(frozenset(artifacts), frozenset(unreadable))


def uses_of(store: Store) -> list[RunUse]:
    """Return what every run of ``store`` refers to, oldest first."""
    return [_use_of(run) for run in store.run_folders()]


def _use_of(run: RunFolder) -> RunUse:
    tasks, states = _tasks(run), fold(run)
    finished = tasks is not None and all(task in states and states[task].status in SETTLED for task in tasks)
    files = sorted(run.ledger.glob("*.jsonl"))
    last = max(map(_changed, files), default=_changed(run.tasks_file))
    live = not finished and (_young(last) if not files else any(_may_live(file) for file in files))
    return RunUse(run, live, finished, last, tasks, _artifacts(run))


def _tasks(run: RunFolder) -> frozenset[str] | None:
    """Read the names of the tasks, from a list of any version that has them."""
    try:
        return frozenset(str(task["id"]) for task in json.loads(run.tasks_file.read_bytes())["tasks"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _artifacts(run: RunFolder) -> frozenset[str] | None:
    """Read the one column that matters, which every version of the report has."""
    found: set[str] = set()
    try:
        for file in (run.report / "models").glob("*.parquet"):
            found.update(_named(pq.read_table(pa.BufferReader(file.read_bytes()), columns=["artifact"])["artifact"]))
    except (OSError, pa.ArrowException, KeyError):
        return None
    return frozenset(found)


def _named(column: pa.ChunkedArray) -> Iterable[str]:
    return (str(value) for value in column.to_pylist() if value is not None)


def _may_live(ledger_file: Path) -> bool:
    owner = _owner(ledger_file)
    dead = owner.is_dead() if owner is not None else None
    return time.time() - _changed(ledger_file) < _UNKNOWN_S if dead is None else not dead


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


def _young(last: float) -> bool:
    return time.time() - last < _YOUNG_S


def _changed(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0
