"""Pairs of networks without any BatchNorm: folded into the layers, or LayerNorm and GroupNorm instead."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own convention
from dfmpc.models.capture import capture
from dfmpc.models.graph import Graph, Op, Pair, Pairing
from dfmpc.models.pairs import find_pairs
from torch import Tensor, nn

UNFOLDED = "no norm to fold it into"


@pytest.fixture(scope="module")
def tiny(project: Path) -> Callable[[str], Graph]:
    """Return the function that captures a tiny network by its factory's name."""
    spec = importlib.util.spec_from_file_location("tiny_networks", project / "tests" / "networks" / "tiny_networks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda factory: capture(getattr(module, factory)().eval(), (1, 3, 16, 16))


def between(*middle: nn.Module, high: nn.Module | None = None) -> Pairing:
    """Pair stem, ReLU, LOW (module "2"), what comes behind it, HIGH."""
    stem, low = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
    net = nn.Sequential(stem, nn.ReLU(), low, *middle, high or nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())
    net.append(nn.Conv2d(net[-2].weight.shape[0], 2, 1) if high is None else nn.Linear(5, 2))
    return find_pairs(capture(net.eval(), (1, 3, 8, 8)))


@pytest.mark.parametrize(
    ("activation", "op"),
    [
        (nn.ReLU(), Op.RELU),
        (nn.LeakyReLU(), Op.LEAKY_RELU),
        (nn.ReLU6(), Op.RELU6),
        (nn.SiLU(), Op.SILU),
        (nn.GELU(), Op.GELU),
        (nn.Hardswish(), Op.HARDSWISH),
        (nn.Tanh(), Op.TANH),
        (nn.Sigmoid(), Op.SIGMOID),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_the_activation_follows_the_low_layer_itself(activation: nn.Module, op: Op) -> None:
    pairing = between(activation)
    assert pairing.pairs == (Pair("2", "", op, "4", unfolded_because=UNFOLDED),)
    assert pairing.reasons == {"0": "stem", "6": "classifier"}


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        ((), "no activation between it and 3"),
        ((nn.MaxPool2d(2),), "no activation between it and 4"),
        ((nn.ELU(),), "output read by elu (aten.elu.default)"),
        ((nn.SiLU(), nn.SiLU()), "output read by silu_1 (aten.silu.default)"),
        ((nn.GroupNorm(2, 6), nn.ReLU()), "output read by group_norm (aten.group_norm.default)"),
        ((nn.PixelShuffle(1), nn.ReLU()), "output read by pixel_shuffle (aten.pixel_shuffle.default)"),
    ],
    ids=["linear", "pool", "elu", "twice", "group norm", "shuffle"],
)
def test_what_bars_a_layer(middle: tuple[nn.Module, ...], reason: str) -> None:
    assert between(*middle).reasons["2"] == reason


def test_pools_dropout_and_flattening_are_looked_through() -> None:
    flat = between(nn.MaxPool2d(2), nn.ReLU(), nn.Dropout(), nn.Flatten(), high=nn.Linear(6 * 16, 5))
    assert flat.pairs == (Pair("2", "", Op.RELU, "7", repeat=16, unfolded_because=UNFOLDED),)


def test_one_batch_norm_anywhere_keeps_the_rule_for_normed_networks() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    pairing = find_pairs(capture(net.eval(), (1, 3, 12, 12)))
    behind = "no BatchNorm behind it"
    assert pairing == Pairing((), {"0": "stem", "3": behind, "5": behind, "7": "classifier"})


def test_a_folded_network_alternates(tiny: Callable[[str], Graph]) -> None:
    pairing = find_pairs(tiny("folded"))
    assert pairing.pairs == (Pair("2", "", Op.RELU, "4", unfolded_because=UNFOLDED),)
    assert pairing.reasons == {"0": "stem", "8": "classifier"}


def test_a_folded_residual_block() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv1, self.conv2 = (nn.Conv2d(c, 4, 3, padding=1) for c in (3, 4, 4))
            self.shortcut, self.head = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            y = self.conv2(F.relu(self.conv1(x)))
            return self.head(F.relu(self.shortcut(x) + y))

    pairing = find_pairs(capture(Block().eval(), (1, 3, 8, 8)))
    assert [(pair.low, pair.high) for pair in pairing.pairs] == [("conv1", "conv2")]
    assert pairing.reasons == {"stem": "stem", "shortcut": "feeds a residual add", "head": "classifier"}


def test_the_mlps_of_a_transformer(tiny: Callable[[str], Graph]) -> None:
    graph = tiny("vision_transformer")
    pairing = find_pairs(graph)
    assert pairing.pairs == tuple(
        Pair(f"blocks.{block}.up", "", Op.GELU, f"blocks.{block}.down", unfolded_because=UNFOLDED) for block in range(2)
    )
    assert pairing.reasons == {
        "patches": "stem",
        "head": "classifier",
        **{f"blocks.{block}.attention.proj": "feeds a residual add" for block in range(2)},
        "blocks.0.attention.qkv": "output read by chunk (aten.chunk.default)",
        "blocks.1.attention.qkv": "output read by chunk_1 (aten.chunk.default)",
    }
    assert sum(node.op is Op.LIVE_NORM for node in graph.nodes) == 5


def test_the_mlps_of_a_convnext(tiny: Callable[[str], Graph]) -> None:
    graph = tiny("convnext")
    pairing = find_pairs(graph)
    assert [(pair.low, pair.norm, pair.activation, pair.high) for pair in pairing.pairs] == [
        (f"{block}.up", "", Op.GELU, f"{block}.down") for block in (2, 3)
    ]
    assert pairing.reasons == {"0": "stem", "6": "classifier", "2.depthwise": "depthwise", "3.depthwise": "depthwise"}
    assert [node.affine.weight for node in graph.nodes if node.affine] == ["2.scale", "3.scale"]


def test_what_mixes_tokens_with_channels_is_not_looked_through() -> None:
    class Tokens(nn.Module):
        def __init__(self, after: Callable[[Tensor], Tensor], features: int) -> None:
            super().__init__()
            self.after = after
            self.stem, self.low, self.high = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(features, 8)
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.high(self.after(torch.relu(self.low(torch.relu(self.stem(x))))))))

    def reason(after: Callable[[Tensor], Tensor], features: int = 8) -> str:
        return find_pairs(capture(Tokens(after, features).eval(), (1, 4, 6))).reasons.get("low", "")

    assert reason(lambda x: F.dropout(x, 0.5, False)) == ""
    assert reason(lambda x: x.flatten(1), 32) == "output read by flatten (aten.flatten.using_ints)"
    assert reason(lambda x: x.mean(2, keepdim=True).expand(-1, -1, 8)).startswith("output read by mean")
    assert reason(lambda x: F.avg_pool1d(x, 2), 4).startswith("output read by avg_pool1d")
    assert reason(lambda x: x[:, :, :4], 4).startswith("output read by slice")


def test_the_expansion_of_a_gated_inverted_residual_is_low(tiny: Callable[[str], Graph]) -> None:
    graph = tiny("gated")
    assert {Op.MUL, Op.HARDSWISH, Op.HARDSIGMOID} <= {node.op for node in graph.nodes}
    (pair,) = find_pairs(graph).pairs
    assert (pair.low, pair.activation, pair.folds) == ("expand", Op.HARDSWISH, False)
    layers = {layer.name: layer for layer in graph.layers}
    assert layers[pair.high].depthwise
