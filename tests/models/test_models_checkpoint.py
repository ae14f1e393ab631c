from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from dfmpc.errors import CheckpointError, UnsafeCheckpointError
from dfmpc.models.checkpoint import read_checkpoint
from dfmpc.models.locate import checkpoint_files
from dfmpc.models.reading import read_files
from safetensors.torch import save_file
from torch import Tensor


class Evil:
    """Pickles to a call that makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def tensors() -> dict[str, Tensor]:
    return {"b.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2, dtype=torch.float16)}


def read(files: list[Path]) -> dict[str, Tensor]:
    return read_checkpoint(read_files(files))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def sharded(folder: Path) -> Path:
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.zeros(3)}, folder / "two.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b": "two.safetensors", "a": "one.safetensors"}}))
    return index


def test_safetensors(tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    save_file(tensors(), file)
    assert checkpoint_files(str(file)) == [file]
    assert_same(read([file]), tensors())


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th"])
@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
def test_pickled_state_dicts(tmp_path: Path, suffix: str, wrapper: str | None) -> None:
    file = tmp_path / f"net{suffix}"
    torch.save({wrapper: tensors(), "epoch": 3, "optimizer": {"lr": 0.1}} if wrapper else tensors(), file)
    found = read(checkpoint_files(str(file)))
    assert list(found) == ["b.weight", "a.bias"]
    assert_same(found, tensors())


def test_a_module_prefix_goes_only_where_every_name_has_it(tmp_path: Path) -> None:
    file = tmp_path / "net.pt"
    torch.save({f"module.{name}": tensor for name, tensor in tensors().items()}, file)
    assert_same(read([file]), tensors())
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, file)
    assert set(read([file])) == {"module.a", "b"}


def test_leaves_that_are_no_tensors_are_named(tmp_path: Path) -> None:
    file = tmp_path / "net.pt"
    torch.save({"a": torch.ones(1), "epoch": 3}, file)
    with pytest.raises(CheckpointError, match=r"1 entries are not tensors: epoch \(int\)"):
        read([file])
    torch.save([torch.ones(1)], file)
    with pytest.raises(CheckpointError, match="holds a list; expected a state dict"):
        read([file])


@pytest.mark.parametrize("keep", [0, 5, 60, -1], ids=["empty", "5", "60", "all but one"])
def test_truncated_safetensors(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "net.safetensors"
    save_file(tensors(), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"net\.safetensors: truncated or corrupt; copy or download it again"):
        read([file])


@pytest.mark.parametrize("keep", [0, 100, -40], ids=["empty", "100", "all but 40"])
def test_truncated_pickle(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "net.pt"
    torch.save(tensors(), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"net\.pt: truncated or corrupt"):
        read([file])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    mark = tmp_path / "mark"
    file = tmp_path / "evil.pth"
    torch.save({"a": Evil(mark)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UnsafeCheckpointError) as caught:
        read([file])
    home = os.mkdir.__module__
    assert str(caught.value) == (
        f"{file}: loading it would run code: Trying to load unsupported GLOBAL {home}.mkdir whose module {home} is "
        "blocked; convert it to safetensors where you trust it"
    )
    assert not mark.exists()
    torch.load(file, weights_only=False)
    assert mark.is_dir()


def test_a_pickled_module_is_refused_by_its_class_without_advice_to_load_it_all_the_same(tmp_path: Path) -> None:
    file = tmp_path / "whole.pth"
    torch.save({"net": torch.nn.Linear(2, 2)}, file)
    with pytest.raises(UnsafeCheckpointError) as caught:
        read([file])
    said = str(caught.value)
    assert "would run code: Unsupported global: GLOBAL torch.nn.modules.linear.Linear was not an allowed" in said
    for advice in ("weights_only", "add_safe_globals", "succeed", "\x1b", "\n"):
        assert advice not in said


def test_a_legacy_pickle_whose_storages_are_gone_is_corrupt(tmp_path: Path) -> None:
    file = tmp_path / "net.pt"
    torch.save({"w": torch.randn(3)}, file, _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    key = re.findall(rb"[0-9]{9,}", content)[-1]
    file.write_bytes(key.join(content.split(key)[:-1]) + key[::-1] + content.split(key)[-1])
    with pytest.raises(CheckpointError, match=r"net\.pt: truncated or corrupt"):
        read([file])


def test_shards_come_in_the_order_of_the_index(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    files = checkpoint_files(str(index))
    assert [file.name for file in files] == ["model.safetensors.index.json", "two.safetensors", "one.safetensors"]
    found = read(files)
    assert list(found) == ["b", "a"]
    assert_same(found, {"a": torch.ones(2), "b": torch.zeros(3)})


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"two\.safetensors: a shard that model.*json names does not exist"):
        checkpoint_files(str(index))


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}, r"c \(in no shard, not two"),
        ({"a": "two.safetensors", "b": "two.safetensors"}, r"a \(in no shard, not two"),
        ({"b": "one.safetensors", "a": "two.safetensors"}, r"b \(in two\.safetensors, not one"),
    ],
    ids=["missing tensor", "missing shard of it", "swapped"],
)
def test_an_index_that_does_not_fit_its_shards(tmp_path: Path, weight_map: dict[str, str], said: str) -> None:
    index = sharded(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=said):
        read(checkpoint_files(str(index)))


def test_a_tensor_in_two_shards_is_an_error(tmp_path: Path) -> None:
    index = sharded(tmp_path)
    save_file({"b": torch.zeros(3), "a": torch.zeros(2)}, tmp_path / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor a is in both two\.safetensors and one\.safetensors"):
        read(checkpoint_files(str(index)))


@pytest.mark.parametrize("shard", ["../one.safetensors", "sub/one.safetensors", "..", "a\\b"])
def test_a_shard_outside_the_folder_is_refused(tmp_path: Path, shard: str) -> None:
    index = sharded(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="is not a plain file name beside the index; refused"):
        checkpoint_files(str(index))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_a_broken_index(tmp_path: Path, text: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: (not readable as JSON|has no weight_map)"):
        checkpoint_files(str(index))


def test_missing_file_and_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint: .*gone\.pt: no such file; correct the path"):
        checkpoint_files(str(tmp_path / "gone.pt"))
    odd = tmp_path / "net.h5"
    odd.write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"unknown suffix '\.h5'; expected \.safetensors"):
        read([odd])


def test_package_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "weights_of_mine"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    save_file(tensors(), package / "models" / "a.safetensors")
    monkeypatch.syspath_prepend(str(tmp_path))
    url = "package://weights_of_mine/models/a.safetensors"
    assert checkpoint_files(url) == [package / "models" / "a.safetensors"]
    with pytest.raises(CheckpointError, match=r"checkpoint: .*models/b\.safetensors: no such file"):
        checkpoint_files("package://weights_of_mine/models/b.safetensors")
    with pytest.raises(CheckpointError, match="the path leaves package weights_of_mine"):
        checkpoint_files("package://weights_of_mine/../secret.pt")
    with pytest.raises(
        CheckpointError, match="package no_such_thing is not installed; run 'pip install no_such_thing'"
    ):
        checkpoint_files("package://no_such_thing/a.pt")
