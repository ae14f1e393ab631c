"""How channel moments travel: every operator's rule, and what reaches a norm behind several layers."""

from __future__ import annotations

import torch
from dfmpc.compress.gaussian import Moments, relu
from dfmpc.compress.readers import direct_readers, heard_by_norms
from dfmpc.compress.state import State, image_state, propagate
from dfmpc.models.graph import Graph, Layer, Node, Norm, Op
from torch import Tensor


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


MOVED = State(vector(0.5, -1), vector(1, 4), vector(0.25, 0), vector(2, 4))


def node(op: Op, shape: tuple[int, ...], **fields: object) -> Node:
    return Node("n", op, ("x",), shape, **fields)


def test_an_activation_takes_both_networks_moments() -> None:
    found = propagate(node(Op.RELU, (1, 2, 4, 4)), [MOVED], 0.5)
    original, quantized = relu(Moments(MOVED.mean, MOVED.variance)), relu(Moments(vector(0.75, -1), vector(2, 4)))
    assert torch.equal(found.mean, original.mean)
    assert torch.equal(found.shift, quantized.mean - original.mean)
    assert torch.equal(found.quantized_variance, quantized.variance)
    assert found.shift[1] == 0
    assert found.lower == 0


def test_additions_add_and_concatenations_concatenate() -> None:
    summed = propagate(node(Op.ADD, (1, 2, 4, 4)), [MOVED, MOVED], 0.5)
    assert summed.mean.tolist() == [1, -2]
    assert summed.shift.tolist() == [0.5, 0]
    assert summed.quantized_variance.tolist() == [4, 8]
    joined = propagate(node(Op.CAT, (1, 4, 4, 4)), [MOVED, MOVED], 0.5)
    assert joined.variance.tolist() == [1, 4, 1, 4]


def test_averages_keep_the_mean_and_shrink_the_variance() -> None:
    found = propagate(node(Op.AVG_POOL, (1, 2, 2, 2), window=4), [MOVED], 0.5)
    assert found.mean.tolist() == [0.5, -1]
    assert found.variance.tolist() == [0.625, 2.5]  # 0.5 + 0.5 / 4 of it


def test_padded_channels_are_zero_and_flattened_ones_repeat() -> None:
    padded = propagate(node(Op.PAD, (1, 4, 4, 4), channel_pad=(1, 1)), [MOVED], 0.5)
    assert padded.mean.tolist() == [0, 0.5, -1, 0]
    assert padded.variance.tolist() == [0, 1, 4, 0]
    flat = propagate(node(Op.FLATTEN, (1, 6)), [MOVED], 0.5)
    assert flat.mean.tolist() == [0.5, 0.5, 0.5, -1, -1, -1]


def test_an_unknown_operation_keeps_moments_where_the_channels_agree() -> None:
    assert propagate(node(Op.OTHER, (1, 2, 4, 4)), [MOVED], 0.5) is MOVED
    assert torch.equal(propagate(node(Op.OTHER, (1, 3, 4, 4)), [MOVED], 0.5).mean, image_state(3).mean)


def _conv(name: str, inputs: tuple[str, ...]) -> Node:
    layer = Layer(name, f"{name}.weight", None, Op.CONV, (2, 2, 1, 1))
    return Node(name, Op.CONV, inputs, (1, 2, 4, 4), layer=layer)


def test_norms_are_found_through_concatenations_and_heard_through_layers() -> None:
    norm = Norm("bn", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", 1e-5, 4)
    graph = Graph(
        (
            Node("x", Op.INPUT, (), (1, 2, 4, 4)),
            _conv("a", ("x",)),
            _conv("b", ("a",)),
            Node("cat", Op.CAT, ("a", "b"), (1, 4, 4, 4)),
            Node("bn", Op.BATCH_NORM, ("cat",), (1, 4, 4, 4), norm=norm),
            _conv("c", ("bn",)),
        )
    )
    assert heard_by_norms(graph) == {"x", "a", "b", "cat"}
    assert [(reader.norm.name, reader.offset) for reader in direct_readers(graph, graph.by_name["b"])] == [("bn", 2)]
    assert direct_readers(graph, graph.by_name["c"]) == []
