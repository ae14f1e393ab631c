"""Weight layers and norms among ATen calls: convolutions, linear layers, BatchNorm, LayerNorm, GroupNorm."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from ..errors import UnsupportedModelError
from .calls import EVAL_REMEDY, Call, operator_name, sizes
from .graph import Layer, LiveNorm, Node, Norm, Op
from .shapes import fixed


def _layer(call: Call, op: Op, groups: int = 1, stride: tuple[int, ...] = (), padding: tuple[int, ...] = ()) -> Node:
    weight = call.state_name("weight")
    if weight is None or not call.absent_or_state("bias"):
        return call.make(Op.OTHER)
    shape = call.tracker.state_shapes[weight]
    layer = Layer(_module_name(weight), weight, call.state_name("bias"), op, shape, groups, stride, padding)
    return call.make(op, layer=call.tracker.layers.setdefault(weight, layer))


def _module_name(weight: str) -> str:
    # A parameter of another name keeps it: in_proj_weight and a module's other matrices would clash otherwise.
    module, _, last = weight.rpartition(".")
    return module if last == "weight" and module else weight


def conv(call: Call) -> Node:
    """A convolution of one, two or three spatial axes, transposed where the argument of that name says so."""
    weight = call.state_name("weight")
    rank = len(call.input_shape()) - 2
    if weight is None or rank != len(call.tracker.state_shapes[weight]) - 2:
        return call.make(Op.OTHER)
    kernel = call.tracker.state_shapes[weight][2:]
    dilation = sizes(call.args["dilation"], rank)
    padding = call.args["padding"]
    if padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, kernel, strict=True)]
    elif padding == "valid":
        padding = [0]
    op = Op.CONV_TRANSPOSE if call.args.get("transposed") else Op.CONV
    return _layer(call, op, call.args["groups"], sizes(call.args["stride"], rank), sizes(padding, rank))


def conv_transpose(call: Call) -> Node:
    """A transposed convolution."""
    return conv(replace(call, args={**call.args, "transposed": True}))


def linear(call: Call) -> Node:
    """A matrix over the last axis."""
    return _layer(call, Op.LINEAR)


def matmul(call: Call) -> Node:
    """``addmm(bias, x, weight.t())`` and ``mm(x, weight.t())``: a linear layer after decomposition."""
    args, matrix = call.args, call.args["mat2"]
    transposed = isinstance(matrix, fx.Node) and operator_name(matrix) in {"t", "permute", "transpose"}
    plain = args.get("beta", 1) == 1 and args.get("alpha", 1) == 1
    if not transposed or not plain:
        return call.make(Op.OTHER)
    bias = args["self"] if "mat1" in args else None
    return _layer(replace(call, args={"weight": matrix.args[0], "bias": bias}), Op.LINEAR)


def batch_norm(call: Call) -> Node:
    """A BatchNorm on its running statistics; training mode is refused."""
    args = call.args
    if args.get("training"):
        raise UnsupportedModelError(
            f"BatchNorm {call.node.name} was exported in training mode (or keeps no running statistics): {EVAL_REMEDY}"
        )
    mean, var = call.state_name("running_mean"), call.state_name("running_var")
    if mean is None or var is None or not call.absent_or_state("weight", "bias"):
        return call.make(Op.OTHER)
    channels = call.tracker.state_shapes[mean][0]
    name = mean.rpartition(".")[0] or mean
    norm = Norm(name, call.state_name("weight"), call.state_name("bias"), mean, var, float(args["eps"]), channels)
    return call.make(Op.BATCH_NORM, norm=norm)


def training_norm(call: Call) -> Node:
    """A BatchNorm on batch statistics: refused."""
    return batch_norm(replace(call, args={**call.args, "training": True}))


def layer_norm(call: Call) -> Node:
    """A LayerNorm over the last axis; over more axes it mixes positions and is OTHER."""
    axes = call.args["normalized_shape"]
    return _live_norm(call, call.shape[-1], 1) if len(axes) == 1 and len(call.shape) > 1 else call.make(Op.OTHER)


def group_norm(call: Call) -> Node:
    """A GroupNorm of the channels (axis 1)."""
    return _live_norm(call, call.shape[1], fixed(call.args.get("num_groups") or call.args["group"]))


def instance_norm(call: Call) -> Node:
    """A GroupNorm of one channel a group; on running statistics it is OTHER."""
    if not call.args.get("use_input_stats"):
        return call.make(Op.OTHER)
    return _live_norm(call, call.shape[1], call.shape[1])


def _live_norm(call: Call, channels: int, groups: int) -> Node:
    if not call.absent_or_state("weight", "bias"):
        return call.make(Op.OTHER)
    eps = float(call.args["eps"])
    norm = LiveNorm(call.state_name("weight"), call.state_name("bias"), eps, channels, groups)
    return call.make(Op.LIVE_NORM, live_norm=norm)
