"""Cross-layer equalisation and bias absorption: the float network stays the same function."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from dfmpc.kernels.tap_sums import tap_sums
from torch import Tensor

from ...models.graph import Graph, Layer, Node, Norm, Op
from ..rows import from_rows, scale_inputs, to_rows
from ..taps import Taps
from .links import Link
from .overlay import Overlay, move_output

SWEEPS = 50
"""Passes over all links at most; chains settle in a few."""
SETTLED = 1e-3
"""A sweep that moves no factor by more than this, in natural logarithms, is the last."""
EXTREME = 2.0**20
"""No factor of one sweep is further from 1 than this."""
LEAST_ROW = 2.0**-20
"""Least deviation to which a row is scaled, where γ and eps are 0."""


class Balance:
    """Factors that even out the ranges of linked channels (arXiv 1906.04721, eq. 7-11).

    r1_i is the largest magnitude of row i of the first layer, r2_i that of column i of the second, both with the norm
    behind the layer folded in (row j times γ_j/σ_j). s_i = √(r1_i r2_i)/r2_i; row i is divided by s_i, column i is
    multiplied by it, link after link until nothing moves. A channel whose row or column is zero keeps s_i = 1.
    """

    def __init__(self, layers: Sequence[Layer], norms: Mapping[str, Node], tensors: Overlay) -> None:
        """Take the layers that may change, the norms of their own and the network's tensors."""
        self.layers = {layer.name: layer for layer in layers}
        self.magnitudes = {layer.name: _magnitudes(tensors[layer.weight], layer) for layer in layers}
        self.rows = {layer.name: _folded(layer, norms, tensors) for layer in layers}
        self.columns = {layer.name: _ones(layer.in_channels) for layer in layers}
        self.scales = {layer.name: _ones(layer.out_channels) for layer in layers}
        """By layer, the product of its s."""

    def settle(self, links: Sequence[Link]) -> None:
        """Sweep over ``links`` until no factor moves."""
        for _ in range(SWEEPS):
            if max((self._level(link) for link in links), default=0.0) <= SETTLED:
                return

    def _level(self, link: Link) -> float:
        first, second = link.first.name, link.second.name
        rows = self._grouped(first, columns=self.columns[first]).amax(2).flatten() * self.rows[first]
        columns = self._grouped(second, rows=self.rows[second]).amax(1).flatten() * self.columns[second]
        columns = columns.view(-1, link.repeat).amax(1)
        alive = (rows > 0) & (columns > 0)
        s = torch.where(alive, rows / torch.where(alive, columns, 1.0), 1.0).sqrt().clamp(1 / EXTREME, EXTREME)
        self.rows[first] = self.rows[first] / s
        self.scales[first] = self.scales[first] * s
        self.columns[second] = self.columns[second] * s.repeat_interleave(link.repeat)
        return float(s.log().abs().amax()) if len(s) else 0.0

    def _grouped(self, name: str, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
        """Return a layer's magnitudes [groups, out / groups, in / groups], its rows or columns scaled."""
        groups, found = self.layers[name].groups, self.magnitudes[name]
        view = found.view(groups, -1, found.shape[1])
        if columns is not None:
            view = view * columns.view(groups, 1, -1)
        return view if rows is None else view * rows.view(groups, -1, 1)


def _magnitudes(weight: Tensor, layer: Layer) -> Tensor:
    """Largest magnitude over the kernel's positions, float64 [out, in / groups]."""
    rows = to_rows(weight, layer).abs()
    return rows.view(layer.out_channels, layer.in_channels // layer.groups, layer.taps).amax(2)


def _folded(layer: Layer, norms: Mapping[str, Node], tensors: Overlay) -> Tensor:
    norm = norms[layer.name].norm if layer.name in norms else None
    if norm is None or norm.weight is None:
        return _ones(layer.out_channels)
    return tensors[norm.weight].abs() / _positive(tensors.sigma(norm))


def store(balance: Balance, norms: Mapping[str, Node], tensors: Overlay) -> None:
    """Write the balanced network: every layer with its norm's γ/σ in its rows, the norm still a norm.

    A row's factor is a = max(|γ|/s, √eps)/σ: W ← a W, b ← a b, μ ← a μ, σ² ← a²σ² (running variance a²σ² − eps, which
    is then not negative), γ ← γ/s, β ← β/s; so that β and γ² are still mean and variance behind the norm. A layer
    without a norm of its own: W ← W/s, b ← b/s.
    """
    for name, layer in balance.layers.items():
        scale = balance.scales[name]
        norm = norms[name].norm if name in norms else None
        factor = 1.0 / scale if norm is None else _rescale_norm(norm, scale, tensors)
        rows = to_rows(tensors[layer.weight], layer) * factor[:, None]
        tensors[layer.weight] = from_rows(scale_inputs(rows, layer, balance.columns[name]), layer)
        if layer.bias is not None:
            tensors[layer.bias] = tensors[layer.bias] * factor


def _rescale_norm(norm: Norm, scale: Tensor, tensors: Overlay) -> Tensor:
    """Write the norm behind rows times ``a`` whose output is divided by ``scale``; return a."""
    assert norm.weight is not None
    assert norm.bias is not None
    gamma, sigma = tensors[norm.weight] / scale, tensors.sigma(norm)
    factor = gamma.abs().clamp_min(max(math.sqrt(norm.eps), LEAST_ROW)) / _positive(sigma)
    tensors[norm.weight] = gamma
    tensors[norm.bias] = tensors[norm.bias] / scale
    tensors[norm.running_mean] = tensors[norm.running_mean] * factor
    tensors[norm.running_var] = ((factor * sigma).square() - norm.eps).clamp_min(0)
    return factor


def absorb_biases(graph: Graph, links: Sequence[Link], nodes: Mapping[str, Node], tensors: Overlay) -> None:
    """Move c = max(0, β − 3|γ|) behind the next layer (arXiv 1906.04721, eq. 12-15).

    relu(x) − c = relu(x − c) but for the 0.13 % of a Gaussian below 3 deviations, so β ← β − c and the next layer's
    output gains W c. Zero padding would not be shifted, so only layers without it absorb.
    """
    for link in links:
        norm, second = link.norm, link.second
        padded = any(second.padding) or second.op is Op.CONV_TRANSPOSE
        if norm is None or norm.weight is None or norm.bias is None or not link.direct or padded:
            continue
        c = (tensors[norm.bias] - 3 * tensors[norm.weight].abs()).clamp_min(0)
        if bool(c.any()) and move_output(graph, second, nodes[second.name], tensors, _taps(second, tensors).apply(c)):
            tensors[norm.bias] = tensors[norm.bias] - c


def _taps(layer: Layer, tensors: Overlay) -> Taps:
    found = tap_sums(to_rows(tensors[layer.weight].float(), layer), layer.taps)
    return Taps.of(layer, found.sums.cpu(), found.squares.cpu())


def _positive(values: Tensor) -> Tensor:
    return torch.where(values > 0, values, 1.0)


def _ones(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.float64)
