"""Publishing: the pointers of a store, who moves them, and who follows them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dfmpc
import pytest
import torch
from dfmpc import cli
from dfmpc.artifact.latest import Latest, artifact_at, pointers, read_latest
from dfmpc.errors import ArtifactError, StorageError
from dfmpc.report.rows import ModelRow
from dfmpc.run.gc import GcRules, collect_garbage
from dfmpc.run.latest import Publisher, publish
from dfmpc.run.store import Store
from typer.testing import CliRunner

R4: dict[str, object] = {"name": "r4", "method": "rtn", "bits": 4}
R8: dict[str, object] = {"name": "r8", "method": "rtn", "bits": 8}
CPU = {"devices": "cpu"}
NOON = datetime(2025, 1, 1, 12, tzinfo=UTC)


def row(key: str = "a", hours: float = 0, **fields: Any) -> ModelRow:
    """A row of net/r4 whose artifact is named by ``key``, so many hours after noon."""
    made = ModelRow(
        run=f"run-{key}",
        task="net/r4",
        model="net",
        bit_plan="r4",
        method="rtn",
        status="done",
        finished_at=NOON + timedelta(hours=hours),
        attempt=f"{key}{hours}",
        key=key * 64,
        artifact=f"artifacts/net/r4/{key * 12}",
        gate="pass",
    )
    return replace(made, **fields)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    store.prepare()
    return store


def named(store: Store) -> str:
    return read_latest(store.latest / "net" / "r4").artifact[-1]


@pytest.mark.parametrize(
    ("fields", "moves"),
    [
        ({}, True),
        ({"status": "reused"}, True),
        ({"gate": "warn"}, True),
        ({"gate": "none"}, True),
        ({"gate": None}, True),
        ({"gate": "fail"}, False),
        ({"status": "failed", "gate": None}, False),
        ({"status": "interrupted", "gate": None}, False),
        ({"artifact": None}, False),
    ],
)
def test_a_task_publishes_unless_it_failed_or_its_gate_is_closed(store: Store, fields: Any, moves: bool) -> None:
    assert publish(store, row("a"))
    assert publish(store, row("b", 1, **fields)) is moves
    assert named(store) == ("b" if moves else "a")


def test_the_pointer_says_what_where_who_and_when(store: Store) -> None:
    publish(store, row("a"))
    assert json.loads((store.latest / "net" / "r4").read_text()) == {
        "key": "a" * 64,
        "artifact": "artifacts/net/r4/aaaaaaaaaaaa",
        "run": "run-a",
        "finished_at": "2025-01-01T12:00:00+00:00",
    }
    assert pointers(store.root) == [store.latest / "net" / "r4"]
    assert artifact_at(store.latest / "net" / "r4") == store.root / "artifacts/net/r4/aaaaaaaaaaaa"


def test_an_older_task_that_is_settled_late_moves_nothing_and_the_same_artifact_is_left_alone(store: Store) -> None:
    publish(store, row("b", 2))
    before = (store.latest / "net" / "r4").stat().st_ino
    assert not publish(store, row("a", 1))
    assert not publish(store, row("b", 3))
    assert (store.latest / "net" / "r4").stat().st_ino == before


def test_a_clock_that_was_ahead_and_a_spoilt_pointer_hold_nothing(store: Store) -> None:
    publish(store, row("a", finished_at=datetime.now(UTC) + timedelta(days=900)))
    assert publish(store, row("b"))
    (store.latest / "net" / "r4").write_text('{"key": "x"')
    assert publish(store, row("c"))
    assert named(store) == "c"


def test_writers_at_once_leave_one_whole_pointer(store: Store) -> None:
    rows = [row(key, number) for number, key in enumerate("abcdef" * 5)]
    threads = [threading.Thread(target=publish, args=(store, one)) for one in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert named(store) in "abcdef"
    assert [file.name for file in (store.latest / "net").iterdir()] == ["r4"]


def test_the_publisher_moves_while_a_run_goes_on_and_again_at_its_end(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dfmpc.run.latest.PERIOD_S", 3600.0)  # whatever the disk takes for a pointer
    publisher = Publisher(store)
    publisher.update([row("a")])
    assert named(store) == "a"
    publisher.update([row("a"), row("b", 1)])
    assert named(store) == "a", "not before its time"
    publisher.settle([row("a"), row("b", 1)])
    assert (named(store), publisher.moved, publisher.problem) == ("b", ["net/r4", "net/r4"], "")


def test_a_pointer_that_cannot_be_written_is_tried_again_at_the_end_and_told(store: Store) -> None:
    (store.root / "latest").write_text("in the way")
    publisher = Publisher(store)
    publisher.update([row("a")])
    assert publisher.problem == ""
    publisher.settle([row("a")])
    assert f"{store.latest / 'net'}: cannot be written" in publisher.problem
    with pytest.raises(StorageError):
        publish(store, row("a"))


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"key": "a", "artifact": "../../etc", "run": "r", "finished_at": "2025-01-01T12:00:00+00:00"}'],
)
def test_a_file_that_is_no_pointer_is_refused(store: Store, text: str) -> None:
    file = store.latest / "net" / "r4"
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(ArtifactError, match="neither an artifact's folder nor a pointer STORE/latest/MODEL/PLAN"):
        dfmpc.load(file)


def test_a_pointer_that_was_copied_out_of_its_store_is_refused(store: Store, tmp_path: Path) -> None:
    Latest("a" * 64, "artifacts/net/r4/aaaaaaaaaaaa", "r", NOON).write(tmp_path / "elsewhere" / "r4")
    with pytest.raises(ArtifactError, match="counts from its store"):
        artifact_at(tmp_path / "elsewhere" / "r4")


def call(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(one) for one in arguments])


def test_commands_follow_a_pointer_and_gc_spares_what_it_names(bench: Any) -> None:
    job = bench.job([bench.model("net")], [R4], resources=CPU)
    ended = call("run", job, "--json")
    assert ended.exit_code == 0, ended.output
    document = json.loads(ended.stdout)
    assert (document["published"], document["unpublished"]) == (["net/r4"], "")
    pointer, folder = bench.store / "latest" / "net" / "r4", bench.store / document["models"][0]["artifact"]

    state = dfmpc.load_state_dict(pointer)
    direct = dfmpc.load_state_dict(folder)
    assert all(torch.equal(state[name], direct[name]) for name in direct)
    assert isinstance(dfmpc.load(pointer), torch.nn.Module)
    assert dfmpc.verify(pointer).findings == []
    assert call("inspect", pointer, "--json").stdout == (folder / "manifest.json").read_text()
    assert call("verify", pointer).stdout == f"good  {folder}\n1 artifact checked, 0 bad\n"
    exported = bench.folder / "exported.safetensors"
    ended = call("export", pointer, "--format", "state-dict", "--output", exported)
    assert ended.exit_code == 0, ended.output
    assert exported.is_file()

    rules = GcRules(older_than_s=0.0)
    assert [item.kind for item in collect_garbage(bench.store, rules).items if item.kind == "artifact"] == []
    pointer.write_text("torn")
    assert [item.kind for item in collect_garbage(bench.store, rules).items if item.kind == "artifact"] == []
    pointer.unlink()
    garbage = [item.path for item in collect_garbage(bench.store, rules).items if item.kind == "artifact"]
    assert garbage == [folder.relative_to(bench.store).as_posix()]


def test_verify_of_a_store_finds_a_pointer_to_nothing(bench: Any) -> None:
    ended = call("run", bench.job([bench.model("net")], [R4], resources=CPU), "--json")
    assert ended.exit_code == 0, ended.output
    Latest("a" * 64, "artifacts/net/r8/aaaaaaaaaaaa", "r", NOON).write(bench.store / "latest" / "net" / "r8")
    found = call("verify", bench.store, "--json")
    assert found.exit_code == 4
    bad = [one for one in json.loads(found.stdout)["artifacts"] if one["findings"]]
    assert [one["path"] for one in bad] == [str(bench.store / "artifacts/net/r8/aaaaaaaaaaaa")]


def test_todays_gates_judge_reused_artifacts_and_hold_back_new_ones(bench: Any) -> None:
    models = [bench.model("net"), {**bench.model("strict"), "gates": {"max_bits_per_weight": 1}}]
    loose: dict[str, Any] = {"gates": {"max_bits_per_weight": {"warn": 1}}, "resources": CPU}
    first = dfmpc.run(bench.job(models, [R4], **loose), progress=False)
    rows = {one.task: one for one in first.rows}
    assert (rows["net/r4"].gate, rows["strict/r4"].gate, first.exit_code) == ("warn", "fail", 3)
    assert "bits a weight, max_bits_per_weight is 1" in (rows["strict/r4"].gate_reason or "")
    assert (bench.store / str(rows["strict/r4"].artifact) / "manifest.json").is_file(), "kept, but not published"
    assert first.published == ["net/r4"]
    assert not (bench.store / "latest" / "strict").exists()

    strict = {"gates": {"max_bits_per_weight": {"warn": 2, "fail": 3}}, "resources": CPU}
    models[1]["gates"] = {"max_bits_per_weight": None, "max_seconds": 600}
    second = dfmpc.run(bench.job(models, [R4], **strict), progress=False)
    rows = {one.task: one for one in second.rows}
    assert {one.status for one in second.rows} == {"reused"}, "gates are in no key"
    assert (rows["net/r4"].gate, rows["strict/r4"].gate, second.exit_code) == ("fail", "pass", 3)
    assert second.published == ["strict/r4"]
    assert read_latest(bench.store / "latest" / "net" / "r4").run == first.run.name, "a closed gate moves nothing"


def test_a_warning_ends_with_0_and_is_said(bench: Any) -> None:
    job = bench.job([bench.model("net")], [R4], gates={"max_bits_per_weight": {"warn": 1}}, resources=CPU)
    ended = call("run", job)
    assert ended.exit_code == 0, ended.output
    assert "net/r4 gate warns: " in ended.stdout
    assert "gates: 1 warn" in ended.stdout
    assert f"latest:    {bench.store / 'latest'} (1 pointer moved)" in ended.stdout


def test_a_changed_model_moves_the_pointer_and_a_vanished_one_is_noted(bench: Any) -> None:
    models = [bench.model("net"), bench.model("old")]
    first = dfmpc.run(bench.job(models, [R4, R8], resources=CPU), progress=False)
    assert (len(first.published), first.vanished.models) == (4, ())
    bench.checkpoint("net", bench.state(seed=1))
    second = dfmpc.run(bench.job(models[:1], [R4, R8], resources=CPU), progress=False)
    assert second.published == ["net/r4", "net/r8"]
    assert {one.status for one in second.rows} == {"done"}
    assert (second.vanished.previous, second.vanished.models) == (first.run.name, ("old",))
    noted = json.loads((second.run / "vanished.json").read_text())
    assert noted == {"previous": first.run.name, "models": ["old"]}
    assert artifact_at(bench.store / "latest" / "old" / "r4").is_dir(), "what was made of it stays"
    ended = call("run", bench.job(models[:1], [R4, R8], resources=CPU))
    assert "gone" not in ended.stdout, "told once"


def test_a_run_whose_scheduler_was_killed_is_published_by_the_one_that_resumes_it(bench: Any) -> None:
    """It dies when a worker has kept its first outcome, before or after it could hear of it."""
    job = bench.job([bench.model("net")], [R4, R8], resources={**CPU, "workers_per_device": 1})
    command = [sys.executable, "-m", "dfmpc.cli", "run", str(job)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ)
    ledgers = bench.store / "runs"
    while process.poll() is None and not any(
        '"task_finished"' in file.read_text() for file in ledgers.glob("*/ledger/*.jsonl")
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    again = dfmpc.run(job, progress=False)
    assert again.exit_code == 0
    published = {"/".join(file.parts[-2:]) for file in pointers(bench.store)}
    assert published == {"net/r4", "net/r8"}
    for one in again.rows:
        assert read_latest(bench.store / "latest" / one.task).artifact == one.artifact
