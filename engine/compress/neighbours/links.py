"""Which adjacent layers DFQ may scale against each other, and why the others not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ...models.graph import Graph, Layer, Node, Norm, Op
from ...models.pairs import HOMOGENEOUS
from ...models.paths import bare_ends, layer_ends
from .overlay import single_uses


@dataclass(frozen=True)
class Link:
    """A layer, the norm of its own (None where it has none), and the one layer that reads it."""

    first: Layer
    norm: Norm | None
    second: Layer
    repeat: int = 1
    """Neighbouring inputs of ``second`` that one channel became by flattening."""
    direct: bool = False
    """The second layer reads the very output of a ReLU: no pool, pad or reshape between."""


@dataclass(frozen=True)
class Links:
    """All links in graph order; for every other layer why it has none behind it."""

    found: tuple[Link, ...]
    reasons: Mapping[str, str]


def find_links(graph: Graph, norms: Mapping[str, Node], kept: Collection[str]) -> Links:
    """Return the links of ``graph``.

    Between the layers there may be a BatchNorm of the first one's own (``norms``), a positively homogeneous
    activation f(s x) = s f(x), pools and flattening. ``kept`` layers are not to be changed.
    """
    nodes = {name: node for name, node in single_uses(graph).items() if name not in kept}
    found, reasons = [], {}
    for layer in graph.layers:
        link = _link(graph, nodes, norms, layer) if layer.name in nodes else "is kept, or its weight is used twice"
        if isinstance(link, Link):
            found.append(link)
        else:
            reasons[layer.name] = f"not equalised with the next layer: {link}"
    return Links(tuple(found), reasons)


def _link(graph: Graph, nodes: Mapping[str, Node], norms: Mapping[str, Node], layer: Layer) -> Link | str:
    node, norm_node = nodes[layer.name], norms.get(layer.name)
    ends = bare_ends(graph, node, layer.out_channels) if norm_node is None else layer_ends(graph, norm_node)
    if len(ends) != 1:
        return f"{len(ends)} operations read it"
    end, second = ends[0], ends[0].node.layer
    if second is None:
        return f"read by {end.node.name} ({end.node.op.value})"
    if end.activation not in HOMOGENEOUS:
        clips = end.activation is Op.RELU6
        return f"{end.activation.value}: {'the clip point would move' if clips else 'scaling would change its shape'}"
    if second.name not in nodes:
        return f"{second.name} is kept, or its weight is used twice"
    source = graph.by_name[end.node.inputs[0]]
    other_axis = second.op is Op.LINEAR and layer.op is not Op.LINEAR and len(source.shape) != 2
    if second.in_channels != end.channels or other_axis:
        return f"{second.name} reads another axis than the channels"
    norm = None if norm_node is None else norm_node.norm
    return Link(layer, norm, second, end.repeat, source.op is Op.RELU)
