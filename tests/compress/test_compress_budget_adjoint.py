"""The gain of a small noise to the output: worked out by hand, and against Monte Carlo through small networks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from dfmpc.compress.budget import adjoint
from dfmpc.compress.budget.adjoint import activation_slopes, pool_gain, through_layer
from dfmpc.compress.budget.sensitivity import forward_states, layer_uses
from dfmpc.compress.gaussian import Moments
from dfmpc.models.graph import Layer, Node, Op
from dfmpc.models.load import LoadedModel
from torch import Tensor, nn

Loader = Callable[[nn.Module, tuple[int, ...]], LoadedModel]
SLOPE = 0.1


def layer(out_channels: int, in_channels: int, *, taps: int = 1, groups: int = 1) -> Layer:
    shape = (out_channels, in_channels // groups, taps)
    return Layer("l", "l.weight", None, Op.CONV, shape, groups)


def gain_of(channels: int) -> Tensor:
    root = torch.randn(channels, channels, generator=torch.Generator().manual_seed(channels))
    return root @ root.T


def test_a_pointwise_layer_by_hand() -> None:
    # W = [[1, 2], [0, 3]], G = diag(1, 10): WᵀGW = [[1, 2], [2, 4 + 90]]
    found = through_layer(torch.diag(torch.tensor([1.0, 10.0])), torch.tensor([[1.0, 2.0], [0.0, 3.0]]), layer(2, 2))
    assert found.tolist() == [[1, 2], [2, 94]]


def test_taps_by_hand() -> None:
    # one channel, taps 1 and 2, G = 1, ρ = 0.4: 0.6 of 1 + 4 (positions apart) and 0.4 of (1 + 2)² (positions alike)
    found = through_layer(torch.ones(1, 1), torch.tensor([[1.0, 2.0]]), layer(1, 1, taps=2))
    assert found.item() == pytest.approx(0.6 * 5 + 0.4 * 9)


@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(6, 6, 6), (6, 12, 6), (6, 4, 2), (4, 6, 1)])
def test_a_grouped_layer_is_the_dense_one_with_zeros(inputs: int, outputs: int, groups: int) -> None:
    one = layer(outputs, inputs, taps=3, groups=groups)
    conv = nn.Conv1d(inputs, outputs, 3, groups=groups, bias=False)
    dense = torch.zeros(outputs, inputs, 3)
    for row in range(outputs):
        start = row // (outputs // groups) * (inputs // groups)
        dense[row, start : start + inputs // groups] = conv.weight[row].detach()
    found = through_layer(gain_of(outputs), conv.weight.detach().flatten(1), one)
    expected = through_layer(gain_of(outputs), dense.flatten(1), layer(outputs, inputs, taps=3))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("taps", [1, 3])
def test_a_diagonal_gain_gives_what_its_matrix_gives(taps: int, groups: int) -> None:
    values, rows, one = torch.rand(4) + 0.5, torch.randn(4, 5 * taps), layer(4, 5 * groups, taps=taps, groups=groups)
    found, expected = (through_layer(gain, rows, one) for gain in (values, torch.diag(values)))
    torch.testing.assert_close(found, expected)


def test_a_classifier_of_very_many_classes_needs_no_matrix_over_them() -> None:
    classes = 500_000  # their matrix would take 1 TB
    values, rows = torch.rand(classes), torch.randn(classes, 2)
    found = through_layer(values, rows, layer(classes, 2))
    expected = (rows.double().T * values.double()) @ rows.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1.0)


def test_too_many_inputs_leave_the_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    gain, rows = gain_of(4), torch.randn(4, 9)
    whole = through_layer(gain, rows, layer(4, 9))
    monkeypatch.setattr(adjoint, "WIDEST", 8)
    torch.testing.assert_close(through_layer(gain, rows, layer(4, 9)), whole.diagonal())


@pytest.mark.parametrize(
    ("op", "function"),
    [
        (Op.RELU, torch.relu),
        (Op.RELU6, nn.functional.relu6),
        (Op.LEAKY_RELU, lambda x: nn.functional.leaky_relu(x, SLOPE)),
        (Op.SILU, nn.functional.silu),
        (Op.GELU, nn.functional.gelu),
        (Op.SIGMOID, torch.sigmoid),
        (Op.TANH, torch.tanh),
    ],
    ids=lambda value: str(value) if isinstance(value, Op) else "",
)
def test_slopes_are_those_of_a_gaussian_sample(op: Op, function: Callable[[Tensor], Tensor]) -> None:
    mean = torch.tensor([-1.5, 0.0, 0.4, 5.0], dtype=torch.float64)
    variance = torch.tensor([0.5, 1.0, 0.3, 1.5], dtype=torch.float64)
    sample = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = (mean + sample * variance.sqrt()).requires_grad_()
    (slope,) = torch.autograd.grad(function(x).sum(), x)
    found = activation_slopes(Node("a", op, (), (1, 4), slope=SLOPE), Moments(mean, variance))
    # the sample's own error is 0.5 / sqrt(200,000) = 0.001; a series of 12 terms leaves less than 0.01
    torch.testing.assert_close(found.mean, slope.mean(0), rtol=0, atol=0.005)
    torch.testing.assert_close(found.variance, slope.var(0), rtol=0.05, atol=0.01)


def test_pool_gain_by_hand() -> None:
    assert pool_gain(1) == 1
    # 2 positions an axis, correlation 0.4: (1 + 1 + 2 * 0.4) / 4 = 0.7, squared for two axes
    assert pool_gain(4) == pytest.approx(0.49)
    # many positions: (1 + 0.4) / (1 - 0.4) of n an axis are worth one
    assert pool_gain(100**2) == pytest.approx((1.4 / 0.6 / 100) ** 2, rel=0.03)


class Chain(nn.Module):
    """Linear layers, norms and a residual add over features: no positions, so nothing is assumed of them."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Linear(12, 16), nn.BatchNorm1d(16)
        self.branch, self.norm2 = nn.Linear(16, 16), nn.BatchNorm1d(16)
        self.act, self.last = activation, nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.act(self.norm1(self.first(x)))
        return self.last(self.act(stream + self.norm2(self.branch(stream))))


