"""Scales of channels that the BatchNorm behind a layer takes over, so that the layer stores one for all.

γ (s z − μ) / σ + β = (γ s / s̄) (s̄ z − μ s̄ / s) / σ + β: the norm has a float a channel anyway, so its γ and μ hold s
for nothing, exactly but for their rounding to float32. The paper folds its coefficients c into γ and β likewise
(arXiv 2307.00498).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..job.fields import IN_NORM
from ..models.graph import Graph, Norm, Op
from .result import Compressed, QuantizedLayer

_DEAD = 2.0**-60
"""Of the mean scale: a row below it is nothing but zero, and its norm says what comes out."""


def norms_for_scales(graph: Graph) -> Mapping[str, Norm]:
    """Return the BatchNorm, by the layer's name, that can take a layer's scales.

    It alone reads the layer's output, along the layer's channels; nothing else in the program reads a tensor of the
    two; the norm is affine and the layer has no bias.
    """
    found = {}
    for node in graph.nodes:
        users = graph.users[node.name]
        norm = users[0].norm if len(users) == 1 else None
        if node.layer is None or node.layer.bias or norm is None or not (norm.weight and norm.bias):
            continue
        # over tokens a linear layer has its channels last, a norm its own on axis 1
        along = norm.channels == node.layer.out_channels and (node.layer.op is not Op.LINEAR or len(node.shape) == 2)
        if along and all(graph.reads.get(name) == 1 for name in (node.layer.weight, *norm.tensors)):
            found[node.layer.name] = norm
    return found


def fold_scales(compressed: Compressed, graph: Graph, state: Mapping[str, Tensor]) -> Compressed:
    """Return ``compressed`` with one scale for each layer that a norm can relieve, and those norms' γ, μ and β.

    Layers with a scale a tensor or a group, or with zero points, stay as they are. ``state`` holds the tensors that
    compression did not change. The row statistics stay those of the dequantized weight before.
    """
    norms, tensors, layers = norms_for_scales(graph), dict(compressed.tensors), []
    for item in compressed.layers:
        norm = norms.get(item.layer.name) if _has_row_scales(item) else None
        if norm is None:
            layers.append(item)
            continue
        shared, share = _shares(item.quantized.scale)
        tensors |= _taken_over(norm, share, {name: tensors.get(name, state[name]) for name in norm.tensors})
        layers.append(_relieved(item, shared))
    return replace(compressed, layers=tuple(layers), tensors=tensors)


def _has_row_scales(item: QuantizedLayer) -> bool:
    form = item.quantized.format
    return form.groups == 1 and not form.layer_wise and item.quantized.zero_point is None


def _shares(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale for all, float32 [1, 1], and each row's share of it, float64 [rows]; 0 for a row of zeros."""
    mean = math.fsum(scale.flatten().tolist()) / len(scale)  # whatever the order in which a machine adds
    shared = torch.full((1, 1), mean or 1.0, dtype=scale.dtype, device=scale.device)
    share = (scale.double() / shared.double())[:, 0].cpu()
    return shared, torch.where(share > _DEAD, share, 0.0)


def _taken_over(norm: Norm, share: Tensor, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return γ, μ and β, float32 [channels], under which the layer's outputs may lack their ``share``."""
    assert norm.weight is not None
    assert norm.bias is not None
    names = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    gamma, beta, mean, variance = (tensors[name].double().cpu() for name in names)
    alive = share > 0
    # a dead row's output is 0, and no longer where its codes have a scale: the norm gives what it made of 0
    beta = torch.where(alive, beta, beta - gamma * mean / (variance + norm.eps).sqrt())
    found = {
        norm.weight: gamma * share,
        norm.running_mean: mean / torch.where(alive, share, 1.0),
        norm.bias: beta,
    }
    return {name: value.float() for name, value in found.items()}


def _relieved(item: QuantizedLayer, shared: Tensor) -> QuantizedLayer:
    form = replace(item.quantized.format, layer_wise=True)
    return replace(item, granularity=IN_NORM, quantized=replace(item.quantized, format=form, scale=shared))
