"""Capture: a network (or a torch.export program) becomes a ``Graph`` of plain data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec

from ..errors import UnsupportedModelError
from .aten import translate
from .calls import Tracker
from .graph import Graph, Node, Op
from .shapes import tensor_shape

_STATE = (InputKind.PARAMETER, InputKind.BUFFER)


def capture(module: nn.Module, input_shape: tuple[int, ...]) -> Graph:
    """Export ``module`` (in eval mode) for one float32 input of ``input_shape`` and capture the program.

    Raises UnsupportedModelError where torch.export cannot follow the network or the network is in training mode.
    """
    return capture_program(export_program(module, input_shape))


def export_program(module: nn.Module, input_shape: tuple[int, ...]) -> ExportedProgram:
    """Return torch.export's program of ``module`` for one float32 input of ``input_shape``.

    Raises UnsupportedModelError with the first line of what torch.export said.
    """
    example = torch.zeros(input_shape, dtype=torch.float32)
    try:
        return torch.export.export(module, (example,), strict=False)
    except Exception as error:  # foreign forward code runs here and may raise anything
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnsupportedModelError(
            f"torch.export cannot capture {type(module).__name__} for an input of shape {list(input_shape)}: {cause}; "
            "check the model's 'input', or export it yourself with torch.export.save and name the .pt2 as 'program'"
        ) from error


def capture_program(program: ExportedProgram) -> Graph:
    """Return the ``Graph`` of a program in torch.export's training or inference IR.

    Weight layers and norms keep the names of ``program.state_dict``; tied tensors go by their first name. Shapes are
    those of the example input, with 1 for a dynamic batch. Raises UnsupportedModelError for a second input, a dynamic
    dimension other than the batch, and an export in training mode.
    """
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    canonical = canonical_names(program.state_dict)
    tracker = Tracker()
    nodes: list[Node] = []
    reads: Counter[str] = Counter()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            reads[canonical.get(specs[node.name].target or "", "")] += len(node.users)
            nodes.extend(_placeholder(node, specs[node.name], canonical, tracker))
        elif node.op == "call_function":
            nodes.extend(translate(node, tracker))
        elif node.op == "output":
            nodes.append(_output(node, tracker))
    _check_inputs(nodes)
    return Graph(tuple(nodes), {name: count for name, count in reads.items() if name})


def canonical_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Map every name of ``state`` to the first name of the same tensor, so that tied parameters share one."""
    first: dict[tuple[object, ...], str] = {}
    names = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        names[name] = first.setdefault(key, name) if tensor.numel() and tensor.data_ptr() else name
    return names


def _placeholder(node: fx.Node, spec: InputSpec, canonical: Mapping[str, str], tracker: Tracker) -> list[Node]:
    if spec.kind in _STATE and spec.target is not None and spec.target in canonical:
        tracker.state[node.name] = canonical[spec.target]
        tracker.state_shapes[canonical[spec.target]] = tensor_shape(node)
        return []
    if spec.kind is not InputKind.USER_INPUT:
        return []
    if isinstance(spec.arg, ConstantArgument) or not isinstance(node.meta.get("val"), Tensor):
        raise UnsupportedModelError(
            f"input {node.name} is not a tensor: only networks of one tensor input are supported; export a wrapper"
        )
    _check_static(node)
    tracker.current[node.name] = node.name
    return [Node(node.name, Op.INPUT, (), tensor_shape(node))]


def _check_static(node: fx.Node) -> None:
    for index, size in enumerate(node.meta["val"].shape):
        if index > 0 and not isinstance(size, int):
            raise UnsupportedModelError(
                f"dimension {index} of input {node.name} is dynamic ({size}): only the batch (dimension 0) may be; "
                "export again with a fixed size"
            )


def _check_inputs(nodes: list[Node]) -> None:
    inputs = [node.name for node in nodes if node.op is Op.INPUT]
    if len(inputs) != 1:
        raise UnsupportedModelError(
            f"the network has {len(inputs)} tensor inputs ({', '.join(inputs) or 'none'}): exactly one is supported"
        )


def _output(node: fx.Node, tracker: Tracker) -> Node:
    inputs = tuple(dict.fromkeys(tracker.current[n.name] for n in node.all_input_nodes if n.name in tracker.current))
    first = next((n for n in node.all_input_nodes if n.name in tracker.current), None)
    return Node(node.name, Op.OUTPUT, inputs, tensor_shape(first) if first is not None else ())
