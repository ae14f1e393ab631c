"""A report's rows for people (plain text) and for programs (JSON)."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, TypeVar

from .rows import LayerRow, ModelRow, Row

WIDTH = 120
"""Columns of a terminal that a table of models keeps to, by shortening its longest texts."""
_MIB = 2**20
_GAP = "  "
_LEAST = 8


@dataclass(frozen=True)
class TableColumn:
    """Title (lines separated by a newline, units included) and alignment of a column."""

    title: str
    right: bool = True


@dataclass(frozen=True)
class Table:
    """Cells as text; ``notes`` are lines below the table, ``width`` the columns it must fit or None."""

    columns: tuple[TableColumn, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    width: int | None = None


SomeRow = TypeVar("SomeRow", ModelRow, LayerRow)
_Cell = tuple[TableColumn, Callable[[SomeRow], str]]


def models_table(rows: Sequence[ModelRow]) -> Table:
    """Return a task a row; columns that are empty throughout are left out; notes explain failures and gates."""
    cells: list[_Cell[ModelRow]] = [
        (TableColumn("model", right=False), lambda row: row.model),
        (TableColumn("plan", right=False), lambda row: row.bit_plan),
        (TableColumn("status", right=False), lambda row: row.status),
        (TableColumn("MiB\nbefore"), lambda row: _number(row.bytes_before, 2, _MIB)),
        (TableColumn("MiB\nafter"), lambda row: _number(row.bytes_after, 2, _MIB)),
        (TableColumn("ratio"), lambda row: _number(row.ratio, 2)),
        (TableColumn("bits a\nweight"), lambda row: _number(row.bits_per_weight, 2)),
        (TableColumn("top-1 %\nbefore"), lambda row: _number(row.top1_before, 2)),
        (TableColumn("top-1 %\nafter"), lambda row: _number(row.top1_after, 2)),
        (TableColumn("top-5 %\nbefore"), lambda row: _number(row.top5_before, 2)),
        (TableColumn("top-5 %\nafter"), lambda row: _number(row.top5_after, 2)),
        (TableColumn("agree"), lambda row: _number(row.agreement, 3)),
        (TableColumn("logit\nSQNR\ndB"), lambda row: _number(row.logit_sqnr_db, 1)),
        (TableColumn("gate", right=False), lambda row: "" if row.gate in (None, "none") else str(row.gate)),
        (TableColumn("time\ns"), lambda row: _number(_seconds(row), 1)),
    ]
    notes = [note for row in rows for note in _notes(row)] + _unchecked_gates(rows)
    return _table(rows, cells, tuple(notes), WIDTH)


def layers_table(rows: Sequence[LayerRow]) -> Table:
    """Return a layer a row; the task is a column where there are several."""
    several = len({row.task for row in rows}) > 1
    cells: list[_Cell[LayerRow]] = [
        (TableColumn("task", right=False), lambda row: row.task if several else ""),
        (TableColumn("layer", right=False), lambda row: row.name),
        (TableColumn("role", right=False), lambda row: row.role),
        (TableColumn("shape", right=False), lambda row: "x".join(map(str, row.shape))),
        (TableColumn("bits"), lambda row: _number(row.bits, 0)),
        (TableColumn("grid", right=False), lambda row: row.grid or ""),
        (TableColumn("scale a", right=False), lambda row: row.granularity or ""),
        (TableColumn("weights\nSQNR dB"), lambda row: _number(row.sqnr_db, 1)),
        (TableColumn("zeros\n%"), lambda row: _number(row.sparsity, 1, 0.01)),
        (TableColumn("c\nmin"), lambda row: _number(row.c_min, 3)),
        (TableColumn("c\nmean"), lambda row: _number(row.c_mean, 3)),
        (TableColumn("c\nmax"), lambda row: _number(row.c_max, 3)),
        (TableColumn("dead"), lambda row: _number(row.dead_channels, 0)),
        (TableColumn("folded", right=False), lambda row: {None: "", True: "yes", False: "no"}[row.folded]),
        (TableColumn("BN shift\nold sd"), lambda row: _number(row.norm_shift, 3)),
        (TableColumn("time\nms"), lambda row: _number(row.seconds, 1, 0.001)),
        (TableColumn("partners or reason", right=False), lambda row: row.reason or ", ".join(row.partners)),
    ]
    return _table(rows, cells, (), None)


def render(table: Table) -> str:
    """Return ``table`` as aligned text without trailing blanks or a final newline."""
    titles = [column.title.split("\n") for column in table.columns]
    depth = max((len(title) for title in titles), default=0)
    heads = [[title[i - depth] if i >= depth - len(title) else "" for title in titles] for i in range(depth)]
    widths = _widths(table, heads)
    lines = [*heads, ["-" * width for width in widths], *table.rows]
    text = [_line(line, widths, table.columns) for line in lines] if table.columns else []
    return "\n".join([*text, *([""] if text and table.notes else []), *table.notes])


def to_json(rows: Sequence[Row]) -> str:
    """Return ``rows`` as a JSON array of objects with the names of the Parquet columns; times are ISO 8601."""
    return json.dumps([{name: _plain(value) for name, value in asdict(row).items()} for row in rows], indent=1)


def summary(rows: Sequence[ModelRow]) -> str:
    """Return counts by status, sizes in all and counts by gate, a line each."""
    counts = Counter(row.status for row in rows)
    lines = [
        f"{counted(len(rows), 'task')}: " + (", ".join(f"{counts[name]} {name}" for name in sorted(counts)) or "none")
    ]
    sized = [(row.bytes_before, row.bytes_after) for row in rows if row.bytes_before and row.bytes_after]
    if sized:
        before, after = (sum(sizes) / _MIB for sizes in zip(*sized, strict=True))
        lines.append(f"{before:.2f} MiB before, {after:.2f} MiB after ({before / after:.2f} times smaller)")
    gates = Counter(row.gate for row in rows if row.gate in ("pass", "warn", "fail"))
    if gates:
        lines.append("gates: " + ", ".join(f"{gates[name]} {name}" for name in ("pass", "warn", "fail") if gates[name]))
    return "\n".join(lines)


def counted(number: int, noun: str) -> str:
    """Return ``number`` and ``noun``, in the plural where that is due: 1 task, 2 tasks."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _table(
    rows: Sequence[SomeRow], cells: Sequence[_Cell[SomeRow]], notes: tuple[str, ...], width: int | None
) -> Table:
    texts = [[show(row) for row in rows] for _, show in cells]
    used = [index for index, column in enumerate(texts) if any(column)]
    body = tuple(tuple(texts[index][number] for index in used) for number in range(len(rows)))
    return Table(tuple(cells[index][0] for index in used), body, notes, width)


