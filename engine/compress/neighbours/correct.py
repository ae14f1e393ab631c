"""Bias correction: the expected error of a layer's output is taken out of its bias."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...models.graph import Graph, Layer, Norm, Op
from ..gaussian import Moments
from ..state import State, image_state, propagate
from ..taps import Taps
from .overlay import Overlay, move_output, single_uses

RHO = 0.5
"""Correlation of neighbouring positions that average pools assume; it enters no mean but through an activation."""


def correct_biases(
    graph: Graph, tensors: Overlay, taps: Callable[[Layer], tuple[Taps, Taps] | None]
) -> dict[str, Tensor]:
    """Take E[Ŵx] − E[Wx] = (Ŵ − W) E[x] out of every layer's output (arXiv 1906.04721, eq. 16-19).

    ``taps`` gives a layer's original and quantized tap sums, None for one that is not quantized. E[x] of the float
    network comes from the BatchNorms before the layer. Return the shift, float64 [out], of every layer corrected.
    """
    nodes, corrected = single_uses(graph), {}
    for name, mean in input_means(graph, tensors).items():
        layer = nodes[name].layer if name in nodes else None
        found = taps(layer) if layer is not None else None
        if layer is None or found is None or len(mean) != layer.in_channels:
            continue
        shift = found[1].apply(mean) - found[0].apply(mean)
        if move_output(graph, layer, nodes[name], tensors, -shift):
            corrected[name] = shift
    return corrected


def input_means(graph: Graph, tensors: Overlay) -> dict[str, Tensor]:
    """Return E[x], float64 [in], by layer, where every path back to the image meets a BatchNorm before a layer.

    Behind a norm x is N(β, γ²); what follows it goes by ``state.propagate``.
    """
    states: dict[str, State] = {}
    known: set[str] = set()
    means = {}
    for node in graph.nodes:
        inputs = [states[name] for name in node.inputs]
        reached = bool(node.inputs) and all(name in known for name in node.inputs)
        if node.norm is not None:
            states[node.name] = _behind(node.norm, tensors)
            known.add(node.name)
        elif node.layer is not None:
            states[node.name] = image_state(node.layer.out_channels)
            if reached:
                means[node.layer.name] = inputs[0].mean
        else:
            states[node.name] = propagate(node, inputs, RHO)
            if reached and node.op is not Op.OTHER:
                known.add(node.name)
    return means


def _behind(norm: Norm, tensors: Overlay) -> State:
    ones = torch.ones(norm.channels, dtype=torch.float64)
    gamma = tensors[norm.weight] if norm.weight else ones
    beta = tensors[norm.bias] if norm.bias else torch.zeros_like(ones)
    return State.settled(Moments(beta, gamma.square()))
