"""A layer's weight as rows, one an output channel: the form that kernels, codes and scales share."""

from __future__ import annotations

from torch import Tensor

from ..models.graph import Layer, Op


def to_rows(weight: Tensor, layer: Layer) -> Tensor:
    """Return ``weight`` (``layer.shape``, any dtype) as contiguous [out_channels, length].

    A row runs over the input channels of its group, taps innermost. A transposed convolution stores [I, O/g, *k]: its
    output axis moves to the front of each group. The result may share memory with ``weight``.
    """
    if layer.op is Op.CONV_TRANSPOSE:
        weight = weight.reshape(*_grouped(layer), layer.taps).transpose(1, 2)
    return weight.reshape(layer.out_channels, layer.length).contiguous()


def from_rows(rows: Tensor, layer: Layer) -> Tensor:
    """Return [out_channels, length] in the stored shape: the inverse of :func:`to_rows`."""
    if layer.op is Op.CONV_TRANSPOSE:
        groups, inputs, outputs = _grouped(layer)
        rows = rows.reshape(groups, outputs, inputs, layer.taps).transpose(1, 2)
    return rows.reshape(layer.shape).contiguous()


def scale_inputs(rows: Tensor, layer: Layer, input_scale: Tensor) -> Tensor:
    """Multiply [out_channels, length] by one factor an input channel (``input_scale``, [in_channels]).

    The rows of group k see the input channels k * I/g and up; where depthwise that is one factor a row.
    """
    inputs = layer.in_channels // layer.groups
    view = rows.reshape(layer.groups, layer.out_channels // layer.groups, inputs, layer.taps)
    return (view * input_scale.reshape(layer.groups, 1, inputs, 1)).reshape(rows.shape)


def _grouped(layer: Layer) -> tuple[int, int, int]:
    """Return groups, input channels a group and output channels a group of a transposed convolution."""
    return layer.groups, layer.in_channels // layer.groups, layer.out_channels // layer.groups