def _notes(row: ModelRow) -> list[str]:
    notes = []
    if row.error_class:
        first = (row.error or "").strip().split("\n", 1)[0]
        notes.append(f"{row.task} {row.status}: {row.error_class}: {first}")
    if row.gate == "fail":
        notes.append(f"{row.task} gate closed: {row.gate_reason or 'no reason given'}")
    if row.gate == "warn":
        notes.append(f"{row.task} gate warns: {row.gate_reason or 'no reason given'}")
    return notes


def _unchecked_gates(rows: Sequence[ModelRow]) -> list[str]:
    """Return why bounds could not be checked, a line a distinct reason; else they would look kept."""
    counts = Counter(row.gate_reason for row in rows if row.gate in ("none", "pass") and row.gate_reason)
    return [f"gate of {counted(count, 'task')}: {reason}" for reason, count in counts.items()]


def _number(value: float | None, decimals: int, unit: float = 1) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value / unit:.{decimals}f}"


def _seconds(row: ModelRow) -> float | None:
    spent = [value for value in (row.read_s, row.compress_s, row.write_s, row.evaluate_s) if value is not None]
    return sum(spent) if spent else None


def _widths(table: Table, heads: Sequence[Sequence[str]]) -> list[int]:
    lines = [*heads, *table.rows]
    widths = [max(len(line[index]) for line in lines) for index in range(len(table.columns))]
    texts = [index for index, column in enumerate(table.columns) if not column.right]
    while table.width is not None and texts and sum(widths) + len(_GAP) * (len(widths) - 1) > table.width:
        longest = max(texts, key=lambda index: widths[index])
        if widths[longest] <= _LEAST:
            break
        widths[longest] -= 1
    return widths


def _line(line: Sequence[str], widths: Sequence[int], columns: Sequence[TableColumn]) -> str:
    cells = []
    for text, width, column in zip(line, widths, columns, strict=True):
        shown = text if len(text) <= width else text[: width - 1] + "…"
        cells.append(shown.rjust(width) if column.right else shown.ljust(width))
    return _GAP.join(cells).rstrip()


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return None if isinstance(value, float) and not math.isfinite(value) else value
