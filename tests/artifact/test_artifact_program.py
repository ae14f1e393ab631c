from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from dfmpc.artifact.commit import discard, new_attempt
from dfmpc.artifact.key import task_key
from dfmpc.artifact.loader import load, load_state_dict
from dfmpc.artifact.manifest import MANIFEST, PROGRAM, TENSORS
from dfmpc.artifact.verify import verify
from dfmpc.artifact.writer import write_artifact
from dfmpc.compress.compress import compress_model
from dfmpc.errors import StorageError, UsageError
from dfmpc.job.methods import RtnPlan
from dfmpc.job.sources import ModelSource
from dfmpc.job.task import Task
from dfmpc.models.factory import AllowList
from dfmpc.models.load import load_model
from torch import nn


def network() -> nn.Module:
    torch.manual_seed(2)
    body = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64))
    return nn.Sequential(body, nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 10)).eval()


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folders of two artifacts that were made one after the other from one .pt2 file."""
    folder = tmp_path_factory.mktemp("program")
    example = torch.zeros(1, 3, 8, 8)
    torch.export.save(torch.export.export(network(), (example,)), folder / "net.pt2")
    source = ModelSource(name="net", program=str(folder / "net.pt2"))
    plan = RtnPlan(name="rtn4", method="rtn", bits=4)
    task = Task(id="net/rtn4", model=source, plan=plan)
    key = task_key(task, ["e" * 64], distribution=None)
    for name in ("a", "b"):
        model = load_model(source, AllowList(()))
        (folder / name).mkdir()
        write_artifact(folder / name, model=model, compressed=compress_model(model, plan), task=task, key=key)
    return folder / "a", folder / "b"


def test_an_artifact_of_a_program_loads_without_the_original(artifacts: tuple[Path, Path]) -> None:
    state = load_state_dict(artifacts[0])
    rebuilt = load(artifacts[0])
    want = network()
    want.load_state_dict(state)
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.equal(rebuilt(x), want(x))
        assert not torch.equal(rebuilt(x), network()(x))
    assert verify(artifacts[0]).findings == []


def test_a_program_is_in_eval_mode_and_stays_there(artifacts: tuple[Path, Path]) -> None:
    rebuilt = load(artifacts[0])
    assert not any(module.training for module in rebuilt.modules())
    assert rebuilt.eval() is rebuilt
    assert rebuilt.train(False) is rebuilt
    assert nn.Sequential(rebuilt).eval().training is False
    assert copy.deepcopy(rebuilt).eval().training is False
    assert set(rebuilt.state_dict()) == set(network().state_dict())
    with pytest.raises(UsageError, match=r"train\(\): an exported program has eval mode only"):
        rebuilt.train()
    model = load_model(ModelSource(name="net", program=str(artifacts[0].parent / "net.pt2")), AllowList(()))
    assert model.module.eval().training is False


def test_bytes_do_not_differ_from_run_to_run(artifacts: tuple[Path, Path]) -> None:
    for name in (TENSORS, PROGRAM, MANIFEST):
        first, second = (hashlib.sha256((folder / name).read_bytes()).hexdigest() for folder in artifacts)
        assert first == second, name


def test_the_program_has_no_weights_of_its_own(artifacts: tuple[Path, Path]) -> None:
    weights = 4 * sum(tensor.numel() for tensor in network().parameters())
    assert (artifacts[0] / PROGRAM).stat().st_size < weights / 4
    assert sorted(path.name for path in artifacts[0].iterdir()) == [MANIFEST, TENSORS, PROGRAM]


def test_a_program_that_does_not_fit_on_the_disk_is_a_storage_error(
    tmp_path: Path, largest_file: Callable[[int], AbstractContextManager[None]]
) -> None:
    convolution = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).eval()
    torch.export.save(torch.export.export(convolution, (torch.zeros(1, 1, 4, 4),)), tmp_path / "net.pt2")
    source = ModelSource(name="net", program=str(tmp_path / "net.pt2"))
    plan = RtnPlan(name="rtn4", method="rtn", bits=4)
    model = load_model(source, AllowList(()))
    attempt = new_attempt(tmp_path, "a" * 64)
    with largest_file(2000), pytest.raises(StorageError, match=r"EFBIG"):
        write_artifact(
            attempt,
            model=model,
            compressed=compress_model(model, plan),
            task=Task(id="net/rtn4", model=source, plan=plan),
            key=task_key(Task(id="net/rtn4", model=source, plan=plan), ["e" * 64], distribution=None),
        )
    assert sorted(path.name for path in attempt.iterdir()) == [TENSORS, PROGRAM]
    discard(attempt)
    assert list(attempt.parent.iterdir()) == []
