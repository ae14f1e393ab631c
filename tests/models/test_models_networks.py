"""The pairs of methods.md, section 1, on real networks."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from dfmpc.job.sources import ModelSource
from dfmpc.models.capture import capture
from dfmpc.models.factory import AllowList
from dfmpc.models.graph import Graph, Op, Pairing
from dfmpc.models.pairs import find_pairs

FEEDS_ADD = "feeds a residual add"


@pytest.fixture(scope="module")
def cifar(shared: Path, make_source: Callable[..., ModelSource]) -> Iterator[Callable[[str], Pairing]]:
    allow = AllowList.default([str(shared / "models")])
    before = list(sys.path)

    def find(name: str) -> Pairing:
        module = allow.build(make_source(factory=f"cifar_models:{name}")).eval()
        return find_pairs(capture(module, (1, 3, 32, 32)))

    yield find
    sys.path[:] = before


@pytest.fixture(scope="module")
def torchvision_graph(
    torchvision_models: ModuleType, make_source: Callable[..., ModelSource], builtin_allow: AllowList
) -> Callable[[str, int], Graph]:
    def find(name: str, size: int) -> Graph:
        source = make_source(factory=f"torchvision.models:{name}", kwargs={"weights": None})
        return capture(builtin_allow.build(source).eval(), (1, 3, size, size))

    return find


def links(pairing: Pairing) -> set[tuple[str, str]]:
    return {(pair.low, pair.high) for pair in pairing.pairs}


def blocks(names: list[str], low: str, high: str) -> set[tuple[str, str]]:
    return {(f"{name}.{low}", f"{name}.{high}") for name in names}


@pytest.mark.parametrize(
    ("name", "stages", "depth"), [("resnet20", 3, 3), ("resnet56", 3, 9), ("resnet56_paper", 3, 9), ("resnet18", 4, 2)]
)
def test_cifar_basic_blocks(cifar: Callable[[str], Pairing], name: str, stages: int, depth: int) -> None:
    pairing = cifar(name)
    names = [f"layer{stage}.{block}" for stage in range(1, stages + 1) for block in range(depth)]
    assert links(pairing) == blocks(names, "conv1", "conv2")
    assert all(pair.folds and pair.activation is Op.RELU and pair.norm.endswith("bn1") for pair in pairing.pairs)
    shortcuts = {name for name, reason in pairing.reasons.items() if reason == FEEDS_ADD}
    assert len(shortcuts) == {"resnet18": 3, "resnet56_paper": 2}.get(name, 0)
    assert all("shortcut" in name or "downsample" in name for name in shortcuts)
    others = {name: reason for name, reason in pairing.reasons.items() if name not in shortcuts}
    assert sorted(others.values()) == ["classifier", "stem"]
    assert others["conv1"] == "stem"


def test_cifar_mobilenet(cifar: Callable[[str], Pairing]) -> None:
    pairing = cifar("mobilenetv2")
    expands = blocks([f"layers.{block}" for block in range(17)], "conv1", "conv2")
    assert links(pairing) == expands | {("conv2", "linear")}
    assert all(not pair.folds and pair.activation is Op.RELU6 for pair in pairing.pairs)
    assert {name for name in pairing.reasons if name.endswith("conv3")} == {f"layers.{n}.conv3" for n in range(17)}
    assert pairing.reasons["conv1"] == "stem"


def test_efficientnet_lite0(make_source: Callable[..., ModelSource], builtin_allow: AllowList) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra 'examples'")
    source = make_source(factory="efficientnet_lite_pytorch:EfficientNet.from_name", args=["efficientnet-lite0"])
    pairing = find_pairs(capture(builtin_allow.build(source).eval(), (1, 3, 224, 224)))
    expands = blocks([f"_blocks.{block}" for block in range(1, 16)], "_expand_conv", "_depthwise_conv")
    assert links(pairing) == expands | {("_conv_head", "_fc")}
    assert {pair.unfolded_because for pair in pairing.pairs} == {"relu6: the clip point would move"}
    assert pairing.reasons["_conv_stem"] == "stem"
    assert pairing.reasons["_blocks.0._depthwise_conv"] == "depthwise"
    assert {name for name in pairing.reasons if name.endswith("_project_conv")} == {
        f"_blocks.{block}._project_conv" for block in range(16)
    }


def test_resnet18(torchvision_graph: Callable[[str, int], Graph]) -> None:
    pairing = find_pairs(torchvision_graph("resnet18", 64))
    names = [f"layer{stage}.{block}" for stage in range(1, 5) for block in range(2)]
    assert links(pairing) == blocks(names, "conv1", "conv2")
    downsample = {f"layer{stage}.0.downsample.0": FEEDS_ADD for stage in (2, 3, 4)}
    assert pairing.reasons == {"conv1": "stem", "fc": "classifier", **downsample}


def test_resnet50(torchvision_graph: Callable[[str, int], Graph]) -> None:
    pairing = find_pairs(torchvision_graph("resnet50", 64))
    depths = {1: 3, 2: 4, 3: 6, 4: 3}
    names = [f"layer{stage}.{block}" for stage, depth in depths.items() for block in range(depth)]
    assert links(pairing) == blocks(names, "conv2", "conv3")
    assert all(pairing.reasons[f"{name}.conv1"] == f"its partner {name}.conv2 is LOW already" for name in names)


def test_vgg16(torchvision_graph: Callable[[str, int], Graph]) -> None:
    pairing = find_pairs(torchvision_graph("vgg16_bn", 64))
    convs = [0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40]
    alternating = {(f"features.{low}", f"features.{high}") for low, high in zip(convs[1::2], convs[2::2], strict=True)}
    assert links(pairing) == alternating
    assert all(pair.folds for pair in pairing.pairs)
    without = "no BatchNorm behind it"
    expected = {"features.0": "stem", "classifier.0": without, "classifier.3": without, "classifier.6": "classifier"}
    assert pairing.reasons == expected


def test_mobilenet_v2(torchvision_graph: Callable[[str, int], Graph]) -> None:
    pairing = find_pairs(torchvision_graph("mobilenet_v2", 64))
    expands = blocks([f"features.{block}.conv" for block in range(2, 18)], "0.0", "1.0")
    assert links(pairing) == expands | {("features.18.0", "classifier.1")}
    assert pairing.reasons["features.1.conv.0.0"] == "depthwise"


def test_densenet121(torchvision_graph: Callable[[str, int], Graph]) -> None:
    graph = torchvision_graph("densenet121", 32)
    pairing = find_pairs(graph)
    depths = (6, 12, 24, 16)
    layers = [f"features.denseblock{b}.denselayer{n}" for b, depth in enumerate(depths, 1) for n in range(1, depth + 1)]
    assert pairing.lows == {f"{name}.conv2" for name in layers}
    pointwise = {f"{name}.conv1" for name in layers if not name.endswith("denselayer1")}
    assert pairing.highs == pointwise | {"features.transition1.conv", "features.transition2.conv"} | {
        "features.transition3.conv", "classifier",
    }  # fmt: skip
    assert len(pairing.pairs) == sum(depth * (depth + 1) // 2 for depth in depths)
    assert all(pair.folds for pair in pairing.pairs)
    first = [pair for pair in pairing.pairs if pair.low == "features.denseblock1.denselayer2.conv2"]
    assert [(pair.high.split(".", 2)[-1], pair.offset) for pair in first] == [
        ("denselayer3.conv1", 96), ("denselayer4.conv1", 96), ("denselayer5.conv1", 96), ("denselayer6.conv1", 96),
        ("conv", 96),
    ]  # fmt: skip
    norms = {node.norm.name: node.norm.channels for node in graph.nodes if node.norm is not None}
    widths = {layer.name: layer.in_channels for layer in graph.layers}
    assert all(pair.offset + 32 <= norms[pair.norm] == widths[pair.high] for pair in pairing.pairs)
    alone = re.compile(r"its partner features\.denseblock\d\.denselayer1\.conv2 is LOW already")
    assert all(alone.fullmatch(reason) for name, reason in pairing.reasons.items() if name != "features.conv0")
    assert len(pairing.reasons) == 5
