"""The exact ternary rule: no worse than any other threshold, ties by hand, and the kernel equal to the reference."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from dfmpc.errors import NonFiniteError
from dfmpc.kernels import Grid, Quantized, dequantize, optimum, ternary, unpack
from dfmpc.kernels.optimum import (
    LONGEST,
    optimal_thresholds_reference,
    optimal_thresholds_triton,
    optimum_shape,
    thresholds_batch,
)
from dfmpc.kernels.segments import code_format
from dfmpc.kernels.table import Batch
from dfmpc.kernels.ternary import ternary_reference, ternary_triton
from torch import Tensor

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def random_rows(rows: int, length: int) -> Tensor:
    return torch.randn(rows, length, generator=torch.Generator().manual_seed(1000 * rows + length))


def error(q: Quantized, weight: Tensor) -> Tensor:
    return (dequantize(q.format, q.codes, q.scale, None).double() - weight.double()).square().sum(1)


def least_error(row: Tensor) -> float:
    """Try every number of kept magnitudes, each with its best scale."""
    magnitude = row.double().abs().sort(descending=True).values
    sums = magnitude.cumsum(0)
    return float((magnitude.square().sum() - sums.square() / torch.arange(1, len(row) + 1)).min())


@pytest.mark.parametrize("length", [1, 2, 9, 64, 203])
def test_no_threshold_has_less_error(length: int) -> None:
    weight = random_rows(20, length)
    weight[0] = weight[0].abs().round()
    found = error(ternary(weight, group_size=length, rule="exact"), weight)
    best = torch.tensor([least_error(row) for row in weight], dtype=torch.float64)
    torch.testing.assert_close(found, best, rtol=1e-6, atol=1e-9)
    assert bool((found <= error(ternary(weight, group_size=length), weight) + 1e-9).all())


def test_by_hand() -> None:
    # (Σ)²/k of 6, 5, 1, 1: 36, 60.5, 48, 42.25: keep two, the scale is 5.5. Equal ones are kept together: of 3, 3, 3
    # all three; of 4, 1, 1, 1: 16, 12.5, 12, 12.25: one. Zeros are never kept.
    weight = torch.tensor([[6.0, -5, 1, 1], [3, -3, 3, 0], [1, 1, -4, 1], [0, 0, 0, 0]])
    q = ternary(weight, group_size=4, rule="exact")
    assert unpack(q.codes, 2, 4).tolist() == [[2, 0, 1, 1], [2, 0, 2, 1], [1, 1, 0, 1], [1, 1, 1, 1]]
    assert q.scale.flatten().tolist() == [5.5, 3.0, 4.0, 0.0]


def test_layer_wise_takes_one_optimum_for_all_rows() -> None:
    weight = random_rows(7, 33) * torch.linspace(0.1, 2, 7)[:, None]
    q = ternary(weight, group_size=33, layer_wise=True, rule="exact")
    assert q.scale.shape == (1, 1)
    assert float(error(q, weight).sum()) == pytest.approx(least_error(weight.flatten()), rel=1e-6)


@pytest.mark.parametrize("layer_wise", [False, True])
@pytest.mark.parametrize(
    ("rows", "length", "group_size"), [(5, 1, 1), (70, 9, 9), (3, 75, 24), (4, 64, 16), (2, 131, 131)]
)
def test_the_kernel_equals_its_reference(
    rows: int, length: int, group_size: int, layer_wise: bool, device: str
) -> None:
    weight = random_rows(rows, length)
    weight[0], weight[1, 0] = 0.0, 2.0**-149
    options = {"group_size": group_size, "layer_wise": layer_wise, "rule": "exact"}
    found, expected = ternary_triton(weight.to(device), **options), ternary_reference(weight, **options)
    for name in ("codes", "scale", "dot", "quantized_norm", "original_norm", "zeros"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name


def test_the_order_of_a_row_changes_nothing_but_the_order_of_its_codes() -> None:
    weight = random_rows(6, 300) * torch.logspace(-8, 0, 300)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    a, b = (ternary(w, group_size=300, rule="exact") for w in (weight, weight[:, order]))
    assert torch.equal(a.scale, b.scale)
    assert torch.equal(unpack(a.codes, 2, 300)[:, order], unpack(b.codes, 2, 300))


@pytest.mark.parametrize("value", [math.nan, -math.inf], ids=str)
def test_what_is_not_finite_is_refused(value: float, device: str) -> None:
    weight = random_rows(4, 40)
    weight[2, 39] = value
    for run, there in ((ternary_reference, weight), (ternary_triton, weight.to(device))):
        for layer_wise in (False, True):
            with pytest.raises(NonFiniteError, match=r"1 of 4 weight rows hold NaN or Inf, the first is row 2"):
                run(there, group_size=40, layer_wise=layer_wise, rule="exact")


MOST = torch.finfo(torch.float32).max


def assert_thresholds(weight: Tensor, group_size: int, device: str) -> Tensor:
    """Hold the kernel's thresholds against the reference's and return them."""
    format = code_format(weight, Grid.TERNARY, 2, group_size, layer_wise=False)
    found = optimal_thresholds_triton(weight.to(device), format).cpu()
    assert torch.equal(found, optimal_thresholds_reference(weight, format))
    return found


def test_of_equal_objectives_the_least_k_counts(device: str) -> None:
    # (Σ)²/k of 3, 1, 1, 1 is 9, 8, 8.3, 9, of 3 and eight times 0.75 it is 9 for 1 and for 9: one is kept.
    weight = torch.tensor([[3.0, 1, -1, 1, *[0] * 5], [-0.75] * 4 + [3] + [0.75] * 4])
    assert assert_thresholds(weight, 9, device).flatten().tolist() == [1.0, 0.75]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_all_rows_of_few_magnitudes(length: int, device: str) -> None:
    rows = list(itertools.product((0.0, -1.0, 2.0, 3.0), repeat=min(length, 4)))
    weight = torch.tensor(rows)
    if length > 4:
        weight = torch.cat([weight, torch.linspace(-3, 3, len(rows))[:, None].round()], 1)
    assert_thresholds(weight, length, device)


@pytest.mark.parametrize("length", range(6, 34))
def test_thresholds_of_short_rows_with_many_ties(length: int, device: str) -> None:
    weight = (random_rows(6, length) * 2).round() / 4
    weight[2], weight[3], weight[4] = 0.0, -1.0, random_rows(1, length)[0] * 2.0**-140
    assert_thresholds(weight, length, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_thresholds_of_every_type_of_groups_and_of_views(dtype: torch.dtype, device: str) -> None:
    weight = random_rows(3, 75).to(dtype)
    assert assert_thresholds(weight, 24, device).shape == (3, 4)
    assert_thresholds(random_rows(40, 5).to(dtype).T, 40, device)
    assert_thresholds(random_rows(2, 80).to(dtype)[:, 3:67], 16, device)


def test_largest_and_smallest_magnitudes_of_float32(device: str) -> None:
    weight = random_rows(4, 20).sign() * torch.tensor([MOST, 1e-38, 2.0**-149, 1.0])[:, None]
    weight[3, ::2] = MOST
    assert_thresholds(weight, 20, device)


@pytest.mark.slow
@pytest.mark.parametrize("length", [300, 1031, 4608])
def test_thresholds_of_longer_rows(length: int, device: str) -> None:
    assert_thresholds(random_rows(1, length), length, device)


def test_tensors_go_by_the_power_of_two_that_holds_their_segments(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tensors and four lengths of segments, of which two share a launch; what is too long is torch's."""
    monkeypatch.setattr(optimum, "LONGEST", 32)
    launched, launch = [], optimum._launch
    monkeypatch.setattr(optimum, "_launch", lambda *these: launched.append(these[1].block) or launch(*these))
    batch, expected = Batch(), []
    for weight, group_size in ((random_rows(3, 9), 9), (random_rows(2, 75), 32), (random_rows(2, 40), 40)):
        format = code_format(weight, Grid.TERNARY, 2, group_size, layer_wise=False)
        batch.add(weight.to(device), format)
        expected.append(optimal_thresholds_reference(weight, format).flatten())
    assert torch.equal(thresholds_batch(batch).cpu(), torch.cat(expected))
    assert sorted(launched) == [16, 32]


def test_what_is_not_finite_leaves_other_rows_alone(device: str) -> None:
    weight = random_rows(5, 12)
    weight[1, 3], weight[3, 0] = math.nan, math.inf
    format = code_format(weight, Grid.TERNARY, 2, 12, layer_wise=False)
    found = optimal_thresholds_triton(weight.to(device), format).cpu()
    assert torch.equal(found[::2], optimal_thresholds_reference(weight[::2], format))


@pytest.mark.parametrize("length", [1, 9, 64, 576, 4096, LONGEST])
def test_a_program_has_room_for_its_segments(length: int) -> None:
    shape = optimum_shape(1 << 20, length)
    assert shape.block >= length
    assert shape.block & (shape.block - 1) == 0
    elements = shape.rows * shape.block // (32 * shape.num_warps)
    assert elements == (16 if shape.block == 8192 else 8)
    assert optimum_shape(1, length).rows == 1
