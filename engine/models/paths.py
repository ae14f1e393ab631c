"""Where a layer's output goes: to the norm behind it, and from a norm to the layers that read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

from .graph import Graph, Node, Op

ACTIVATIONS = (Op.RELU, Op.RELU6, Op.LEAKY_RELU)
"""Piecewise linear activations, which a pair looks through."""
SMOOTH = (Op.SILU, Op.GELU, Op.HARDSWISH, Op.HARDSIGMOID, Op.SIGMOID, Op.TANH)
"""Activations that it looks through besides; behind them c cannot fold."""
_POOLS = (Op.AVG_POOL, Op.MAX_POOL)


@dataclass(frozen=True)
class End:
    """Where a walk stopped: the node that reads the value, and what happened to the value on its way."""

    node: Node
    activation: Op = Op.IDENTITY
    repeat: int = 1
    """Neighbouring features that one channel became by flattening."""
    offset: int = 0
    """Where the channels begin, behind concatenations."""
    channels: int = 0
    """Channels (features) of the tensor that ``node`` reads."""
    raw: bool = True
    """Nothing but identities so far."""


def keeps_channels(node: Node) -> bool:
    """Whether ``node`` maps every channel by itself, and c times the input gives c times the output (c >= 0)."""
    return node.op in (Op.IDENTITY, *_POOLS) or (node.op is Op.PAD and node.channel_pad == (0, 0))


def norm_ends(graph: Graph, node: Node) -> list[End]:
    """Follow a layer's raw output through identities, pools and concatenations to every node that reads it."""
    start = End(node, channels=node.shape[1] if len(node.shape) > 1 else 0)
    return list(_walk(graph, start, lambda at, user: _concatenate(graph, at, user)))


def layer_ends(graph: Graph, norm: Node) -> list[End]:
    """Follow a norm's output through its activation, identities, pools and flattening to every node that reads it."""
    start = End(norm, channels=norm.shape[1])
    return list(_walk(graph, start, lambda at, user: _activate_smoothly(at, user) or _activate(at, user)))


def bare_ends(graph: Graph, node: Node, channels: int) -> list[End]:
    """Follow a layer's output as ``layer_ends`` follows a norm's.

    Where the channels lie along the last axis (a linear layer over tokens), nothing that changes the shape is looked
    through: it would mix them.
    """
    start = End(node, channels=channels)
    if len(node.shape) == 2 or node.op is not Op.LINEAR:
        return list(_walk(graph, start, lambda at, user: _activate_smoothly(at, user) or _activate(at, user)))
    return list(_walk(graph, start, _activate_tokens, lambda user: user.op is Op.IDENTITY and user.shape == node.shape))


def _walk(
    graph: Graph, at: End, step: Callable[[End, Node], End | None], keeps: Callable[[Node], bool] = keeps_channels
) -> Iterator[End]:
    for user in graph.users[at.node.name]:
        if keeps(user):
            raw = at.raw and user.op is Op.IDENTITY
            after: End | None = End(user, at.activation, at.repeat, at.offset, at.channels, raw)
        else:
            after = step(at, user)
        if after is None:
            yield End(user, at.activation, at.repeat, at.offset, at.channels, at.raw)
        else:
            yield from _walk(graph, after, step, keeps)


def _activate(at: End, user: Node) -> End | None:
    if user.op in ACTIVATIONS and at.activation in (Op.IDENTITY, user.op) and user.op is not Op.LEAKY_RELU:
        return End(user, user.op, at.repeat, at.offset, at.channels, False)
    if user.op is Op.LEAKY_RELU and at.activation is Op.IDENTITY:
        return End(user, user.op, at.repeat, at.offset, at.channels, False)
    if user.op is Op.FLATTEN:
        space = prod(at.node.shape[2:])
        return End(user, at.activation, at.repeat * space, at.offset, at.channels * space, False)
    return None


def _activate_smoothly(at: End, user: Node) -> End | None:
    if user.op in SMOOTH and at.activation is Op.IDENTITY:
        return End(user, user.op, at.repeat, at.offset, at.channels, False)
    return None


def _activate_tokens(at: End, user: Node) -> End | None:
    return None if user.op is Op.FLATTEN else _activate_smoothly(at, user) or _activate(at, user)


def _concatenate(graph: Graph, at: End, user: Node) -> End | None:
    if user.op is not Op.CAT or user.inputs.count(at.node.name) != 1:
        return None
    before = user.inputs[: user.inputs.index(at.node.name)]
    offset = at.offset + sum(graph.by_name[name].shape[1] for name in before)
    return End(user, at.activation, at.repeat, offset, user.shape[1], False)


def reads_input(graph: Graph) -> set[str]:
    """Names of the layers whose input is the graph's input, with no layer between (the stem)."""
    raw: set[str] = set()
    stems = set()
    for node in graph.nodes:
        untouched = node.op is Op.INPUT or (bool(node.inputs) and all(name in raw for name in node.inputs))
        if untouched and node.layer is not None:
            stems.add(node.layer.name)
        elif untouched:
            raw.add(node.name)
    return stems


def reaches_output(graph: Graph) -> set[str]:
    """Names of the layers whose output becomes the graph's output with no layer between (the classifier)."""
    open_end: set[str] = set()
    last = set()
    for node in reversed(graph.nodes):
        reached = node.op is Op.OUTPUT or node.name in open_end
        if reached and node.layer is not None:
            last.add(node.layer.name)
        elif reached:
            open_end.update(node.inputs)
    return last


def behind_depthwise(graph: Graph, node: Node) -> bool:
    """Whether a depthwise layer feeds ``node`` with no other layer between (gates and sums are looked through)."""
    before, seen = list(node.inputs), set()
    while before:
        name = before.pop()
        if name in seen:
            continue
        seen.add(name)
        source = graph.by_name[name]
        if source.layer is None:
            before.extend(source.inputs)
        elif source.layer.depthwise:
            return True
    return False
