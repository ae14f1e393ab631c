from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from dfmpc.errors import CheckpointError, MismatchError
from dfmpc.job.plan import plan_from
from dfmpc.job.sources import ModelSource
from dfmpc.job.task import Task
from dfmpc.models.digest import tree_digest
from dfmpc.models.factory import AllowList
from dfmpc.models.locate import input_files
from dfmpc.models.reading import FileBytes, read_files
from dfmpc.run.shared import ModelKeys, SharedModel
from safetensors.torch import save_file

ALLOW = AllowList(("torch.nn",))


class Reader:
    """Reads, and remembers how often and what has become of the bytes."""

    def __init__(self) -> None:
        self.alive: list[weakref.ref[memoryview]] = []

    def __call__(self, source: ModelSource) -> Sequence[FileBytes]:
        files = read_files(input_files(source))
        self.alive += [weakref.ref(file.data) for file in files]
        return files

    @property
    def held(self) -> int:
        return sum(found() is not None for found in self.alive)


def save(file: Path, value: float, width: int = 4) -> ModelSource:
    state = {"weight": torch.full((3, width), value), "bias": torch.zeros(3)}
    save_file(state, file) if file.suffix == ".safetensors" else torch.save(state, file)
    return ModelSource(name="net", factory="torch.nn:Linear", args=[4, 3], checkpoint=str(file), input=[1, 4])


def task_of(source: ModelSource) -> Task:
    return Task(id="net/rtn", model=source, plan=plan_from({"name": "rtn", "method": "rtn", "bits": 4}))


def test_keys_are_the_same_with_and_without_the_bytes(tmp_path: Path) -> None:
    source = save(tmp_path / "net.safetensors", 1.0)
    keys, reader = ModelKeys(source, ALLOW), Reader()
    shared = SharedModel(source, ALLOW, read=reader)
    assert keys.inputs() == shared.inputs()
    assert keys.inputs().digests == (tree_digest(tmp_path / "net.safetensors"),)
    assert keys.inputs().size == (tmp_path / "net.safetensors").stat().st_size
    assert keys.key(task_of(source)) == shared.key(task_of(source))
    assert keys.model_key() == shared.model_key()
    assert len(reader.alive) == 1


def test_the_bytes_that_were_digested_are_loaded_whatever_happens_to_the_file(tmp_path: Path) -> None:
    source, reader = save(tmp_path / "net.safetensors", 1.0), Reader()
    shared = SharedModel(source, ALLOW, read=reader)
    digests = shared.inputs().digests
    save(tmp_path / "net.safetensors", 2.0)
    assert float(shared.model().state["weight"].sum()) == 12.0
    assert shared.inputs().digests == digests
    assert len(reader.alive) == reader.held == 1


@pytest.mark.parametrize("suffix", ["pt", "pt2"])
def test_bytes_that_nothing_views_go_back_when_the_network_is_there(tmp_path: Path, suffix: str) -> None:
    source, reader = save(tmp_path / "net.pt", 1.0), Reader()
    if suffix == "pt2":
        program = torch.export.export(torch.nn.Linear(4, 3).eval(), (torch.zeros(1, 4),))
        torch.export.save(program, tmp_path / "net.pt2")
        source = ModelSource(name="net", program=str(tmp_path / "net.pt2"))
    shared = SharedModel(source, ALLOW, read=reader)
    shared.inputs()
    assert reader.held == 1
    assert shared.model().state["weight"].shape == (3, 4)
    assert reader.held == 0
    assert len(reader.alive) == 1


def test_views_go_back_with_the_model(tmp_path: Path) -> None:
    source, reader = save(tmp_path / "net.safetensors", 1.0), Reader()
    shared = SharedModel(source, ALLOW, read=reader)
    state = shared.model().state
    del shared
    assert reader.held == 1
    del state
    assert reader.held == 0


def test_after_an_attempt_that_ran_out_of_memory_the_files_are_read_again_and_must_be_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise MemoryError

    source, reader = save(tmp_path / "net.safetensors", 1.0), Reader()
    kept, changed = SharedModel(source, ALLOW, read=reader), SharedModel(source, ALLOW, read=reader)
    with monkeypatch.context() as patch:
        patch.setattr("dfmpc.models.load.load_model", fails)
        for shared in (kept, changed):
            with pytest.raises(MemoryError):
                shared.model()
    assert (len(reader.alive), reader.held) == (2, 0)
    assert float(kept.model().state["weight"].sum()) == 12.0
    save(tmp_path / "net.safetensors", 2.0)
    with pytest.raises(CheckpointError, match="net: its files were changed after they were read: run it again"):
        changed.model()


def test_a_model_that_does_not_load_holds_no_bytes(tmp_path: Path) -> None:
    source, reader = save(tmp_path / "net.safetensors", 1.0, width=5), Reader()
    shared = SharedModel(source, ALLOW, read=reader)
    errors = []
    for _ in range(2):
        with pytest.raises(MismatchError, match="weight") as caught:
            shared.model()
        errors.append(caught.value)
    assert errors[0] is errors[1]
    assert len(reader.alive) == 1
    assert reader.held == 0


def test_keys_need_no_torch(tmp_path: Path) -> None:
    source = save(tmp_path / "net.safetensors", 1.0)
    code = """
import json, sys
from dfmpc.job.task import Task
from dfmpc.models.factory import AllowList
from dfmpc.run.shared import SharedModel
from dfmpc.run.worker.prefetch import Prefetcher

task = Task.model_validate_json(sys.argv[1])
prefetcher = Prefetcher(threads=2, limit_bytes=1 << 20)
prefetcher.want(task.model)
shared = SharedModel(task.model, AllowList(("torch.nn",)), read=prefetcher.take)
found = [shared.inputs().digests, shared.key(task).key, shared.model_key()]
print(json.dumps([*found, sorted({"torch", "numpy", "safetensors"} & set(sys.modules))]))
"""
    command = [sys.executable, "-c", code, task_of(source).model_dump_json()]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    digests, key, model_key, heavy = json.loads(ended.stdout)
    assert heavy == []
    keys = ModelKeys(source, ALLOW)
    assert tuple(digests) == keys.inputs().digests
    assert (key, model_key) == (keys.key(task_of(source)).key, keys.model_key())
