"""Retention: what may go from a store, and its removal. Everything can be made again but costs time."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ..artifact.attempts import abandoned, discard, new_attempt
from ..artifact.manifest import MANIFEST
from ..artifact.storage import storing
from ..errors import UsageError
from ..report.tables import Table, TableColumn, counted, render
from .references import RunUse, published, uses_of
from .store import Store

Kind = Literal["artifact", "evaluation", "run", "attempt", "claim"]
_MIB = 2**20
_DAY_S = 24 * 3600
_CLAIM_S = 7 * _DAY_S
"""Age of a claim at which no command is still about to follow it."""


@dataclass(frozen=True)
class GcRules:
    """What may go. An artifact goes where every rule that is given says so; None and False are not given."""

    keep_last: int | None = None
    """Keep so many artifacts of a model and bit-plan, the newest by their manifests."""
    older_than_s: float | None = None
    """Artifacts made longer ago than this, in seconds, also where a report names them."""
    unreferenced: bool = False
    """Artifacts that no report names and no unfinished run may still use."""
    runs_older_than_s: float | None = None
    """Finished runs whose last event is longer ago, in seconds."""

    @property
    def of_artifacts(self) -> bool:
        """True where there is a rule for artifacts."""
        return self.keep_last is not None or self.older_than_s is not None or self.unreferenced

    def check(self) -> None:
        """Raise UsageError where nothing is asked for, or something that cannot be."""
        if not self.of_artifacts and self.runs_older_than_s is None:
            raise UsageError(
                "gc needs a criterion: --keep-last N, --older-than AGE, --unreferenced or --runs-older-than AGE"
            )
        if self.keep_last is not None and self.keep_last < 1:
            raise UsageError(f"--keep-last {self.keep_last}: give 1 or more")


@dataclass(frozen=True)
class Garbage:
    """One thing that may go. ``path`` is relative to the store."""

    kind: Kind
    path: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class GcResult:
    """What goes, or has gone where ``deleted``; ``notes`` say what was spared for a reason worth knowing."""

    store: str
    deleted: bool
    bytes: int
    items: list[Garbage]
    notes: list[str]

    def to_json(self) -> str:
        """Return one JSON document with the fields' names."""
        return json.dumps(asdict(self), indent=1)

    def to_text(self) -> str:
        """Return a row a thing, and what it comes to."""
        columns = (TableColumn("kind", right=False), TableColumn("MiB"), TableColumn("path", right=False))
        rows = tuple((item.kind, f"{item.bytes / _MIB:.2f}", item.path, item.reason) for item in self.items)
        table = [render(Table((*columns, TableColumn("why", right=False)), rows))] if rows else []
        counts = Counter(item.kind for item in self.items)
        what = ", ".join(counted(count, kind) for kind, count in counts.items()) or "nothing"
        end = f"removed {what}" if self.deleted else f"would remove {what}"
        hint = "" if self.deleted or not rows else "; --delete does it"
        return "\n".join([*table, *self.notes, f"{end}: {self.bytes / _MIB:.2f} MiB{hint}"])


def collect_garbage(store_root: Path, rules: GcRules, *, delete: bool = False) -> GcResult:
    """Find what ``rules`` let go, with what dead processes left; remove it where ``delete``.

    Nothing that a live run's tasks use goes, and nothing that ``latest`` names. What goes is first renamed into
    ``.attempts``, so that a kill leaves no half artifact or run under its name, only leftovers that the next run
    sweeps. Raises UsageError where ``store_root`` is no store or no rule is given, StorageError where something cannot
    be removed.
    """
    rules.check()
    store = Store(store_root)
    if not (store.runs.is_dir() and store.artifacts.is_dir()):
        raise UsageError(f"{store_root} is no store (it has no runs or no artifacts folder): give a job's output")
    with storing(store_root):
        uses = uses_of(store)
        items = _find(store, rules, uses)
        if delete:
            items = _without_live(store, items)
            _remove(store, items)
    notes = [f"{use.run.path} is at work: what its tasks use stays" for use in uses if use.live]
    return GcResult(str(store_root), delete, sum(item.bytes for item in items), items, notes)


def _find(store: Store, rules: GcRules, uses: Sequence[RunUse]) -> list[Garbage]:
    now = time.time()
    old = {use.run.path: use for use in uses if _is_old(use, rules, now)}
    kept = [use for use in uses if use.run.path not in old]
    # Evaluations are listed first: one that comes later has an artifact that came before it.
    evaluations = _files(store.evaluations) if rules.of_artifacts else []
    artifacts = list(_artifacts(store, rules, kept, now)) if rules.of_artifacts else []
    left = _keys(store) - {Path(item.path).name for item in artifacts}
    items = [_item(store, "run", path, f"finished {_age(now - use.last_s)} ago") for path, use in old.items()]
    items += artifacts
    items += _evaluations(store, rules, evaluations, left, now) if rules.of_artifacts else []
    items += [_item(store, "attempt", path, "its process has ended") for path in abandoned(store.root)]
    return items + list(_claims(store, now))


def _is_old(use: RunUse, rules: GcRules, now: float) -> bool:
    limit = rules.runs_older_than_s
    return limit is not None and use.finished and now - use.last_s > limit


