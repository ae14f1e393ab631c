from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own convention
from dfmpc.errors import UnsupportedModelError
from dfmpc.models.capture import capture, capture_program
from dfmpc.models.graph import Graph, Node, Op
from torch import Tensor, nn


class Fn(nn.Module):
    """A function as a network, with modules it may use."""

    def __init__(self, function: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, **dict(self.named_children()))


def traced(function: Callable[..., Tensor], shape: tuple[int, ...] = (1, 4, 8, 8), **modules: nn.Module) -> Graph:
    return capture(Fn(function, **modules).eval(), shape)


def body(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op not in (Op.INPUT, Op.OUTPUT)]


def only(function: Callable[..., Tensor], shape: tuple[int, ...] = (1, 4, 8, 8), **modules: nn.Module) -> Node:
    (node,) = body(traced(function, shape, **modules))
    return node


@pytest.mark.parametrize(
    ("layer", "shape", "op", "taps", "channels"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1), (1, 4, 9), Op.CONV, 3, (4, 6)),
        (nn.Conv2d(4, 6, (3, 5), groups=2), (1, 4, 8, 8), Op.CONV, 15, (4, 6)),
        (nn.Conv2d(4, 8, 3, groups=4), (1, 4, 8, 8), Op.CONV, 9, (4, 8)),
        (nn.Conv2d(4, 8, 3, padding="same", bias=False), (1, 4, 8, 8), Op.CONV, 9, (4, 8)),
        (nn.Conv3d(4, 6, 2), (1, 4, 5, 5, 5), Op.CONV, 8, (4, 6)),
        (nn.ConvTranspose1d(4, 6, 3), (1, 4, 9), Op.CONV_TRANSPOSE, 3, (4, 6)),
        (nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), (1, 4, 8, 8), Op.CONV_TRANSPOSE, 4, (4, 6)),
        (nn.ConvTranspose3d(4, 6, 2), (1, 4, 5, 5, 5), Op.CONV_TRANSPOSE, 8, (4, 6)),
        (nn.Linear(4, 6), (2, 4), Op.LINEAR, 1, (4, 6)),
        (nn.Linear(4, 6, bias=False), (2, 7, 4), Op.LINEAR, 1, (4, 6)),
    ],
    ids=lambda value: str(value) if isinstance(value, (tuple, Op)) else None,
)
def test_weight_layers(layer: nn.Module, shape: tuple[int, ...], op: Op, taps: int, channels: tuple[int, int]) -> None:
    node = only(lambda x, net: net(x), shape, net=layer)
    assert node.op is op
    assert node.layer is not None
    assert (node.layer.name, node.layer.weight) == ("net", "net.weight")
    assert node.layer.bias == ("net.bias" if layer.bias is not None else None)
    assert (node.layer.taps, (node.layer.in_channels, node.layer.out_channels)) == (taps, channels)
    assert node.layer.groups == getattr(layer, "groups", 1)
    assert node.layer.params == layer.weight.numel()
    assert node.shape == tuple(layer(torch.zeros(shape)).shape)


def test_stride_and_padding() -> None:
    node = only(lambda x, net: net(x), net=nn.Conv2d(4, 6, 3, stride=2, padding=(1, 0)))
    assert node.layer is not None
    assert (node.layer.stride, node.layer.padding) == ((2, 2), (1, 0))
    same = only(lambda x, net: net(x), net=nn.Conv2d(4, 6, 3, dilation=2, padding="same"))
    assert same.layer is not None
    assert (same.layer.stride, same.layer.padding) == ((1, 1), (2, 2))


