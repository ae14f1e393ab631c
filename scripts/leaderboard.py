"""Puts the runs of jobs/leaderboard*.yaml into one table: ``python scripts/leaderboard.py STORE_OR_RUN...``.

Plans are named METHOD.WIDTHS. Nothing is computed here but sums of what the reports' Parquet files say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq
from dfmpc.errors import DfmpcError, UsageError
from dfmpc.job.recipes import describe_plan
from dfmpc.job.task import Task
from dfmpc.report.parts import read_models
from dfmpc.report.rows import ModelRow
from dfmpc.run.store import RunFolder, find_run

MARKS = ("<!-- tables: scripts/leaderboard.py -->", "<!-- end of tables -->")
_MIB = 2**20
_ARROW = {int: pa.int64(), float: pa.float64(), str: pa.string()}


@dataclass(frozen=True)
class Entry:
    """One method on one network under one plan; a column each in the Parquet file. None: not known."""

    model: str
    method: str
    """The part of the plan's name before its first point."""
    plan: str
    """The rest: LOW-HIGH bits, or b and a budget in bits a weight."""
    tier: str
    """What stood in for data: none, closed-form or synthetic; of a failed task what its plan asks for."""
    recipe: str
    calibrator: str
    status: str
    """done, reused, failed, interrupted, or waiting where the run has not come to it."""
    error_class: str | None
    top1_before: float | None
    """Per cent."""
    top1_after: float | None
    agreement: float | None
    """0-1."""
    images: int | None
    bytes_before: int | None
    bytes_after: int | None
    bits_per_weight: float | None
    compress_s: float | None
    """Of the run that made the artifact, seconds; None where no run of the store says."""
    device: str | None
    key: str | None
    run: str


def entries_of(run: RunFolder) -> list[Entry]:
    """Return an entry a task of ``run``, in the job's order. Raises UsageError for a report that cannot be read."""
    rows = {row.task: row for row in read_models(run.path)}
    seconds = _seconds_by_key(run) if any(row.status == "reused" for row in rows.values()) else {}
    return [_entry(run, task, rows.get(task.id), seconds) for task in run.frozen().tasks]


def _seconds_by_key(run: RunFolder) -> dict[str, float]:
    """Return how long each artifact of the store took, where a report says; of several makings the newest counts."""
    made = [row for other in run.store.run_folders() for row in _readable(other) if row.status == "done"]
    return {row.key: row.compress_s for row in made if row.key is not None and row.compress_s is not None}


def _readable(run: RunFolder) -> list[ModelRow]:
    """Return the rows of another run than the one asked for; none where an earlier dfmpc wrote its report."""
    try:
        return read_models(run.path)
    except UsageError:
        return []


def _entry(run: RunFolder, task: Task, row: ModelRow | None, seconds: dict[str, float]) -> Entry:
    method, _, plan = task.plan.name.partition(".")
    asked = describe_plan(task.plan)
    key = row.key if row else None
    return Entry(
        model=task.model.name,
        method=method,
        plan=plan,
        tier=(row.tier if row else None) or asked.tier,
        recipe=(row.recipe if row else None) or asked.recipe,
        calibrator=(row.calibrator if row else None) or asked.calibrator,
        status=row.status if row else "waiting",
        error_class=row.error_class if row else None,
        top1_before=row.top1_before if row else None,
        top1_after=row.top1_after if row else None,
        agreement=row.agreement if row else None,
        images=row.images if row else None,
        bytes_before=row.bytes_before if row else None,
        bytes_after=row.bytes_after if row else None,
        bits_per_weight=row.bits_per_weight if row else None,
        compress_s=row.compress_s if row and row.status == "done" else seconds.get(key or ""),
        device=row.device if row else None,
        key=key,
        run=run.run_id,
    )


def markdown(entries: Sequence[Entry]) -> str:
    """Return a section a network, plans one after the other, methods in the job's order."""
    models = dict.fromkeys(entry.model for entry in entries)
    return "\n\n".join("\n".join(_section([one for one in entries if one.model == model])) for model in models)


def _section(entries: Sequence[Entry]) -> Iterator[str]:
    yield f"## {entries[0].model}\n\n{_provenance(entries)}\n"
    yield "| plan | method | tier | top-1 % | FP % | MiB | bits a weight | seconds |"
    yield "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"
    for plan in dict.fromkeys(entry.plan for entry in entries):
        yield from (_line(entry) for entry in entries if entry.plan == plan)


def _provenance(entries: Sequence[Entry]) -> str:
    images = sorted({f"{one.images:,} images" for one in entries if one.images is not None})
    devices = sorted({one.device for one in entries if one.device})
    before = sorted({f"{_number(one.bytes_before, 2, _MIB)} MiB before" for one in entries if one.bytes_before})
    waiting = sum(one.status == "waiting" for one in entries)
    rest = [f"{waiting} of {len(entries)} tasks have not run"] if waiting else []
    runs = ", ".join(f"`{run}`" for run in dict.fromkeys(one.run for one in entries))
    return "; ".join([f"Run {runs}", *images, *devices, *before, *rest]) + "."


def _line(entry: Entry) -> str:
    cells = (
        entry.plan,
        entry.method,
        entry.tier,
        _number(entry.top1_after, 2) or entry.error_class or entry.status,
        _number(entry.top1_before, 2),
        _number(entry.bytes_after, 3, _MIB),
        _number(entry.bits_per_weight, 2),
        _number(entry.compress_s, 1),
    )
    return f"| {' | '.join(cells)} |"


def _number(value: float | None, decimals: int, unit: float = 1) -> str:
    return "" if value is None else f"{value / unit:.{decimals}f}"


def write_page(page: Path, tables: str) -> None:
    """Put ``tables`` between the two marks of ``page``; UsageError where it has not both, in order."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    head, found, rest = text.partition(MARKS[0])
    _, ended, tail = rest.partition(MARKS[1])
    if not (found and ended):
        raise UsageError(f"{page}: expected a page with the lines {MARKS[0]} and {MARKS[1]}")
    page.write_text(f"{head}{MARKS[0]}\n\n{tables}\n\n{MARKS[1]}{tail}", encoding="utf-8")


def write_parquet(file: Path, entries: Sequence[Entry]) -> None:
    """Write an entry a row, columns and types as in Entry."""
    hints = get_type_hints(Entry)
    kinds = [(field.name, next(kind for kind in _ARROW if _is(hints[field.name], kind))) for field in fields(Entry)]
    schema = pa.schema([(name, _ARROW[kind]) for name, kind in kinds])
    pq.write_table(pa.Table.from_pylist([asdict(entry) for entry in entries], schema), file, compression="zstd")


def _is(hint: object, kind: type) -> bool:
    return hint in (kind, kind | None)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="STORE_OR_RUN", help="a run, or a store: its newest run")
    parser.add_argument("--out", type=Path, help="page to put the tables into, such as docs/leaderboard.md")
    parser.add_argument("--parquet", type=Path, help="file for the same, a row a model, method and plan")
    given = parser.parse_args(arguments)
    try:
        entries = [entry for path in given.runs for entry in entries_of(find_run(path))]
        if given.parquet:
            write_parquet(given.parquet, entries)
        if given.out:
            write_page(given.out, markdown(entries))
        else:
            print(markdown(entries))
    except DfmpcError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
