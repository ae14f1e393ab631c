"""Every other method on whole networks: widths by role, rules, what reports are told, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from dfmpc.compress.neighbours.run import compress_neighbour
from dfmpc.compress.result import QuantizedLayer
from dfmpc.errors import NonFiniteError, UnsupportedModelError
from dfmpc.job.methods import BitPlan
from dfmpc.job.neighbours import NeighbourPlan
from dfmpc.job.schema import LayerRule
from dfmpc.kernels import Grid
from dfmpc.models.load import LoadedModel
from pydantic import TypeAdapter
from torch import Tensor, nn

Loader = Callable[[nn.Module, tuple[int, ...]], LoadedModel]
METHODS = ("twn-exact", "omse", "vecq", "mul2q", "daq", "dfq", "squant", "hqq")


class Small(nn.Module):
    """A stem and two pairs: convolutions, then a transposed one and the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.low, self.bn1 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.high, self.bn2 = nn.Conv2d(12, 10, 3, padding=1, groups=2), nn.BatchNorm2d(10)
        self.up, self.bn3 = nn.ConvTranspose2d(10, 6, 2, stride=2), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.low(torch.relu(self.bn0(self.stem(x))))))
        x = self.bn3(self.up(torch.relu(self.bn2(self.high(x)))))
        return self.fc(torch.relu(x).mean((2, 3)))


@pytest.fixture(scope="module")
def captured(loaded: Loader) -> LoadedModel:
    return loaded(Small(), (1, 3, 8, 8))


@pytest.fixture
def model(captured: LoadedModel) -> LoadedModel:
    """Return the small network with tensors that a test may replace."""
    return replace(captured, state=dict(captured.state))


def plan(method: str, **fields: Any) -> NeighbourPlan:
    found: NeighbourPlan = TypeAdapter(BitPlan).validate_python({"name": "p", "method": method, **fields})
    return found


def compressed(model: LoadedModel, method: str, *rules: LayerRule, **fields: Any) -> dict[str, QuantizedLayer]:
    return {item.layer.name: item for item in compress_neighbour(model, plan(method, **fields), rules).layers}


@pytest.mark.parametrize("method", METHODS)
def test_low_and_high_follow_the_pairs_and_bits_give_no_roles(model: LoadedModel, method: str) -> None:
    pair, single = compressed(model, method, low=2, high=6), compressed(model, method, bits=5)
    assert {name: (item.role, item.quantized.format.bits) for name, item in pair.items()} == {
        "stem": ("unpaired", 6),
        "low": ("low", 2),
        "high": ("high", 6),
        "up": ("low", 2),
        "fc": ("high", 6),
    }
    assert [pair[name].partners for name in ("low", "high", "up", "fc")] == [("high",), ("low",), ("fc",), ("up",)]
    assert {(item.role, item.quantized.format.bits, item.partners) for item in single.values()} == {("unpaired", 5, ())}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_network_runs_and_wider_codes_are_closer(model: LoadedModel, method: str, bits: int) -> None:
    image = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.func.functional_call(model.module, model.state, image)
    changed = compress_neighbour(model, plan(method, bits=bits)).changed()
    error = torch.func.functional_call(model.module, {**model.state, **changed}, image) - expected
    assert float(error.norm() / expected.norm()) < {2: 2.0, 4: 0.5, 8: 0.06}[bits]


@pytest.mark.parametrize("method", METHODS)
def test_rules_and_granularity_by_role_hold(model: LoadedModel, method: str) -> None:
    rules = (
        LayerRule(match="st*", bits=8),
        LayerRule(match="fc", keep=True),
        LayerRule(match="up", granularity="group:16"),
    )
    layers = compressed(model, method, *rules, low=3, high=4, granularity={"low": "tensor", "high": "channel"})
    assert "fc" not in layers
    assert layers["stem"].quantized.format.bits == 8
    assert layers["low"].quantized.scale.shape == (1, 1)
    assert layers["high"].quantized.scale.shape == (10, 1)
    assert layers["up"].quantized.scale.shape == (6, 3)  # 40 weights a row, the last group has 8


