"""The closed-form tier's model of a network and its quantized twin: fields carried through both, node by node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...models.graph import Graph, Layer, Node, Norm, Op
from ..calibrate import Statistics
from ..readers import direct_readers
from ..rows import to_rows
from ..taps import Taps, refine_mean
from .convolve import Kernel, Window, window_of
from .field import Field, alive
from .links import Link
from .network import Network
from .options import SpectralOptions
from .patches import border_sums, patch_moments

_LARGEST_RATIO = 1e4
"""Of the variances of the two networks; beyond it one of them is nothing but rounding."""


@dataclass(frozen=True)
class _Entry:
    """A weight layer's input in both networks, its means corrected, and how the layer slides over it."""

    original: Field
    quantized: Field
    window: Window | None


class SpectralMoments:
    """Gaussian fields on a torus through the original and the quantized network (docs/methods.md, "Spectral moments").

    The caller visits every node once, in execution order: ``through_layer`` for a weight layer (after
    ``input_moments``, where it wants those), ``restate`` for a norm, ``propagate`` for the rest.
    """

    def __init__(self, graph: Graph, tensor: Callable[[str], Tensor], options: SpectralOptions | None = None) -> None:
        """Take the network, and a reader of its original tensors by their names in the state dict."""
        self.graph, self.tensor = graph, tensor
        self.options = options or SpectralOptions()
        self.original, self.quantized = Network(graph, self.options), Network(graph, self.options)
        self.entries: dict[str, _Entry] = {}
        self.expiring = _expiring(graph)

    def input_moments(self, node: Node) -> Tensor:
        """Return the second moments of the quantized network's input patches, centred: float32 [groups, K, K].

        ``node`` is a weight layer's; K = in / groups · taps in the order of ``rows.to_rows``. Where the layer is of
        a kind that the model does not know (transposed or one-dimensional convolutions, tokens) this is the identity.
        """
        layer = _layer(node)
        entry = self._entry(node, layer)
        if entry.window is None:
            return torch.eye(layer.length).expand(layer.groups, -1, -1)
        options = self.options
        return patch_moments(entry.quantized, entry.window, layer.groups, options.contrast, options.independence)

    def through_layer(self, node: Node, original: Tensor, quantized: Tensor, bias: Tensor | None) -> None:
        """Take both networks through a weight layer: weights as [out, length] rows, ``bias`` [out] of both."""
        layer = _layer(node)
        entry = self._entry(node, layer)
        for network, field, rows in (
            (self.original, entry.original, original),
            (self.quantized, entry.quantized, quantized),
        ):
            kernel = None if entry.window is None else Kernel.of(rows, layer, entry.window)
            network.through_layer(node, field, kernel, bias)
        del self.entries[node.name]
        self._release(node)

    def restate(self, node: Node) -> Statistics:
        """Return a norm's running statistics for the quantized network, and take both networks through the norm.

        With r² = var(z_Q) / var(z_F): σ² ← r² σ², μ ← μ + (mean z_Q - mean z_F) σ / sd(z_F).
        """
        norm = node.norm
        assert norm is not None
        old = Statistics(self.tensor(norm.running_mean).double(), self.tensor(norm.running_var).double())
        fields = [self._input(network, node) for network in (self.original, self.quantized)]
        (mean, variance), (other_mean, other_variance) = (
            (field.channel_mean.double(), field.total_variance.double()) for field in fields
        )
        known = variance > 0
        safe = torch.where(known, variance, 1.0)
        ratio = torch.where(known, other_variance / safe, 1.0).clamp(1 / _LARGEST_RATIO, _LARGEST_RATIO)
        sigma = (old.variance.clamp_min(0) + norm.eps).sqrt()
        shift = torch.where(known, (other_mean - mean) * sigma / safe.sqrt(), other_mean - mean)
        for network, field in zip((self.original, self.quantized), fields, strict=True):
            self._settle(network, node, norm, field, old.variance)
        self._release(node)
        return Statistics(old.mean + shift, old.variance * ratio)

    def propagate(self, node: Node) -> None:
        """Take both networks through any other node; behind an operation without a rule stands white noise."""
        self.original.propagate(node)
        self.quantized.propagate(node)
        self._release(node)

    def _input(self, network: Network, node: Node) -> Field:
        field = network.fields[node.inputs[0]]
        assert node.norm is not None
        return field if field.channels == node.norm.channels else network.unknown(node, field.torus)

    def _settle(self, network: Network, node: Node, norm: Norm, field: Field, running: Tensor) -> None:
        """Behind a re-estimated norm: mean β, variance γ² σ² / (σ² + eps), in both networks."""
        gamma = self.tensor(norm.weight).double() if norm.weight else torch.ones_like(running)
        beta = self.tensor(norm.bias).double() if norm.bias else torch.zeros_like(running)
        running = running.clamp_min(0)
        spread = field.total_variance.double()
        wanted = gamma.square() * running / (running + norm.eps)
        gain = torch.where(alive(spread) & alive(wanted), gamma.sign() * (wanted / spread.clamp_min(1e-30)).sqrt(), 0.0)
        scaled = field.scaled(gain)
        link = Link(node.inputs, gain=gain.float()) if field is network.fields[node.inputs[0]] else None
        network.put(node, scaled.shifted(beta - scaled.channel_mean), link)

    def _entry(self, node: Node, layer: Layer) -> _Entry:
        if node.name not in self.entries:
            self.entries[node.name] = self._refined(node, layer)
        return self.entries[node.name]

    def _refined(self, node: Node, layer: Layer) -> _Entry:
        original, quantized = (network.fields[node.inputs[0]] for network in (self.original, self.quantized))
        window = window_of(layer, self.graph.by_name[node.inputs[0]], node, original)
        reader = next(iter(direct_readers(self.graph, node)), None)
        if window is None or reader is None or self.options.tau is None:
            return _Entry(original, quantized, window)
        part = slice(reader.offset, reader.offset + layer.out_channels)
        bias = self.tensor(layer.bias).double() if layer.bias else 0.0
        target = self.tensor(reader.norm.running_mean).double()[part] - bias
        variance = self.tensor(reader.norm.running_var).double()[part].clamp_min(0) + reader.norm.eps
        kernel = Kernel.of(to_rows(self.tensor(layer.weight), layer), layer, window)
        change = _mean_correction(original, kernel, layer, target, variance, self.options.tau)
        return _Entry(original.shifted(change), quantized.shifted(change), window)

    def _release(self, node: Node) -> None:
        for name in self.expiring.get(node.name, ()):
            self.original.release(name)
            self.quantized.release(name)


