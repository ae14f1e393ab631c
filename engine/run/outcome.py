"""Report rows from what a task left: its manifest, its figures, its error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from .. import __version__
from ..artifact.key import torch_version
from ..artifact.manifest import LayerEntry, Manifest
from ..evaluate.cache import Scores
from ..evaluate.gates import Figures, check_gates
from ..job.gates import Gates
from ..job.task import Task
from ..report.rows import LayerRow, ModelRow
from .store import RunFolder


def bare_row(
    run: RunFolder, task: Task, status: Literal["done", "reused", "failed", "interrupted"], attempt: str, device: str
) -> ModelRow:
    """Return a row that says what was tried, on which device, and nothing of the result."""
    return ModelRow(
        run=run.run_id,
        task=task.id,
        model=task.model.name,
        bit_plan=task.plan.name,
        method=task.plan.method,
        status=status,
        finished_at=datetime.now(UTC),
        attempt=attempt,
        device=device or None,
        dfmpc_version=__version__,
        torch_version=torch_version(),
    )


def failed(row: ModelRow, error: BaseException) -> ModelRow:
    """Return ``row`` as that of an attempt that ended with ``error``; what it says of the result so far stays."""
    # a lone surrogate of a file's name has no place in UTF-8, hence none in Parquet
    text = (str(error) or "no message").encode("utf-8", "backslashreplace").decode()
    return replace(
        row, status="failed", error_class=type(error).__name__, error=text, finished_at=datetime.now(UTC), gate=None
    )


def with_manifest(
    row: ModelRow,
    status: Literal["done", "reused"],
    manifest: Manifest,
    store: Path,
    folder: Path,
    lies_in: Path,
    bytes_before: int,
) -> ModelRow:
    """Add ``status`` and what the artifact at ``folder`` says of itself.

    ``bytes_before`` is the size of the checkpoint's files; ``lies_in`` is where the artifact's are now: an attempt's
    folder before it is committed.
    """
    bytes_after = manifest.bytes + (lies_in / "manifest.json").stat().st_size
    return replace(
        row,
        status=status,
        recipe=manifest.recipe or None,
        tier=manifest.tier,
        calibrator=manifest.calibrator,
        key=manifest.key,
        artifact=folder.relative_to(store).as_posix(),
        params=manifest.params,
        pairs=sum(len(entry.partners) for entry in manifest.layers if entry.role == "low"),
        bits_per_weight=manifest.bits_per_weight,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        ratio=bytes_before / bytes_after,
        numerics=_numerics(manifest),
    )


def _numerics(manifest: Manifest) -> str:
    found = manifest.ingredients.get("numerics")
    return str(found["device"]) if isinstance(found, dict) else "any"


def with_scores(row: ModelRow, scores: Scores) -> ModelRow:
    """Add the evaluation's figures."""
    return replace(
        row,
        top1_before=scores.top1_before,
        top1_after=scores.top1_after,
        top5_before=scores.top5_before,
        top5_after=scores.top5_after,
        agreement=scores.agreement,
        kl=scores.kl,
        logit_sqnr_db=scores.logit_sqnr_db,
        measured_on=scores.measured_on,
        images=scores.images,
    )


def judged(row: ModelRow, gates: Gates) -> ModelRow:
    """Return ``row`` with what the gates say to it; one without a result stays as it is."""
    if row.status not in ("done", "reused"):
        return row
    spent = [value for value in (row.read_s, row.compress_s, row.write_s) if value is not None]
    figures = Figures(
        top1_before=row.top1_before,
        top1_after=row.top1_after,
        agreement=row.agreement,
        logit_sqnr_db=row.logit_sqnr_db,
        bits_per_weight=row.bits_per_weight,
        seconds=sum(spent) if spent else None,
    )
    found = check_gates(gates, figures)
    return replace(row, gate=found.status, gate_reason="; ".join(found.reasons) or None)


def layer_rows(row: ModelRow, manifest: Manifest, seconds: Mapping[str, float]) -> list[LayerRow]:
    """Return a row for every weight layer; ``seconds`` is what each took, empty for a reused artifact."""
    rows = [_layer_row(row, entry, seconds.get(entry.name)) for entry in manifest.layers]
    return rows + [_kept_row(row, name, manifest.kept[name]) for name in sorted(manifest.kept)]


def _kept_row(row: ModelRow, name: str, reason: str) -> LayerRow:
    return LayerRow(
        run=row.run,
        task=row.task,
        model=row.model,
        bit_plan=row.bit_plan,
        attempt=row.attempt,
        name=name,
        role="kept",
        reason=reason,
    )


def _layer_row(row: ModelRow, entry: LayerEntry, seconds: float | None) -> LayerRow:
    c = entry.coefficients
    return LayerRow(
        run=row.run,
        task=row.task,
        model=row.model,
        bit_plan=row.bit_plan,
        attempt=row.attempt,
        name=entry.name,
        role=entry.role,
        reason=entry.reason,
        partners=entry.partners,
        shape=entry.shape,
        op=str(entry.op),
        params=math.prod(entry.shape),
        bits=entry.bits,
        grid=str(entry.grid),
        granularity=entry.granularity,
        sqnr_db=entry.sqnr_db,
        sparsity=entry.sparsity,
        clipped_fraction=entry.clipped_fraction,
        c_min=c.minimum if c else None,
        c_mean=c.mean if c else None,
        c_max=c.maximum if c else None,
        c_histogram=c.histogram if c else (),
        dead_channels=c.dead if c else None,
        folded=entry.folded,
        norm_shift=entry.norm_shift,
        seconds=seconds,
    )
