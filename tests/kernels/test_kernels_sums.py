from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from dfmpc.kernels import row_statistics, tap_sums, tree_sum
from dfmpc.kernels.sums import above, exponents, fineness, power_of_two


def test_permuted_columns_leave_every_sum_the_same_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(20, 1237, generator=generator) * torch.logspace(-6, 3, 1237)
    expected = row_statistics(weight, 1237)
    for seed in range(5):
        order = torch.randperm(1237, generator=torch.Generator().manual_seed(seed))
        found = row_statistics(weight[:, order], 1237)
        for name in ("absmax", "minimum", "maximum", "abs_sum", "square_sum"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_sums_are_as_close_to_the_truth_as_promised() -> None:
    weight = torch.randn(4, 300, generator=torch.Generator().manual_seed(1))
    found = row_statistics(weight, 64)
    assert found.abs_sum.shape == (4, 5)
    for row in range(4):
        for group, start in enumerate(range(0, 300, 64)):
            exact = [abs(Fraction(v)) for v in weight[row, start : start + 64].tolist()]
            bound = 2 ** math.frexp(float(max(exact)))[1]
            # Half a unit of 2^-40 an element, and one rounding of the total to float64.
            assert abs(Fraction(found.abs_sum[row, group].item()) - sum(exact)) <= len(exact) * bound * 2.0**-41
            squares = sum(v * v for v in exact)
            assert abs(Fraction(found.square_sum[row, group].item()) - squares) <= len(exact) * bound**2 * 2.0**-41


def test_long_rows_are_summed_in_exact_runs() -> None:
    weight = torch.full((1, 20_001), 1.0)
    weight[0, ::2] = -3.0
    found = row_statistics(weight, 20_001)
    assert found.abs_sum.item() == 3 * 10_001 + 10_000
    assert found.square_sum.item() == 9 * 10_001 + 10_000


def test_fineness_falls_only_for_segments_above_four_million() -> None:
    assert [fineness(n) for n in (1, 2**22, 2**22 + 1, 2**23, 2**24)] == [40, 40, 39, 39, 38]


def test_exponents_bound_their_values_tightly() -> None:
    values = torch.tensor([1.0, 1.5, 2.0, 0.99, 2.0**-126, 3.4028234663852886e38])
    e = exponents(values)
    assert e.tolist() == [1, 1, 2, 0, -125, 128]
    assert bool((values.double() < power_of_two(e)).all())
    # Zero and denormals share the exponent of the least normal number.
    assert exponents(torch.tensor([0.0, 2.0**-149])).tolist() == [-125, -125]


def test_the_power_of_two_above_what_is_not_finite_is_finite() -> None:
    values = torch.tensor([0.0, 2.0**-149, 0.75, 1.0, 3.4028234663852886e38, math.inf, math.nan])
    assert above(values).tolist() == [2.0**e for e in (-125, -125, 0, 1, 128, 129, 129)]


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8, 100])
def test_tree_sum_adds_halves_of_a_power_of_two(n: int) -> None:
    def tree(values: list[float]) -> float:
        if len(values) == 1:
            return values[0]
        half = len(values) // 2
        return tree([a + b for a, b in zip(values[:half], values[half:], strict=True)])

    values = torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) * 10**9
    padded = values.tolist() + [0.0] * ((1 << (n - 1).bit_length()) - n)
    assert tree_sum(values, 0).item() == tree(padded)
    assert tree_sum(torch.stack([values, -values]), 1).tolist() == [tree(padded), -tree(padded)]


def test_tree_sum_of_nothing_is_zero() -> None:
    assert torch.equal(tree_sum(torch.zeros(0, 3), 0), torch.zeros(3, dtype=torch.float64))


def test_tap_sums_add_neighbours_from_left_to_right() -> None:
    weight = torch.tensor([[1.0, 1e8, -1e8, 0.5, 0.25, 0.125]])
    found = tap_sums(weight, 3)
    assert found.sums.tolist() == [[1.0, 0.875]]
    assert found.squares.tolist() == [[1.0 + 1e16 + 1e16, 0.328125]]


def test_taps_that_do_not_divide_the_row_are_refused() -> None:
    with pytest.raises(ValueError, match=r"taps is 4 for rows of 6; it must divide them"):
        tap_sums(torch.zeros(1, 6), 4)
