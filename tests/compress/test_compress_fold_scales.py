"""Scales of channels that a norm takes over: the network stays what it was, and stores one scale a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dfmpc.artifact.describe import bits_per_weight
from dfmpc.artifact.key import task_key
from dfmpc.artifact.loader import load_state_dict
from dfmpc.artifact.manifest import read_manifest
from dfmpc.artifact.verify import verify
from dfmpc.artifact.writer import write_artifact
from dfmpc.compress.budget.choose import choose_bits
from dfmpc.compress.compress import compress_model
from dfmpc.compress.fold_scales import IN_NORM, fold_scales, norms_for_scales
from dfmpc.compress.result import Compressed
from dfmpc.job.methods import DfmpcPlan
from dfmpc.job.task import Task
from dfmpc.models.load import LoadedModel
from torch import Tensor, nn
from torch.func import functional_call

Loader = Callable[[nn.Module, tuple[int, ...]], LoadedModel]


class Mixed(nn.Module):
    """Layers that a norm relieves, and four that none does: with a bias, with two readers, in a sum, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.low, self.bn1 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.deep, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.high, self.bn3 = nn.Conv2d(12, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.biased, self.bn4 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.twice, self.bn5 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.summed, self.bn6 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.bn0(self.stem(x))).relu()
        x = self.bn3(self.high(self.bn2(self.deep(self.bn1(self.low(x)).relu())).relu())).relu()
        x = self.bn4(self.biased(x)).relu()
        y = self.twice(x)
        x = self.bn6(self.summed(self.bn5(y).relu()) + y).relu()
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def mixed(loaded: Loader) -> LoadedModel:
    model = loaded(Mixed(), (1, 3, 8, 8))
    model.state["low.weight"][3] = 0  # a dead row: its scale is 0
    model.state["low.weight"][5] *= 1e-4
    model.state["bn1.weight"][0] *= -1
    return model


def plan(**fields: object) -> DfmpcPlan:
    return DfmpcPlan.model_validate({"name": "p", "method": "dfmpc", "calibrator": "analytic", **fields})


def outputs(model: LoadedModel, compressed: Compressed) -> Tensor:
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    state = {name: tensor.float() for name, tensor in model.state.items() if tensor.is_floating_point()}
    with torch.inference_mode():
        return functional_call(model.module, state | compressed.changed(), (images,))


RELIEVED = {"stem", "low", "deep", "high"}


def test_norms_take_the_scales_of_layers_that_they_alone_read(mixed: LoadedModel) -> None:
    found = norms_for_scales(mixed.graph)
    assert {layer: norm.name for layer, norm in found.items()} == {
        "stem": "bn0",
        "low": "bn1",
        "deep": "bn2",
        "high": "bn3",
    }


@pytest.mark.parametrize(
    "fields",
    [{}, {"low": 4, "high": 8, "rounding": "nearest"}, {"recipe": "published"}, {"low_levels": 4, "high": 3}],
    ids=["auto", "nearest", "published", "few-bits"],
)
def test_the_network_computes_what_it_did(mixed: LoadedModel, fields: dict[str, object]) -> None:
    before, after = (compress_model(mixed, plan(fold_scales=fold, **fields)) for fold in (False, True))
    scale = outputs(mixed, before).abs().max()
    torch.testing.assert_close(outputs(mixed, after) / scale, outputs(mixed, before) / scale, rtol=0, atol=2e-6)
    for plain, relieved in zip(before.layers, after.layers, strict=True):
        assert torch.equal(plain.quantized.codes, relieved.quantized.codes)
        assert relieved.sqnr_db == plain.sqnr_db
        if relieved.layer.name in RELIEVED:
            assert (relieved.granularity, relieved.quantized.scale.shape) == (IN_NORM, (1, 1))
        else:
            assert torch.equal(plain.quantized.scale, relieved.quantized.scale)
    assert bits_per_weight(after.layers) < bits_per_weight(before.layers)


