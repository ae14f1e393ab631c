"""Two runs side by side: rows made by hand for every rule, and two real runs with planted regressions."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dfmpc
import pyarrow.parquet as pq
import pytest
from dfmpc import cli
from dfmpc.report.diff import Diff, RunRows, Thresholds, diff_json, diff_rows, diff_text
from dfmpc.report.rows import ModelRow
from typer.testing import CliRunner, Result

BASE = ModelRow(
    run="r",
    task="net/r4",
    model="net",
    bit_plan="r4",
    method="rtn",
    status="done",
    finished_at=datetime(2025, 1, 1, tzinfo=UTC),
    bytes_after=1_000_000,
    bits_per_weight=4.0,
    top1_after=90.0,
    agreement=0.95,
    logit_sqnr_db=20.0,
    measured_on="images",
    gate="pass",
    read_s=1.0,
    compress_s=2.0,
    write_s=1.0,
)
CPU = {"devices": "cpu"}


def compare(old: ModelRow | None, new: ModelRow | None, **limits: float) -> Diff:
    runs = [RunRows(name, [row] if row else [], ["net/r4"]) for name, row in (("a", old), ("b", new))]
    return diff_rows(runs[0], runs[1], Thresholds(**limits))


def changed(**fields: Any) -> list[tuple[str, bool]]:
    (task,) = compare(BASE, replace(BASE, **fields)).tasks
    return [(change.name, change.regression) for change in task.changes]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, []),
        ({"status": "reused"}, []),
        ({"top1_after": 89.5}, [("top1_after", False)]),
        ({"top1_after": 89.4}, [("top1_after", True)]),
        ({"top1_after": 95.0}, [("top1_after", False)]),
        ({"agreement": 0.94}, [("agreement", False)]),
        ({"agreement": 0.939}, [("agreement", True)]),
        ({"logit_sqnr_db": 19.0}, [("logit_sqnr_db", False)]),
        ({"logit_sqnr_db": 18.9}, [("logit_sqnr_db", True)]),
        ({"logit_sqnr_db": None}, [("logit_sqnr_db", False)]),
        ({"bytes_after": 1_010_000}, [("bytes_after", False)]),
        ({"bytes_after": 1_010_001}, [("bytes_after", True)]),
        ({"bits_per_weight": 4.05}, [("bits_per_weight", True)]),
        ({"compress_s": 1000.0}, []),
        ({"status": "failed", "gate": None}, [("status", True)]),
        ({"gate": "fail"}, [("gate", True)]),
        ({"gate": "warn"}, []),
        ({"agreement": 0.5, "top1_after": 89.0}, [("agreement", True), ("top1_after", True)]),
        ({"agreement": 0.5, "measured_on": "synthetic"}, []),
        ({"top1_after": None}, []),
    ],
)
def test_what_got_worse_by_more_than_its_threshold_is_a_regression(fields: Any, expected: Any) -> None:
    assert changed(**fields) == expected


def test_finite_after_infinite_is_a_regression() -> None:
    assert compare(replace(BASE, logit_sqnr_db=None), BASE).regressions == 1
    never_evaluated = replace(BASE, logit_sqnr_db=None, agreement=None)
    assert compare(never_evaluated, BASE).regressions == 0


def test_time_counts_on_request_and_only_where_both_runs_compressed() -> None:
    slow = replace(BASE, compress_s=4.1)
    assert compare(BASE, slow, slowdown=50.0).regressions == 1
    assert compare(BASE, slow, slowdown=60.0).regressions == 0
    assert compare(BASE, replace(slow, status="reused"), slowdown=50.0).regressions == 0


def test_a_lost_result_is_a_regression_and_a_failure_in_both_runs_is_none() -> None:
    failed = replace(BASE, status="failed", gate=None)
    for after, status in (
        (failed, "failed"),
        (replace(failed, status="interrupted"), "interrupted"),
        (None, "waiting"),
    ):
        found = compare(BASE, after)
        assert (found.regressions, found.tasks[0].status_after) == (1, status)
    both = compare(failed, failed)
    assert (both.regressions, both.tasks[0].kind, both.tasks[0].notes) == (0, "same", ("failed in both runs",))
    back = compare(failed, BASE)
    assert (back.regressions, back.tasks[0].kind) == (0, "changed")


def test_what_cannot_be_compared_is_said() -> None:
    found = compare(BASE, replace(BASE, measured_on="synthetic", top1_after=None))
    assert found.tasks[0].notes == (
        "top1_after is known of the first run only",
        "measured on images, then on synthetic: agreement and SQNR not compared",
    )
    assert found.regressions == 0


def test_the_worst_task_comes_first_and_those_that_are_the_same_only_count() -> None:
    names = ("same", "bad", "worse", "lost", "other")
    before = [replace(BASE, task=f"{name}/r4") for name in names]
    after = [
        before[0],
        replace(before[1], top1_after=89.0),
        replace(before[2], top1_after=80.0),
        replace(before[3], status="failed", gate=None),
        replace(before[4], agreement=0.96),
    ]
    old = RunRows("a", before, [row.task for row in before] + ["gone/r4"])
    new = RunRows("b", after, [row.task for row in after] + ["new/r4"])
    found = diff_rows(old, new, Thresholds())
    order = ["lost/r4", "worse/r4", "bad/r4", "gone/r4", "other/r4", "new/r4", "same/r4"]
    assert [task.task for task in found.tasks] == order
    assert diff_text(found).splitlines() == [
        "before: a",
        "after:  b",
        "task             what        before    after",
        "--------  -----  ---------  -------  -------",
        "lost/r4   worse  status        done   failed",
        "worse/r4  worse  top-1 %      90.00    80.00",
        "bad/r4    worse  top-1 %      90.00    89.00",
        "gone/r4   gone   status     waiting",
        "other/r4         agreement   0.9500   0.9600",
        "new/r4    new    status              waiting",
        "7 tasks: 1 same, 4 changed, 1 new, 1 gone; 3 regressions",
    ]
    document = json.loads(diff_json(found))
    assert (document["regressions"], document["counts"]) == (3, {"changed": 4, "gone": 1, "new": 1, "same": 1})
    assert document["tasks"][1]["changes"] == [
        {"name": "top1_after", "before": 90.0, "after": 80.0, "regression": True, "excess": 20.0}
    ]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(one) for one in arguments])


def test_two_real_runs_with_planted_regressions(bench: Any) -> None:
    models = [bench.model(name) for name in ("net", "old", "breaks")]
    plans: list[dict[str, object]] = [
        {"name": "worse", "method": "rtn", "bits": 8},
        {"name": "same", "method": "rtn", "bits": 4},
    ]
    first = dfmpc.run(bench.job(models, plans, resources=CPU), progress=False)
    lonely = call("diff", bench.store)
    assert (lonely.exit_code, "one finished run only of its job" in lonely.stderr) == (2, True)

    plans[0]["bits"] = 2
    (bench.folder / "breaks.safetensors").unlink()
    job = bench.job([models[0], bench.model("new"), models[2]], plans, resources=CPU)
    second = dfmpc.run(job, progress=False)
    found = call("diff", bench.store, "--json")
    assert found.exit_code == 4, found.output
    assert call("diff", first.run, second.run, "--json").stdout == found.stdout
    document = json.loads(found.stdout)
    assert (document["before"], document["after"]) == (str(first.run), str(second.run))
    tasks = {task["task"]: task for task in document["tasks"]}
    assert {name: task["kind"] for name, task in tasks.items()} == {
        "net/worse": "changed",
        "net/same": "same",
        "breaks/worse": "changed",
        "breaks/same": "changed",
        "old/worse": "gone",
        "old/same": "gone",
        "new/worse": "new",
        "new/same": "new",
    }
    assert [name for name, task in tasks.items() if task["regressed"]] == ["breaks/worse", "breaks/same", "net/worse"]
    worse = {change["name"]: change for change in tasks["net/worse"]["changes"]}
    assert worse["logit_sqnr_db"]["regression"]
    assert not worse["bytes_after"]["regression"]
    rows = {row.task: row for row in second.rows}
    assert worse["logit_sqnr_db"]["after"] == rows["net/worse"].logit_sqnr_db

    lines = call("diff", bench.store).stdout.splitlines()
    assert lines[4].split() == ["breaks/worse", "worse", "status", "done", "failed"]
    assert lines[-1] == "8 tasks: 1 same, 3 changed, 2 new, 2 gone; 3 regressions"
    assert call("diff", second.run, second.run).exit_code == 0
    generous = ("--max-sqnr-drop", 500, "--max-agreement-drop", 1, "--max-growth", "50%")
    assert "2 regressions" in call("diff", bench.store, *generous).stdout, "failures have no threshold"
    _check_bad_input(first.run, second.run)


def _check_bad_input(first: Path, second: Path) -> None:
    def refused(*arguments: object) -> str:
        ended = call("diff", *arguments)
        assert ended.exit_code == 2, ended.output
        return ended.stderr

    assert "is one run: give a second one" in refused(first)
    assert "--max-growth 'much': expected per cent" in refused(first, second, "--max-growth", "much")
    assert "no folder" in refused(first, first / "absent")

    models = next((second / "report" / "models").glob("*.parquet"))
    table = pq.read_table(models)
    pq.write_table(table.replace_schema_metadata({b"dfmpc.schema_version": b"99"}), models)
    assert f"{models}: report schema version 99, this dfmpc reads" in refused(first, second)
    models.write_bytes(models.read_bytes()[:-20])
    assert f"{models}: torn or unreadable part of the report" in refused(first, second)
    shutil.rmtree(second / "report")
    assert f"{second / 'report'}: no part of a report" in refused(first, second)
    (second / "tasks.json").write_text("{}")
    assert "tasks.json is no task list of this version" in refused(first, second)
