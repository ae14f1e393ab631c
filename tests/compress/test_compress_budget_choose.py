"""Widths for a size: what is foretold is what is stored, rules and ties hold, and the bounds are told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from dfmpc.artifact.describe import bits_per_weight
from dfmpc.artifact.key import task_key
from dfmpc.artifact.writer import write_artifact
from dfmpc.compress.budget.choose import BitChoice, choose_bits
from dfmpc.compress.compress import compress_model
from dfmpc.errors import UnsupportedModelError
from dfmpc.job.methods import DfmpcPlan
from dfmpc.job.schema import LayerRule
from dfmpc.job.sources import ModelSource
from dfmpc.job.task import Task
from dfmpc.models.factory import AllowList
from dfmpc.models.load import LoadedModel, load_model
from torch import Tensor, nn

Loader = Callable[[nn.Module, tuple[int, ...]], LoadedModel]
STEPS = {"recipe": "published", "calibrator": "analytic"}


class Small(nn.Module):
    """A stem, a pair, a depthwise layer with ReLU6, and a classifier; row lengths that are no multiple of 8."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.low, self.bn1 = nn.Conv2d(7, 13, 1, bias=False), nn.BatchNorm2d(13)
        self.deep, self.bn2 = nn.Conv2d(13, 13, 3, padding=1, groups=13, bias=False), nn.BatchNorm2d(13)
        self.high, self.bn3 = nn.Conv2d(13, 22, 3, padding=1, bias=False), nn.BatchNorm2d(22)
        self.act, self.fc = nn.ReLU6(), nn.Linear(22, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn0(self.stem(x)))
        x = self.act(self.bn2(self.deep(self.act(self.bn1(self.low(x))))))
        return self.fc(self.act(self.bn3(self.high(x))).mean((2, 3)))


def plan(**fields: object) -> DfmpcPlan:
    return DfmpcPlan.model_validate({"name": "p", "method": "dfmpc", **STEPS, **fields})


def rules_of(choice: BitChoice) -> list[LayerRule]:
    return [LayerRule(match=name, bits=bits) for name, bits in choice.bits.items()]


@pytest.fixture(scope="module")
def small(loaded: Loader) -> LoadedModel:
    return loaded(Small(), (1, 3, 8, 8))


@pytest.mark.parametrize(
    ("granularity", "budget"), [("channel", 4.0), ("channel", 6.5), ("tensor", 3.0), ("group:8", 8.0)]
)
def test_the_size_foretold_is_the_size_stored(small: LoadedModel, granularity: str, budget: float) -> None:
    sized = plan(budget={"bits_per_weight": budget}, granularity=granularity)
    choice = choose_bits(small, sized)
    compressed = compress_model(small, plan(granularity=granularity), rules_of(choice))
    assert round(choice.bits_per_weight, 6) == bits_per_weight(compressed.layers)
    assert choice.bits_per_weight <= budget
    assert {item.layer.name: item.quantized.format.bits for item in compressed.layers} == choice.bits


@pytest.mark.parametrize("budget", [{"bytes": 13_000}, {"ratio": 1.5}], ids=["bytes", "ratio"])
def test_the_files_keep_to_a_budget_of_bytes(small: LoadedModel, tmp_path: Path, budget: dict[str, float]) -> None:
    model = replace(small, checkpoint_bytes=20_000)
    choice = choose_bits(model, plan(budget=budget))
    task = Task(id="m/p", model=model.source, plan=plan(), layers=rules_of(choice))
    compressed = compress_model(model, task.plan, task.layers)
    write_artifact(tmp_path, model=model, compressed=compressed, task=task, key=task_key(task, [], distribution=None))
    stored = sum(file.stat().st_size for file in tmp_path.iterdir())
    allowed = 13_000 if "bytes" in budget else 20_000 / 1.5
    assert stored <= choice.bytes <= allowed
    assert choice.bytes - stored < 1_500


def test_half_precision_biases_that_are_corrected_are_foretold_in_single_precision(
    loaded: Loader, tmp_path: Path
) -> None:
    network = nn.Sequential(nn.Conv2d(3, 600, 1), nn.ReLU(), nn.Conv2d(600, 6, 1), nn.ReLU(), nn.Conv2d(6, 1200, 1))
    model = loaded(network, (1, 3, 4, 4))
    model = replace(model, state={name: tensor.half() for name, tensor in model.state.items()}, checkpoint_bytes=25_000)
    sized = plan(recipe="auto", calibrator="analytic", budget={"bytes": 26_000})
    compressed = compress_model(model, sized)
    task = Task(id="m/p", model=model.source, plan=sized, layers=[])
    write_artifact(tmp_path, model=model, compressed=compressed, task=task, key=task_key(task, [], distribution=None))
    stored = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert stored <= choose_bits(model, sized).bytes <= 26_000


def test_the_objective_is_the_sum_of_the_chosen_effects(small: LoadedModel) -> None:
    choice = choose_bits(small, plan(budget={"bits_per_weight": 8.0}))
    effects = [layer.effects[layer.bits.index(choice.bits[layer.name])] for layer in choice.sweep]
    assert choice.objective == pytest.approx(sum(effects), rel=1e-12)
    assert choice.gap == 0


def test_errors_and_effects_fall_with_the_width(small: LoadedModel) -> None:
    for layer in choose_bits(small, plan(budget={"bits_per_weight": 8.0})).sweep:
        assert layer.bits == (2, 3, 4, 5, 6, 7, 8)
        assert all(one > other for one, other in pairwise(layer.errors))
        assert all(one > other > 0 for one, other in pairwise(layer.effects))


