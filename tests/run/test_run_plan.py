"""Devices, sizes and the plan: what is known before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dfmpc.errors import UsageError
from dfmpc.job.expand import expand
from dfmpc.job.loader import load_job
from dfmpc.run.begin import RunOptions, run_job
from dfmpc.run.plan import make_plan
from dfmpc.run.schedule import devices
from dfmpc.run.schedule.devices import device_slots
from dfmpc.run.sizes import source_bytes

PLANS: list[dict[str, object]] = [
    {"name": "mp", "method": "dfmpc", "low": 2, "high": 6},
    {"name": "r4", "method": "rtn", "bits": 4},
]


@pytest.mark.parametrize(
    ("asked", "found", "expected"),
    [
        ("auto", 0, ["cpu"]),
        ("auto", 2, ["cuda:0", "cuda:1"]),
        ("cuda", 2, ["cuda:0", "cuda:1"]),
        ("cpu,cpu", 0, ["cpu", "cpu"]),
        (["cuda:1", "cpu"], 2, ["cuda:1", "cpu"]),
    ],
)
def test_devices(monkeypatch: pytest.MonkeyPatch, asked: str | list[str], found: int, expected: list[str]) -> None:
    monkeypatch.setattr(devices, "cuda_devices", lambda: found)
    assert device_slots(asked) == expected


@pytest.mark.parametrize(
    ("asked", "found", "message"),
    [
        ("cuda", 0, "'cuda' was asked for, but there is no CUDA device here"),
        ("cuda:3", 2, "'cuda:3' was asked for, but there are only cuda:0 to cuda:1 here"),
        ("gpu", 2, "'gpu' is unknown; give auto, cpu, cuda or names such as cuda:0"),
        ([], 2, "the list is empty"),
    ],
)
def test_devices_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, asked: str | list[str], found: int, message: str
) -> None:
    monkeypatch.setattr(devices, "cuda_devices", lambda: found)
    with pytest.raises(UsageError, match=message):
        device_slots(asked)


def test_nothing_starts_where_no_task_matches_or_the_output_cannot_be_written(bench: Any) -> None:
    loaded = load_job(bench.job([bench.model("good")], PLANS))
    with pytest.raises(UsageError, match=r"--only 'bad/\*' matches no task; the tasks are good/mp, good/r4"):
        run_job(loaded, RunOptions(only="bad/*"))
    assert not bench.store.exists()
    bench.store.write_text("a file in the way")
    with pytest.raises(UsageError, match=r"output .*store cannot be written"):
        run_job(loaded, RunOptions(progress=False))


def test_a_plan_reads_sizes_and_writes_nothing(bench: Any) -> None:
    missing = {**bench.model("missing"), "checkpoint": "absent.safetensors"}
    loaded = load_job(bench.job([bench.model("good"), missing], PLANS))
    before = sorted(bench.folder.rglob("*"))
    plan = make_plan(loaded)
    assert sorted(bench.folder.rglob("*")) == before
    size = (bench.folder / "good.safetensors").stat().st_size
    assert [(row.task, row.checkpoint_bytes, row.finished) for row in plan.rows] == [
        ("good/mp", size, False),
        ("good/r4", size, False),
        ("missing/mp", 0, False),
        ("missing/r4", 0, False),
    ]
    assert plan.rows[0].predicted_memory_bytes == 4 * size + 2_600_000_000
    assert plan.rows[1].predicted_memory_bytes == 4 * size + 600_000_000
    assert (plan.totals.tasks, plan.totals.finished, plan.totals.checkpoint_bytes) == (4, 0, size)
    assert plan.totals.free_bytes > 0
    assert len(plan.problems) == 1
    assert "absent.safetensors" in plan.problems[0]
    elsewhere = load_job(bench.job([bench.model("good")], PLANS, resources={"devices": ["cuda:99"]}))
    with pytest.raises(UsageError, match="devices: 'cuda:99' was asked for"):
        make_plan(elsewhere)


def test_a_shard_index_counts_its_shards(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "two.safetensors").write_bytes(b"x" * 50)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}}')
    loaded = load_job(bench.job([{**bench.model("good"), "checkpoint": str(index)}], PLANS))
    assert source_bytes(expand(loaded)[0].model) == 150 + index.stat().st_size
