"""Whether the disk has room for what a run is about to write, and what is said where it has none to begin with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from ..artifact.manifest import MANIFEST
from ..errors import DfmpcError, InterruptedRunError, UsageError
from ..job.task import Task
from .failures import full_disk
from .predict import free_bytes, predicted_artifact_bytes
from .store import Store

_MIB = 2**20


def disk_preflight(store: Store, open_tasks: Sequence[Task]) -> None:
    """Raise UsageError where the artifacts that are still to come would not fit on the store's disk.

    Needed is an upper estimate of the artifacts (``predicted_artifact_bytes``) of the tasks whose model and bit-plan
    have none in the store yet; one that is there counts as reused, although its key may turn out to be another. Free is
    what the file system tells this user. A quota cannot be seen in it, nor what others write meanwhile: a write that
    fails for either ends the run with exit code 75.
    """
    missing = [task for task in open_tasks if not _has_artifact(store, task)]
    needed, free = sum(map(predicted_artifact_bytes, missing)), free_bytes(store.root)
    if needed > free:
        raise UsageError(
            f"{store.root}: the artifacts of {len(missing)} tasks may take {needed / _MIB:.1f} MiB, "
            f"{free / _MIB:.1f} MiB are free: free space, choose another --output, or go on with --no-preflight"
        )


def _has_artifact(store: Store, task: Task) -> bool:
    folder = store.artifacts / task.model.name / task.plan.name
    return any(folder.glob(f"*/{MANIFEST}"))


@contextmanager
def starting(store: Store) -> Iterator[None]:
    """Turn a start that a full disk or quota keeps from being written into InterruptedRunError: exit code 75.

    So it ends as a run does whose disk fills up later, and who starts it again after that may do so here too. Nothing
    is kept of such a start but a name that the next one uses.
    """
    try:
        yield
    except (DfmpcError, OSError) as error:
        said = full_disk(error)
        if not said:
            raise
        raise InterruptedRunError(
            f"output {store.root}: no run can be started ({said}): free some space or choose another --output; "
            "the same command starts or resumes it"
        ) from error
