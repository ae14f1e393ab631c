"""What a worker does with an accelerator's errors; no device is needed to see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dfmpc.job.expand import expand
from dfmpc.job.loader import load_job
from dfmpc.run.claims import start_run
from dfmpc.run.ledger import Ledger
from dfmpc.run.messages import TaskOutcome, WorkerSettings
from dfmpc.run.store import Store, freeze
from dfmpc.run.worker import group


def _outcome(bench: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> TaskOutcome:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(group, "compress_model", fails)
    loaded = load_job(bench.job([bench.model("net")], [{"name": "r4", "method": "rtn", "bits": 4}]))
    tasks, store = expand(loaded), Store(loaded.store)
    store.prepare()
    run = start_run(store, freeze(loaded, tasks)).run
    settings = WorkerSettings(run.path, "cpu", 1, (), None, loaded.job.gates, 0, 0)
    (outcome,) = group.run_group(tasks, group.GroupContext(settings, Ledger(run), lambda _: None))
    return outcome


@pytest.mark.parametrize("said", ["CUDA error: an illegal memory access", "Triton Error [CUDA]: invalid argument"])
def test_an_error_that_sticks_to_the_process_ends_the_worker(
    bench: Any, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    outcome = _outcome(bench, monkeypatch, RuntimeError(f"{said}\nlong explanation"))
    assert outcome.poisoned
    assert (outcome.row.status, outcome.row.error_class) == ("failed", "DeviceError")
    assert outcome.row.error == f"cpu failed in mid-task: {said}; run again with --retry-failed, or on other --devices"
    assert list(Path(bench.store / ".attempts").iterdir()) == []


def test_another_error_does_not(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = _outcome(bench, monkeypatch, RuntimeError("CUDA out of memory"))
    assert not outcome.poisoned
    assert (outcome.row.status, outcome.row.error_class) == ("failed", "RuntimeError")
