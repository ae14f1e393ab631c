"""Tap sums that the ternary kernel leaves beside its codes: to the bit those of passes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from dfmpc.errors import NonFiniteError
from dfmpc.kernels import tapped, ternary_kernel
from dfmpc.kernels.dequantize import dequantize_reference
from dfmpc.kernels.formats import Grid, Quantized
from dfmpc.kernels.group import Request, quantize_group, quantize_group_triton
from dfmpc.kernels.table import Batch
from dfmpc.kernels.tap_sums import tap_sums_reference
from dfmpc.kernels.tapped import MOST_TAPS, sums_of_signs
from dfmpc.kernels.ternary import ternary, ternary_reference, ternary_triton
from torch import Tensor

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    # The interpreter is NumPy, which mentions what a GPU does silently (NaN to integer).
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FLOAT_MAX = torch.finfo(torch.float32).max


def random_rows(rows: int, length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rows + length)
    return torch.randn(rows, length, generator=generator).to(dtype)


def odd_rows(length: int) -> Tensor:
    """Zeros, one value, zeros of both signs, denormals, the largest, the largest among tiny, one among zeros."""
    rows = random_rows(7, length)
    rows[0], rows[1], rows[2] = 0.0, -0.37, rows[2].clamp(min=0) * -1.0
    rows[3] *= 1e-41
    rows[4] = FLOAT_MAX * rows[4].sign()
    rows[5] *= 1e-30
    rows[5, -1] = -FLOAT_MAX
    rows[6], rows[6, length // 2] = 0.0, 2.0**-149
    return rows


def four(found: Quantized) -> list[Tensor]:
    taps = found.taps
    assert taps is not None
    return [taps.original.sums, taps.original.squares, taps.quantized.sums, taps.quantized.squares]


def assert_passes_agree(found: Quantized, weight: Tensor, taps: int) -> None:
    """The sums are those that passes over the weight and over its dequantized codes give."""
    values = dequantize_reference(found.format, found.codes.cpu(), found.scale.cpu(), found.zero_point)
    original, quantized = (tap_sums_reference(rows, taps) for rows in (weight.cpu(), values))
    for mine, theirs in zip(
        four(found), (original.sums, original.squares, quantized.sums, quantized.squares), strict=True
    ):
        assert (mine.dtype, mine.device.type, mine.shape) == (torch.float64, "cpu", theirs.shape)
        assert torch.equal(mine, theirs)


def assert_alike(found: Quantized, expected: Quantized) -> None:
    """All else is what it is without tap sums."""
    assert found.format == expected.format
    for name in ("codes", "scale", "dot", "quantized_norm", "original_norm", "zeros"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name).cpu()), name


def check(weight: Tensor, taps: int, device: str, **options: Any) -> None:
    options = {"group_size": weight.shape[1]} | options
    found = ternary_triton(weight.to(device), taps=taps, **options)
    assert_passes_agree(found, weight, taps)
    reference = ternary_reference(weight, taps=taps, **options)
    assert all(map(torch.equal, four(found), four(reference)))
    assert_alike(found, ternary_reference(weight, **options))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each launch of the ternary kernel had to sum taps."""
    seen: list[bool] = []
    plain = Batch.launch

    def launch(self: Batch, kernel: Any, *outputs: Tensor, **constants: Any) -> None:
        if kernel is ternary_kernel.ternary_kernel:
            seen.append(constants.get("TAPPED", False))
        plain(self, kernel, *outputs, **constants)

    monkeypatch.setattr(Batch, "launch", launch)
    return seen


