"""The command line: help, exit codes, messages, JSON. Whole runs are in test_end_to_end.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dfmpc import cli
from dfmpc.errors import ArtifactError, DfmpcError, StorageError
from typer.testing import CliRunner

COMMANDS = ("run", "plan", "status", "report", "diff", "inspect", "verify", "export", "gc", "schema", "doctor")
TABLES = ("run", "plan", "status", "report", "diff", "inspect", "verify", "export", "gc", "doctor")
GOOD = (
    "version: 1\nname: t\noutput: store\nmodels: [{program: none.pt2}]\nbit_plans: [{name: p, method: rtn, bits: 4}]\n"
)


def call(*arguments: object):
    return CliRunner().invoke(cli.app, [str(one) for one in arguments])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"Example:\n    dfmpc {command}" in result.stdout
    assert ("--json" in result.stdout) == (command in TABLES)


def test_help_lists_every_command_and_needs_nothing_heavy():
    code = """
import sys
from dfmpc import cli
try:
    cli.main()
except SystemExit as ended:
    heavy = sorted(set(sys.modules) & {"torch", "pyarrow", "numpy", "triton", "pydantic", "yaml", "rich"})
    print(ended.code, heavy)
"""
    ended = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "0 []"
    assert all(f"\n  {command} " in ended.stdout for command in COMMANDS)


def test_version():
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, "dfmpc 0.1.0\n")


@pytest.mark.parametrize("arguments", [("nope",), ("run",), ("run", "a", "--nope"), ("plan", "a", "b")])
def test_a_wrong_command_line_ends_with_2(arguments: tuple[str, ...]):
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: ")


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_wrong_job_file_ends_with_2_and_starts_nothing(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(GOOD + "gates: {max_top1_dorp: 1}\nseed: -1\n")
    result = call(command, "job.yaml")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: job.yaml: line 6: gates.max_top1_dorp: got an unknown field; "
        "expected 'max_top1_drop' (did you mean that?)",
        "error: job.yaml: line 7: seed: got -1; expected greater than or equal to 0",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]


def test_a_factory_needs_the_allow_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    model = "{name: x, factory: 'my_nets:small', checkpoint: c.pt, input: [1, 3, 8, 8]}"
    Path("job.yaml").write_text(GOOD.replace("{program: none.pt2}", model))
    refused = call("plan", "job.yaml")
    assert refused.exit_code == 2
    assert "models[0].factory: got 'my_nets:small'" in refused.stderr
    assert "--allow-code" in refused.stderr
    allowed = call("plan", "job.yaml", "--allow-code", "my_nets")
    assert allowed.exit_code == 3
    assert "checkpoint: " in allowed.stdout
    assert "c.pt: no such file" in allowed.stdout
    missing = call("plan", "job.yaml", "--allow-code", "./nothing")
    assert missing.exit_code == 2
    assert "nothing" in missing.stderr


def test_plan_shows_tasks_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("job.yaml").write_text(GOOD)
    result = call("plan", "job.yaml", "--json")
    assert result.exit_code == 3
    document = json.loads(result.stdout)
    assert [row["task"] for row in document["tasks"]] == ["none/p"]
    assert document["totals"]["tasks"] == 1
    assert document["problems"] == [
        f"none: program: {tmp_path / 'none.pt2'}: no such file; correct the path or copy the file there"
    ]
    assert "none/p" in call("plan", "job.yaml").stdout
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]


@pytest.mark.parametrize("command", ["status", "report", "verify"])
def test_no_run_ends_with_2(command: str, tmp_path: Path):
    result = call(command, tmp_path / "none")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {tmp_path / 'none'}")


def test_inspecting_no_artifact_ends_with_4(tmp_path: Path):
    result = call("inspect", tmp_path)
    assert result.exit_code == 4
    assert str(tmp_path) in result.stderr


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_mistyped_folder_ends_with_2(command: str, tmp_path: Path):
    result = call(command, tmp_path / "absent")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {tmp_path / 'absent'}: no such folder")


def test_the_examples_name_plans_of_the_quickstart(project: Path):
    shipped = [plan["name"] for plan in yaml.safe_load((project / "jobs" / "quickstart.yaml").read_text())["bit_plans"]]
    assert "rtn-4" in shipped
    assert "--only '*/rtn-4'" in call("report", "--help").stdout
    assert "efficientnet-lite0/rtn-4/*" in call("inspect", "--help").stdout


def test_schema_prints_the_json_schema():
    document = json.loads(call("schema").stdout)
    assert document["additionalProperties"] is False
    assert set(document["required"]) == {"version", "name", "output", "models", "bit_plans"}


def test_doctor_tells_versions_devices_and_disk(tmp_path: Path):
    document = json.loads(call("doctor", "--json", "--output", tmp_path / "not" / "yet", "--allow-code", "mine").stdout)
    assert document["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert document["versions"]["torch"] != "not installed"
    assert document["disk"] == str(tmp_path)
    assert document["disk_free_bytes"] > 0
    assert "mine" in document["allow_list"]
    assert document["devices"]
    assert "free disk" in call("doctor").stdout


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (StorageError("/x: the disk is full\nfree space"), 3, "error: /x: the disk is full\nerror: free space\n"),
        (ArtifactError("bad"), 4, "error: bad\n"),
        (DfmpcError("ours"), 1, "error: ours\n"),
        (KeyboardInterrupt(), 75, "error: interrupted; the same command resumes\n"),
    ],
)
def test_errors_become_exit_codes(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("dfmpc.run.status.read_status", fail)
    result = call("status", tmp_path)
    assert (result.exit_code, result.stderr) == (code, message)


def test_a_bug_ends_with_1_a_traceback_and_a_request(tmp_path: Path):
    code = """
import sys, dfmpc.run.status
from dfmpc import cli
def fail(path):
    raise RuntimeError("unforeseen")
dfmpc.run.status.read_status = fail
sys.argv = ["dfmpc", "status", "."]
cli.main()
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert "RuntimeError: unforeseen\nThis is a bug in dfmpc: please report it" in ended.stderr


def test_a_reader_that_goes_away_ends_quietly(tmp_path: Path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "dfmpc.cli", "schema"]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    os.close(write)
    assert "Traceback" not in ended.stderr
    assert ended.returncode == 1
