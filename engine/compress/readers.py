"""Who reads a node's output, as far as calibration cares: norms behind it, near or far."""

from __future__ import annotations

from dataclasses import dataclass

from ..models.graph import Graph, Node, Norm, Op


def heard_by_norms(graph: Graph) -> set[str]:
    """Return the nodes from which a norm can be reached; what no norm hears of needs no moments."""
    heard: set[str] = set()
    for node in reversed(graph.nodes):
        if node.norm is not None or node.name in heard:
            heard.update(node.inputs)
    return heard


@dataclass(frozen=True)
class Reader:
    """A norm that states a layer's output, and where the layer's channels begin in it."""

    norm: Norm
    offset: int


def direct_readers(graph: Graph, node: Node) -> list[Reader]:
    """Return the norms behind a weight layer with nothing but concatenations between."""
    found: list[Reader] = []
    pending = [(node, 0)]
    while pending:
        current, offset = pending.pop(0)
        for user in graph.users[current.name]:
            if user.norm is not None:
                found.append(Reader(user.norm, offset))
            elif user.op is Op.CAT:
                pending.append((user, offset + _cat_offset(graph, user, current)))
            elif user.op is Op.IDENTITY:
                pending.append((user, offset))
    return found


def _cat_offset(graph: Graph, cat: Node, part: Node) -> int:
    before = cat.inputs[: cat.inputs.index(part.name)]
    return sum(graph.by_name[name].shape[1] for name in before)
