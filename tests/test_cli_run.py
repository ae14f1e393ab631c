"""The commands over one finished run: tables, JSON, and the exit codes of what they find."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from dfmpc import cli
from typer.testing import CliRunner, Result

PLANS: list[dict[str, object]] = [
    {"name": "mp", "method": "dfmpc", "low": 2, "high": 6},
    {"name": "r4", "method": "rtn", "bits": 4},
]


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(one) for one in arguments])


@pytest.fixture
def job(bench: Any) -> Path:
    """A job of one good and one missing model."""
    missing = {**bench.model("missing"), "checkpoint": "absent.safetensors"}
    return bench.job([bench.model("good"), missing], PLANS, resources={"devices": "cpu"})


def test_every_command_reads_what_a_run_left(bench: Any, job: Path) -> None:
    ended = call("run", job, "--json")
    assert ended.exit_code == 3, ended.output
    assert "dfmpc: missing/mp failed: CheckpointError\n" in ended.stderr
    document = json.loads(ended.stdout)
    assert document["exit_code"] == 3
    rows = {row["task"]: row for row in document["models"]}
    assert {task: row["status"] for task, row in rows.items()} == {
        "good/mp": "done",
        "good/r4": "done",
        "missing/mp": "failed",
        "missing/r4": "failed",
    }
    _check_status_and_report(bench, document["run"], rows)
    _check_inspect_and_verify(bench, rows)
    _check_only_and_retry(bench, job, Path(document["run"]))


def _check_status_and_report(bench: Any, run: str, rows: dict[str, Any]) -> None:
    status = json.loads(call("status", bench.store, "--json").stdout)
    assert (status["run"], status["done"], status["failed"], status["finished"]) == (run, 2, 2, True)
    assert "4 tasks: 2 done, 0 reused, 2 failed" in call("status", run).stdout

    report = json.loads(call("report", run, "--layers", "--only", "good/*", "--json").stdout)
    assert report["models"] == [rows["good/mp"], rows["good/r4"]]
    assert {layer["task"] for layer in report["layers"]} == {"good/mp", "good/r4"}
    assert {layer["name"] for layer in report["layers"]} == {"0", "3", "6", "11"}
    shown = call("report", bench.store).stdout
    assert "missing/mp failed: CheckpointError: " in shown
    assert shown.count("missing/mp") == 1, "a failure is told once"


def _check_inspect_and_verify(bench: Any, rows: dict[str, Any]) -> None:
    folder = bench.store / rows["good/mp"]["artifact"]
    inspected = call("inspect", folder)
    assert inspected.exit_code == 0
    recipe = "auto: exact ternary, mse clip, feedback, least-squares"
    assert f"good/mp: dfmpc, recipe {recipe}, calibrator synthetic" in inspected.stdout
    assert "ternary" in inspected.stdout
    assert json.loads(call("inspect", folder, "--json").stdout) == json.loads((folder / "manifest.json").read_text())

    whole = call("verify", bench.store)
    assert (whole.exit_code, whole.stdout.splitlines()[-1]) == (0, "2 artifacts checked, 0 bad")
    tensors = folder / "model.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    for path in (bench.store, folder):
        bad = call("verify", path, "--json")
        assert bad.exit_code == 4
        (finding,) = [text for one in json.loads(bad.stdout)["artifacts"] for text in one["findings"]]
        assert "model.safetensors: sha256" in finding
    content[-1] ^= 1
    tensors.write_bytes(content)


def _check_only_and_retry(bench: Any, job: Path, run: Path) -> None:
    nothing = call("run", job, "--only", "nobody/*")
    assert nothing.exit_code == 2
    assert "--only 'nobody/*' matches no task; the tasks are good/mp, good/r4, missing/mp" in nothing.stderr
    one = call("run", job, "--only", "*/mp", "--json")
    assert [row["status"] for row in json.loads(one.stdout)["models"]] == ["reused", "failed"]
    assert call("verify", bench.store).stdout.endswith("\n2 artifacts checked, 0 bad\n"), "of all runs"
    assert call("verify", json.loads(one.stdout)["run"]).stdout.endswith("\n1 artifact checked, 0 bad\n")

    bench.checkpoint("absent", bench.state())
    again = call("run", job, "--retry-failed", "--json")
    assert again.exit_code == 0, again.output
    document = json.loads(again.stdout)
    assert document["run"] == str(run)
    assert [row["status"] for row in document["models"]] == ["done"] * 4
