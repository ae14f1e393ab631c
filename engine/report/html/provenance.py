"""Where a run's figures come from: versions, devices, keys, and the commands that make them again."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from ..rows import ModelRow
from ..schema import SCHEMA_VERSION
from ..verdict import RunFacts
from .pieces import text


def provenance(rows: Sequence[ModelRow], facts: RunFacts) -> str:
    """Return what the run was, with which versions and devices, every task's key, and how to do it again."""
    items = {
        "Job": facts.job,
        "Run": facts.run,
        "Ended": max((f"{row.finished_at:%Y-%m-%d %H:%M:%S} UTC" for row in rows), default=""),
        "dfmpc": _all(row.dfmpc_version for row in rows),
        "torch": _all(row.torch_version for row in rows),
        "Devices": _all(row.device for row in rows),
        "Measured on": _all(f"{row.images} {row.measured_on}" for row in rows if row.measured_on),
        "Report schema": str(SCHEMA_VERSION),
    }
    facts_list = "".join(f"<dt>{name}</dt><dd>{text(value)}</dd>" for name, value in items.items() if value)
    return (
        f'<section id="provenance"><h2>Provenance</h2><div class="card"><dl>{facts_list}</dl>'
        f'<p class="quiet">The same again, from the file of the job:</p><pre tabindex="0">{text(_command(facts))}</pre>'
        f"<details><summary>Keys and artifacts</summary>{_keys(rows)}</details></div></section>"
    )


def _all(values: Iterable[str | None]) -> str:
    return ", ".join(sorted({value for value in values if value}))


def _command(facts: RunFacts) -> str:
    again = f"dfmpc run {facts.job}.yaml --output {shlex.quote(facts.store)}"
    return f"{again}\ndfmpc report {shlex.quote(facts.run)} --html report.html"


def _keys(rows: Sequence[ModelRow]) -> str:
    heads = "".join(
        f'<th scope="col" class="txt">{name}</th>' for name in ("Task", "Recipe", "Calibrator", "Key", "Artifact")
    )
    lines = []
    for row in rows:
        values = (row.task, row.recipe or row.method, row.calibrator or "", (row.key or "")[:12], row.artifact or "")
        lines.append("<tr>" + "".join(f'<td class="txt">{text(value)}</td>' for value in values) + "</tr>")
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="Keys">{table}</div>'
