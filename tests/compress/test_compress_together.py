"""Layers whose codes follow from their weights alone are rounded together, by the kernels' grouped launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from dfmpc.compress import quantize, work
from dfmpc.compress.compress import compress_model
from dfmpc.job.methods import DfmpcPlan, RtnPlan
from dfmpc.kernels.formats import Quantized
from dfmpc.kernels.group import Request, quantize_group, quantize_group_triton
from dfmpc.models.load import LoadedModel
from torch import Tensor, nn

PUBLISHED = DfmpcPlan.model_validate({"name": "p", "method": "dfmpc", "recipe": "published", "low": 2, "high": 6})
RTN = RtnPlan.model_validate({"name": "r", "method": "rtn", "bits": 4, "granularity": "group:8"})
CLIPPED = DfmpcPlan.model_validate(
    {"name": "c", "method": "dfmpc", "rounding": "nearest", "compensate": "none", "calibrator": "none", "clip": "mse"}
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 10, 1, bias=False),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(10, 4),
    ).eval()


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each grouped call was given; the calls go to the kernels, here in the interpreter."""
    seen: list[int] = []

    def launched(requests: Sequence[Request]) -> list[Quantized]:
        seen.append(len(requests))
        return quantize_group_triton(requests)

    monkeypatch.setattr(quantize, "quantize_group", launched)
    return seen


@pytest.mark.parametrize("plan", [PUBLISHED, RTN])
def test_kernels_launched_once_give_the_references_bytes(
    loaded: Callable[[nn.Module, tuple[int, ...]], LoadedModel], plan: DfmpcPlan | RtnPlan, groups: list[int]
) -> None:
    model = loaded(network(), (1, 3, 8, 8))
    found = compress_model(model, plan)
    assert groups == [4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "quantize_group", quantize_group)
        expected = compress_model(model, plan)
    assert groups == [4]
    for mine, theirs in zip(found.layers, expected.layers, strict=True):
        assert torch.equal(mine.quantized.codes, theirs.quantized.codes)
        assert torch.equal(mine.quantized.scale, theirs.quantized.scale)
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], expected.tensors[name]) for name in found.tensors)


def test_layers_that_need_more_than_their_weights_wait_for_their_turn(
    loaded: Callable[[nn.Module, tuple[int, ...]], LoadedModel], groups: list[int]
) -> None:
    compress_model(loaded(network(), (1, 3, 8, 8)), CLIPPED)
    assert sum(groups) < 4


def test_no_more_weights_are_on_the_device_at_once_than_a_launch_is_worth(
    loaded: Callable[[nn.Module, tuple[int, ...]], LoadedModel], groups: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(work, "TOGETHER", 4 * (8 * 27 + 8 * 9))  # the first two layers
    weights: dict[str, Tensor] = {}
    for item in compress_model(loaded(network(), (1, 3, 8, 8)), RTN).layers:
        weights[item.layer.name] = item.weight()
    assert groups == [2, 2]
    assert len(weights) == 4