@pytest.fixture
def no_other_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where sums are read from the weight or its codes by passes of their own."""
    monkeypatch.setattr(tapped, "tap_sums_of_both", lambda *_: pytest.fail("a pass of its own"))


# rows held by one tile, depthwise rows, odd and prime channels, rows walked over by a warp and by a program
SHAPES = [(5, 9, 9), (131, 9, 9), (7, 25, 25), (3, 49, 49), (3, 1, 1), (6, 16, 1), (6, 28, 4), (5, 27, 9)]
SHAPES += [(3, 117, 9), (2, 144, 9), (2, 576, 9), (3, 75, 25), (2, 147, 49), (3, 31, 31), (2, 1053, 9)]
LONG_SHAPES = [(2, 1152, 9), (1, 9 * 601, 9), (1, 2 * 4900, 49)]


@pytest.mark.parametrize(("rows", "length", "taps"), SHAPES, ids=str)
@pytest.mark.parametrize("layer_wise", [False, True], ids=["rows", "layer"])
def test_a_launch_leaves_what_passes_of_their_own_find(
    rows: int, length: int, taps: int, layer_wise: bool, device: str
) -> None:
    check(random_rows(rows, length), taps, device, layer_wise=layer_wise)


@pytest.mark.parametrize(("rows", "length", "taps"), LONG_SHAPES, ids=str)
def test_rows_that_no_tile_holds_are_walked_over_once_more(rows: int, length: int, taps: int, device: str) -> None:
    check(random_rows(rows, length), taps, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("length", "taps"), [(9, 9), (144, 9), (100, 25)], ids=str)
def test_every_type_of_weight(dtype: torch.dtype, length: int, taps: int, device: str) -> None:
    check(random_rows(4, length, dtype), taps, device)


@pytest.mark.parametrize(("length", "taps"), [(9, 9), (25, 25), (72, 9), (98, 49)], ids=str)
@pytest.mark.parametrize("rule", ["twn", "exact"])
def test_odd_values(length: int, taps: int, rule: str, device: str) -> None:
    check(odd_rows(length), taps, device, rule=rule)


@pytest.mark.parametrize("transposed", [True, False], ids=["transposed", "every second"])
def test_weights_that_are_not_contiguous(transposed: bool, device: str) -> None:
    whole = random_rows(36, 10)
    weight = whole.T if transposed else random_rows(10, 72)[:, ::2]
    assert not weight.is_contiguous()
    check(weight, 9, device)


def test_a_weight_that_begins_between_wide_loads(device: str) -> None:
    off = random_rows(1, 4 * 36 + 1).to(device)[0, 1:].view(4, 36)
    assert off.data_ptr() % 16
    found = ternary_triton(off, group_size=36, taps=9)
    assert_passes_agree(found, off, 9)


def test_a_thousand_rows_of_nine_fill_every_place(device: str) -> None:
    """Programs take 128 rows each; the last one is partly empty."""
    weight = random_rows(1_001, 9)
    found = ternary_triton(weight.to(device), group_size=9, taps=9)
    assert_passes_agree(found, weight, 9)


def test_by_hand(device: str) -> None:
    weight = torch.tensor([[4.0, -4.0, 4.0, 1.0, -5.0, -6.0]])
    # mean 4, threshold 2.8: all but the 1 are kept, their mean is 4.6
    found = ternary_triton(weight.to(device), group_size=6, taps=3)
    scale = found.scale.double().item()
    assert scale == pytest.approx(4.6)
    sums, squares, signs, kept = (tensor.tolist() for tensor in four(found))
    assert (sums, squares) == ([[4.0, -10.0]], [[48.0, 62.0]])
    assert (signs, kept) == ([[scale, -2 * scale]], [[3 * scale**2, 2 * scale**2]])


@pytest.mark.parametrize("taps", [1, 9, 25, 32, 49, 121])
def test_sums_of_signs_are_exact_up_to_32_squares_and_as_rounded_as_a_running_sum_beyond(taps: int) -> None:
    scale = (torch.rand(200, 1, generator=torch.Generator().manual_seed(taps)) + 0.5) * 1e-3
    kept = torch.full((200, 1), taps, dtype=torch.int16)
    found = sums_of_signs(-kept, kept, scale, taps)
    values = (-scale).expand(-1, taps).contiguous()
    expected = tap_sums_reference(values, taps)
    assert torch.equal(found.sums, expected.sums)
    assert torch.equal(found.squares, expected.squares)
    exact = [taps * Fraction(one.item()) ** 2 for one in scale]
    wrong = sum(Fraction(one.item()) != true for one, true in zip(found.squares, exact, strict=True))
    assert (wrong > 0) == (taps > 32)
    assert all(Fraction(one.item()) == -taps * Fraction(s.item()) for one, s in zip(found.sums, scale, strict=True))


GROUPED = [(4, 72, 9), (3, 9, 9), (2, 25, 25), (5, 98, 49), (4, 64, 0), (3, 16, 4), (2, 1053, 9), (3, 30, 1)]


def requests(device: str, layer_wise: bool = False) -> Iterator[Request]:
    for rows, length, taps in GROUPED:
        weight = random_rows(rows, length).to(device)
        yield Request(weight, Grid.TERNARY, 2, length, layer_wise, taps=taps)


def assert_as_asked(found: list[Quantized], asked: list[Request]) -> None:
    for mine, request in zip(found, asked, strict=True):
        assert (mine.taps is None) == (request.taps == 0)
        if request.taps:
            assert_passes_agree(mine, request.weight, request.taps)


@pytest.mark.usefixtures("no_other_passes")
@pytest.mark.parametrize("layer_wise", [False, True], ids=["rows", "layer"])
def test_tensors_of_different_taps_and_without_share_a_launch(
    layer_wise: bool, device: str, launches: list[bool]
) -> None:
    asked = list(requests(device, layer_wise))
    found = quantize_group_triton(asked)
    assert launches == [True]
    assert_as_asked(found, asked)
    for mine, request in zip(found, asked, strict=True):
        options = {"group_size": request.group_size, "layer_wise": layer_wise}
        assert_alike(mine, ternary_reference(request.weight.cpu(), **options))


def test_a_group_of_grids_types_and_empty_tensors_has_taps_where_asked(device: str, launches: list[bool]) -> None:
    asked = [
        Request(random_rows(2, 18).to(device), Grid.DOREFA, 6, 18),
        *requests(device),
        Request(torch.zeros(0, 18, device=device), Grid.TERNARY, 2, 18, taps=9),
        Request(random_rows(3, 18, torch.bfloat16).to(device), Grid.TERNARY, 2, 18, taps=9),
        Request(random_rows(3, 18).to(device), Grid.TERNARY, 2, 8, taps=9),
    ]
    found = quantize_group_triton(asked)
    assert launches == [True, True]
    assert_as_asked(found, asked)


def test_nobody_asks_and_the_launch_is_the_plain_one(device: str, launches: list[bool]) -> None:
    weight = random_rows(3, 36)
    found = ternary_triton(weight.to(device), group_size=36)
    assert found.taps is None
    assert ternary_reference(weight, group_size=36).taps is None
    assert launches == [False]


@pytest.mark.parametrize(("group_size", "taps"), [(8, 9), (72, 9), (16, 4), (24, 12)], ids=str)
def test_taps_of_rows_of_several_groups_take_passes_of_their_own(
    group_size: int, taps: int, device: str, launches: list[bool]
) -> None:
    """Taps may cross the groups' borders; the kernel is the plain one then."""
    check(random_rows(3, 144), taps, device, group_size=group_size)
    assert launches == [False]