def test_rules_are_kept(small: LoadedModel) -> None:
    rules = [LayerRule(match="stem", keep=True), LayerRule(match="f*", bits=5), LayerRule(match="low", bits=7)]
    choice = choose_bits(small, plan(budget={"bits_per_weight": 6.0}), rules)
    assert "stem" not in choice.bits
    assert (choice.bits["fc"], choice.bits["low"]) == (5, 7)
    assert [layer.bits for layer in choice.sweep if layer.name in {"fc", "low"}] == [(7,), (5,)]
    compressed = compress_model(small, plan(), [*rules, *rules_of(choice)])
    assert round(choice.bits_per_weight, 6) == bits_per_weight(compressed.layers) <= 6


def test_a_tied_weight_is_one_layer(loaded: Loader) -> None:
    class Tied(Small):
        def __init__(self) -> None:
            super().__init__()
            self.twice = nn.Conv2d(22, 22, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.bn1(self.low(self.act(self.bn0(self.stem(x))))))
            x = self.act(self.bn3(self.high(self.act(self.bn2(self.deep(x))))))
            return self.fc(self.twice(self.twice(x)).mean((2, 3)))

    model = loaded(Tied(), (1, 3, 8, 8))
    choice = choose_bits(model, plan(budget={"bits_per_weight": 6.0}))
    assert list(choice.bits) == ["stem", "low", "deep", "high", "twice", "fc"]
    stored = compress_model(model, plan(), rules_of(choice)).layers
    assert round(choice.bits_per_weight, 6) == bits_per_weight(stored)


def test_scaling_a_channel_and_its_norm_changes_nothing(small: LoadedModel) -> None:
    state = dict(small.state)
    for layer, norm in (("low", "bn1"), ("deep", "bn2"), ("high", "bn3")):
        # powers of two, and no eps to speak of, so that the same codes and statistics come out
        factor = 2.0 ** torch.arange(len(state[f"{norm}.running_var"])).remainder(3)
        state[f"{layer}.weight"] = state[f"{layer}.weight"] * factor.view(-1, 1, 1, 1)
        state[f"{norm}.running_var"] = (state[f"{norm}.running_var"] + 1e-5) * factor.square() - 1e-5
        state[f"{norm}.running_mean"] = state[f"{norm}.running_mean"] * factor
    sized = plan(budget={"bits_per_weight": 7.0})
    before, after = choose_bits(small, sized), choose_bits(replace(small, state=state), sized)
    assert before.bits == after.bits
    for one, other in zip(before.sweep, after.sweep, strict=True):
        assert other.effects == pytest.approx(one.effects, rel=1e-3)


def test_the_curve_goes_from_two_bits_to_eight(small: LoadedModel) -> None:
    curve = choose_bits(small, plan(budget={"bits_per_weight": 7.0}, pareto=5)).pareto
    assert len(curve) == 5
    assert set(curve[0].bits.values()) == {2}
    assert set(curve[-1].bits.values()) == {8}
    for one, other in pairwise(curve):
        assert one.bits_per_weight < other.bits_per_weight
        assert one.bytes < other.bytes
        assert one.objective > other.objective


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            {"bits_per_weight": 2.0},
            r"budget of 2 bits a weight is out of reach.* takes 3\.\d+ bits a weight with 2 bits",
        ),
        ({"bytes": 500}, r"budget of 500 bytes is out of reach.* takes about 1\d,\d+ bytes with 2 bits"),
        ({"bytes": "1GB"}, r"1,000,000,000 bytes is above half precision.* in half precision"),
        ({"ratio": 60}, r"ratio of 60 is out of reach.* takes a ratio of about 1\.\d+ with 2 bits"),
        ({"ratio": 1.01}, r"ratio of 1\.01 is above half precision"),
    ],
    ids=["few bits", "few bytes", "many bytes", "high ratio", "low ratio"],
)
def test_a_budget_out_of_bounds_names_them(small: LoadedModel, budget: dict[str, object], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        choose_bits(replace(small, checkpoint_bytes=20_000), plan(budget=budget))


def test_a_budget_with_every_layer_kept_is_refused(small: LoadedModel) -> None:
    with pytest.raises(UnsupportedModelError, match="no layer is quantized"):
        choose_bits(small, plan(budget={"ratio": 8}), [LayerRule(match="*", keep=True)])


def test_the_same_model_gives_the_same_choice(small: LoadedModel) -> None:
    sized = plan(budget={"bits_per_weight": 7.5}, pareto=3)
    assert choose_bits(small, sized) == choose_bits(small, sized)


@pytest.mark.parametrize("name", ["resnet20", pytest.param("mobilenetv2", marks=pytest.mark.slow)])
def test_shared_networks_take_what_was_foretold(shared: Path, name: str) -> None:
    file = shared / "models" / f"{name}.safetensors"
    source = ModelSource(name=name, factory=f"cifar_models:{name}", checkpoint=str(file), input=[1, 3, 32, 32])
    model = load_model(source, AllowList.default([str(shared / "models")]))
    choice = choose_bits(model, plan(budget={"bits_per_weight": 3.0}))
    compressed = compress_model(model, plan(), rules_of(choice))
    assert 2.99 < choice.bits_per_weight <= 3
    assert round(choice.bits_per_weight, 6) == bits_per_weight(compressed.layers)
    assert choice.gap == 0
