"""What bench_kernels.py relies on: launches caught and repeated, results compared to the last bit, the same chains."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no wheel for this system")

from dfmpc.kernels import Grid, pack
from dfmpc.kernels.optimum import optimal_thresholds_triton
from dfmpc.kernels.packing import pack_triton, unpack_triton
from dfmpc.kernels.segments import code_format
from dfmpc.kernels.statistics import row_statistics_triton, statistics_batch
from dfmpc.kernels.table import Batch
from dfmpc.kernels.tap_sums import tap_sums_triton
from dfmpc.kernels.ternary import ternary_reference
from dfmpc.kernels.uniform import uniform_reference


@pytest.fixture(autouse=True)
def scripts(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the scripts' modules be imported."""
    monkeypatch.syspath_prepend(project / "scripts")


@pytest.fixture
def shapes() -> ModuleType:
    import bench_kernels_shapes  # noqa: PLC0415

    return bench_kernels_shapes


def test_layers_have_the_parameters_of_their_networks(shapes: ModuleType) -> None:
    elements = [each.input_bytes // each.dtype.itemsize for each in shapes.GROUPED]
    # convolutions and the classifier's matrix: all but norms and one bias of 1000
    assert elements[:2] == [25_557_032 - 53_120 - 1000, 3_504_872 - 34_112 - 1000]
    assert elements[2] * 2 == 436_207_616
    assert [len(each.layers) for each in shapes.GROUPED] == [54, 53, 7]
    one = shapes.GROUPED[0].as_one()
    assert 0 <= shapes.GROUPED[0].input_bytes - one.input_bytes < 512 * 4


@pytest.mark.parametrize(("rows", "count", "expected"), [(1, 5, [0]), (4, 9, [0, 1, 2, 3]), (101, 3, [0, 50, 100])])
def test_the_first_and_the_last_row_are_sampled(shapes: ModuleType, rows: int, count: int, expected: list[int]) -> None:
    assert shapes.sampled(rows, count) == expected


def test_a_caught_launch_writes_the_same_again(device: str) -> None:
    from bench_kernels_launches import catching, poisoned  # noqa: PLC0415

    weight = torch.randn(5, 24, device=device)
    with poisoned(), catching() as caught:
        row_statistics_triton(weight, 24)
    assert len(caught.launches) == 1
    outputs = [t for t in caught.launches[0].tensors if t.numel() == 5]
    assert len(outputs) >= 4
    assert not any(torch.isnan(t).any() for t in outputs if t.is_floating_point())
    before = [t.clone() for t in outputs]
    for tensor in outputs:
        tensor.fill_(-7)
    caught.again()
    assert all(torch.equal(a, b) for a, b in zip(before, outputs, strict=True))
    assert caught.moved_bytes([weight]) >= weight.nbytes + sum(t.nbytes for t in outputs)


def test_launches_outside_the_context_are_not_caught(device: str) -> None:
    from bench_kernels_launches import catching  # noqa: PLC0415

    with catching() as caught:
        pass
    row_statistics_triton(torch.ones(1, 8, device=device), 8)
    assert caught.launches == []


@pytest.mark.parametrize(("hip", "threads"), [(None, 32), ("6.3", 64)])
def test_launches_have_the_warps_that_the_compile_check_gives_them(
    hip: str | None, threads: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device != "cpu":
        pytest.skip("a real GPU has warps of its own")
    from bench_kernels_launches import catching  # noqa: PLC0415
    from compile_kernels_cases import cases, shapes_of  # noqa: PLC0415

    expected = {
        case.kernel.fn.__name__: {shape.num_warps for _, shape in shapes_of(case, [64], "fp32", threads)}
        for case in cases("fp32")
    }
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(torch.version, "hip", hip)
    with catching() as caught:
        statistics_batch(Batch.of(weight, code_format(weight, Grid.DOREFA, 4, 64, False)))
        optimal_thresholds_triton(weight, code_format(weight, Grid.TERNARY, 2, 64, False))
        unpack_triton(pack_triton(torch.ones(64, 64, dtype=torch.uint8), 6), 6, 64)
        tap_sums_triton(weight, 1)
    found = {launch.kernel.fn.__name__: launch.constants["num_warps"] for launch in caught.launches}
    assert len(found) == 5
    assert all(expected[name] == {warps} for name, warps in found.items())
    assert set(found.values()) == {128 // threads}


def test_one_wrong_bit_takes_the_speed_away() -> None:
    from bench_kernels_check import difference, operations  # noqa: PLC0415

    weight = torch.randn(6, 16)
    ternary = next(operation for operation in operations() if operation.name == "ternary")
    result = ternary.reference(weight)
    assert difference(ternary, [weight], [result]) == ""
    result.codes[5, 3] ^= 1
    assert difference(ternary, [weight], [result]) == "ternary: codes of a [6, 16] tensor"
    result.codes[5, 3] ^= 1
    result.scale[0, 0] = torch.nextafter(result.scale[0, 0], torch.tensor(torch.inf))
    assert difference(ternary, [weight], [result]) == "ternary: scale of a [6, 16] tensor"


def test_a_wrong_tap_sum_takes_the_speed_away_too(shapes: ModuleType) -> None:
    from bench_kernels_check import difference, operations_on  # noqa: PLC0415

    timed = [[each.name for each in operations_on(single)] for single in shapes.SINGLE]
    assert ["tapped ternary" in names for names in timed] == [False, False, True, True, False, True, True]
    assert ["optimum" in names for names in timed] == [True, False, *[True] * 5]
    tapped = next(operation for operation in operations_on(shapes.SINGLE[-1]) if operation.name == "tapped ternary")
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(3))
    result = tapped.reference(weight)
    assert result.taps.quantized.squares.shape == (6, 2)
    assert difference(tapped, [weight], [result]) == ""
    result.taps.quantized.squares[2, 1] += 1.0
    assert difference(tapped, [weight], [result]) == "tapped ternary: taps.quantized.squares of a [6, 50] tensor"


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_chain_packs_the_same_stream(bits: int) -> None:
    from bench_kernels_chain import packed  # noqa: PLC0415

    codes = torch.randint(0, 2**bits, (3, 27), dtype=torch.uint8)
    assert torch.equal(packed(codes, bits), pack(codes, bits))


@pytest.mark.parametrize("length", [64, 27])
def test_the_chain_computes_what_the_reference_does(length: int) -> None:
    from bench_kernels_chain import CHAINS  # noqa: PLC0415

    weight = torch.randn(40, length, generator=torch.Generator().manual_seed(1))
    expected = {
        "ternary": ternary_reference(weight, group_size=length),
        "uniform 4": uniform_reference(weight, 4, Grid.DOREFA, group_size=length),
        "uniform 6": uniform_reference(weight, 6, Grid.DOREFA, group_size=length),
    }
    for name, found in expected.items():
        codes, scale, dot, norm, square = CHAINS[name](weight)
        assert torch.equal(codes, found.codes), name
        assert torch.allclose(scale, found.scale)
        for mine, theirs in ((dot, found.dot), (norm, found.quantized_norm), (square, found.original_norm)):
            assert torch.allclose(mine.double(), theirs, rtol=1e-5), name


def test_what_was_asked_stands_beside_what_was_reached(shapes: ModuleType) -> None:
    from bench_kernels_gpu import Row, verdicts  # noqa: PLC0415

    wide, short = shapes.SINGLE[2].name, shapes.SINGLE[5].name
    rows = [
        Row(wide, "ternary", 1.0, 2700.0, 0.91),
        Row(wide, "uniform 4", 1.0, 2600.0, 0.89),
        Row(wide, "sweep", 1.9, 2600.0, 0.5),
        Row(wide, "ternary, eager", 30.0, 90.0, 0.03),
        Row(wide, "ternary, torch.compile", 2.0, 90.0, 0.03),
        Row(short, "ternary", 1.0, 2200.0, 0.71),
        Row("ResNet-50", "ternary", 1.4, 2200.0, 0.7),
        Row("ResNet-50, one tensor", "ternary", 1.0, 2200.0, 0.7),
        Row(short, "uniform 4", 0.0, 0.0, 0.0, None, "no speed: uniform 4: codes"),
    ]
    reached = [line.split()[-3:] for line in verdicts(rows)]
    assert reached == [
        ["0.91", "0.90", "reached"],
        ["0.89", "0.90", "MISSED"],
        ["1.90", "2.00", "reached"],
        ["30.00", "20.00", "reached"],
        ["2.00", "2.50", "MISSED"],
        ["0.71", "0.70", "reached"],
        ["1.40", "1.30", "MISSED"],
    ]
