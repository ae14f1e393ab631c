"""Room on the disk before a run, from what the tasks will write."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from dfmpc.errors import UsageError
from dfmpc.job.expand import expand
from dfmpc.job.loader import load_job
from dfmpc.job.task import Task
from dfmpc.run.predict import free_bytes, predicted_artifact_bytes
from dfmpc.run.preflight import disk_preflight
from dfmpc.run.store import Store

PLANS: list[dict[str, object]] = [
    {"name": "r4", "method": "rtn", "bits": 4},
    {"name": "r8", "method": "rtn", "bits": 8},
]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def tasks(bench: Any) -> list[Task]:
    return expand(load_job(bench.job([bench.model("a"), bench.model("b")], PLANS)))


def _free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free, 0, free))


def test_the_sum_of_what_is_missing_must_fit(bench: Any, tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(bench.store)
    needed = sum(map(predicted_artifact_bytes, tasks))
    assert needed > 4 * 1000
    _free(monkeypatch, needed)
    disk_preflight(store, tasks)
    _free(monkeypatch, needed - 1)
    with pytest.raises(UsageError) as caught:
        disk_preflight(store, tasks)
    mib = f"{needed / 2**20:.1f} MiB"
    assert str(caught.value) == (
        f"{store.root}: the artifacts of 4 tasks may take {mib}, {mib} are free: "
        "free space, choose another --output, or go on with --no-preflight"
    )
    disk_preflight(store, tasks[1:])


def test_what_has_an_artifact_needs_no_room(bench: Any, tasks: list[Task], monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(bench.store)
    _free(monkeypatch, 0)
    disk_preflight(store, [])
    for task in tasks:
        with pytest.raises(UsageError, match="may take"):
            disk_preflight(store, [task])
        folder = store.artifact_folder(task.model.name, task.plan.name, "0" * 64)
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
        disk_preflight(store, [task])


def test_free_space_is_that_of_the_folder_that_will_hold_the_store(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "not" / "there" / "yet") > 0
