"""The sweep over widths: equal to quantizing at each of them, and the kernel equal to the reference to the last bit."""

from __future__ import annotations

import math

import pytest
import torch
from dfmpc.errors import NonFiniteError
from dfmpc.kernels import Grid, dequantize, sweep, uniform
from dfmpc.kernels.sweep import MOST_TAPS, WIDTHS, Sweep, grouped_sweep, sweep_reference, sweep_triton
from torch import Tensor

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # The interpreter is NumPy, which mentions what a GPU does silently (integers that wrap).
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

GRIDS = [Grid.DOREFA, Grid.SYMMETRIC]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOAT_MAX = torch.finfo(torch.float32).max
FIELDS = ("dot", "quantized_norm", "tap_sums_norm", "original_norm")


def random_rows(rows: int, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rows + length)
    return torch.randn(rows, length, generator=generator).to(dtype)


def odd_rows(length: int = 27) -> Tensor:
    """All-zero, one value, denormals, one denormal among zeros, one of a few units, ±max, max and tiny, wide range."""
    rows = random_rows(9, length)
    rows[0], rows[1] = 0.0, -0.37
    rows[2] *= 1e-41
    rows[3], rows[3, 1] = 0.0, 2.0**-149
    rows[4] = rows[4].mul(3).round() * 2.0**-149
    rows[5] = FLOAT_MAX * rows[5].sign()
    rows[6] *= 1e-30
    rows[6, 2] = FLOAT_MAX
    rows[7] *= torch.logspace(-30, 0, length)
    rows[8] = 100 * rows[8]
    return rows


def assert_same(found: Sweep, expected: Sweep) -> None:
    assert found.widths == expected.widths
    for name in FIELDS:
        a, b = getattr(found, name), getattr(expected, name)
        assert (a.dtype, a.shape, a.device.type) == (torch.float64, b.shape, "cpu"), name
        assert torch.equal(a, b), name


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("shape", "group_size"), [((7, 203), 203), ((5, 70), 24), ((400, 300), 300), ((9, 9), 9)])
def test_every_width_is_what_uniform_measures(shape: tuple[int, int], group_size: int, grid: Grid) -> None:
    weight = random_rows(*shape)
    weight[: min(9, shape[0])] = odd_rows(shape[1])[: shape[0]]
    found = sweep(weight, grid=grid, group_size=group_size)
    for k, width in enumerate(WIDTHS):
        q = uniform(weight, width, grid, group_size=group_size)
        assert torch.equal(found.dot[:, k], q.dot)
        assert torch.equal(found.quantized_norm[:, k], q.quantized_norm)
        assert torch.equal(found.original_norm, q.original_norm)
    assert torch.equal(found.tap_sums_norm, found.quantized_norm)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("taps", [3, 9, 27])
def test_sums_over_taps_are_those_of_the_quantized_weight(taps: int, grid: Grid) -> None:
    weight = random_rows(6, 54)
    weight[3] = 0
    found = sweep(weight, grid=grid, group_size=54, taps=taps, widths=(8, 3))
    assert found.widths == (8, 3)
    for k, width in enumerate(found.widths):
        q = uniform(weight, width, grid, group_size=54)
        values = dequantize(q.format, q.codes, q.scale, None).double().view(6, -1, taps)
        expected = values.sum(2).square().sum(1)
        torch.testing.assert_close(found.tap_sums_norm[:, k], expected, rtol=1e-6, atol=1e-9)
        error = (weight.double() - values.flatten(1)).square().sum(1)
        torch.testing.assert_close(found.error[:, k], error, rtol=1e-5, atol=1e-9)


def test_sqnr_by_hand() -> None:
    # DoReFa at 2 bits of (3, 1, -1, -3): s = 3, levels -3, -1, 1, 3: exact. Of (3, 2, -1, -3): 2 is half-way between
    # the levels u = 2 and 3 and becomes the even one, 1: ||W||² = 23, error 1.
    found = sweep(torch.tensor([[3.0, 1, -1, -3], [3, 2, -1, -3]]), grid=Grid.DOREFA, group_size=4, widths=[2])
    assert found.error.tolist() == [[0.0], [1.0]]
    assert found.sqnr_db[0, 0] == math.inf
    assert found.sqnr_db[1, 0].item() == pytest.approx(10 * math.log10(23), abs=1e-12)
    nothing = sweep(torch.zeros(1, 4), grid=Grid.SYMMETRIC, group_size=4)
    assert nothing.sqnr_db.tolist() == [[math.inf] * 7]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(
    ("rows", "length", "group_size", "taps"),
    [(5, 1, 1, 1), (3, 7, 7, 7), (70, 9, 9, 9), (5, 25, 25, 5), (3, 64, 64, 1), (3, 72, 24, 3), (2, 131, 131, 1)],
)
def test_the_kernel_equals_its_reference(
    rows: int, length: int, group_size: int, taps: int, grid: Grid, device: str
) -> None:
    weight, widths = random_rows(rows, length), WIDTHS if length < 64 else (2, 7)
    options = {"grid": grid, "group_size": group_size, "taps": taps, "widths": widths}
    assert_same(sweep_triton(weight.to(device), **options), sweep_reference(weight, **options))


