"""How big a model's input files are, found without torch and without reading them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from ..job.methods import BitPlan, DfmpcPlan
from ..job.recipes import steps_of
from ..job.sources import ModelSource

_PACKAGE = "package://"


def source_files(source: ModelSource) -> list[Path]:
    """Return the files that ``source`` names, whether they exist or not; a shard index brings its shards.

    Nothing is checked here: the worker that loads the model does that and says what is wrong.
    """
    if source.program is not None:
        return [Path(source.program)]
    if source.checkpoint is None:
        return []
    file = _checkpoint_path(source.checkpoint)
    return [] if file is None else [file, *_shards(file)]


def source_bytes(source: ModelSource) -> int:
    """Return the sum of the sizes of the files that exist, in bytes."""
    return sum(file.stat().st_size for file in source_files(source) if file.is_file())


def _checkpoint_path(location: str) -> Path | None:
    if not location.startswith(_PACKAGE):
        return Path(location)
    package, _, inside = location.removeprefix(_PACKAGE).partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    folders = list(spec.submodule_search_locations or []) if spec else []
    return Path(folders[0]) / inside if folders else None


def _shards(file: Path) -> list[Path]:
    if not file.name.endswith(".index.json") or not file.is_file():
        return []
    try:
        names = set(json.loads(file.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return []
    return [file.parent / name for name in sorted(name for name in names if isinstance(name, str))]


def predicted_host_bytes(checkpoint_bytes: int, plans: Iterable[BitPlan] = ()) -> int:
    """Return the memory that compressing a model takes at most, in bytes.

    4 times its checkpoint and 600 MB; 2 GB more where a plan forwards images or rounds with second moments.
    """
    heavy = any(isinstance(plan, DfmpcPlan) and steps_of(plan).factorises for plan in plans)
    return 4 * checkpoint_bytes + 600_000_000 + (2_000_000_000 if heavy else 0)


def predicted_device_bytes(checkpoint_bytes: int, plans: Iterable[BitPlan] = ()) -> int:
    """Return the device memory that a task is promised, in bytes.

    3 times the model's checkpoint and 600 MB for the process; 2 GB more where a plan forwards images or factorises.
    """
    return 3 * checkpoint_bytes + predicted_host_bytes(0, plans)
