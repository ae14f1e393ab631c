"""What a unit of noise in front of every output channel of a layer does to the network's output, without images.

Two passes over the graph in variance terms (docs/methods.md, "Bit-plans by size"): forward for the moments of every
tensor, backward for the gain of a small independent noise from there to the output. Neighbouring positions correlate
by RHO, channels do not.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.graph import Layer, Node, Op
from ...models.load import LoadedModel
from ..activations import RANGES, hermite_coefficients
from ..gaussian import Moments
from ..quantize import original_taps
from ..state import State, image_state, propagate
from ..taps import Taps

RHO = 0.5
"""Correlation between neighbouring positions of signal and noise alike, as in the calibrator ``analytic``."""
_ORDER = 12
"""Terms of the Hermite series by which the gain of a smooth activation is summed."""


@dataclass(frozen=True)
class LayerUse:
    """One place where a layer computes (a tied weight has several)."""

    layer: Layer
    input_variance: Tensor
    """Of every input channel, float64 [in]."""
    effect: Tensor
    """Noise-to-signal of the network's output for a noise of variance 1 in an output channel, float64 [out]."""


def layer_uses(model: LoadedModel) -> dict[str, list[LayerUse]]:
    """Return the uses of every weight layer by its name, in execution order."""
    taps = {layer.name: original_taps(model.state[layer.weight], layer, "cpu") for layer in model.graph.layers}
    states = _forward(model, taps)
    gains = _Backward(model, taps, states).run()
    uses: dict[str, list[LayerUse]] = defaultdict(list)
    for node in model.graph.nodes:
        if node.layer is not None:
            variance = _input_state(node.layer, states[node.inputs[0]]).variance
            uses[node.layer.name].append(LayerUse(node.layer, variance, gains[node.name]))
    return dict(uses)


def _input_state(layer: Layer, state: State) -> State:
    return state if len(state.mean) == layer.in_channels else image_state(layer.in_channels)


def _vector(model: LoadedModel, name: str | None, otherwise: float, channels: int) -> Tensor:
    if name is None:
        return torch.full((channels,), otherwise, dtype=torch.float64)
    return model.state[name].double()


def _forward(model: LoadedModel, taps: Mapping[str, Taps]) -> dict[str, State]:
    """Return the original network's moments behind every node, by its name."""
    states: dict[str, State] = {}
    for node in model.graph.nodes:
        if node.layer is not None:
            states[node.name] = _through_layer(model, node.layer, taps[node.layer.name], states[node.inputs[0]])
        elif node.norm is not None:
            channels = node.norm.channels
            gamma = _vector(model, node.norm.weight, 1.0, channels)
            states[node.name] = State.settled(Moments(_vector(model, node.norm.bias, 0.0, channels), gamma.square()))
        else:
            states[node.name] = propagate(node, [states[name] for name in node.inputs], RHO)
    return states


def _through_layer(model: LoadedModel, layer: Layer, taps: Taps, state: State) -> State:
    state = _input_state(layer, state)
    mean = taps.apply(state.mean) + _vector(model, layer.bias, 0.0, layer.out_channels)
    return State.settled(Moments(mean, taps.quadratic(state.variance, RHO)))


class _Backward:
    """The adjoint pass: ``gains`` are noise-to-signal at the output for a unit of noise behind a node, float64 [C]."""

    def __init__(self, model: LoadedModel, taps: Mapping[str, Taps], states: Mapping[str, State]) -> None:
        self.model, self.taps, self.states = model, taps, states
        self.gains = {name: torch.zeros_like(state.mean) for name, state in states.items()}

    def run(self) -> dict[str, Tensor]:
        """Visit every node once, users before inputs."""
        for node in reversed(self.model.graph.nodes):
            for name, gain in zip(node.inputs, self._to_inputs(node), strict=True):
                self.gains[name] = self.gains[name] + self._fitted(node, name, gain)
        return self.gains

    def _to_inputs(self, node: Node) -> list[Tensor | None]:
        """Return the gain that ``node`` hands to each input; None where only the whole relative noise is known."""
        gain, states = self.gains[node.name], [self.states[name] for name in node.inputs]
        if node.op is Op.OUTPUT:
            return [torch.full_like(state.mean, 1 / max(float(state.variance.sum()), 1e-300)) for state in states]
        if node.layer is not None:
            return [self._layer(node.layer, gain)]
        if node.norm is not None:
            variance = self.model.state[node.norm.running_var].double().clamp_min(0) + node.norm.eps
            return [gain * _vector(self.model, node.norm.weight, 1.0, node.norm.channels).square() / variance]
        if node.op in RANGES:
            return [gain * activation_gain(node, states[0].moments)]
        if node.op is Op.ADD:
            return [gain] * len(states)
        if node.op is Op.CAT:
            return list(gain.split([len(state.mean) for state in states]))
        if node.op is Op.PAD:
            return [gain[node.channel_pad[0] : len(gain) - node.channel_pad[1]]]
        return [self._likewise(node, gain, state) for state in states]

    def _layer(self, layer: Layer, gain: Tensor) -> Tensor:
        taps = self.taps[layer.name]
        power = torch.lerp(taps.squares, taps.sums.square(), RHO)
        return (power * gain.view(*power.shape[:2], 1)).sum(1).flatten()

    def _likewise(self, node: Node, gain: Tensor, state: State) -> Tensor | None:
        """Whatever keeps the channels (pools, identities) keeps each one's ratio of noise to signal."""
        after, before = self.states[node.name].variance, state.variance
        if len(after) != len(before):
            return gain.view(len(before), -1).sum(1) if node.op is Op.FLATTEN and not len(after) % len(before) else None
        return gain * torch.where(before > 0, after / before.clamp_min(1e-300), 1.0)

    def _fitted(self, node: Node, name: str, gain: Tensor | None) -> Tensor:
        """Where the channels do not correspond, the ratio of all noise to all signal is what is kept."""
        before = self.states[name].variance
        if gain is not None and len(gain) == len(before):
            return gain
        relative = float((self.gains[node.name] * self.states[node.name].variance).sum())
        return torch.full_like(before, relative / max(float(before.sum()), 1e-300))


def activation_gain(node: Node, moments: Moments) -> Tensor:
    """Return E[f'(x)²] for x ~ N(mean, variance): what is left of a small noise's variance, float64 [C].

    Φ-terms for ReLU, ReLU6 and LeakyReLU; otherwise Σ_j j a_j² / j! / s² over the Hermite coefficients.
    """
    sd = moments.variance.clamp_min(1e-24).sqrt()
    if node.op in (Op.RELU, Op.LEAKY_RELU):
        return node.slope**2 + (1 - node.slope**2) * _cdf(moments.mean / sd)
    if node.op is Op.RELU6:
        return _cdf(moments.mean / sd) - _cdf((moments.mean - 6) / sd)
    coefficients = hermite_coefficients(node, moments.mean, sd, _ORDER)
    weights = torch.tensor([1 / math.factorial(j - 1) for j in range(1, _ORDER + 1)], dtype=torch.float64)
    return (coefficients[1:].square() * weights[:, None]).sum(0) / sd.square()


def _cdf(z: Tensor) -> Tensor:
    return 0.5 * torch.erfc(-z / math.sqrt(2))
