"""The Parquet parts of a run's report: one an attempt, written whole or not at all."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..artifact.storage import write_atomically
from ..errors import UsageError
from .rows import LayerRow, ModelRow
from .schema import SomeRow, from_table, to_table


def write_part(run_folder: Path, model_row: ModelRow, layer_rows: Sequence[LayerRow], attempt_id: str) -> Path:
    """Write one attempt's rows, with ``attempt`` set to ``attempt_id``, and return the file of the model row.

    Parts lie in ``report/layers/`` and ``report/models/`` under one name; the model row comes last and makes the
    attempt count. Raises StorageError where the file system refuses, ValueError for an ``attempt_id`` that is no
    plain file name.
    """
    if not re.fullmatch(r"[\w.+-]+", attempt_id):
        raise ValueError(f"attempt_id {attempt_id!r}: expected letters, digits, '.', '_', '-' and '+'")
    layers = to_table([replace(row, attempt=attempt_id) for row in layer_rows], LayerRow)
    model = to_table([replace(model_row, attempt=attempt_id)], ModelRow)
    _write(layers, run_folder / "report" / "layers" / _part_name(model_row.task, attempt_id))
    return _write(model, run_folder / "report" / "models" / _part_name(model_row.task, attempt_id))


def read_models(run_folder: Path) -> list[ModelRow]:
    """Return the newest row of every task, by task; none yet gives an empty list.

    Of a task's rows the one with the latest ``finished_at`` counts. Raises UsageError naming the file where a part is
    torn or of another schema version, or the run is not there.
    """
    if not run_folder.is_dir():
        raise UsageError(f"{run_folder}: no such run: give the folder of a run")
    newest: dict[str, ModelRow] = {}
    for file in sorted((run_folder / "report" / "models").glob("*.parquet")):
        for row in _read(file, ModelRow):
            held = newest.get(row.task)
            if held is None or (row.finished_at, row.attempt) > (held.finished_at, held.attempt):
                newest[row.task] = row
    return [newest[task] for task in sorted(newest)]


def read_layers(run_folder: Path) -> list[LayerRow]:
    """Return the layer rows that belong to the rows of ``read_models``, layers in execution order.

    Raises UsageError as ``read_models`` does, and where a part of layers is missing.
    """
    rows: list[LayerRow] = []
    for model in read_models(run_folder):
        rows += _read(run_folder / "report" / "layers" / _part_name(model.task, model.attempt), LayerRow)
    return rows


def _part_name(task: str, attempt_id: str) -> str:
    return f"{hashlib.sha256(task.encode()).hexdigest()[:16]}-{attempt_id}.parquet"


def _write(table: pa.Table, file: Path) -> Path:
    content = io.BytesIO()
    pq.write_table(table, content, compression="zstd")
    write_atomically(file, content.getvalue())
    return file


def _read(file: Path, row_type: type[SomeRow]) -> list[SomeRow]:
    try:
        with pq.ParquetFile(file) as part:
            table = part.read()
    except FileNotFoundError as error:
        raise UsageError(f"{file}: part of the report is missing: run the job again") from error
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{file}: torn or unreadable part of the report ({error}): remove it, run again") from error
    return from_table(table, row_type, file)
