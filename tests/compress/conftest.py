"""Small networks with random weights and plausible BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dfmpc.compress.result import Compressed, QuantizedLayer
from dfmpc.job.methods import DfmpcPlan
from dfmpc.job.sources import ModelSource
from dfmpc.models.capture import capture_program, export_program
from dfmpc.models.load import LoadedModel
from torch import Tensor, nn

Loader = Callable[[nn.Module, tuple[int, ...]], LoadedModel]


def _randomise(module: nn.Module) -> None:
    generator, biases = (torch.Generator().manual_seed(seed) for seed in (7, 8))
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            count = part.num_features
            part.running_mean = torch.randn(count, generator=generator)
            part.running_var = torch.rand(count, generator=generator) + 0.5
            if part.affine:
                part.weight.data = torch.rand(count, generator=generator) + 0.5
                part.bias.data = torch.randn(count, generator=generator) * 0.3
        elif hasattr(part, "weight") and isinstance(part.weight, nn.Parameter):
            part.weight.data = torch.randn(part.weight.shape, generator=generator) * 0.2
            if part.bias is not None:
                part.bias.data = torch.randn(part.bias.shape, generator=biases) * 0.1


@pytest.fixture(scope="session")
def loaded() -> Loader:
    """Return a function that seeds a module's weights and captures it."""

    def load(module: nn.Module, shape: tuple[int, ...]) -> LoadedModel:
        _randomise(module)
        module.eval().requires_grad_(False)
        state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
        source = ModelSource(name=type(module).__name__, input=list(shape))
        exported = export_program(module, shape)
        return LoadedModel(source, module, capture_program(exported), state, shape, 0, exported)

    return load


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


@pytest.fixture
def plain(loaded: Loader) -> LoadedModel:
    """Return a network with one pair, for images of 3 x 8 x 8."""
    return loaded(Plain(), (1, 3, 8, 8))


CALIBRATORS: dict[str, object] = {
    "none": "none",
    "norm": "norm",
    "channel": {"name": "analytic", "moments": "channel"},
    "spectral": {"name": "analytic", "moments": "spectral"},
    "synthetic": {"name": "synthetic", "images": 8},
}


@pytest.fixture(params=list(CALIBRATORS))
def calibrator(request: pytest.FixtureRequest) -> str:
    """Return the name of each calibrator in turn, as ``Probe.plan`` knows it."""
    return str(request.param)


class Probe:
    """What is asked of unusual networks: a plan for them, and what has come of it."""

    @staticmethod
    def plan(calibrator: str = "synthetic", **fields: Any) -> DfmpcPlan:
        """Return a plan of DF-MPC with a calibrator of ``CALIBRATORS``."""
        known = CALIBRATORS[calibrator]
        return DfmpcPlan.model_validate({"name": "p", "method": "dfmpc", "calibrator": known, **fields})

    @staticmethod
    def by_name(found: Compressed) -> dict[str, QuantizedLayer]:
        """Return the quantized layers by their names."""
        return {item.layer.name: item for item in found.layers}

    @staticmethod
    def outputs(model: LoadedModel, changed: dict[str, Tensor]) -> Tensor:
        """Return what the network says of 16 seeded images with ``changed`` tensors."""
        images = torch.randn(16, *model.input_shape[1:], generator=torch.Generator().manual_seed(2))
        with torch.inference_mode():
            return torch.func.functional_call(model.module, {**model.state, **changed}, images)

    def unharmed(self, model: LoadedModel, found: Compressed) -> None:
        """Assert that everything is finite, and that no variance is negative."""
        for name, tensor in found.changed().items():
            assert bool(torch.isfinite(tensor).all()), name
            assert not name.endswith("running_var") or bool((tensor >= 0).all()), name
        assert bool(torch.isfinite(self.outputs(model, found.changed())).all())


@pytest.fixture(scope="session")
def probe() -> Probe:
    """Return the helpers of tests of unusual networks."""
    return Probe()
