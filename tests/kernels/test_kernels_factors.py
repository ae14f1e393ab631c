"""Factors of input channels: kernels multiply as they read, one tensor or many, and give what the reference gives."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from dfmpc.errors import NonFiniteError
from dfmpc.kernels import Grid, Quantized
from dfmpc.kernels.group import Request, quantize_group, quantize_group_triton
from dfmpc.kernels.table import Batch
from dfmpc.kernels.uniform import uniform_reference, uniform_triton
from torch import Tensor

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

UNIFORM = [Grid.DOREFA, Grid.SYMMETRIC, Grid.ASYMMETRIC]
FIELDS = ("codes", "scale", "zero_point", "dot", "quantized_norm", "original_norm", "zeros")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(found: Quantized, expected: Quantized) -> None:
    assert found.format == expected.format
    for name in FIELDS:
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        assert b is None or torch.equal(a.cpu(), b), name


@pytest.fixture
def no_pass_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernels' side fail where a weight is multiplied before they see it."""
    monkeypatch.setattr(import_module("dfmpc.kernels.uniform"), "multiplied", lambda *_: pytest.fail("multiplied"))


SHAPES = {
    "one element": (5, 1, 1, 1),
    "3x3 depthwise": (70, 9, 9, 9),
    "5x5 depthwise": (9, 25, 25, 25),
    "first layer": (4, 27, 27, 9),
    "whole loads": (5, 64, 64, 1),
    "groups that cut channels": (5, 72, 8, 9),
    "groups of whole loads": (3, 96, 32, 2),
    "a short last group": (3, 75, 24, 3),
    "prime": (3, 131, 131, 1),
    "a prime channel": (2, 262, 262, 131),
    "long, anywhere": (2, 1031, 1031, 1),
    "3x3": (2, 576, 576, 9),
    "longer than a tile": (1, 4620, 4620, 4),
    "groups of a long row": (1, 5000, 1000, 4),
}


