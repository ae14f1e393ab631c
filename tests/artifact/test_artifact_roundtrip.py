from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dfmpc.artifact.loader import load, load_state_dict
from dfmpc.artifact.manifest import MANIFEST, TENSORS, read_manifest
from dfmpc.artifact.verify import verify
from dfmpc.compress.rows import from_rows, scale_inputs
from dfmpc.errors import ArtifactError, FactoryError, StorageError
from dfmpc.kernels import Grid, dequantize
from dfmpc.models.graph import Layer, Op
from safetensors.torch import load_file
from torch import nn

GRIDS = [(Grid.TERNARY, 2)] + [
    (grid, bits) for grid in (Grid.DOREFA, Grid.SYMMETRIC, Grid.ASYMMETRIC) for bits in range(2, 9)
]
INPUT_SCALES = {
    "depthwise": torch.linspace(0.5, 1.5, 5),
    "grouped": torch.linspace(0.1, 1.7, 6),
    "transposed": torch.linspace(0.9, 1.3, 4),
}


def header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    found: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return found


def stored_bytes(folder: Path, name: str) -> int:
    start, end = header(folder / TENSORS)[name]["data_offsets"]
    return int(end) - int(start)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:8"])
@pytest.mark.parametrize(("grid", "bits"), GRIDS, ids=[f"{grid}_{bits}" for grid, bits in GRIDS])
def test_loaded_state_is_the_dequantized_one(
    make: Callable[..., Any], tmp_path: Path, grid: Grid, bits: int, granularity: str
) -> None:
    example = make(grid, bits, granularity, input_scale=INPUT_SCALES)
    example.write(tmp_path / "a")
    state = load_state_dict(tmp_path / "a")
    assert state.keys() == example.model.state.keys()
    for quantized in example.compressed.layers:
        q, layer = quantized.quantized, quantized.layer
        rows = dequantize(q.format, q.codes, q.scale, q.zero_point)
        if quantized.input_scale is not None:
            rows = scale_inputs(rows, layer, quantized.input_scale)
        assert torch.equal(state.pop(layer.weight), from_rows(rows, layer)), layer.name
    for name, tensor in state.items():
        assert torch.equal(tensor, example.compressed.tensors.get(name, example.model.state[name])), name
    assert verify(tmp_path / "a").findings == []


def test_the_same_artifact_has_the_same_bytes(make: Callable[..., Any], tmp_path: Path) -> None:
    make().write(tmp_path / "a")
    again = make()
    reordered = dict(reversed(again.model.state.items()))
    again.model.state.clear()
    again.model.state.update(reordered)
    again.write(tmp_path / "b")
    for name in (TENSORS, MANIFEST):
        first, second = (hashlib.sha256((tmp_path / part / name).read_bytes()).hexdigest() for part in "ab")
        assert first == second


def test_manifest_holds_nothing_of_this_run(make: Callable[..., Any], tmp_path: Path) -> None:
    manifest = make().write(tmp_path / "a")
    text = (tmp_path / "a" / MANIFEST).read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    assert not [word for word in (str(tmp_path), "/x/net.pth", str(os.getpid()), "seconds", "host") if word in text]
    assert read_manifest(tmp_path / "a") == manifest
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [MANIFEST, TENSORS]
    data = (tmp_path / "a" / TENSORS).read_bytes()
    entry = manifest.files[TENSORS]
    assert (entry.size, entry.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert manifest.bytes == len(data)


@pytest.mark.parametrize("bits", range(2, 9))
def test_a_layer_costs_its_bits_on_disk(make: Callable[..., Any], tmp_path: Path, bits: int) -> None:
    manifest = make(Grid.DOREFA, bits).write(tmp_path / "a")
    for entry in manifest.layers:
        row = math.ceil(entry.length * bits / 8)
        assert stored_bytes(tmp_path / "a", f"{entry.weight}.codes") == entry.rows * row
    weights = sum(math.prod(entry.shape) for entry in manifest.layers)
    parts = [name for entry in manifest.layers for name in entry.parts]
    total = sum(stored_bytes(tmp_path / "a", name) for name in parts)
    assert manifest.bits_per_weight == pytest.approx(8 * total / weights, abs=1e-6)


def test_six_bits_are_six_bits(make: Callable[..., Any], tmp_path: Path) -> None:
    head = Layer("head", "head.weight", None, Op.LINEAR, (64, 96))
    module = nn.ModuleDict({"head": nn.Linear(96, 64)})
    manifest = make(Grid.DOREFA, 6, "tensor", module=module, layers=[head]).write(tmp_path / "a")
    assert 8 * stored_bytes(tmp_path / "a", "head.weight.codes") == 6 * 64 * 96
    assert manifest.bits_per_weight == round(6 + 32 / (64 * 96), 6)
    assert (tmp_path / "a" / TENSORS).stat().st_size < 64 * 96 * 6 // 8 + 4 * 64 + 4 + 600


def test_other_tensors_keep_name_and_dtype(make: Callable[..., Any], tmp_path: Path) -> None:
    manifest = make(dtype=torch.float16).write(tmp_path / "a")
    stored = load_file(tmp_path / "a" / TENSORS)
    assert stored["conv.bias"].dtype == torch.float16
    assert stored["norm.running_mean"].dtype == torch.float32
    assert stored["norm.num_batches_tracked"].dtype == torch.int64
    assert stored["conv.weight.codes"].dtype == torch.uint8
    assert "conv.weight" not in stored
    assert header(tmp_path / "a" / TENSORS)["__metadata__"] == {"format": "dfmpc", "format_version": "1"}
    assert {entry.dtype for entry in manifest.layers} == {"float16"}
    state = load_state_dict(tmp_path / "a")
    assert {tensor.dtype for tensor in state.values()} == {torch.float32, torch.int64}


def test_figures_of_a_layer(make: Callable[..., Any], tmp_path: Path) -> None:
    example = make(Grid.TERNARY, 2)
    entry = example.write(tmp_path / "a").layers[0]
    before = example.model.state["conv.weight"].double()
    after = load_state_dict(tmp_path / "a")["conv.weight"].double()
    sqnr = 10 * math.log10(float(before.square().sum() / (before - after).square().sum()))
    assert entry.sqnr_db == pytest.approx(sqnr, abs=1e-3)
    assert entry.sparsity == pytest.approx(float((after == 0).double().mean()), abs=1e-4)


FACTORY = """
from torch import nn


def make(channels):
    return nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 4, 1))
"""


@pytest.fixture
def factory_artifact(make: Callable[..., Any], tmp_path: Path) -> Path:
    module = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1))
    layers = [
        Layer("0", "0.weight", "0.bias", Op.CONV, (6, 3, 3, 3)),
        Layer("3", "3.weight", "3.bias", Op.CONV, (4, 6, 1, 1)),
    ]
    example = make(Grid.DOREFA, 3, module=module, layers=layers, factory="artifact_zoo:make")
    source = example.model.source.model_copy(update={"args": [6]})
    model = type(example.model)(**{**vars(example.model), "source": source})
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "artifact_zoo.py").write_text(FACTORY, encoding="utf-8")
    type(example)(model, example.compressed, example.task).write(tmp_path / "a")
    return tmp_path / "a"


