"""Writing a run's report as a page: HTML for the morning, Markdown for a pull request or a mail."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..artifact.storage import write_atomically
from ..errors import UsageError
from ..job.expand import choose
from ..report.verdict import size
from ..run.facts import read_facts, read_histograms

if TYPE_CHECKING:
    from ..report.verdict import RunFacts
    from ..run.store import RunFolder
    from ..show import Report

STDOUT = Path("-")


@dataclass(frozen=True)
class Written:
    """A file and its size."""

    path: str
    bytes: int

    def to_text(self) -> str:
        """Return both on a line."""
        return f"{self.path}: {size(self.bytes)}"


def write_pages(
    run: RunFolder, found: Report, *, only: str | None, html: Path | None, markdown: Path | None, histograms: int
) -> list[Written]:
    """Write what is asked for of ``found``, the rows of the tasks that match ``only``, and return the files.

    ``histograms`` is for how many layers of every model, the worst, weights are counted. Raises UsageError where a
    file cannot lie there or the page's library is missing, StorageError where it cannot be written.
    """
    for file in (html, markdown):
        if file is not None and file != STDOUT and not file.absolute().parent.is_dir():
            raise UsageError(f"{file}: its folder does not exist: make it, or write elsewhere")
    facts = read_facts(run, found.models, {task.id for task in choose(run.frozen().tasks, only)})
    written: list[Written] = []
    if html is not None:
        written += _write(html, _html(run, facts, found, histograms))
    if markdown is not None:
        from ..report.markdown import to_markdown  # noqa: PLC0415

        written += _write(markdown, to_markdown(facts, found.models))
    return written


def _html(run: RunFolder, facts: RunFacts, found: Report, histograms: int) -> str:
    from ..report.html.drawn import worst_layers  # noqa: PLC0415
    from ..report.html.page import to_html  # noqa: PLC0415
    from ..report.html.plots import require_library  # noqa: PLC0415

    require_library()
    layers = found.layers or []
    chosen = {}
    for model in dict.fromkeys(row.model for row in layers) if histograms else ():
        worst = worst_layers([row for row in layers if row.model == model])
        chosen[model] = [row.name for row in worst[:histograms]]
    counted = read_histograms(run, found.models, chosen)
    return to_html(facts, found.models, layers, counted)


def _write(file: Path, content: str) -> list[Written]:
    if file == STDOUT:
        sys.stdout.write(content)
        return []
    data = content.encode("utf-8", "replace")
    write_atomically(file, data)
    return [Written(str(file), len(data))]
