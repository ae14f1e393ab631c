"""Scales chosen from the weight alone, against every choice there is."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from dfmpc.compress.feedback import values_of
from dfmpc.compress.scale_search import GridScale, Rounded, clip_search, nearest_levels, ternary_optimum
from dfmpc.kernels import Grid, dequantize, pack, uniform, unpack
from dfmpc.kernels.segments import code_format
from torch import Tensor

UNIFORM = [Grid.DOREFA, Grid.SYMMETRIC, Grid.ASYMMETRIC]


def random_rows(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, length, generator=torch.Generator().manual_seed(seed))


def squared_errors(rows: Tensor, rounded: Rounded) -> Tensor:
    return (rows - values_of(rounded)).square().sum(1)


def test_ternary_optimum_by_hand() -> None:
    # (Σ top k)²/k of 5 4 1 0: 25, 40.5, 33.3, 25; so k = 2 and a = 4.5. Of 3 3 3 3: 9, 18, 27, 36; k = 4, a = 3.
    found = ternary_optimum(torch.tensor([[-1.0, 5.0, 0.0, -4.0], [3.0, -3.0, 3.0, -3.0]]))
    assert found.levels.tolist() == [[1, 2, 1, 0], [2, 0, 2, 0]]
    assert found.scale.tolist() == [[4.5], [3.0]]


def test_ternary_optimum_beats_all_other_codes() -> None:
    rows = random_rows(5, 7)
    codes = torch.tensor(list(product([-1.0, 0.0, 1.0], repeat=7)))
    # with its best scale a code t leaves |w|² − <w, t>²/|t|²
    best = ((rows @ codes.T).square() / codes.square().sum(1).clamp(min=1)).amax(1)
    expected = rows.square().sum(1) - best
    torch.testing.assert_close(squared_errors(rows, ternary_optimum(rows)), expected, rtol=1e-4, atol=1e-5)


def test_ternary_optimum_of_groups_and_of_a_tensor_is_that_of_their_elements() -> None:
    rows = random_rows(3, 20)
    grouped = ternary_optimum(rows, group_size=8)
    assert grouped.scale.shape == (3, 3)
    for row, (first, last) in product(range(3), [(0, 8), (8, 16), (16, 20)]):
        alone = ternary_optimum(rows[row : row + 1, first:last].contiguous())
        assert torch.equal(grouped.levels[row, first:last], alone.levels[0])
        assert grouped.scale[row, first // 8] == alone.scale[0, 0]
    whole, flat = ternary_optimum(rows, layer_wise=True), ternary_optimum(rows.view(1, -1))
    assert torch.equal(whole.levels.view(1, -1), flat.levels)
    assert torch.equal(whole.scale, flat.scale)


@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize("grid", UNIFORM)
@pytest.mark.parametrize("share", [{}, {"group_size": 16}, {"layer_wise": True}], ids=["channel", "group", "tensor"])
def test_the_full_range_is_what_the_kernel_takes(grid: Grid, bits: int, share: dict[str, object]) -> None:
    rows = random_rows(4, 40)
    format = code_format(rows, grid, bits, share.get("group_size", 40), share.get("layer_wise", False))
    kernel = uniform(rows, bits, grid, group_size=format.group_size, layer_wise=format.layer_wise)
    found = clip_search(rows, bits, grid, lowest=1.0, **share)
    torch.testing.assert_close(found.scale, kernel.scale)
    assert torch.equal(nearest_levels(rows, format, found), unpack(kernel.codes, bits, 40))


@pytest.mark.parametrize("grid", UNIFORM)
def test_clip_search_is_the_best_of_its_clips_row_by_row(grid: Grid) -> None:
    rows = random_rows(6, 50)
    format = code_format(rows, grid, 3, 50, False)
    full = clip_search(rows, 3, grid, lowest=1.0)
    errors = []
    for i in range(25):
        clip = 1.0 - 0.025 * i
        tried = GridScale(full.scale * clip, full.zero_point)
        errors.append(squared_errors(rows, Rounded(format, nearest_levels(rows, format, tried), *astuple(tried))))
    found = clip_search(rows, 3, grid)
    error = squared_errors(rows, Rounded(format, nearest_levels(rows, format, found), *astuple(found)))
    torch.testing.assert_close(error, torch.stack(errors).amin(0), rtol=1e-4, atol=0)
    assert (found.scale < full.scale).any()


def astuple(found: GridScale) -> tuple[Tensor, Tensor | None]:
    return found.scale, found.zero_point


def test_clips_go_down_to_two_fifths_up_to_four_bits_and_to_seven_tenths_above() -> None:
    rows = torch.zeros(1, 4096).uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(0))
    rows[0, 0] = 1.0
    assert clip_search(rows, 2, Grid.DOREFA).scale.item() == pytest.approx(0.4)
    assert clip_search(rows, 5, Grid.DOREFA).scale.item() == pytest.approx(0.7)


@pytest.mark.parametrize("grid", UNIFORM)
def test_constant_and_zero_rows_have_finite_scales(grid: Grid) -> None:
    rows = torch.tensor([[0.0] * 9, [-0.25] * 9])
    format = code_format(rows, grid, 4, 9, False)
    found = clip_search(rows, 4, grid)
    value = values_of(Rounded(format, nearest_levels(rows, format, found), *astuple(found)))
    assert value[0].tolist() == [0.0] * 9
    torch.testing.assert_close(value[1], rows[1], rtol=0.3, atol=0)


@pytest.mark.parametrize("grid", [Grid.TERNARY, *UNIFORM])
def test_values_are_those_of_the_decoder(grid: Grid) -> None:
    rows = random_rows(3, 21)
    if grid is Grid.TERNARY:
        rounded = ternary_optimum(rows, group_size=8)
    else:
        format = code_format(rows, grid, 5, 8, False)
        found = clip_search(rows, 5, grid, group_size=8)
        rounded = Rounded(format, nearest_levels(rows, format, found), *astuple(found))
    packed = pack(rounded.levels, rounded.format.bits)
    decoded = dequantize(rounded.format, packed, rounded.scale, rounded.zero_point)
    torch.testing.assert_close(values_of(rounded), decoded, rtol=1e-6, atol=1e-6)