@pytest.mark.parametrize("taps", [1, 9])
@pytest.mark.parametrize("grid", GRIDS)
def test_odd_rows_agree_too(grid: Grid, taps: int, device: str) -> None:
    weight, options = odd_rows(), {"grid": grid, "group_size": 27, "taps": taps}
    assert_same(sweep_triton(weight.to(device), **options), sweep_reference(weight, **options))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["fp16", "bf16"])
@pytest.mark.parametrize("grid", GRIDS)
def test_half_precision_is_swept_as_its_float32_value(grid: Grid, dtype: torch.dtype, device: str) -> None:
    weight = random_rows(3, 72, dtype)
    options = {"grid": grid, "group_size": 72, "taps": 9, "widths": (2, 5, 8)}
    expected = sweep_reference(weight.float(), **options)
    assert_same(sweep_reference(weight, **options), expected)
    assert_same(sweep_triton(weight.to(device), **options), expected)


@pytest.mark.parametrize("length", [1300, 5000])
def test_rows_longer_than_a_tile_are_walked_over(length: int, device: str) -> None:
    weight = random_rows(2, length)
    for taps in (1, 4):
        options = {"grid": Grid.DOREFA, "group_size": length, "taps": taps, "widths": (3, 8)}
        assert_same(sweep_triton(weight.to(device), **options), sweep_reference(weight, **options))


def test_layers_of_one_launch_keep_their_taps_and_places(device: str) -> None:
    layers = [(random_rows(6, 72), 9), (random_rows(5, 64), 1), (torch.zeros(2, 0), 1), (random_rows(20, 9), 9)]
    layers += [(random_rows(3, 33), 1), (random_rows(2, 16, torch.bfloat16), 2)]
    options = {"grid": Grid.SYMMETRIC, "group_size": 1024, "widths": (2, 4)}
    found = grouped_sweep([weight.to(device) for weight, _ in layers], [taps for _, taps in layers], **options)
    for (weight, taps), one in zip(layers, found, strict=True):
        assert_same(one, sweep_reference(weight, taps=taps, **options))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_what_is_not_finite_is_refused_by_name_of_its_row(value: float, device: str) -> None:
    weight = random_rows(4, 40)
    weight[2, 39] = value
    for run, there in ((sweep_reference, weight), (sweep_triton, weight.to(device))):
        with pytest.raises(NonFiniteError, match=r"1 of 4 weight rows hold NaN or Inf, the first is row 2"):
            run(there, grid=Grid.DOREFA, group_size=40, widths=(2,))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
def test_a_weight_without_elements_sweeps_to_zeros(shape: tuple[int, int], device: str) -> None:
    weight = torch.zeros(shape)
    found = sweep_triton(weight.to(device), grid=Grid.DOREFA, group_size=8)
    assert_same(found, sweep_reference(weight, grid=Grid.DOREFA, group_size=8))
    assert found.dot.tolist() == [[0.0] * 7] * shape[0]
    assert found.original_norm.tolist() == [0.0] * shape[0]


def test_chunks_of_rows_leave_the_result_as_it_is() -> None:
    weight = random_rows(700, 207)
    whole = sweep_reference(weight, grid=Grid.DOREFA, group_size=207, taps=9)
    for start in (0, 316, 699):
        part = sweep_reference(weight[start : start + 1], grid=Grid.DOREFA, group_size=207, taps=9)
        for name in FIELDS:
            assert torch.equal(getattr(whole, name)[start], getattr(part, name)[0]), name


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"grid": Grid.ASYMMETRIC}, "grid is asymmetric; a sweep knows dorefa and symmetric"),
        ({"widths": ()}, r"widths are \[\]; use one or more of 2 to 8"),
        ({"widths": (4, 9)}, r"widths are \[4, 9\]; use one or more of 2 to 8"),
        ({"taps": 7}, f"taps is 7 for rows of 72; it must divide them and be at most {MOST_TAPS}"),
        ({"taps": 9, "group_size": 24}, "group_size is 24 for 9 taps; use a multiple, or one group a row"),
        ({"group_size": 12}, "group_size is 12 for rows of 72; use a multiple of 8"),
    ],
)
def test_what_cannot_be_swept_is_refused(options: dict[str, object], text: str) -> None:
    given = {"grid": Grid.DOREFA, "group_size": 72, **options}
    for run in (sweep_reference, sweep_triton):
        with pytest.raises(ValueError, match=text):
            run(torch.zeros(2, 72), **given)


def test_rows_that_are_not_contiguous_are_swept_as_their_copy(device: str) -> None:
    weight, options = random_rows(30, 18).T, {"grid": Grid.SYMMETRIC, "group_size": 30, "widths": (4,)}
    expected = sweep_reference(weight.contiguous(), **options)
    assert_same(sweep_reference(weight, **options), expected)
    assert_same(sweep_triton(weight.to(device), **options), expected)
