"""Plans that do not fit a network: budgets out of reach, and layer rules that break a pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dfmpc.compress.compress import compress_model
from dfmpc.compress.result import Compressed, QuantizedLayer
from dfmpc.errors import UnsupportedModelError
from dfmpc.job.methods import DfmpcPlan
from dfmpc.job.schema import LayerRule
from dfmpc.models.load import LoadedModel
from torch import Tensor, nn

Loader = Callable[[nn.Module, tuple[int, ...]], LoadedModel]
SHAPE = (1, 3, 8, 8)
CALIBRATORS: dict[str, object] = {
    "none": "none",
    "norm": "norm",
    "channel": {"name": "analytic", "moments": "channel"},
    "spectral": {"name": "analytic", "moments": "spectral"},
    "synthetic": {"name": "synthetic", "images": 8},
}
each_calibrator = pytest.mark.parametrize("calibrator", list(CALIBRATORS))


class Plain(nn.Module):
    """Stem, LOW, HIGH and classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.low, self.bn1 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.high, self.bn2 = nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.low(torch.relu(self.bn0(self.stem(x))))))
        return self.fc(torch.relu(self.bn2(self.high(x))).mean((2, 3)))


def plan(calibrator: str = "synthetic", **fields: Any) -> DfmpcPlan:
    return DfmpcPlan.model_validate({"name": "p", "method": "dfmpc", "calibrator": CALIBRATORS[calibrator], **fields})


def by_name(found: Compressed) -> dict[str, QuantizedLayer]:
    return {item.layer.name: item for item in found.layers}


def outputs(model: LoadedModel, changed: dict[str, Tensor]) -> Tensor:
    images = torch.randn(16, *model.input_shape[1:], generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        return torch.func.functional_call(model.module, {**model.state, **changed}, images)


def unharmed(model: LoadedModel, found: Compressed) -> None:
    """Assert that everything is finite, and that no variance is negative."""
    for name, tensor in found.changed().items():
        assert bool(torch.isfinite(tensor).all()), name
        assert not name.endswith("running_var") or bool((tensor >= 0).all()), name
    assert bool(torch.isfinite(outputs(model, found.changed())).all())


@pytest.mark.parametrize(
    ("budget", "rules", "said"),
    [
        ({"bits_per_weight": 2.0}, [], r"budget of 2 bits a weight is out of reach: this model takes \d\.\d+ bits"),
        ({"bytes": 100}, [], r"100 bytes is out of reach: this model takes about [\d,]+ bytes with 2 bits"),
        ({"bytes": "1MB"}, [], r"1,000,000 bytes is above half precision.*ask for something between"),
        ({"bits_per_weight": 3.0}, [LayerRule(match="*", bits=8)], "out of reach"),
        ({"bits_per_weight": 3.0}, [LayerRule(match="*", keep=True)], "no layer is quantized, so a budget means"),
    ],
    ids=["below_two_bits", "few_bytes", "above_half", "rules_take_too_much", "nothing_left"],
)
def test_a_budget_out_of_reach_is_told_its_bounds(
    loaded: Loader, budget: dict[str, object], rules: list[LayerRule], said: str
) -> None:
    model = loaded(Plain(), SHAPE)
    with pytest.raises(UnsupportedModelError, match=said):
        compress_model(model, plan(budget=budget), rules)


@each_calibrator
@pytest.mark.parametrize("recipe", ["published", "auto"])
@pytest.mark.parametrize("broken", ["low", "high"])
def test_a_rule_that_keeps_one_of_a_pair_leaves_the_other_without_c(
    loaded: Loader, recipe: str, calibrator: str, broken: str
) -> None:
    """The pair is gone: no c is solved, the other layer keeps its role's width and statistics are re-estimated."""
    model = loaded(Plain(), SHAPE)
    found = compress_model(model, plan(calibrator, recipe=recipe), [LayerRule(match=broken, keep=True)])
    layers = by_name(found)
    other = {"low": "high", "high": "low"}[broken]
    assert found.kept == {broken: "kept by a layer rule"}
    assert set(layers) == {"stem", "low", "high", "fc"} - {broken}
    assert f"its partner {broken} is kept by a layer rule" in layers[other].reason
    assert layers[other].quantized.format.bits == {"low": 2, "high": 6}[other]
    assert (layers[other].coefficients, layers[other].folded, layers[other].input_scale) == (None, None, None)
    assert f"{broken}.weight" not in found.changed()
    assert not {"bn1.weight", "bn1.bias"} & set(found.tensors)
    behind = {"low": "bn1.running_var", "high": "bn2.running_var"}[other]
    assert (behind in found.tensors) == (calibrator not in {"none", "norm"})
    unharmed(model, found)


@pytest.mark.parametrize("recipe", ["published", "auto"])
def test_a_rule_of_bits_inside_a_pair_keeps_the_pair(loaded: Loader, recipe: str) -> None:
    rules = [LayerRule(match="low", bits=5), LayerRule(match="high", bits=2)]
    layers = by_name(compress_model(loaded(Plain(), SHAPE), plan(recipe=recipe), rules))
    assert (layers["low"].quantized.format.bits, layers["high"].quantized.format.bits) == (5, 2)
    assert layers["low"].partners == ("high",)
    assert (layers["low"].coefficients is not None) == (recipe == "published")
