"""A client of an MLflow server or database; what goes wrong with it is one error in the user's terms."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import UsageError

SQLITE = "sqlite:///"
_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # MLflow's own retry for four minutes before they say that nobody answers
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
}


def connect(uri: str, folder: Path) -> Any:
    """Return an ``mlflow.MlflowClient`` for ``uri``; a relative SQLite path counts from ``folder``.

    Settings of MLflow's that the environment does not have get quiet and quick ones. Raises UsageError where MLflow
    is not installed, where there is no such database file (MLflow would make an empty one), or nobody answers.
    """
    full = _located(uri, folder)
    needed = ("mlflow",) if urlsplit(uri).scheme in ("http", "https") else ("mlflow", "sqlalchemy", "alembic")
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise UsageError(f"MLflow needs {', '.join(missing)}, not installed here: pip install 'dfmpc[mlflow]'")
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    with talking(uri):
        return import_module("mlflow").MlflowClient(tracking_uri=full, registry_uri=full)


def _located(uri: str, folder: Path) -> str:
    if not uri.startswith("sqlite:"):
        return uri
    path, query, options = uri.removeprefix(SQLITE).partition("?")
    file = Path(os.path.abspath(folder / path))
    if not uri.startswith(SQLITE) or not file.is_file():
        raise UsageError(f"MLflow registry {uri}: there is no file {file}: give the database of an MLflow registry")
    return f"{SQLITE}{file}{query}{options}"


def artifact_location(uri: str, folder: Path) -> str | None:
    """Return where a new experiment keeps its files: beside a SQLite database, else where the server says (None).

    MLflow itself would take the folder that the command happens to run in.
    """
    if not uri.startswith(SQLITE):
        return None
    database = Path(_located(uri, folder).removeprefix(SQLITE).partition("?")[0])
    return (database.parent / "mlartifacts").as_uri()


@contextmanager
def talking(uri: str) -> Iterator[None]:
    """Turn what MLflow, its database or the network raise within the block into a UsageError that names ``uri``."""
    try:
        yield
    except _failures() as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UsageError(
            f"MLflow registry {shown(uri)}: {_without_password(lines[0], uri)}: check that it is up, that its uri is "
            "right, and that you may use it"
        ) from error


def _failures() -> tuple[type[Exception], ...]:
    """Return what MLflow lets out: an error of its own, of its database, of a file or socket, a missing driver."""
    found: list[type[Exception]] = [OSError, ImportError]
    for module, name in (("mlflow.exceptions", "MlflowException"), ("sqlalchemy.exc", "SQLAlchemyError")):
        try:
            found.append(getattr(import_module(module), name))
        except ImportError:
            continue
    return tuple(found)


def shown(uri: str) -> str:
    """Return ``uri`` without its password."""
    return _without_password(uri, uri)


def _without_password(text: str, uri: str) -> str:
    password = urlsplit(uri).password
    return text.replace(password, "***") if password else text
