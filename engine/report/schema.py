"""The Parquet schemas of a report, made from the columns of rows.py, and rows as Arrow tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from operator import attrgetter
from typing import Any, Literal, TypeVar, get_args, get_origin

import pyarrow as pa

from ..errors import UsageError
from .rows import LayerRow, ModelRow, Row, columns_of

SCHEMA_VERSION = 3
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
    return _SCHEMAS[row_type]


def _make_schema(row_type: type[Row]) -> pa.Schema:
    columns = [
        pa.field(item.name, _arrow_type(item.kind), item.nullable, {"text": item.column.text, "unit": item.column.unit})
        for item in columns_of(row_type)
    ]
    return pa.schema(columns, {_VERSION_KEY: str(SCHEMA_VERSION).encode()})


_SCHEMAS: dict[type[Row], pa.Schema] = {row_type: _make_schema(row_type) for row_type in (ModelRow, LayerRow)}
"""Made once: that takes as long as reading a part."""


def to_table(rows: Sequence[Row], row_type: type[Row]) -> pa.Table:
    """Return ``rows``, all of ``row_type``, as a table; a float that is infinite or no number becomes null."""
    schema = schema_of(row_type)
    arrays = [pa.array(_values(rows, item), item.type) for item in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


def _values(rows: Sequence[Row], column: pa.Field) -> list[Any]:
    values = list(map(attrgetter(column.name), rows))
    return [_finite(value) for value in values] if pa.types.is_floating(column.type) else values


def _finite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else None


def check_schema(table: pa.Table, row_type: type[Row], file: object) -> None:
    """Raise UsageError naming ``file`` where ``table`` has another schema than that of ``row_type``."""
    version = (table.schema.metadata or {}).get(_VERSION_KEY, b"none").decode()
    if version != str(SCHEMA_VERSION):
        raise UsageError(
            f"{file}: report schema version {version}, this dfmpc reads {SCHEMA_VERSION}: "
            "read it with the dfmpc that wrote it, or run the job again"
        )
    if not table.schema.equals(schema_of(row_type)):
        raise UsageError(f"{file}: its columns are not those of report schema {SCHEMA_VERSION}: run the job again")


def to_rows(tables: Sequence[pa.Table], row_type: type[SomeRow]) -> list[SomeRow]:
    """Return the rows of ``tables``, all of the schema of ``row_type``, one table after the other."""
    if not tables:
        return []
    # one conversion a column of all tables: a thousand tables of one row would take a thousand times forty
    whole = pa.concat_tables(tables).combine_chunks()
    columns = [_column_values(column) for column in whole.columns]
    return [row_type(*values) for values in zip(*columns, strict=True)]


def _column_values(column: pa.ChunkedArray) -> list[Any]:
    values: list[Any] = column.to_pylist()
    return [tuple(value) for value in values] if pa.types.is_list(column.type) else values
