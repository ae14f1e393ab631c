"""One network on its way through the graph: the field behind every node that is still to be read."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from ...models.graph import Graph, Node, Op
from ..activations import RANGES
from . import pool
from .convolve import Kernel, Window, convolved
from .field import Field, full_size, image, white
from .links import Link, Links
from .options import SpectralOptions
from .pointwise import activated
from .torus import SMALLEST, Torus, add_adjoint, torus

LARGEST_SPECTRUM = 2**23
"""Complex numbers in a spectrum, 64 MiB; there are some ten of them at a time."""


class Network:
    """Fields of one network by node, and the links by which branches still correlate where they meet again."""

    def __init__(self, graph: Graph, options: SpectralOptions) -> None:
        """Start before the first node."""
        self.graph, self.options = graph, options
        self.side = affordable_side(graph, options.side)
        self.fields: dict[str, Field] = {}
        self.links = Links({node.name: place for place, node in enumerate(graph.nodes)}, self.fields)
        self.postponed: dict[str, Node] = {}
        self.latest: Kernel | None = None

    def put(self, node: Node, field: Field, link: Link | None = None) -> None:
        """Keep the field behind ``node``."""
        self.fields[node.name] = field
        self.links.note(node.name, field, link)

    def through_layer(self, node: Node, field: Field, kernel: Kernel | None, bias: Tensor | None) -> None:
        """Take ``field``, the layer's input, through the layer; without a kernel nothing is known behind it."""
        if kernel is None:
            self.put(node, self.unknown(node, field.torus))
            return
        if self.latest is not None:
            self.latest.kept.clear()
        self.latest, found, source = kernel, convolved(field, kernel, bias), node.inputs[0]
        link = Link((source,), kernel, kernel.window.stride) if found.field.torus.size > 1 else None
        self.put(node, found.field, link)
        if found.product is not None and kernel.window.stride == (1, 1) and len(self.graph.users[source]) > 1:
            self.links.products[source, node.name] = found.product

    def release(self, name: str) -> None:
        """Forget the field behind a node, and how others vary together with it."""
        self.fields.pop(name, None)
        self.links.forget(name)

    def unknown(self, node: Node, grid: Torus) -> Field:
        """Return white noise of the node's shape: the fallback behind an operation that has no rule."""
        size = full_size(node.shape)
        return white(node.shape[1] if len(node.shape) > 1 else 1, size, grid if size != (1, 1) else torus(1, 1))

    def propagate(self, node: Node) -> None:
        """Take the fields through anything but a weight layer or a norm."""
        inputs = [self.fields[name] for name in node.inputs]
        found = self._rule(node, inputs) if inputs else (self._image(node), None)
        if found is None or found[0].mean.numel() != prod(node.shape[1:]):
            found = self.unknown(node, inputs[0].torus), None
        self.put(node, *found)

    def _image(self, node: Node) -> Field:
        if len(node.shape) != 4:
            return white(node.shape[1] if len(node.shape) > 1 else 1, full_size(node.shape), torus(1, 1))
        height, width = full_size(node.shape)
        grid = torus(*(_side(size, self.side) for size in (height, width)))
        return image(node.shape[1], (height, width), grid, self.options.exponent, self.options.colour_correlation)

    def _rule(self, node: Node, inputs: list[Field]) -> tuple[Field, Link | None] | None:
        if node.op in RANGES:
            return self._activated(node, inputs[0])
        if node.op is Op.ADD:
            return self._added(node, inputs)
        if node.op is Op.CAT:
            return self._joined(node, inputs)
        if node.op is Op.MUL and len(inputs) == 2:
            return pool.gated(*inputs), None
        if node.op is Op.MAX_POOL:
            return self._max_pooled(node, inputs[0])
        if node.op is Op.AVG_POOL:
            return pool.averaged(inputs[0], full_size(node.shape)), None
        if node.op is Op.FLATTEN:
            return (inputs[0] if self._read_by_layers(node) else pool.flattened(inputs[0])), None
        if node.op is Op.PAD:
            return self._padded(node, inputs[0])
        return self._unchanged(node, inputs[0]) if node.op in (Op.IDENTITY, Op.OUTPUT) else None

    def _activated(self, node: Node, field: Field) -> tuple[Field, Link]:
        readers = self.graph.users[node.name]
        if node.op is Op.RELU and readers and all(reader.op is Op.MAX_POOL for reader in readers):
            # A max-pool commutes with a ReLU, and its rule is one for Gaussians.
            self.postponed[node.name] = node
            return field, Link(node.inputs)
        found = activated(node, field, self.options.order, self.options.reach)
        return found.field, Link(node.inputs, gain=found.gain)

    def _read_by_layers(self, node: Node) -> bool:
        """Whether a flattened map may stay a map: a linear layer then is a convolution of the map's size."""
        return all(
            user.layer is not None or ((user.op is Op.IDENTITY or user.op in RANGES) and self._read_by_layers(user))
            for user in self.graph.users[node.name]
        )

    def _max_pooled(self, node: Node, field: Field) -> tuple[Field, None]:
        pooled = pool.maximum(field, full_size(node.shape), node.window)
        activation = self.postponed.get(node.inputs[0])
        if activation is None:
            return pooled, None
        return activated(activation, pooled, self.options.order, self.options.reach).field, None

    def _added(self, node: Node, inputs: list[Field]) -> tuple[Field, Link] | None:
        if len({(field.channels, field.torus, field.mean.shape) for field in inputs}) > 1:
            return None
        spectrum = inputs[0].spectrum.clone()
        for field in inputs[1:]:
            spectrum.add_(field.spectrum)
        for place, one in enumerate(node.inputs):
            for other in node.inputs[:place]:
                cross = self.links.cross(one, other)
                if cross is not None:
                    spectrum.add_(cross)
                    add_adjoint(spectrum, cross)
        bounded = all(field.lower is not None for field in inputs)
        lower = sum(field.lower or 0.0 for field in inputs) if bounded else None
        mean = sum((field.mean for field in inputs[1:]), inputs[0].mean)
        return Field(mean, spectrum, inputs[0].torus, lower), Link(node.inputs)

    def _joined(self, node: Node, inputs: list[Field]) -> tuple[Field, Link] | None:
        if len({(field.torus, field.mean.shape[1:]) for field in inputs}) > 1:
            return None
        sizes = [field.channels for field in inputs]
        spectrum = inputs[0].spectrum.new_zeros(*inputs[0].spectrum.shape[:2], sum(sizes), sum(sizes))
        blocks = [list(torch.split(row, sizes, 3)) for row in torch.split(spectrum, sizes, 2)]
        for row, one in enumerate(node.inputs):
            blocks[row][row].copy_(inputs[row].spectrum)
            for column, other in enumerate(node.inputs[:row]):
                cross = self.links.cross(one, other)
                if cross is not None:
                    blocks[row][column].copy_(cross)
                    add_adjoint(blocks[column][row], cross)
        mean = torch.cat([field.mean for field in inputs])
        lower = inputs[0].lower if len({field.lower for field in inputs}) == 1 else None
        upper = inputs[0].upper if len({field.upper for field in inputs}) == 1 else None
        return Field(mean, spectrum, inputs[0].torus, lower, upper), Link(node.inputs, joins=True)

    def _padded(self, node: Node, field: Field, mode: str = "constant") -> tuple[Field, Link] | None:
        height, width = full_size(node.shape)
        free = (height - field.mean.shape[1], width - field.mean.shape[2])
        if min(free) < 0:
            return None
        top, left = free[0] // 2, free[1] // 2
        mean = functional.pad(field.mean.unsqueeze(0), (left, free[1] - left, top, free[0] - top), mode=mode)[0]
        before, after = node.channel_pad
        mean = functional.pad(mean, (0, 0, 0, 0, before, after))
        spectrum = field.spectrum
        if before or after:
            spectrum = functional.pad(spectrum, (before, after, before, after))
        # What stood at p stands at p + (top, left) now: a convolution with one tap.
        window = Window((1, 1), padding=(top, left))
        moved = Kernel(torch.ones(field.channels, 1, 1, 1), field.channels, window) if top or left else None
        return Field(mean, spectrum, field.torus), Link(node.inputs, moved, pad=node.channel_pad)

    def _unchanged(self, node: Node, field: Field) -> tuple[Field, Link | None] | None:
        size, before = full_size(node.shape), field.mean.shape[1:]
        if size == tuple(before):
            return field, Link(node.inputs)
        if size[0] > before[0] or size[1] > before[1]:
            return self._padded(node, field, "replicate")
        strides = (before[0] // max(1, size[0]), before[1] // max(1, size[1]))
        mean = field.mean[:, :: strides[0], :: strides[1]][:, : size[0], : size[1]]
        if mean.shape[1:] != size:
            return None
        if strides == (1, 1):
            return replace(field, mean=mean), Link(node.inputs)
        grid, spectrum = field.torus.decimated(field.spectrum, strides)
        return replace(field, mean=mean, spectrum=spectrum, torus=grid), Link(node.inputs, strides=strides)


def _side(size: int, largest: int) -> int:
    """Return the torus's side for a map of ``size``: the power of two that is not below it, at most ``largest``."""
    return min(largest, 1 << max(0, size - 1).bit_length())


def affordable_side(graph: Graph, largest: int) -> int:
    """Halve the input's side until no node's spectrum has more than LARGEST_SPECTRUM entries, or all are smallest."""
    sizes = [(node.shape[1], max(node.shape[2:])) for node in graph.nodes if len(node.shape) == 4]
    before = max((size for _, size in sizes), default=1)
    side = largest
    while side > SMALLEST and any(
        _entries(channels, side * size // before) > LARGEST_SPECTRUM for channels, size in sizes
    ):
        side //= 2
    return side


def _entries(channels: int, side: int) -> int:
    """Return the entries of a spectrum that a smaller torus would have fewer of."""
    return channels * channels * (side * side // 2 + 2) if side > SMALLEST else 0