@pytest.mark.usefixtures("no_pass_of_its_own")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind_of_tile_multiplies_as_the_reference(shape: str, dtype: torch.dtype, device: str) -> None:
    rows, length, group_size, taps = SHAPES[shape]
    weight, factor = drawn(rows, length).to(dtype), drawn(length // taps, seed=1) + 2
    grid = UNIFORM[(length + (dtype is torch.bfloat16)) % 3]
    found = uniform_triton(weight.to(device), 4, grid, group_size=group_size, factor=factor.to(device))
    plain = weight.float() * torch.stack([factor[i // taps] for i in range(length)])
    assert_same(found, uniform_reference(plain, 4, grid, group_size=group_size))


@pytest.mark.usefixtures("no_pass_of_its_own")
@pytest.mark.parametrize("grid", UNIFORM)
@pytest.mark.parametrize("clip", [1.0, 0.6])
def test_one_scale_for_all_rows_is_that_of_the_products(grid: Grid, clip: float, device: str) -> None:
    weight, factor = drawn(6, 60).half(), torch.logspace(-3, 1, 12)
    options = {"group_size": 60, "layer_wise": True, "clip": clip}
    found = uniform_triton(weight.to(device), 5, grid, factor=factor, **options)
    plain = weight.float() * factor.repeat_interleave(5)
    assert_same(found, uniform_reference(plain, 5, grid, **options))


def test_short_rows_with_every_number_of_channels(device: str) -> None:
    for length in (1, 2, 9, 12, 18):
        weight = drawn(3, length, seed=length)
        for channels in (n for n in range(1, length + 1) if length % n == 0):
            factor = drawn(channels, seed=channels)
            for group_size in {8, length}:
                if group_size <= length:
                    options = {"group_size": group_size, "factor": factor}
                    found = uniform_triton(weight.to(device), 3, Grid.ASYMMETRIC, **options)
                    assert_same(found, uniform_reference(weight, 3, Grid.ASYMMETRIC, **options))


@pytest.mark.parametrize("grid", UNIFORM)
def test_a_group_has_a_factor_for_some_and_none_for_others(
    grid: Grid, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches, launch = [], Batch.launch

    def counted(batch: Batch, *outputs: object, **constants: object) -> None:
        launches.append((len(batch.entries), batch.factored))
        launch(batch, *outputs, **constants)

    shapes = [(3, 9, 9), (2, 64, 1), (4, 27, 9), (2, 30, 2), (2, 36, 9), (1, 1025, 5)]
    weights = [drawn(rows, length, seed=length) for rows, length, _ in shapes]
    factors = [drawn(length // taps, seed=taps) for _, length, taps in shapes]
    requests = [Request(w.to(device), grid, 4, w.shape[1], factor=c) for w, c in zip(weights, factors, strict=True)]
    requests += [Request(w.to(device), grid, 4, w.shape[1]) for w in weights[:3]]
    requests += [Request(drawn(2, 200).to(device), grid, 4, 64, factor=factors[1][:50])]
    requests += [Request(torch.zeros(0, 9, device=device), grid, 4, 9, factor=factors[0])]
    expected = quantize_group([_on_cpu(request) for request in requests])
    monkeypatch.setattr(Batch, "launch", counted)
    for found, one in zip(quantize_group_triton(requests), expected, strict=True):
        assert_same(found, one)
    assert launches == [(7, True), (3, False)]


def _on_cpu(request: Request) -> Request:
    return Request(request.weight.cpu(), request.grid, request.bits, request.group_size, factor=request.factor)


def test_a_group_of_whole_tensors_takes_their_products_extremes(device: str) -> None:
    requests = [
        Request(drawn(3, 40).to(device), Grid.DOREFA, 6, 40, layer_wise=True, factor=drawn(8, seed=3)),
        Request(drawn(4, 21).to(device), Grid.DOREFA, 6, 21, layer_wise=True, factor=drawn(3, seed=4)),
    ]
    for found, request in zip(quantize_group_triton(requests), requests, strict=True):
        options = {"group_size": request.group_size, "layer_wise": True, "factor": request.factor}
        assert_same(found, uniform_reference(request.weight.cpu(), 6, Grid.DOREFA, **options))


def test_where_each_factor_begins_and_how_a_segment_finds_its_columns() -> None:
    batch = Batch()
    for weight, group_size, factor in ((torch.ones(3, 9), 9, torch.ones(9)), (torch.ones(2, 40), 16, torch.zeros(40))):
        batch.add(weight, Request(weight, Grid.SYMMETRIC, 4, group_size).format, factor)
    sent = batch.factors.cpu()
    # two tensors of four numbers; 9 floats take 12, so that the next begins with 16 bytes; 3 segments lie before it
    assert sent[:8].tolist() == [8, 0, 1, 9, 14, 3, 3, 16]
    assert sent[8:].view(torch.float32).tolist() == [1.0] * 9 + [0.0] * 3 + [0.0] * 40


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("layer_wise", [False, True])
def test_a_factor_that_is_not_finite_is_refused_with_the_rows(value: float, layer_wise: bool, device: str) -> None:
    weight, factor = drawn(4, 36), torch.ones(4)
    factor[2] = value
    for weights, text in ((weight, "4 of 4 weight rows"), (torch.zeros(4, 36), "4 of 4 weight rows")):
        for run, there in ((uniform_reference, weights), (uniform_triton, weights.to(device))):
            with pytest.raises(NonFiniteError, match=f"{text} hold NaN or Inf, the first is row 0"):
                run(there, 4, Grid.DOREFA, group_size=36, layer_wise=layer_wise, factor=factor)


def test_products_beyond_float32_are_refused_and_those_below_are_rounded(device: str) -> None:
    weight = drawn(3, 16)
    weight[1, 5] = 3e38
    for run, there in ((uniform_reference, weight), (uniform_triton, weight.to(device))):
        with pytest.raises(NonFiniteError, match="1 of 3 weight rows hold NaN or Inf, the first is row 1"):
            run(there, 4, Grid.SYMMETRIC, group_size=16, factor=torch.full((16,), 2.0))
    options = {"group_size": 16, "factor": torch.linspace(1, 2, 16) * 2.0**-120}
    tiny = drawn(3, 16) * 2.0**-24
    for grid in UNIFORM:
        found = uniform_triton(tiny.to(device), 8, grid, **options)
        assert_same(found, uniform_reference(tiny, 8, grid, **options))


def test_weights_and_factors_may_be_views(device: str) -> None:
    weight, factor = drawn(30, 8).to(device).T, drawn(20, seed=5)[::2]
    found = uniform_triton(weight, 4, Grid.SYMMETRIC, group_size=30, factor=factor)
    assert_same(
        found, uniform_reference(weight.cpu().contiguous(), 4, Grid.SYMMETRIC, group_size=30, factor=factor.clone())
    )


def test_factors_that_cannot_be_are_refused_in_a_group() -> None:
    weight = torch.ones(2, 8)
    ternary = [Request(weight, Grid.TERNARY, 2, 8, factor=torch.ones(8))]
    short = [Request(weight, Grid.DOREFA, 4, 8, factor=torch.ones(3))]
    for run in (quantize_group, quantize_group_triton):
        with pytest.raises(ValueError, match="factor is given for ternary codes; only uniform grids take one"):
            run(ternary)
        with pytest.raises(ValueError, match=r"factor is torch.float32 with shape \(3,\) for rows of 8"):
            run(short)
