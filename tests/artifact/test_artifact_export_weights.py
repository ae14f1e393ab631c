"""Every grid, width, granularity and kind of layer as ONNX nodes, run by onnxruntime."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dfmpc.artifact.loader import load_state_dict
from dfmpc.artifact.manifest import TENSORS, LayerEntry, read_manifest
from dfmpc.artifact.tensors import TensorFile
from dfmpc.kernels import Grid
from dfmpc.models.capture import capture
from torch import Tensor, nn

if importlib.util.find_spec("onnxruntime") is None:
    pytest.skip("needs the extra: pip install 'dfmpc[onnx]'", allow_module_level=True)

import onnx
from dfmpc.artifact.exports.graph import OnnxModel
from dfmpc.artifact.exports.parity import dequantized_weights, element_error, tensor_error
from dfmpc.artifact.exports.weights import WeightNodes, weight_nodes
from onnx import TensorProto, helper

GRIDS = [(Grid.TERNARY, 2)] + [
    (grid, bits) for grid in (Grid.DOREFA, Grid.SYMMETRIC, Grid.ASYMMETRIC) for bits in range(2, 9)
]
DOREFA_ERROR = 3e-7
"""Rounding of the step, of step·q and of the sum, each half an ulp of a value at most twice the weight's."""


@pytest.fixture(scope="module")
def network(project: Path) -> nn.Module:
    spec = importlib.util.spec_from_file_location("export_networks", project / "tests/networks/export_networks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: nn.Module = module.EveryLayer().eval()
    return found


@pytest.fixture(scope="module")
def layers(network: nn.Module) -> Any:
    return capture(network, (1, 5, 8, 8)).layers


def input_scales(network: nn.Module) -> dict[str, Tensor]:
    return {
        "conv": torch.linspace(0.5, 1.5, 5),
        "depthwise": torch.linspace(0.1, 1.7, 6),
        "grouped": torch.linspace(0.7, 1.1, 6),
        "up": torch.linspace(0.9, 1.3, 8),
        "up_grouped": torch.linspace(0.2, 1.9, 6),
        "tokens": torch.linspace(0.3, 1.0, 7),
    }


def chains(folder: Path, opset: int) -> dict[str, WeightNodes]:
    file = TensorFile(folder / TENSORS)
    entries: tuple[LayerEntry, ...] = read_manifest(folder).layers
    return {one.weight: weight_nodes(one, {name: file.tensor(name) for name in one.parts}, opset) for one in entries}


def model_of(folder: Path, opset: int) -> OnnxModel:
    made, shapes = chains(folder, opset), {one.weight: one.shape for one in read_manifest(folder).layers}
    nodes = [node for one in made.values() for node in one.nodes]
    tensors = [tensor for one in made.values() for tensor in one.initializers]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shapes[name]) for name in made]
    graph = helper.make_graph(nodes, "weights", [], outputs, tensors)
    version = 13 if opset == 25 else 10
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=version)
    onnx.checker.check_model(proto, full_check=True)
    return OnnxModel(proto, None, opset, tuple(one.stored for one in made.values()))


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:8"])
@pytest.mark.parametrize(("grid", "bits"), GRIDS, ids=[f"{grid}_{bits}" for grid, bits in GRIDS])
def test_onnxruntime_dequantizes_to_the_same_weights(
    make: Callable[..., Any], network: nn.Module, layers: Any, tmp_path: Path, grid: Grid, bits: int, granularity: str
) -> None:
    example = make(grid, bits, granularity, module=network, layers=layers, input_scale=input_scales(network))
    example.write(tmp_path / "a")
    state = load_state_dict(tmp_path / "a")
    for opset in (21, 25) if bits == 2 else (21,):
        found = dequantized_weights(model_of(tmp_path / "a", opset))
        assert len(found) == 9
        allowed = DOREFA_ERROR if grid is Grid.DOREFA else 0.0
        assert {name: element_error(found[name], state[name]) for name in found} == {
            name: pytest.approx(0, abs=allowed) for name in found
        }


