"""States behind captured operators, in the original and in the quantized network, against Monte Carlo."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own convention
from dfmpc.compress.gaussian import Moments
from dfmpc.compress.state import State, propagate
from dfmpc.models.capture import capture
from dfmpc.models.graph import Graph, Node, Op
from torch import Tensor, nn

Function = Callable[[nn.Module, Tensor], Tensor]


class Probe(nn.Module):
    """A function with parameters of one value a channel; the copy in front keeps it off the network's input."""

    def __init__(self, function: Function, channels: int) -> None:
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(5)
        self.scale = nn.Parameter(torch.rand(channels, generator=generator) * 2 - 0.5)
        self.layer_norm, self.group_norm = nn.LayerNorm(channels), nn.GroupNorm(2, channels)
        for norm in (self.layer_norm, self.group_norm):
            norm.weight.data = torch.rand(channels, generator=generator) + 0.2
            norm.bias.data = torch.randn(channels, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x.clone())


def moved(channels: int) -> State:
    """Return a state whose mean and variance differ between channels and between the networks."""
    generator = torch.Generator().manual_seed(7)
    mean, shift = (torch.randn(channels, dtype=torch.float64, generator=generator) for _ in range(2))
    one, other = (torch.rand(channels, dtype=torch.float64, generator=generator) + 0.3 for _ in range(2))
    return State(mean, one, 0.5 * shift, other)


def behind(graph: Graph, state: State, net: nn.Module) -> State:
    """Return what the graph's output reads, from the input's state, with positions independent (rho 0)."""
    states = {}
    for node in graph.nodes:
        inputs = [states[name] for name in node.inputs]
        found = state if node.op is Op.INPUT else propagate(node, inputs, 0.0, lambda name: net.state_dict()[name])
        states[node.name] = found
    return states[graph.nodes[-1].inputs[0]]


