"""One quantized layer as ONNX: its codes behind DequantizeLinear, and what turns that into the network's weight.

A grid becomes (docs/exports.md): ternary and symmetric scale·q; DoReFa step·q + step/2 with q = u − 2^(k−1), because
its zero point is a half-integer; asymmetric (u − zero_point)·scale. q are signed codes, u unsigned ones. An input
scale multiplies the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx
import torch
from dfmpc.kernels import Grid, pack, unpack
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn.functional import pad

from ...compress.rows import from_rows
from ...models.graph import Layer, Op
from ..manifest import PARTS, LayerEntry
from .report import StoredLayer

INT2_OPSET = 25
INT4_OPSET = 21
_TYPES = {
    (2, True): TensorProto.INT2,
    (2, False): TensorProto.UINT2,
    (4, True): TensorProto.INT4,
    (4, False): TensorProto.UINT4,
    (8, True): TensorProto.INT8,
    (8, False): TensorProto.UINT8,
}


@dataclass
class WeightNodes:
    """Nodes and initializers whose last result bears the weight's own name; ``stored`` tells of the codes."""

    stored: StoredLayer
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[onnx.TensorProto] = field(default_factory=list)


@dataclass(frozen=True)
class _Layout:
    """How codes lie in their tensor, and along which axis scales run."""

    codes: Tensor
    """uint8, in the stored shape, as rows, or as [rows, groups, group_size]."""
    axis: int | None
    """None: one scale for all."""
    block: int
    """Elements a scale along ``axis``; 0 where a scale has a whole slice."""
    scale_shape: tuple[int, ...]
    side_shape: tuple[int, ...]
    """Shape in which factors of the scale's number broadcast against the codes."""
    in_place: bool
    """Whether the codes have the weight's shape."""


def weight_nodes(entry: LayerEntry, parts: Mapping[str, Tensor], opset: int) -> WeightNodes:
    """Return the nodes that give ``entry``'s weight from ``parts`` (tensors ``<weight>.codes`` and so on).

    ``opset`` is 21 or more; below 25 codes of two bits are stored in four.
    """
    return _Writer(entry, parts, opset).write()


