"""Products, scales, offsets and norms of the values at hand, as capture sees them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own convention
from dfmpc.models.capture import capture, capture_program
from dfmpc.models.graph import Affine, Graph, LiveNorm, Node, Op
from torch import Tensor, nn


class Probe(nn.Module):
    """A function of a tensor that is not the network's input (whose scale belongs to its normalisation)."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.ones(4))
        self.map = nn.Parameter(torch.ones(4, 8, 8))
        self.layer_norm, self.group_norm = nn.LayerNorm(8, eps=0.5), nn.GroupNorm(2, 4, affine=False)
        self.instance_norm = nn.InstanceNorm2d(4, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x.clone())


def graphs(function: Callable[[nn.Module, Tensor], Tensor]) -> tuple[Graph, Graph]:
    """Return the graph of the program as exported and after decomposition."""
    program = torch.export.export(Probe(function).eval(), (torch.zeros(1, 4, 8, 8),), strict=False)
    return capture_program(program), capture_program(program.run_decompositions())


def last(graph: Graph) -> Node:
    return graph.nodes[-2]


@pytest.mark.parametrize(
    ("function", "affine"),
    [
        (lambda _, x: x * 2, Affine(scale=2)),
        (lambda _, x: 0.5 * x, Affine(scale=0.5)),
        (lambda _, x: x / 4, Affine(scale=0.25)),
        (lambda _, x: -x, Affine(scale=-1)),
        (lambda _, x: x + 3, Affine(offset=3)),
        (lambda _, x: torch.add(x, 3, alpha=2), Affine(offset=6)),
        (lambda _, x: x - 3, Affine(offset=-3)),
        (lambda _, x: 3 - x, Affine(scale=-1, offset=3)),
        (lambda net, x: net.scale[:, None, None] * x, None),
        (lambda net, x: x * net.scale.view(1, -1, 1, 1), Affine(weight="scale")),
        (lambda net, x: x + net.scale.reshape(4, 1, 1), Affine(bias="scale")),
    ],
    ids=["mul", "rmul", "div", "neg", "add", "add alpha", "sub", "rsub", "by index", "by view", "bias"],
)
def test_scales_and_offsets(function: Callable[[nn.Module, Tensor], Tensor], affine: Affine | None) -> None:
    for graph in graphs(function):
        node = last(graph)
        expected = affine or Affine(weight="scale")
        assert (node.op, node.affine) == (Op.AFFINE, expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda net, x: x * net.map,
        lambda net, x: x * net.scale[0],
        lambda net, x: x * torch.exp(net.scale).view(-1, 1, 1),
        lambda net, x: x + x * net.scale[:2].sum(),
        lambda _, x: x.mean(1, keepdim=True) * x,
        lambda _, x: x / x.sum(),
        lambda _, x: torch.div(x, 2, rounding_mode="floor"),
    ],
    ids=["a value a position", "one value", "computed", "computed sum", "gate over space", "own sum", "floor"],
)
def test_what_is_neither_a_scale_nor_a_gate(function: Callable[[nn.Module, Tensor], Tensor]) -> None:
    nodes = [node for graph in graphs(function) for node in graph.nodes]
    assert not {Op.AFFINE, Op.MUL} & {node.op for node in nodes}


def test_a_gate_multiplies_a_map_with_one_value_a_channel() -> None:
    for graph in graphs(lambda _, x: x.mean((2, 3), keepdim=True).sigmoid() * x):
        *_, pool, gate, product, _ = graph.nodes
        assert (pool.op, gate.op, product.op) == (Op.AVG_POOL, Op.SIGMOID, Op.MUL)
        assert product.inputs == (gate.name, "clone")


def test_silu_written_out_is_one_node() -> None:
    for function in (F.silu, lambda x: x * torch.sigmoid(x), lambda x: torch.sigmoid(x) * x):
        for graph in graphs(lambda _, x, f=function: f(x)):
            assert (last(graph).op, last(graph).inputs) == (Op.SILU, ("clone",))


@pytest.mark.parametrize(
    ("function", "norm"),
    [
        (lambda net, x: net.layer_norm(x), LiveNorm("layer_norm.weight", "layer_norm.bias", 0.5, 8)),
        (lambda net, x: net.group_norm(x), LiveNorm(None, None, 1e-5, 4, 2)),
    ],
    ids=["layer_norm", "group_norm"],
)
def test_live_norms(function: Callable[[nn.Module, Tensor], Tensor], norm: LiveNorm) -> None:
    for graph in graphs(function):
        node = last(graph)
        assert (node.op, node.live_norm, node.norm) == (Op.LIVE_NORM, norm, None)


def test_instance_norm_is_a_group_norm_of_single_channels() -> None:
    node = last(capture(Probe(lambda net, x: net.instance_norm(x)).eval(), (1, 4, 8, 8)))
    assert node.live_norm == LiveNorm("instance_norm.weight", "instance_norm.bias", 1e-5, 4, 4)


def test_a_layer_norm_over_more_than_the_last_axis_is_unknown() -> None:
    graph = capture(nn.Sequential(nn.ReLU(), nn.LayerNorm([4, 8, 8])).eval(), (1, 4, 8, 8))
    assert (last(graph).op, last(graph).live_norm) == (Op.OTHER, None)
