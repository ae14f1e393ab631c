"""A network's tensors with what a method changed on top, and where a layer's output can be moved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from ...models.graph import Graph, Layer, Node, Norm, Op
from ...models.paths import End, norm_ends


class Overlay:
    """Reads float64 tensors by state-dict name; what is written stays on top of the original."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        """Take the original tensors, of any floating type."""
        self.state, self.changed = state, dict[str, Tensor]()

    def __getitem__(self, name: str) -> Tensor:
        """Return the tensor as it is now."""
        return self.changed[name] if name in self.changed else self.state[name].double()

    def __setitem__(self, name: str, value: Tensor) -> None:
        """Replace a tensor."""
        self.changed[name] = value

    def sigma(self, norm: Norm) -> Tensor:
        """Return sqrt(variance + eps), float64 [C]."""
        return (self[norm.running_var].clamp_min(0) + norm.eps).sqrt()


def single_uses(graph: Graph) -> dict[str, Node]:
    """Return by layer name the node of every layer whose weight is used once."""
    nodes = [node for node in graph.nodes if node.layer is not None]
    uses = Counter(node.layer.weight for node in nodes if node.layer)
    return {node.layer.name: node for node in nodes if node.layer and uses[node.layer.weight] == 1}


def own_norms(graph: Graph) -> dict[str, Node]:
    """Return by layer name the affine BatchNorm that alone reads the layer, and reads nothing else."""
    owners, found = _owners(graph), {}
    for name, node in single_uses(graph).items():
        ends = _ends(graph, node)
        norm = ends[0].node.norm if len(ends) == 1 and ends[0].raw else None
        if norm is None or norm.weight is None or norm.bias is None or norm.channels != ends[0].channels:
            continue
        if all(owners[tensor] == 1 for tensor in norm.tensors):
            found[name] = ends[0].node
    return found


def _owners(graph: Graph) -> Counter[str]:
    """Count how many norms use a tensor."""
    return Counter(name for node in graph.nodes if node.norm for name in node.norm.tensors)


def _ends(graph: Graph, node: Node) -> list[End]:
    tokens = node.op is Op.LINEAR and len(node.shape) != 2
    return [] if tokens else norm_ends(graph, node)


def move_output(graph: Graph, layer: Layer, node: Node, tensors: Overlay, delta: Tensor) -> bool:
    """Add ``delta``, float64 [out], to a layer's output: through the running means behind it, else through its bias.

    Return False where there is neither. Norms count where they alone read the layer, concatenations between allowed.
    """
    ends, owners = _ends(graph, node), _owners(graph)
    norms = [(end.node.norm, end.offset) for end in ends if end.node.norm is not None]
    if norms and len(norms) == len(ends) and all(owners[norm.running_mean] == 1 for norm, _ in norms):
        for norm, offset in norms:
            mean = tensors[norm.running_mean].clone()
            mean[offset : offset + layer.out_channels] -= delta
            tensors[norm.running_mean] = mean
        return True
    if layer.bias is not None:
        tensors[layer.bias] = tensors[layer.bias] + delta
    return layer.bias is not None
