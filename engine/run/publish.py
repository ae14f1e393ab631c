"""Publishing to MLflow: a new version of a registered model for every artifact that no gate holds back."""

from __future__ import annotations

import hashlib
import math
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact.latest import read_latest
from ..errors import ArtifactError, UsageError
from ..job.loader import LoadedJob
from ..job.mlflow_client import artifact_location, connect, shown, talking
from ..job.mlflow_fields import MlflowModels, MlflowPublish
from ..job.mlflow_source import PUBLISHED, versions_of
from ..job.sources import Registered
from ..job.task import Task
from ..report.rows import ModelRow
from ..report.tables import to_json
from .store import Store

_TAGS = ("key", "method", "gate", "bits_per_weight", "ratio", "agreement", "measured_on", "dfmpc_version")
_SIZES = ("bits_per_weight", "ratio", "bytes_before", "bytes_after", "compress_s")
_METRICS = (*_SIZES, "top1_before", "top1_after", "top5_before", "top5_after", "agreement", "kl", "logit_sqnr_db")
_RESERVED = re.compile(r"v\d+|latest", re.IGNORECASE)
"""Aliases that MLflow keeps for itself."""


@dataclass(frozen=True)
class Published:
    """What came of publishing."""

    versions: list[str]
    """The new versions, NAME/NUMBER, in the order of the rows."""
    problem: str = ""
    """Why some are missing; empty where none is."""


def publish_versions(loaded: LoadedJob, store: Store, tasks: Iterable[Task], rows: Sequence[ModelRow]) -> Published:
    """Register what ``rows`` name where their model's entry of the job asks for it; the same key only once.

    A closed gate registers nothing and moves no alias. An alias follows the store's ``latest`` pointer, so it is moved
    after that. What an MLflow registry refuses is its entry's problem and stops no other entry.
    """
    origins = {task.model.name: task.model.registered for task in tasks if task.model.registered is not None}
    wanted = [row for row in rows if row.model in origins and _leaves_something(row)]
    versions: list[str] = []
    problems = []
    for entry, spec in enumerate(loaded.job.models):
        own = [row for row in wanted if origins[row.model].entry == entry]
        publishing = spec.mlflow.publishing if spec.mlflow is not None else None
        if spec.mlflow is None or publishing is None or not own:
            continue
        try:
            target = _Target(spec.mlflow, publishing, loaded.folder, store)
            for row in own:
                versions += target.publish(row, origins[row.model])
        except UsageError as error:
            problems.append(str(error))
    return Published(versions, "; ".join(problems))


def _leaves_something(row: ModelRow) -> bool:
    return row.status in ("done", "reused") and row.gate != "fail" and row.artifact is not None and row.key is not None


