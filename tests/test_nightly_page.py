"""The examples of docs/nightly.md: scripts parse, units verify, the job and the sidecar are valid."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from dfmpc.job.registry import Sidecar
from dfmpc.job.schema import Job

PLACE = "/srv/dfmpc"


@pytest.fixture(scope="module")
def page(project: Path) -> str:
    return (project / "docs" / "nightly.md").read_text(encoding="utf-8")


def fenced(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def indented(page: str, first: str) -> str:
    """Return the indented block that begins with the line ``first``."""
    lines = page[page.index(f"    {first}") :].splitlines()
    block = [
        line[4:] for line in lines[: next(i for i, line in enumerate(lines) if line and not line.startswith("    "))]
    ]
    return "\n".join(block)


def test_the_job_and_the_sidecar_are_valid(page: str) -> None:
    job = Job.model_validate(yaml.safe_load(indented(page, "version: 1")))
    assert job.models[0].registry == "/srv/models"
    sidecar = Sidecar.model_validate(yaml.safe_load(indented(page, "# /srv/models/vit/small/dfmpc.yaml")))
    assert sidecar.bit_plans == ["mp*"]
    assert sidecar.gates is not None
    assert sidecar.gates.model_fields_set == {"min_agreement", "max_seconds"}


def test_every_gate_is_in_the_table(page: str) -> None:
    gates = Job.model_json_schema()["$defs"]["Gates"]["properties"]
    assert [name for name in gates if f"| `{name}` |" not in page] == []


@pytest.mark.parametrize(("run", "diff", "code"), [(0, 0, 0), (0, 4, 4), (3, 4, 3), (75, 0, 75), (2, 0, 2)])
def test_the_script_ends_as_it_says(page: str, tmp_path: Path, run: int, diff: int, code: int) -> None:
    (script,) = fenced(page, "bash")
    tool = tmp_path / ".venv" / "bin" / "dfmpc"
    tool.parent.mkdir(parents=True)
    tool.write_text(f'#!/bin/sh\necho "$@" >> calls\ncase $1 in run) exit {run};; diff) exit {diff};; esac\n')
    tool.chmod(0o755)
    ended = subprocess.run(
        ["bash", "-c", script.replace(PLACE, str(tmp_path)), "nightly.sh", "--deadline", "7h"], check=False
    )
    assert ended.returncode == code
    calls = [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()]
    assert calls == (["run"] if run in (2, 75) else ["run", "diff", "gc"])
    assert "--deadline 7h" in (tmp_path / "calls").read_text().splitlines()[0]


@pytest.mark.parametrize("language", ["crontab", "scrontab"])
def test_lines_of_cron_have_five_times_and_a_command_that_parses(page: str, language: str) -> None:
    (text,) = fenced(page, language)
    entries = [line for line in text.splitlines() if re.match(r"[\d*]", line)]
    assert len(entries) == 1
    times, command = entries[0].split(None, 5)[:5], entries[0].split(None, 5)[5]
    assert times == ["0", "1", "*", "*", "*"]
    assert "%" not in command, "cron ends a command there"
    subprocess.run(["bash", "-n", "-c", command], check=True)
    options = [line for line in text.splitlines() if line.startswith("#")]
    assert all(re.fullmatch(r"#SCRON --[a-z-]+=\S+", line) for line in options)


def test_the_units_verify(page: str, tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("needs systemd-analyze (Debian's systemd)")
    files = []
    for unit in fenced(page, "ini"):
        name = unit.splitlines()[0].removeprefix("# ")
        script = tmp_path / "nightly.sh"
        script.write_text("#!/bin/sh\n")
        script.chmod(0o755)
        files.append(tmp_path / name)
        files[-1].write_text(unit.replace(f"{PLACE}/nightly.sh", str(script)))
    assert [file.name for file in files] == ["dfmpc-nightly.service", "dfmpc-nightly.timer", "dfmpc-failed@.service"]
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *map(str, files)], capture_output=True, text=True, check=False
    )
    ours = [line for line in (checked.stdout + checked.stderr).splitlines() if "dfmpc" in line]
    assert (checked.returncode, ours) == (0, [])
