"""Every failure dfmpc names: one class a kind, each with the exit code it ends a command with.

Exit codes (docs/design.md): 0 done, 1 a bug of ours, 2 bad command line or job file (nothing started),
3 a run with failed tasks or a closed gate, 4 verify or diff found what it looks for, 75 interrupted.
"""

from __future__ import annotations

from dataclasses import dataclass


class DfmpcError(Exception):
    """Base of every error whose text is meant for the user: it names the thing, the value and the remedy."""

    exit_code = 1


class UsageError(DfmpcError):
    """A command line that cannot be carried out: a missing run, a folder that cannot be written."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a job file: where it stands, what was seen, what was expected."""

    field: str
    value: str
    expected: str
    line: int | None = None

    def __str__(self) -> str:
        """Return the problem as one line without the file's name."""
        where = f"line {self.line}: " if self.line is not None else ""
        return f"{where}{self.field}: got {self.value}; expected {self.expected}"


class JobFileError(DfmpcError):
    """A job file with one or more problems, all of them listed."""

    exit_code = 2

    def __init__(self, file: str, problems: list[Problem]) -> None:
        """Keep ``problems`` for ``--json`` and join them, one a line, for people."""
        self.file, self.problems = file, problems
        super().__init__("\n".join(f"{file}: {problem}" for problem in problems))


class ModelError(DfmpcError):
    """Base of what makes one model's tasks fail while the others go on."""

    exit_code = 3


class CheckpointError(ModelError):
    """A checkpoint that is missing, truncated or not what its name says."""


class UnsafeCheckpointError(ModelError):
    """A pickle that would run code: it is never loaded."""


class MismatchError(ModelError):
    """Checkpoint and network disagree: missing, unexpected or differently shaped tensors, each named."""


class NonFiniteError(ModelError):
    """NaN or Inf among the weights or the BatchNorm statistics, named by tensor."""


class UnsupportedModelError(ModelError):
    """A network that cannot be captured or compressed: dynamic shapes, no BatchNorm, a shared weight."""


class FactoryError(ModelError):
    """A factory that cannot be imported or called."""


class SidecarError(ModelError):
    """A model of a registry whose sidecar, name or folder cannot be used."""


class StorageError(DfmpcError):
    """A write that failed: a full disk, a folder that became read-only."""

    exit_code = 3


class DataError(DfmpcError):
    """An evaluation set that cannot be read: missing columns, a broken image."""

    exit_code = 3


class DeviceError(DfmpcError):
    """A device that was asked for and is not there, or that failed in mid-task."""

    exit_code = 3


class HostMemoryError(ModelError):
    """A model whose predicted memory is above ``resources.host_memory``: it is not started."""


class TaskTimeoutError(DfmpcError):
    """A task that ran past ``resources.task_timeout``."""

    exit_code = 3


class WorkerDiedError(DfmpcError):
    """A worker process that ended without an answer (killed, out of memory, crashed)."""

    exit_code = 3


class ArtifactError(DfmpcError):
    """An artifact that is incomplete, altered or of another format version."""

    exit_code = 4


class InterruptedRunError(DfmpcError):
    """A run stopped by a signal; what was finished is kept and the same command resumes."""

    exit_code = 75
