"""Whole artifacts as ONNX: parity with dfmpc.load, what the report says, what cannot be exported."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dfmpc import cli
from dfmpc.artifact.loader import load
from dfmpc.artifact.manifest import TENSORS
from dfmpc.errors import ArtifactError, UnsupportedModelError
from dfmpc.kernels import Grid
from dfmpc.models.capture import capture
from typer.testing import CliRunner

if importlib.util.find_spec("onnxruntime") is None:
    pytest.skip("needs the extra: pip install 'dfmpc[onnx]'", allow_module_level=True)

import onnx
import onnxruntime
from dfmpc.artifact.exports.export import export
from dfmpc.artifact.exports.graph import build_onnx
from dfmpc.artifact.exports.parity import TOLERANCE, check_parity, compare
from dfmpc.artifact.exports.source import open_source

NETWORKS = Path(__file__).resolve().parent.parent / "networks"
Write = Callable[..., Path]


def networks(file: str) -> Any:
    spec = importlib.util.spec_from_file_location(file, NETWORKS / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def write(make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Return a function that writes the artifact of a network of export_networks and returns its folder."""
    monkeypatch.setenv("DFMPC_ALLOW_CODE", str(NETWORKS))
    torch.manual_seed(3)

    def build(name: str = "EveryLayer", *args: str, grid: Grid = Grid.SYMMETRIC, **options: Any) -> Path:
        module = getattr(networks("export_networks"), name)(*args).eval()
        layers = capture(module, (1, 5, 8, 8)).layers
        example = make(grid, module=module, layers=layers, factory=f"export_networks:{name}", **options)
        object.__setattr__(example.task.model, "args", list(args))
        example.write(tmp_path / "artifact")
        return tmp_path / "artifact"

    return build


def call(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(one) for one in arguments])


PLANS = {
    "dorefa_2_with_c": {"grid": Grid.DOREFA, "bits": 2, "input_scale": {"grouped": torch.linspace(0.5, 1.5, 6)}},
    "asymmetric_3_group_8": {"grid": Grid.ASYMMETRIC, "bits": 3, "granularity": "group:8"},
    "symmetric_4_group_16": {"grid": Grid.SYMMETRIC, "bits": 4, "granularity": "group:16"},
    "symmetric_8": {"grid": Grid.SYMMETRIC, "bits": 8, "granularity": "tensor"},
}


@pytest.mark.parametrize("plan", PLANS)
def test_onnxruntime_computes_what_load_computes(write: Write, plan: str) -> None:
    parity = check_parity(write(**PLANS[plan]))
    assert parity.findings == []
    assert parity.weights == 9
    assert parity.weight_error <= 3e-7
    assert 0 < max(parity.output_error, parity.optimized_error, parity.folded_error) <= TOLERANCE
    assert parity.to_text().startswith(f"onnxruntime {onnxruntime.__version__}: 9 weights within ")


