"""What the end of a run says of publishing and of models that are gone, in lines for people."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..report.rows import ModelRow
from ..report.tables import counted
from .store import Store
from .vanished import Vanished

_SHOWN = 8


def ending_lines(
    store: Path,
    rows: Sequence[ModelRow],
    published: Sequence[str],
    unpublished: str,
    vanished: Vanished,
    registered: Sequence[str] = (),
) -> list[str]:
    """Return a line on the pointers of ``store`` and, where there is cause, on gates, MLflow and vanished models."""
    held = [row.task for row in rows if row.gate == "fail"]
    moved = f"{counted(len(published), 'pointer')} moved"
    lines = [f"latest:    {Store(store).latest} ({moved}{f', {len(held)} held back by gates' if held else ''})"]
    if registered:
        lines.append(f"mlflow:    {counted(len(registered), 'version')} registered: {_few(registered)}")
    if unpublished:
        lines.append(f"not published: {unpublished}")
    if vanished.models:
        gone = f"{counted(len(vanished.models), 'model')} of run {vanished.previous} {_verb(vanished)} gone"
        lines.append(f"{gone}: {_few(vanished.models)}; what was made of them stays")
    return lines


def _verb(vanished: Vanished) -> str:
    return "is" if len(vanished.models) == 1 else "are"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", … ({len(names)} in all)" if len(names) > _SHOWN else "")
