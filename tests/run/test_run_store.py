"""The store's names, joining runs, and the frozen list."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from dfmpc.errors import UsageError
from dfmpc.job.expand import expand
from dfmpc.job.loader import LoadedJob, load_job
from dfmpc.run.claims import start_run
from dfmpc.run.resume import create_or_join_run
from dfmpc.run.store import RunFolder, Store, find_run, freeze, same_list

KEY = "0123456789abcdef" * 4


def _job(folder: Path, *, timeout: str = "30m", seed: int = 0) -> LoadedJob:
    file = folder / "job.yaml"
    file.write_text(
        f"""
version: 1
name: nightly
output: {folder / "store"}
seed: {seed}
models: [{{program: a.pt2}}, {{program: b.pt2}}]
bit_plans: [{{name: r4, method: rtn, bits: 4}}]
resources: {{task_timeout: {timeout}}}
"""
    )
    return load_job(file)


def _new_run(folder: Path, seed: int = 0) -> RunFolder:
    loaded = _job(folder, seed=seed)
    store = Store(loaded.store)
    store.prepare()
    return start_run(store, freeze(loaded, expand(loaded))).run


def test_names_of_artifacts_and_logs(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert store.artifact_folder("m", "p", KEY) == tmp_path / "artifacts/m/p/0123456789ab"
    run = RunFolder(tmp_path / "runs" / "r1")
    assert run.log_file("m", "p", "a1") == tmp_path / "runs/r1/logs/m/p/a1.log"
    assert run.store == store


def test_a_run_is_named_by_time_and_list_and_reads_back_what_was_frozen(tmp_path: Path) -> None:
    loaded = _job(tmp_path)
    frozen = freeze(loaded, expand(loaded))
    run = _new_run(tmp_path)
    assert re.fullmatch(rf"\d{{8}}T\d{{12}}Z-{frozen.digest[:8]}", run.run_id)
    assert run.frozen() == frozen
    content = json.loads(run.tasks_file.read_text())
    assert content["format_version"] == 1
    assert [task["id"] for task in content["tasks"]] == ["a/r4", "b/r4"]
    assert content["tasks"][0]["model"]["program"] == str(tmp_path / "a.pt2")
    assert sorted(path.name for path in run.path.parent.iterdir()) == [".claims", run.run_id]
    assert list(run.store.attempts.iterdir()) == []


def test_resources_do_not_change_the_list_but_the_seed_does(tmp_path: Path) -> None:
    run = _new_run(tmp_path)
    longer = _job(tmp_path, timeout="2h")
    store = Store(longer.store)
    assert list(same_list(store, freeze(longer, expand(longer)))) == [run]
    seeded = _job(tmp_path, seed=1)
    assert list(same_list(store, freeze(seeded, expand(seeded)))) == []


def test_a_relative_evaluation_set_is_frozen_by_its_absolute_path(tmp_path: Path) -> None:
    (tmp_path / "images.parquet").write_bytes(b"")
    loaded = _job(tmp_path)
    text = loaded.path.read_text() + "evaluate: {data: images.parquet}\n"
    loaded.path.write_text(text)
    loaded = load_job(loaded.path)
    evaluate = freeze(loaded, expand(loaded)).evaluate
    assert evaluate is not None
    assert evaluate.data == str(tmp_path / "images.parquet")


def test_find_run_takes_a_run_or_the_newest_of_a_store(tmp_path: Path) -> None:
    old, new = _new_run(tmp_path), _new_run(tmp_path, seed=1)
    assert find_run(old.path) == old
    assert find_run(tmp_path / "store") == new
    (tmp_path / "store" / "runs" / ".new-torn").mkdir()
    assert find_run(tmp_path / "store") == new


def test_find_run_says_what_is_wrong_with_the_path(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="absent is no folder"):
        find_run(tmp_path / "absent")
    with pytest.raises(UsageError, match=r"neither a run .* nor a store"):
        find_run(tmp_path)
    Store(tmp_path).prepare()
    with pytest.raises(UsageError, match="holds no run yet"):
        find_run(tmp_path)


def test_a_list_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    run = _new_run(tmp_path)
    run.tasks_file.write_text(run.tasks_file.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(UsageError, match=r"tasks.json is no task list of this version: format_version"):
        run.frozen()


def test_an_output_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=r"output .*file/store cannot be written .*--output"):
        Store(tmp_path / "file" / "store").prepare()
    assert UsageError.exit_code == 2


def test_an_unfinished_run_is_joined_and_one_that_cannot_be_read_blocks_nothing(tmp_path: Path) -> None:
    old = _new_run(tmp_path)
    loaded = _job(tmp_path)
    frozen = freeze(loaded, expand(loaded))
    joined = create_or_join_run(old.store, frozen)
    assert (joined.run, joined.resumed, len(joined.open_tasks)) == (old, True, 2)

    torn = old.report / "models" / "0123456789abcdef-aaaaaaaaaaaa.parquet"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"PAR1 torn")
    fresh = create_or_join_run(old.store, frozen)
    assert (fresh.run == old, fresh.resumed, len(fresh.open_tasks)) == (False, False, 2)

    fresh.run.tasks_file.write_text("{torn")
    torn.unlink()
    again = create_or_join_run(old.store, frozen)
    assert (again.run, again.resumed) == (old, True)
