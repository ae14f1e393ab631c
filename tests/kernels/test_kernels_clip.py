"""Scales that span a part of the range, and factors of input channels, of ``uniform``."""

from __future__ import annotations

import math

import pytest
import torch
from dfmpc.kernels import Grid, Quantized, dequantize, uniform, unpack
from dfmpc.kernels.uniform import uniform_reference, uniform_triton
from torch import Tensor

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

UNIFORM = [Grid.DOREFA, Grid.SYMMETRIC, Grid.ASYMMETRIC]
FIELDS = ("codes", "scale", "zero_point", "dot", "quantized_norm", "original_norm", "zeros")


def random_rows(rows: int, length: int) -> Tensor:
    return torch.randn(rows, length, generator=torch.Generator().manual_seed(1000 * rows + length))


def assert_same(found: Quantized, expected: Quantized) -> None:
    for name in FIELDS:
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        assert b is None or torch.equal(a.cpu(), b), name


def test_clips_by_hand() -> None:
    # Symmetric at 3 bits, half of max|w| = 6: scale 1, levels -3 to 3, 2.5 goes to 2, and 6 to the end.
    q = uniform(torch.tensor([[6.0, 2.5, -0.4, -4]]), 3, Grid.SYMMETRIC, group_size=4, clip=0.5)
    assert dequantize(q.format, q.codes, q.scale, None).tolist() == [[3.0, 2.0, 0.0, -3.0]]
    assert (q.dot.item(), q.quantized_norm.item(), q.zeros.item()) == (18 + 5 + 0 + 12, 9 + 4 + 9, 1)
    # Asymmetric at 2 bits, half of [-2, 4]: [-1, 2], scale 1.
    q = uniform(torch.tensor([[-2.0, 4, 0.25, 1]]), 2, Grid.ASYMMETRIC, group_size=4, clip=0.5)
    assert unpack(q.codes, 2, 4).tolist() == [[0, 3, 1, 2]]
    assert (q.scale.item(), q.zero_point.item()) == (1.0, 1.0)
    # DoReFa at 2 bits, half of 6: levels -3, -1, 1, 3.
    q = uniform(torch.tensor([[6.0, 1.5, -0.5, -5]]), 2, Grid.DOREFA, group_size=4, clip=0.5)
    assert dequantize(q.format, q.codes, q.scale, None).tolist() == [[3.0, 1.0, -1.0, -3.0]]


@pytest.mark.parametrize("grid", UNIFORM)
def test_statistics_are_those_of_the_clipped_values(grid: Grid) -> None:
    weight = random_rows(6, 50)
    q = uniform(weight, 4, grid, group_size=16, clip=0.6)
    values = dequantize(q.format, q.codes, q.scale, q.zero_point).double()
    assert float(values.abs().max()) < float(weight.abs().max())
    torch.testing.assert_close(q.dot, (values * weight.double()).sum(1), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(q.quantized_norm, values.square().sum(1), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(q.original_norm, weight.double().square().sum(1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("grid", UNIFORM)
@pytest.mark.parametrize("layer_wise", [False, True])
def test_no_clip_is_a_clip_of_one_and_a_constant_segment_stays_exact(grid: Grid, layer_wise: bool) -> None:
    weight = random_rows(4, 24)
    options = {"group_size": 24, "layer_wise": layer_wise}
    assert_same(uniform(weight, 5, grid, clip=1.0, **options), uniform(weight, 5, grid, **options))
    if grid is Grid.ASYMMETRIC:
        same = torch.full((2, 8), -0.37)
        q = uniform(same, 5, grid, clip=0.5, group_size=8, layer_wise=layer_wise)
        assert torch.equal(dequantize(q.format, q.codes, q.scale, q.zero_point), same)


@pytest.mark.parametrize("grid", UNIFORM)
@pytest.mark.parametrize("layer_wise", [False, True])
@pytest.mark.parametrize(("rows", "length", "group_size"), [(5, 1, 1), (70, 9, 9), (3, 75, 24), (4, 64, 16)])
def test_the_kernel_equals_its_reference(
    rows: int, length: int, group_size: int, layer_wise: bool, grid: Grid, device: str
) -> None:
    weight = random_rows(rows, length)
    weight[0], weight[1, 0] = 0.0, 2.0**-149
    factor = torch.linspace(0.3, 2, length)
    options = {"group_size": group_size, "layer_wise": layer_wise, "clip": 0.7, "factor": factor}
    assert_same(uniform_triton(weight.to(device), 3, grid, **options), uniform_reference(weight, 3, grid, **options))


@pytest.mark.parametrize("taps", [1, 9])
def test_a_factor_multiplies_input_channels_in_float32(taps: int, device: str) -> None:
    weight, factor = random_rows(4, 6 * taps).bfloat16(), torch.linspace(0.1, 3, 6)
    plain = torch.stack([weight.float()[:, i] * factor[i // taps] for i in range(6 * taps)], 1)
    expected = uniform(plain, 4, Grid.DOREFA, group_size=6 * taps)
    for run, there in ((uniform_reference, weight), (uniform_triton, weight.to(device))):
        assert_same(run(there, 4, Grid.DOREFA, group_size=6 * taps, factor=factor), expected)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"clip": 0.0}, r"clip is 0.0; use 0.01 to 1"),
        ({"clip": 1.5}, r"clip is 1.5; use 0.01 to 1"),
        ({"clip": math.nan}, r"clip is nan; use 0.01 to 1"),
        ({"factor": torch.ones(5)}, r"factor is torch.float32 with shape \(5,\) for rows of 8"),
        ({"factor": torch.ones(4, dtype=torch.float64)}, r"factor is torch.float64 with shape \(4,\) for rows of 8"),
    ],
)
def test_clips_and_factors_that_cannot_be_are_refused(options: dict[str, object], text: str) -> None:
    for run in (uniform_reference, uniform_triton):
        with pytest.raises(ValueError, match=text):
            run(torch.zeros(2, 8), 4, Grid.DOREFA, group_size=8, **options)