def test_load_gives_the_network(factory_artifact: Path) -> None:
    network = load(factory_artifact, allow_code=[str(factory_artifact.parent / "code")])
    want = load_state_dict(factory_artifact)
    assert not network.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, want[name]), name
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert network(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 6, 6)


def test_load_runs_no_code_that_is_not_allowed(factory_artifact: Path) -> None:
    with pytest.raises(FactoryError, match="artifact_zoo"):
        load(factory_artifact)


def test_missing_and_short_files_are_named(make: Callable[..., Any], tmp_path: Path) -> None:
    make().write(tmp_path / "a")
    tensors = tmp_path / "a" / TENSORS
    size = tensors.stat().st_size
    os.truncate(tensors, size - 1)
    with pytest.raises(ArtifactError, match=rf"model.safetensors: {size - 1} bytes, the manifest says {size}"):
        load_state_dict(tmp_path / "a")
    tensors.unlink()
    with pytest.raises(ArtifactError, match=r"model.safetensors: missing; .*run the job again"):
        load_state_dict(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match=r"manifest.json: missing, so .* no finished artifact"):
        load_state_dict(tmp_path / "a")


def test_a_part_of_another_shape_is_refused(make: Callable[..., Any], tmp_path: Path) -> None:
    make().write(tmp_path / "a")
    path = tmp_path / "a" / MANIFEST
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields["layers"][0]["bits"] = 8
    path.write_text(json.dumps(fields), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"conv.weight.codes: U8 \[6, 23\], expected U8 \[6, 45\]"):
        load_state_dict(tmp_path / "a")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 7}, r"format version 7; this dfmpc reads 1: use the dfmpc that wrote it"),
        ({"extra": 1}, r"extra: Extra inputs are not permitted"),
        ({"files": {"../x": {"size": 1, "sha256": "0" * 64}}}, r"files\..*String should match"),
        ({"key": "short"}, r"key: String should match"),
    ],
    ids=["version", "unknown_field", "path_outside", "key"],
)
def test_a_manifest_that_is_not_ours(
    make: Callable[..., Any], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    make().write(tmp_path / "a")
    path = tmp_path / "a" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **change}), encoding="utf-8")
    with pytest.raises(ArtifactError, match=message):
        read_manifest(tmp_path / "a")


def test_a_manifest_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text("{", encoding="utf-8")
    with pytest.raises(ArtifactError, match="not JSON"):
        read_manifest(tmp_path)


def test_a_corrected_tensor_must_exist(make: Callable[..., Any], tmp_path: Path) -> None:
    example = make()
    example.compressed.tensors["grouped.bias"] = torch.zeros(6)
    with pytest.raises(ArtifactError, match=r"does not have: grouped.bias"):
        example.write(tmp_path / "a")


def test_a_second_write_into_one_folder_is_an_error(make: Callable[..., Any], tmp_path: Path) -> None:
    example = make()
    example.write(tmp_path / "a")
    with pytest.raises(StorageError, match="EEXIST"):
        example.write(tmp_path / "a")
