from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dfmpc.compress.rows import from_rows, scale_inputs, to_rows
from dfmpc.models.graph import Layer, Op
from torch import Tensor
from torch.nn import functional


def layer(op: Op, shape: tuple[int, ...], groups: int = 1) -> Layer:
    return Layer("body", "body.weight", None, op, shape, groups)


CASES = {
    "linear_5x7": layer(Op.LINEAR, (5, 7)),
    "conv1d_4x3x5": layer(Op.CONV, (4, 3, 5)),
    "conv_6x4x3x3": layer(Op.CONV, (6, 4, 3, 3)),
    "grouped_6x2x3x3_g3": layer(Op.CONV, (6, 2, 3, 3), 3),
    "depthwise_5x1x3x3": layer(Op.CONV, (5, 1, 3, 3), 5),
    "depthwise_multiplier_10x1x3x3_g5": layer(Op.CONV, (10, 1, 3, 3), 5),
    "transposed_4x6x2x3": layer(Op.CONV_TRANSPOSE, (4, 6, 2, 3)),
    "transposed_grouped_4x3x2x2_g2": layer(Op.CONV_TRANSPOSE, (4, 3, 2, 2), 2),
}


def forward(op: Op, x: Tensor, weight: Tensor, groups: int) -> Tensor:
    if op is Op.LINEAR:
        return functional.linear(x, weight)
    if op is Op.CONV_TRANSPOSE:
        return functional.conv_transpose2d(x, weight, groups=groups)
    call: Callable[..., Tensor] = functional.conv1d if weight.ndim == 3 else functional.conv2d
    return call(x, weight, groups=groups)


def random_weight(case: Layer) -> Tensor:
    return torch.randn(case.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_rows_come_back_as_stored(case: Layer) -> None:
    weight = random_weight(case)
    rows = to_rows(weight, case)
    assert rows.shape == (case.out_channels, case.length)
    assert rows.is_contiguous()
    assert torch.equal(from_rows(rows, case), weight)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_row_is_an_output_channel(case: Layer) -> None:
    weight = random_weight(case)
    rows = to_rows(weight, case).clone()
    rows[2] = 0
    x = torch.randn(2, case.in_channels, *(8,) * (weight.ndim - 2), dtype=torch.float64)
    full, cut = (forward(case.op, x, w, case.groups) for w in (weight, from_rows(rows, case)))
    assert cut[:, 2].abs().max() == 0
    others = [channel for channel in range(case.out_channels) if channel != 2]
    assert torch.allclose(cut[:, others], full[:, others], rtol=1e-12, atol=1e-12)
    assert full[:, 2].abs().max() > 0.1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_scaled_inputs_equal_scaled_weights(case: Layer) -> None:
    weight = random_weight(case)
    c = torch.arange(1, case.in_channels + 1, dtype=torch.float64)
    scaled = from_rows(scale_inputs(to_rows(weight, case), case, c), case)
    x = torch.randn(2, case.in_channels, *(8,) * (weight.ndim - 2), dtype=torch.float64)
    want = forward(case.op, x * c.reshape(1, -1, *(1,) * (weight.ndim - 2)), weight, case.groups)
    assert torch.allclose(forward(case.op, x, scaled, case.groups), want, rtol=1e-12, atol=1e-12)


def test_transposed_rows_by_hand() -> None:
    case = layer(Op.CONV_TRANSPOSE, (4, 1, 2), 2)
    weight = torch.tensor([[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]])
    assert to_rows(weight, case).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    scaled = scale_inputs(to_rows(weight, case), case, torch.tensor([1, 10, 100, 1000]))
    assert scaled.tolist() == [[0, 1, 20, 30], [400, 500, 6000, 7000]]
