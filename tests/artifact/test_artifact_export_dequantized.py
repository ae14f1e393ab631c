"""Artifacts as torch.export programs and as state dicts for the code that they came from."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dfmpc import cli
from dfmpc.artifact.exports.export import export
from dfmpc.artifact.key import task_key
from dfmpc.artifact.loader import load
from dfmpc.artifact.writer import write_artifact
from dfmpc.compress.compress import compress_model
from dfmpc.errors import UnsupportedModelError, UsageError
from dfmpc.job.methods import RtnPlan
from dfmpc.job.sources import ModelSource
from dfmpc.job.task import Task
from dfmpc.kernels import Grid
from dfmpc.models.capture import capture
from dfmpc.models.factory import AllowList
from dfmpc.models.load import load_model
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

NETWORKS = Path(__file__).resolve().parent.parent / "networks"
Write = Callable[..., Path]
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def network(name: str) -> nn.Module:
    spec = importlib.util.spec_from_file_location("export_networks", NETWORKS / "export_networks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: nn.Module = getattr(module, name)().eval()
    return found


@pytest.fixture
def write(make: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Return a function that writes the artifact of a network of export_networks and returns its folder."""
    monkeypatch.setenv("DFMPC_ALLOW_CODE", str(NETWORKS))
    monkeypatch.chdir(tmp_path)

    def build(name: str = "EveryLayer", grid: Grid = Grid.DOREFA, bits: int = 3, **options: Any) -> Path:
        torch.manual_seed(3)
        module = network(name)
        layers = capture(module, (1, 5, 8, 8)).layers
        make(grid, bits, module=module, layers=layers, factory=f"export_networks:{name}", **options).write(
            tmp_path / "a"
        )
        return tmp_path / "a"

    return build


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 5, 8, 8, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["EveryLayer", "Tied"])
def test_a_state_dict_loads_in_the_untouched_code(write: Write, name: str, dtype: str, suffix: str) -> None:
    folder = write(name)
    report = export(folder, "state-dict", dtype=dtype, output=f"net.{suffix}")
    state = load_file("net.safetensors") if suffix == "safetensors" else torch.load("net.pth", weights_only=True)
    expected = load(folder).state_dict()
    fresh = network(name)
    assert state.keys() == fresh.state_dict().keys()
    assert "norm.num_batches_tracked" in state
    fresh.load_state_dict(state, strict=True)
    for key, tensor in state.items():
        kind = torch.int64 if key.endswith("num_batches_tracked") else DTYPES[dtype]
        assert tensor.dtype is kind, key
        assert torch.equal(tensor, expected[key].to(kind)), key
    assert report.bytes == Path(f"net.{suffix}").stat().st_size
    assert (report.batch, report.layers) == (None, ())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_program_computes_what_load_computes(write: Write, dtype: str) -> None:
    folder = write()
    export(folder, "pt2", dtype=dtype, output="net.pt2")
    program = torch.export.load("net.pt2").module()
    module = load(folder).to(DTYPES[dtype])
    for count in (1, 3):
        x = images(count).to(DTYPES[dtype])
        with torch.inference_mode():
            assert torch.equal(program(x), module(x))


def test_a_program_of_one_image_says_so(write: Write) -> None:
    folder = write("OneImage", Grid.SYMMETRIC, 4)
    report = export(folder, "pt2", output="net.pt2")
    assert report.batch == 1
    assert "the graph is for a batch of 1" in report.to_text()
    assert torch.export.load("net.pt2").module()(images(1)).shape == (1, 4)