def test_more_taps_than_the_kernel_counts_take_passes_of_their_own(device: str, launches: list[bool]) -> None:
    for taps in (MOST_TAPS, MOST_TAPS + 1):
        check(random_rows(1, taps), taps, device)
    assert launches == [True, False]


@pytest.mark.parametrize("shape", [(0, 18), (3, 0), (0, 0)], ids=str)
def test_a_weight_without_elements_has_no_sums(shape: tuple[int, int], device: str) -> None:
    for run in (ternary_triton, ternary_reference, ternary):
        found = run(torch.zeros(shape, device=device), group_size=24, taps=9)
        assert [tensor.shape for tensor in four(found)] == [(shape[0], shape[1] // 9)] * 4


@pytest.mark.parametrize("taps", [4, -1])
def test_taps_that_do_not_divide_the_row_are_refused(taps: int) -> None:
    weight = torch.ones(2, 18)
    for run in (ternary_triton, ternary_reference):
        with pytest.raises(ValueError, match=f"taps is {taps} for rows of 18; it must divide them"):
            run(weight, group_size=18, taps=taps)
    with pytest.raises(ValueError, match=f"taps is {taps} for rows of 18; it must divide them"):
        quantize_group([Request(weight, Grid.TERNARY, 2, 18, taps=taps)])


def test_taps_of_other_grids_are_refused() -> None:
    with pytest.raises(ValueError, match="taps is 9 for dorefa codes; only ternary codes come with tap sums"):
        quantize_group([Request(torch.ones(2, 18), Grid.DOREFA, 6, 18, taps=9)])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_what_is_not_finite_is_refused_as_without_taps(value: float, device: str) -> None:
    weight = random_rows(4, 36).to(device)
    weight[2, 35] = value
    for run in (ternary_triton, ternary_reference):
        with pytest.raises(NonFiniteError, match="the first is row 2"):
            run(weight, group_size=36, taps=9)


def test_outputs_begin_where_triton_needs_no_other_kernel(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain = Batch.launch

    def launch(self: Batch, kernel: Any, *outputs: Tensor, **constants: Any) -> None:
        seen.extend(value.data_ptr() % 16 for value in constants.values() if isinstance(value, Tensor))
        plain(self, kernel, *outputs, **constants)

    monkeypatch.setattr(Batch, "launch", launch)
    ternary_triton(random_rows(3, 27).to(device), group_size=27, taps=9)
    assert seen == [0] * 5
