"""Second moments of input patches against a brute-force unfold, over all positions and over a subset."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dfmpc.compress import patches
from dfmpc.compress.patches import Window, sample_count, sampled_moments, window_of
from dfmpc.models.graph import Layer, Op
from torch import Tensor
from torch.nn import functional

SHAPES: list[tuple[int, int, int, tuple[int, int], int, int, int]] = [
    # inputs, outputs, groups, kernel, stride, padding, dilation
    (3, 4, 1, (3, 3), 1, 1, 1),
    (3, 4, 1, (3, 3), 2, 0, 1),
    (4, 6, 2, (3, 2), 1, 1, 1),
    (4, 4, 4, (3, 3), 2, 1, 1),
    (40, 40, 40, (3, 3), 1, 1, 1),
    (6, 12, 6, (3, 3), 1, 1, 1),
    (2, 5, 1, (3, 3), 1, 2, 2),
    (5, 3, 1, (1, 1), 1, 0, 1),
]
IDS = [f"{i}to{o}g{g}k{k[0]}x{k[1]}s{s}p{p}d{d}" for i, o, g, k, s, p, d in SHAPES]


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Correlated channels with means, so that centring and cross terms count."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator)
    return values + 0.5 * values.roll(1, 1) + torch.randn(1, shape[1], *[1] * (len(shape) - 2), generator=generator)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def convolution(name: str, shape: tuple[int, ...], groups: int = 1) -> Layer:
    return Layer(name, f"{name}.weight", None, Op.CONV, shape, groups)


def expected(rows: Tensor, target: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Cov(h, h) and Cov(t, h), in float64, of patches [M, C * taps] (channel major) and targets [M, out]."""
    h, t = (part.double() - part.double().mean(0) for part in (rows, target))
    parts, wanted = h.chunk(groups, 1), t.chunk(groups, 1)
    second = torch.stack([part.T @ part for part in parts]) / len(h)
    cross = torch.stack([want.T @ part for want, part in zip(wanted, parts, strict=True)]) / len(h)
    return second, cross