def test_norm() -> None:
    node = only(lambda x, net: net(x), net=nn.BatchNorm2d(4, eps=0.25))
    assert node.op is Op.BATCH_NORM
    assert node.norm is not None
    assert (node.norm.name, node.norm.weight, node.norm.bias) == ("net", "net.weight", "net.bias")
    assert (node.norm.running_mean, node.norm.running_var) == ("net.running_mean", "net.running_var")
    assert (node.norm.eps, node.norm.channels) == (0.25, 4)
    plain = only(lambda x, net: net(x), net=nn.BatchNorm2d(4, affine=False))
    assert plain.norm is not None
    assert (plain.norm.weight, plain.norm.bias) == (None, None)


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (F.relu, Op.RELU),
        (lambda x: x.clamp(min=0), Op.RELU),
        (F.relu6, Op.RELU6),
        (lambda x: F.hardtanh(x, 0.0, 6.0), Op.RELU6),
        (lambda x: x.clamp(0, 6), Op.RELU6),
        (lambda x: F.hardtanh(x, -1.0, 1.0), Op.OTHER),
        (lambda x: x.clamp(0, 1), Op.OTHER),
        (F.silu, Op.SILU),
        (lambda x: F.silu(x, inplace=True), Op.SILU),
        (F.hardswish, Op.HARDSWISH),
        (F.hardsigmoid, Op.HARDSIGMOID),
        (torch.sigmoid, Op.SIGMOID),
        (torch.tanh, Op.TANH),
        (F.gelu, Op.GELU),
        (lambda x: F.gelu(x, approximate="tanh"), Op.GELU),
        (F.elu, Op.OTHER),
        (lambda x: x.clone(), Op.IDENTITY),
        (lambda x: x.detach(), Op.IDENTITY),
        (lambda x: F.dropout(x, 0.5, False), Op.IDENTITY),
        (lambda x: x[:, :, ::2], Op.IDENTITY),
        (lambda x: x[:, 1:3], Op.OTHER),
        (lambda x: x.double(), Op.OTHER),
        (lambda x: x + 1, Op.OTHER),
        (lambda x: x / 255, Op.OTHER),
        (lambda x: -x, Op.OTHER),
        (lambda x: x * x, Op.MUL),
        (lambda x: x / x, Op.OTHER),
        (lambda x: x.flatten(1), Op.FLATTEN),
        (lambda x: x.view(1, -1), Op.FLATTEN),
        (lambda x: x.reshape(1, 256), Op.FLATTEN),
        (lambda x: x.flatten(2), Op.IDENTITY),
        (lambda x: x.view(1, 2, 2, 8, 8), Op.OTHER),
        (lambda x: x.transpose(1, 2), Op.OTHER),
        (lambda x: F.pad(x, (1, 2, 1, 2)), Op.PAD),
        (lambda x: F.pad(x, (0, 0, 0, 0)), Op.IDENTITY),
        (lambda x: F.pad(x, (1, 1), value=1.0), Op.OTHER),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), Op.IDENTITY),
        (lambda x: torch.cat([x, x], 2), Op.OTHER),
        (lambda x: torch.cat([x, x], 1), Op.CAT),
        (lambda x: x + x, Op.ADD),
        (lambda x: torch.add(x, x, alpha=2), Op.OTHER),
    ],
)
def test_operators(function: Callable[[Tensor], Tensor], op: Op) -> None:
    assert only(function).op is op


@pytest.mark.parametrize(
    ("function", "op", "window"),
    [
        (lambda x: F.avg_pool2d(x, 2), Op.AVG_POOL, 4),
        (lambda x: F.avg_pool2d(x, (2, 4)), Op.AVG_POOL, 8),
        (lambda x: F.max_pool2d(x, 3, 2, 1), Op.MAX_POOL, 9),
        (lambda x: F.adaptive_avg_pool2d(x, 1), Op.AVG_POOL, 64),
        (lambda x: F.adaptive_avg_pool2d(x, 2), Op.AVG_POOL, 16),
        (lambda x: x.mean((2, 3)), Op.AVG_POOL, 64),
        (lambda x: x.mean((-1, -2), keepdim=True), Op.AVG_POOL, 64),
        (lambda x: x.amax((2, 3)), Op.MAX_POOL, 64),
        (lambda x: x.mean(1), Op.OTHER, 1),
        (lambda x: x.mean(), Op.OTHER, 1),
    ],
)
def test_pools(function: Callable[[Tensor], Tensor], op: Op, window: int) -> None:
    node = only(function)
    assert (node.op, node.window) == (op, window)


def test_tuples_are_unpacked() -> None:
    graph = traced(lambda x: F.adaptive_max_pool2d(x, 2, return_indices=True)[0].relu())
    pool, relu = body(graph)
    assert (pool.op, pool.window, pool.shape) == (Op.MAX_POOL, 16, (1, 4, 2, 2))
    assert relu.inputs == (pool.name,)
    first, second = traced(lambda x: x.chunk(2, 1)[1].relu()).nodes[1:3]
    assert (first.op, second.op, second.shape) == (Op.OTHER, Op.OTHER, (1, 2, 8, 8))


def test_leaky_relu_and_channel_padding() -> None:
    assert only(lambda x: F.leaky_relu(x, 0.25)).slope == 0.25
    node = only(lambda x: F.pad(x, (0, 0, 0, 0, 2, 3)))
    assert (node.op, node.channel_pad, node.shape) == (Op.PAD, (2, 3), (1, 9, 8, 8))
    spatial = only(lambda x: F.pad(x, (0, 1, 0, 1)))
    assert spatial.channel_pad == (0, 0)


