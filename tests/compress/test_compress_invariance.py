"""What must not change a result, for every calibrator under every recipe."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dfmpc.compress.compress import compress_model
from dfmpc.compress.make_calibrator import make_calibrator
from dfmpc.compress.result import Compressed, QuantizedLayer
from dfmpc.compress.walk import Lambdas, Walk, WalkResult
from dfmpc.compress.work import kept_figures
from dfmpc.job.methods import DfmpcPlan
from dfmpc.job.recipes import steps_of
from dfmpc.job.schema import LayerRule
from dfmpc.models.load import LoadedModel
from dfmpc.models.pairs import find_pairs
from torch import Tensor, nn

Loader = Callable[[nn.Module, tuple[int, ...]], LoadedModel]
SHAPE = (1, 3, 8, 8)
CALIBRATORS: dict[str, object] = {
    "none": "none",
    "norm": "norm",
    "channel": {"name": "analytic", "moments": "channel"},
    "spectral": {"name": "analytic", "moments": "spectral"},
    "synthetic": {"name": "synthetic", "images": 16},
}
each_calibrator = pytest.mark.parametrize("calibrator", list(CALIBRATORS))
each_recipe = pytest.mark.parametrize("recipe", ["published", "auto"])


class Residual(nn.Module):
    """A pair in a residual block, and a stem and a classifier in no pair; no eps to speak of."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, eps=1e-12)
        self.low, self.bn1 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12, eps=1e-12)
        self.high, self.bn2 = nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8, eps=1e-12)
        self.act, self.fc = activation(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn0(self.stem(x)))
        x = self.act(x + self.bn2(self.high(self.act(self.bn1(self.low(x))))))
        return self.fc(x.mean((2, 3)))


class Separable(nn.Module):
    """An inverted residual with ReLU6, a norm that is not affine, and a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.expand, self.bn1 = nn.Conv2d(6, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depthwise, self.bn2 = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False), nn.BatchNorm2d(12)
        self.project, self.bn3 = nn.Conv2d(12, 6, 1, bias=False), nn.BatchNorm2d(6, affine=False)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.bn0(self.stem(x)))
        y = nn.functional.relu6(self.bn2(self.depthwise(nn.functional.relu6(self.bn1(self.expand(x))))))
        return self.fc(torch.cat([x, self.bn3(self.project(y))], 1).mean((2, 3)))


class Folded(nn.Module):
    """No norm anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.low = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.high, self.fc = nn.Conv2d(12, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.relu(self.high(torch.relu(self.low(torch.relu(self.stem(x)))))).mean((2, 3)))


NETWORKS: list[type[nn.Module]] = [Residual, Separable, Folded]


def plan(recipe: str, calibrator: str, **fields: object) -> DfmpcPlan:
    written = {"name": "p", "method": "dfmpc", "recipe": recipe, "calibrator": CALIBRATORS[calibrator], **fields}
    return DfmpcPlan.model_validate(written)


def by_name(found: Compressed) -> dict[str, QuantizedLayer]:
    return {item.layer.name: item for item in found.layers}


