"""Many tensors in one launch: every kind of tile, and the same bytes as one tensor alone."""

from __future__ import annotations

import pytest
import torch
from dfmpc.kernels import table
from dfmpc.kernels.formats import Grid, Quantized
from dfmpc.kernels.group import Request, quantize_group, quantize_group_triton
from dfmpc.kernels.shapes import Tile, tile_for, tiles
from dfmpc.kernels.ternary import ternary_reference
from dfmpc.kernels.uniform import uniform_reference
from torch import Tensor

LENGTHS = (1, 9, 16, 25, 27, 36, 64, 100, 147, 256, 300, 576, 1025, 1152)
FIELDS = ("codes", "scale", "zero_point", "dot", "quantized_norm", "original_norm", "zeros")


def weight(rows: int, length: int, seed: int) -> Tensor:
    return torch.randn(rows, length, generator=torch.Generator().manual_seed(seed))


def alone(request: Request) -> Quantized:
    how = {"group_size": request.group_size, "layer_wise": request.layer_wise}
    if request.grid is Grid.TERNARY:
        return ternary_reference(request.weight, **how)
    return uniform_reference(request.weight, request.bits, request.grid, **how)


def assert_same(found: Quantized, expected: Quantized) -> None:
    assert found.format == expected.format
    for field in FIELDS:
        mine, theirs = getattr(found, field), getattr(expected, field)
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine.cpu(), theirs), field


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("grid", "bits"), [(Grid.TERNARY, 2), (Grid.DOREFA, 6), (Grid.SYMMETRIC, 3), (Grid.ASYMMETRIC, 4)]
)
def test_a_group_gives_what_each_tensor_gives_alone(grid: Grid, bits: int, device: str) -> None:
    weights = [weight(1 + seed % 5, length, seed).to(device) for seed, length in enumerate(LENGTHS)]
    requests = [Request(one, grid, bits, group_size=one.shape[1]) for one in weights]
    requests += [Request(weight(3, 200, 50).to(device), grid, bits, group_size=64)]  # a short last group
    requests += [Request(weight(3, 128, 51).to(device), grid, bits, group_size=32)]
    for found, request in zip(quantize_group_triton(requests), requests, strict=True):
        assert_same(found, alone(Request(request.weight.cpu(), grid, bits, request.group_size)))


def test_a_group_may_mix_grids_types_scales_and_empty_tensors(device: str) -> None:
    requests = [
        Request(weight(4, 72, 1).to(device), Grid.TERNARY, 2, group_size=72, layer_wise=True),
        Request(weight(4, 72, 2).to(device, torch.bfloat16), Grid.TERNARY, 2, group_size=72),
        Request(torch.zeros(0, 9, device=device), Grid.TERNARY, 2, group_size=9),
        Request(weight(2, 40, 3).to(device), Grid.DOREFA, 6, group_size=40, layer_wise=True),
        Request(weight(5, 30, 5).to(device), Grid.TERNARY, 2, group_size=30, layer_wise=True),
        Request(weight(2, 40, 4).to(device, torch.float16), Grid.SYMMETRIC, 8, group_size=8),
        Request(weight(3, 7, 6).to(device), Grid.DOREFA, 6, group_size=7, layer_wise=True),
    ]
    for found, request in zip(quantize_group_triton(requests), requests, strict=True):
        plain = Request(request.weight.cpu(), request.grid, request.bits, request.group_size, request.layer_wise)
        assert_same(found, alone(plain))


def test_where_no_kernel_runs_a_group_is_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table.Batch, "launch", lambda *_, **__: pytest.fail("launched"))
    requests = [Request(weight(3, 20, 1), Grid.TERNARY, 2, 20), Request(weight(3, 20, 2), Grid.SYMMETRIC, 4, 20)]
    for found, request in zip(quantize_group(requests), requests, strict=True):
        assert_same(found, alone(request))


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("mixed", [True, False])
def test_every_length_has_a_tile_that_goes_through_all_of_it(mixed: bool, itemsize: int, aligned: bool) -> None:
    step = 16 // itemsize if aligned else 1
    for length in [*range(step, 1300, step), 4608, 14336, 1 << 21]:
        tile = tile_for(length, itemsize, aligned, mixed)
        assert tile in tiles(itemsize, mixed)
        assert tile.padded(length) >= length
        assert tile.aligned == aligned
    decoded = Tile(
        *(tile.code // 4096, tile.code // 64 % 64, tile.code // 4 % 16), tile.code // 2 % 2 == 1, tile.code % 2 == 1
    )
    assert decoded == tile


def test_an_address_that_no_wide_load_may_use_is_taken_element_by_element(device: str) -> None:
    """A tensor of a checkpoint read without a copy begins where the file has it."""
    whole = weight(1, 4 * 64 + 1, 9).to(device)
    off = whole[0, 1:].view(4, 64)
    assert off.data_ptr() % 16
    (found,) = quantize_group_triton([Request(off, Grid.DOREFA, 6, 64)])
    assert_same(found, uniform_reference(off.cpu(), 6, Grid.DOREFA, group_size=64))


def test_offsets_beyond_31_bits_are_kept(device: str) -> None:
    """The table of a tensor with more than 2^31 elements, of which nothing is allocated."""
    big = torch.empty((70_000, 50_000), device="meta")
    request = Request(big, Grid.TERNARY, 2, 50_000)
    entry = table.Entry(big, request.format, first_segment=3_000_000_000, first_byte=1 << 40)
    ((row, tile),) = entry.items(mixed=False)
    assert row[1:] == [50_000, 50_000, 70_000, 1 << 40, 12_500, 3_000_000_000, 1]
    assert tile.loop


def test_a_segment_too_long_for_what_32_bits_count_is_refused() -> None:
    endless = torch.empty((1, 2**28), device="meta")
    with pytest.raises(
        ValueError, match="segments of 268435456 elements; a kernel takes 268369920 at most: use groups"
    ):
        table.Batch.of(endless, Request(endless, Grid.TERNARY, 2, 2**28).format)


def test_ternary_codes_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="bits is 3 for ternary codes; they take 2"):
        quantize_group([Request(torch.ones(2, 8), Grid.TERNARY, 3, 8)])
