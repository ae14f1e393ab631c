"""What a worker does with an accelerator's errors, and which devices it sees; no device is needed to see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dfmpc.job.expand import expand
from dfmpc.job.loader import load_job
from dfmpc.models.factory import AllowList
from dfmpc.run.claims import start_run
from dfmpc.run.failures import Failure, Mode
from dfmpc.run.ledger import Ledger
from dfmpc.run.messages import Message, TaskOutcome, WorkerSettings
from dfmpc.run.schedule import devices
from dfmpc.run.shared import SharedModel
from dfmpc.run.store import Store, freeze
from dfmpc.run.worker import make
from dfmpc.run.worker.attempt import Attempt, Context
from dfmpc.run.worker.finisher import Finisher


def _outcome(bench: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> TaskOutcome:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(make, "compress_model", fails)
    loaded = load_job(bench.job([bench.model("net")], [{"name": "r4", "method": "rtn", "bits": 4}]))
    (task,), store = expand(loaded), Store(loaded.store)
    store.prepare()
    run = start_run(store, freeze(loaded, [task])).run
    settings = WorkerSettings(run.path, "cpu", 1, (), None, loaded.job.gates, 0, 0)
    said: list[Message] = []

    def hear(*messages: Message) -> None:
        said.extend(messages)

    finisher = Finisher(run, Ledger(run), hear)
    context = Context(settings, Ledger(run), hear, finisher)
    Attempt(task, Mode(), context, SharedModel(task.model, AllowList.default(()))).run()
    finisher.close()
    (outcome,) = (message for message in said if isinstance(message, TaskOutcome))
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
    outcome = _outcome(bench, monkeypatch, RuntimeError("shape mismatch"))
    assert outcome.failure is Failure.BUG
    assert not outcome.poisoned
    assert (outcome.row.status, outcome.row.error_class) == ("failed", "RuntimeError")


@pytest.fixture
def no_other_visibility(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("visible", "name", "expected"),
    [
        (None, "cuda:1", "1"),
        ("4,7", "cuda:1", "7"),
        ("GPU-aa, GPU-bb", "cuda:0", "GPU-aa"),
        ("MIG-1,MIG-2,MIG-3", "cuda:2", "MIG-3"),
        ("4,7", "cpu", None),
    ],
)
def test_a_worker_sees_its_own_device_alone(
    monkeypatch: pytest.MonkeyPatch, no_other_visibility: None, visible: str | None, name: str, expected: str | None
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.visible_as(name) == expected


def test_mig_slices_count_as_devices_with_and_without_a_list(
    monkeypatch: pytest.MonkeyPatch, no_other_visibility: None, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "_NODES", (str(tmp_path),))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    assert devices.device_slots("auto") == ["cuda:0", "cuda:1"]

    # what nvidia-smi prints where a GPU is cut into slices: the one border that cannot exist here
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA H100 (UUID: GPU-1)'\n"
        'for n in 0 1 2; do echo "  MIG 1g.10gb Device $n: (UUID: MIG-$n)"; done\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert devices.device_slots("cuda") == ["cuda:0", "cuda:1", "cuda:2"]
    assert devices.visible_as("cuda:2") == "MIG-2"


@pytest.mark.parametrize(
    ("names", "asked", "per_device", "threads", "expected"),
    [
        (["cpu"], "auto", None, 1, 8),
        (["cpu"], "auto", None, 4, 2),
        (["cpu"], "cpu", None, 1, 1),
        (["cpu"], "cpu", 3, 1, 3),
        (["cuda:0"], "auto", None, 1, 4),
        (["cuda:0", "cuda:1", "cuda:2", "cuda:3"], "auto", None, 1, 2),
        (["cuda:0"], "auto", None, 16, 1),
    ],
)
def test_workers_a_device_follow_the_cores(
    monkeypatch: pytest.MonkeyPatch, names: list[str], asked: str, per_device: int | None, threads: int, expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(devices, "core_limit", lambda: None)
    assert devices.workers_on(names, asked, per_device, threads) == expected


@pytest.mark.parametrize(("quota", "expected"), [(0.5, 1), (3.9, 3), (8.0, 8), (64.0, 8)])
def test_a_quota_bounds_the_workers_as_cores_do(monkeypatch: pytest.MonkeyPatch, quota: float, expected: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(devices, "core_limit", lambda: quota)
    assert devices.workers_on(["cpu"], "auto", None, 1) == expected
