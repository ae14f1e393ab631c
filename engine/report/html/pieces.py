"""The parts of the page that are plain HTML: tiles, the table of tasks, what needs attention, where it came from.

Every text from a job, a model or an error goes through ``text``; nothing else puts strings into markup.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from ..rows import LayerRow, ModelRow
from ..tables import counted
from ..verdict import RunFacts, Totals, duration, headline, size, task_seconds, top1_drop, worst_first

_MIB = 2**20
_LISTED = 8
"""Failures and gates that are shown without a click."""


def text(value: object) -> str:
    """Return ``value`` escaped for text and for attributes in double quotes."""
    return escape(str(value), quote=True)


def verdict(found: Totals, facts: RunFacts) -> str:
    """Return the line under the title that says how it went."""
    mood, said = headline(found, facts.rest)
    return f'<p class="verdict {mood}">{text(said[:1].upper() + said[1:])}</p>'


def tiles(found: Totals, facts: RunFacts) -> str:
    """Return the figures of the whole run."""
    parts = [_tile("Tasks", str(found.tasks), f"{_statuses(found)} · {counted(found.models, 'model')}")]
    if found.ratio is not None:
        sizes = f"{size(found.bytes_before)} → {size(found.bytes_after)}"
        parts.append(_tile("Smaller", f"{found.ratio:.2f} ×", sizes, "A model's bytes count once a task."))
    if (drop := found.worst_drop) is not None:
        parts.append(_tile("Largest top-1 loss", f"{drop.value:.2f} pt", drop.task))
    if (agreed := found.worst_agreement) is not None:
        parts.append(_tile("Least agreement", f"{100 * agreed.value:.1f} %", agreed.task, "Tasks without labels."))
    if found.gates:
        closed = found.gates.get("fail", 0)
        others = [f"{found.gates[name]} {said}" for name, said in _GATES.items() if name in found.gates]
        parts.append(_tile("Gates closed", str(closed), " · ".join(others), mood="bad" if closed else ""))
    if facts.wall_s is not None:
        parts.append(_tile("Wall time", duration(facts.wall_s), f"{duration(found.task_s)} in tasks"))
    return f'<ul class="tiles">{"".join(parts)}</ul>'


_GATES = {"pass": "passed", "warn": "warned"}


def _statuses(found: Totals) -> str:
    return ", ".join(f"{found.statuses[name]} {name}" for name in sorted(found.statuses)) or "none"


def _tile(title: str, value: str, note: str, hint: str = "", mood: str = "") -> str:
    tip = f' title="{text(hint)}"' if hint else ""
    return (
        f'<li class="tile {mood}"{tip}><span class="tile-title">{text(title)}</span>'
        f'<span class="tile-value">{text(value)}</span><span class="tile-note">{text(note)}</span></li>'
    )


class _Column(NamedTuple):
    title: str
    show: Callable[[ModelRow], str]
    value: Callable[[ModelRow], float | str | None]
    """What it is sorted by."""
    number: bool = True


def _numbers(title: str, value: Callable[[ModelRow], float | None], decimals: int) -> _Column:
    return _Column(title, lambda row: number(value(row), decimals), value)


def number(value: float | None, decimals: int) -> str:
    """Return ``value`` with so many decimals, nothing where it is not known or not finite."""
    return "" if value is None or not math.isfinite(value) else f"{value:.{decimals}f}"


def _mib(value: int | None) -> float | None:
    return None if value is None else value / _MIB


def _gate(row: ModelRow) -> str:
    return "" if row.gate in (None, "none") else str(row.gate)


_COLUMNS = (
    _Column("Model", lambda row: text(row.model), lambda row: row.model, number=False),
    _Column("Bit-plan", lambda row: text(row.bit_plan), lambda row: row.bit_plan, number=False),
    _Column("Status", lambda row: _badge(row.status, ""), lambda row: row.status, number=False),
    _Column("Gate", lambda row: _badge(_gate(row), row.gate_reason or ""), _gate, number=False),
    _numbers("MiB before", lambda row: _mib(row.bytes_before), 2),
    _numbers("MiB after", lambda row: _mib(row.bytes_after), 2),
    _numbers("Ratio", lambda row: row.ratio, 2),
    _numbers("Bits a weight", lambda row: row.bits_per_weight, 2),
    _numbers("Top-1 before", lambda row: row.top1_before, 2),
    _numbers("Top-1 after", lambda row: row.top1_after, 2),
    _numbers("Loss", top1_drop, 2),
    _numbers("Agreement", lambda row: row.agreement, 3),
    _numbers("KL, nats", lambda row: row.kl, 3),
    _numbers("Logit dB", lambda row: row.logit_sqnr_db, 1),
    _numbers("Time, s", task_seconds, 1),
)


def _badge(name: str, reason: str) -> str:
    tip = f' title="{text(reason)}"' if reason else ""
    return f'<span class="badge {text(name)}"{tip}>{text(name)}</span>' if name else ""


def task_table(rows: Sequence[ModelRow]) -> str:
    """Return a task a row, the worst first; columns that are empty throughout are left out."""
    used = [column for column in _COLUMNS if any(column.show(row) for row in rows)]
    heads = "".join(
        f'<th scope="col" aria-sort="none" class="{"num" if column.number else "txt"}">'
        f'<button type="button">{text(column.title)}</button></th>'
        for column in used
    )
    lines = "".join(_task_line(row, used) for row in worst_first(rows))
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Tasks"><table id="tasks">'
        f"<thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _task_line(row: ModelRow, columns: Sequence[_Column]) -> str:
    cells = []
    for index, column in enumerate(columns):
        tag, kind = ("th", ' scope="row"') if index == 0 else ("td", "")
        value = column.value(row)
        key = "" if value is None else text(value)
        shade = "num" if column.number else "txt"
        cells.append(f'<{tag}{kind} class="{shade}" data-v="{key}">{column.show(row)}</{tag}>')
    marks = f'data-status="{text(row.status)}" data-gate="{text(_gate(row))}"'
    return f'<tr data-text="{text(row.task.lower())}" {marks}>{"".join(cells)}</tr>'


def filters(rows: Sequence[ModelRow]) -> str:
    """Return the search field and a button for every status and gate that occurs in several kinds."""
    kinds = {"status": sorted({str(row.status) for row in rows}), "gate": sorted({_gate(row) for row in rows} - {""})}
    chips = "".join(
        f'<button type="button" class="chip" aria-pressed="false" data-kind="{kind}" data-name="{text(name)}">'
        f"{'gate ' if kind == 'gate' else ''}{text(name)}</button>"
        for kind, names in kinds.items()
        for name in names
    )
    return (
        '<div class="filters"><label>Find <input id="find" type="search" autocomplete="off" '
        'placeholder="model or bit-plan"></label>'
        f'<div class="chips" role="group" aria-label="Show only">{chips}</div>'
        '<p id="shown" aria-live="polite"></p></div>'
    )


def attention(rows: Sequence[ModelRow], facts: RunFacts) -> str:
    """Return failed tasks with the ends of their logs, closed and warned gates, and what has no result."""
    ordered = worst_first(rows)
    failures = [_failure(row, facts.log_tails.get(row.task, ())) for row in ordered if row.error_class]
    parts = [*failures[:_LISTED], _others(failures, "failures", "{}")]
    parts.append(_list("Gates", [*map(_gate_line, _broken(ordered)), *_unchecked(rows)]))
    for status, tasks in facts.rest.items():
        parts.append(_list(f"{len(tasks)} {status}", [f"<li>{text(task)}</li>" for task in tasks]))
    found = "".join(parts)
    return f'<section id="attention"><h2>Needs attention</h2>{found}</section>' if found else ""


def _broken(rows: Sequence[ModelRow]) -> list[ModelRow]:
    return [row for row in rows if row.gate in ("fail", "warn")]


def _gate_line(row: ModelRow) -> str:
    reason = text(row.gate_reason or "no reason given")
    return f"<li>{_badge(_gate(row), '')} <b>{text(row.task)}</b> {reason}</li>"


def _unchecked(rows: Sequence[ModelRow]) -> list[str]:
    reasons = Counter(row.gate_reason for row in rows if row.gate in ("none", "pass") and row.gate_reason)
    return [f'<li class="quiet">{counted(many, "task")}: {text(reason)}</li>' for reason, many in reasons.items()]


def _list(title: str, lines: Sequence[str]) -> str:
    """Return a card with the first lines, the others behind a click."""
    if not lines:
        return ""
    first = f'<ul class="plain">{"".join(lines[:_LISTED])}</ul>'
    return f'<div class="card"><h3>{text(title)}</h3>{first}{_others(lines, "lines", "<ul class=plain>{}</ul>")}</div>'


def _others(items: Sequence[str], what: str, frame: str) -> str:
    rest = items[_LISTED:]
    within = frame.replace("{}", "".join(rest))
    return f'<details class="others"><summary>{len(rest)} more {what}</summary>{within}</details>' if rest else ""


def _failure(row: ModelRow, tail: Sequence[str]) -> str:
    tried = f" · tried {counted(row.attempts, 'time')}" if row.attempts and row.attempts > 1 else ""
    kind = f" · {text(row.failure)}{tried}" if row.failure else ""
    log = f'<details><summary>End of its log</summary><pre tabindex="0">{text(chr(10).join(tail))}</pre></details>'
    return (
        f'<div class="card failure"><h3>{_badge(row.status, "")} {text(row.task)}</h3>'
        f'<p class="quiet">{text(row.error_class)}{kind}</p><p class="message">{text(row.error or "no message")}</p>'
        f"{log if tail else ''}</div>"
    )


def worst_table(rows: Sequence[LayerRow]) -> str:
    """Return a layer a row, in the order given: the bit-plan that hurts it most and what it did to the weights."""
    heads = ("Layer", "Bit-plan", "Shape", "Bits", "SQNR, dB", "Zeros, %", "Clipped, %", "Mean c")
    shades = ("txt", "txt", "txt", "num", "num", "num", "num", "num")
    head = "".join(f'<th scope="col" class="{shade}">{title}</th>' for title, shade in zip(heads, shades, strict=True))
    lines = []
    for row in rows:
        values = (
            row.name,
            row.bit_plan,
            " × ".join(map(str, row.shape)),
            number(row.bits, 0),
            number(row.sqnr_db, 2),
            number(None if row.sparsity is None else 100 * row.sparsity, 1),
            number(None if row.clipped_fraction is None else 100 * row.clipped_fraction, 2),
            number(row.c_mean, 3),
        )
        cells = (f'<td class="{shade}">{text(value)}</td>' for value, shade in zip(values, shades, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="Worst layers">{table}</div>'
