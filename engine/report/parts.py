"""The rows of a run's report: written a part at a time, for one attempt or for many, and read from all parts."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import UsageError
from .part_files import layers_of, part_file, read_parts, write_file
from .rows import LayerRow, ModelRow
from .schema import to_rows, to_table

_ATTEMPT = re.compile(r"[\w.+-]+")


def write_part(run_folder: Path, model_row: ModelRow, layer_rows: Sequence[LayerRow], attempt_id: str) -> Path:
    """Write one attempt's rows, with ``attempt`` set to ``attempt_id``; see ``write_parts``."""
    return write_parts(run_folder, [(replace(model_row, attempt=attempt_id), layer_rows)])


def write_parts(run_folder: Path, attempts: Sequence[tuple[ModelRow, Sequence[LayerRow]]]) -> Path:
    """Write the rows of several attempts as one part, and return the file of the model rows.

    Layer rows get the ``attempt`` of their model row. The part lies in ``report/layers/`` and ``report/models/`` under
    one name of its own; the model rows come last and make the attempts count, all or none. Raises StorageError where
    the file system refuses, ValueError for an ``attempt`` that is no plain file name and for no attempts at all.
    """
    models = [model for model, _ in attempts]
    _check(models)
    layers = [_joined(row, model.attempt) for model, rows in attempts for row in rows]
    name = f"{uuid.uuid4().hex}.parquet"
    write_file(to_table(layers, LayerRow), part_file(run_folder, "layers", name))
    file = part_file(run_folder, "models", name)
    write_file(to_table(models, ModelRow), file)
    return file


def _check(models: Sequence[ModelRow]) -> None:
    if not models:
        raise ValueError("a part has at least one attempt, got none")
    for row in models:
        if not _ATTEMPT.fullmatch(row.attempt):
            raise ValueError(f"attempt_id {row.attempt!r}: expected letters, digits, '.', '_', '-' and '+'")


def _joined(row: LayerRow, attempt: str) -> LayerRow:
    return row if row.attempt == attempt else replace(row, attempt=attempt)


def read_models(run_folder: Path) -> list[ModelRow]:
    """Return the newest row of every task, by task; none yet gives an empty list.

    Of a task's rows the one with the latest ``finished_at`` counts. Raises UsageError naming the file where a part is
    torn or of another schema version, or the run is not there.
    """
    return _models(run_folder)[0]


def _models(run_folder: Path) -> tuple[list[ModelRow], list[str]]:
    """Return the newest rows and the names of the parts that were read."""
    if not run_folder.is_dir():
        raise UsageError(f"{run_folder}: no such run: give the folder of a run")
    parts = read_parts(run_folder, "models")
    newest: dict[str, ModelRow] = {}
    for row in to_rows(list(parts.values()), ModelRow):
        held = newest.get(row.task)
        if held is None or (row.finished_at, row.attempt) > (held.finished_at, held.attempt):
            newest[row.task] = row
    return [newest[task] for task in sorted(newest)], list(parts)


def read_layers(run_folder: Path) -> list[LayerRow]:
    """Return the layer rows that belong to the rows of ``read_models``, layers in execution order.

    Raises UsageError as ``read_models`` does, and where a part of layers is missing.
    """
    models, names = _models(run_folder)
    parts = read_parts(run_folder, "layers")
    for name in names:
        # a part without its layers was merged into another one, unless it still is there itself
        if name not in parts and part_file(run_folder, "models", name).exists():
            file = part_file(run_folder, "layers", name)
            raise UsageError(f"{file}: part of the report is missing: run the job again")
    rows = to_rows(layers_of(parts, [(row.task, row.attempt) for row in models]), LayerRow)
    return sorted(rows, key=lambda row: row.task)
