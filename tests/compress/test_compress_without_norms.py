"""Networks without BatchNorm: the shift goes into the biases, where there are any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dfmpc.compress.compress import compress_model
from dfmpc.compress.result import Compressed, QuantizedLayer
from dfmpc.job.methods import DfmpcPlan
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


class Folded(nn.Module):
    """Stem, LOW, HIGH and classifier, their norms folded away."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.low = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.high, self.fc = nn.Conv2d(12, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.high(torch.relu(self.low(torch.relu(self.stem(x)))))).mean((2, 3)))


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


@each_calibrator
def test_a_folded_network_takes_the_shift_into_its_biases(loaded: Loader, calibrator: str) -> None:
    model = loaded(Folded(), SHAPE)
    found = compress_model(model, plan(calibrator))
    assert {name: item.role for name, item in by_name(found).items()} == {
        "stem": "unpaired",
        "low": "low",
        "high": "high",
        "fc": "unpaired",
    }
    known = calibrator not in {"none", "norm"}
    assert set(found.tensors) <= {"stem.bias", "low.bias", "high.bias", "fc.bias"}
    assert (set(found.tensors) >= {"low.bias", "high.bias", "fc.bias"}) == known
    unharmed(model, found)


def test_the_shift_in_the_biases_makes_a_folded_network_better(loaded: Loader) -> None:
    model = loaded(Folded(), SHAPE)
    found = compress_model(model, plan("synthetic"))
    weights = {item.layer.weight: item.weight() for item in found.layers}
    original = outputs(model, {})
    with_biases, without = (
        float((outputs(model, changed) - original).square().mean()) for changed in (found.changed(), weights)
    )
    assert with_biases < without


class Bare(nn.Module):
    """A folded network without biases: nothing can take the shift up."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.low = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 12, 3, bias=False)
        self.high = nn.Conv2d(12, 4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.high(torch.relu(self.low(torch.relu(self.stem(x))))).mean((2, 3))


@each_calibrator
def test_without_norms_and_biases_nothing_is_shifted(loaded: Loader, calibrator: str) -> None:
    model = loaded(Bare(), SHAPE)
    found = compress_model(model, plan(calibrator))
    assert found.tensors == {}
    unharmed(model, found)


class Tokens(nn.Module):
    """Patches, an MLP behind a LayerNorm, and a mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        left, right = self.norm(x).chunk(2, -1)
        x = x + self.down(nn.functional.gelu(self.up(torch.cat([right, left], -1))))
        return self.head(x.mean(1))


@each_calibrator
@pytest.mark.parametrize("recipe", ["published", "auto"])
def test_a_network_with_layer_norms_is_paired_and_stays_finite(loaded: Loader, recipe: str, calibrator: str) -> None:
    model = loaded(Tokens(), SHAPE)
    found = compress_model(model, plan(calibrator, recipe=recipe))
    assert (by_name(found)["up"].role, by_name(found)["up"].partners) == ("low", ("down",))
    unharmed(model, found)
    if calibrator == "spectral" and recipe == "auto":
        assert "no second moments" in by_name(found)["up"].reason
