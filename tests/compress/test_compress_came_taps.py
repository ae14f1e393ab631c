"""Tap sums that the analytic calibrator needs come with the ternary kernel's launch: fewer passes, the same bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from dfmpc.compress import quantize
from dfmpc.compress.assign import Assignment
from dfmpc.compress.compress import compress_model
from dfmpc.compress.result import Compressed
from dfmpc.job.methods import DfmpcPlan
from dfmpc.kernels import tapped
from dfmpc.kernels.formats import Grid, Quantized
from dfmpc.kernels.group import Request, quantize_group_triton
from dfmpc.models.graph import Layer, Op
from dfmpc.models.load import LoadedModel
from torch import Tensor, nn

Load = Callable[[nn.Module, tuple[int, ...]], LoadedModel]


class Network(nn.Module):
    """Pairs whose LOW layer has 9, 25, 4 and 1 taps, one of them grouped; the stem, a depthwise and the HIGH ones."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(3, 8, 3, 1), (8, 8, 3, 1), (8, 6, 3, 1), (6, 8, 5, 2), (8, 8, 1, 1), (8, 8, 3, 8), (8, 4, 1, 1)]
        shapes += [(4, 6, 2, 1), (6, 4, 3, 1)]
        parts: list[nn.Module] = []
        for inputs, outputs, side, groups in shapes:
            parts += [nn.Conv2d(inputs, outputs, side, padding=side // 2, groups=groups), nn.BatchNorm2d(outputs)]
            parts += [nn.ReLU()]
        self.body = nn.Sequential(*parts)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))


def plan(**fields: Any) -> DfmpcPlan:
    known = {"name": "p", "method": "dfmpc", "low": 2, "high": 6, "recipe": "published"}
    return DfmpcPlan.model_validate(known | fields)


PLANS = {
    "channel": plan(),
    "layer-wise": plan(granularity="tensor", calibrator={"name": "analytic", "rho": 0.5, "tau": None}),
    "groups": plan(granularity="group:8"),
    "no c": plan(compensate=False),
}


@contextmanager
def launching(patch: pytest.MonkeyPatch, kernels: bool) -> Iterator[Counter[str]]:
    """Launch the kernels, here in the interpreter, as a GPU would; count requests for taps and passes over weights."""
    seen: Counter[str] = Counter()

    def grouped(requests: Sequence[Request]) -> list[Quantized]:
        seen["asked"] += sum(request.taps > 0 for request in requests)
        seen["ternary"] += sum(request.grid is Grid.TERNARY for request in requests)
        return quantize_group_triton(requests)

    def counted(module: Any, name: str) -> None:
        plain = getattr(module, name)

        def run(*arguments: Any) -> Any:
            seen[name] += 1
            return plain(*arguments)

        patch.setattr(module, name, run)

    with patch.context() as inner:
        patch = inner
        patch.setattr(quantize, "quantize_group", grouped)
        patch.setattr(quantize, "use_triton", lambda _: kernels)
        for name in ("tap_sums", "dequantize"):
            counted(quantize, name)
        counted(tapped, "tap_sums_of_both")
        yield seen


def assert_same(found: Compressed, expected: Compressed) -> None:
    for mine, theirs in zip(found.layers, expected.layers, strict=True):
        assert torch.equal(mine.quantized.codes, theirs.quantized.codes)
        assert torch.equal(mine.quantized.scale, theirs.quantized.scale)
        assert mine.norm_shift == theirs.norm_shift
    assert found.tensors.keys() == expected.tensors.keys()
    for name, tensor in found.tensors.items():
        assert torch.equal(tensor, expected.tensors[name]), name


@pytest.mark.parametrize("name", PLANS)
def test_the_same_tensors_come_out_whoever_summed_the_taps(
    name: str, loaded: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loaded(Network(), (1, 3, 8, 8))
    expected = compress_model(model, PLANS[name])
    with launching(monkeypatch, kernels=True) as seen:
        found = compress_model(model, PLANS[name])
    assert seen["asked"] > 0
    assert_same(found, expected)
    assert any("running_mean" in tensor for tensor in found.tensors)


def test_layers_whose_taps_came_are_not_read_again(loaded: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(Network(), (1, 3, 8, 8))
    with launching(monkeypatch, kernels=False) as before:
        compress_model(model, PLANS["channel"])
    with launching(monkeypatch, kernels=True) as after:
        found = compress_model(model, PLANS["channel"])
    assert (before["asked"], after["tap_sums_of_both"]) == (0, 0)
    lows = [item.layer.taps for item in found.layers if item.quantized.format.grid is Grid.TERNARY]
    assert len(lows) == after["ternary"]
    came = sum(taps > 1 for taps in lows)
    assert after["asked"] == came >= 2
    # two passes less over tap sums and one less over codes for each
    assert before["tap_sums"] - after["tap_sums"] == 2 * came
    assert before["dequantize"] - after["dequantize"] == came


@pytest.mark.parametrize(
    ("dtype", "taps", "comes"),
    [
        (torch.float32, 3, 0),
        (torch.float32, 4, 4),
        (torch.float32, 9, 9),
        (torch.bfloat16, 4, 0),
        (torch.bfloat16, 9, 9),
    ],
)
def test_sums_come_along_where_they_are_at_most_twice_the_weight(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, taps: int, comes: int
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(quantize, "use_triton", lambda _: True)
    monkeypatch.setattr(quantize, "quantize_group", lambda requests: asked.extend(each.taps for each in requests))
    layer = Layer("a", "a.weight", None, Op.CONV, (2, 3, taps))
    given = Assignment(layer, "low", 2, Grid.TERNARY, "channel")
    quantize.quantize_layers([(torch.ones(2, 3, taps, dtype=dtype), given)], "cpu", with_taps=True)
    assert asked == [comes]


def test_what_came_is_not_kept_beside_the_codes(loaded: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    with launching(monkeypatch, kernels=True) as seen:
        found = compress_model(loaded(Network(), (1, 3, 8, 8)), PLANS["channel"])
    assert seen["asked"] > 0
    assert all(item.quantized.taps is None for item in found.layers)


OTHERS = {
    "none": plan(calibrator="none"),
    "norm": plan(calibrator="norm"),
    "spectral": plan(calibrator={"name": "analytic", "moments": "spectral"}),
    "exact": plan(ternary="exact"),
    "no ternary": plan(low=4),
}


@pytest.mark.parametrize("name", OTHERS)
def test_plans_that_want_no_taps_of_ternary_codes_ask_for_none(
    name: str, loaded: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    with launching(monkeypatch, kernels=True) as seen:
        compress_model(loaded(Network(), (1, 3, 8, 8)), OTHERS[name])
    assert seen["asked"] == 0


def test_without_a_gpu_nobody_asks(loaded: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """The references read the weight for them as well then as when it is the layer's turn."""
    asked: list[int] = []
    plain = quantize.quantize_group

    def grouped(requests: Sequence[Request]) -> list[Quantized]:
        asked.extend(request.taps for request in requests)
        return plain(requests)

    monkeypatch.setattr(quantize, "quantize_group", grouped)
    compress_model(loaded(Network(), (1, 3, 8, 8)), PLANS["channel"])
    assert asked
    assert not any(asked)
