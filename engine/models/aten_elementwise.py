"""ATen calls element by element: activations, sums, products, scales and offsets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

from torch import fx

from .calls import Call, operator_name
from .graph import Affine, Node, Op
from .shapes import tensor_shape

_RESHAPES = {"reshape", "view", "_unsafe_view", "unsqueeze", "flatten"}


def activation(op: Op) -> Callable[[Call], Node]:
    """Return the handler of an activation without options."""
    return lambda call: call.make(op)


def clamp(call: Call) -> Node:
    """Bounds 0 and 6 are a ReLU6, 0 and none a ReLU."""
    low = call.args.get("min_val", call.args.get("min"))
    high = call.args.get("max_val", call.args.get("max"))
    if low != 0:
        return call.make(Op.OTHER)
    return call.make(Op.RELU if high is None else Op.RELU6 if high == 6 else Op.OTHER)


def leaky_relu(call: Call) -> Node:
    """Max(x, slope x)."""
    return call.make(Op.LEAKY_RELU, slope=float(call.args["negative_slope"]))


def add(call: Call) -> Node:
    """Sum of two activations of one shape, or an offset; other broadcasting makes it OTHER."""
    alpha = call.args.get("alpha", 1)
    if (offset := _number(call, "other")) is not None and _hidden(call):
        return call.make(Op.AFFINE, affine=Affine(offset=offset * alpha))
    if alpha != 1:
        return call.make(Op.OTHER)
    if bias := _parameter_beside(call):
        return call.make(Op.AFFINE, affine=Affine(bias=bias))
    return _binary(call, Op.ADD, call.input_shape("self") == call.input_shape("other"))


def subtract(call: Call) -> Node:
    """An activation less a number, or a number less an activation; anything else is OTHER."""
    less, number = _number(call, "other"), _number(call, "self")
    alpha = call.args.get("alpha", 1)
    if not _hidden(call) or (less is None and number is None):
        return call.make(Op.OTHER)
    affine = Affine(offset=-less * alpha) if less is not None else Affine(scale=-alpha, offset=number or 0.0)
    return call.make(Op.AFFINE, affine=affine)


def subtract_from(call: Call) -> Node:
    """``rsub``: a number less an activation."""
    return subtract(replace(call, args={**call.args, "self": call.args["other"], "other": call.args["self"]}))


def multiply(call: Call) -> Node:
    """Product of two activations of one shape or of a map and its gate, SiLU written out, or a scale."""
    if (scale := _number(call, "other")) is not None and _hidden(call):
        return call.make(Op.AFFINE, affine=Affine(scale=scale))
    if weight := _parameter_beside(call):
        return call.make(Op.AFFINE, affine=Affine(weight=weight))
    if source := _silu_source(call):
        return replace(call.make(Op.SILU), inputs=(source,))
    return _binary(call, Op.MUL, _gates(call.input_shape("self"), call.input_shape("other")))


def divide(call: Call) -> Node:
    """An activation over a number; anything else is OTHER."""
    divisor = _number(call, "other")
    if not divisor or not _hidden(call) or call.args.get("rounding_mode"):
        return call.make(Op.OTHER)
    return call.make(Op.AFFINE, affine=Affine(scale=1 / divisor))


def negate(call: Call) -> Node:
    """The sign turned: a scale of -1."""
    return call.make(Op.AFFINE, affine=Affine(scale=-1.0)) if _hidden(call) else call.make(Op.OTHER)


def _binary(call: Call, op: Op, fits: bool) -> Node:
    node = call.make(op)
    terms = (call.args["self"], call.args["other"])
    current = call.tracker.current
    inputs = tuple(current[term.name] for term in terms if isinstance(term, fx.Node) and term.name in current)
    return replace(node, inputs=inputs) if len(inputs) == 2 and fits else replace(node, op=Op.OTHER)


def _gates(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether the shapes agree, or one of them has a single value a channel of the other's."""
    if one == other:
        return True
    same_channels = len(one) == len(other) > 2 and one[:2] == other[:2]
    return same_channels and 1 in (prod(one[2:]), prod(other[2:]))


def _silu_source(call: Call) -> str | None:
    """Name of x in x * sigmoid(x)."""
    terms = (call.args["self"], call.args["other"])
    for x, gate in (terms, terms[::-1]):
        sigmoid = isinstance(gate, fx.Node) and operator_name(gate) == "sigmoid"
        if sigmoid and gate.args[0] is x and x.name in call.tracker.current:
            return call.tracker.current[x.name]
    return None


def _number(call: Call, argument: str) -> float | None:
    value = call.args.get(argument)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _hidden(call: Call) -> bool:
    """Whether no term is the network's input: what is done to that belongs to its normalisation."""
    return all(term.op != "placeholder" for term in call.node.all_input_nodes if term.name in call.tracker.current)


def _parameter_beside(call: Call) -> str | None:
    """Name of the tensor of one value a channel that meets one hidden activation in this call."""
    terms = [call.args["self"], call.args["other"]]
    parameters = [term for term in terms if isinstance(term, fx.Node) and term.name not in call.tracker.current]
    if len(parameters) != 1 or not _hidden(call) or not call.shape:
        return None
    return _per_channel(call, parameters[0])


def _per_channel(call: Call, node: fx.Node) -> str | None:
    given = tensor_shape(node)
    shape = (1,) * (len(call.shape) - len(given)) + given
    count = prod(shape)
    while node.name not in call.tracker.state:
        if operator_name(node) not in _RESHAPES or not isinstance(node.args[0], fx.Node):
            return None
        node = node.args[0]
    along = [axis for axis, size in enumerate(shape) if size > 1]
    fits = len(shape) > 1 and along in ([1], [len(shape) - 1]) and count == call.shape[along[0]]
    return call.tracker.state[node.name] if fits else None
