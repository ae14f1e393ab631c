"""Which part of a run is a shard's, from what it is told, and what a sharded command does."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dfmpc.errors import UsageError
from dfmpc.job.loader import load_job
from dfmpc.run.begin import RunOptions, run_job
from dfmpc.run.ledger import Kind, read_events
from dfmpc.run.shards import Shard, array_note, assign, models_of, parse_shard
from dfmpc.run.store import RunFolder, Store
from dfmpc.show import run_text

STEPS = {"SLURM_ARRAY_TASK_ID": "25", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_STEP": "10"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "0"}


@pytest.mark.parametrize(
    ("text", "env", "expected"),
    [
        ("0/1", {}, (0, 1)),
        ("3/4", {"SLURM_ARRAY_TASK_ID": "1"}, (3, 4)),
        ("auto", ARRAY, (3, 4)),
        ("auto", {**ARRAY, "SLURM_ARRAY_TASK_MIN": "1"}, (2, 4)),
        ("auto", {**ARRAY, **STEPS}, (2, 4)),
        ("auto/4", ARRAY, (3, 4)),
        ("auto/8", {**ARRAY, "SLURM_ARRAY_TASK_COUNT": "1", "SLURM_ARRAY_TASK_MIN": "3"}, (3, 8)),
        ("auto/8", {"SLURM_ARRAY_TASK_ID": "3"}, (3, 8)),
        ("auto/5", {"JOB_COMPLETION_INDEX": "4"}, (4, 5)),
        ("auto", {"JOB_COMPLETION_INDEX": "0", "DFMPC_SHARDS": "2"}, (0, 2)),
        ("auto/3", {"JOB_COMPLETION_INDEX": "2", "DFMPC_SHARDS": "2"}, (2, 3)),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_a_shard_is_read_from_its_text_and_the_cluster(
    text: str, env: dict[str, str], expected: tuple[int, int]
) -> None:
    assert parse_shard(text, env) == Shard(*expected)
    assert str(Shard(*expected)) == "/".join(map(str, expected))


@pytest.mark.parametrize(
    ("text", "env", "message"),
    [
        ("4/4", {}, r"4/4 is out of range .*0/4, 1/4"),
        ("-1/3", {}, r"'-1/3' is no shard: give I/N"),
        ("1/0", {}, "1/0 is out of range"),
        ("a/b", {}, "'a/b' is no shard"),
        ("1", {}, "'1' is no shard"),
        ("1/2/3", {}, "'1/2/3' is no shard"),
        (" 1/2", {}, "' 1/2' is no shard"),
        ("auto/x", {}, "'auto/x' is no shard"),
        ("auto", {}, "neither SLURM_ARRAY_TASK_ID nor JOB_COMPLETION_INDEX is set"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "3"}, "SLURM_ARRAY_TASK_COUNT is not set: give auto/N"),
        ("auto", {"JOB_COMPLETION_INDEX": "3"}, "does not tell how many .*set DFMPC_SHARDS"),
        ("auto/3", {"JOB_COMPLETION_INDEX": "3"}, r"with JOB_COMPLETION_INDEX=3 is out of range"),
        ("auto/0", {"JOB_COMPLETION_INDEX": "0"}, "out of range"),
        ("auto", {**ARRAY, "SLURM_ARRAY_TASK_ID": "7"}, r"SLURM_ARRAY_TASK_ID=7 is out of range \(7 of 4\)"),
        ("auto", {**ARRAY, "SLURM_ARRAY_TASK_STEP": "2"}, r"=3 is not 0 plus a multiple of 2: .* 0-3"),
        ("auto", {**ARRAY, "SLURM_ARRAY_TASK_COUNT": "four"}, "SLURM_ARRAY_TASK_COUNT='four' is no number"),
        ("auto", {"JOB_COMPLETION_INDEX": "0", "DFMPC_SHARDS": "-1"}, "DFMPC_SHARDS='-1' is no number"),
    ],
)  # fmt: skip
def test_what_is_no_shard_is_a_usage_error(text: str, env: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_shard(text, env)


def test_an_array_without_a_shard_is_noted() -> None:
    assert array_note({}) is None
    assert "SLURM_ARRAY_TASK_ID=3, but no --shard is given: this does all tasks" in str(array_note(ARRAY))
    assert "JOB_COMPLETION_INDEX=0" in str(array_note({"JOB_COMPLETION_INDEX": "0"}))


def test_models_go_by_size_to_the_shard_with_the_fewest_bytes() -> None:
    assert assign({"a": 5, "b": 9, "c": 4, "d": 4, "e": 1}, 2) == {"b": 0, "a": 1, "c": 1, "d": 0, "e": 1}
    assert assign(dict.fromkeys("abcde", 0), 3) == {"a": 0, "b": 1, "c": 2, "d": 0, "e": 1}, "sizes that are not known"
    assert models_of(Shard(2, 3), ["x", "y"], {"x": 1}) == frozenset(), "more shards than models"


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40])
def test_shards_cover_the_list_once_and_differ_by_the_largest_model_at_most(count: int) -> None:
    choice = random.Random(count)
    sizes = {f"m{number}": int(choice.lognormvariate(16, 2)) for number in range(30)}
    parts = [models_of(Shard(index, count), choice.sample(sorted(sizes), 30), sizes) for index in range(count)]
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    loads = [sum(sizes[name] for name in part) for part in parts]
    assert max(loads) - min(loads) <= max(sizes.values())


PLANS: list[dict[str, object]] = [
    {"name": "r4", "method": "rtn", "bits": 4},
    {"name": "r8", "method": "rtn", "bits": 8},
]


def _bytes_of(store: Path) -> dict[str, bytes]:
    files = (path for path in (store / "artifacts").rglob("*") if path.is_file())
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


def _run(job: Path, shard: Shard | None, **options: Any) -> Any:
    return run_job(load_job(job), RunOptions(progress=False, devices="cpu", shard=shard, **options))


def _said(run: Path) -> list[Kind]:
    """Return what the commands at ``run`` said of themselves."""
    return [event.kind for event in read_events(RunFolder(run)) if not event.task]


def test_shards_share_one_run_and_a_finished_part_has_nothing_to_do(bench: Any) -> None:
    job = bench.job([bench.model("a"), bench.model("b"), bench.model("c")], PLANS)
    first = _run(job, Shard(0, 2))
    assert [row.task for row in first.rows] == ["a/r4", "a/r8", "c/r4", "c/r8"]
    assert (first.exit_code, first.resumed) == (0, False)
    assert _said(first.run)[-1] is Kind.PART_FINISHED
    again = _run(job, Shard(0, 2))
    assert (again.run, again.resumed, again.exit_code, len(again.rows)) == (first.run, True, 0, 4)
    second = _run(job, Shard(1, 2))
    assert (second.run, [row.task for row in second.rows]) == (first.run, ["b/r4", "b/r8"])
    assert _said(first.run)[-1] is Kind.RUN_FINISHED
    assert len(Store(bench.store).run_folders()) == 1
    whole = bench.folder / "whole"
    run_job(load_job(job, output=str(whole)), RunOptions(progress=False, devices="cpu"))
    assert _bytes_of(whole) == _bytes_of(bench.store)
    assert _run(job, None).run != first.run, "all parts were finished"


def test_sizes_are_those_of_the_run_that_is_joined(bench: Any) -> None:
    job = bench.job([bench.model("a"), bench.model("b")], PLANS[:1])
    first = _run(job, Shard(0, 2))
    assert [row.task for row in first.rows] == ["a/r4"]
    with open(bench.folder / "b.safetensors", "ab") as file:
        file.write(b"\0" * 4096)  # b would now be the largest and shard 0's
    assert RunFolder(first.run).frozen().bytes["a"] == RunFolder(first.run).frozen().bytes["b"]
    assert [row.task for row in _run(job, Shard(1, 2)).rows] == ["b/r4"]


def test_a_shard_that_failed_is_told_by_its_own_exit_code_and_retried_by_its_own_command(bench: Any) -> None:
    models = [bench.model("a"), bench.model("b", checkpoint="absent.safetensors")]
    job = bench.job(models, PLANS[:1])
    assert [_run(job, Shard(index, 2)).exit_code for index in (1, 0)] == [3, 0]
    bench.checkpoint("absent", bench.state())
    nothing = _run(job, Shard(0, 2), retry_failed=True)
    assert (nothing.exit_code, [row.status for row in nothing.rows]) == (0, ["done"])
    retried = _run(job, Shard(1, 2), retry_failed=True)
    assert (retried.run, retried.exit_code, [row.status for row in retried.rows]) == (nothing.run, 0, ["done"])


def test_the_command_line_takes_a_shard_and_notes_an_array(bench: Any) -> None:
    job = bench.job([bench.model("a"), bench.model("b")], PLANS[:1])

    def call(*options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dfmpc.cli", "run", str(job), "--devices", "cpu", "--json", *options]
        return subprocess.run(command, env={**os.environ, **ARRAY}, capture_output=True, text=True, check=False)

    part = call("--shard", "auto/8")
    assert (part.returncode, json.loads(part.stdout)["models"]) == (0, []), part.stderr
    assert "no --shard is given" not in part.stderr
    assert "0 tasks: none" in run_text(bench.store, _run(job, Shard(7, 8)))
    whole = call()
    assert (whole.returncode, len(json.loads(whole.stdout)["models"])) == (0, 2), whole.stderr
    assert "SLURM_ARRAY_TASK_ID=3, but no --shard is given: this does all tasks" in whole.stderr
    wrong = call("--shard", "4/4")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "--shard 4/4 is out of range" in wrong.stderr


def test_a_shard_without_a_model_begins_no_run(bench: Any) -> None:
    plans: list[dict[str, object]] = [{"name": "r4", "method": "rtn", "bits": 4}]
    job = bench.job([bench.model("only")], plans)
    summary = run_job(load_job(job, allows=lambda _: True), RunOptions(progress=False, shard=Shard(1, 2)))
    assert (summary.exit_code, summary.rows) == (0, [])
    assert [path for path in (bench.store / "runs").iterdir() if not path.name.startswith(".")] == []
