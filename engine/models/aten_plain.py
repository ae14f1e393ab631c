"""ATen calls without weights: pools, padding, reshapes, copies and concatenations."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from ..errors import UnsupportedModelError
from .calls import EVAL_REMEDY, Call, sizes
from .graph import Node, Op
from .shapes import fixed, reshape_op


def dropout(call: Call) -> Node:
    """Nothing in eval mode; training mode is refused."""
    if call.args.get("train") and call.args.get("p"):
        raise UnsupportedModelError(f"dropout {call.node.name} was exported in training mode: {EVAL_REMEDY}")
    return call.make(Op.IDENTITY)


def cat(call: Call) -> Node:
    """Concatenation along channels; with a parameter among the parts, or along another axis, OTHER."""
    parts = call.args["tensors"]
    axis = call.args["dim"] % max(1, len(call.shape))
    names = tuple(call.tracker.current.get(part.name, "") for part in parts)
    node = replace(call.make(Op.CAT), inputs=tuple(name for name in names if name))
    return node if axis == 1 and all(names) else replace(node, op=Op.OTHER)


def identity(call: Call) -> Node:
    """A copy, a detach or a conversion to the dtype it has."""
    source = call.args["self"]
    kept = source.meta["val"].dtype == call.node.meta["val"].dtype
    return call.make(Op.IDENTITY if kept and call.input_shape("self") == call.shape else Op.OTHER)


def slicing(call: Call) -> Node:
    """A slice of space only subsamples or crops."""
    before, after = call.input_shape("self"), call.shape
    return call.make(Op.IDENTITY if before[:2] == after[:2] and len(before) == len(after) else Op.OTHER)


def reshape(call: Call) -> Node:
    """View, reshape, flatten, squeeze and their like."""
    return call.make(reshape_op(call.input_shape("self"), call.shape))


def spatial_padding(call: Call) -> Node:
    """Reflection and replication repeat values of their own channel."""
    return call.make(Op.IDENTITY if call.input_shape("self")[:2] == call.shape[:2] else Op.OTHER)


def pad(call: Call) -> Node:
    """Padding by zeros of space or channels; other modes of space repeat values of their own channel."""
    if call.args.get("mode", "constant") != "constant":
        return spatial_padding(call)
    pads = [fixed(size) for size in call.args["pad"]]
    rank = len(call.input_shape("self"))
    if not any(pads):
        return call.make(Op.IDENTITY)
    pads += [0] * (2 * rank - len(pads))
    batch, channels = pads[2 * rank - 2 :], (pads[2 * rank - 4], pads[2 * rank - 3])
    if call.args.get("value") or rank < 2 or any(batch) or min(channels) < 0:
        return call.make(Op.OTHER)
    return call.make(Op.PAD, channel_pad=channels)


def mean(call: Call) -> Node:
    """A mean over exactly the spatial axes is an average pool of the whole map."""
    return _over_space(call, Op.AVG_POOL)


def amax(call: Call) -> Node:
    """A maximum over exactly the spatial axes is a max pool of the whole map."""
    return _over_space(call, Op.MAX_POOL)


def _over_space(call: Call, op: Op) -> Node:
    before = call.input_shape("self")
    axes = call.args.get("dim")
    axes = list(range(len(before))) if not axes and axes != 0 else axes
    axes = {axis % max(1, len(before)) for axis in (axes if isinstance(axes, (list, tuple)) else [axes])}
    if len(before) < 3 or axes != set(range(2, len(before))) or call.args.get("dtype"):
        return call.make(Op.OTHER)
    return call.make(op, window=prod(before[2:]))


def avg_pool(call: Call) -> Node:
    """A window of fixed size."""
    return _pool(call, Op.AVG_POOL)


def max_pool(call: Call) -> Node:
    """A window of fixed size."""
    return _pool(call, Op.MAX_POOL)


def _pool(call: Call, op: Op) -> Node:
    rank = len(call.shape) - 2
    if rank < 1 or call.args.get("divisor_override"):
        return call.make(Op.OTHER)
    return call.make(op, window=prod(sizes(call.args["kernel_size"], rank)))


def adaptive_avg_pool(call: Call) -> Node:
    """Windows that cut the map into the asked number of pieces."""
    return _adaptive(call, Op.AVG_POOL)


def adaptive_max_pool(call: Call) -> Node:
    """Windows that cut the map into the asked number of pieces."""
    return _adaptive(call, Op.MAX_POOL)


def _adaptive(call: Call, op: Op) -> Node:
    before, after = call.input_shape("self"), call.shape
    if len(before) != len(after) or len(before) < 3:
        return call.make(Op.OTHER)
    return call.make(op, window=max(1, prod(before[2:]) // max(1, prod(after[2:]))))
