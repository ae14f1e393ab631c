"""Networks without BatchNorm: the shift goes into the biases, where there are any."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dfmpc.compress.compress import compress_model
from dfmpc.models.load import LoadedModel
from torch import Tensor, nn

Loader = Callable[[nn.Module, tuple[int, ...]], LoadedModel]
SHAPE = (1, 3, 8, 8)


class Folded(nn.Module):
    """Stem, LOW, HIGH and classifier, their norms folded away."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.low = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.high, self.fc = nn.Conv2d(12, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.high(torch.relu(self.low(torch.relu(self.stem(x)))))).mean((2, 3)))


def test_a_folded_network_takes_the_shift_into_its_biases(probe: Any, loaded: Loader, calibrator: str) -> None:
    model = loaded(Folded(), SHAPE)
    found = compress_model(model, probe.plan(calibrator))
    assert {name: item.role for name, item in probe.by_name(found).items()} == {
        "stem": "unpaired",
        "low": "low",
        "high": "high",
        "fc": "unpaired",
    }
    known = calibrator not in {"none", "norm"}
    assert set(found.tensors) <= {"stem.bias", "low.bias", "high.bias", "fc.bias"}
    assert (set(found.tensors) >= {"low.bias", "high.bias", "fc.bias"}) == known
    probe.unharmed(model, found)


def test_the_shift_in_the_biases_makes_a_folded_network_better(probe: Any, loaded: Loader) -> None:
    model = loaded(Folded(), SHAPE)
    found = compress_model(model, probe.plan("synthetic"))
    weights = {item.layer.weight: item.weight() for item in found.layers}
    original = probe.outputs(model, {})
    with_biases, without = (
        float((probe.outputs(model, changed) - original).square().mean()) for changed in (found.changed(), weights)
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


def test_without_norms_and_biases_nothing_is_shifted(probe: Any, loaded: Loader, calibrator: str) -> None:
    model = loaded(Bare(), SHAPE)
    found = compress_model(model, probe.plan(calibrator))
    assert found.tensors == {}
    probe.unharmed(model, found)


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


@pytest.mark.parametrize("recipe", ["published", "auto"])
def test_a_network_with_layer_norms_is_paired_and_stays_finite(
    probe: Any, loaded: Loader, recipe: str, calibrator: str
) -> None:
    model = loaded(Tokens(), SHAPE)
    found = compress_model(model, probe.plan(calibrator, recipe=recipe))
    assert (probe.by_name(found)["up"].role, probe.by_name(found)["up"].partners) == ("low", ("down",))
    probe.unharmed(model, found)
    if calibrator == "spectral" and recipe == "auto":
        assert "no second moments" in probe.by_name(found)["up"].reason