@pytest.mark.parametrize("activation", [nn.Identity(), nn.ReLU(), nn.ReLU6()], ids=["identity", "relu", "relu6"])
@pytest.mark.parametrize("name", ["first", "branch", "last"])
def test_effects_are_those_of_noise_put_into_the_network(loaded: Loader, activation: nn.Module, name: str) -> None:
    model = loaded(Chain(activation), (1, 12))
    torch.manual_seed(0)
    images = torch.randn(20_000, 12)
    (use,) = layer_uses(model)[name]
    part, spread = model.module.get_submodule(name), 0.05
    clean = model.module(images)
    hook = part.register_forward_hook(lambda _, __, output: output + spread * torch.randn_like(output))
    noisy = model.module(images)
    hook.remove()
    states = forward_states(model)
    signal = float(states[model.graph.nodes[-1].inputs[0]].variance.sum())
    measured = float((noisy - clean).square().sum(1).mean()) / spread**2 / signal
    # channels are taken as independent and Gaussian, and a residual add as one of independent noises
    tolerance = 0.05 if name == "last" else 0.35
    assert float(use.effect.sum()) == pytest.approx(measured, rel=tolerance)


def test_an_operation_of_unknown_kind_keeps_the_ratio_of_noise_to_signal(loaded: Loader) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.cumsum(self.first(x), 1)[:, ::2])

    model = loaded(Odd(), (1, 6))
    effects = layer_uses(model)
    states = forward_states(model)
    first = next(node for node in model.graph.nodes if node.layer is not None and node.layer.name == "first")
    relative = float((effects["first"][0].effect * states[first.name].variance).sum())
    assert math.isfinite(relative)
    assert relative == pytest.approx(1, rel=0.01)


def test_a_tied_layer_is_heard_at_every_use(loaded: Loader) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(self.first(x)))

    model = loaded(Tied(), (1, 6))
    uses = layer_uses(model)
    assert [len(found) for found in uses.values()] == [2, 1]
    early, late = uses["first"]
    gain = uses["last"][0].effect[0] * model.state["last.weight"].square().sum(0).double()
    torch.testing.assert_close(late.effect, gain, rtol=1e-4, atol=0)
    assert not torch.allclose(early.effect, late.effect)


class Mixed(nn.Module):
    """A gate, a concatenation, a grouped layer, a padded residual, a pool, a flatten and smooth activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn0 = nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.project, self.bn1 = nn.Conv2d(24, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.grouped, self.bn2 = nn.Conv2d(16, 20, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(20)
        self.hidden, self.head = nn.Linear(80, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.bn0(self.stem(x)))
        gate = torch.sigmoid(self.excite(nn.functional.gelu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = self.bn1(self.project(torch.cat([x * gate, x], 1)))
        x = nn.functional.silu(nn.functional.pad(x, (0, 0, 0, 0, 2, 2)) + self.bn2(self.grouped(x)))
        x = nn.functional.avg_pool2d(nn.functional.max_pool2d(x, 2), 2)
        return self.head(torch.tanh(self.hidden(x.flatten(1))))


@pytest.mark.parametrize("widest", [2048, 16], ids=["matrices", "diagonals above 16"])
def test_every_layer_of_a_mixed_network_is_heard(loaded: Loader, monkeypatch: pytest.MonkeyPatch, widest: int) -> None:
    monkeypatch.setattr(adjoint, "WIDEST", widest)
    uses = layer_uses(loaded(Mixed(), (1, 3, 16, 16)))
    assert list(uses) == ["stem", "squeeze", "excite", "project", "grouped", "hidden", "head"]
    for (use,) in uses.values():
        assert use.effect.shape == (use.layer.out_channels,)
        assert bool(torch.isfinite(use.effect).all())
        assert bool((use.effect > 0).all())