@pytest.mark.parametrize(("inputs", "outputs", "groups", "kernel", "stride", "padding", "dilation"), SHAPES, ids=IDS)
def test_all_positions_of_a_convolution(
    inputs: int, outputs: int, groups: int, kernel: tuple[int, int], stride: int, padding: int, dilation: int
) -> None:
    layer = convolution("c", (outputs, inputs // groups, *kernel), groups)
    images = draw(3, inputs, 9, 8)
    sizes = {"stride": [stride, stride], "padding": [padding, padding], "dilation": [dilation, dilation]}
    window = window_of(layer, sizes)
    assert window == Window(kernel, (stride,) * 2, (padding,) * 2, (dilation,) * 2)
    unfolded = functional.unfold(images, kernel, dilation, padding, stride)
    rows = unfolded.transpose(1, 2).reshape(-1, inputs * kernel[0] * kernel[1])
    weight = torch.randn(outputs, inputs // groups, *kernel, generator=generator())
    target = functional.conv2d(images, weight, None, stride, padding, dilation, groups)
    found = sampled_moments(images, target, layer, window, generator())
    second, cross = expected(rows, target.movedim(1, -1).reshape(-1, outputs), groups)
    assert found.second.dtype is torch.float32
    assert found.cross is not None
    torch.testing.assert_close(found.second.double(), second, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.cross.double(), cross, rtol=1e-4, atol=1e-4)
    # t = W h, so the cross-covariance is W H: the order of the columns is that of the rows of the weight
    by_weight = weight.flatten(1).double().view(groups, -1, second.shape[-1]) @ second
    torch.testing.assert_close(found.cross.double(), by_weight, rtol=1e-3, atol=1e-3)


def test_a_one_dimensional_convolution() -> None:
    layer, signal = convolution("c", (4, 3, 5)), draw(2, 3, 20)
    window = window_of(layer, {"stride": [2], "padding": [1], "dilation": [2]})
    weight = torch.randn(4, 3, 5, generator=generator())
    target = functional.conv1d(signal, weight, None, 2, 1, 2)
    unfolded = functional.unfold(signal.unsqueeze(2), (1, 5), (1, 2), (0, 1), (1, 2))
    second, cross = expected(unfolded.transpose(1, 2).reshape(-1, 15), target.movedim(1, -1).reshape(-1, 4), 1)
    found = sampled_moments(signal, target, layer, window, generator())
    assert found.cross is not None
    torch.testing.assert_close(found.second.double(), second, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.cross.double(), cross, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(40, 6), (5, 7, 6), (2, 3, 4, 6)], ids=["features", "tokens", "channels_last"])
def test_a_linear_layer_over_all_its_positions(shape: tuple[int, ...]) -> None:
    layer = Layer("fc", "fc.weight", None, Op.LINEAR, (4, 6))
    features = draw(*shape)
    target = features @ torch.randn(6, 4, generator=generator())
    second, cross = expected(features.reshape(-1, 6), target.reshape(-1, 4), 1)
    found = sampled_moments(features, target, layer, None, generator())
    assert found.cross is not None
    torch.testing.assert_close(found.second.double(), second, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.cross.double(), cross, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 2], ids=["dense", "grouped"])
def test_a_subset_has_the_moments_of_the_positions_that_the_seed_draws(
    groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patches, "SAMPLES", 50)
    monkeypatch.setattr(patches, "SAMPLES_A_WEIGHT", 0)
    layer, images = convolution("c", (6, 4 // groups, 3, 3), groups), draw(3, 4, 8, 8)
    target = draw(3, 6, 8, 8, seed=1)
    chosen = torch.randperm(3 * 64, generator=generator())[:50]
    rows = functional.unfold(images, 3, 1, 1).transpose(1, 2).reshape(-1, 36)[chosen]
    wanted = target.movedim(1, -1).reshape(-1, 6)[chosen]
    second, cross = expected(rows, wanted, groups)
    found = sampled_moments(images, target, layer, Window((3, 3), (1, 1), (1, 1), (1, 1)), generator())
    assert found.cross is not None
    torch.testing.assert_close(found.second.double(), second, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.cross.double(), cross, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layer", "positions", "count"),
    [
        (convolution("c", (8, 16, 3, 3)), 1000, 1000),
        (convolution("c", (8, 16, 3, 3)), 100_000, patches.SAMPLES),
        (convolution("c", (8, 2048, 3, 3)), 100_000, int(2048 * 9 * patches.SAMPLES_A_WEIGHT)),
        (convolution("c", (16, 1, 3, 3), 16), 100_000, patches.DEPTHWISE_SAMPLES),
    ],
    ids=["all", "least", "long_rows", "depthwise"],
)
def test_how_many_positions_are_sampled(layer: Layer, positions: int, count: int) -> None:
    assert sample_count(layer, positions) == count


@pytest.mark.parametrize("length", [10, 12, 13, 29], ids=str)
def test_a_matrix_in_blocks_is_the_whole_and_symmetric(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = draw(2, 50, length)
    plain = patches._contract(values, values)
    monkeypatch.setattr(patches, "_BLOCKED", 8)
    blocked = patches._gram(values)
    torch.testing.assert_close(blocked, plain, rtol=1e-5, atol=1e-6)
    assert torch.equal(blocked, blocked.transpose(1, 2))


@pytest.mark.parametrize(
    ("shape", "arguments", "window"),
    [
        ((4, 3, 3, 3), {"padding": "same"}, Window((3, 3), (1, 1), (1, 1), (1, 1))),
        ((4, 3, 3, 3), {"padding": "same", "dilation": [2, 2]}, Window((3, 3), (1, 1), (2, 2), (2, 2))),
        ((4, 3, 3, 3), {"padding": "valid", "stride": 2}, Window((3, 3), (2, 2), (0, 0), (1, 1))),
        ((4, 3, 2, 3), {"padding": "same"}, None),
        ((4, 3, 3, 3, 3), {}, None),
    ],
    ids=["same", "same_dilated", "valid", "same_of_even_size", "three_dimensions"],
)
def test_windows_of_named_paddings(shape: tuple[int, ...], arguments: dict[str, Any], window: Window | None) -> None:
    assert window_of(convolution("c", shape), arguments) == window
