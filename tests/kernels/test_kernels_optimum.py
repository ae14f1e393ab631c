"""The exact ternary rule: no worse than any other threshold, ties by hand, and the kernel equal to the reference."""

from __future__ import annotations

import math

import pytest
import torch
from dfmpc.errors import NonFiniteError
from dfmpc.kernels import Quantized, dequantize, ternary, unpack
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
