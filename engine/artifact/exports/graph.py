"""The network as an ONNX model: torch.onnx's translation with the quantized weights' chains in the weights' places."""

from __future__ import annotations

import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import onnx
import torch
from onnx import helper
from torch import fx
from torch.export import ExportedProgram
from torch.onnx import OnnxExporterError, ONNXProgram

from ... import __version__
from ...errors import UnsupportedModelError
from ..manifest import Manifest
from .attention import with_heads
from .report import StoredLayer
from .source import Source, capture_source
from .weights import INT2_OPSET, INT4_OPSET, weight_nodes

_LARGEST = 2**31 - 2**20
"""A protobuf file ends at 2 GiB."""
_IR_VERSIONS = {INT4_OPSET: 10, INT2_OPSET: 13}
"""The IR version that came with an opset: a reader of the one reads the other."""


@dataclass(frozen=True)
class OnnxModel:
    """A checked ONNX model and what there is to say of it."""

    proto: onnx.ModelProto
    batch: int | None
    """None: any."""
    opset: int
    layers: tuple[StoredLayer, ...]

    @property
    def operators(self) -> dict[str, int]:
        """Operators and their number, by name."""
        return dict(sorted(Counter(node.op_type for node in self.proto.graph.node).items()))

    def to_bytes(self) -> bytes:
        """Return the file's content: the same model gives the same bytes."""
        content: bytes = self.proto.SerializeToString(deterministic=True)
        return content


def build_onnx(source: Source, opset: int | None = None) -> OnnxModel:
    """Return the artifact as an ONNX model with packed weights.

    ``opset`` is 21 or 25; by default 25 where a layer has two bits, else 21. Raises UnsupportedModelError for an
    operation that torch.onnx cannot translate (it names operation and layer) and for more than 2 GiB.
    """
    captured = capture_source(source)
    with_heads(captured.program)
    manifest = source.manifest
    opset = opset or (INT2_OPSET if any(entry.bits == 2 for entry in manifest.layers) else INT4_OPSET)
    proto = _skeleton(captured.program, {entry.weight for entry in manifest.layers}, source.first_names)
    layers = _add_weights(proto, source, opset)
    _settle(proto, manifest, opset)
    if proto.ByteSize() > _LARGEST:
        raise UnsupportedModelError(
            f"{manifest.model}: {proto.ByteSize()} bytes as ONNX, a file holds 2 GiB; use --format state-dict or pt2"
        )
    _check(proto)
    return OnnxModel(proto, captured.batch, opset, layers)


def _skeleton(program: ExportedProgram, quantized: set[str], first_names: Mapping[str, str]) -> onnx.ModelProto:
    """Return the translated program without the quantized weights' tensors."""
    with _quiet(), _naming(program):
        translated = torch.onnx.export(
            program, opset_version=INT4_OPSET, optimize=False, verbose=False, input_names=["input"]
        )
    assert translated is not None
    _simplify(translated)
    tensors = translated.model.graph.initializers
    for name in [name for name in tensors if first_names.get(name, name) in quantized]:
        del tensors[name]
    proto: onnx.ModelProto = translated.model_proto
    _one_name(proto, first_names)
    return proto


def _simplify(translated: ONNXProgram) -> None:
    """Fold what depends on constants alone; the network's own tensors, hidden as inputs, stay as they are."""
    graph = translated.model.graph
    hidden = {name: graph.initializers.pop(name) for name in list(graph.initializers)}
    inputs = len(graph.inputs)
    graph.inputs.extend(hidden.values())
    with _quiet():
        translated.optimize()
    del graph.inputs[inputs:]
    graph.initializers.update({name: value for name, value in hidden.items() if value.uses()})


