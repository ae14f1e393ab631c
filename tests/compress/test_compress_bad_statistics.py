"""Statistics as bad checkpoints have them: every calibrator leaves finite tensors, or says what is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dfmpc.compress.compress import compress_model
from dfmpc.errors import NonFiniteError
from dfmpc.job.methods import DfmpcPlan
from dfmpc.job.sources import ModelSource
from dfmpc.models.capture import capture_program, export_program
from dfmpc.models.load import LoadedModel
from torch import Tensor, nn

SHAPE = (1, 3, 8, 8)


class Mixed(nn.Module):
    """A pair, a gate, smooth activations and a norm that is not affine."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.low, self.norm1 = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.high, self.norm2 = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6, affine=False)
        self.gate, self.last, self.norm3 = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.norm0(self.stem(x)))
        x = nn.functional.hardswish(self.norm2(self.high(torch.relu(self.norm1(self.low(x))))))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(nn.functional.gelu(self.norm3(self.last(x))).mean((2, 3)))


def loaded() -> LoadedModel:
    """Return the network with seeded weights and plausible statistics."""
    generator = torch.Generator().manual_seed(7)
    module = Mixed().eval().requires_grad_(False)
    state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            spread = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(spread + 0.5 if name.endswith("var") or tensor.ndim == 1 else 0.4 * (spread - 0.5))
    exported = export_program(module, SHAPE)
    return LoadedModel(
        ModelSource(name="mixed", input=list(SHAPE)), module, capture_program(exported), state, SHAPE, 0, exported
    )


def dead_gamma(state: dict[str, Tensor]) -> None:
    state["norm0.weight"][::2] = 0
    state["norm1.weight"][1:5] = 0
    state["norm1.bias"][1:3] = 0


def all_gamma_dead(state: dict[str, Tensor]) -> None:
    for norm in ("norm0", "norm1", "norm3"):
        state[f"{norm}.weight"].zero_()
        state[f"{norm}.bias"].zero_()


def zero_variance(state: dict[str, Tensor]) -> None:
    for norm in ("norm0", "norm1", "norm2", "norm3"):
        state[f"{norm}.running_var"][::2] = 0


def frozen(state: dict[str, Tensor]) -> None:
    for norm in ("norm0", "norm1", "norm2", "norm3"):
        state[f"{norm}.running_var"].fill_(1)
        state[f"{norm}.running_mean"].zero_()


def dead_rows(state: dict[str, Tensor]) -> None:
    state["low.weight"][:3] = 0
    state["norm1.running_var"][:3] = 0
    state["high.weight"].zero_()


def huge(state: dict[str, Tensor]) -> None:
    state["norm1.weight"].fill_(1e4)
    state["norm2.running_var"].fill_(1e12)


@pytest.mark.parametrize("calibrator", ["none", "norm", "analytic"])
@pytest.mark.parametrize("recipe", ["published", "auto"])
@pytest.mark.parametrize("spoil", [dead_gamma, all_gamma_dead, zero_variance, frozen, dead_rows, huge])
def test_bad_statistics_stay_finite(spoil: Callable[[dict[str, Tensor]], None], recipe: str, calibrator: str) -> None:
    model = loaded()
    spoil(model.state)
    plan = {"name": "p", "method": "dfmpc", "recipe": recipe, "calibrator": calibrator}
    found = compress_model(model, DfmpcPlan.model_validate(plan))
    assert [item.layer.name for item in found.layers if item.role == "low"] == ["low", "last"]
    for name, tensor in found.tensors.items():
        assert bool(torch.isfinite(tensor).all()), name
        assert not name.endswith("running_var") or bool((tensor >= 0).all()), name
    weights = {item.layer.weight: item.weight() for item in found.layers}
    assert all(bool(torch.isfinite(weight).all()) for weight in weights.values())
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = torch.func.functional_call(model.module, {**model.state, **weights, **found.tensors}, images)
    assert bool(torch.isfinite(logits).all())


@pytest.mark.parametrize("name", ["norm0.running_mean", "norm2.running_var"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_what_is_no_number_is_named(name: str, value: float) -> None:
    model = loaded()
    model.state[name].flatten()[0] = value
    with pytest.raises(NonFiniteError, match=rf"mixed: {name}.*NaN or Inf"):
        compress_model(model, DfmpcPlan.model_validate({"name": "p", "method": "dfmpc", "calibrator": "analytic"}))
