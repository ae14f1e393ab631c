"""The Parquet schemas of a report, made from the columns of rows.py, and rows as Arrow tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime
from typing import Any, Literal, TypeVar, get_args, get_origin

import pyarrow as pa

from ..errors import UsageError
from .rows import LayerRow, ModelRow, Row, columns_of

SCHEMA_VERSION = 1
"""Bumped when a column changes, goes or comes; a test holds the columns of each version."""

_VERSION_KEY = b"dfmpc.schema_version"
_KINDS: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    datetime: pa.timestamp("us", tz="UTC"),
}
SomeRow = TypeVar("SomeRow", ModelRow, LayerRow)


def _arrow_type(kind: Any) -> pa.DataType:
    if get_origin(kind) is tuple:
        return pa.list_(_KINDS[get_args(kind)[0]])
    return _KINDS[str if get_origin(kind) is Literal else kind]


def schema_of(row_type: type[Row]) -> pa.Schema:
    """Return the schema of ``row_type``: descriptions and units in the fields' metadata, the version in its own."""
    columns = [
        pa.field(item.name, _arrow_type(item.kind), item.nullable, {"text": item.column.text, "unit": item.column.unit})
        for item in columns_of(row_type)
    ]
    return pa.schema(columns, {_VERSION_KEY: str(SCHEMA_VERSION).encode()})


def to_table(rows: Sequence[Row], row_type: type[Row]) -> pa.Table:
    """Return ``rows``, all of ``row_type``, as a table; a float that is infinite or no number becomes null."""
    schema = schema_of(row_type)
    arrays = [pa.array([_finite(getattr(row, item.name)) for row in rows], item.type) for item in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_table(table: pa.Table, row_type: type[SomeRow], file: object) -> list[SomeRow]:
    """Return the rows of ``table``. Raises UsageError naming ``file`` where it has another schema than ours."""
    version = (table.schema.metadata or {}).get(_VERSION_KEY, b"none").decode()
    if version != str(SCHEMA_VERSION):
        raise UsageError(
            f"{file}: report schema version {version}, this dfmpc reads {SCHEMA_VERSION}: "
            "read it with the dfmpc that wrote it, or run the job again"
        )
    if not table.schema.equals(schema_of(row_type)):
        raise UsageError(f"{file}: its columns are not those of report schema {SCHEMA_VERSION}: run the job again")
    lists = {item.name for item in fields(row_type) if pa.types.is_list(table.schema.field(item.name).type)}
    records: list[dict[str, Any]] = table.to_pylist()
    return [row_type(**{name: _plain(value, name in lists) for name, value in record.items()}) for record in records]


def _plain(value: Any, is_list: bool) -> Any:
    return tuple(value) if is_list else value