def test_the_file_runs_for_any_batch_and_the_report_says_what_it_is(write: Write, tmp_path: Path) -> None:
    folder = write(bits=3)
    report = export(folder, "onnx", output=tmp_path / "net.onnx")
    model = onnx.load(tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    images = torch.randn(7, 5, 8, 8, generator=torch.Generator().manual_seed(9))
    (found,) = session.run(None, {"input": images.numpy()})
    assert torch.allclose(torch.from_numpy(found), load(folder)(images), rtol=1e-5, atol=1e-6)
    assert session.get_inputs()[0].shape == ["batch", 5, 8, 8]
    assert {item.key: item.value for item in model.metadata_props}["dfmpc.model"] == "net"
    assert (report.batch, report.opset, report.ir_version) == (None, 21, 10)
    assert report.bytes == (tmp_path / "net.onnx").stat().st_size
    assert report.operators == {
        name: sum(node.op_type == name for node in model.graph.node)
        for name in {one.op_type for one in model.graph.node}
    }
    assert report.operators["DequantizeLinear"] == 9
    assert [layer.weight for layer in report.widened] == [layer.weight for layer in report.layers]
    assert {layer.stored_as for layer in report.layers} == {"INT4"}
    assert sum(layer.extra_bytes for layer in report.widened) == sum(layer.weights // 8 for layer in report.layers)
    assert "widened: 9 of 3 bits as INT4 (+0.000 MiB)" in report.to_text()
    document = json.loads(report.to_json())
    assert document["widened"] == [layer.weight for layer in report.widened]
    state = load(folder).state_dict()
    assert report.original_bytes == sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def test_two_bits_need_opset_25_or_are_widened(write: Write, tmp_path: Path) -> None:
    folder = write(grid=Grid.TERNARY, bits=2)
    narrow = export(folder, "onnx", output=tmp_path / "25.onnx")
    wide = export(folder, "onnx", output=tmp_path / "21.onnx", opset=21)
    assert (narrow.opset, wide.opset) == (25, 21)
    assert ({one.stored_as for one in narrow.layers}, {one.stored_as for one in wide.layers}) == ({"INT2"}, {"INT4"})
    assert narrow.widened == ()
    assert len(wide.widened) == 9
    assert narrow.bytes < wide.bytes


def test_another_process_writes_the_same_bytes(write: Write, tmp_path: Path) -> None:
    folder = write(bits=2)
    export(folder, "onnx", output=tmp_path / "a.onnx")
    command = [sys.executable, "-m", "dfmpc.cli", "export", str(folder), "--format", "onnx", "--output", "b.onnx"]
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, env=environment)
    first, second = (hashlib.sha256((tmp_path / f"{name}.onnx").read_bytes()).hexdigest() for name in "ab")
    assert first == second
    content = (tmp_path / "a.onnx").read_bytes()
    assert str(NETWORKS).encode() not in content
    assert sys.prefix.encode() not in content


def test_tied_weights_are_stored_once(write: Write) -> None:
    folder = write("Tied", bits=4)
    source = open_source(folder)
    model = build_onnx(source)
    codes = [tensor.name for tensor in model.proto.graph.initializer if tensor.name.endswith(".codes")]
    assert codes == ["conv.weight.codes", "encode.weight.codes"]
    readers = [node for node in model.proto.graph.node if "encode.weight" in node.input]
    assert len(readers) == 2
    assert compare(source, model).findings == []


def test_a_network_of_one_image_stays_one(write: Write, tmp_path: Path) -> None:
    folder = write("OneImage", bits=4)
    report = export(folder, "onnx", output=tmp_path / "net.onnx")
    assert report.batch == 1
    assert report.to_text().endswith("the graph is for a batch of 1: torch.export could not keep the batch free")
    assert check_parity(folder).findings == []


def test_attention_without_heads(make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFMPC_ALLOW_CODE", str(NETWORKS))
    module = networks("tiny_networks").VisionTransformer().eval()
    layers = capture(module, (1, 3, 16, 16)).layers
    example = make(
        Grid.SYMMETRIC, 4, "group:16", module=module, layers=layers, factory="tiny_networks:VisionTransformer"
    )
    object.__setattr__(example.model, "input_shape", (1, 3, 16, 16))
    example.write(tmp_path / "vit")
    parity = check_parity(tmp_path / "vit")
    assert (parity.findings, parity.weights) == ([], 10)


@pytest.mark.parametrize(
    ("operation", "name"),
    [("pool", "aten.fractional_max_pool2d"), ("bessel", "prims.bessel_i1")],
    ids=["pool", "bessel"],
)
def test_an_operation_that_onnx_lacks_is_named_with_its_layer(
    write: Write, tmp_path: Path, operation: str, name: str
) -> None:
    folder = write("Unwritable", operation, bits=4)
    with pytest.raises(
        UnsupportedModelError, match=rf"{name}\S* in layer odd \(.* cannot be written as ONNX"
    ) as caught:
        export(folder, "onnx", output=tmp_path / "net.onnx")
    assert str(caught.value).endswith("use --format pt2 or state-dict")
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
    result = call("verify", folder, "--runtime", "onnxruntime")
    assert result.exit_code == 4
    assert f"not compared with onnxruntime: {name}" in result.stdout


def test_a_changed_byte_stops_the_export(write: Write, tmp_path: Path) -> None:
    folder = write(bits=4)
    data = bytearray((folder / TENSORS).read_bytes())
    data[-3] ^= 4
    (folder / TENSORS).write_bytes(data)
    with pytest.raises(ArtifactError, match=r"model\.safetensors: sha256 [0-9a-f]{64}, the manifest says"):
        export(folder, "onnx", output=tmp_path / "net.onnx")
    result = call("export", folder, "--format", "onnx", "--output", tmp_path / "net.onnx")
    assert (result.exit_code, "run the job again" in result.stderr) == (4, True)
    assert not (tmp_path / "net.onnx").exists()


def test_verify_in_onnxruntime(write: Write) -> None:
    folder = write(bits=2)
    result = call("verify", folder, "--runtime", "onnxruntime", "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["artifacts"] == [{"path": str(folder), "findings": [], "layers": 9, "files": 1}]
    (compared,) = document["runtimes"]
    assert (compared["weights"], compared["weight_error"]) == (9, 0)


def test_a_graph_that_differs_is_found(write: Write) -> None:
    source = open_source(write(bits=4))
    model = build_onnx(source)
    outputs = [f"outputs of the graph {mode}" for mode in ("as written", "optimized", "folded")]
    expected = {"head.weight.codes": ["head.weight", *outputs], "head.weight.scale": ["head.weight", *outputs]}
    for name, names in (expected | {"head.bias": outputs}).items():
        (tensor,) = [one for one in model.proto.graph.initializer if one.name == name]
        good = tensor.raw_data
        tensor.raw_data = good[:2] + bytes(byte ^ 0x11 for byte in good[2:])
        found = compare(source, model).findings
        assert [text.split(": ")[0] for text in found] == names
        assert all(text.endswith("may differ from dfmpc.load by 1e-05") for text in found)
        tensor.raw_data = good


def test_a_missing_extra_is_named(write: Write, tmp_path: Path) -> None:
    folder = write(bits=4)
    code = "import sys; sys.modules['onnxscript'] = None; from dfmpc.cli import main; main()"
    for arguments in (["export", folder, "--format", "onnx"], ["verify", folder, "--runtime", "onnxruntime"]):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert ended.returncode == 2
        assert ended.stderr == "error: ONNX needs onnxscript, not installed here: pip install 'dfmpc[onnx]'\n"
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
