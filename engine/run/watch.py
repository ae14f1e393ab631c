"""``dfmpc status --watch``: a run as it goes, from another terminal."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from ..report.tables import Table, TableColumn, counted, render
from .status import RunStatus, TaskStatus, read_status
from .store import find_run

_MIB = 2**20
_SHOWN_FAILURES = 10
_HOME, _END_OF_LINE, _END_OF_SCREEN, _CLEAR = "\x1b[H", "\x1b[K", "\x1b[J", "\x1b[2J"
_NOBODY = "nobody is at this run: the same `dfmpc run` command resumes it"
_READING_SHARE = 10
"""Reading the ledgers of a huge run takes at most one part in so many of the time."""


def watch(path: Path, interval_s: float, out: TextIO, *, as_json: bool = False) -> None:
    """Show the run at ``path`` until it is finished, nobody is at it any more, or Ctrl-C.

    It is redrawn on a terminal, else a line is written for every change, and the last one says which end it was.
    ``path`` is a run's folder, or a store, which means the run that is its newest now. With ``as_json`` a line is a
    document with the fields of RunStatus but the tasks. Raises UsageError where there is no run.
    """
    run = find_run(path).path
    show = _screen(out) if out.isatty() and not as_json else _lines(out, document_line if as_json else progress_line)
    try:
        while True:
            began = time.monotonic()
            state = read_status(run)
            show(state)
            if not state.live:
                return
            time.sleep(max(interval_s, _READING_SHARE * (time.monotonic() - began)))
    except KeyboardInterrupt:
        return


def _screen(out: TextIO) -> Callable[[RunStatus], None]:
    out.write(_CLEAR)

    def draw(state: RunStatus) -> None:
        size = shutil.get_terminal_size()
        lines = [line[: size.columns - 1] for line in screen_text(state).split("\n")[: size.lines - 1]]
        out.write(_HOME + "".join(f"{line}{_END_OF_LINE}\n" for line in lines) + _END_OF_SCREEN)
        out.flush()

    return draw


def _lines(out: TextIO, text: Callable[[RunStatus], str]) -> Callable[[RunStatus], None]:
    last: list[object] = []

    def write(state: RunStatus) -> None:
        # rate and remaining time change with every reading, and say nothing new by themselves
        news = [(task.task, task.status, task.attempt) for task in state.tasks]
        if [*news, state.live] != last:
            last[:] = [*news, state.live]
            print(text(state), file=out, flush=True)

    return write


def document_line(state: RunStatus) -> str:
    """Return the figures of ``state`` as a JSON document on one line."""
    fields = asdict(state)
    del fields["tasks"]
    return json.dumps({"at": datetime.now(UTC).isoformat(timespec="seconds")} | fields, default=str)


def progress_line(state: RunStatus) -> str:
    """Return how far the run is and what is at work, on one line."""
    running = [task.task for task in state.tasks if task.status == "running"]
    work = f"; at work: {', '.join(running)}" if running else ""
    end = "" if state.live or state.finished else f"; {_NOBODY}"
    return f"{datetime.now(UTC):%H:%M:%SZ} {state.job}: {_progress(state)}; {_counts(state)}{work}{end}"


def screen_text(state: RunStatus) -> str:
    """Return the run's progress, what is at work, and the newest failures with their class."""
    now = datetime.now(UTC)
    running = [task for task in state.tasks if task.status == "running"]
    failed = sorted((task for task in state.tasks if task.status == "failed"), key=lambda task: task.since)
    parts = [str(state.run), f"{state.job}: {_progress(state)}", _counts(state)]
    if running:
        parts += ["", render(_running_table(running, now))]
    if failed:
        parts += ["", render(_failed_table(failed[: -_SHOWN_FAILURES - 1 : -1]))]
    if len(failed) > _SHOWN_FAILURES:
        parts.append(f"and {len(failed) - _SHOWN_FAILURES} more that failed earlier")
    return "\n".join([*parts, "", _ending(state)])


def _progress(state: RunStatus) -> str:
    settled = state.done + state.reused + state.failed
    share = f" ({100 * state.bytes_settled // state.bytes_total} %)" if state.bytes_total else ""
    parts = [
        f"{settled} of {counted(state.total, 'task')}",
        f"{state.bytes_settled / _MIB:.1f} of {state.bytes_total / _MIB:.1f} MiB{share}",
    ]
    if state.bytes_per_s is not None:
        parts.append(f"{state.bytes_per_s / _MIB:.1f} MiB/s")
    if state.eta_s:
        parts.append(f"{duration(state.eta_s)} left")
    return ", ".join(parts)


def _counts(state: RunStatus) -> str:
    names = ("done", "reused", "failed", "running", "waiting", "interrupted")
    counts = ", ".join(f"{getattr(state, name)} {name}" for name in names if getattr(state, name))
    return counts + (f", {counted(state.retries, 'more attempt')}" if state.retries else "")


def _ending(state: RunStatus) -> str:
    if state.finished:
        return "finished"
    return "Ctrl-C ends the watching, not the run" if state.live else _NOBODY


def _running_table(tasks: list[TaskStatus], now: datetime) -> Table:
    columns = [TableColumn(name, right=False) for name in ("at work", "device", "attempt")]
    rows = (
        (task.task, task.device, f"{task.attempts} ({task.attempt})", duration(_age_s(task, now))) for task in tasks
    )
    return Table((*columns, TableColumn("for")), tuple(rows))


def _failed_table(tasks: list[TaskStatus]) -> Table:
    columns = tuple(TableColumn(name, right=False) for name in ("failed", "class", "error"))
    rows = ((task.task, task.error_class, task.error.strip().split("\n", 1)[0]) for task in tasks)
    return Table(columns, tuple(rows))


def _age_s(task: TaskStatus, now: datetime) -> float:
    return max(0.0, (now - datetime.fromisoformat(task.since)).total_seconds())


def duration(seconds: float) -> str:
    """Return a time for people, in its two largest units: 2 h 05 min, 3 min 20 s, 7 s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
