"""What the commands say of runs that have not come to their end, without doing one."""

from __future__ import annotations

from pathlib import Path

import pytest
from dfmpc import cli
from dfmpc.job.expand import expand
from dfmpc.job.loader import load_job
from dfmpc.report.parts import write_part
from dfmpc.run.claims import start_run
from dfmpc.run.ledger import Event, Kind, Ledger
from dfmpc.run.outcome import bare_row
from dfmpc.run.store import RunFolder, Store, freeze
from dfmpc.run.summary import RunSummary
from dfmpc.show import run_text
from typer.testing import CliRunner, Result

JOB = """
version: 1
name: t
output: {output}
models: [{{program: z.pt2}}, {{program: b.pt2}}, {{program: a.pt2}}]
bit_plans: [{{name: r4, method: rtn, bits: 4}}]
"""


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(one) for one in arguments])


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of z/r4, b/r4 and a/r4, in this order, that was interrupted at b/r4 after a/r4 and before z/r4."""
    file = tmp_path / "job.yaml"
    file.write_text(JOB.format(output=tmp_path / "store"))
    loaded = load_job(file)
    store = Store(loaded.store)
    store.prepare()
    made = start_run(store, freeze(loaded, expand(loaded))).run
    ledger, (_, second, third) = Ledger(made), made.frozen().tasks
    for task, status in ((third, "done"), (second, "interrupted")):
        ledger.append(Event(Kind.TASK_STARTED, task=task.id, attempt="a1"))
        if status == "done":
            ledger.append(Event(Kind.TASK_FINISHED, task=task.id, attempt="a1", status=status))
        write_part(made.path, bare_row(made, task, status, "a1", "cpu"), [], "a1")
    ledger.append(Event(Kind.INTERRUPTED, task=second.id, attempt="a1"))
    ledger.close()
    return made


def test_a_report_says_which_run_it_is_of_what_has_not_run_and_keeps_the_jobs_order(run: RunFolder) -> None:
    lines = call("report", run.store.root).stdout.splitlines()
    assert lines[0] == f"run: {run.path}"
    assert [line.split()[0] for line in lines[3:5]] == ["b", "a"]
    assert lines[5:] == [
        "2 tasks: 1 done, 1 interrupted",
        "1 task was interrupted: the same `dfmpc run` command resumes",
        "1 task has not run: the same `dfmpc run` command resumes",
    ]
    assert call("report", run.path, "--only", "a/*").stdout.splitlines()[-1] == "1 task: 1 done"


def test_a_report_of_a_run_at_work_does_not_say_resume(run: RunFolder) -> None:
    ledger = Ledger(run)
    ledger.append(Event(Kind.TASK_STARTED, task="b/r4", attempt="a2"))
    said = call("report", run.path).stdout
    ledger.close()
    assert said.endswith("1 task running, 1 waiting: see `dfmpc status`\n")


def test_a_pattern_that_matches_nothing_ends_with_2(run: RunFolder) -> None:
    result = call("report", run.path, "--only", "nobody/*")
    assert result.exit_code == 2
    assert "--only 'nobody/*' matches no task; the tasks are z/r4, b/r4, a/r4" in result.stderr


def test_explanations_stand_under_a_heading(run: RunFolder) -> None:
    row = bare_row(run, run.frozen().tasks[0], "done", "a1", "cpu")
    row_text = run_text(run.store.root, RunSummary(run.path, [row], 0, ["z/r4: its seed changed"])).splitlines()
    assert "\n".join(row_text[3:6]) == "1 task: 1 done\nwhy tasks were not reused:\n  z/r4: its seed changed"
    assert row_text[6].startswith("artifacts: ")
    assert "why" not in run_text(run.store.root, RunSummary(run.path, [row], 0))
