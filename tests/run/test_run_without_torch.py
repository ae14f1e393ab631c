"""A task whose artifact and scores are there already is settled without torch, which takes seconds to import."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from dfmpc.artifact.manifest import TENSORS
from dfmpc.job.loader import load_job
from dfmpc.report.rows import ModelRow
from dfmpc.run.begin import RunOptions, run_job

HEAVY = ("torch", "triton", "numpy", "pyarrow", "safetensors", "PIL")
REUSE = f"""
import json, sys
from pathlib import Path
from dfmpc.artifact import commit
from dfmpc.artifact.key import task_key
from dfmpc.artifact.manifest import damage, inspect
from dfmpc.evaluate.cache import cached_scores
from dfmpc.evaluate.settings import settings_for
from dfmpc.job.expand import expand
from dfmpc.job.loader import load_job
from dfmpc.models.digest import tree_digest
from dfmpc.run.outcome import bare_row, judged, layer_rows, with_scores
from dfmpc.run.store import RunFolder

job, run, folder = map(Path, sys.argv[1:])
loaded = load_job(job)
(task,) = expand(loaded)
found = inspect(folder)
manifest = found.manifest
assert manifest is not None
key = task_key(task, [tree_digest(Path(task.model.checkpoint))], distribution=manifest.source.distribution)
settings = settings_for(loaded.job.evaluate, task.model, manifest.input_shape, loaded.job.seed)
scores = cached_scores(settings, store=loaded.store, artifact_key=key.key)
row = bare_row(RunFolder(run), task, "reused", "attempt", "cpu")
row = judged(with_scores(row, scores), loaded.job.gates) if scores else row
print(json.dumps({{
    "heavy": sorted({set(HEAVY)!r} & set(sys.modules)),
    "key": key.key,
    "findings": found.findings,
    "damage": damage(folder),
    "agreement": row.agreement,
    "gate": row.gate,
    "layers": [layer.name for layer in layer_rows(row, manifest, {{}})],
}}))
"""


@dataclass(frozen=True)
class Finished:
    """A job of one task that has run."""

    job: Path
    run: Path
    row: ModelRow
    folder: Path

    def reuse(self) -> dict[str, Any]:
        """Return what a fresh process, in which nothing of torch is loaded, finds of it."""
        command = [sys.executable, "-c", REUSE, str(self.job), str(self.run), str(self.folder)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert not ended.returncode, ended.stderr
        found: dict[str, Any] = json.loads(ended.stdout)
        return found


@pytest.fixture
def finished(bench: Any) -> Finished:
    plan = {"name": "mp", "method": "dfmpc", "recipe": "published", "low": 2, "high": 6}
    file = bench.job([bench.model("net")], [plan], gates={"min_agreement": 0.0}, resources={"devices": "cpu"})
    summary = run_job(load_job(file), RunOptions(progress=False))
    (row,) = summary.rows
    assert row.status == "done", row.error
    return Finished(file, summary.run, row, bench.store / str(row.artifact))


def test_a_reused_task_needs_no_torch(finished: Finished) -> None:
    found = finished.reuse()
    assert found["heavy"] == []
    assert found["key"] == finished.row.key
    assert (found["findings"], found["damage"]) == ([], [])
    assert (found["agreement"], found["gate"]) == (finished.row.agreement, "pass")
    assert len(found["layers"]) > 1


def test_damage_and_missing_scores_are_found_without_torch_too(finished: Finished) -> None:
    file = finished.folder / TENSORS
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    for scores in (finished.folder.parents[3] / "evaluations").glob("*.json"):
        scores.write_text("{}")
    found = finished.reuse()
    assert found["heavy"] == []
    assert [TENSORS in text and "sha256" in text for text in found["findings"]] == [True]
    assert found["damage"] == found["findings"]
    assert (found["agreement"], found["gate"]) == (None, None)


@pytest.mark.parametrize("module", ["run.scheduler", "run.plan", "report.parts", "report.tables"])
def test_what_plans_starts_and_reports_a_run_does_without_torch(module: str) -> None:
    code = f"import sys, dfmpc.{module}; print(sorted({{'torch', 'triton'}} & set(sys.modules)))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]"
