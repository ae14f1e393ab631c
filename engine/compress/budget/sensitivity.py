"""What a unit of noise in an output channel of a layer does to the network's output, without images.

Two passes over the graph in terms of second moments (docs/methods.md, "Bit-plans by size"): forward for the moments
of every tensor, backward (adjoint.py) for the gain of a small noise from there to the output.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...models.graph import Layer
from ...models.load import LoadedModel
from ..gaussian import Moments
from ..quantize import original_taps
from ..state import State, image_state, propagate
from ..taps import Taps
from .adjoint import Adjoint

RHO = 0.5
"""Correlation of signals between neighbouring positions, as in the calibrator ``analytic``."""


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
    states = forward_states(model)
    effects = Adjoint(model, states).run()
    uses: dict[str, list[LayerUse]] = defaultdict(list)
    for node in model.graph.nodes:
        if node.layer is not None:
            variance = _input_state(node.layer, states[node.inputs[0]]).variance
            uses[node.layer.name].append(LayerUse(node.layer, variance, effects[node.name]))
    return dict(uses)


def forward_states(model: LoadedModel) -> dict[str, State]:
    """Return the original network's channel moments behind every node, by its name."""
    taps = {layer.name: original_taps(model.state[layer.weight], layer, "cpu") for layer in model.graph.layers}
    states: dict[str, State] = {}
    for node in model.graph.nodes:
        if node.layer is not None:
            states[node.name] = _through_layer(model.state, node.layer, taps[node.layer.name], states[node.inputs[0]])
        elif node.norm is not None:
            channels = node.norm.channels
            gamma = _vector(model.state, node.norm.weight, 1.0, channels)
            beta = _vector(model.state, node.norm.bias, 0.0, channels)
            states[node.name] = State.settled(Moments(beta, gamma.square()))
        else:
            inputs = [states[name] for name in node.inputs]
            states[node.name] = propagate(node, inputs, RHO, model.state.__getitem__)
    return states


def _through_layer(tensors: Mapping[str, Tensor], layer: Layer, taps: Taps, state: State) -> State:
    state = _input_state(layer, state)
    mean = taps.apply(state.mean) + _vector(tensors, layer.bias, 0.0, layer.out_channels)
    return State.settled(Moments(mean, taps.quadratic(state.variance, RHO)))


def _input_state(layer: Layer, state: State) -> State:
    return state if len(state.mean) == layer.in_channels else image_state(layer.in_channels)


def _vector(tensors: Mapping[str, Tensor], name: str | None, otherwise: float, channels: int) -> Tensor:
    return torch.full((channels,), otherwise, dtype=torch.float64) if name is None else tensors[name].double()
