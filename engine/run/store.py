"""Where everything lies: one class owns the names under a store, one the names under a run."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, ValidationError

from ..artifact.latest import LATEST
from ..errors import UsageError
from ..job.fields import Strict
from ..job.gates import Gates
from ..job.schema import Evaluate, Resources
from ..job.task import Task
from .sizes import source_bytes

if TYPE_CHECKING:
    from ..job.loader import LoadedJob


class FrozenRun(Strict):
    """What a run does, as written to ``tasks.json`` when it starts and never changed after."""

    format_version: Literal[1] = 1
    job: str = Field(description="Name of the job.")
    evaluate: Evaluate | None
    gates: Gates
    resources: Resources
    seed: int
    tasks: list[Task]
    bytes: dict[str, int] = Field(default={}, description="Bytes of input by model, at the start.")

    @cached_property
    def digest(self) -> str:
        """Sha256 hex of the frozen list without sizes, and without resources, which may be raised to resume."""
        content = self.model_dump(mode="json", exclude={"resources", "bytes"})
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class RunFolder:
    """The names inside ``<store>/runs/<run-id>/``."""

    path: Path

    @property
    def run_id(self) -> str:
        """UTC stamp and 8 hex digits of the frozen list."""
        return self.path.name

    @property
    def store(self) -> Store:
        """The store that the run belongs to."""
        return Store(self.path.parent.parent)

    @property
    def tasks_file(self) -> Path:
        """The frozen list."""
        return self.path / "tasks.json"

    @property
    def ledger(self) -> Path:
        """Folder of the event files."""
        return self.path / "ledger"

    @property
    def report(self) -> Path:
        """Folder of the Parquet parts."""
        return self.path / "report"

    def log_file(self, model: str, plan: str, attempt: str) -> Path:
        """Log of one attempt at ``model``/``plan``."""
        return self.path / "logs" / model / plan / f"{attempt}.log"

    def frozen(self) -> FrozenRun:
        """Read the frozen list; UsageError where it is missing or of another version."""
        try:
            return FrozenRun.model_validate_json(self.tasks_file.read_bytes())
        except OSError as error:
            raise UsageError(
                f"{self.tasks_file} cannot be read ({error.strerror}): give a run's folder or a store"
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise UsageError(f"{self.tasks_file} is no task list of this version: {where}: {first['msg']}") from error


@dataclass(frozen=True)
class Store:
    """The names under a job's ``output``: artifacts and evaluations over many nights, and the runs."""

    root: Path

    @property
    def artifacts(self) -> Path:
        """Finished artifacts by model, plan and key."""
        return self.root / "artifacts"

    @property
    def evaluations(self) -> Path:
        """Cached scores and logits."""
        return self.root / "evaluations"

    @property
    def latest(self) -> Path:
        """Pointers by model and plan to the artifacts to use; see artifact/latest.py."""
        return self.root / LATEST

    @property
    def runs(self) -> Path:
        """One folder a run."""
        return self.root / "runs"

    @property
    def claims(self) -> Path:
        """The names that decide which run follows which; see claims.py."""
        return self.runs / ".claims"

    @property
    def attempts(self) -> Path:
        """Artifacts and runs that are being written."""
        return self.root / ".attempts"

    def artifact_folder(self, model: str, plan: str, key: str) -> Path:
        """Where the artifact with ``key`` (64 hex digits) lies once it is committed."""
        return self.artifacts / model / plan / key[:12]

    def run_folders(self) -> list[RunFolder]:
        """All runs, oldest first."""
        if not self.runs.is_dir():
            return []
        return [RunFolder(path) for path in sorted(self.runs.iterdir()) if not path.name.startswith(".")]

    def prepare(self) -> None:
        """Make the folders and prove by a file that they can be written; UsageError otherwise."""
        try:
            for folder in (self.artifacts, self.evaluations, self.claims, self.attempts):
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder) as probe:
                    probe.write(b"dfmpc")
        except OSError as error:
            reason = error.strerror or str(error)
            raise UsageError(
                f"output {self.root} cannot be written ({reason}): choose another with --output or in the job file"
            ) from error


def freeze(loaded: LoadedJob, tasks: Sequence[Task]) -> FrozenRun:
    """Return what a run of ``tasks`` of a job does, with the evaluation set by its absolute path."""
    job, evaluate = loaded.job, loaded.job.evaluate
    if evaluate is not None:
        evaluate = evaluate.model_copy(update={"data": str(loaded.folder / evaluate.data)})
    return FrozenRun(
        job=job.name,
        evaluate=evaluate,
        gates=job.gates,
        resources=job.resources,
        seed=job.seed,
        tasks=list(tasks),
        bytes={name: source_bytes(source) for name, source in {task.model.name: task.model for task in tasks}.items()},
    )


def same_list(store: Store, frozen: FrozenRun) -> Iterator[RunFolder]:
    """Yield the runs of the same frozen list, newest first; one that cannot be read is none."""
    suffix = f"-{frozen.digest[:8]}"
    for run in reversed(store.run_folders()):
        # read one by one: who asks for the newest of a year's nights need not wait for all of them
        if run.run_id.endswith(suffix) and digest_of(run) == frozen.digest:
            yield run


def digest_of(run: RunFolder) -> str | None:
    """Return the digest of a run's frozen list, None where that cannot be read."""
    try:
        return run.frozen().digest
    except UsageError:
        return None


def find_run(path: Path) -> RunFolder:
    """Return the run at ``path``: a run's folder, or a store, which means its newest run; else UsageError."""
    if (path / "tasks.json").is_file():
        return RunFolder(path)
    if not path.is_dir():
        raise UsageError(f"{path} is no folder: give a run's folder or a store (the job's output)")
    if not (path / "runs").is_dir():
        raise UsageError(f"{path} is neither a run (it has no tasks.json) nor a store (it has no runs folder)")
    runs = [run for run in Store(path).run_folders() if run.tasks_file.is_file()]
    if not runs:
        raise UsageError(f"{path} holds no run yet: start one with dfmpc run")
    return runs[-1]