class _Writer:
    """Builds the chain of one weight; every tensor and node is named after it."""

    def __init__(self, entry: LayerEntry, parts: Mapping[str, Tensor], opset: int) -> None:
        self.entry, self.layer = entry, entry.layer
        self.codes, self.scale, self.zero_point, self.input_scale = (
            parts.get(f"{entry.weight}.{part}") for part in PARTS
        )
        self.signed = entry.grid is not Grid.ASYMMETRIC
        self.width = _width(entry.bits, opset)
        self.type = _TYPES[self.width, self.signed]
        stored = StoredLayer(
            entry.weight, entry.bits, TensorProto.DataType.Name(self.type), self.width, entry.rows * entry.length
        )
        self.made = WeightNodes(stored)
        self.value = ""

    def write(self) -> WeightNodes:
        assert self.codes is not None
        rows = unpack(self.codes, self.entry.bits, self.entry.length)
        layout = _layout(self.entry, rows)
        codes = self._packed("codes", layout.codes.to(torch.int16) - self._middle())
        self._dequantize(codes, layout)
        if not layout.in_place:
            self._to_shape(layout)
        if self.input_scale is not None:
            factors = input_factors(self.layer, self.input_scale)
            self._node("Mul", self.value, self._floats("input_scale", factors))
        self.made.nodes[-1].output[0] = self.entry.weight
        return self.made

    def _middle(self) -> int:
        """The code that stands for q = 0 of a signed grid."""
        if self.entry.grid is Grid.TERNARY:
            return 1
        return 2 ** (self.entry.bits - 1) if self.signed else 0

    def _dequantize(self, codes: str, layout: _Layout) -> None:
        assert self.scale is not None
        attributes = {} if layout.axis is None else {"axis": layout.axis}
        attributes |= {"block_size": layout.block} if layout.block else {}
        if self.entry.grid is Grid.ASYMMETRIC and not self._integer_zero_point():
            # these three operations in this order are dequantize()'s, so the result is the same bit for bit
            self._node("DequantizeLinear", codes, self._floats("one", torch.ones(())))
            self._node("Sub", self.value, self._side("zero_point", self.zero_point, layout))
            self._node("Mul", self.value, self._side("scale", self.scale, layout))
            return
        step = self.scale
        if self.entry.grid is Grid.DOREFA:
            step = (self.scale.double() * 2 / (2**self.entry.bits - 1)).float()
        inputs = [codes, self._floats("scale", step.reshape(layout.scale_shape))]
        if self.entry.grid is Grid.ASYMMETRIC:
            assert self.zero_point is not None
            inputs.append(self._packed("zero_point", self.zero_point.to(torch.int16).reshape(layout.scale_shape)))
        self._node("DequantizeLinear", *inputs, **attributes)
        if self.entry.grid is Grid.DOREFA:
            self._node("Add", self.value, self._side("offset", step / 2, layout))

    def _integer_zero_point(self) -> bool:
        """Whether DequantizeLinear's own zero points, which are codes, can hold ours."""
        assert self.zero_point is not None
        whole = self.zero_point == self.zero_point.round()
        return bool((whole & (self.zero_point >= 0) & (self.zero_point < 2**self.width)).all())

    def _to_shape(self, layout: _Layout) -> None:
        """Turn rows into the stored shape; padding of the last group goes first."""
        padded = layout.codes.numel() != self.entry.rows * self.entry.length
        if layout.codes.dim() == 3 and (padded or self.layer.op is Op.CONV_TRANSPOSE):
            self._node("Reshape", self.value, self._ints("rows", [self.entry.rows, -1]))
        if padded:
            bounds = [
                self._ints(name, [value]) for name, value in (("first", 0), ("last", self.entry.length), ("along", 1))
            ]
            self._node("Slice", self.value, *bounds)
        if self.layer.op is Op.CONV_TRANSPOSE:
            groups, inputs = self.layer.groups, self.layer.in_channels // self.layer.groups
            self._node("Reshape", self.value, self._ints("grouped", [groups, -1, inputs, self.layer.taps]))
            self._node("Transpose", self.value, perm=[0, 2, 1, 3])
        self._node("Reshape", self.value, self._ints("shape", list(self.layer.shape)))

    def _side(self, name: str, values: Tensor | None, layout: _Layout) -> str:
        assert values is not None
        return self._floats(name, values.reshape(layout.side_shape))

    def _node(self, operator: str, *inputs: str, **attributes: Any) -> None:
        name = f"{self.entry.weight}/{operator}_{len(self.made.nodes)}"
        self.made.nodes.append(helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        self.value = name

    def _floats(self, name: str, values: Tensor) -> str:
        return self._initializer(name, TensorProto.FLOAT, values.float())

    def _ints(self, name: str, values: list[int]) -> str:
        return self._initializer(name, TensorProto.INT64, torch.tensor(values, dtype=torch.int64))

    def _packed(self, name: str, codes: Tensor) -> str:
        """Add codes in two's complement, ``width`` bits each, the first in the lowest bits of a byte."""
        unsigned = (codes & (2**self.width - 1)).to(torch.uint8).reshape(1, -1)
        return self._initializer(name, self.type, pack(unsigned, self.width), tuple(codes.shape))

    def _initializer(self, name: str, kind: int, values: Tensor, shape: tuple[int, ...] | None = None) -> str:
        name = f"{self.entry.weight}.{name}"
        data = values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        dims = tuple(values.shape) if shape is None else shape
        self.made.initializers.append(helper.make_tensor(name, kind, dims, data, raw=True))
        return name


def _width(bits: int, opset: int) -> int:
    """Return the bits of the narrowest ONNX integer that holds codes of ``bits``."""
    if bits == 2 and opset >= INT2_OPSET:
        return 2
    return 4 if bits <= 4 else 8


def _layout(entry: LayerEntry, rows: Tensor) -> _Layout:
    layer, format = entry.layer, entry.format
    axis = _channel_axis(layer)
    if entry.layer_wise:
        return _Layout(from_rows(rows, layer), None, 0, (), (), True)
    if format.groups == 1 and axis is not None:
        side = [1] * len(layer.shape)
        side[axis] = entry.rows
        return _Layout(from_rows(rows, layer), axis, 0, (entry.rows,), tuple(side), True)
    if format.groups == 1:
        return _Layout(rows, 0, 0, (entry.rows,), (entry.rows, 1), False)
    scales, size = (entry.rows, format.groups), format.group_size
    if entry.grid in (Grid.TERNARY, Grid.SYMMETRIC):
        return _Layout(rows, 1, size, scales, scales, layer.shape == tuple(rows.shape) and axis == 0)
    # what is added or taken away a group must broadcast, so the groups get an axis of their own
    codes = pad(rows, (0, format.groups * size - entry.length)).reshape(*scales, size)
    return _Layout(codes, 2, size, (*scales, 1), (*scales, 1), False)


def _channel_axis(layer: Layer) -> int | None:
    """Return the axis of the stored weight that has one slice a row; None where no axis has."""
    if layer.op is not Op.CONV_TRANSPOSE:
        return 0
    if layer.groups == 1:
        return 1
    return 0 if layer.depthwise and layer.shape[1] == 1 else None


def input_factors(layer: Layer, input_scale: Tensor) -> Tensor:
    """Return one factor an input channel, [in_channels], in a shape that broadcasts against the stored weight."""
    ones = (1,) * (len(layer.shape) - 2)
    if layer.op is Op.CONV_TRANSPOSE:
        return input_scale.reshape(-1, 1, *ones)
    if layer.groups == 1:
        return input_scale.reshape(1, -1, *ones)
    inputs, outputs = layer.in_channels // layer.groups, layer.out_channels // layer.groups
    spread = input_scale.reshape(layer.groups, 1, inputs).expand(-1, outputs, -1)
    return spread.reshape(layer.out_channels, inputs, *ones)