def _mean_correction(
    field: Field, kernel: Kernel, layer: Layer, target: Tensor, variance: Tensor, tau: float
) -> Tensor:
    """Return by how much the input's channel means move towards the known running mean (taps.refine_mean), [C]."""
    sums = border_sums(kernel, field).double()
    taps = Taps.of(replace(layer, shape=(layer.out_channels, sums.shape[1])), sums, sums)
    mean = field.channel_mean.double()
    found = kernel.mean(field.mean).double().flatten(1).mean(1)
    refined = refine_mean(taps, mean, field.total_variance.double(), target - found + taps.apply(mean), variance, tau)
    return refined.clamp(field.lower, field.upper) - mean if field.lower is not None else refined - mean


def _layer(node: Node) -> Layer:
    assert node.layer is not None
    return node.layer


def _expiring(graph: Graph) -> Mapping[str, list[str]]:
    """Return by node whose fields nobody needs once it has been visited.

    A field lives until its last reader; where branches meet again, the node at which they forked lives until then.
    """
    place = {node.name: index for index, node in enumerate(graph.nodes)}
    last = {node.name: place[node.name] for node in graph.nodes}
    above: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        above[node.name] = 1 << index
        for name in node.inputs:
            last[name] = index
            above[node.name] |= above[name]
        if node.op in (Op.ADD, Op.CAT):
            for fork in _forks(node, above):
                last[graph.nodes[fork].name] = max(last[graph.nodes[fork].name], index)
    found: dict[str, list[str]] = {}
    for name, index in last.items():
        found.setdefault(graph.nodes[index].name, []).append(name)
    return found


def _forks(node: Node, above: Mapping[str, int]) -> set[int]:
    """Return the place of the last common ancestor of every two inputs."""
    found = set()
    for index, one in enumerate(node.inputs):
        for other in node.inputs[:index]:
            common = above[one] & above[other]
            if common:
                found.add(common.bit_length() - 1)
    return found
