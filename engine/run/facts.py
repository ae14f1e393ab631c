"""What a report's page tells of a run beside its rows: how long it took, what has no result, and the ends of logs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime

from ..report.html.histograms import HistogramSource, ModelHistograms, histograms
from ..report.rows import ModelRow
from ..report.verdict import RunFacts
from .ledger import Event, read_events
from .status import read_status
from .store import RunFolder

_TAIL_BYTES = 16_384
_TAIL_LINES = 20
_MOST_TAILS = 200


def read_facts(run: RunFolder, rows: Sequence[ModelRow], tasks: Collection[str]) -> RunFacts:
    """Return the facts of ``run`` and of those of its tasks that are among ``tasks``; ``rows`` are theirs."""
    state = read_status(run.path)
    rest: dict[str, tuple[str, ...]] = {}
    for status in ("running", "interrupted", "waiting"):
        if names := tuple(task.task for task in state.tasks if task.status == status and task.task in tasks):
            rest[status] = names
    failed = [row for row in rows if row.error_class][:_MOST_TAILS]
    return RunFacts(
        run=str(run.path),
        job=state.job,
        store=str(run.store.root),
        wall_s=wall_seconds(read_events(run)),
        rest=rest,
        log_tails={row.task: tail for row in failed if (tail := _tail(run, row))},
    )


def wall_seconds(events: Iterable[Event]) -> float | None:
    """Return the seconds in which at least one process was at the run; None without events.

    A process counts from its first to its last event, so the days between a command and its resumption do not.
    """
    spans: dict[str, tuple[float, float]] = {}
    for event in events:
        at = datetime.fromisoformat(event.at).timestamp()
        first, last = spans.get(event.process, (at, at))
        spans[event.process] = (min(first, at), max(last, at))
    if not spans:
        return None
    total, until = 0.0, float("-inf")
    for first, last in sorted(spans.values()):
        total += max(0.0, last - max(first, until))
        until = max(until, last)
    return total


def _tail(run: RunFolder, row: ModelRow) -> tuple[str, ...]:
    log = run.log_file(row.model, row.bit_plan, row.attempt)
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ()
    return tuple([line for line in text.splitlines() if line.strip()][-_TAIL_LINES:])


def read_histograms(
    run: RunFolder, rows: Sequence[ModelRow], layers: dict[str, list[str]]
) -> dict[str, ModelHistograms]:
    """Return the histograms of ``layers`` (names by model) from the artifacts that ``rows`` name."""
    sources = {task.model.name: task.model for task in run.frozen().tasks}
    found = {}
    for model, names in layers.items():
        made = [
            HistogramSource(row.bit_plan, run.store.root / row.artifact)
            for row in rows
            if row.model == model and row.artifact is not None and row.status in ("done", "reused")
        ]
        found[model] = histograms(sources[model], made, names)
    return found
