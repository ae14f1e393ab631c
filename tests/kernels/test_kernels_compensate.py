"""The solve for c on the device: equal to its reference to the last bit, and what it says of odd channels."""

from __future__ import annotations

import math

import pytest
import torch
from dfmpc.kernels import compensate
from dfmpc.kernels.compensate import (
    BLOCK,
    LowLayer,
    NormVectors,
    Solution,
    compensate_reference,
    compensate_triton,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


def low_layer(channels: int, lambda1: float = 0.5, lambda2: float = 0.0, device: str = "cpu") -> LowLayer:
    generator = torch.Generator().manual_seed(channels)
    draw = torch.randn(9, channels, generator=generator, dtype=torch.float64)
    draw[[1, 6, 8]] = draw[[1, 6, 8]].abs() + 1e-3
    dot, power, bias, *norm = (row.contiguous().to(device) for row in draw)
    return LowLayer(dot, power, bias, NormVectors(*norm), lambda1, lambda2)


def moved(layer: LowLayer, device: str) -> LowLayer:
    norm = NormVectors(*(getattr(layer.norm, name).to(device) for name in NormVectors.__dataclass_fields__))
    vectors = (layer.dot.to(device), layer.quantized_norm.to(device), layer.bias.to(device))
    return LowLayer(*vectors, norm, layer.lambda1, layer.lambda2)


def assert_same_bits(found: Solution, expected: Solution) -> None:
    assert torch.equal(found.c.cpu().view(torch.int64), expected.c.view(torch.int64))
    assert torch.equal(found.dead.cpu(), expected.dead)
    assert found.dead.dtype is torch.bool


@pytest.mark.parametrize("channels", [1, 2, 7, 64, 513, 2 * BLOCK, 2 * BLOCK + 1])
def test_one_layer_equals_its_reference_to_the_bit(channels: int, device: str) -> None:
    layer = low_layer(channels)
    [expected] = compensate_reference([layer])
    assert_same_bits(compensate_triton([moved(layer, device)])[0], expected)
    assert bool((expected.c >= 0).all())


def test_layers_of_a_launch_keep_their_own_lambdas_and_largest_denominator(device: str) -> None:
    sizes, lambdas = (5, 1, 700, 64), [(0.5, 0.0), (0.1, 1e-3), (0.0, 0.0), (2.0, 0.7)]
    layers = [low_layer(size, *pair) for size, pair in zip(sizes, lambdas, strict=True)]
    tiny = low_layer(31, 0.0, 0.0)
    layers.append(LowLayer(1e-20 * tiny.dot, 1e-20 * tiny.quantized_norm, tiny.bias, tiny.norm, 0.0, 0.0))
    found = compensate_triton([moved(layer, device) for layer in layers])
    assert [len(solution.c) for solution in found] == [5, 1, 700, 64, 31]
    for solution, layer in zip(found, layers, strict=True):
        assert_same_bits(solution, compensate_reference([layer])[0])
    # 1e-20 of the other layers' denominators, but none of its own layer's largest
    assert int(found[-1].dead.sum()) == 0


def test_the_formula_in_exact_numbers(device: str) -> None:
    # s = 2/2 = 1, ŝ = 2/4 = 1/2, y = 0.5 + (0 - 1) = -0.5, ŷ = 0.5 + (0 - 3)/2 = -1:
    # c = (1 * 1/2 * 6 + 1/2 * 1/2) / (1/4 * 8 + 1/2 * 1 + 3/4) = 3.25 / 3.25
    one = torch.ones(1, dtype=torch.float64)
    norm = NormVectors(2 * one, 0.5 * one, one, 2 * one, 3 * one, 4 * one)
    layer = LowLayer(6 * one, 8 * one, 0 * one, norm, 0.5, 0.75)
    assert compensate_triton([moved(layer, device)])[0].c.tolist() == [1.0]
    assert compensate([layer])[0].c.tolist() == [1.0]


def test_dead_channels_are_those_below_a_fraction_of_the_largest(device: str) -> None:
    ones = torch.ones(4, dtype=torch.float64)
    norm = NormVectors(ones, 0 * ones, 0 * ones, ones, 0 * ones, ones)
    power = torch.tensor([1.0, 1e-12, 1.01e-12, 0.0], dtype=torch.float64)
    layer = LowLayer(0.5 * power, power, 0 * ones, norm, 0.0, 0.0)
    [found] = compensate_triton([moved(layer, device)])
    assert found.dead.tolist() == [False, True, False, True]
    assert found.c.tolist() == [0.5, 1.0, 0.5, 1.0]
    assert_same_bits(found, compensate_reference([layer])[0])


def test_zeros_kill_every_channel_and_negative_ratios_become_zero(device: str) -> None:
    ones = torch.ones(3, dtype=torch.float64)
    norm = NormVectors(ones, 0 * ones, 0 * ones, ones, 0 * ones, ones)
    dead = LowLayer(0 * ones, 0 * ones, 0 * ones, norm, 0.0, 0.0)
    against = LowLayer(torch.tensor([-3.0, -0.0, 0.0], dtype=torch.float64), ones, 0 * ones, norm, 0.0, 0.0)
    found = compensate_triton([moved(dead, device), moved(against, device)])
    assert (found[0].c.tolist(), found[0].dead.tolist()) == ([1.0] * 3, [True] * 3)
    assert (found[1].c.tolist(), found[1].dead.tolist()) == ([0.0] * 3, [False] * 3)
    for solution, layer in zip(found, (dead, against), strict=True):
        assert_same_bits(solution, compensate_reference([layer])[0])


@pytest.mark.parametrize("vector", ["dot", "quantized_norm"])
def test_nan_stays_in_its_channel(vector: str, device: str) -> None:
    layer = low_layer(2 * BLOCK)
    getattr(layer, vector)[BLOCK + 3] = math.nan
    layer.norm.gamma[5] = 0.0
    [found], [expected] = compensate_triton([moved(layer, device)]), compensate_reference([layer])
    assert torch.isnan(expected.c).nonzero().tolist() == [[BLOCK + 3]]
    assert torch.isnan(found.c).cpu().nonzero().tolist() == [[BLOCK + 3]]
    assert torch.equal(found.c.cpu().nan_to_num(-7.0), expected.c.nan_to_num(-7.0))
    assert torch.equal(found.dead.cpu(), expected.dead)


def test_nothing_to_solve_gives_nothing(device: str) -> None:
    assert compensate([]) == compensate_triton([]) == []
    layers = [low_layer(0), low_layer(3)]
    found = compensate_triton([moved(layer, device) for layer in layers])
    assert (found[0].c.shape, found[0].dead.shape) == ((0,), (0,))
    assert_same_bits(found[1], compensate_reference(layers)[1])


def test_vectors_of_another_type_or_length_are_refused() -> None:
    layer = low_layer(4)
    short = LowLayer(layer.dot, layer.quantized_norm[:3], layer.bias, layer.norm, 0.5, 0.0)
    single = LowLayer(layer.dot, layer.quantized_norm, layer.bias.float(), layer.norm, 0.5, 0.0)
    for run in (compensate_reference, compensate_triton):
        with pytest.raises(ValueError, match=r"a vector is torch.float64 with shape \(3,\); expected float64 \(4,\)"):
            run([short])
        with pytest.raises(ValueError, match=r"a vector is torch.float32 with shape \(4,\)"):
            run([single])
