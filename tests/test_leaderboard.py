"""scripts/leaderboard.py: tables and Parquet from the reports of runs."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from dfmpc.errors import CheckpointError, UsageError
from dfmpc.job.expand import expand
from dfmpc.job.loader import load_job
from dfmpc.job.schema import Job
from dfmpc.report.parts import write_part
from dfmpc.report.rows import ModelRow
from dfmpc.run.claims import FIRST, start_run
from dfmpc.run.outcome import bare_row, failed
from dfmpc.run.store import RunFolder, Store, freeze

PLANS: list[dict[str, object]] = [
    {"name": "rtn.4-4", "method": "rtn", "bits": 4},
    {"name": "auto-synthetic.b2.5", "method": "dfmpc", "budget": {"bits_per_weight": 2.5}},
    {"name": "dfq.4-4", "method": "dfq", "low": 4, "high": 4},
]


@pytest.fixture(scope="module")
def leaderboard() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "leaderboard", Path(__file__).parent.parent / "scripts" / "leaderboard.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["leaderboard"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def new_run(bench: Any) -> RunFolder:
    loaded = load_job(bench.job([bench.model("net")], PLANS))
    store = Store(loaded.store)
    store.prepare()
    before = store.run_folders()
    after = before[-1].run_id if before else FIRST
    return start_run(store, freeze(loaded, expand(loaded)), after).run


def finished(run: RunFolder, number: int, status: str) -> ModelRow:
    """Return a row for the task of that number, as a good attempt leaves it."""
    task = run.frozen().tasks[number]
    return replace(
        bare_row(run, task, status, "a1", "cpu"),
        tier="closed-form",
        recipe="as written",
        key=f"key {number}",
        top1_before=91.25,
        top1_after=90.5,
        images=1000,
        bytes_before=2 * 2**20,
        bytes_after=2**18,
        bits_per_weight=4.125,
        compress_s=1.25 if status == "done" else 0.0,
    )


def first_night(bench: Any) -> RunFolder:
    """Return a run whose first task is done and whose second failed; the third is waiting."""
    run = new_run(bench)
    write_part(run.path, finished(run, 0, "done"), [], "a1")
    bare = bare_row(run, run.frozen().tasks[1], "failed", "a1", "cpu")
    write_part(run.path, failed(bare, CheckpointError("torn")), [], "a1")
    return run


def test_a_row_shows_tier_size_and_failure(
    leaderboard: ModuleType, bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = first_night(bench)
    assert leaderboard.main([str(bench.store)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "## net"
    assert lines[2] == f"Run `{run.run_id}`; 1,000 images; cpu; 2.00 MiB before; 1 of 3 tasks have not run."
    assert lines[6:] == [
        "| 4-4 | rtn | closed-form | 90.50 | 91.25 | 0.250 | 4.12 | 1.2 |",
        "| 4-4 | dfq | closed-form | waiting |  |  |  |  |",
        "| b2.5 | auto-synthetic | synthetic | CheckpointError |  |  |  |  |",
    ]


def test_parquet_has_a_row_a_model_method_and_plan(leaderboard: ModuleType, bench: Any, tmp_path: Path) -> None:
    first_night(bench)
    assert leaderboard.main([str(bench.store), "--parquet", str(tmp_path / "board.parquet")]) == 0
    table = pq.read_table(tmp_path / "board.parquet")
    assert [tuple(row[name] for name in ("model", "method", "plan", "status")) for row in table.to_pylist()] == [
        ("net", "rtn", "4-4", "done"),
        ("net", "auto-synthetic", "b2.5", "failed"),
        ("net", "dfq", "4-4", "waiting"),
    ]
    assert {name: str(table.schema.field(name).type) for name in ("bytes_after", "top1_after", "error_class")} == {
        "bytes_after": "int64",
        "top1_after": "double",
        "error_class": "string",
    }


def test_a_reused_artifact_keeps_the_seconds_of_its_making(leaderboard: ModuleType, bench: Any) -> None:
    first_night(bench)
    run = new_run(bench)
    write_part(run.path, finished(run, 0, "reused"), [], "a1")
    write_part(run.path, finished(run, 2, "reused"), [], "a1")
    found = leaderboard.entries_of(leaderboard.find_run(bench.store))
    assert [(entry.run, entry.compress_s) for entry in found] == [
        (run.run_id, 1.25),
        (run.run_id, None),
        (run.run_id, None),
    ]


def test_a_report_of_an_earlier_version_beside_it_is_no_obstacle(leaderboard: ModuleType, bench: Any) -> None:
    first = first_night(bench)
    (part,) = {file.parent for file in first.path.glob("report/models/*.parquet")}
    pq.write_table(pa.table({"task": ["a"]}), part / "0-earlier.parquet")
    again = new_run(bench)
    write_part(again.path, finished(again, 0, "reused"), [], "a1")
    entry, *_ = leaderboard.entries_of(again)
    assert (entry.status, entry.compress_s) == ("reused", None)
    with pytest.raises(UsageError, match="schema version none"):
        leaderboard.entries_of(first)


def test_a_page_keeps_its_text_around_the_tables(
    leaderboard: ModuleType, bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first_night(bench)
    page = tmp_path / "page.md"
    start, end = leaderboard.MARKS
    page.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    assert leaderboard.main([str(bench.store), "--out", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{start}\n\n## net\n")
    assert text.endswith(f"\n\n{end}\nafter\n")
    assert "old" not in text
    page.write_text("no marks")
    assert leaderboard.main([str(bench.store), "--out", str(page)]) == 2
    assert "expected a page with the lines" in capsys.readouterr().err
    assert page.read_text() == "no marks"


def test_the_page_that_ships_has_the_marks(leaderboard: ModuleType, project: Path) -> None:
    text = (project / "docs" / "leaderboard.md").read_text()
    assert [text.count(mark) for mark in leaderboard.MARKS] == [1, 1]


def test_both_jobs_have_the_same_plans_named_by_method_and_widths(project: Path) -> None:
    files = [project / "jobs" / f"leaderboard{end}.yaml" for end in ("", "_imagenet")]
    cifar, imagenet = (Job.model_validate(yaml.safe_load(file.read_text())).bit_plans for file in files)
    assert cifar == imagenet
    for plan in cifar:
        method, _, widths = plan.name.partition(".")
        budget = getattr(plan, "budget", None)
        if budget is not None:
            assert widths == f"b{budget.bits_per_weight:g}"
        elif plan.method == "rtn":
            assert widths == f"{plan.bits}-{plan.bits}"
        else:
            assert widths == f"{plan.low}-{plan.high}"
        assert plan.method in (method, "dfmpc")