def test_a_row_of_zeros_keeps_what_its_norm_made_of_zero(mixed: LoadedModel) -> None:
    after = compress_model(mixed, plan(fold_scales=True))
    norm = norms_for_scales(mixed.graph)["low"]
    before = compress_model(mixed, plan(fold_scales=False)).tensors
    beta, mean, variance = (before.get(name, mixed.state[name])[3] for name in norm.tensors[1:])
    gamma = before.get(norm.weight, mixed.state[norm.weight])[3]
    assert after.tensors[norm.weight][3] == 0
    torch.testing.assert_close(after.tensors[norm.bias][3], beta - gamma * mean / (variance + norm.eps).sqrt())


@pytest.mark.parametrize("granularity", ["tensor", "group:8"])
def test_other_granularities_stay(mixed: LoadedModel, granularity: str) -> None:
    found = compress_model(mixed, plan(fold_scales=False, granularity=granularity))
    folded = fold_scales(found, mixed.graph, mixed.state)
    if granularity == "tensor":
        assert folded == replace(found)
    else:  # a row no longer than a group has one scale
        kept = {item.layer.name for item in folded.layers if item.quantized.format.groups > 1}
        assert {item.layer.name for item in folded.layers if item.granularity == IN_NORM} == RELIEVED - kept


def test_a_budget_buys_width_for_the_scales_that_norms_hold(mixed: LoadedModel) -> None:
    assert plan(budget={"bits_per_weight": 4}).fold_scales
    assert not plan(budget={"bits_per_weight": 4}, recipe="published").fold_scales
    assert not plan().fold_scales
    stored, folded = (plan(budget={"bits_per_weight": 5}, fold_scales=fold) for fold in (False, True))
    choices = [choose_bits(mixed, one) for one in (stored, folded)]
    for one, choice in zip((stored, folded), choices, strict=True):
        found = bits_per_weight(compress_model(mixed, one).layers)
        assert found == pytest.approx(choice.bits_per_weight, abs=1e-6)
        assert found <= 5
    assert choices[1].objective < choices[0].objective


def test_the_artifact_holds_one_scale_and_loads_as_it_was_evaluated(mixed: LoadedModel, tmp_path: Path) -> None:
    task = Task(id="m/p", model=mixed.source, plan=plan(fold_scales=True), layers=[])
    found = compress_model(mixed, task.plan)
    write_artifact(tmp_path, model=mixed, compressed=found, task=task, key=task_key(task, [], distribution=None))
    assert verify(tmp_path).findings == []
    entries = {entry.name: entry for entry in read_manifest(tmp_path).layers}
    assert {name for name, entry in entries.items() if entry.granularity == IN_NORM and entry.layer_wise} == RELIEVED
    state = load_state_dict(tmp_path)
    for name, tensor in found.changed().items():
        assert torch.equal(state[name], tensor), name


class Read(nn.Module):
    """A layer and a norm of which something else reads a tensor, and a linear layer over tokens."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.tokens, self.bn2 = nn.Linear(64, 8, bias=False), nn.BatchNorm1d(8)
        self.tied = nn.GroupNorm(1, 8)
        if what == "tied":
            self.tied.weight = self.bn1.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv(self.bn0(self.stem(x)).relu())).relu()
        if self.what == "weight":
            x = x + self.conv.weight.square().sum()
        if self.what == "view":
            x = x * self.bn1.weight.view(1, -1, 1, 1)
        if self.what == "mean":
            x = x + self.bn1.running_mean.sum()
        return self.bn2(self.tokens(self.tied(x).flatten(2)))


@pytest.mark.parametrize("what", ["weight", "view", "mean", "tied", "nothing"])
def test_what_else_is_read_stays(loaded: Loader, what: str) -> None:
    found = norms_for_scales(loaded(Read(what), (1, 3, 8, 8)).graph)
    assert set(found) == ({"stem", "conv"} if what == "nothing" else {"stem"})
