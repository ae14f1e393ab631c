"""Translation of one ATen call into one ``Node``: a table from the operator's name to what it does."""

from __future__ import annotations

import operator
from collections.abc import Callable

from torch import Tensor, fx

from . import aten_elementwise as elementwise
from . import aten_layers as layers
from . import aten_plain as plain
from .calls import Call, Tracker, named_arguments, operator_name
from .graph import Node, Op
from .shapes import tensor_shape

FIRST_RESULT_ONLY = {
    "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_functional",
    "native_batch_norm",
    "native_layer_norm",
    "native_group_norm",
    "max_pool1d_with_indices",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
}
"""Operators that return a tuple of which only the first part is the activation."""


def _by_name(handler: Callable[[Call], Node], names: str) -> dict[str, Callable[[Call], Node]]:
    return dict.fromkeys(names.split(), handler)


HANDLERS: dict[str, Callable[[Call], Node]] = {
    **_by_name(layers.conv, "conv1d conv2d conv3d convolution"),
    **_by_name(layers.conv_transpose, "conv_transpose1d conv_transpose2d conv_transpose3d"),
    **_by_name(layers.linear, "linear"),
    **_by_name(layers.matmul, "addmm mm"),
    **_by_name(layers.batch_norm, "batch_norm _native_batch_norm_legit_no_training native_batch_norm"),
    **_by_name(layers.training_norm, "_native_batch_norm_legit _native_batch_norm_legit_functional"),
    **_by_name(layers.layer_norm, "layer_norm native_layer_norm"),
    **_by_name(layers.group_norm, "group_norm native_group_norm"),
    **_by_name(layers.instance_norm, "instance_norm"),
    **_by_name(elementwise.activation(Op.RELU), "relu relu_"),
    **_by_name(elementwise.activation(Op.RELU6), "relu6 relu6_"),
    **_by_name(elementwise.activation(Op.SILU), "silu silu_"),
    **_by_name(elementwise.activation(Op.GELU), "gelu gelu_"),
    **_by_name(elementwise.activation(Op.HARDSWISH), "hardswish hardswish_"),
    **_by_name(elementwise.activation(Op.HARDSIGMOID), "hardsigmoid hardsigmoid_"),
    **_by_name(elementwise.activation(Op.SIGMOID), "sigmoid sigmoid_"),
    **_by_name(elementwise.activation(Op.TANH), "tanh tanh_"),
    **_by_name(elementwise.clamp, "hardtanh hardtanh_ clamp clamp_ clamp_min clamp_min_"),
    **_by_name(elementwise.leaky_relu, "leaky_relu leaky_relu_"),
    **_by_name(plain.dropout, "dropout dropout_ feature_dropout feature_dropout_ alpha_dropout native_dropout"),
    **_by_name(elementwise.add, "add add_"),
    **_by_name(elementwise.subtract, "sub sub_"),
    **_by_name(elementwise.subtract_from, "rsub"),
    **_by_name(elementwise.multiply, "mul mul_"),
    **_by_name(elementwise.divide, "div div_"),
    **_by_name(elementwise.negate, "neg neg_"),
    **_by_name(plain.cat, "cat concat concatenate"),
    **_by_name(plain.identity, "clone contiguous detach detach_ alias lift_fresh_copy to _to_copy"),
    **_by_name(plain.slicing, "slice"),
    **_by_name(plain.reshape, "view reshape _unsafe_view flatten squeeze squeeze_ unsqueeze unsqueeze_ unflatten"),
    **_by_name(plain.pad, "pad constant_pad_nd"),
    **_by_name(plain.spatial_padding, "reflection_pad1d reflection_pad2d reflection_pad3d"),
    **_by_name(plain.spatial_padding, "replication_pad1d replication_pad2d replication_pad3d"),
    **_by_name(plain.mean, "mean"),
    **_by_name(plain.amax, "amax"),
    **_by_name(plain.avg_pool, "avg_pool1d avg_pool2d avg_pool3d"),
    **_by_name(plain.max_pool, "max_pool1d max_pool2d max_pool3d"),
    **_by_name(plain.max_pool, "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices"),
    **_by_name(plain.adaptive_avg_pool, "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"),
    **_by_name(plain.adaptive_avg_pool, "_adaptive_avg_pool2d _adaptive_avg_pool3d"),
    **_by_name(plain.adaptive_max_pool, "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d"),
}


def translate(node: fx.Node, tracker: Tracker) -> list[Node]:
    """Return the node for one call (none for an assertion or a size), and note in ``tracker`` where values lie now."""
    if node.target is operator.getitem:
        return _getitem(node, tracker)
    # What comes from parameters and constants alone is no activation.
    if not _yields_tensor(node) or not any(source.name in tracker.current for source in node.all_input_nodes):
        return []
    call = Call(node, named_arguments(node), tracker)
    handler = HANDLERS.get(operator_name(node))
    result = handler(call) if handler else call.make(Op.OTHER)
    tracker.current[node.name] = node.name
    if _in_place(node):
        _move(node, tracker)
    return [result]


def _getitem(node: fx.Node, tracker: Tracker) -> list[Node]:
    source, index = node.args
    assert isinstance(source, fx.Node)
    if operator_name(source) in FIRST_RESULT_ONLY and index == 0:
        tracker.current[node.name] = tracker.current[source.name]
        return []
    if source.name not in tracker.current or not _yields_tensor(node) or not node.users:
        return []
    tracker.current[node.name] = node.name
    inputs = (tracker.current[source.name],)
    return [Node(node.name, Op.OTHER, inputs, tensor_shape(node), target="getitem")]


def _yields_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return any(isinstance(item, Tensor) for item in values)


def _in_place(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema and schema.arguments and schema.arguments[0].alias_info and schema.arguments[0].is_write)


def _move(node: fx.Node, tracker: Tracker) -> None:
    written = node.args[0]
    if isinstance(written, fx.Node) and written.name in tracker.current:
        old = tracker.current[written.name]
        for name, holder in tracker.current.items():
            if holder == old:
                tracker.current[name] = node.name
