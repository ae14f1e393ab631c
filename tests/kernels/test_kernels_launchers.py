"""Triton launchers against the references: every field equal to the bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from dfmpc.errors import NonFiniteError
from dfmpc.kernels.dequantize import dequantize_reference, dequantize_triton
from dfmpc.kernels.formats import Grid
from dfmpc.kernels.packing import pack_reference, pack_triton, unpack_reference, unpack_triton
from dfmpc.kernels.statistics import row_statistics_reference, row_statistics_triton
from dfmpc.kernels.tap_sums import tap_sums_reference, tap_sums_triton
from dfmpc.kernels.ternary import ternary_reference, ternary_triton
from dfmpc.kernels.uniform import uniform_reference, uniform_triton

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # The interpreter is NumPy, which mentions what a GPU does silently (NaN to integer).
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

UNIFORM = [Grid.DOREFA, Grid.SYMMETRIC, Grid.ASYMMETRIC]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOAT_MAX = torch.finfo(torch.float32).max


def random_rows(rows: int, length: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * rows + length)
    return torch.randn(rows, length, generator=generator).to(dtype)


def odd_rows(length: int = 25) -> torch.Tensor:
    """All-zero, one value, mixed zeros, denormals, one denormal among zeros, huge, huge and tiny."""
    rows = random_rows(9, length)
    rows[0], rows[1], rows[2] = 0.0, -0.37, rows[2].clamp(min=0) * -1.0
    rows[3] *= 1e-41
    rows[4], rows[4, 1] = 0.0, 2.0**-149
    rows[5] = FLOAT_MAX * rows[5].sign()
    rows[6] = rows[6] * 1e-30
    rows[6, 2] = FLOAT_MAX
    rows[7] = 1e-42
    rows[7, 0] += 2.0**-149
    rows[8] = 1000 + 1e-3 * rows[8]
    return rows


def assert_same(found: object, expected: object) -> None:
    for field in dataclasses.fields(expected):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(b, torch.Tensor):
            assert (a.dtype, a.shape) == (b.dtype, b.shape), field.name
            assert torch.equal(a.cpu().nan_to_num(-7.0), b.cpu().nan_to_num(-7.0)), field.name
        else:
            assert a == b, field.name


def check_everything(weight: torch.Tensor, device: str, group_size: int, widths: tuple[int, ...], grids: list[Grid]):
    there = weight.to(device)
    assert_same(row_statistics_triton(there, group_size), row_statistics_reference(weight, group_size))
    for layer_wise in (False, True):
        options = {"group_size": group_size, "layer_wise": layer_wise}
        assert_same(ternary_triton(there, **options), ternary_reference(weight, **options))
        for grid in grids:
            for bits in widths:
                expected = uniform_reference(weight, bits, grid, **options)
                assert_same(uniform_triton(there, bits, grid, **options), expected)


@pytest.mark.parametrize("length", [1, 5, 9, 25, 123, 577, 1031])
def test_launchers_equal_references_at_odd_lengths(length: int, device: str) -> None:
    grid = UNIFORM[length % 3]
    check_everything(random_rows(5, length), device, length, (2, 7), [grid])


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("grid", UNIFORM)
def test_uniform_launcher_equals_its_reference_at_every_width(grid: Grid, bits: int, device: str) -> None:
    weight = random_rows(6, 43)
    found = uniform_triton(weight.to(device), bits, grid, group_size=43)
    assert_same(found, uniform_reference(weight, bits, grid, group_size=43))


def test_dorefa_ties_of_whole_numbers_are_settled_alike(device: str) -> None:
    # -2m beside a largest magnitude of 3m is half-way between two codes of two bits, as far as 3 / 6m is exact: it must
    # be rounded once, as the kernel does it.
    m = torch.arange(1.0, 257.0)[:, None]
    weight = torch.cat([-2 * m, 3 * m, 2 * m], dim=1)
    found = uniform_triton(weight.to(device), 2, Grid.DOREFA, group_size=3)
    assert_same(found, uniform_reference(weight, 2, Grid.DOREFA, group_size=3))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
def test_launchers_equal_references_in_every_type(dtype: torch.dtype, device: str) -> None:
    check_everything(random_rows(3, 33, dtype), device, 16, (4,), UNIFORM)


def test_launchers_equal_references_on_odd_values(device: str) -> None:
    check_everything(odd_rows(), device, 25, (2, 8), UNIFORM)


@pytest.mark.parametrize("group_size", [8, 24, 40])
def test_launchers_equal_references_with_a_short_last_group(group_size: int, device: str) -> None:
    check_everything(random_rows(3, 61), device, group_size, (3,), [Grid.DOREFA])


def test_short_rows_share_a_program_and_the_last_one_is_partly_empty(device: str) -> None:
    check_everything(random_rows(71, 9), device, 9, (6,), [Grid.ASYMMETRIC])


@pytest.mark.parametrize("layer_wise", [False, True])
def test_nan_is_refused_by_name_of_its_row(layer_wise: bool, device: str) -> None:
    weight = random_rows(4, 40).to(device)
    weight[2, 39] = torch.nan
    for run in (ternary_triton, ternary_reference):
        with pytest.raises(NonFiniteError, match=r"1 of 4 weight rows hold NaN or Inf, the first is row 2"):
            run(weight, group_size=40, layer_wise=layer_wise)
    for run in (uniform_triton, uniform_reference):
        with pytest.raises(NonFiniteError, match=r"the first is row 2"):
            run(weight, 4, Grid.ASYMMETRIC, group_size=40, layer_wise=layer_wise)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_statistics_report_what_is_not_finite(value: float, device: str) -> None:
    weight = random_rows(3, 20)
    weight[1, 7] = value
    found, expected = row_statistics_triton(weight.to(device), 8), row_statistics_reference(weight, 8)
    for statistics in (found, expected):
        assert statistics.finite is False
        assert torch.isnan(statistics.abs_sum).cpu().nonzero().tolist() == [[1, 0]]
        assert torch.isfinite(statistics.absmax).cpu().logical_not().nonzero().tolist() == [[1, 0]]
    assert torch.equal(found.square_sum.cpu().nan_to_num(-7.0), expected.square_sum.nan_to_num(-7.0))


@pytest.mark.parametrize("bits", range(2, 9))
def test_pack_and_unpack_launchers_equal_references(bits: int, device: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    for rows, length in ((1, 1), (3, 13), (40, 16), (2, 1031)):
        codes = torch.randint(0, 2**bits, (rows, length), generator=generator, dtype=torch.uint8)
        packed = pack_triton(codes.to(device), bits)
        assert torch.equal(packed.cpu(), pack_reference(codes, bits))
        assert torch.equal(unpack_triton(packed, bits, length).cpu(), unpack_reference(packed.cpu(), bits, length))


@pytest.mark.parametrize("layer_wise", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
def test_dequantize_launcher_equals_its_reference(dtype: torch.dtype, layer_wise: bool, device: str) -> None:
    weight = torch.cat([random_rows(3, 25), odd_rows()])
    made = [uniform_reference(weight, 5, grid, group_size=8, layer_wise=layer_wise) for grid in UNIFORM]
    for q in (*made, ternary_reference(weight, group_size=8, layer_wise=layer_wise)):
        expected = dequantize_reference(q.format, q.codes, q.scale, q.zero_point, dtype)
        point = None if q.zero_point is None else q.zero_point.to(device)
        found = dequantize_triton(q.format, q.codes.to(device), q.scale.to(device), point, dtype)
        assert found.dtype is dtype
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("taps", [1, 3, 9])
def test_tap_sums_launcher_equals_its_reference(taps: int, device: str) -> None:
    for weight in (random_rows(3, 18 * 9), random_rows(70, 9)):
        assert_same(tap_sums_triton(weight.to(device), taps), tap_sums_reference(weight, taps))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)], ids=str)
def test_a_weight_without_elements_gives_empty_codes(shape: tuple[int, int], device: str) -> None:
    weight = torch.zeros(shape)
    for layer_wise in (False, True):
        options = {"group_size": 8, "layer_wise": layer_wise}
        expected = ternary_reference(weight, **options)
        assert_same(ternary_triton(weight.to(device), **options), expected)
        assert expected.codes.shape == (shape[0], expected.format.row_bytes)
        q = uniform_triton(weight.to(device), 3, Grid.ASYMMETRIC, **options)
        values = dequantize_triton(q.format, q.codes, q.scale, q.zero_point)
        assert values.shape == shape
    assert row_statistics_triton(weight.to(device), 8).finite is True
