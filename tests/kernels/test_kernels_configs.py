"""Launch shapes of a card: read from its file, never decisive for a result, and one clear error where it is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this system")

from dfmpc.errors import UsageError
from dfmpc.kernels import Grid, Quantized, table
from dfmpc.kernels.moments import moments_triton
from dfmpc.kernels.shapes import Tile, measured_tile, most_registers, spare_registers, tile_for
from dfmpc.kernels.statistics import row_statistics_reference, row_statistics_triton
from dfmpc.kernels.sweep import sweep_triton
from dfmpc.kernels.ternary import ternary_reference, ternary_triton
from dfmpc.kernels.tuned import Choice, choice_for, choices_for, config_name, read_choices, write_choices
from dfmpc.kernels.uniform import uniform_reference, uniform_triton

GOOD = Choice("ternary_kernel", 4, 64, 4, 4, loop=False, num_warps=2)


def test_a_cards_file_is_named_after_it() -> None:
    assert config_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"
    assert config_name("AMD Instinct MI300X (gfx942)") == "amd-instinct-mi300x-gfx942.json"


def test_what_is_written_is_read_the_shortest_first(tmp_path: Path) -> None:
    longer = Choice("ternary_kernel", 4, 14336, 128, 4, loop=True, num_warps=4)
    file = tmp_path / "card.json"
    write_choices(file, "Card 1", "by a test", [longer, GOOD])
    assert read_choices(file) == (GOOD, longer)
    assert json.loads(file.read_text())["gpu"] == "Card 1"


def test_a_card_without_a_file_and_the_cpu_get_the_default(tmp_path: Path) -> None:
    assert read_choices(tmp_path / "unknown.json") == ()
    assert choices_for(torch.device("cpu")) == ()
    assert choice_for((), "ternary_kernel", 4, 64) is None


def _with(**change: Any) -> str:
    shape = {"kernel": "k", "itemsize": 4, "longest": 64, "threads": 4, "chunks": 4, "loop": False, "num_warps": 2}
    return json.dumps({"shapes": [shape | change]})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'shapes'"),
        (_with(num_warps=3), "powers of two"),
        (_with(threads="4"), "whole positive numbers"),
        (_with(chunks=0), "whole positive numbers"),
        (_with(threads=128), "more threads a segment than a program"),
        (_with(colour=1), "colour"),
    ],
    ids=["cut off", "a list", "no shapes", "three warps", "text", "no chunks", "wide", "unknown field"],
)
def test_a_broken_file_is_one_error_that_names_it(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "nvidia-card.json"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_choices(file)
    said = str(caught.value)
    assert said.startswith(f"{file}: ")
    assert says in said
    assert "scripts/tune_kernels.py" in said


@pytest.mark.parametrize(
    ("kernel", "itemsize", "length", "longest"),
    [
        ("ternary_kernel", 4, 64, 64),
        ("ternary_kernel", 4, 33, 64),
        ("ternary_kernel", 4, 32, None),
        ("ternary_kernel", 4, 65, 128),
        ("ternary_kernel", 4, 129, None),
        ("ternary_kernel", 2, 64, None),
        ("uniform_kernel", 4, 64, None),
    ],
)
def test_a_shape_is_for_its_kernel_and_rows_of_about_its_length(
    kernel: str, itemsize: int, length: int, longest: int | None
) -> None:
    choices = (GOOD, Choice("ternary_kernel", 4, 128, 8, 4, loop=False, num_warps=2))
    found = choice_for(choices, kernel, itemsize, length)
    assert (found.longest if found else None) == longest


def test_the_warps_hold_for_every_tile_of_a_launch_the_rest_only_where_it_suits() -> None:
    whole, rest = tile_for(64, 4, True, mixed=False), tile_for(27, 4, False, mixed=False)
    assert measured_tile(whole, GOOD, 64) == Tile(4, 4, 4, True, warps=2)
    assert measured_tile(whole, GOOD, 68).chunks == whole.chunks
    assert measured_tile(rest, GOOD, 27) == Tile(rest.threads, rest.chunks, rest.vector, False, rest.loop, warps=2)
    assert measured_tile(whole, GOOD, 64).rows == 16
    assert measured_tile(whole, None, 64) is whole


SHAPES = [
    Choice("", 4, 576, 16, 9, loop=False, num_warps=4),
    Choice("", 4, 576, 32, 5, loop=False, num_warps=1),
    Choice("", 4, 576, 4, 36, loop=False, num_warps=2),
    Choice("", 4, 576, 256, 1, loop=False, num_warps=8),
    Choice("", 4, 576, 32, 2, loop=True, num_warps=1),
    Choice("", 4, 576, 128, 1, loop=True, num_warps=8),
]


def _same(a: Quantized, b: Quantized) -> bool:
    names = ("codes", "scale", "dot", "quantized_norm", "original_norm", "zeros")
    return all(torch.equal(getattr(a, name).cpu(), getattr(b, name).cpu()) for name in names)


@pytest.mark.parametrize(
    "shape", SHAPES, ids=[f"{s.threads}x{s.chunks}-{s.num_warps}w{'-loop' * s.loop}" for s in SHAPES]
)
@pytest.mark.usefixtures("poisoned")
def test_no_result_depends_on_the_shape(shape: Choice, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []

    def measured(choices: object, kernel: str, itemsize: int, length: int) -> Choice:
        used.append((kernel, itemsize, length))
        return shape

    monkeypatch.setattr(table, "choice_for", measured)
    weight = torch.randn(5, 576, generator=torch.Generator().manual_seed(3)).to(device)
    weight[2] *= 1e-30
    how: dict[str, Any] = {"group_size": 576}
    assert _same(ternary_triton(weight, **how), ternary_reference(weight.cpu(), **how))
    for grid, bits in ((Grid.DOREFA, 6), (Grid.ASYMMETRIC, 3)):
        assert _same(uniform_triton(weight, bits, grid, **how), uniform_reference(weight.cpu(), bits, grid, **how))
    found, expected = row_statistics_triton(weight, 576), row_statistics_reference(weight.cpu(), 576)
    for name in ("absmax", "minimum", "maximum", "abs_sum", "square_sum"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    assert {kernel for kernel, *_ in used} == {"ternary_kernel", "uniform_kernel", "statistics_kernel"}


def test_groups_with_a_short_last_one_take_the_measured_warps(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "choice_for", lambda *_: GOOD)
    weight = torch.randn(3, 64 + 27, generator=torch.Generator().manual_seed(4)).to(device)
    assert _same(ternary_triton(weight, group_size=64), ternary_reference(weight.cpu(), group_size=64))


@pytest.mark.parametrize(("itemsize", "length"), [(4, 64), (4, 576), (2, 4096), (4, 14336)])
def test_the_tuner_tries_tiles_that_hold_a_row_or_walk_over_it(
    itemsize: int, length: int, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(project / "scripts")
    from tune_kernels import candidates  # noqa: PLC0415

    found = list(candidates("ternary_kernel", itemsize, length))
    assert len(set(found)) == len(found) >= 5
    for choice in found:
        held = choice.threads * choice.chunks * 16 // itemsize
        assert (2 * held <= length) if choice.loop else (length <= held < 1.5 * length)
    file = tmp_path / "card.json"
    write_choices(file, "card", "by a test", found)
    assert set(read_choices(file)) == set(found)


@pytest.mark.usefixtures("poisoned")
def test_the_tuner_forces_a_shape_within_its_context(
    device: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(project / "scripts")
    from bench_kernels_launches import catching  # noqa: PLC0415
    from tune_kernels import launched_as  # noqa: PLC0415

    weight = torch.randn(4, 64, device=device)
    grids = []
    for choice in (GOOD, Choice("ternary_kernel", 4, 64, 8, 2, loop=False, num_warps=8), None):
        with launched_as(choice), catching() as caught:
            ternary_triton(weight, group_size=64)
        grids.append((caught.launches[0].constants["KINDS"], caught.launches[0].constants["num_warps"]))
    assert grids[0] == ((Tile(4, 4, 4, True).code,), 2)
    assert grids[1] == ((Tile(8, 2, 4, True).code,), 8)
    assert grids[2] == ((tile_for(64, 4, True, mixed=False).code,), 4)


def test_registers_of_limited_kernels_let_four_or_three_programs_fit() -> None:
    small, medium, large = (Tile(64, chunks, 4, True) for chunks in (4, 6, 9))
    assert [most_registers((tile,), limited=True) for tile in (small, medium, large)] == [128, 168, None]
    assert [most_registers((tile,)) for tile in (small, medium, large)] == [None, None, None]
    assert most_registers((small, Tile(32, 2, 4, True, loop=True))) == 128
    assert most_registers((small, medium)) is None


def test_walks_over_rows_that_are_not_aligned_have_a_limit_of_registers(
    device: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(project / "scripts")
    from bench_kernels_launches import catching  # noqa: PLC0415

    limits = []
    for length in (36, 18):  # rows of float32 that are whole loads of 16 bytes, and that are not
        weight, vector = torch.randn(4, length, device=device), torch.ones(length, dtype=torch.float64)
        with catching() as caught:
            moments_triton(weight, 1, vector, vector, 0.5)
            sweep_triton(weight, grid=Grid.DOREFA, group_size=length)
        limits.append([launch.constants.get("maxnreg") for launch in caught.launches])
    assert limits == [[None, None], [64, 168]]


def test_8_bit_codes_with_zero_points_have_more_registers_where_three_programs_would_fit(
    device: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(project / "scripts")
    from bench_kernels_launches import catching  # noqa: PLC0415

    spare = spare_registers(Grid.ASYMMETRIC, 8)
    kinds = [(Tile(64, chunks, 4, True),) for chunks in (4, 6, 9)]
    assert [most_registers(kind, limited=True, spare=spare) for kind in kinds] == [128, 184, None]
    assert spare_registers(Grid.ASYMMETRIC, 7) == spare_registers(Grid.SYMMETRIC, 8) == 0
    with catching() as caught:
        for bits in (8, 7):
            uniform_triton(
                torch.randn(4, 96, device=device), bits, Grid.ASYMMETRIC, group_size=96, factor=torch.ones(8)
            )
    assert [launch.constants["maxnreg"] for launch in caught.launches] == [184, 168]
