"""Whole recipes on small networks: what must hold whatever the weights are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dfmpc.compress.compress import compress_model
from dfmpc.compress.result import Compressed, QuantizedLayer
from dfmpc.compress.rows import to_rows
from dfmpc.errors import NonFiniteError, UnsupportedModelError
from dfmpc.job.methods import DfmpcPlan, RtnPlan
from dfmpc.job.recipes import describe_plan
from dfmpc.job.schema import LayerRule
from dfmpc.models.load import LoadedModel
from torch import Tensor, nn

Loader = Callable[[nn.Module, tuple[int, ...]], LoadedModel]


class Plain(nn.Module):
    """Stem, then LOW and HIGH with one activation between, then the classifier."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU, bias: bool = False) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=bias), nn.BatchNorm2d(8)
        self.low, self.bn1 = nn.Conv2d(8, 12, 3, padding=1, bias=bias), nn.BatchNorm2d(12)
        self.high, self.bn2 = nn.Conv2d(12, 10, 3, padding=1, bias=bias), nn.BatchNorm2d(10)
        self.act, self.fc = activation(), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.bn0(self.stem(x)))
        x = self.act(self.bn1(self.low(x)))
        return self.fc(self.act(self.bn2(self.high(x))).mean((2, 3)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn0(self.stem(x)))
        x = torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))
        return self.fc(x.mean((2, 3)))


def plan(**fields: object) -> DfmpcPlan:
    return DfmpcPlan.model_validate({"name": "p", "method": "dfmpc", "recipe": "published", **fields})


def by_name(compressed: Compressed) -> dict[str, QuantizedLayer]:
    return {item.layer.name: item for item in compressed.layers}


def weights(compressed: Compressed) -> dict[str, Tensor]:
    return {item.layer.weight: item.weight() for item in compressed.layers}


def test_roles_bits_and_reasons(loaded: Loader) -> None:
    layers = by_name(compress_model(loaded(Plain(), (1, 3, 8, 8)), plan(low=2, high=6)))
    assert [(name, item.role, item.quantized.format.bits) for name, item in layers.items()] == [
        ("stem", "unpaired", 6),
        ("low", "low", 2),
        ("high", "high", 6),
        ("fc", "unpaired", 6),
    ]
    assert layers["low"].partners == ("high",)
    assert layers["high"].partners == ("low",)
    assert "stem" in layers["stem"].reason
    assert "classifier" in layers["fc"].reason


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:8"])
def test_weights_beyond_the_ternary_ends_are_counted(loaded: Loader, granularity: str) -> None:
    model = loaded(Plain(), (1, 3, 8, 8))
    found = compress_model(model, plan(granularity=granularity, calibrator="none", compensate=False))
    layers = by_name(found)
    w, w_hat = model.state["low.weight"].flatten(1), weights(found)["low.weight"].flatten(1)
    # a weight beyond the end is one that the grid made smaller in magnitude without making it zero
    expected = ((w_hat != 0) & (w.abs() > w_hat.abs())).double().mean()
    assert layers["low"].clipped_fraction == pytest.approx(float(expected), abs=1e-12)
    assert 0.1 < layers["low"].clipped_fraction < 0.5
    assert {layers[name].clipped_fraction for name in ("stem", "high", "fc")} == {0.0}


def test_rtn_has_no_roles(loaded: Loader) -> None:
    layers = compress_model(loaded(Plain(), (1, 3, 8, 8)), RtnPlan(name="r4", method="rtn", bits=4)).layers
    assert {(item.role, item.partners, item.reason) for item in layers} == {("unpaired", (), "")}


def test_folding_equals_scaling_the_next_layer(loaded: Loader) -> None:
    """relu(c z) = c relu(z): with c in the norm or in the HIGH layer's inputs the outputs agree."""
    model = loaded(Plain(), (1, 3, 8, 8))
    folded = compress_model(model, plan(calibrator="none"))
    solution = by_name(folded)["low"]
    assert solution.folded is True
    c = folded.tensors["bn1.weight"].double() / model.state["bn1.weight"].double()
    torch.testing.assert_close(folded.tensors["bn1.bias"].double(), c * model.state["bn1.bias"].double())
    image = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    state = {**model.state, **folded.changed()}
    scaled = {**model.state, **weights(folded)}
    scaled["high.weight"] = scaled["high.weight"] * c.float().view(1, -1, 1, 1)
    outputs = [torch.func.functional_call(model.module, tensors, image) for tensors in (state, scaled)]
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-5, rtol=1e-5)