def test_what_reads_a_tensor_after_an_in_place_operator_reads_its_result() -> None:
    def function(x: Tensor, conv: nn.Module) -> Tensor:
        y = conv(x)
        z = F.relu_(y)
        return conv(z) + y

    conv, relu, again, add = body(traced(function, conv=nn.Conv2d(4, 4, 1)))
    assert relu.inputs == (conv.name,)
    assert again.inputs == (relu.name,)
    assert add.inputs == (again.name, relu.name)
    assert (add.op, conv.layer) == (Op.ADD, again.layer)


def test_a_sum_with_itself_names_its_input_twice() -> None:
    node = only(lambda x: x + x)
    assert (node.op, node.inputs) == (Op.ADD, ("x", "x"))


def test_a_computed_weight_is_no_layer() -> None:
    node = body(traced(lambda x, net: F.conv2d(x, net.weight * 2), net=nn.Conv2d(4, 4, 1)))[-1]
    assert (node.op, node.layer, node.target) == (Op.OTHER, None, "aten.conv2d.default")
    sample = next(n for n in traced(lambda x, net: x + net.bias[:, None, None], net=nn.Conv2d(4, 4, 1)).nodes[1:])
    assert sample.op is Op.OTHER


def test_layer_names_are_unique() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.left), self.right)

    assert [layer.name for layer in capture(Two().eval(), (1, 4)).layers] == ["left", "right"]


def test_decomposed_programs_give_the_same_graph() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip
    program = torch.export.export(net, (torch.zeros(2, 3, 8, 8),), strict=False)
    plain, decomposed = capture_program(program), capture_program(program.run_decompositions())
    assert [node.op for node in plain.nodes] == [node.op for node in decomposed.nodes]
    assert [node.shape for node in plain.nodes] == [node.shape for node in decomposed.nodes]
    assert plain.layers == decomposed.layers
    assert [node.norm for node in plain.nodes] == [node.norm for node in decomposed.nodes]


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)], ids=["train", "none"]
)
def test_batch_statistics_are_refused(layer: nn.Module) -> None:
    net = nn.Sequential(layer)
    net.train(layer.track_running_stats)
    with pytest.raises(UnsupportedModelError, match=r"exported in training mode.*call \.eval\(\) before torch\.export"):
        capture(net, (2, 4, 8, 8))


def test_dropout_in_training_mode_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"dropout.* was exported in training mode"):
        capture(nn.Sequential(nn.Dropout(0.5)).train(), (2, 4))


def test_control_flow_on_values_is_refused_with_the_cause() -> None:
    with pytest.raises(UnsupportedModelError, match=r"torch\.export cannot capture Fn for an input of shape \[1, 4\]"):
        traced(lambda x: x if x.sum() > 0 else -x, (1, 4))


def test_two_inputs_are_refused() -> None:
    class Two(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return left + right

    program = torch.export.export(Two(), (torch.zeros(1, 4), torch.zeros(1, 4)), strict=False)
    with pytest.raises(UnsupportedModelError, match=r"2 tensor inputs \(left, right\): exactly one is supported"):
        capture_program(program)


def test_dynamic_space_is_refused_and_a_dynamic_batch_is_not() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    example = (torch.zeros(2, 3, 8, 8),)
    height = torch.export.export(net, example, dynamic_shapes=({2: torch.export.Dim("height", min=4)},), strict=False)
    with pytest.raises(UnsupportedModelError, match=r"dimension 2 of input .* is dynamic .*only the batch"):
        capture_program(height)
    batch = torch.export.export(net, example, dynamic_shapes=({0: torch.export.Dim("batch")},), strict=False)
    assert [node.shape for node in capture_program(batch).nodes] == [
        (1, 3, 8, 8), (1, 4, 6, 6), (1, 4, 1, 1), (1, 4), (1, 2), (1, 2),
    ]  # fmt: skip


def test_a_transformer_block_is_captured_without_norms() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            x = x + self.attention(y, y, y, need_weights=False)[0]
            return x + self.down(F.gelu(self.up(x)))

    graph = capture(Block().eval(), (1, 5, 8))
    names = [layer.name for layer in graph.layers]
    assert {"up", "down"} <= set(names)
    assert all(node.op is not Op.BATCH_NORM for node in graph.nodes)
    assert all(name in graph.by_name for node in graph.nodes for name in node.inputs)
