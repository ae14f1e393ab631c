"""Small networks with random weights and plausible BatchNorm statistics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dfmpc.job.expand import ModelSource
from dfmpc.models.capture import capture_program, export_program
from dfmpc.models.load import LoadedModel
from torch import nn

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
