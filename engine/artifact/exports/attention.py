"""Attention over tokens without an axis of heads, which ONNX's translation wants to see."""

from __future__ import annotations

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.fx.node import Argument

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def with_heads(program: ExportedProgram) -> None:
    """Give every scaled_dot_product_attention on [N, T, D] an axis of one head before it, and take it away after."""
    for node in list(program.graph.nodes):
        if node.target is _ATTENTION and all(_dims(argument) == 3 for argument in node.args[:3]):
            _wrap(program.graph, node)
    program.graph_module.recompile()


def _dims(argument: object) -> int:
    return argument.meta["val"].dim() if isinstance(argument, fx.Node) else 0


def _wrap(graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_before(node):
        heads = [_call(graph, torch.ops.aten.unsqueeze.default, argument, 1) for argument in node.args[:3]]
    after = list(node.users)
    node.args = (*heads, *(_mask(graph, node, argument) for argument in node.args[3:4]), *node.args[4:])
    node.meta["val"] = node.meta["val"].unsqueeze(1)
    with graph.inserting_after(node):
        result = _call(graph, torch.ops.aten.squeeze.dim, node, 1)
    for user in after:
        user.replace_input_with(node, result)


def _mask(graph: fx.Graph, node: fx.Node, mask: Argument) -> Argument:
    if _dims(mask) != 3:
        return mask
    with graph.inserting_before(node):
        return _call(graph, torch.ops.aten.unsqueeze.default, mask, 1)


def _call(graph: fx.Graph, target: torch._ops.OpOverload, argument: object, axis: int) -> fx.Node:
    assert isinstance(argument, fx.Node)
    made = graph.call_function(target, (argument, axis))
    made.meta["val"] = target(argument.meta["val"], axis)
    return made
