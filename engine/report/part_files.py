"""The files of a report: read while others write and merge them, written whole or not at all.

A part is a pair of files of one name, ``report/layers/NAME`` and ``report/models/NAME``. Layers are written first and
removed last, so that whoever sees a model row finds its layers, here or in the part that they were merged into.
"""

from __future__ import annotations

import errno
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ..artifact.storage import write_atomically
from ..errors import UsageError
from .rows import LayerRow, ModelRow, Row
from .schema import check_schema

Kind = Literal["models", "layers"]
ROWS: Mapping[Kind, type[Row]] = {"models": ModelRow, "layers": LayerRow}

_Found = TypeVar("_Found")
_GONE = {errno.ENOENT, errno.ESTALE}
_LISTINGS = 32
_SMALL_BYTES = 1 << 18
_FEW = 16
_THREADS = min(4, os.cpu_count() or 1)


def part_file(run_folder: Path, kind: Kind, name: str) -> Path:
    """Return where the part ``name`` has its rows of ``kind``."""
    return run_folder / "report" / kind / name


def part_names(run_folder: Path, kind: Kind) -> list[str]:
    """Return the names of the parts that have rows of ``kind``, in order; what is being written has none yet.

    Raises UsageError where the folder cannot be read.
    """
    folder = run_folder / "report" / kind
    try:
        entries = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(f"{folder} cannot be read ({error.strerror}): check its rights") from error
    return sorted(name for name in entries if name.endswith(".parquet") and not name.startswith("."))


def read_parts(run_folder: Path, kind: Kind) -> dict[str, pa.Table]:
    """Return the rows of every part by its name.

    A part that vanishes was merged into another one, which the next listing shows; so it is listed until nothing is
    new. Raises UsageError naming a part that is torn or of another schema, or where parts never stop vanishing.
    """
    seen: dict[str, pa.Table | None] = {}
    for _ in range(_LISTINGS):
        new = [name for name in part_names(run_folder, kind) if name not in seen]
        read = dict(zip(new, _read_each(run_folder, kind, new), strict=True))
        seen |= read
        if not new:
            break
    else:  # new parts of a run at work end nothing; one that was merged away may be missing from what was read
        if None in read.values():
            raise UsageError(f"{run_folder / 'report' / kind}: parts keep vanishing while they are read: try again")
    return {name: table for name, table in seen.items() if table is not None}


def _read_each(run_folder: Path, kind: Kind, names: Sequence[str]) -> list[pa.Table | None]:
    return in_threads(lambda name: read_part(part_file(run_folder, kind, name), ROWS[kind]), names)


def in_threads(read: Callable[[str], _Found], names: Sequence[str]) -> list[_Found]:
    """Return ``read`` of every name, in order; several at a time where there are many."""
    if len(names) < _FEW:
        return [read(name) for name in names]
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(read, names))


def read_part(file: Path, row_type: type[Row]) -> pa.Table | None:
    """Return the rows of one file, None where it is gone; UsageError where it is torn or of another schema."""
    try:
        with pq.ParquetFile(pa.BufferReader(file.read_bytes()), pre_buffer=False) as part:
            table = part.read(use_threads=False)
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno in _GONE:
            return None
        raise UsageError(f"{file}: torn or unreadable part of the report ({error}): remove it, run again") from error
    check_schema(table, row_type, file)
    return table


def write_file(table: pa.Table, file: Path) -> None:
    """Write ``table`` whole or not at all; StorageError where the file system refuses."""
    write_atomically(file, parquet_bytes(table))


def parquet_bytes(table: pa.Table) -> bytes:
    """Return ``table`` as a Parquet file; the same rows give the same bytes."""
    content = io.BytesIO()
    # Forty columns of a few rows take three times as long with zstd and come out no smaller.
    small = table.nbytes < _SMALL_BYTES
    pq.write_table(table, content, compression="none" if small else "zstd", use_dictionary=not small)
    return content.getvalue()


def attempts_of(table: pa.Table) -> list[tuple[str, str]]:
    """Return task and attempt of every row."""
    tasks, attempts = (table.column(name).to_pylist() for name in ("task", "attempt"))
    return list(zip(tasks, attempts, strict=True))


def layers_of(parts: Mapping[str, pa.Table], wanted: Iterable[tuple[str, str]]) -> list[pa.Table]:
    """Return the layer rows of the ``wanted`` (task, attempt) pairs; an attempt in several parts counts in one."""
    keep = set(wanted)
    rows = {name: attempts_of(table) for name, table in parts.items()}
    holder: dict[tuple[str, str], tuple[int, str]] = {}
    for name, pairs in rows.items():
        for pair, count in Counter(pairs).items():
            if pair in keep:
                holder[pair] = max(holder.get(pair, (0, "")), (count, name))
    found = []
    for name, pairs in rows.items():
        mask = [pair in keep and holder[pair][1] == name for pair in pairs]
        if any(mask):
            found.append(parts[name] if all(mask) else parts[name].filter(pa.array(mask)))
    return found
