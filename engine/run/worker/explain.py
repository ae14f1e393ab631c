"""Why a task's artifact could not be reused."""

from __future__ import annotations

from pathlib import Path

from ...artifact.key import TaskKey, explain
from ...artifact.manifest import MANIFEST, Manifest, damage, read_manifest
from ...errors import ArtifactError


def why_not_reused(folder: Path, key: TaskKey) -> str:
    """Return why there is no complete artifact at ``folder``, against the newest one of the same model and plan."""
    if folder.exists():
        return f"the artifact is incomplete or altered, so it is made anew: {'; '.join(damage(folder))}"
    found = [manifest for path in _newest_first(folder.parent) if (manifest := _readable(path)) is not None]
    if not found:
        return f"there is no artifact of {folder.parent.parent.name}/{folder.parent.name} in the store yet"
    return f"{explain(found[0].ingredients, key.ingredients)} (against {found[0].key[:12]})"


def _newest_first(plan_folder: Path) -> list[Path]:
    return sorted((file.parent for file in plan_folder.glob(f"*/{MANIFEST}")), key=_changed, reverse=True)


def _changed(folder: Path) -> float:
    try:
        return (folder / MANIFEST).stat().st_mtime
    except OSError:  # another run is replacing it
        return 0.0


def _readable(folder: Path) -> Manifest | None:
    try:
        return read_manifest(folder)
    except ArtifactError:
        return None
