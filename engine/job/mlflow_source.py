"""Models of an MLflow registry: a version's artifacts are read as a registry's folder is, with the same sidecars."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pydantic import TypeAdapter, ValidationError

from ..errors import UsageError
from .fields import Name
from .mlflow_client import connect, shown, talking
from .mlflow_fields import MlflowModels
from .registry import entered, model_of, safe_name
from .registry_walk import names_of, walk
from .schema import Evaluate, ModelSpec
from .sources import JobModel, ModelSource, Registered, effective_preprocess

PUBLISHED = "dfmpc.published"
"""Tag of the registered models that dfmpc makes: no pattern takes them."""
CACHE = ".mlflow"
"""The folder of a store that keeps what was fetched; it may be removed at any time between runs."""
_NAME: TypeAdapter[str] = TypeAdapter(Name)
_PAGE = 100


@dataclass(frozen=True)
class ModelVersion:
    """The version of a registered model that is taken; empty, with a problem, where a model named has none."""

    name: str
    version: str = ""
    problem: str = ""


def mlflow_versions(source: MlflowModels, folder: Path) -> list[ModelVersion]:
    """Return what ``source`` names, by name; a relative SQLite path counts from ``folder``.

    A model that only a pattern matches is left out where it has no such version. Raises UsageError where the registry
    cannot be read, and for a name or pattern that matches nothing there.
    """
    client = connect(source.uri, folder)
    with talking(source.uri):
        known = {model.name: model for model in _paged(client.search_registered_models)}
        own = {name for name, model in known.items() if PUBLISHED in model.tags}
        candidates = sorted(known.keys() - (own - set(source.models)))
        for pattern in source.models:
            if not any(fnmatchcase(name, pattern) for name in candidates):
                raise UsageError(
                    f"MLflow registry {shown(source.uri)}: {pattern!r} matches no registered model; "
                    f"it has {', '.join(candidates[:8]) or 'none'}{', …' if len(candidates) > 8 else ''}"
                )
        chosen = [name for name in candidates if any(fnmatchcase(name, pattern) for pattern in source.models)]
        versions = [_version(client, known[name], source) for name in chosen]
    return [one for one in versions if one.version or one.name in source.models]


def mlflow_models(
    spec: ModelSpec,
    entry: int,
    folder: Path,
    store: Path,
    evaluate: Evaluate | None,
    plans: Sequence[str] | None = None,
    taken: Container[str] = (),
) -> list[JobModel]:
    """Return the models of the MLflow block of ``spec``, the job's entry ``entry``, by name; none without a block.

    A model has its registered name, whatever a sidecar says. Artifacts in folders stay where they are; others are
    fetched into ``store``, each version once. A version that cannot be used has a ``problem``, as in
    ``registry_models``. Raises UsageError as ``mlflow_versions`` does.
    """
    if spec.mlflow is None:
        return []
    client, found = connect(spec.mlflow.uri, folder), dict[str, JobModel]()
    cache = store / CACHE / hashlib.sha256(spec.mlflow.uri.encode()).hexdigest()[:8]
    for version in mlflow_versions(spec.mlflow, folder):
        model = _model(client, spec, version, cache, evaluate)
        changes: dict[str, object] = {"name": task_name(version.name)}
        if not model.source.problem:
            changes["registered"] = Registered(entry=entry, name=version.name, version=version.version)
        model = replace(model, source=model.source.model_copy(update=changes))
        model = entered(model, task_name(version.name), spec, plans, taken, found)
        found[model.source.name] = model
    return list(found.values())


def task_name(registered: str) -> str:
    """Return the name of a registered model as a name in a job: its own where it can be one."""
    try:
        return _NAME.validate_python(registered)
    except ValidationError:
        return safe_name(registered)


def _version(client: Any, model: Any, source: MlflowModels) -> ModelVersion:
    if source.alias is not None:
        version = str(model.aliases.get(source.alias, ""))
        return ModelVersion(model.name, version, "" if version else f"has no version with the alias {source.alias!r}")
    ready = [one for one in versions_of(client, model.name) if one.status == "READY"]
    newest = max((int(one.version) for one in ready), default=None)
    return ModelVersion(model.name, str(newest or ""), "" if newest else "has no version yet")


def versions_of(client: Any, name: str) -> list[Any]:
    """Return all versions of a registered model as MLflow describes them."""
    quote = '"' if "'" in name else "'"
    return _paged(client.search_model_versions, f"name={quote}{name}{quote}")


def _paged(search: Any, text: str | None = None) -> list[Any]:
    page = search(filter_string=text, max_results=_PAGE)
    found = list(page)
    while page.token:
        page = search(filter_string=text, max_results=_PAGE, page_token=page.token)
        found += page
    return found


def _model(client: Any, spec: ModelSpec, version: ModelVersion, cache: Path, evaluate: Evaluate | None) -> JobModel:
    uri = spec.mlflow.uri if spec.mlflow else ""
    if version.problem:
        return _unusable(version, f"{version.problem}: register one, or leave the model out", uri)
    try:
        root = _fetched(client, version, cache, uri)
        places = [(place, *names) for place in walk(root) for names in names_of(place, root)]
    except UsageError as error:
        return _unusable(version, str(error), uri)
    if len(places) != 1:
        text = f"holds {len(places)} models in {root}: expected one .pt2 program, or a dfmpc.yaml beside what it names"
        return _unusable(version, text, uri)
    place, _, program = places[0]
    return model_of(root, place, version.name, program, effective_preprocess(spec.preprocess, evaluate))


def _unusable(version: ModelVersion, text: str, uri: str) -> JobModel:
    what = f"{version.name} version {version.version}" if version.version else version.name
    return JobModel(ModelSource(name=version.name, problem=f"MLflow registry {shown(uri)}: {what}: {text}"))


def _fetched(client: Any, version: ModelVersion, cache: Path, uri: str) -> Path:
    """Return the folder of a version's artifacts on this machine; UsageError where there is none."""
    with talking(uri):
        location = str(client.get_model_version_download_uri(version.name, version.version))
    local = _local(location)
    if local is not None:
        return local
    target = cache / task_name(version.name) / version.version
    if not target.is_dir():
        try:
            with talking(uri):
                _fetch(client, location, target)
        except ValueError as error:  # MLflow's readers of addresses let it out
            raise UsageError(
                f"the address of its artifacts, {location!r}, is none that MLflow reads: {error}"
            ) from error
    return target


def _local(location: str) -> Path | None:
    parts = urlsplit(location)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path))
    return Path(location) if not parts.scheme else None


def _fetch(client: Any, location: str, target: Path) -> None:
    """Download to a folder beside ``target`` and rename: commands at once, or one that is killed, leave it whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".", dir=target.parent))
    try:
        download = import_module("mlflow").artifacts.download_artifacts
        fetched = download(artifact_uri=location, dst_path=str(draft), tracking_uri=client.tracking_uri)
        os.replace(fetched, target)
    except OSError:
        if not target.is_dir():  # nobody else was quicker
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
