"""What the end of a run says of publishing and of models that are gone, in lines for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..report.tables import counted
from .store import Store
from .summary import RunSummary
from .vanished import Vanished

_SHOWN = 8


def ending_lines(store: Path, ended: RunSummary) -> list[str]:
    """Return where artifacts, report and pointers are and, where there is cause, what of MLflow and vanished models."""
    vanished, registered = ended.vanished, ended.registered
    held = [row.task for row in ended.rows if row.gate == "fail"]
    moved = f"{counted(len(ended.published), 'pointer')} moved"
    lines = [f"artifacts: {store / 'artifacts'}", f"report:    {ended.run / 'report'}"]
    lines += [f"latest:    {Store(store).latest} ({moved}{f', {len(held)} held back by gates' if held else ''})"]
    if registered:
        lines.append(f"mlflow:    {counted(len(registered), 'version')} registered: {_few(registered)}")
    if ended.unpublished:
        lines.append(f"not published: {ended.unpublished}")
    if vanished.models:
        gone = f"{counted(len(vanished.models), 'model')} of run {vanished.previous} {_verb(vanished)} gone"
        lines.append(f"{gone}: {_few(vanished.models)}; what was made of them stays")
    return lines


def _verb(vanished: Vanished) -> str:
    return "is" if len(vanished.models) == 1 else "are"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", … ({len(names)} in all)" if len(names) > _SHOWN else "")
