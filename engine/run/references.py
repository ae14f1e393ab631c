"""What the runs of a store still need: which of them are at work or unfinished, and what their reports name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from ..artifact.latest import pointers, read_latest
from ..errors import ArtifactError
from .ledger import SETTLED, fold
from .liveness import changed, is_young, may_live
from .store import RunFolder, Store


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
    last = max(map(changed, files), default=changed(run.tasks_file))
    live = not finished and (is_young(last) if not files else any(may_live(file) for file in files))
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