def test_what_came_as_a_program_goes_out_again(tmp_path: Path) -> None:
    torch.manual_seed(5)
    original = network("EveryLayer")
    torch.export.save(torch.export.export(original, (torch.zeros(1, 5, 8, 8),)), tmp_path / "net.pt2")
    source, plan = ModelSource(name="net", program=str(tmp_path / "net.pt2")), RtnPlan(name="r", method="rtn", bits=4)
    task, model = Task(id="net/r", model=source, plan=plan), load_model(source, AllowList(()))
    (tmp_path / "a").mkdir()
    key = task_key(task, ["e" * 64], distribution=None)
    write_artifact(tmp_path / "a", model=model, compressed=compress_model(model, plan), task=task, key=key)
    export(tmp_path / "a", "state-dict", output=tmp_path / "net.safetensors")
    original.load_state_dict(load_file(tmp_path / "net.safetensors"), strict=True)
    report = export(tmp_path / "a", "pt2", output=tmp_path / "out.pt2")
    assert report.batch == 1  # as the program has it
    x = images(1)
    with torch.inference_mode():
        assert torch.equal(torch.export.load(tmp_path / "out.pt2").module()(x), original(x))
    if importlib.util.find_spec("onnxruntime") is not None:
        result = CliRunner().invoke(cli.app, ["verify", str(tmp_path / "a"), "--runtime", "onnxruntime"])
        assert result.exit_code == 0, result.stdout


@pytest.mark.parametrize(("format", "suffix"), [("pt2", "pt2"), ("state-dict", "safetensors"), ("state-dict", "pth")])
def test_the_same_artifact_gives_the_same_bytes(write: Write, format: str, suffix: str) -> None:
    folder = write()
    for name in "xy":
        export(folder, format, output=f"{name}.{suffix}")
    first, second = (hashlib.sha256(Path(f"{name}.{suffix}").read_bytes()).hexdigest() for name in "xy")
    assert first == second
    assert str(NETWORKS).encode() not in Path(f"x.{suffix}").read_bytes()


def test_what_fp16_cannot_hold_is_named(write: Write, make: Callable[..., Any], tmp_path: Path) -> None:
    module = network("Tied")
    module.norm.running_var.fill_(1e6)  # type: ignore[operator, union-attr]
    layers = capture(module, (1, 5, 8, 8)).layers
    make(module=module, layers=layers, factory="export_networks:Tied").write(tmp_path / "b")
    with pytest.raises(UnsupportedModelError, match=r"norm\.running_var: 1e\+06 is beyond fp16; use --dtype bf16 or"):
        export(tmp_path / "b", "state-dict", dtype="fp16", output="net.safetensors")
    assert not Path("net.safetensors").exists()


def test_a_file_is_replaced_only_by_force(write: Write) -> None:
    folder = write()
    call = lambda *more: CliRunner().invoke(cli.app, ["export", str(folder), "--format", "state-dict", *more])  # noqa: E731
    assert call().exit_code == 0
    assert sorted(path.name for path in Path().iterdir()) == ["a", "net-plan.safetensors"]
    Path("net-plan.safetensors").write_bytes(b"mine")
    again = call()
    assert (again.exit_code, again.stderr) == (
        2,
        "error: --output net-plan.safetensors: is there already; choose another name or replace a file by --force\n",
    )
    assert Path("net-plan.safetensors").read_bytes() == b"mine"
    assert call("--force").exit_code == 0
    assert "conv.weight" in load_file("net-plan.safetensors")
    assert sorted(path.name for path in Path().iterdir()) == ["a", "net-plan.safetensors"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "onnx", "dtype": "fp16"}, "--dtype fp16: ONNX keeps its codes packed and computes in fp32"),
        ({"format": "pt2", "opset": 21}, "--opset 21: only --format onnx has an opset"),
        ({"format": "onnx", "opset": 20}, r"--opset 20: expected 21 \(no two-bit integers\) or 25"),
        ({"format": "pt2", "output": "net.onnx"}, r"--output net\.onnx: --format pt2 writes \.pt2"),
        ({"format": "state-dict", "output": "a/net.pth"}, r"--output a/net\.pth: lies in the artifact"),
    ],
    ids=["dtype", "opset", "other_opset", "suffix", "inside"],
)
def test_options_that_do_not_go_together(write: Write, options: dict[str, Any], message: str) -> None:
    folder = write()
    with pytest.raises(UsageError, match=message):
        export(folder, **options)
    assert [path.name for path in Path().iterdir()] == ["a"]
