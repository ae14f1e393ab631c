"""Which two runs ``dfmpc diff`` compares, and their rows."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from ..errors import UsageError
from ..report.diff import RunRows
from ..report.parts import read_models
from .store import RunFolder, Store, find_run
from .vanished import finished_runs


def two_runs(path_a: Path, path_b: Path | None) -> tuple[RunFolder, RunFolder]:
    """Return the runs at two paths (a run's folder, or a store: its newest run), the earlier one first as given.

    With one path, a store, they are its two newest finished runs of one job. Raises UsageError where there are none.
    """
    if path_b is not None:
        return find_run(path_a), find_run(path_b)
    if find_run(path_a).path == path_a:
        raise UsageError(f"{path_a} is one run: give a second one, or the store for its two newest finished runs")
    newest = list(islice(finished_runs(Store(path_a)), 2))
    if len(newest) < 2:
        raise UsageError(
            f"{path_a} has {'no finished run' if not newest else 'one finished run only of its job'}: "
            "run the job again, or give two runs"
        )
    return newest[1], newest[0]


def rows_of(run: RunFolder) -> RunRows:
    """Return a run's rows; UsageError where it has none, or its report is torn or of another version."""
    tasks = [task.id for task in run.frozen().tasks]
    rows = read_models(run.path)
    if not rows:
        raise UsageError(f"{run.report}: no part of a report: nothing of this run has ended yet, so nothing to compare")
    return RunRows(str(run.path), rows, tasks)
