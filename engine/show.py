"""What the commands print: results as text for people, and as one JSON document for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UsageError
from .job.expand import choose
from .report.parts import read_layers, read_models
from .report.rows import LayerRow, ModelRow
from .report.tables import Table, TableColumn, counted, layers_table, models_table, render, summary, to_json
from .run.ending import ending_lines

if TYPE_CHECKING:
    from .artifact.exports.parity import ParityResult
    from .artifact.manifest import Manifest
    from .artifact.verify import VerifyResult
    from .compress.budget.choose import SizedPoint
    from .run.bit_choices import BitChoices, ChosenBits
    from .run.plan import Plan
    from .run.status import RunStatus
    from .run.store import RunFolder
    from .run.summary import RunSummary

_MIB = 2**20


def run_text(store: Path, ended: RunSummary) -> str:
    """Return the table of a run, its counts, and where artifacts and report lie."""
    parts = [render(models_table(ended.rows)), summary(ended.rows)]
    if ended.explanations:
        parts += ["why tasks were not reused:", *(f"  {line}" for line in ended.explanations)]
    for task, lines in ended.log_tails.items():
        parts += [f"end of the log of {task}:", *(f"  {line}" for line in lines)] if lines else []
    return "\n".join([*parts, *ending_lines(store, ended)])


def run_json(store: Path, ended: RunSummary) -> str:
    """Return the same as a document: models (Parquet's names), and of the run what ``RunSummary`` has."""
    return _document(
        run=str(ended.run),
        store=str(store),
        exit_code=ended.exit_code,
        explanations=ended.explanations,
        unmatched=ended.unmatched,
        stopped=ended.stopped,
        published=ended.published,
        unpublished=ended.unpublished,
        registered=ended.registered,
        vanished=asdict(ended.vanished),
        log_tails=ended.log_tails,
        models=json.loads(to_json(ended.rows)),
    )


def plan_text(planned: Plan, chosen: BitChoices | None = None) -> str:
    """Return a task a row, the totals, where asked for the bits that budgets come to, and what would fail."""
    totals = [f"{_title(name)}: {_cell(name, value)}" for name, value in asdict(planned.totals).items()]
    bits = ["", _bits_text(chosen.rows), ""] if chosen is not None else []
    problems = [f"problem: {text}" for text in _all_problems(planned, chosen)]
    return "\n".join([render(_table(planned.rows)), *totals, *bits, *problems])


def plan_json(planned: Plan, chosen: BitChoices | None = None) -> str:
    """Return the same as a document with tasks, totals, problems and, where asked for, bits (every layer's)."""
    rows = [asdict(row) for row in planned.rows]
    bits = {} if chosen is None else {"bits": [_bits_fields(row) for row in chosen.rows]}
    return _document(tasks=rows, totals=asdict(planned.totals), **bits, problems=_all_problems(planned, chosen))


def _all_problems(planned: Plan, chosen: BitChoices | None) -> list[str]:
    """A model that does not load is found twice and told once."""
    return list(dict.fromkeys([*planned.problems, *(chosen.problems if chosen is not None else ())]))


def _bits_fields(row: ChosenBits) -> dict[str, Any]:
    return {"task": row.task, "budget": row.budget, **asdict(row.choice)}


def _bits_text(rows: Sequence[ChosenBits]) -> str:
    """Return a budget a row, the points of its curve below it; layers are counted by their bits."""
    if not rows:
        return "bits: no bit-plan has a budget that could be looked at"
    titles = ("bits a\nweight", "MiB\nforetold", "noise to\nsignal", "gap\n%")
    columns = (TableColumn("task", right=False), TableColumn("budget", right=False), *map(TableColumn, titles))
    lines = [line for row in rows for line in _bits_lines(row)]
    return render(Table((*columns, TableColumn("bits:layers", right=False)), tuple(lines)))


def _bits_lines(row: ChosenBits) -> list[tuple[str, ...]]:
    curve = row.choice.pareto
    points: list[tuple[str, str, SizedPoint]] = [(row.task, row.budget, row.choice)]
    points += [("", f"curve {number} of {len(curve)}", point) for number, point in enumerate(curve, 1)]
    return [(task, budget, *_point_cells(point)) for task, budget, point in points]


def _point_cells(point: SizedPoint) -> tuple[str, ...]:
    counts = " ".join(f"{bits}:{count}" for bits, count in sorted(Counter(point.bits.values()).items()))
    size = f"{point.bytes / _MIB:.3f}"
    return (f"{point.bits_per_weight:.3f}", size, f"{point.objective:.3g}", f"{100 * point.gap:.2g}", counts)


def status_text(state: RunStatus) -> str:
    """Return the counts and a task a row."""
    names = ("done", "reused", "failed", "running", "waiting", "interrupted")
    counts = ", ".join(f"{getattr(state, name)} {name}" for name in names)
    end = "finished" if state.finished else "unfinished" if state.live else "unfinished, and nobody is at it"
    head = f"{state.run}\n{state.job}: {counted(state.total, 'task')}: {counts}; {end}"
    return f"{head}\n{render(_table([replace(task, error=_first_line(task.error)) for task in state.tasks]))}"


def status_json(state: RunStatus) -> str:
    """Return the same as a document with the fields of RunStatus."""
    return _document(**{**asdict(state), "run": str(state.run)})


@dataclass(frozen=True)
class Report:
    """What ``dfmpc report`` was asked for, in the job's order; ``layers`` is None where it was not."""

    run: Path
    models: list[ModelRow]
    layers: list[LayerRow] | None
    rest: dict[str, int]
    """How many of the tasks have no result, by status: waiting, running or interrupted."""


def read_report(run: RunFolder, *, only: str | None, layers: bool) -> Report:
    """Read the rows of the tasks that match ``only`` (fnmatch over MODEL/PLAN).

    Raises UsageError for a broken report and where no task of the run matches.
    """
    from .run.status import read_status  # noqa: PLC0415 - only report needs it

    place = {task.id: number for number, task in enumerate(choose(run.frozen().tasks, only))}
    models = sorted((row for row in read_models(run.path) if row.task in place), key=lambda row: place[row.task])
    found = (row for row in read_layers(run.path) if row.task in place) if layers else ()
    statuses = Counter(task.status for task in read_status(run.path).tasks if task.task in place)
    return Report(
        run=run.path,
        models=models,
        layers=sorted(found, key=lambda row: place[row.task]) if layers else None,
        rest={name: statuses[name] for name in ("waiting", "running", "interrupted") if statuses[name]},
    )


def report_text(report: Report) -> str:
    """Return the tables of a report."""
    parts = [f"run: {report.run}"]
    if report.models:
        parts += [render(models_table(report.models)), summary(report.models)]
    parts += _rest_lines(report.rest)
    if report.layers:
        parts += ["", render(layers_table(report.layers))]
    return "\n".join(parts)


def _rest_lines(rest: Mapping[str, int]) -> list[str]:
    """Say what has no result yet; while a process is at the run there is nothing to resume."""
    if running := rest.get("running"):
        return [f"{counted(running, 'task')} running, {rest.get('waiting', 0)} waiting: see `dfmpc status`"]
    lines = []
    if interrupted := rest.get("interrupted"):
        was = "was" if interrupted == 1 else "were"
        lines.append(f"{counted(interrupted, 'task')} {was} interrupted: the same `dfmpc run` command resumes")
    if waiting := rest.get("waiting"):
        has = "has" if waiting == 1 else "have"
        lines.append(f"{counted(waiting, 'task')} {has} not run: the same `dfmpc run` command resumes")
    return lines


def report_json(report: Report) -> str:
    """Return the same as a document with run, models and, where asked for, layers (Parquet's names)."""
    layers = {} if report.layers is None else {"layers": json.loads(to_json(report.layers))}
    return _document(run=str(report.run), models=json.loads(to_json(report.models)), **layers)


def artifact_text(manifest: Manifest) -> str:
    """Return an artifact's facts and its layers, one a row."""
    from .run.outcome import layer_rows  # noqa: PLC0415 - only inspect needs it

    plan = str(manifest.plan["name"])
    row = ModelRow(
        run="",
        task=f"{manifest.model}/{plan}",
        model=manifest.model,
        bit_plan=plan,
        method=manifest.method,
        status="done",
        finished_at=datetime.now(UTC),
    )
    bits = "" if manifest.bits_per_weight is None else f", {manifest.bits_per_weight:.3f} bits a weight"
    facts = [
        f"{row.task}: {manifest.method}, recipe {manifest.recipe or '-'}, calibrator {manifest.calibrator or '-'}",
        f"{manifest.bytes / _MIB:.2f} MiB{bits}; key {manifest.key}",
    ]
    return "\n".join([*facts, render(layers_table(layer_rows(row, manifest, {})))])


def verify_all(
    path: Path, *, in_onnxruntime: bool = False, allow_code: tuple[str, ...] = ()
) -> tuple[list[VerifyResult], list[ParityResult]]:
    """Verify an artifact, every artifact of a run, or every one of a store; UsageError where ``path`` is none of them.

    What the newest run of a store has in its report counts also where its folder has gone. ``in_onnxruntime`` also
    compares whole artifacts, run by onnxruntime, with ``dfmpc.load``, which may need ``allow_code``.
    """
    from .artifact.exports.extras import require_onnx  # noqa: PLC0415
    from .artifact.verify import verify  # noqa: PLC0415 - brings in torch

    folders = _artifacts_below(path)
    if not in_onnxruntime:
        return [verify(folder) for folder in folders], []
    require_onnx()
    from .artifact.exports.parity import with_parity  # noqa: PLC0415 - needs the extra

    both = [with_parity(verify(folder), allow_code=allow_code) for folder in folders]
    return [result for result, _ in both], [parity for _, parity in both if parity is not None]


def _artifacts_below(path: Path) -> list[Path]:
    from .artifact.latest import artifact_at, pointers  # noqa: PLC0415
    from .artifact.manifest import MANIFEST  # noqa: PLC0415 - brings in torch
    from .artifact.verify import find_artifacts  # noqa: PLC0415
    from .run.store import find_run  # noqa: PLC0415

    path = existing_folder(path)
    if (path / MANIFEST).is_file() or (path / "model.safetensors").is_file():
        return [path]
    run = find_run(path)
    folders = {run.store.root / row.artifact for row in read_models(run.path) if row.artifact is not None}
    if run.path != path:
        folders |= {*find_artifacts(path), *map(artifact_at, pointers(path))}
    return sorted(folders)


def existing_folder(path: Path) -> Path:
    """Return ``path``, or the artifact's folder that it points to (STORE/latest/MODEL/PLAN).

    UsageError where it is no folder, which is a slip of the pen and no broken artifact.
    """
    from .artifact.latest import artifact_at  # noqa: PLC0415

    folder = artifact_at(path)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder: give one that `dfmpc run` has written")
    return folder


def verified_text(results: Sequence[VerifyResult], compared: Sequence[ParityResult] = ()) -> str:
    """Return a line an artifact, a line of figures where it was compared in a runtime, and a line a finding."""
    figures = {one.path: f"\n      {one.to_text()}" for one in compared}
    lines = [f"{'bad' if one.findings else 'good'}  {one.path}{figures.get(one.path, '')}" for one in results]
    findings = [f"{one.path}: {finding}" for one in results for finding in one.findings]
    bad = sum(bool(one.findings) for one in results)
    return "\n".join([*lines, *findings, f"{counted(len(results), 'artifact')} checked, {bad} bad"])


def verified_json(results: Sequence[VerifyResult], compared: Sequence[ParityResult] = ()) -> str:
    """Return the same as a document with artifacts (the fields of VerifyResult) and runtimes (of ParityResult)."""
    runtimes = {"runtimes": [asdict(one) for one in compared]} if compared else {}
    return _document(artifacts=[asdict(one) for one in results], **runtimes)


def _document(**fields: Any) -> str:
    return json.dumps(fields, indent=1, default=str)


def _table(rows: Sequence[Any]) -> Table:
    """Return dataclasses of one kind as a table; columns that are empty throughout are left out."""
    cells = [{name: _cell(name, value) for name, value in asdict(row).items()} for row in rows]
    used = [name for name in (cells[0] if cells else ()) if any(cell[name] for cell in cells)]
    numbers = {name for name in used if all(isinstance(getattr(row, name), int | float | None) for row in rows)}
    columns = tuple(TableColumn(_title(name), right=name in numbers) for name in used)
    return Table(columns, tuple(tuple(cell[name] for name in used) for cell in cells))


def _title(name: str) -> str:
    return name.replace("_bytes", "_MiB").replace("bytes_", "MiB_").replace("_", " ")


def _cell(name: str, value: object) -> str:
    if value is None or value is False:
        return ""
    if value is True:
        return "yes"
    if isinstance(value, int | float) and "bytes" in name:
        return f"{value / _MIB:.2f}"
    return str(value)


def _first_line(text: str) -> str:
    return text.strip().split("\n", 1)[0]
