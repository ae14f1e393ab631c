"""Models that the job's previous run had and that are not there any more."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..artifact.storage import write_atomically
from .ledger import SETTLED, fold
from .store import RunFolder, Store

VANISHED = "vanished.json"


@dataclass(frozen=True)
class Vanished:
    """Names of models, and the run that had them; none and empty where nothing is missing."""

    previous: str = ""
    models: tuple[str, ...] = ()


@dataclass(frozen=True)
class _List:
    job: str
    models: frozenset[str]
    tasks: tuple[str, ...]


def note_vanished(run: RunFolder, job: str, models: Iterable[str]) -> Vanished:
    """Return the models of the newest finished run of ``job`` before ``run`` that are not among ``models``.

    Where there are any they are also written to ``vanished.json`` in the run's folder. Nothing of theirs is removed.
    Raises StorageError.
    """
    for previous, content in _finished_before(run, job):
        missing = tuple(sorted(content.models - set(models)))
        if not missing:
            break
        document = json.dumps({"previous": previous.run_id, "models": missing}, indent=1) + "\n"
        write_atomically(run.path / VANISHED, document.encode())
        return Vanished(previous.run_id, missing)
    return Vanished()


def finished_runs(store: Store, job: str | None = None) -> Iterator[RunFolder]:
    """Yield the finished runs of ``job`` (None: of the job that the newest finished run is of), newest first."""
    for run in reversed(store.run_folders()):
        content = _list(run)
        if content is None or (job is not None and content.job != job) or not _is_finished(run, content):
            continue
        job = content.job
        yield run


def _finished_before(run: RunFolder, job: str) -> Iterator[tuple[RunFolder, _List]]:
    for other in finished_runs(run.store, job):
        content = _list(other)
        if other.run_id < run.run_id and content is not None:
            yield other, content


def _is_finished(run: RunFolder, content: _List) -> bool:
    states = fold(run)
    return all(task in states and states[task].status in SETTLED for task in content.tasks)


def _list(run: RunFolder) -> _List | None:
    """Read what matters of a list of any version; None where it has not got it."""
    try:
        document = json.loads(run.tasks_file.read_bytes())
        tasks = [(str(task["id"]), str(task["model"]["name"])) for task in document["tasks"]]
        return _List(str(document["job"]), frozenset(name for _, name in tasks), tuple(task for task, _ in tasks))
    except (OSError, ValueError, KeyError, TypeError):
        return None