def test_relu6_keeps_c_as_an_input_scale(loaded: Loader) -> None:
    layers = by_name(compress_model(loaded(Plain(nn.ReLU6), (1, 3, 8, 8)), plan(calibrator="none")))
    scale, c = layers["high"].input_scale, layers["low"].coefficients
    assert scale is not None
    assert c is not None
    assert layers["low"].folded is False
    assert "clip point" in layers["low"].reason
    assert (scale.min().item(), scale.max().item()) == pytest.approx((c.minimum, c.maximum), rel=1e-6)


def test_published_c_by_the_equation(loaded: Loader) -> None:
    model = loaded(Plain(nn.ReLU6, bias=True), (1, 3, 8, 8))
    found = compress_model(model, plan(calibrator="none", lambda1=0.5, lambda2=0.1))
    state = {name: tensor.double() for name, tensor in model.state.items() if tensor.is_floating_point()}
    w, w_hat = state["low.weight"].flatten(1), weights(found)["low.weight"].double().flatten(1)
    sigma = (state["bn1.running_var"] + 1e-5).sqrt()
    x, x_hat = ((state["bn1.weight"] / sigma)[:, None] * part for part in (w, w_hat))
    y = state["bn1.bias"] + state["bn1.weight"] * (state["low.bias"] - state["bn1.running_mean"]) / sigma
    expected = ((x * x_hat).sum(1) + 0.5 * y * y) / (x_hat.square().sum(1) + 0.5 * y * y + 0.1)
    scale = by_name(found)["high"].input_scale
    assert scale is not None
    torch.testing.assert_close(scale.double(), expected, atol=1e-6, rtol=1e-6)


def test_norm_calibrator_scales_the_low_layers_statistics_by_the_row_norms(loaded: Loader) -> None:
    model = loaded(Plain(), (1, 3, 8, 8))
    found = compress_model(model, plan(calibrator="norm", compensate=False))
    ratio = weights(found)["low.weight"].flatten(1).norm(dim=1) / model.state["low.weight"].flatten(1).norm(dim=1)
    torch.testing.assert_close(found.tensors["bn1.running_mean"], model.state["bn1.running_mean"] * ratio)
    variance = (model.state["bn1.running_var"] + 1e-5) * ratio.square() - 1e-5
    torch.testing.assert_close(found.tensors["bn1.running_var"], variance, atol=1e-6, rtol=1e-5)
    assert set(found.tensors) == {"bn1.running_mean", "bn1.running_var"}


def test_analytic_without_prior_by_the_formula(loaded: Loader) -> None:
    """μ̂ = μ + Σ ΔW m and var · q(Ŵ)/q(W) behind LOW, whose input is ReLU of N(β, γ²)."""
    model = loaded(Plain(), (1, 3, 8, 8))
    calibrator = {"name": "analytic", "rho": 0.4, "tau": None}
    found = compress_model(model, plan(calibrator=calibrator, compensate=False))
    state = {name: tensor.double() for name, tensor in model.state.items() if tensor.is_floating_point()}
    normal = torch.distributions.Normal(0.0, 1.0)
    m, s = state["bn0.bias"], state["bn0.weight"]
    cdf, pdf = normal.cdf(m / s), normal.log_prob(m / s).exp()
    mean = m * cdf + s * pdf
    variance = (m * m + s * s) * cdf + m * s * pdf - mean * mean
    w, w_hat = state["low.weight"].flatten(2), weights(found)["low.weight"].double().flatten(2)
    shifted = state["bn1.running_mean"] + ((w_hat - w).sum(2) * mean).sum(1)
    torch.testing.assert_close(found.tensors["bn1.running_mean"].double(), shifted, atol=1e-6, rtol=1e-6)

    def q(weight: Tensor) -> Tensor:
        return ((0.4 * weight.sum(2).square() + 0.6 * weight.square().sum(2)) * variance).sum(1)

    expected = state["bn1.running_var"] * q(w_hat) / q(w)
    torch.testing.assert_close(found.tensors["bn1.running_var"].double(), expected, atol=1e-6, rtol=1e-6)


def test_layers_that_are_kept_change_no_statistics(loaded: Loader) -> None:
    """Ŵ = W everywhere behind the stem's norm: nothing is re-estimated there, no c is solved."""
    model = loaded(Plain(), (1, 3, 8, 8))
    found = compress_model(model, plan(), [LayerRule(match="*", keep=True)])
    assert found.layers == ()
    assert found.tensors == {}
    assert set(found.kept) == {"stem", "low", "high", "fc"}


