"""DFQ: equalisation, absorption and bias correction, by hand and on small networks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from dfmpc.compress.assign import assign
from dfmpc.compress.neighbours.correct import input_means
from dfmpc.compress.neighbours.dfq import balanced
from dfmpc.compress.neighbours.equalise import Balance
from dfmpc.compress.neighbours.links import find_links
from dfmpc.compress.neighbours.overlay import Overlay, own_norms
from dfmpc.compress.neighbours.run import compress_neighbour
from dfmpc.compress.result import Compressed
from dfmpc.job.neighbours import DfqPlan
from dfmpc.job.schema import LayerRule
from dfmpc.models.graph import Pairing
from dfmpc.models.load import LoadedModel
from torch import Tensor, nn

Loader = Callable[[nn.Module, tuple[int, ...]], LoadedModel]


class TwoLayers(nn.Module):
    """Two pointwise layers of two channels, which is what one computes by hand."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU, kernel: int = 1, bias: bool = False) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(2, 2, 1, bias=bias), nn.BatchNorm2d(2)
        self.second = nn.Conv2d(2, 2, kernel, padding=kernel // 2, bias=bias)
        self.norm2, self.act = nn.BatchNorm2d(2), activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm2(self.second(self.act(self.norm1(self.first(x)))))


class Inverted(nn.Module):
    """An inverted residual between a stem and a flattened classifier: every kind of link but those through ReLU6."""

    def __init__(self, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.expand, self.bn1 = nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)
        self.depth, self.bn2 = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.project, self.bn3 = nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.head, self.bn4 = nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)
        self.act, self.pool, self.fc, self.out = activation(), nn.AvgPool2d(4), nn.Linear(24, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn0(self.stem(x))
        x = x + self.bn3(self.project(self.act(self.bn2(self.depth(self.act(self.bn1(self.expand(x))))))))
        x = self.pool(self.act(self.bn4(self.head(x))))
        return self.out(torch.relu(self.fc(x.flatten(1))))


@pytest.fixture(scope="module")
def inverted(loaded: Loader) -> Callable[..., LoadedModel]:
    """Return a function that gives the network with tensors that a test may replace; it is captured once."""
    captured: dict[type[nn.Module], LoadedModel] = {}

    def fresh(activation: type[nn.Module] = nn.ReLU) -> LoadedModel:
        if activation not in captured:
            captured[activation] = loaded(Inverted(activation), (1, 3, 8, 8))
        return replace(captured[activation], state=dict(captured[activation].state))

    return fresh


def plan(bits: int = 8, **fields: object) -> DfqPlan:
    return DfqPlan.model_validate({"name": "p", "method": "dfq", "bits": bits, **fields})


def set_norm(model: LoadedModel, name: str, **tensors: list[float]) -> None:
    for part, numbers in tensors.items():
        model.state[f"{name}.{part}"] = torch.tensor(numbers, dtype=torch.float32)


def output(model: LoadedModel, tensors: dict[str, Tensor], shape: tuple[int, ...] = (3, 3, 8, 8)) -> Tensor:
    image = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return torch.func.functional_call(model.module, {**model.state, **tensors}, image)


def balance(model: LoadedModel) -> tuple[Balance, Overlay]:
    tensors, norms = Overlay(model.state), own_norms(model.graph)
    found = Balance(model.graph.layers, norms, tensors)
    found.settle(find_links(model.graph, norms, ()).found)
    return found, tensors


def test_equalisation_by_hand(loaded: Loader) -> None:
    # Folded rows: γ/σ·max|W| = 2·4 and 1·2; columns 2 and 8. s = √(8·2)/2 = 2 and √(2·8)/8 = 1/2; both become 4 and 4.
    model = loaded(TwoLayers(), (1, 2, 4, 4))
    model.state["first.weight"] = torch.tensor([[4.0, -1], [-2, 0.5]]).view(2, 2, 1, 1)
    model.state["second.weight"] = torch.tensor([[2.0, 1], [0.5, -8]]).view(2, 2, 1, 1)
    set_norm(model, "norm1", weight=[4, -1], running_var=[4 - 1e-5, 1 - 1e-5])
    set_norm(model, "norm2", weight=[1, 1], running_var=[1 - 1e-5, 1 - 1e-5])
    found, _ = balance(model)
    assert found.scales["first"].tolist() == pytest.approx([2, 0.5], rel=1e-6)
    assert found.columns["second"].tolist() == pytest.approx([2, 0.5], rel=1e-6)
    tensors = compress_neighbour(model, plan(absorb=False, correct=False)).tensors
    assert tensors["norm1.weight"].tolist() == pytest.approx([2, -2], rel=1e-6)  # γ/s
    # row factor |γ|/(s σ) = 4/(2·2) = 1 and 1/(.5·1) = 2: running variance 1²·4 and 2²·1, less eps
    assert tensors["norm1.running_var"].tolist() == pytest.approx([4, 4], rel=1e-5)


def test_absorption_by_hand(loaded: Loader) -> None:
    # β = 5 and 1, γ = 1 and -1: c = max(0, β - 3|γ|) = 2 and 0. The second layer's output falls by W c = 6 and -2.
    model = loaded(TwoLayers(), (1, 2, 4, 4))
    model.state["second.weight"] = torch.tensor([[3.0, 1], [-1, 2]]).view(2, 2, 1, 1)
    set_norm(model, "norm1", weight=[1, -1], bias=[5, 1])
    set_norm(model, "norm2", running_mean=[10, 20])
    tensors = compress_neighbour(model, plan(equalise=False, correct=False)).tensors
    assert tensors["norm1.bias"].tolist() == [3, 1]
    assert tensors["norm2.running_mean"].tolist() == [4, 22]
    assert set(tensors) == {"norm1.bias", "norm2.running_mean"}


@pytest.mark.parametrize(
    ("network", "why"),
    [(TwoLayers(kernel=3), "zero padding is not shifted"), (TwoLayers(nn.Identity), "nothing clips")],
    ids=["padded", "linear"],
)
def test_nothing_is_absorbed_where_it_would_change_the_network(loaded: Loader, network: nn.Module, why: str) -> None:
    model = loaded(network, (1, 2, 4, 4))
    set_norm(model, "norm1", weight=[1, 1], bias=[9, 9])
    assert compress_neighbour(model, plan(equalise=False, correct=False)).tensors == {}, why


def test_bias_correction_by_hand(loaded: Loader) -> None:
    # Behind norm1 x is N(3, 0): E[x] = 3 for both inputs. Symmetric 2 bits: levels -1, 0, 1 times the row's largest.
    # Row 1 -.6 rounds to 1 -1: error -.4; row 1 .3 to 1 0: error -.3; so running means move by 3·-.4 and 3·-.3.
    model = loaded(TwoLayers(), (1, 2, 4, 4))
    model.state["second.weight"] = torch.tensor([[1.0, -0.6], [1, 0.3]]).view(2, 2, 1, 1)
    set_norm(model, "norm1", weight=[0, 0], bias=[3, 3])
    set_norm(model, "norm2", running_mean=[0.5, 0.5], running_var=[1 - 1e-5, 4 - 1e-5])
    found = compress_neighbour(model, plan(2, symmetric=True, equalise=False, absorb=False))
    assert found.tensors["norm2.running_mean"].tolist() == pytest.approx([0.5 - 1.2, 0.5 - 0.9], abs=1e-6)
    assert set(found.tensors) == {"norm2.running_mean"}  # nothing is known of the image but its mean, 0
    shift = next(layer.norm_shift for layer in found.layers if layer.layer.name == "second")
    assert shift == pytest.approx(math.sqrt((1.2**2 + 0.45**2) / 2), abs=1e-6)


def test_a_layer_without_a_norm_is_corrected_in_its_bias(inverted: Callable[..., LoadedModel]) -> None:
    model = inverted()
    found = compress_neighbour(model, plan(2, symmetric=True, equalise=False, absorb=False))
    changed = {name: found.tensors[name] - model.state[name] for name in found.tensors}
    assert set(changed) == {
        *(f"bn{i}.running_mean" for i in (1, 2, 3, 4)),
        "fc.bias",  # behind the pool; out reads fc through no norm, so nothing is known of its input
    }
    weight = next(layer.weight() for layer in found.layers if layer.layer.name == "fc")
    mean = torch.nn.functional.relu(  # E[relu(x)] of N(β, γ²) by 200,000 quantiles
        model.state["bn4.bias"][:, None].double()
        + model.state["bn4.weight"][:, None].double()
        * torch.special.ndtri((torch.arange(200000, dtype=torch.float64) + 0.5) / 200000)
    ).mean(1)
    expected = -((weight - model.state["fc.weight"]).double() @ mean.repeat_interleave(4))
    torch.testing.assert_close(changed["fc.bias"].double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:8"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.SiLU], ids=lambda a: a.__name__)
def test_the_equalised_float_network_is_the_same_function(
    inverted: Callable[..., LoadedModel], activation: type[nn.Module], granularity: str
) -> None:
    model = inverted(activation)
    set_norm(model, "bn2", weight=[0.0, 1e-7, -2, 50] * 4, running_var=[1e-9, 1e3, 1e-4, 1] * 4)
    before = output(model, {})
    tensors = equalised(model, granularity)
    assert float((tensors["depth.weight"] - model.state["depth.weight"]).abs().max()) > 1e-3
    torch.testing.assert_close(output(model, tensors), before, atol=2e-4, rtol=2e-4)


def equalised(model: LoadedModel, granularity: str = "channel") -> dict[str, Tensor]:
    """Return the tensors of the float network that is rounded next."""
    chosen, tensors = plan(absorb=False, granularity=granularity), Overlay(model.state)
    balanced(model, chosen, assign(model.graph.layers, chosen, (), Pairing(())), tensors)
    return {name: value.float() for name, value in tensors.changed.items()}


def test_absorption_keeps_the_function_up_to_rare_inputs(loaded: Loader) -> None:
    model = loaded(TwoLayers(), (1, 2, 4, 4))
    set_norm(model, "norm1", weight=[0.1, 0.1], bias=[5, 4], running_mean=[0, 0], running_var=[4, 4])
    tensors = compress_neighbour(model, plan(equalise=False, correct=False)).tensors
    assert set(tensors) == {"norm1.bias", "norm2.running_mean"}
    torch.testing.assert_close(
        output(model, tensors, (2, 2, 4, 4)), output(model, {}, (2, 2, 4, 4)), atol=1e-4, rtol=1e-4
    )


def test_ranges_of_linked_channels_are_level_in_the_end(inverted: Callable[..., LoadedModel]) -> None:
    model = inverted()
    found, _ = balance(model)
    for first, second, repeat in [("expand", "depth", 1), ("depth", "project", 1), ("head", "fc", 4), ("fc", "out", 1)]:
        rows = found._grouped(first, columns=found.columns[first]).amax(2).flatten() * found.rows[first]
        columns = found._grouped(second, rows=found.rows[second]).amax(1).flatten() * found.columns[second]
        torch.testing.assert_close(rows, columns.view(-1, repeat).amax(1), rtol=3e-3, atol=0)


def test_what_cannot_be_equalised_says_why(inverted: Callable[..., LoadedModel]) -> None:
    model = inverted(nn.ReLU6)
    reasons = {item.layer.name: item.reason for item in compress_neighbour(model, plan()).layers}
    assert reasons["fc"] == ""
    assert "relu6: the clip point would move" in reasons["expand"]
    assert "relu6" in reasons["depth"]
    assert "2 operations read it" in reasons["stem"]
    assert "read by add" in reasons["project"]
    assert "read by output" in reasons["out"]


def test_kept_layers_and_their_norms_stay_as_they_are(inverted: Callable[..., LoadedModel]) -> None:
    model = inverted()
    found = compress_neighbour(model, plan(), [LayerRule(match="depth", keep=True)])
    assert found.kept == {"depth": "kept by a layer rule"}
    touched = set(found.tensors)
    assert not touched & {"depth.weight", *(f"bn2.{part}" for part in ("weight", "bias", "running_var"))}
    assert not touched & {"bn2.running_mean"}
    assert "is kept" in next(item.reason for item in found.layers if item.layer.name == "expand")
    close_to_float(model, found)


def close_to_float(model: LoadedModel, found: Compressed) -> None:
    before, after = output(model, {}), output(model, found.changed())
    assert float((after - before).norm() / before.norm()) < 0.05


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group:8"])
def test_eight_bits_stay_close_to_the_float_network(inverted: Callable[..., LoadedModel], granularity: str) -> None:
    model = inverted()
    close_to_float(model, compress_neighbour(model, plan(granularity=granularity)))


def test_equalisation_helps_one_scale_a_tensor(inverted: Callable[..., LoadedModel]) -> None:
    """Rows of very different size, which one scale cannot serve: the paper's figure 2 in small."""
    model = inverted()
    model.state["depth.weight"] = model.state["depth.weight"] * torch.logspace(-2, 1, 16).view(16, 1, 1, 1)
    model.state["project.weight"] = model.state["project.weight"] / torch.logspace(-2, 1, 16).view(1, 16, 1, 1)
    scale = torch.logspace(-2, 1, 16)
    for part, power in (("weight", 1), ("bias", 1), ("running_mean", 1), ("running_var", 2)):
        model.state[f"bn2.{part}"] = model.state[f"bn2.{part}"] * scale**power
    before = output(model, {})
    errors = [
        float(
            (output(model, compress_neighbour(model, plan(granularity="tensor", equalise=e)).changed()) - before).norm()
        )
        for e in (True, False)
    ]
    assert errors[0] < 0.5 * errors[1]


def test_expected_inputs_are_known_behind_a_norm_only(inverted: Callable[..., LoadedModel]) -> None:
    model = inverted()
    means = input_means(model.graph, Overlay(model.state))
    assert set(means) == {"expand", "depth", "project", "head", "fc"}
    torch.testing.assert_close(means["expand"], model.state["bn0.bias"].double())
    torch.testing.assert_close(means["head"], (model.state["bn0.bias"] + model.state["bn3.bias"]).double())


def test_a_network_without_batchnorm_is_equalised_but_not_corrected(loaded: Loader) -> None:
    model = loaded(nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)), (1, 3, 8, 8))
    found = compress_neighbour(model, plan())
    assert set(found.tensors) == {"0.bias"}
    close_to_float(model, found)