def sampled(net: nn.Module, moments: Moments, shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return every channel's mean, variance and count over samples and positions (tokens: channels last)."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    along = (1, -1) + (1,) * (len(shape) - 2) if len(shape) == 4 else (1, 1, -1)
    with torch.inference_mode():
        out = net(moments.mean.float().view(along) + moments.variance.sqrt().float().view(along) * noise).double()
    channels_last = out.shape[-1] == len(moments.mean)
    rows = out.movedim(-1 if channels_last else 1, 0).flatten(1)
    return rows.mean(1), rows.var(1), torch.tensor(rows.shape[1])


MAP = (600, 6, 16, 16)
TOKENS = (600, 16, 256)

CASES: dict[str, tuple[Function, tuple[int, ...], float]] = {
    "relu": (lambda _, x: F.relu(x), MAP, 0),
    "relu6": (lambda _, x: F.relu6(x), MAP, 0),
    "leaky_relu": (lambda _, x: F.leaky_relu(x, 0.2), MAP, 0),
    "silu": (lambda _, x: F.silu(x), MAP, 0),
    "silu written out": (lambda _, x: x * torch.sigmoid(x), MAP, 0),
    "gelu": (lambda _, x: F.gelu(x), MAP, 0),
    # The tanh approximation differs from GELU by up to 5e-4.
    "gelu by tanh": (lambda _, x: F.gelu(x, approximate="tanh"), MAP, 5e-4),
    "hardswish": (lambda _, x: F.hardswish(x), MAP, 0),
    "hardsigmoid": (lambda _, x: F.hardsigmoid(x), MAP, 0),
    "sigmoid": (lambda _, x: torch.sigmoid(x), MAP, 0),
    "tanh": (lambda _, x: torch.tanh(x), MAP, 0),
    "square": (lambda _, x: x * x, MAP, 0),
    # A gate is the mean of 256 positions, so it is nearly independent of each; the correlation left is 1/sqrt(256).
    "gate": (lambda _, x: x * torch.sigmoid(4 * x.mean((2, 3), keepdim=True)), MAP, 0.02),
    "hard gate": (lambda _, x: F.hardsigmoid(F.adaptive_avg_pool2d(x, 1)) * F.hardswish(x), MAP, 0.02),
    "mean over space": (lambda _, x: F.relu(x).mean((2, 3)), (6000, 6, 4, 4), 0),
    "scale and offset": (lambda _, x: 1.5 - -x / 2 + 3, MAP, 0),
    "layer scale": (lambda net, x: net.scale[:, None, None] * x, MAP, 0),
    "layer scale by reshape": (lambda net, x: x.mul(net.scale.reshape(1, -1, 1, 1)) - 1, MAP, 0),
    "offset a channel": (lambda net, x: x + net.scale.view(-1, 1, 1), MAP, 0),
    # A norm's own statistics scatter by the inverse root of the values they are taken of (256; 3 * 256).
    "layer_norm": (lambda net, x: net.layer_norm(x), TOKENS, 0.03),
    "layer_norm of a map": (lambda net, x: net.layer_norm(x.permute(0, 2, 3, 1)), (64, 256, 8, 8), 0.03),
    "group_norm": (lambda net, x: net.group_norm(x), MAP, 0.03),
    "instance_norm": (lambda net, x: F.instance_norm(x, weight=net.scale), MAP, 0.03),
    "token mlp": (lambda net, x: F.gelu(x * net.scale), TOKENS, 0),
}  # fmt: skip


@cache
def captured(name: str) -> tuple[nn.Module, Graph, int]:
    """Return the probe of a case, its graph and its channels."""
    function, shape, _ = CASES[name]
    channels = shape[1] if len(shape) == 4 else shape[-1]
    net = Probe(function, channels).eval()
    return net, capture(net, (1, *shape[1:])), channels


@pytest.mark.parametrize("name", CASES)
def test_state_agrees_with_samples_in_both_networks(name: str) -> None:
    _, shape, bias = CASES[name]
    net, graph, channels = captured(name)
    state = moved(channels)
    found = behind(graph, state, net)
    for moments, before, seed in (
        (found.moments, state.moments, 1),
        (found.quantized_moments, state.quantized_moments, 2),
    ):
        mean, variance, count = sampled(net, before, shape, seed)
        # Seven standard errors: of a mean sd / sqrt(n), of a variance about 3 var / sqrt(n) for tails like a square's.
        error = 7 / count.sqrt()
        assert bool(((moments.mean - mean).abs() <= error * variance.sqrt() + bias * (1 + mean.abs())).all())
        assert bool(((moments.variance - variance).abs() <= 3 * error * variance + 4 * bias * (1e-3 + variance)).all())


def test_a_product_of_independent_factors_agrees_with_samples() -> None:
    one, other = moved(6), State.of(moved(12).moments, moved(12).quantized_moments)
    gate = State(other.mean[6:], other.variance[6:], other.shift[6:], other.quantized_variance[6:])
    found = propagate(Node("f", Op.MUL, ("x", "g"), (1, 6, 8, 8)), [one, gate], 0.5)
    noise = torch.randn(2, 400_000, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for moments, x, g in (
        (found.moments, one.moments, gate.moments),
        (found.quantized_moments, one.quantized_moments, gate.quantized_moments),
    ):
        values = (x.mean + x.variance.sqrt() * noise[0]) * (g.mean + g.variance.sqrt() * noise[1])
        # Six standard errors of 400,000 samples with a variance below 4.
        torch.testing.assert_close(moments.mean, values.mean(0), atol=0.02, rtol=0)
        torch.testing.assert_close(moments.variance, values.var(0), atol=0.01, rtol=0.03)


@pytest.mark.parametrize(
    ("bounds", "gate_bounds", "expected"),
    [
        ((0.0, 6.0), (0.0, 1.0), (0.0, 6.0)),
        ((0.0, None), (0.0, 1.0), (0.0, None)),
        ((-0.375, None), (0.0, 1.0), (-0.375, None)),
        ((-0.375, None), (0.0, None), (None, None)),
        ((None, None), (0.0, 1.0), (None, None)),
        ((-1.0, 1.0), (-1.0, 1.0), (None, None)),
    ],
)
def test_bounds_of_a_product(
    bounds: tuple[float | None, float | None],
    gate_bounds: tuple[float | None, float | None],
    expected: tuple[float | None, float | None],
) -> None:
    zeros, node = torch.zeros(2, dtype=torch.float64), Node("f", Op.MUL, ("x", "g"), (1, 2, 4, 4))
    one, gate = (State(zeros, zeros, zeros, zeros, *pair) for pair in (bounds, gate_bounds))
    for inputs in ([one, gate], [gate, one]):
        found = propagate(node, inputs, 0.5)
        assert (found.lower, found.upper) == expected


def test_unchanged_moments_leave_no_shift_anywhere() -> None:
    for name in CASES:
        net, graph, channels = captured(name)
        found = behind(graph, State.settled(moved(channels).moments), net)
        assert bool((found.shift == 0).all()), name
        assert torch.equal(found.variance, found.quantized_variance), name


@pytest.mark.parametrize(
    ("mean", "variance"),
    [(0.0, 0.0), (-4.0, 0.0), (3.0, 0.0), (0.0, 1e-300), (1e6, 1e12), (-1e6, 1e-12)],
)
def test_degenerate_channels_keep_every_state_finite(mean: float, variance: float) -> None:
    """γ = 0 and β anything; variances that vanish or overflow float32's square."""
    for name in CASES:
        net, graph, channels = captured(name)
        ones = torch.ones(channels, dtype=torch.float64)
        state = State(mean * ones, variance * ones, 0.1 * ones, 2 * variance * ones)
        found = behind(graph, state, net)
        for values in (found.mean, found.variance, found.shift, found.quantized_variance):
            assert bool(torch.isfinite(values).all()), name
        assert bool((found.variance >= 0).all() & (found.quantized_variance >= 0).all()), name


def test_without_a_reader_of_parameters_their_moments_pass() -> None:
    net = Probe(lambda net, x: net.scale[:, None, None] * x, 6).eval()
    scale = capture(net, (1, 6, 8, 8)).nodes[-2]
    assert (scale.op, scale.affine is not None) == (Op.AFFINE, True)
    state = moved(6)
    assert propagate(scale, [state], 0.5) is state