STORED = {
    2: ("INT2", 2),
    3: ("INT4", 4),
    4: ("INT4", 4),
    5: ("INT8", 8),
    6: ("INT8", 8),
    7: ("INT8", 8),
    8: ("INT8", 8),
}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("grid", [Grid.SYMMETRIC, Grid.ASYMMETRIC], ids=str)
def test_codes_take_the_narrowest_type(
    make: Callable[..., Any], network: nn.Module, layers: Any, tmp_path: Path, grid: Grid, bits: int
) -> None:
    make(grid, bits, module=network, layers=layers).write(tmp_path / "a")
    kind, width = STORED[bits]
    for name, one in chains(tmp_path / "a", 25).items():
        codes = one.initializers[0]
        assert codes.name == f"{name}.codes"
        assert (one.stored.stored_as, one.stored.stored_bits) == (
            (f"U{kind}" if grid is Grid.ASYMMETRIC else kind),
            width,
        )
        assert len(codes.raw_data) == -(-one.stored.weights * width // 8)
        assert one.stored.extra_bytes == one.stored.weights * (width - bits) // 8
    narrow = chains(tmp_path / "a", 21)["conv.weight"].stored
    assert narrow.stored_bits == max(4, width)


def test_errors_are_relative() -> None:
    expected = torch.tensor([0.0, 1.0, -4.0])
    assert element_error(torch.tensor([0.0, 1.5, -4.0]), expected) == 0.5
    assert element_error(torch.tensor([1e-30, 1.0, -4.0]), expected) == float("inf")
    assert element_error(torch.tensor([0.0, float("nan"), -4.0]), expected) == float("inf")
    assert element_error(expected[:2], expected) == float("inf")
    assert tensor_error(torch.tensor([0.5, 1.0, -4.0]), expected) == 0.125
    assert tensor_error(expected, expected) == element_error(expected, expected) == 0
    assert tensor_error(torch.ones(2), torch.zeros(2)) == float("inf")
    assert tensor_error(torch.tensor([0.0, 1.0, float("inf")]), expected) == float("inf")


def test_ternary_codes_are_packed_from_the_lowest_bits(make: Callable[..., Any], tmp_path: Path) -> None:
    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(5, 1, bias=False)
            self.line.weight = nn.Parameter(torch.tensor([[-1.0, 0.0, 1.0, 1.0, -1.0]]), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.line(x)
            return out

    line = Line().eval()
    make(Grid.TERNARY, 2, module=line, layers=capture(line, (1, 5)).layers).write(tmp_path / "a")
    codes, scale = chains(tmp_path / "a", 25)["line.weight"].initializers
    # two's complement of -1 is 0b11: -1, 0, 1, 1 from the lowest bits, then -1
    assert codes.raw_data == bytes([0b01_01_00_11, 0b11])
    assert list(codes.dims) == [1, 5]
    assert list(scale.dims) == [1]


def test_per_channel_layers_are_one_node_without_a_reshape(
    make: Callable[..., Any], network: nn.Module, layers: Any, tmp_path: Path
) -> None:
    make(Grid.SYMMETRIC, 4, module=network, layers=layers).write(tmp_path / "a")
    found = {name: [node.op_type for node in one.nodes] for name, one in chains(tmp_path / "a", 21).items()}
    # a grouped transposed convolution has no axis whose slices are its output channels
    assert found.pop("up_grouped.weight") == ["DequantizeLinear", "Reshape", "Transpose", "Reshape"]
    assert set(map(tuple, found.values())) == {("DequantizeLinear",)}


def test_whole_zero_points_are_stored_as_codes(
    make: Callable[..., Any], network: nn.Module, layers: Any, tmp_path: Path
) -> None:
    example = make(Grid.ASYMMETRIC, 3, "group:8", module=network, layers=layers)
    for one in example.compressed.layers:
        one.quantized.zero_point.round_().clamp_(0, 7)
    example.write(tmp_path / "a")
    made = chains(tmp_path / "a", 21)
    assert {one.nodes[0].op_type for one in made.values()} == {"DequantizeLinear"}
    assert not [node for one in made.values() for node in one.nodes if node.op_type in ("Sub", "Mul")]
    found, state = dequantized_weights(model_of(tmp_path / "a", 21)), load_state_dict(tmp_path / "a")
    assert all(torch.equal(found[name], state[name]) for name in found)