class _Target:
    """One MLflow registry, with the names that one entry of the job gives to what it gets."""

    def __init__(self, source: MlflowModels, publishing: MlflowPublish, folder: Path, store: Store) -> None:
        self._source, self._publishing, self._folder, self._store = source, publishing, folder, store
        self._client: Any = connect(source.uri, folder)
        self._experiment: str | None = None

    def publish(self, row: ModelRow, origin: Registered) -> list[str]:
        """Register the row's artifact unless it is, move the alias, and return the version where it is new."""
        name = _filled(self._publishing.model, origin.name, row)
        with talking(self._source.uri):
            self._ensure_model(name, origin)
            version = self._first(name, row)
            new = version is None
            if version is None:
                made = self._new_version(name, row, origin)
                version = self._first(name, row) or made
                new = version == made
                if not new:  # another command registered the same key meanwhile
                    self._client.delete_run(self._client.get_model_version(name, made).run_id)
                    self._client.delete_model_version(name, made)
            self._move_alias(name, version, origin, row)
        return [f"{name}/{version}"] if new else []

    def _ensure_model(self, name: str, origin: Registered) -> None:
        """Make the registered model; refuse one that is somebody else's."""
        found = [one for one in self._client.search_registered_models(f"name={_quoted(name)}") if one.name == name]
        if not found:
            text = f"Compressed by dfmpc from {origin.name}."
            self._client.create_registered_model(name, tags={PUBLISHED: "true"}, description=text)
        elif PUBLISHED not in found[0].tags:
            raise UsageError(
                f"MLflow registry {shown(self._source.uri)}: {name!r} is a registered model that dfmpc did not make: "
                "choose another publish.model"
            )

    def _first(self, name: str, row: ModelRow) -> str | None:
        """Return the first version with the row's key and bit-plan."""
        wanted = {"dfmpc.key": row.key, "dfmpc.plan": row.bit_plan}
        found = [int(one.version) for one in versions_of(self._client, name) if wanted.items() <= one.tags.items()]
        return str(min(found)) if found else None

    def _new_version(self, name: str, row: ModelRow, origin: Registered) -> str:
        """Make a run with the artifact's files and the report's row, then the version, which is what others see."""
        tags = _tags(row, origin)
        run = self._client.create_run(self._experiment_id(), run_name=row.task, tags=tags)
        self._client.log_artifacts(run.info.run_id, str(self._store.root / str(row.artifact)), "artifact")
        self._client.log_text(run.info.run_id, to_json([row]) + "\n", "report.json")
        self._log_metrics(run.info.run_id, row)
        self._client.set_terminated(run.info.run_id)
        source = f"{run.info.artifact_uri}/artifact"
        text = f"{row.task} of {origin.name} version {origin.version}, run {row.run}"
        made = self._client.create_model_version(name, source, run.info.run_id, tags=tags, description=text)
        return str(made.version)

    def _log_metrics(self, run_id: str, row: ModelRow) -> None:
        for name in _METRICS:
            value = getattr(row, name)
            if value is not None and math.isfinite(value):
                self._client.log_metric(run_id, name, value, timestamp=int(time.time() * 1000))

    def _experiment_id(self) -> str:
        if self._experiment is None:
            name = self._publishing.experiment
            found = self._client.get_experiment_by_name(name)
            self._experiment = found.experiment_id if found is not None else self._new_experiment(name)
        return self._experiment

    def _new_experiment(self, name: str) -> str:
        return str(self._client.create_experiment(name, artifact_location(self._source.uri, self._folder)))

    def _move_alias(self, name: str, version: str, origin: Registered, row: ModelRow) -> None:
        if self._publishing.alias is None or not _is_latest(self._store, row):
            return
        alias = alias_of(_filled(self._publishing.alias, origin.name, row))
        held = self._client.get_registered_model(name).aliases.get(alias)
        if str(held) != version:
            self._client.set_registered_model_alias(name, alias, version)


def _is_latest(store: Store, row: ModelRow) -> bool:
    """Tell whether the store's pointer names this row's artifact: newer runs may have gone past it."""
    try:
        return read_latest(store.latest / row.model / row.bit_plan).artifact == row.artifact
    except ArtifactError:
        return False


def _filled(template: str, model: str, row: ModelRow) -> str:
    return template.replace("{model}", model).replace("{plan}", row.bit_plan)


def alias_of(text: str) -> str:
    """Return ``text`` as MLflow takes an alias: letters, digits, ``_`` and ``-``; a digest keeps changed ones apart."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", text)
    if plain == text and not _RESERVED.fullmatch(text):
        return text
    return f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _tags(row: ModelRow, origin: Registered) -> dict[str, str]:
    values = {name: getattr(row, name) for name in (*_TAGS, "top1_before", "top1_after")}
    values |= {"plan": row.bit_plan, "run": row.run, "source": f"{origin.name}/{origin.version}"}
    return {f"dfmpc.{name}": _text(value) for name, value in values.items() if value is not None}


def _text(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _quoted(name: str) -> str:
    quote = '"' if "'" in name else "'"
    return f"{quote}{name}{quote}"
