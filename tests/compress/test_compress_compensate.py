"""The equation for c: by hand, against brute force, and the invariances it must have."""

from __future__ import annotations

import pytest
import torch
from dfmpc.compress.compensate import NormVectors, Solution, solve, summarise
from torch import Tensor


def vectors(count: int, seed: int = 0) -> NormVectors:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64) * (high - low) + low

    return NormVectors(draw(0.5, 2), draw(-1, 1), draw(-1, 1), draw(0.5, 2), draw(-1, 1), draw(0.5, 2))


def rows(count: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(count, length, generator=generator, dtype=torch.float64)
    return weight, (weight * 2).round() / 2


def test_one_channel_by_hand() -> None:
    one = torch.ones(1, dtype=torch.float64)
    norm = NormVectors(2 * one, 0.5 * one, one, 2 * one, 3 * one, 4 * one)
    # X = W, X^ = W^ / 2; y = 0.5 - 1 = -0.5, y^ = 0.5 - 1.5 = -1; <W^,W> = 6, ||W^||^2 = 8:
    # c = (6/2 + 0.5 * 0.5) / (8/4 + 0.5 * 1) = 3.25 / 2.5
    found = solve(6 * one, 8 * one, 0 * one, norm, 0.5, 0.0)
    assert found.c.item() == pytest.approx(1.3, abs=1e-15)


def test_c_minimises_the_objective() -> None:
    weight, quantized = rows(16, 27, 3)
    norm, bias = vectors(16), torch.linspace(-0.3, 0.3, 16, dtype=torch.float64)
    found = solve((weight * quantized).sum(1), quantized.square().sum(1), bias, norm, 0.5, 0.01)
    x, x_hat = (norm.gamma / norm.sigma)[:, None] * weight, (norm.gamma / norm.quantized_sigma)[:, None] * quantized
    y = norm.beta + norm.gamma * (bias - norm.mean) / norm.sigma
    y_hat = norm.beta + norm.gamma * (bias - norm.quantized_mean) / norm.quantized_sigma
    grid = torch.linspace(0, 3, 30001, dtype=torch.float64)

    losses = torch.stack([_loss(c, x, x_hat, y, y_hat) for c in grid])
    best = grid[losses.argmin(0)]
    torch.testing.assert_close(found.c, best, atol=1e-4, rtol=0)


def _loss(c: Tensor, x: Tensor, x_hat: Tensor, y: Tensor, y_hat: Tensor) -> Tensor:
    return (c * x_hat - x).square().sum(1) + 0.5 * (c * y_hat - y).square() + 0.01 * c.square()


def test_unchanged_weights_and_statistics_give_one() -> None:
    weight, _ = rows(8, 9, 1)
    norm = vectors(8)
    same = NormVectors(norm.gamma, norm.beta, norm.mean, norm.sigma, norm.mean, norm.sigma)
    power = weight.square().sum(1)
    found = solve(power, power, torch.zeros(8, dtype=torch.float64), same, 0.5, 0.0)
    torch.testing.assert_close(found.c, torch.ones(8, dtype=torch.float64), atol=1e-14, rtol=0)


def test_c_is_never_negative() -> None:
    norm = vectors(4)
    power = torch.ones(4, dtype=torch.float64)
    found = solve(-5 * power, power, 0 * power, norm, 0.0, 0.0)
    assert found.c.tolist() == [0, 0, 0, 0]


def test_dead_channels_get_one_and_are_counted() -> None:
    norm = vectors(3)
    power = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    found = solve(power, power, 0 * power, norm, 0.0, 0.0)
    assert found.dead.tolist() == [False, True, False]
    assert found.c[1].item() == 1
    assert bool(torch.isfinite(found.c).all())


def test_a_layer_of_zeros_is_all_dead() -> None:
    zeros = torch.zeros(3, dtype=torch.float64)
    found = solve(zeros, zeros, zeros, vectors(3), 0.0, 0.0)
    assert found.c.tolist() == [1, 1, 1]


def test_channel_permutation_commutes() -> None:
    weight, quantized = rows(12, 9, 5)
    norm, order = vectors(12), torch.randperm(12, generator=torch.Generator().manual_seed(2))
    zeros = torch.zeros(12, dtype=torch.float64)
    dot, power = (weight * quantized).sum(1), quantized.square().sum(1)
    plain = solve(dot, power, zeros, norm, 0.5, 0.0).c
    permuted = NormVectors(*(getattr(norm, name)[order] for name in norm.__dataclass_fields__))
    assert torch.equal(solve(dot[order], power[order], zeros, permuted, 0.5, 0.0).c, plain[order])


def test_the_summary_counts_every_channel_once() -> None:
    c = torch.tensor([0.0, 0.95, 1.0, 5.0], dtype=torch.float64)
    found = summarise([Solution(c, torch.tensor([False, False, True, False]))])
    assert (found.minimum, found.maximum, found.dead) == (0, 5, 1)
    assert sum(found.histogram) == 4
    assert (found.histogram[0], found.histogram[9], found.histogram[10], found.histogram[19]) == (1, 1, 1, 1)