def test_scaling_a_ternary_layer_changes_no_coefficient_behind_its_norm(loaded: Loader) -> None:
    """W_low, μ and σ times 4 (a power of two, exact): the network is the same, and so are c and the codes."""
    small, large = loaded(Plain(nn.ReLU6), (1, 3, 8, 8)), loaded(Plain(nn.ReLU6), (1, 3, 8, 8))
    for name, factor in (("low.weight", 4), ("bn1.running_mean", 4), ("bn1.running_var", 16)):
        large.state[name] = large.state[name] * factor
    first, second = (by_name(compress_model(model, plan(lambda1=0))) for model in (small, large))
    assert torch.equal(first["low"].quantized.codes, second["low"].quantized.codes)
    assert first["high"].input_scale is not None
    assert second["high"].input_scale is not None
    # Only eps, which does not scale, tells them apart.
    torch.testing.assert_close(first["high"].input_scale, second["high"].input_scale, atol=1e-4, rtol=1e-4)


def test_residual_block_has_conv1_low_and_keeps_everything_finite(loaded: Loader) -> None:
    found = compress_model(loaded(Residual(), (1, 3, 8, 8)), plan())
    assert [item.layer.name for item in found.layers if item.role == "low"] == ["conv1"]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.tensors.values())
    assert set(found.tensors) >= {"bn0.running_var", "bn1.running_var", "bn2.running_var"}


def test_an_all_zero_channel_is_dead_not_nan(loaded: Loader) -> None:
    model = loaded(Plain(), (1, 3, 8, 8))
    model.state["low.weight"] = model.state["low.weight"].clone()
    model.state["low.weight"][5] = 0
    found = compress_model(model, plan(lambda1=0))
    assert by_name(found)["low"].coefficients is not None
    assert by_name(found)["low"].coefficients.dead == 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.tensors.values())
    assert not weights(found)["low.weight"][5].any()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_rtn_error_is_within_half_a_step(loaded: Loader, bits: int, symmetric: bool) -> None:
    model = loaded(Plain(), (1, 3, 8, 8))
    found = compress_model(model, RtnPlan(name="r", method="rtn", bits=bits, symmetric=symmetric))
    assert found.tensors == {}
    for item in found.layers:
        original = to_rows(model.state[item.layer.weight], item.layer)
        error = (to_rows(weights(found)[item.layer.weight], item.layer) - original).abs()
        assert bool((error <= item.quantized.scale * 0.5001).all())


def test_rules_override_bits_and_granularity_first_match_wins(loaded: Loader) -> None:
    rules = [LayerRule(match="st*", bits=8), LayerRule(match="*", granularity="tensor")]
    layers = by_name(compress_model(loaded(Plain(), (1, 3, 8, 8)), plan(low=3, high=6), rules))
    assert (layers["stem"].quantized.format.bits, layers["stem"].granularity) == (8, "channel")
    assert (layers["low"].quantized.format.bits, layers["low"].granularity) == (3, "tensor")
    assert tuple(layers["low"].quantized.scale.shape) == (1, 1)


def test_a_network_without_batchnorm_is_refused_by_dfmpc_and_served_by_rtn(loaded: Loader) -> None:
    model = loaded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)), (1, 3, 8, 8))
    with pytest.raises(UnsupportedModelError, match=r"no BatchNorm.*method: rtn"):
        compress_model(model, plan())
    assert len(compress_model(model, RtnPlan(name="r", method="rtn", bits=4)).layers) == 2


@pytest.mark.parametrize("name", ["low.weight", "bn1.running_var"])
def test_not_a_number_is_named(loaded: Loader, name: str) -> None:
    model = loaded(Plain(), (1, 3, 8, 8))
    model.state[name] = model.state[name].clone()
    model.state[name].view(-1)[3] = float("nan")
    with pytest.raises(NonFiniteError, match=name):
        compress_model(model, plan())


@pytest.mark.parametrize("tau", [None, 1.0], ids=["propagated", "factorised"])
def test_same_bytes_with_one_and_two_threads(loaded: Loader, tau: float | None) -> None:
    model = loaded(Residual(), (1, 3, 8, 8))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = compress_model(model, plan(calibrator={"name": "analytic", "tau": tau}))
        torch.set_num_threads(2)
        second = compress_model(model, plan(calibrator={"name": "analytic", "tau": tau}))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    for one, two in zip(first.layers, second.layers, strict=True):
        assert torch.equal(one.quantized.codes, two.quantized.codes)


def test_plans_are_described_with_their_tier() -> None:
    assert describe_plan(plan(recipe="auto")).tier == "synthetic"
    assert describe_plan(plan(recipe="auto", calibrator="analytic")).tier == "closed-form"
    assert describe_plan(plan()).tier == "closed-form"
    assert describe_plan(plan(calibrator="none")).tier == "none"
    assert describe_plan(RtnPlan(name="r", method="rtn", bits=4)).method == "rtn"