def test_grids_are_the_methods_own(model: LoadedModel) -> None:
    grids = {method: compressed(model, method, bits=2)["low"].quantized.format.grid for method in METHODS}
    assert grids == {
        "twn-exact": Grid.TERNARY,
        "omse": Grid.SYMMETRIC,
        "vecq": Grid.DOREFA,
        **dict.fromkeys(("mul2q", "daq", "dfq", "squant", "hqq"), Grid.ASYMMETRIC),
    }
    assert compressed(model, "twn-exact", bits=3)["low"].quantized.format.grid is Grid.DOREFA
    for method in ("dfq", "squant"):
        assert compressed(model, method, bits=2, symmetric=True)["low"].quantized.format.grid is Grid.SYMMETRIC


def test_clipped_weights_are_counted(model: LoadedModel) -> None:
    for method in ("squant", "dfq", "hqq"):
        clipped = {name: item.clipped_fraction for name, item in compressed(model, method, bits=4).items()}
        assert max(clipped.values()) < (0.2 if method == "hqq" else 1e-12), method
    item = compressed(model, "vecq", bits=2)["low"]
    outer = model.state["low.weight"].flatten(1).abs() > item.quantized.scale
    assert item.clipped_fraction == pytest.approx(float(outer.double().mean()), abs=1e-12)
    assert 0.05 < item.clipped_fraction < 0.5


@pytest.mark.parametrize("method", METHODS)
def test_half_precision_checkpoints_give_what_their_values_give(model: LoadedModel, method: str) -> None:
    half, single = (replace(model, state=dict(model.state)) for _ in range(2))
    for name in ("stem.weight", "low.weight", "high.weight", "up.weight", "fc.weight"):
        half.state[name] = half.state[name].half()
        single.state[name] = half.state[name].float()
    first, second = compressed(half, method, bits=4), compressed(single, method, bits=4)
    for name, item in first.items():
        assert torch.equal(item.quantized.codes, second[name].quantized.codes)
        assert torch.equal(item.quantized.scale, second[name].quantized.scale)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["low.weight", "bn1.running_var", "bn1.bias"])
def test_not_a_number_is_named(model: LoadedModel, method: str, name: str) -> None:
    model.state[name] = model.state[name].clone()
    model.state[name].view(-1)[3] = float("nan")
    with pytest.raises(NonFiniteError, match=name):
        compress_neighbour(model, plan(method, bits=4))


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_channel_stays_zero_and_everything_finite(model: LoadedModel, method: str) -> None:
    model.state["low.weight"] = model.state["low.weight"].clone()
    model.state["low.weight"][5] = 0
    model.state["bn1.weight"] = torch.zeros(12)
    found = compress_neighbour(model, plan(method, bits=3, granularity="channel"))
    assert not next(item.weight() for item in found.layers if item.layer.name == "low")[5].any()
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.changed().values())


def test_two_widths_need_a_pair(loaded: Loader) -> None:
    model = loaded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4)), (1, 3, 8, 8))
    with pytest.raises(UnsupportedModelError, match="use bits in place of low and high"):
        compress_neighbour(model, plan("omse", low=2, high=6))
    assert len(compress_neighbour(model, plan("omse", bits=4)).layers) == 2


def test_nothing_to_compress_is_refused(loaded: Loader) -> None:
    model = loaded(nn.Sequential(nn.ReLU()), (1, 3, 8, 8))
    with pytest.raises(UnsupportedModelError, match="nothing to compress"):
        compress_neighbour(model, plan("hqq", bits=4))


@pytest.mark.parametrize("method", METHODS)
def test_threads_change_nothing(model: LoadedModel, method: str) -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(compress_neighbour(model, plan(method, low=2, high=4)))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(found[0].layers, found[1].layers, strict=True):
        assert torch.equal(one.quantized.codes, two.quantized.codes)
        assert torch.equal(one.quantized.scale, two.quantized.scale)
    assert all(torch.equal(found[0].tensors[name], found[1].tensors[name]) for name in found[0].tensors)