def _one_name(proto: onnx.ModelProto, first_names: Mapping[str, str]) -> None:
    """Let every node read a tied tensor by its first name."""
    for node in proto.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = first_names.get(name, name)
    there = {tensor.name: tensor for tensor in proto.graph.initializer}
    kept: dict[str, onnx.TensorProto] = {}
    for name, tensor in there.items():
        tensor.name = first_names.get(name, name)
        kept.setdefault(tensor.name, tensor)
    tensors = list(kept.values())
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(tensors)


def _add_weights(proto: onnx.ModelProto, source: Source, opset: int) -> tuple[StoredLayer, ...]:
    """Put the chain of every quantized weight that is read before the network's nodes."""
    read = {name for node in proto.graph.node for name in node.input}
    nodes, layers = [], []
    for entry in source.manifest.layers:
        if entry.weight in read:
            made = weight_nodes(entry, source.parts(entry), opset)
            nodes += made.nodes
            proto.graph.initializer.extend(made.initializers)
            layers.append(made.stored)
    network = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes, *network])
    return tuple(layers)


def _settle(proto: onnx.ModelProto, manifest: Manifest, opset: int) -> None:
    """Set versions, names and provenance, and take out what differs from machine to machine."""
    # from 21 to 25 ONNX only added types to the operators that torch.onnx emits, so no node changes
    del proto.opset_import[:]
    proto.opset_import.append(helper.make_opsetid("", opset))
    proto.ir_version = _IR_VERSIONS[opset]
    proto.producer_name, proto.producer_version = "dfmpc", __version__
    proto.doc_string, proto.graph.doc_string, proto.graph.name = "", "", manifest.model
    del proto.graph.value_info[:], proto.graph.metadata_props[:], proto.metadata_props[:]
    for item in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        item.doc_string = ""
        del item.metadata_props[:]
    helper.set_model_props(
        proto, {"dfmpc.key": manifest.key, "dfmpc.model": manifest.model, "dfmpc.plan": str(manifest.plan["name"])}
    )
    _name_batch(proto)


def _check(proto: onnx.ModelProto) -> None:
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UnsupportedModelError(
            f"{proto.graph.name}: torch.onnx gave a graph that is no valid ONNX: {error}; "
            "use --format pt2 or state-dict"
        ) from error


def _name_batch(proto: onnx.ModelProto) -> None:
    first = proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*proto.graph.input, *proto.graph.output):
        for size in value.type.tensor_type.shape.dim:
            if first and size.dim_param == first:
                size.dim_param = "batch"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch.onnx says of its own insides off our users' screens."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def _naming(program: ExportedProgram) -> Iterator[None]:
    """Turn torch.onnx's errors into one that names operation and layer."""
    try:
        yield
    except OnnxExporterError as error:
        text = "\n".join(str(one) for one in _chain(error))
        found = re.search(r"node %(\w+) .*?target=(?:torch\.ops\.)?([\w.]+)\]\((?:args = \(%(\w+))?", text)
        operation = found[2] if found else "an operation"
        node = _find(program, found[1], found[3]) if found else None
        reason = next((line for line in str(_chain(error)[-1]).splitlines() if line), type(error).__name__)
        raise UnsupportedModelError(
            f"{operation} in layer {_layer_of(node)} cannot be written as ONNX: {reason:.300}; "
            "use --format pt2 or state-dict"
        ) from error


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    return chain


def _find(program: ExportedProgram, name: str, read: str | None) -> fx.Node | None:
    """Return the node ``name``; where torch.onnx made it out of another, the only one that reads ``read``, if any."""
    nodes: dict[str, fx.Node] = {node.name: node for node in program.graph.nodes}
    if name in nodes:
        return nodes[name]
    readers = list(nodes[read].users) if read in nodes else []
    return readers[0] if len(readers) == 1 else None


def _layer_of(node: fx.Node | None) -> str:
    """Return the qualified name of the module that ``node`` is part of."""
    stack = list((node.meta.get("nn_module_stack") or {}).values()) if node is not None else []
    name = str(stack[-1][0]) if stack else ""
    return f"{name or '(the network itself)'}" + (f" ({node.name})" if node is not None else "")