def outputs(model: LoadedModel, changed: dict[str, Tensor]) -> Tensor:
    images = torch.randn(16, *SHAPE[1:], generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        return torch.func.functional_call(model.module, {**model.state, **changed}, images)


def walk_as_it_is(model: LoadedModel, calibrator: str) -> WalkResult:
    """Walk with Ŵ = W everywhere, and solve every pair for c."""

    def tensor(name: str) -> Tensor:
        return model.state[name].double()

    chosen = make_calibrator(model, steps_of(plan("auto", calibrator)).calibrator)
    pairs = find_pairs(model.graph).pairs
    lambdas = Lambdas(0.5, 0.0)
    figures = {layer.name: kept_figures(model, layer, "cpu") for layer in model.graph.layers}
    return Walk(model.graph, pairs, lambda layer, _: figures[layer.name], tensor, chosen, lambdas, True).run()


@pytest.mark.parametrize("network", NETWORKS)
@each_calibrator
@each_recipe
def test_layers_that_are_kept_change_no_tensor(
    loaded: Loader, recipe: str, calibrator: str, network: type[nn.Module]
) -> None:
    found = compress_model(loaded(network(), SHAPE), plan(recipe, calibrator), [LayerRule(match="*", keep=True)])
    assert (found.layers, found.tensors) == ((), {})


@pytest.mark.parametrize("network", [Residual, Separable])
@each_calibrator
def test_the_same_weights_give_c_of_one_and_the_old_tensors(
    loaded: Loader, calibrator: str, network: type[nn.Module]
) -> None:
    model = loaded(network(), SHAPE)
    result = walk_as_it_is(model, calibrator)
    coefficients = torch.cat([solution.c for solutions in result.solutions.values() for solution in solutions])
    assert len(coefficients) >= 12
    assert torch.equal(coefficients, torch.ones_like(coefficients))
    for name, tensor in result.tensors.items():
        assert torch.equal(tensor, model.state[name].double()), name


@each_calibrator
@each_recipe
def test_scaling_low_rows_and_their_norm_changes_nothing_that_matters(
    loaded: Loader, recipe: str, calibrator: str
) -> None:
    """Rows, bias, μ and σ of some channels times 4 (exact): the same network, codes and outputs; μ̂ and σ̂ follow."""
    model, scaled = loaded(Residual(), SHAPE), loaded(Residual(), SHAPE)
    factor = torch.ones(12)
    factor[2:7] = 4
    shape = {"low.weight": (12, 1, 1, 1)}
    for name, power in (("low.weight", 1), ("low.bias", 1), ("bn1.running_mean", 1), ("bn1.running_var", 2)):
        scaled.state[name] = scaled.state[name] * factor.pow(power).view(shape.get(name, (12,)))
    scaled.module.load_state_dict(scaled.state)
    torch.testing.assert_close(outputs(model, {}), outputs(scaled, {}), rtol=1e-5, atol=1e-6)
    first, second = (compress_model(one, plan(recipe, calibrator)) for one in (model, scaled))
    for name in ("low", "high"):
        assert torch.equal(by_name(first)[name].quantized.codes, by_name(second)[name].quantized.codes)
    torch.testing.assert_close(
        by_name(second)["low"].quantized.scale, by_name(first)["low"].quantized.scale * factor[:, None]
    )
    torch.testing.assert_close(outputs(model, first.changed()), outputs(scaled, second.changed()), rtol=1e-4, atol=1e-4)


@each_calibrator
@pytest.mark.parametrize("compensate", ["c", "none"])
def test_folding_equals_scaling_the_next_layer(loaded: Loader, calibrator: str, compensate: str) -> None:
    """relu(c z) = c relu(z): with c in γ and β, or in the next layer's inputs, the outputs agree."""
    model = loaded(Residual(), SHAPE)
    # one scale for the layer: with one a row, α is the mean of the |w| it stands for, so ⟨Ŵ, W⟩ = ‖Ŵ‖² and c = 1
    found = compress_model(model, plan("auto", calibrator, compensate=compensate, granularity="tensor"))
    changed = found.changed()
    gamma = changed.get("bn1.weight", model.state["bn1.weight"])
    c = gamma / model.state["bn1.weight"]
    assert bool((c != 1).any()) == (compensate == "c")
    moved = {**changed, "bn1.weight": model.state["bn1.weight"], "bn1.bias": model.state["bn1.bias"]}
    moved["high.weight"] = changed["high.weight"] * c.view(1, -1, 1, 1)
    torch.testing.assert_close(outputs(model, changed), outputs(model, moved), rtol=1e-4, atol=1e-5)


@each_calibrator
@pytest.mark.parametrize("network", [Residual, Separable])
def test_c_is_never_negative_and_its_tensors_follow(loaded: Loader, calibrator: str, network: type[nn.Module]) -> None:
    """With λ1 = 1000 the offsets decide, and the calibrators may turn their sign."""
    model = loaded(network(), SHAPE)
    for norm in ("bn1", "bn2"):
        model.state[f"{norm}.bias"] = model.state[f"{norm}.bias"] * 0.05
        model.state[f"{norm}.running_mean"] = model.state[f"{norm}.running_mean"] * 0.05
    found = compress_model(model, plan("published", calibrator, lambda1=1000))
    lows = [item for item in found.layers if item.role == "low"]
    assert lows
    for item in lows:
        assert item.coefficients is not None
        assert 0 <= item.coefficients.minimum <= item.coefficients.mean <= item.coefficients.maximum
    for item in found.layers:
        assert item.input_scale is None or float(item.input_scale.min()) >= 0


ORDER = torch.randperm(12, generator=torch.Generator().manual_seed(9))


def permuted(model: LoadedModel, order: Tensor) -> LoadedModel:
    """Put the channels between LOW and HIGH into another order."""
    for name in list(model.state):
        if name.startswith(("low.", "bn1.")) and model.state[name].ndim:
            model.state[name] = model.state[name][order].clone()
    model.state["high.weight"] = model.state["high.weight"][:, order].clone()
    model.module.load_state_dict(model.state)
    return model


@each_calibrator
def test_permuting_hidden_channels_permutes_the_published_result(loaded: Loader, calibrator: str) -> None:
    first = compress_model(loaded(Residual(), SHAPE), plan("published", calibrator))
    second = compress_model(permuted(loaded(Residual(), SHAPE), ORDER), plan("published", calibrator))
    one, two = by_name(first), by_name(second)
    assert torch.equal(two["low"].quantized.codes, one["low"].quantized.codes[ORDER])
    assert torch.equal(two["low"].quantized.scale, one["low"].quantized.scale[ORDER])
    assert torch.equal(two["high"].weight(), one["high"].weight()[:, ORDER])
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        expected = tensor[ORDER] if name.startswith("bn1.") else tensor
        torch.testing.assert_close(second.tensors[name], expected, rtol=1e-4, atol=1e-4)


@each_calibrator
def test_permuting_hidden_channels_keeps_what_the_auto_network_says(loaded: Loader, calibrator: str) -> None:
    """Where matrices are factorised in float32 a tie may fall otherwise, so outputs are compared, and most codes."""
    plain, moved = loaded(Residual(), SHAPE), permuted(loaded(Residual(), SHAPE), ORDER)
    first, second = (compress_model(model, plan("auto", calibrator)) for model in (plain, moved))
    low, other = (by_name(found)["low"].weight().sign() for found in (first, second))
    assert float((other == low[ORDER]).float().mean()) > 0.98
    expected, found = outputs(plain, first.changed()), outputs(moved, second.changed())
    error = float((found - expected).square().mean() / expected.var())
    loss = float((expected - outputs(plain, {})).square().mean() / expected.var())
    assert error < 0.05 * loss + 1e-9
