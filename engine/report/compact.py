"""Merging the parts of a report into one, beside readers and beside others who do the same.

The merged part is named by the digest of its content and written before anything is removed, and it holds every row of
what is removed. So wherever this is killed there are at worst equal rows in two parts, which readers count once, and
two who merge the same parts write the same file.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from ..artifact.storage import fsync_folder, storing, write_atomically
from ..errors import UsageError
from .part_files import ROWS, Kind, attempts_of, in_threads, layers_of, parquet_bytes, part_file, part_names, read_part
from .rows import LayerRow
from .schema import schema_of

_MERGED = "merged-"
_LEFT_S = 3600
"""Age of layers without model rows at which nobody is about to write those."""


@dataclass(frozen=True)
class _Parts:
    """Rows by the name of their part. ``lone`` are layers whose model rows are in another part."""

    models: Mapping[str, pa.Table]
    layers: Mapping[str, pa.Table]
    lone: Mapping[str, pa.Table]


def compact(run_folder: Path, note: Callable[[str], None] = lambda _: None) -> int:
    """Merge all parts of the report of ``run_folder`` into one; return how many went into it, 0 where all is one.

    A part that is torn, of another schema or without its layers is left as it is and told to ``note``, a sentence each.
    Raises StorageError where the file system refuses; the report is then whole, with more parts than needed.
    """
    names = part_names(run_folder, "models")
    if len(names) < 2 and part_names(run_folder, "layers") == names:
        return 0
    parts = _read(run_folder, names, note)
    if not parts.models or len(parts.models) + len(parts.lone) < 2:
        return 0
    merged = _write(run_folder, parts)
    old = [name for name in (*parts.models, *parts.lone) if name != merged]
    _remove(run_folder, old)
    return len(old)


def _read(run_folder: Path, names: list[str], note: Callable[[str], None]) -> _Parts:
    models = _tables(run_folder, "models", names, note)
    layers = _tables(run_folder, "layers", list(models), note)
    for name in models.keys() - layers.keys():
        file = part_file(run_folder, "layers", name)
        if part_file(run_folder, "models", name).exists() and not file.exists():
            note(f"{file}: part of the report is missing: its model rows are left as they are")
    models = {name: table for name, table in models.items() if name in layers}
    known = {pair for table in models.values() for pair in attempts_of(table)}
    others = [name for name in part_names(run_folder, "layers") if not part_file(run_folder, "models", name).exists()]
    lone = _tables(run_folder, "layers", [name for name in others if name not in layers], note)
    return _Parts(
        models, layers, {name: table for name, table in lone.items() if _is_left(run_folder, name, table, known)}
    )


def _tables(run_folder: Path, kind: Kind, names: list[str], note: Callable[[str], None]) -> dict[str, pa.Table]:
    """Return what can be read; what is gone was merged by somebody who is ahead of us."""

    def read(name: str) -> pa.Table | None:
        try:
            return read_part(part_file(run_folder, kind, name), ROWS[kind])
        except UsageError as error:
            note(f"not merged with the rest of the report: {error}")
            return None

    found = zip(names, in_threads(read, names), strict=True)
    return {name: table for name, table in found if table is not None}


def _is_left(run_folder: Path, name: str, layers: pa.Table, known: set[tuple[str, str]]) -> bool:
    """Tell whether layers without model rows are what a killed merge left, not what is followed by its model rows.

    The attempts of a writer at work are known to nobody else; those of another merge are, so its layers need their age.
    """
    if not known.issuperset(attempts_of(layers)):
        return False
    if layers.num_rows and not name.startswith(_MERGED):
        return True
    try:
        return time.time() - part_file(run_folder, "layers", name).stat().st_mtime > _LEFT_S
    except FileNotFoundError:
        return False


def _write(run_folder: Path, parts: _Parts) -> str:
    """Write all rows as one part, layers first, and return its name."""
    models = _distinct(pa.concat_tables(parts.models.values()))
    layers = layers_of({**parts.layers, **parts.lone}, attempts_of(models))
    both = pa.concat_tables(layers) if layers else schema_of(LayerRow).empty_table()
    content: dict[Kind, bytes] = {
        "layers": parquet_bytes(both.sort_by([("task", "ascending"), ("attempt", "ascending")])),
        "models": parquet_bytes(models),
    }
    name = f"{_MERGED}{hashlib.sha256(content['layers'] + content['models']).hexdigest()[:32]}.parquet"
    if name not in parts.models:
        for kind, data in content.items():
            file = part_file(run_folder, kind, name)
            write_atomically(file, data)
            with storing(file):
                fsync_folder(file.parent)
    return name


def _distinct(models: pa.Table) -> pa.Table:
    """Return the rows in order of task and time, equal ones once."""
    order = [(name, "ascending") for name in ("task", "finished_at", "attempt", "status")]
    models = models.sort_by(order).combine_chunks()
    seen: set[tuple[object, ...]] = set()
    mask = []
    for row in zip(*(models.column(name).to_pylist() for name, _ in order), strict=True):
        mask.append(row not in seen)
        seen.add(row)
    return models.filter(pa.array(mask))


def _remove(run_folder: Path, names: list[str]) -> None:
    """Remove merged parts, each one's layers last; what is gone already somebody else has merged."""
    for name in names:
        for file in (part_file(run_folder, "models", name), part_file(run_folder, "layers", name)):
            with storing(file):
                file.unlink(missing_ok=True)
