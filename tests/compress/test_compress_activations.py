"""Moments and Hermite coefficients of every activation against brute-force integration, limits and Mehler's formula."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # torch's own convention
from dfmpc.compress.activations import RANGES, activate, hermite_coefficients
from dfmpc.compress.gaussian import Moments
from dfmpc.models.graph import Node, Op
from torch import Tensor

FUNCTIONS = {
    Op.RELU: F.relu,
    Op.RELU6: F.relu6,
    Op.LEAKY_RELU: lambda x: F.leaky_relu(x, 0.2),
    Op.SILU: F.silu,
    Op.GELU: F.gelu,
    Op.HARDSWISH: F.hardswish,
    Op.HARDSIGMOID: F.hardsigmoid,
    Op.SIGMOID: torch.sigmoid,
    Op.TANH: torch.tanh,
}
MEANS = torch.tensor([-9.0, -3.0, -0.5, 0.0, 0.7, 4.0, 7.5, 2.0, -1.0], dtype=torch.float64)
SDS = torch.tensor([0.5, 0.7, 1.0, 1.4, 0.01, 3.0, 1.2, 10.0, 0.3], dtype=torch.float64)
OPS = pytest.mark.parametrize("op", list(RANGES), ids=lambda op: op.value)


def node(op: Op) -> Node:
    return Node("f", op, ("x",), (1, 9, 4, 4), slope=0.2)


def hermite(order: int, z: Tensor) -> list[Tensor]:
    written_out = [torch.ones_like(z), z, z**2 - 1, z**3 - 3 * z, z**4 - 6 * z**2 + 3, z**5 - 10 * z**3 + 15 * z]
    return written_out[: order + 1]


def integrated(op: Op, order: int, sds: Tensor = SDS) -> tuple[Tensor, Tensor]:
    """E[f He_j] [order + 1, C] and Var f by a midpoint rule of 200,000 cells over twelve standard deviations."""
    cells = 200_000
    z = (torch.arange(cells, dtype=torch.float64) + 0.5) * (24 / cells) - 12
    weight = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) * (24 / cells)
    rows, variances = [], []
    for mean, sd in zip(MEANS, sds, strict=True):
        values = FUNCTIONS[op](mean + sd * z)
        rows.append(torch.stack([(values * he * weight).sum() for he in hermite(order, z)]))
        variances.append(((values - rows[-1][0]).square() * weight).sum())
    return torch.stack(rows, 1), torch.stack(variances)


@OPS
def test_moments_and_coefficients_agree_with_brute_force(op: Op) -> None:
    coefficients, variances = integrated(op, 5)
    moments = activate(node(op), Moments(MEANS, SDS.square()))
    # The midpoint rule's own error at a kink is about sd * cell² ~ 1e-7; ours is far below it.
    torch.testing.assert_close(moments.mean, coefficients[0], atol=1e-7, rtol=1e-9)
    torch.testing.assert_close(moments.variance, variances, atol=1e-7, rtol=1e-8)
    torch.testing.assert_close(hermite_coefficients(node(op), MEANS, SDS, 5), coefficients, atol=2e-7, rtol=1e-7)


@pytest.mark.parametrize("widest", [1.0, 2.5, 5.0])
@pytest.mark.parametrize("op", [Op.SILU, Op.GELU, Op.SIGMOID, Op.TANH], ids=lambda op: op.value)
def test_coarser_grids_for_narrow_gaussians_lose_nothing(op: Op, widest: float) -> None:
    # These functions are smooth, so that the midpoint rule is exact to rounding.
    sds = SDS * (widest / 10)
    coefficients, variances = integrated(op, 4, sds)
    moments = activate(node(op), Moments(MEANS, sds.square()))
    torch.testing.assert_close(moments.mean, coefficients[0], atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(moments.variance, variances, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(hermite_coefficients(node(op), MEANS, sds, 4), coefficients, atol=1e-10, rtol=1e-10)


@OPS
@pytest.mark.parametrize("order", [0, 1, 8])
def test_coefficient_zero_is_the_mean_and_more_coefficients_change_none(op: Op, order: int) -> None:
    found = hermite_coefficients(node(op), MEANS, SDS, order)
    assert found.shape == (order + 1, len(MEANS))
    torch.testing.assert_close(found[0], activate(node(op), Moments(MEANS, SDS.square())).mean, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(
        found, hermite_coefficients(node(op), MEANS, SDS, 9)[: order + 1], atol=1e-13, rtol=1e-12
    )


@OPS
def test_no_variance_gives_the_activation_itself(op: Op) -> None:
    means = torch.tensor([-7.0, -3.0, -1.0, 0.0, 0.25, 3.0, 6.0, 9.0], dtype=torch.float64)
    zeros = torch.zeros_like(means)
    moments = activate(node(op), Moments(means, zeros))
    expected = FUNCTIONS[op](means)
    torch.testing.assert_close(moments.mean, expected, atol=1e-15, rtol=1e-15)
    assert torch.equal(moments.variance, zeros)
    found = hermite_coefficients(node(op), means, zeros, 4)
    torch.testing.assert_close(found[0], expected, atol=1e-15, rtol=1e-15)
    assert torch.equal(found[1:], torch.zeros_like(found[1:]))


@OPS
def test_a_tiny_sd_comes_close_to_the_limit_and_huge_ones_stay_finite(op: Op) -> None:
    means = torch.tensor([-1e4, -2.0, 0.5, 2.0, 1e4, 0.0, -3.0], dtype=torch.float64)
    sds = torch.tensor([1e-9, 1e-9, 1e-9, 1e-9, 1e3, 1e3, 1e-300], dtype=torch.float64)
    moments = activate(node(op), Moments(means, sds.square()))
    torch.testing.assert_close(moments.mean[:4], FUNCTIONS[op](means[:4]), atol=1e-8, rtol=1e-8)
    assert bool((moments.variance >= 0).all())
    assert bool(torch.isfinite(moments.mean).all() & torch.isfinite(moments.variance).all())
    assert bool(torch.isfinite(hermite_coefficients(node(op), means, sds, 6)).all())


@OPS
def test_values_stay_in_the_stated_range(op: Op) -> None:
    lower, upper = RANGES[op]
    values = FUNCTIONS[op](torch.linspace(-30, 30, 600_001, dtype=torch.float64))
    assert values.min().item() == pytest.approx(-6 if lower is None else lower, abs=1e-8)
    assert values.max().item() == pytest.approx(30 if upper is None else upper, abs=1e-8)


@OPS
def test_coefficients_sum_to_the_variance(op: Op) -> None:
    # Parseval: Var f = Σ a_j² / j!; the tail behind j = 40 of a kink of weight 1 falls as j^-1.5, below 0.01 here.
    mean, sd = torch.tensor([0.3], dtype=torch.float64), torch.tensor([1.5], dtype=torch.float64)
    a = hermite_coefficients(node(op), mean, sd, 40)[1:, 0]
    total = sum(float(a[j - 1]) ** 2 / math.factorial(j) for j in range(1, 41))
    variance = activate(node(op), Moments(mean, sd.square())).variance.item()
    assert variance * 0.99 < total <= variance * (1 + 1e-9)


@pytest.mark.parametrize("correlation", [-0.8, 0.3, 0.9])
def test_mehler_gives_the_covariance_behind_two_activations(correlation: float) -> None:
    noise = torch.randn(2, 1_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = 0.4 + 1.5 * noise[0]
    y = -0.2 + 0.8 * (correlation * noise[0] + math.sqrt(1 - correlation**2) * noise[1])
    covariance = torch.cov(torch.stack([F.silu(x), F.relu6(y)]))[0, 1].item()
    a = hermite_coefficients(node(Op.SILU), torch.tensor([0.4]).double(), torch.tensor([1.5]).double(), 12)[:, 0]
    b = hermite_coefficients(node(Op.RELU6), torch.tensor([-0.2]).double(), torch.tensor([0.8]).double(), 12)[:, 0]
    series = sum(float(a[j] * b[j]) * correlation**j / math.factorial(j) for j in range(1, 13))
    # A sample covariance of 1e6 pairs with sds 1.1 and 0.4 has a standard error below 1e-3.
    assert series == pytest.approx(covariance, abs=4e-3)


def test_maps_are_taken_element_by_element() -> None:
    means = MEANS.view(3, 3).expand(2, 3, 3)
    sds = SDS.view(3, 3).expand(2, 3, 3)
    for op in RANGES:
        assert torch.equal(
            activate(node(op), Moments(means, sds.square())).mean[1],
            activate(node(op), Moments(MEANS, SDS.square())).mean.view(3, 3),
        )
        assert hermite_coefficients(node(op), means, sds, 3).shape == (4, 2, 3, 3)