def _artifacts(store: Store, rules: GcRules, kept: Sequence[RunUse], now: float) -> Iterator[Garbage]:
    latest = published(store)
    for plan_folder in sorted(store.artifacts.glob("*/*")):
        task = plan_folder.relative_to(store.artifacts).as_posix()
        if any(use.live and use.has_task(task) for use in kept):
            continue
        made = sorted(((_made(path), path) for path in plan_folder.iterdir() if path.is_dir()), reverse=True)
        for place, (at, path) in enumerate(made):
            if latest.names(task, _name(store, path)):
                continue
            reasons = _reasons(rules, place, now - at, _may_be_used(kept, task, _name(store, path)), task)
            if reasons:
                yield _item(store, "artifact", path, "; ".join(reasons))


def _reasons(rules: GcRules, place: int, age_s: float, used: bool, task: str) -> list[str]:
    """Return why an artifact goes, a reason a rule; nothing where one rule spares it."""
    reasons = []
    if rules.keep_last is not None:
        if place < rules.keep_last:
            return []
        reasons.append(f"not among the newest {rules.keep_last} of {task}")
    if rules.older_than_s is not None:
        if age_s <= rules.older_than_s:
            return []
        reasons.append(f"made {_age(age_s)} ago")
    if rules.unreferenced:
        if used:
            return []
        reasons.append("no report names it")
    return reasons


def _may_be_used(kept: Sequence[RunUse], task: str, name: str) -> bool:
    return any(use.may_use(task, name) for use in kept)


def _evaluations(store: Store, rules: GcRules, files: Sequence[Path], left: set[str], now: float) -> Iterator[Garbage]:
    """Yield scores whose artifact has gone; by age what does not say whose it is, such as logits of originals."""
    limit = rules.older_than_s
    for file in files:
        key = _artifact_of(file)
        if key is not None and key[:12] not in left:
            yield _item(store, "evaluation", file, "its artifact is gone")
        elif key is None and limit is not None and now - file.stat().st_mtime > limit:
            yield _item(store, "evaluation", file, f"made {_age(now - file.stat().st_mtime)} ago")


def _artifact_of(file: Path) -> str | None:
    """Return the key of the artifact that kept scores are of; None where the file does not say."""
    if file.suffix != ".json":
        return None
    try:
        key = json.loads(file.read_bytes())["artifact"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return key if isinstance(key, str) else None


def _claims(store: Store, now: float) -> Iterator[Garbage]:
    # A claim before its mark: a mark without a claim only costs a name, a claim without a mark may bring back a run.
    for file in _files(store.claims):
        if now - file.stat().st_mtime > _CLAIM_S:
            yield _item(store, "claim", file, "no command is about to follow it")


def _without_live(store: Store, items: Sequence[Garbage]) -> list[Garbage]:
    """Leave out what a run that began, or published, while we looked may use: adding up sizes takes its time."""
    live, latest = [use for use in uses_of(store) if use.live], published(store)
    artifacts = [item for item in items if item.kind == "artifact"]
    spared = {item.path for item in artifacts if any(use.has_task(_task(item)) for use in live)}
    spared |= {item.path for item in artifacts if latest.names(_task(item), item.path)}
    keys = {Path(path).name for path in spared}
    return [item for item in items if item.path not in spared and not _is_scores_of(store, item, keys)]


def _is_scores_of(store: Store, item: Garbage, keys: set[str]) -> bool:
    return bool(keys) and item.kind == "evaluation" and (_artifact_of(store.root / item.path) or "")[:12] in keys


def _task(artifact: Garbage) -> str:
    """Return MODEL/PLAN of artifacts/MODEL/PLAN/KEY."""
    return "/".join(Path(artifact.path).parts[-3:-1])


def _remove(store: Store, items: Sequence[Garbage]) -> None:
    folder = new_attempt(store.root, "gc")
    for number, item in enumerate(items):
        path = store.root / item.path
        if item.kind == "attempt":
            discard(path)
            continue
        try:
            os.rename(path, folder / str(number))
        except FileNotFoundError:
            continue  # somebody else collects the same garbage
    discard(folder)


def _keys(store: Store) -> set[str]:
    return {path.name for path in store.artifacts.glob("*/*/*")}


def _files(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.is_file() and not path.name.startswith("."))


def _made(artifact: Path) -> float:
    """Return the Unix time of the manifest, else of the folder."""
    manifest = artifact / MANIFEST
    return (manifest if manifest.is_file() else artifact).stat().st_mtime


def _item(store: Store, kind: Kind, path: Path, reason: str) -> Garbage:
    return Garbage(kind, _name(store, path), _bytes(path), reason)


def _name(store: Store, path: Path) -> str:
    return path.relative_to(store.root).as_posix()


def _bytes(path: Path) -> int:
    """Return the size of a file, or of all files in a folder."""
    if not path.is_dir():
        return path.stat().st_size
    return sum(os.lstat(os.path.join(folder, name)).st_size for folder, _, names in os.walk(path) for name in names)


def _age(seconds: float) -> str:
    return f"{seconds / _DAY_S:.0f} days" if seconds >= 2 * _DAY_S else f"{seconds / 3600:.1f} hours"
