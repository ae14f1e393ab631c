"""A run as Markdown, for a pull request or a mail: how it went, every task, the worst first, what failed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from .rows import ModelRow
from .tables import counted
from .verdict import RunFacts, Totals, duration, headline, size, top1_drop, totals, worst_first

_MARKUP = re.compile(r"([\\`*_{}\[\]()<>#+|~!&@$])")
_MIB = 2**20
_SIGNS = {"good": "✅", "warn": "⚠️", "bad": "❌"}
_COLUMNS: tuple[tuple[str, str, Callable[[ModelRow], str]], ...] = (
    ("task", ":--", lambda row: plain(row.task)),
    ("status", ":--", lambda row: row.status),
    ("gate", ":--", lambda row: "" if row.gate in (None, "none") else str(row.gate)),
    ("MiB before", "--:", lambda row: _number(row.bytes_before, 2, _MIB)),
    ("MiB after", "--:", lambda row: _number(row.bytes_after, 2, _MIB)),
    ("ratio", "--:", lambda row: _number(row.ratio, 2)),
    ("top-1 % before", "--:", lambda row: _number(row.top1_before, 2)),
    ("top-1 % after", "--:", lambda row: _number(row.top1_after, 2)),
    ("drop", "--:", lambda row: _number(top1_drop(row), 2)),
    ("agreement", "--:", lambda row: _number(row.agreement, 3)),
)


def to_markdown(facts: RunFacts, rows: Sequence[ModelRow]) -> str:
    """Return the page, which ends with a newline; names and messages are escaped, so that none becomes markup."""
    found = totals(rows)
    mood, said = headline(found, facts.rest)
    parts = [f"## {_SIGNS[mood]} {plain(facts.job)}: {plain(said)}", _totals(found, facts)]
    if rows:
        parts.append(_table(worst_first(rows)))
    parts += [*_failures(rows, facts), *_gates(rows), *_rest(facts), f"Run: {_code(facts.run)}"]
    return "\n\n".join(parts) + "\n"


def plain(text: str) -> str:
    """Return ``text`` on one line, with whatever Markdown or HTML would read as markup escaped."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))


def _code(text: str) -> str:
    """Return ``text`` as code on one line, whatever backticks it has."""
    text = " ".join(text.split())
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{ticks}{space}{text}{space}{ticks}"


def _totals(found: Totals, facts: RunFacts) -> str:
    counts = ", ".join(f"{number} {name}" for name, number in sorted(found.statuses.items()))
    lines = [f"- {counted(found.models, 'model')}, {counted(found.tasks, 'task')}: {counts or 'none'}"]
    if found.ratio is not None:
        sizes = f"{size(found.bytes_before)} → {size(found.bytes_after)}"
        lines.append(f"- {sizes} ({found.ratio:.2f} times smaller; a model counts once a task)")
    if (drop := found.worst_drop) is not None:
        lines.append(f"- largest loss of top-1: {drop.value:.2f} points, {plain(drop.task)}")
    if (agreed := found.worst_agreement) is not None:
        lines.append(f"- least agreement without labels: {agreed.value:.3f}, {plain(agreed.task)}")
    if found.gates:
        lines.append("- gates: " + ", ".join(f"{number} {name}" for name, number in sorted(found.gates.items())))
    if facts.wall_s is not None:
        lines.append(f"- wall time: {duration(facts.wall_s)}")
    return "\n".join(lines)


def _table(rows: Sequence[ModelRow]) -> str:
    """Return a task a row; columns that are empty throughout are left out."""
    cells = [[show(row) for row in rows] for _, _, show in _COLUMNS]
    used = [index for index, column in enumerate(cells) if any(column)]
    head = [[_COLUMNS[index][0] for index in used], [_COLUMNS[index][1] for index in used]]
    lines = [*head, *([cells[index][number] for index in used] for number in range(len(rows)))]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _failures(rows: Sequence[ModelRow], facts: RunFacts) -> list[str]:
    parts = []
    for row in (row for row in worst_first(rows) if row.error_class):
        tried = f", tried {counted(row.attempts, 'time')}" if row.attempts and row.attempts > 1 else ""
        kind = f" ({plain(row.failure)}{tried})" if row.failure else ""
        said = plain((row.error or "").strip().split("\n", 1)[0])
        parts.append(f"**{plain(row.task)}** {row.status}{kind}: {plain(row.error_class or '')}: {said}")
        if tail := facts.log_tails.get(row.task):
            parts.append("\n".join(f"    {line}" for line in tail))
    return ["### Failures", *parts] if parts else []


def _gates(rows: Sequence[ModelRow]) -> list[str]:
    told = [row for row in worst_first(rows) if row.gate in ("fail", "warn")]
    lines = [f"- {row.gate}: {plain(row.task)}: {plain(row.gate_reason or 'no reason given')}" for row in told]
    return ["### Gates", "\n".join(lines)] if lines else []


def _rest(facts: RunFacts) -> list[str]:
    lines = [f"- {status}: {', '.join(map(plain, tasks))}" for status, tasks in facts.rest.items() if tasks]
    return ["### Without a result", "\n".join(lines)] if lines else []


def _number(value: float | None, decimals: int, unit: float = 1) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value / unit:.{decimals}f}"
